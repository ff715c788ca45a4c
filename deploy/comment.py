"""Put a report on its pull request, as one comment that is replaced in place; only Python is needed.

python3 deploy/comment.py model-report.md --head OWNER:BRANCH --commit SHA

GITHUB_TOKEN and GITHUB_REPOSITORY are those that GitHub gives to a workflow. The comment is found by its mark and its
author, not by a commit, so it survives a rebase. A report of a commit that isn't the newest any more is left out.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

MARK = "<!-- mlops-course: model report -->"  # as mlops_course.delivery.report writes it
AUTHOR = "github-actions[bot]"
MOST = 60_000  # characters; GitHub takes 65,536
PAGE = 100  # comments or pull requests in one answer
PAGES = 50


def call(method: str, path: str, body: Any = None) -> Any:
    """Ask GitHub; its answer as JSON."""
    address = f"{os.environ.get('GITHUB_API_URL', 'https://api.github.com')}/repos/{os.environ['GITHUB_REPOSITORY']}"
    headers = {"Accept": "application/vnd.github+json", "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(f"{address}{path}", data, headers, method=method), timeout=30) as response:
            return json.load(response)
    except (HTTPError, URLError, ValueError) as error:
        raise SystemExit(f"GitHub: {method} {path}: {error}") from error


def pages(path: str, **query: str) -> Iterator[Any]:
    """What a list holds, page after page."""
    for page in range(1, PAGES + 1):
        found = call("GET", f"{path}?{urlencode({**query, 'per_page': PAGE, 'page': page})}")
        yield from found
        if len(found) < PAGE:
            return


def read_report(path: Path) -> str:
    """The report, as long as GitHub takes it."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MOST + 1)
    if not text.startswith(MARK):
        raise SystemExit(f"{path} isn't a report: it doesn't begin with {MARK}")
    return text if len(text) <= MOST else f"{text[:MOST]}\n\n… the rest is in the artifact of the run."


def main() -> None:
    """Post a report, or put it in the place of the one before."""
    parser = argparse.ArgumentParser(description="Put a report on its pull request.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--head", required=True, help="OWNER:BRANCH")
    parser.add_argument("--commit", required=True, help="what was reported on")
    given = parser.parse_args()
    text = f"{read_report(given.report)}\n\nOf commit {given.commit[:12]}."
    open_ones = pages("/pulls", state="open", head=given.head)
    number = next((pull["number"] for pull in open_ones if pull["head"]["sha"] == given.commit), None)
    if number is None:
        print(f"{given.commit[:12]} isn't the head of an open pull request any more: nothing to say")
        return
    comments = pages(f"/issues/{number}/comments")
    ours = (each for each in comments if each["user"]["login"] == AUTHOR and each["body"].startswith(MARK))
    if (before := next(ours, None)) is None:
        call("POST", f"/issues/{number}/comments", {"body": text})
    else:
        call("PATCH", f"/issues/comments/{before['id']}", {"body": text})
    print(f"{'posted on' if before is None else 'updated on'} pull request {number}")


if __name__ == "__main__":
    main()
