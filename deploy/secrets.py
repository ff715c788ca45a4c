"""Makes the passwords that compose.yaml asks for: `python deploy/secrets.py`. What is there already stays."""

import os
import secrets
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "secrets"
NAMES = ("postgres_password", "grafana_password")


def make_secrets(folder: Path = FOLDER) -> list[Path]:
    """Write a random password into each file that isn't there; the files that were made."""
    folder.mkdir(mode=0o700, exist_ok=True)
    made = []
    for name in NAMES:
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))  # also fine inside an address
        made.append(folder / name)
    return made


if __name__ == "__main__":
    for path in make_secrets():
        print(f"made {path}")
