"""Kill a process right after a change that it makes on the disk: after the first one, after the second, and so on.

Between two changes the disk is the same, so those are all the states that a killed process can leave behind, except for
those within one call of a library written in C: tests that kill at random moments look for these.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

WRITERS = {"posix", "nt", "io", "_io", "sqlite3", "deltalake._internal"}  # modules whose functions may change a file
READERS = ("BufferedReader", "DirEntry", "ScandirIterator")  # but not those of such objects,
LOOKS = {"stat", "lstat", "fspath", "listdir", "scandir", "getpid", "fsencode", "fstat", "readlink"}  # nor these


def begin_child(task: Callable[[], object]) -> int:
    """Do a task in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def end_of(child: int) -> int:
    """What became of a process: 0, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lives(process: psutil.Process | int) -> bool:
    """Whether it is there and has not ended: a zombie has, even if nobody has asked for its end."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return found.is_running() and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_child(task: Callable[[], object]) -> None:
    """Do a task in a process of its own, which succeeds; no connection to a database is left in this one."""
    assert end_of(begin_child(task)) == 0


def kill_after_change(number: int, folder: Path, task: Callable[[], object]) -> bool:
    """Do a task in a process that is killed after so many changes in a folder; whether it got that far."""
    ended = end_of(begin_child(lambda: _work(number, str(folder), task)))
    assert ended in (0, -signal.SIGKILL), ended
    return ended != 0


def _work(number: int, folder: str, task: Callable[[], object]) -> None:
    """Do a task, and look after each call of a C function whether something has changed in the folder."""
    last, changes = _look(folder), 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal last, changes
        if event not in ("c_return", "c_exception") or not _may_write(function):
            return
        now = _look(folder)
        if now != last:
            last, changes = now, changes + 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    try:
        task()
    finally:
        sys.setprofile(None)
    assert _look(folder) == last, "something has changed, and no function did it that is known to change files"


def _may_write(function: Any) -> bool:
    """Whether a C function may change a file."""
    owner = getattr(function, "__self__", None)
    if type(owner).__name__ in READERS or function.__name__ in LOOKS:
        return False
    return (function.__module__ or type(owner).__module__) in WRITERS


def _look(folder: str) -> list[tuple[str, int, int, int]]:
    """Each path in a folder with what changes when its content does."""
    found = []
    for entry in os.scandir(folder):
        about = entry.stat(follow_symlinks=False)
        found.append((entry.path, about.st_ino, about.st_size, about.st_mtime_ns))
        if entry.is_dir(follow_symlinks=False):
            found += _look(entry.path)
    return found
