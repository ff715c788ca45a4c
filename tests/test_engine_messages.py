"""An error says something useful when the exception itself says nothing, and no text is altered in silence."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from mlops_course.environment import Settings
from mlops_course.pipelines import Pipeline, StageError, read_result, run
from mlops_course.pipelines.engine.recording import failing_line
from mlops_course.pipelines.engine.requests import CellError, Request
from mlops_course.pipelines.engine.workers import Workers

KINDS = ["fork", "spawn", "kernel"] if sys.platform == "linux" else ["spawn", "kernel"]
RECORD = "from mlops_course.pipelines import record_result\n"


@pytest.fixture(scope="module")
def every_kind() -> Iterator[Callable[[str], Workers]]:
    made: dict[str, Workers] = {}

    def get(kind: str) -> Workers:
        return made.setdefault(kind, made.get(kind) or Workers(kind))

    yield get
    for each in made.values():
        each.close()


@pytest.fixture(params=KINDS)
def workers(request: pytest.FixtureRequest, every_kind: Callable[[str], Workers]) -> Workers:
    return every_kind(request.param)


def write(path: Path, *sources: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def ask(folder: Path, *sources: str, **more: Any) -> Request:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    options = {"parameters": {}, "folder": folder, "environment": environment, "timeout": 60.0}
    return Request(write(folder / "in.ipynb", "x = 0", *sources), folder / "out.ipynb", **{**options, **more})


CHECK = "def check(rows):\n    # none may be missing\n    assert rows\n"
SAYS: dict[str, tuple[str, str]] = {
    "a bare assert": ("y = 1\nassert x == 1", "AssertionError: (no message), raised by `assert x == 1`"),
    "an assert that says why": ("assert x == 1, 'not one'", "AssertionError: not one"),
    "in a function of the notebook": (CHECK + "check([])", "(no message), raised by `assert rows`"),
    "in a module": (
        "import helper\nhelper.check([])",
        "(no message), raised by `helper.check([])`, in it `assert rows`",
    ),
    "in a library": (
        "import queue\nqueue.Queue().get(timeout=0)",
        "Empty: (no message), raised by `queue.Queue().get(timeout=0)`",
    ),
    "no memory": ("x = bytearray(1 << 62)", "MemoryError: (no message), raised by `x = bytearray(1 << 62)`"),
    "an exception without words": ("raise NotImplementedError", "(no message), raised by `raise NotImplementedError`"),
    "in a comprehension": (
        "[1 for _ in iter([]).__next__()]",
        "StopIteration: (no message), raised by `[1 for _ in iter",
    ),
    "awaited": ("import asyncio\nawait asyncio.wait_for(asyncio.sleep(9), 0.01)", "raised by `await asyncio.wait_for("),
    "plain tracebacks": ("%xmode Plain\nassert x == 1", "AssertionError: (no message), raised by `assert x == 1`"),
    "a line magic": ("%no_such_magic", "UsageError: Line magic function `%no_such_magic` not found"),
    "a cell magic": ("%%no_such_magic\n1", "UsageError: Cell magic `%%no_such_magic` not found"),
    "a magic with wrong words": ("%timeit -n", "UsageError: option -n requires argument"),
    "a script": ("%%bash\nexit 3", "CalledProcessError: Command 'b'exit 3\\n'' returned non-zero exit status 3"),
}


@pytest.mark.parametrize("name", list(SAYS))
def test_an_error_says_something(name: str, workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(CHECK)
    code, words = SAYS[name]
    with pytest.raises(CellError) as caught:
        workers.execute(ask(tmp_path, code))
    assert words in str(caught.value)
    assert caught.value.cell == 2


def test_a_bare_assert_in_a_pipeline(tmp_path: Path, settings: Settings) -> None:
    write(tmp_path / "a.ipynb", "x: int = 0", "import math\nassert math.pi > 3\nassert x == 1")
    (tmp_path / "p.yaml").write_text("name: p\nstages: [{name: a, notebook: a.ipynb}]")
    words = r"a.ipynb, cell \[2\] `import math`\): AssertionError: \(no message\), raised by `assert x == 1`"
    with pytest.raises(StageError, match=words):
        run(Pipeline.read(tmp_path / "p.yaml"), settings=settings)


def test_the_line_is_found_in_whatever_ipython_shows() -> None:
    assert failing_line([]) == failing_line(["ValueError"]) == ""
    colours = "\x1b[36mCell\x1b[39m In[3], line 1\n\x1b[32m----> \x1b[39m\x1b[32m1\x1b[39m \x1b[1massert\x1b[39;00m x"
    assert failing_line([colours]) == "`assert x`"
    assert failing_line(["File ~/a.py:3, in f()\n---> 12     raise Empty"]) == "`raise Empty`"


# ---------------------------------------------------------------- half characters

HALVES = ["caf\udce9", "\ud83d alone", "ok 🎉"]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_half_characters_come_through(kind: str, every_kind: Callable[[str], Workers], tmp_path: Path) -> None:
    """As a file name has them that isn't in UTF-8."""
    shown = f"halves = {HALVES!r}\nfor half in halves: print(half)\nimport sys; print(halves[0], file=sys.stderr)"
    child = "import os, warnings\nwarnings.simplefilter('ignore')\npid = os.fork()\n"  # 3.12 warns of such forks
    child += "if pid == 0: print(halves[0], flush=True); os._exit(0)\n_ = os.waitpid(pid, 0)"
    request = ask(tmp_path, shown, RECORD + "record_result(names=halves)", child, "raise ValueError(halves[0])")
    with pytest.raises(CellError) as caught:
        every_kind(kind).execute(request)
    assert caught.value.message == HALVES[0]
    cells = json.loads(request.output.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(output["text"]) for cell in cells for output in cell.get("outputs", []) if "text" in output]
    assert texts == ["caf\udce9\n\ud83d alone\nok 🎉\n", "caf\udce9\n", "caf\\udce9\n"]  # the child's: spelled out
    assert read_result(request.output) == {"names": HALVES}
    assert b"?" not in request.output.read_bytes().replace(b"???", b"")


def test_half_characters_flow_from_stage_to_stage(tmp_path: Path, settings: Settings) -> None:
    write(tmp_path / "a.ipynb", "x: int = 0", RECORD + f"record_result(name={HALVES[0]!r})")
    write(tmp_path / "b.ipynb", "name: str = ''", RECORD + "record_result(codes=[ord(c) for c in name])")
    stages = "{name: a, notebook: a.ipynb, outputs: {name: value}}, "
    stages += "{name: b, notebook: b.ipynb, inputs: [name], outputs: {codes: value}}"
    (tmp_path / "p.yaml").write_text(f"name: p\nstages: [{stages}]")
    for _ in range(2):  # the second time from the cache
        made = run(Pipeline.read(tmp_path / "p.yaml"), settings=settings)
        assert read_result(made.stage("b").notebook) == {"codes": [99, 97, 102, 0xDCE9]}
    assert [stage.status for stage in made.stages] == ["cached", "cached"]


# ---------------------------------------------------------------- modules beside a notebook


def test_a_module_beside_a_notebook_in_a_folder_is_found(workers: Workers, tmp_path: Path) -> None:
    """The notebook stands in the run's folder; what lies beside its source can be imported as in Jupyter."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "both.py").write_text("PLACE = 'run'")
    request = ask(tmp_path / "stages", "import beside, both, json\nprint(beside.PLACE, both.PLACE, json.loads('1'))")
    for name in ("beside", "both", "json"):
        (tmp_path / "stages" / f"{name}.py").write_text("PLACE = 'stages'")
    workers.execute(Request(request.notebook, request.output, {}, tmp_path / "run", request.environment))
    assert nbformat.read(request.output, 4).cells[1].outputs[0].text == "stages run 1\n"


def test_a_stage_depends_on_the_module_beside_it(tmp_path: Path, settings: Settings) -> None:
    write(tmp_path / "stages" / "a.ipynb", "x: int = 0", "import beside\n" + RECORD + "record_result(v=beside.VALUE)")
    (tmp_path / "p.yaml").write_text("name: p\nstages: [{name: a, notebook: stages/a.ipynb, outputs: {v: value}}]")
    found = []
    for value in (1, 1, 2):
        (tmp_path / "stages" / "beside.py").write_text(f"VALUE = {value}")
        os.utime(tmp_path / "stages" / "beside.py", (1e9, 1e9))  # by its time and its size it is the same as before
        made = run(Pipeline.read(tmp_path / "p.yaml"), settings=settings)
        found.append((made.stages[0].status, made.stages[0].results["v"]))
    assert found == [("done", 1), ("cached", 1), ("done", 2)]
