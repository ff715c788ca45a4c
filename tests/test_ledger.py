"""The ledger: lines are added and never change, and whatever else happens to the file is found."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlops_course.environment import Settings, WorkspaceError
from mlops_course.ledger import (
    MAX_LINE,
    LedgerEntry,
    LedgerError,
    append_entry,
    as_time,
    find_period,
    list_periods,
    read_ledger,
    read_moment,
    repair_ledger,
    seal_line,
    verify_ledger,
)

CASE = "flight-delay"


def change(subject: str, reason: str = "better") -> LedgerEntry:
    after = {"champion": subject}
    return LedgerEntry(event="promote", use_case=CASE, subject=subject, by="ann", reason=reason, after=after)


def with_signature(line: bytes) -> bytes:
    """The line as a later version may write it, with one field more."""
    fields = {**json.loads(line), "signature": "MEUCIQ"}
    del fields["hash"]
    content = json.dumps(fields).encode().removesuffix(b"}")
    return content + b',"hash":"' + hashlib.sha256(content).hexdigest().encode() + b'"}\n'


def write(path: Path, count: int) -> Settings:
    """A workspace whose ledger has some lines."""
    settings = Settings(home=path)
    for number in range(1, count + 1):
        append_entry(settings, change(f"flight-delay@{number}", f"reason {number}, in words: größer"))
    return settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return write(tmp_path / "workspace", 5)


# ---------------------------------------------------------------- what is wrong is found


def test_a_ledger_that_nobody_touched_is_whole(settings: Settings) -> None:
    assert verify_ledger(settings) == []
    assert [entry.number for entry in read_ledger(settings)] == [1, 2, 3, 4, 5]
    assert read_ledger(settings)[2].reason == "reason 3, in words: größer"
    assert verify_ledger(Settings(home=settings.home / "empty")) == []


def test_every_byte_that_is_changed_is_found_in_its_line(settings: Settings) -> None:
    sound = settings.ledger.read_bytes()
    chance = random.Random(2013)
    for place in sorted(chance.sample(range(len(sound)), 300)):
        if sound[place] == ord("\n"):
            continue
        byte = chance.choice([each for each in b'abc019{}",:' if each != sound[place]])
        settings.ledger.write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
        line = sound[:place].count(b"\n") + 1
        assert line in {defect.line for defect in verify_ledger(settings)}, (place, byte)
        with pytest.raises(LedgerError, match=rf"line {line} of"):
            read_ledger(settings)


def test_a_line_with_a_new_hash_is_given_away_by_the_next_one(settings: Settings) -> None:
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    told = json.loads(lines[1])
    told["reason"] = "made up afterwards"
    lines[1] = seal_line(LedgerEntry(**{**told, "hash": ""}))
    settings.ledger.write_bytes(b"".join(lines))
    assert [(defect.line, "another line" in defect.problem) for defect in verify_ledger(settings)] == [(3, True)]


@pytest.mark.parametrize("gone", range(4))
def test_a_removed_line_is_found(settings: Settings, gone: int) -> None:
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    settings.ledger.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    (defect,) = verify_ledger(settings)
    assert (defect.line, f"number {gone + 2} follows number {gone}" in defect.problem) == (gone + 1, True)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 3), (3, 4), (0, 4)])
def test_lines_in_another_order_are_found(settings: Settings, one: int, other: int) -> None:
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    lines[one], lines[other] = lines[other], lines[one]
    settings.ledger.write_bytes(b"".join(lines))
    assert verify_ledger(settings)[0].line == one + 1


def test_the_lines_of_another_ledger_do_not_fit(settings: Settings, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 5).ledger.read_bytes().splitlines(keepends=True)
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    settings.ledger.write_bytes(b"".join(lines[:3] + other[3:]))
    assert [defect.line for defect in verify_ledger(settings)] == [4]


def test_a_line_without_an_end_is_read_in_bounded_memory(settings: Settings) -> None:
    with settings.ledger.open("ab") as file:
        for _ in range(40):
            file.write(b"x" * 1_000_000)
    script = (
        "import resource, sys; from mlops_course.environment import Settings\n"
        "from mlops_course.ledger import verify_ledger\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = verify_ledger(Settings(home=sys.argv[1]))\n"
        "print([d.line for d in found], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 10_000)"
    )
    command = [sys.executable, "-c", script, str(settings.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[0] == "[6] True"
    with pytest.raises(LedgerError, match=r"line 6 of .* no end after more than 65,536 bytes"):
        read_ledger(settings)
    kept = repair_ledger(settings)
    assert kept is not None and kept.stat().st_size == 40_000_000
    assert (verify_ledger(settings), len(read_ledger(settings))) == ([], 5)


# ---------------------------------------------------------------- what was cut off


def test_wherever_the_last_line_is_cut_off_the_next_one_follows_the_one_before(settings: Settings) -> None:
    sound = settings.ledger.read_bytes()
    begin = sound[:-1].rindex(b"\n") + 1
    for cut in range(begin + 1, len(sound), 7):
        settings.ledger.write_bytes(sound[:cut])
        assert [defect.line for defect in verify_ledger(settings)] == [5]
        assert [entry.number for entry in read_ledger(settings)] == [1, 2, 3, 4], "an unfinished line says nothing"
        added = append_entry(settings, change("flight-delay@9"))
        assert (added.number, verify_ledger(settings)) == (5, [])
        kept = {path.read_bytes() for path in settings.ledger.parent.glob("torn-*")}
        assert sound[begin:cut] in kept, "it isn't lost"


def test_a_repair_sets_aside_what_was_cut_off_and_nothing_else(settings: Settings) -> None:
    sound = settings.ledger.read_bytes()
    assert repair_ledger(settings) is None
    assert settings.ledger.read_bytes() == sound
    settings.ledger.write_bytes(sound + b"\0" * 200_000)
    kept = repair_ledger(settings)
    assert kept is not None
    assert kept.read_bytes() == b"\0" * 200_000
    assert settings.ledger.read_bytes() == sound
    assert repair_ledger(Settings(home=settings.home / "empty")) is None


def test_nothing_is_added_to_a_last_line_that_was_edited(settings: Settings) -> None:
    edited = settings.ledger.read_bytes().replace(b"reason 5", b"reason 6")
    settings.ledger.write_bytes(edited)
    with pytest.raises(LedgerError, match="ledger verify"):
        append_entry(settings, change("flight-delay@6"))
    assert settings.ledger.read_bytes() == edited


FULL = """
import resource, signal, sys
from mlops_course.environment import Settings, WorkspaceError
from mlops_course.ledger import LedgerEntry, append_entry
settings = Settings(home=sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = settings.ledger.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, size + 30))
try:
    append_entry(settings, LedgerEntry(event="promote", use_case="fog", subject="fog@1", by="ann", reason="better"))
except WorkspaceError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="uses POSIX limits and signals")
def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_the_ledger_as_it_was(settings: Settings) -> None:
    sound = settings.ledger.read_bytes()
    command = [sys.executable, "-c", FULL, str(settings.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "can't write" in done.stdout
    assert settings.ledger.read_bytes() == sound


def test_a_reason_that_is_too_long_is_refused(settings: Settings) -> None:
    append_entry(settings, change("flight-delay@6", "x" * (MAX_LINE - 1000)))
    with pytest.raises(LedgerError, match="at most 65,536"):
        append_entry(settings, change("flight-delay@7", "x" * MAX_LINE))
    assert (verify_ledger(settings), len(read_ledger(settings))) == ([], 6)


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "serving").write_text("a file stands here", encoding="utf-8")
    with pytest.raises(WorkspaceError, match="can't write"):
        append_entry(Settings(home=tmp_path), change("flight-delay@1"))


# ---------------------------------------------------------------- many at once


ADD = """
import sys
from mlops_course.environment import Settings
from mlops_course.ledger import LedgerEntry, append_entry
for number in range(40):
    what = LedgerEntry(event="publish", use_case="fog", subject=f"fog@{number}", by=sys.argv[2], reason="asked for")
    append_entry(Settings(home=sys.argv[1]), what)
"""


@pytest.mark.slow
def test_eight_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    command = [sys.executable, "-c", ADD, str(tmp_path)]
    processes = [subprocess.Popen([*command, f"writer {number}"]) for number in range(8)]
    assert [process.wait(120) for process in processes] == [0] * 8
    entries = read_ledger(settings)
    assert verify_ledger(settings) == []
    assert sorted((entry.by, entry.subject) for entry in entries) == sorted(
        (f"writer {writer}", f"fog@{number}") for writer in range(8) for number in range(40)
    )
    times = [entry.time for entry in entries]
    assert times == sorted(times)


# ---------------------------------------------------------------- formats, places, times


def test_a_field_of_a_later_version_is_kept_and_sealed(settings: Settings) -> None:
    last = read_ledger(settings)[-1]
    line = with_signature(seal_line(LedgerEntry(**{**json.loads(seal_line(last)), "number": 6, "previous": last.hash})))
    with settings.ledger.open("ab") as file:
        file.write(line)
    append_entry(settings, change("flight-delay@7"))
    assert (verify_ledger(settings), len(read_ledger(settings))) == ([], 7)
    assert line in settings.ledger.read_bytes()
    settings.ledger.write_bytes(settings.ledger.read_bytes().replace(b"MEUCIQ", b"MEUCIR"))
    assert [defect.line for defect in verify_ledger(settings)] == [6]


def test_a_format_of_a_later_version_can_be_verified_but_not_interpreted(settings: Settings) -> None:
    last = read_ledger(settings)[-1]
    later = LedgerEntry(**{**json.loads(seal_line(last)), "format": 2, "number": 6, "previous": last.hash, "hash": ""})
    with settings.ledger.open("ab") as file:
        file.write(seal_line(later))
    assert verify_ledger(settings) == []
    with pytest.raises(LedgerError, match=r"line 6 of .* later format than 1"):
        read_ledger(settings)


def test_a_copied_workspace_has_its_ledger(settings: Settings, tmp_path: Path) -> None:
    copy = Settings(home=shutil.copytree(settings.home, tmp_path / "copy"))
    shutil.rmtree(settings.home)
    assert append_entry(copy, change("flight-delay@6")).number == 6
    assert verify_ledger(copy) == []
    assert str(tmp_path) not in copy.ledger.read_text(encoding="utf-8")


def test_a_clock_that_was_put_back_does_not_take_the_ledger_back(settings: Settings) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=3)
    assert append_entry(settings, change("flight-delay@6"), ahead).time == as_time(ahead)
    assert append_entry(settings, change("flight-delay@7")).time == as_time(ahead)
    with pytest.raises(LedgerError, match="is before the last line"):
        append_entry(settings, change("flight-delay@8"), ahead - timedelta(milliseconds=1))
    assert verify_ledger(settings) == []


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2013-11-05T12:00", "2013-11-05T12:00:00.000Z"),
        ("2013-11-05T12:00:00.123987Z", "2013-11-05T12:00:00.123Z"),
        ("2013-11-05T07:00-05:00", "2013-11-05T12:00:00.000Z"),
        ("2013-11-05", "2013-11-05T00:00:00.000Z"),
    ],
)
def test_a_moment_is_read_as_people_write_it(text: str, time: str) -> None:
    assert read_moment(text) == time


@pytest.mark.parametrize("text", ["", "noon", "2013-13-01", "9999-01-01", "0001-01-01T00:00+14:00"])
def test_what_is_no_moment_of_the_past_is_refused(text: str) -> None:
    with pytest.raises(LedgerError, match=r"isn't a moment|still to come"):
        read_moment(text)


moments = st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted)


@examples(deadline=None, max_examples=60)
@given(moments, st.integers(-1, 31), st.booleans())
def test_the_value_of_a_moment_is_that_of_the_last_change_up_to_it(times: list[int], asked: int, later: bool) -> None:
    begin, lines, previous = datetime(2013, 11, 5, 12, tzinfo=UTC), list[bytes](), ""
    for number, time in enumerate(times):
        stamp = as_time(begin + timedelta(milliseconds=time))
        use_case, subject = (CASE, "fog")[number % 3 == 2], f"v@{number}"
        what = LedgerEntry(
            event="promote", use_case=use_case, subject=subject, by="ann", reason="", time=stamp, number=number + 1,
            previous=previous, after={"champion": subject},
        )  # fmt: skip
        lines.append(seal_line(what))
        previous = lines[-1][-67:-3].decode()
    if later:
        lines[-1] = with_signature(lines[-1])  # so that it isn't what this version writes
    moment = as_time(begin + timedelta(milliseconds=asked))
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=folder)
        settings.ledger.parent.mkdir(parents=True)
        settings.ledger.write_bytes(b"".join(lines))
        entries = read_ledger(settings)
        for use_case in (CASE, "fog"):
            own = [entry for entry in entries if entry.use_case == use_case]
            past = [entry for entry in own if entry.time <= moment]
            found = find_period(settings, use_case, moment)
            assert found.value == (past[-1].subject if past else None)
            assert (found.since, found.until) == (past[-1] if past else None, [*own, None][len(past)])
            assert found in list_periods(entries, use_case)
        assert find_period(settings, "bikes", moment).value is None
