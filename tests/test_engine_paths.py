"""A path means to the warm engine what it means to papermill's own, whatever folder papermill enters meanwhile."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.iorw import papermill_io

from mlops_course.pipelines import engine
from mlops_course.pipelines.engine.recording import destination

PYTHON = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
SAYS_WHERE = "import os\nprint(os.path.basename(os.getcwd()))"


@pytest.fixture(autouse=True, scope="module")
def close_engine() -> Iterator[None]:
    yield
    engine.close_kept()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a notebook in a folder; the test stands in it."""
    write(tmp_path / "nbs" / "report.ipynb", SAYS_WHERE)
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, *sources: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)], metadata=PYTHON), path)
    return path


def tree(folder: Path) -> dict[str, Any]:
    """Every file in a folder, and what the notebooks among them have printed."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else []
        found[str(path.relative_to(folder))] = [
            output.get("text") for cell in cells for output in cell.get("outputs", [])
        ]
    return found


def execute(kind: str | None, *arguments: Any, **options: Any) -> str:
    """Run a notebook; what went wrong, if anything did."""
    try:
        papermill.execute_notebook(*arguments, engine_name=kind, progress_bar=False, **options)
    except Exception as error:
        if kind == "nbclient" and "Kernel died before replying to kernel_info" in str(error):
            # a Jupyter kernel picks its ports before it opens them: now and then another process was quicker
            return execute(kind, *arguments, **options)
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_relative_output_beside_a_source_of_the_same_name(project: Path) -> None:
    """The source stays as it was, to the last byte."""
    source = (project / "nbs" / "report.ipynb").read_bytes()
    command = ["papermill", "nbs/report.ipynb", "report.ipynb", "--cwd", "nbs", "--engine", "mlops-course"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--autosave-cell-every", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (project / "nbs" / "report.ipynb").read_bytes() == source
    assert tree(project) == {"nbs/report.ipynb": [], "report.ipynb": ["nbs\n"]}


INPUTS = ["nbs/report.ipynb", "{here}/nbs/report.ipynb"]
OUTPUTS = ["out.ipynb", "./made/../out.ipynb", "made/out.ipynb", "{here}/made/out.ipynb", "nowhere/out.ipynb", None]
FOLDERS = [None, "nbs", "{here}/nbs", "made/../nbs"]


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_combination_means_what_papermill_means(output: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    for source, folder, as_path in itertools.product(INPUTS, FOLDERS, (False, True)):
        usual = source == INPUTS[0] and folder in (None, "nbs")  # each run of papermill's own engine takes a second
        if (as_path and (source, folder) != (INPUTS[0], "nbs")) or not (usual or output == OUTPUTS[0]):
            continue
        seen = []
        for kind in ("nbclient", "mlops-course"):
            here = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "project"
            write(here / "nbs" / "report.ipynb", SAYS_WHERE)
            (here / "made").mkdir()
            (here / "made" / "there.txt").touch()
            monkeypatch.chdir(here)
            given = [text and text.format(here=here) for text in (source, output, folder)]
            paths = [text and Path(text) for text in given] if as_path else given
            error = execute(kind, paths[0], paths[1], cwd=paths[2])
            seen.append((error.replace(str(here), "…"), tree(here), Path.cwd() == here))
        assert seen[0] == seen[1], (source, output, folder)


@pytest.mark.parametrize("ending", ["1 / 0", "import os\nos.kill(os.getpid(), 9)", "import time\ntime.sleep(60)"])
def test_what_fails_is_saved_there_as_well(ending: str, project: Path) -> None:
    source = write(project / "nbs" / "fails.ipynb", "print('before')", ending).read_bytes()
    error = execute("mlops-course", "nbs/fails.ipynb", "fails.ipynb", cwd="nbs", execution_timeout=2)
    assert error
    assert (project / "nbs" / "fails.ipynb").read_bytes() == source
    assert tree(project)["fails.ipynb"][0] == "before\n"
    assert "An Exception was encountered" in nbformat.read(project / "fails.ipynb", 4).cells[0].source


def test_what_is_saved_meanwhile_is_saved_there(project: Path) -> None:
    look = (
        f"import json\nfrom pathlib import Path\nbefore = json.loads(Path({str(project / 'out.ipynb')!r}).read_text())"
    )
    write(
        project / "nbs" / "looks.ipynb",
        "import time\nprint('first')\ntime.sleep(1.2)",
        "1",
        look,
        "len(before['cells'])",
    )
    assert execute("mlops-course", "nbs/looks.ipynb", "out.ipynb", cwd="nbs") == ""
    assert sorted(tree(project)) == ["nbs/looks.ipynb", "nbs/report.ipynb", "out.ipynb"]


def test_a_notebook_that_shall_not_be_saved_meanwhile_is_not(project: Path) -> None:
    write(project / "looks.ipynb", "print('first')", "import os\nos.path.exists('out.ipynb')")
    made = papermill.execute_notebook(
        "looks.ipynb", "out.ipynb", engine_name="mlops-course", progress_bar=False, request_save_on_cell_execute=False
    )
    assert made.cells[1].outputs[0].data["text/plain"] == "False"
    assert (project / "out.ipynb").exists()


@pytest.mark.slow
def test_standard_output_gets_one_notebook(project: Path) -> None:
    for kind in ("nbclient", "mlops-course"):
        command = ["papermill", "nbs/report.ipynb", "-", "--cwd", "nbs", "--engine", kind]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert nbformat.reads(done.stdout, 4).cells[0].outputs[0].text == "nbs\n"
    piped = subprocess.run(
        [sys.executable, "-m", "papermill", "--engine", "mlops-course"],
        input=(project / "nbs" / "report.ipynb").read_text(),
        capture_output=True,
        text=True,
    )
    assert nbformat.reads(piped.stdout, 4).cells[0].outputs[0].text == f"{project.name}\n"
    assert sorted(tree(project)) == ["nbs/report.ipynb"]


def test_standard_output_gets_one_notebook_from_python_as_well(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        buffer = io.BytesIO()

    monkeypatch.setattr(sys, "stdout", Terminal)
    error = execute("mlops-course", "nbs/report.ipynb", "-", cwd="nbs")
    monkeypatch.undo()
    assert error == ""
    assert json.loads(Terminal.buffer.getvalue())["cells"]
    assert sorted(path.name for path in project.iterdir()) == ["made", "nbs"]


class Remote:
    """A store that papermill reaches through a handler."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def read(self, path: str) -> str:
        return self.kept[path]

    def write(self, text: str, path: str) -> None:
        self.kept[path] = text

    def pretty_path(self, path: str) -> str:
        return path


@pytest.mark.parametrize("scheme", ["mine://", "mine:"])
def test_an_address_goes_to_its_handler(scheme: str, project: Path) -> None:
    remote, handlers = Remote(), list(papermill_io._handlers)
    papermill_io.register(scheme, remote)
    try:
        remote.kept[f"{scheme}in.ipynb"] = (project / "nbs" / "report.ipynb").read_text()
        assert execute("mlops-course", f"{scheme}in.ipynb", f"{scheme}a/out.ipynb", cwd="nbs") == ""
        remote.kept[f"{scheme}in.ipynb"] = remote.kept[f"{scheme}in.ipynb"].replace(
            "import os", "import os; os._exit(3)"
        )
        error = execute("mlops-course", f"{scheme}in.ipynb", f"{scheme}b/out.ipynb", cwd="nbs")
    finally:
        papermill_io._handlers = handlers
    assert nbformat.reads(remote.kept[f"{scheme}a/out.ipynb"], 4).cells[0].outputs[0].text == "nbs\n"
    assert f"The executed notebook is {scheme}b/out.ipynb" in error
    assert sorted(tree(project)) == ["nbs/report.ipynb"]


def test_a_notebook_in_memory(project: Path) -> None:
    """papermill takes a notebook itself, or its text, in the place of a path."""
    notebook = nbformat.read(project / "nbs" / "report.ipynb", 4)
    for given in (notebook, nbformat.writes(notebook).replace("{", "{{").replace("}", "}}")):
        seen = []
        for kind in ("nbclient", "mlops-course"):
            error = execute(kind, given, "out.ipynb", cwd="nbs")
            seen.append((error, tree(project)))
        assert seen[0] == seen[1]
        assert seen[1] == ("", {"nbs/report.ipynb": [], "out.ipynb": ["nbs\n"]})


def test_a_notebook_in_memory_that_dies_is_named(project: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os\nos._exit(3)")], metadata=PYTHON)
    error = execute("mlops-course", notebook, None)
    assert error == (
        "KernelDied: notebook.ipynb, cell [1] `import os`: WorkerDied: its process ended by itself, "
        "with exit status 3. The executed notebook is not saved."
    )


def test_the_engine_alone_takes_paths_from_where_it_is_called(project: Path) -> None:
    assert destination("out.ipynb") == project / "out.ipynb"
    assert destination(Path("out.ipynb")) == Path("out.ipynb")
    assert destination("s3://bucket/out.ipynb") == "s3://bucket/out.ipynb"
