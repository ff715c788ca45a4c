"""Bundles that were changed by somebody who knows their format."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from mlops_course.serving.bundle import Manifest


def reseal(folder: Path, **changes: Any) -> None:
    """Change what a manifest says, and compute its digest anew; one that makes no sense keeps the old digest."""
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8")) | changes
    try:
        about = msgspec.structs.replace(msgspec.convert(manifest, Manifest), digest="")
        manifest["digest"] = hashlib.sha256(msgspec.json.encode(about)).hexdigest()
    except msgspec.ValidationError:
        pass
    (folder / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and all checksums that depend on it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    reseal(folder, files=manifest["files"] | {name: hashlib.sha256(content).hexdigest()})
