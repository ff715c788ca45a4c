"""Say who has agreed to this run of a workflow: the reviewer of its environment. Exit status 1: nobody had to."""

from __future__ import annotations

import json
import os
import sys
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def main() -> None:
    """Print the last reviewer's name."""
    api, repository = os.environ.get("GITHUB_API_URL", "https://api.github.com"), os.environ["GITHUB_REPOSITORY"]
    address = f"{api}/repos/{repository}/actions/runs/{os.environ['GITHUB_RUN_ID']}/approvals"
    headers = {"Accept": "application/vnd.github+json", "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}"}
    try:
        with urlopen(Request(address, headers=headers), timeout=30) as response:
            found = json.load(response)
    except (HTTPError, URLError, ValueError) as error:
        sys.exit(f"GitHub doesn't say who has approved this run: {error}")
    approvers = [each["user"]["login"] for each in found if each["state"] == "approved"]
    if not approvers:
        sys.exit("nobody has approved this run: give its environment required reviewers, in the repository's settings")
    print(approvers[-1])


if __name__ == "__main__":
    main()
