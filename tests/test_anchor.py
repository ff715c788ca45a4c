"""A ledger that was anchored: edited, cut off or replaced, it is found out, however well its chain was repaired."""

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mlops_course.environment import Settings
from mlops_course.ledger import LedgerEntry, append_entry, read_ledger, seal_line, verify_ledger
from mlops_course.security.anchor import (
    Anchor,
    AnchorError,
    anchor_file,
    anchor_ledger,
    check_anchors,
    read_anchors,
)
from mlops_course.security.keys import create_key
from mlops_course.security.signing_key import SigningKeyError


def promote(settings: Settings, number: int, reason: str = "better") -> None:
    about = {"event": "promote", "use_case": "flight-delay", "subject": f"flight-delay@{number}"}
    append_entry(settings, LedgerEntry(**about, by="ann", reason=reason))


@pytest.fixture
def anchored(settings: Settings) -> Settings:
    """A ledger of twelve lines, anchored at 4, 8 and 12."""
    for number in range(1, 13):
        promote(settings, number)
        if number % 4 == 0:
            anchor_ledger(settings)
    return settings


def rewrite(settings: Settings, edited: int) -> None:
    """Change one line, and seal it and all after it anew, as somebody would who knows how."""
    previous, lines = "", []
    for entry in read_ledger(settings):
        reason = "worse" if entry.number == edited else entry.reason
        line = seal_line(msgspec.structs.replace(entry, reason=reason, previous=previous))
        previous = msgspec.json.decode(line, type=LedgerEntry).hash
        lines.append(line)
    settings.ledger.write_bytes(b"".join(lines))


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "import sys; from mlops_course.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_ledger_that_nobody_touched_is_the_one_that_was_anchored(anchored: Settings) -> None:
    promote(anchored, 13)
    assert check_anchors(anchored) == []
    assert [each.number for each in read_anchors(anchored)] == [4, 8, 12]
    assert anchor_ledger(anchored).number == 13


@pytest.mark.parametrize("edited", range(1, 13))
def test_a_line_that_was_edited_with_all_after_it_is_found(anchored: Settings, edited: int) -> None:
    rewrite(anchored, edited)
    assert verify_ledger(anchored) == [], "by its chain alone it is whole"
    (found,) = check_anchors(anchored)
    first = (edited - 1) // 4 * 4 + 1
    assert found.line == first and f"to line {first + 3}" in found.problem


@pytest.mark.parametrize("left", range(12))
def test_a_ledger_that_was_cut_off_is_found_and_the_line_is_named(anchored: Settings, left: int) -> None:
    anchored.ledger.write_bytes(b"".join(anchored.ledger.read_bytes().splitlines(keepends=True)[:left]))
    (found,) = check_anchors(anchored)
    assert found.line == left + 1 and "cut off, or an older copy" in found.problem


def test_a_ledger_that_is_gone_is_found(anchored: Settings) -> None:
    anchored.ledger.unlink()
    assert verify_ledger(anchored) == [] and check_anchors(anchored)[0].line == 1


def test_an_older_copy_that_has_grown_again_is_found(anchored: Settings) -> None:
    anchored.ledger.write_bytes(b"".join(anchored.ledger.read_bytes().splitlines(keepends=True)[:6]))
    for number in range(7, 20):
        promote(anchored, number, "another story")
    (found,) = check_anchors(anchored)
    assert found.line == 5 and "to line 8" in found.problem


def test_another_workspace_s_ledger_is_found(anchored: Settings, tmp_path: Path) -> None:
    other = anchored.model_copy(update={"home": tmp_path / "other"}).prepare()
    for number in range(1, 20):
        promote(other, number, "other")
    anchor_ledger(other)
    shutil.copy(other.ledger, anchored.ledger)
    assert check_anchors(anchored)[0].line == 1
    assert check_anchors(other) == [], "each place has its own anchors"


@pytest.mark.parametrize("kind", ["edited", "signed by another", "moved from another place"])
def test_an_anchor_that_was_tampered_with_is_found(anchored: Settings, kind: str, tmp_path: Path) -> None:
    path = anchor_file(anchored)
    rewrite(anchored, 12)
    last = read_ledger(anchored)[-1]
    anchors = read_anchors(anchored)
    forged = msgspec.structs.replace(anchors[-1], hash=last.hash)
    if kind == "signed by another":
        thief = anchored.model_copy(update={"trust": tmp_path / "thief"})
        forged = anchor_ledger(thief)
    if kind == "moved from another place":
        forged = msgspec.structs.replace(forged, home=str(tmp_path / "elsewhere"))
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in [*anchors[:-1], forged]))
    assert [found.line for found in check_anchors(anchored)] == [12]


def test_a_damaged_ledger_is_not_anchored_unless_somebody_says_that_it_is_right(anchored: Settings) -> None:
    shutil.rmtree(anchored.home)
    promote(anchored.prepare(), 1)
    with pytest.raises(AnchorError, match="older copy"):
        anchor_ledger(anchored)
    assert isinstance(anchor_ledger(anchored, afresh=True), Anchor)
    assert check_anchors(anchored) == [] and len(read_anchors(anchored)) == 1


def test_anchors_that_cannot_be_read_or_verified_are_no_anchors_that_agree(anchored: Settings) -> None:
    for path in anchored.trust.glob("*.pem"):
        path.unlink()
    with pytest.raises(SigningKeyError, match="verify"):
        check_anchors(anchored)
    anchor_file(anchored).write_text("nonsense\n")
    with pytest.raises(AnchorError, match="isn't a file of anchors"):
        check_anchors(anchored)


def test_the_commands_verify_and_anchor_and_go_on_anchoring(settings: Settings) -> None:
    promote(settings, 1)
    create_key(settings, "desk", "predict")
    assert run("keys", "create", "x", "--role", "predict").returncode == 0
    assert not settings.trust.exists(), "outside the workspace nothing is written until somebody asks for it"
    assert "line 3 is anchored" in run("ledger", "anchor").stdout
    assert run("keys", "create", "y", "--role", "predict").returncode == 0
    assert [each.number for each in read_anchors(settings)] == [3, 4]
    settings.ledger.write_bytes(b"".join(settings.ledger.read_bytes().splitlines(keepends=True)[:2]))
    done = run("ledger", "verify")
    assert done.returncode == 1 and "line 3" in done.stdout
    done = run("keys", "create", "z", "--role", "predict")
    assert done.returncode == 0 and "the ledger isn't anchored: line 1" in done.stderr
