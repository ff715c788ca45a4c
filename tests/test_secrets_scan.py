"""Secrets that were left somewhere: found wherever a notebook or a text can hold one, and never repeated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from mlops_course.environment import Settings
from mlops_course.security.keys import create_key
from mlops_course.security.secrets_scan import (
    FoundSecret,
    ScanReport,
    SecretsScanError,
    read_allowed,
    scan_secrets,
    secrets_in,
)

OURS = "mlc_0123456789ab_" + "s3" * 21 + "_"
KINDS = {  # put together here, so that this file holds none
    "AWS Access Key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "Private Key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "GitHub Token": "ghp_" + "a1B2" * 9,
    "Basic Auth Credentials": "https://ann:" + "correcthorse@example.org/",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
    "key to this service": OURS,
}


def notebook(path: Path, **parts: Any) -> Path:
    cell = nbformat.v4.new_code_cell(parts.get("source", "1"), metadata=parts.get("metadata", {}))
    cell.outputs = parts.get("outputs", [])
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A page"), cell]), path)
    return path


def scan(*words: object) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from mlops_course.cli import main; main()"
    command = [sys.executable, "-c", code, "secrets", "scan", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_known_and_not_repeated(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.txt").write_text(f"nothing\nhere: {KINDS[kind]} and more\n")
    found = [each for each in scan_secrets([tmp_path]).found if each.kind == kind]
    assert [(each.line, each.part, each.cell) for each in found] == [(2, "text", None)]
    assert KINDS[kind] not in repr(found)
    shown = found[0].shown  # of a key to this service the id, which `keys revoke` asks for
    assert shown == "mlc_0123456789ab_…" if kind == "key to this service" else len(shown) <= 5


output = nbformat.v4.new_output
OUTPUTS = {
    "printed": output("stream", text=f"a\n{OURS}\n"),
    "in pieces": output("stream", text=[f"a\n{OURS[:20]}", f"{OURS[20:]}\n"]),
    "a value": output("execute_result", data={"text/plain": f"'{OURS}'"}),
    "HTML": output("display_data", data={"text/html": f"<b>{OURS}</b>"}),
    "JSON": output("display_data", data={"application/json": {"a": [{"b": OURS}]}}),
    "SVG": output("display_data", data={"image/svg+xml": f"<svg><text>{OURS}</text></svg>"}),
    "beside it": output("display_data", data={"image/png": "aaaa"}, metadata={"sent": {"key": OURS}}),
    "an error": output("error", ename="E", evalue=f"no {OURS}", traceback=["..."]),
    "a traceback": output("error", ename="E", evalue="", traceback=[f"\x1b[31m{OURS[:20]}\x1b[0m{OURS[20:]}"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_key_in_a_notebook_s_output_is_found_and_the_cell_is_named(tmp_path: Path, kind: str) -> None:
    path = notebook(tmp_path / "page.ipynb", outputs=[OUTPUTS[kind]])
    found = scan_secrets([path]).found
    assert {(each.cell, each.part, each.kind) for each in found} == {(1, "output", "key to this service")}


def test_a_key_in_a_cell_or_a_parameter_is_found(tmp_path: Path) -> None:
    notebook(tmp_path / "a.ipynb", source=f"key = '{OURS}'", metadata={"papermill": {"key": OURS}})
    assert [each.part for each in scan_secrets([tmp_path]).found] == ["source", "metadata"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"cells": 1}', b'{"cells": [1]}', b"\xff" * 10])
def test_a_notebook_that_is_none_is_read_as_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.ipynb").write_bytes(content + b"\n" + OURS.encode())
    assert [each.kind for each in scan_secrets([tmp_path]).found] == ["key to this service"]


@pytest.mark.parametrize("place", [0, 19_990, 20_000, 45_000])
def test_a_line_without_end_is_read_to_its_end(tmp_path: Path, place: int) -> None:
    (tmp_path / "long.txt").write_text("x" * place + " " + OURS + " " + "y" * 30_000)
    assert len(scan_secrets([tmp_path]).found) == 1


def test_what_is_too_large_is_said(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(21_000_000)
    assert scan_secrets([tmp_path]) == ScanReport([], 0, [str(tmp_path / "large.txt")], [])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a link").symlink_to(tmp_path / "gone")
    (tmp_path / "a loop").symlink_to(tmp_path / "a loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text(OURS)
    report = scan_secrets([tmp_path])
    assert [Path(name).name for name in report.unread] == ["a link", "a loop", "pipe"]
    assert (len(report.found), report.files) == (1, 1)
    done = scan(tmp_path)
    assert done.returncode == 1 and f"not read: {tmp_path / 'a link'}" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["notes.txt", "page.ipynb"])
def test_a_text_is_read_in_the_encoding_that_it_begins_with(tmp_path: Path, name: str, encoding: str) -> None:
    text = notebook(tmp_path / "page.ipynb", source=OURS).read_text() if name == "page.ipynb" else OURS
    (tmp_path / name).write_text(text, encoding=encoding)
    assert [each.kind for each in scan_secrets([tmp_path / name]).found] == ["key to this service"]


def test_a_key_in_an_attachment_is_found(tmp_path: Path) -> None:
    cell = nbformat.v4.new_markdown_cell("![](a.txt)", attachments={"a.txt": {"text/plain": OURS}})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "page.ipynb")
    assert [(each.cell, each.part) for each in scan_secrets([tmp_path]).found] == [(0, "attachment")]


def test_what_only_looks_like_a_secret_is_allowed_by_its_line_or_by_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{OURS}  # pragma: allowlist secret\n{KINDS['AWS Access Key']}\n")
    (found,) = scan_secrets([tmp_path]).found
    assert isinstance(found, FoundSecret) and found.line == 2
    (tmp_path / "list").write_text(f"# a list\n\n{found.digest} an example\n")
    assert scan_secrets([tmp_path], read_allowed(tmp_path / "list")).found == []


@pytest.mark.parametrize("line", ["a" * 64, "mlc_0123456789ab_…", "password = os.environ['KEY']", "https://a.b/c@d"])
def test_hashes_shortened_keys_and_names_are_no_secrets(line: str) -> None:
    assert secrets_in(line) == []


def test_what_is_installed_is_not_looked_at_and_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "a.txt").write_text(OURS)
    assert scan_secrets([tmp_path]).found == []
    with pytest.raises(SecretsScanError, match="there is no"):
        scan_secrets([tmp_path / "nowhere"])


def test_the_command_names_place_and_kind_and_ends_with_1(tmp_path: Path, settings: Settings) -> None:
    key = create_key(settings, "desk", "predict").text
    path = notebook(tmp_path / "page.ipynb", outputs=[output("stream", text=f"{key}\n")])
    done = scan(path)
    assert done.returncode == 1 and "page.ipynb, cell 1, output, line 1: key to this service" in done.stdout
    assert key[17:] not in done.stdout + done.stderr
    document = json.loads(scan(path, "--json").stdout)
    assert document["files"] == 1 and document["found"][0]["cell"] == 1
    assert scan(settings.home).returncode == 0, "a workspace with keys holds none of them"


@pytest.mark.system
def test_a_key_that_a_stage_prints_is_not_in_its_report(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import os\nprint(os.environ['KEY'])\nos.environ['KEY']"
    notebook(tmp_path / "ask.ipynb", source=source)
    (tmp_path / "ask.yaml").write_text(
        "name: ask\ndescription: Ask.\nstages: [{name: ask, notebook: ask.ipynb, makes: an answer, secrets: [KEY]}]\n"
    )
    monkeypatch.setenv("KEY", create_key(settings, "desk", "predict").text)
    code = "import sys; from mlops_course.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(tmp_path / "ask.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reports = [*settings.runs.rglob("*.ipynb")]
    assert reports and scan_secrets([settings.home, tmp_path]).found == []
    assert os.environ["KEY"][17:] not in "".join(path.read_text() for path in reports) + done.stdout + done.stderr
