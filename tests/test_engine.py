"""The workers keep what they promise: results, events, limits, secrets, nothing that leaks into the next notebook."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from mlops_course.environment import CourseError, WorkspaceError
from mlops_course.pipelines import engine
from mlops_course.pipelines.engine import imports_of, installed
from mlops_course.pipelines.engine.requests import CellError, Event, Interrupted, Request, TimedOut
from mlops_course.pipelines.engine.workers import Workers

WARM = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]
ALL = [*WARM, "kernel"]
PRELOAD = ["numpy", "pandas", "matplotlib.pyplot", "no_such_module"]


@pytest.fixture(scope="module")
def every_kind() -> Iterator[Callable[[str], Workers]]:
    made: dict[str, Workers] = {}

    def get(kind: str) -> Workers:
        if kind not in made:
            made[kind] = Workers(kind, preload=PRELOAD if kind == "fork" else (), threads=1)
        return made[kind]

    yield get
    for workers in made.values():
        workers.close()


@pytest.fixture(params=ALL)
def workers(request: pytest.FixtureRequest, every_kind: Callable[[str], Workers]) -> Workers:
    return every_kind(request.param)


@pytest.fixture(params=WARM)
def warm(request: pytest.FixtureRequest, every_kind: Callable[[str], Workers]) -> Workers:
    return every_kind(request.param)


@pytest.fixture
def first(every_kind: Callable[[str], Workers]) -> Workers:
    """Of the kind that is usual here."""
    return every_kind(WARM[0])


Ask = Callable[..., Request]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Makes a request of cells. The first is tagged `parameters`, unless it is given with tags of its own."""
    counter = iter(range(1000))

    def make(*sources: str, tags: dict[int, str] | None = None, **more: Any) -> Request:
        number = next(counter)
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        for index, tag in ({0: "parameters"} | (tags or {})).items():
            cells[index].metadata["tags"] = [tag]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"in{number}.ipynb")
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        options = {"parameters": {}, "folder": tmp_path, "environment": environment, "timeout": 60.0}
        return Request(tmp_path / f"in{number}.ipynb", tmp_path / f"out{number}.ipynb", **{**options, **more})

    return make


def cells_of(request: Request) -> list[Any]:
    return [cell for cell in nbformat.read(request.output, 4).cells if cell.cell_type == "code"]


def shown(request: Request) -> list[str]:
    """The text of each code cell's outputs."""
    return ["".join(_text(output) for output in cell.outputs) for cell in cells_of(request)]


def _text(output: Any) -> str:
    return output.get("text") or output.get("evalue") or output.get("data", {}).get("text/plain", "")


# ---------------------------------------------------------------- what every kind gives


def test_parameters_are_put_in_as_papermill_does(workers: Workers, ask: Ask) -> None:
    request = ask("x = 1\ny: list = []", "x, y", parameters={"x": 2, "y": [1, None, "a'b"]})
    workers.execute(request)
    made = nbformat.read(request.output, 4)
    assert made.cells[1].metadata.tags == ["injected-parameters"]
    assert made.metadata.papermill["parameters"] == {"x": 2, "y": [1, None, "a'b"]}
    assert made.metadata.papermill["output_path"] == str(request.output)
    assert shown(request)[-1] == '(2, [1, None, "a\'b"])'


def test_a_notebook_stands_in_its_folder_with_its_environment(workers: Workers, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "here" / "beside_it.py").write_text("name = 'beside'")
    (tmp_path / "more" / "far_away.py").write_text("name = 'far'")
    (tmp_path / "more" / "json.py").write_text("raise RuntimeError('it comes last')")
    code = "import os, json, beside_it, far_away\nprint(os.getcwd(), os.environ['MINE'], beside_it.name, far_away.name)"
    request = ask(code + "\nprint('HOME' in os.environ)")
    environment = {name: value for name, value in request.environment.items() if name != "HOME"} | {"MINE": "yes"}
    paths = (str(tmp_path / "more"),)
    outcome = workers.execute(
        dataclasses.replace(request, folder=tmp_path / "here", environment=environment, paths=paths)
    )
    assert shown(request) == [f"{tmp_path / 'here'} yes beside far\nFalse\n"]
    if workers.kind != "kernel":
        assert outcome.modules == [str(tmp_path / "here" / "beside_it.py"), str(tmp_path / "more" / "far_away.py")]


def test_a_failing_cell_is_named_and_the_notebook_kept(workers: Workers, ask: Ask) -> None:
    request = ask("x = 1", "print('before')", "# why\nraise KeyError('k')", "print('never')")
    with pytest.raises(CellError) as caught:
        workers.execute(request)
    error = caught.value
    assert (error.cell, error.source, error.error_class, error.message) == (
        3,
        "# why\nraise KeyError('k')",
        "KeyError",
        "'k'",
    )
    assert any("KeyError" in line for line in error.traceback)
    assert str(error) == (
        f"{request.notebook.name}, cell [3] `# why`: KeyError: 'k'. The executed notebook is {request.output}."
    )
    made = nbformat.read(request.output, 4)
    assert "In [3]" in made.cells[0].source and "stopped" in made.cells[3].source
    assert [cell.metadata.papermill.status for cell in cells_of(request)] == [
        "completed",
        "completed",
        "failed",
        "pending",
    ]
    assert made.metadata.papermill.exception is True
    assert shown(request)[1] == "before\n"


def test_allowed_errors_do_not_stop_a_notebook(workers: Workers, ask: Ask) -> None:
    request = ask("1", "1 / 0", "print('after')", tags={1: "raises-exception"})
    workers.execute(request)
    assert shown(request) == ["1", "division by zero", "after\n"]


def test_events_tell_what_happens(workers: Workers, ask: Ask) -> None:
    events: list[Event] = []
    request = ask("x = 1", "print('one\\ntwo')\nimport sys\nprint('error', file=sys.stderr)", "print('a\\rb')")
    workers.execute(request, events.append)
    assert [(event.kind, event.cell, event.cells) for event in events if event.kind != "line"] == [
        ("started", 0, 3),
        ("cell", 1, 3),
        ("cell", 2, 3),
        ("cell", 3, 3),
    ]
    lines = [(event.cell, event.stream, event.text) for event in events if event.kind == "line"]
    assert lines == [(2, "stdout", "one"), (2, "stdout", "two"), (2, "stderr", "error"), (3, "stdout", "b")]


def test_a_time_limit_ends_a_cell_in_python_and_leaves_its_place(workers: Workers, ask: Ask) -> None:
    request = ask("print('first')", "import time\ntime.sleep(60)", timeout=1.0 if workers.kind == "fork" else 5.0)
    workers.execute(ask("'warm'"))  # the zygote's start is not the notebook's time
    begin = time.monotonic()
    with pytest.raises(TimedOut, match=r"cell \[2\] `import time`: TimedOut: the notebook took longer than"):
        workers.execute(request)
    assert time.monotonic() - begin < 30, "it would have slept for a minute"
    assert [output.ename for output in cells_of(request)[1].outputs] == ["KeyboardInterrupt", "TimedOut"]


def test_cancelling_lets_a_cell_clean_up(workers: Workers, ask: Ask, tmp_path: Path) -> None:
    cell = "import time\ntry:\n    print('here', flush=True); time.sleep(60)\nfinally:\n    print('cleaned')"
    request, seen = ask("x = 1", cell + f"; open({str(tmp_path / 'mark')!r}, 'w').close()"), threading.Event()

    def cancel() -> None:
        seen.wait(30)
        workers.cancel("somebody pressed a key")

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Interrupted, match="somebody pressed a key"):
        workers.execute(request, lambda event: seen.set() if event.text == "here" else None)
    thread.join()
    assert (tmp_path / "mark").exists()
    assert "cleaned" in shown(request)[1]
    after = ask("'again'")
    workers.execute(after)
    assert shown(after) == ["'again'"]


def test_secrets_are_masked_everywhere(workers: Workers, ask: Ask) -> None:
    key = 'first line of a key\nsecond "line" of it'
    cells = [
        "import os, sys, time\nsecret, key = os.environ['PASSWORD'], os.environ['KEY']",
        "print('is', secret); print(secret, file=sys.stderr); print(key)",
        "print(secret[:4], end='', flush=True); time.sleep(0.3); print(secret[4:])",
        "{'value': secret, 'key': key}",
        "from IPython.display import HTML, display\ndisplay(HTML('<b>' + secret + '</b>'))",
        "raise ValueError(secret)",
    ]
    request = ask(*cells, secrets=("hunter&two", key))
    request.environment.update(PASSWORD="hunter&two", KEY=key)
    events: list[Event] = []
    with pytest.raises(CellError) as caught:
        workers.execute(request, events.append)
    error = caught.value
    everything = request.output.read_text() + str(error) + error.message + "".join(error.traceback) + repr(events)
    for part in ["hunter", "second ", "first line"]:
        assert part not in everything
    assert "ValueError: ***" in str(error)
    assert shown(request)[1] == "is ***\n***\n***\n" if workers.kind != "kernel" else "***" in shown(request)[1]


def test_what_cannot_be_read_or_written_is_said(first: Workers, ask: Ask, tmp_path: Path) -> None:
    request = ask("1")
    with pytest.raises(CourseError, match=r"can't read the notebook .*missing.ipynb: No such file"):
        first.execute(dataclasses.replace(request, notebook=tmp_path / "missing.ipynb"))
    (tmp_path / "text.ipynb").write_text("no JSON")
    with pytest.raises(CourseError, match=r"can't read the notebook .*text.ipynb"):
        first.execute(dataclasses.replace(request, notebook=tmp_path / "text.ipynb"))
    with pytest.raises(WorkspaceError, match="can't write"):
        first.execute(dataclasses.replace(request, output=request.notebook / "under" / "a file.ipynb"))
    with pytest.raises(CourseError, match="nowhere"):
        first.execute(dataclasses.replace(request, folder=tmp_path / "nowhere"))


def test_requests_and_outcomes_can_be_sent_elsewhere(ask: Ask) -> None:
    request = ask("1")
    assert pickle.loads(pickle.dumps(request)) == request


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(CourseError, match=r"no kind of worker called 'thread'\. Known are: auto, fork"):
        Workers("thread")


def test_closed_workers_refuse(ask: Ask) -> None:
    workers = Workers(WARM[0])
    workers.close()
    with pytest.raises(CourseError, match="closed"):
        workers.execute(ask("1"))


# ---------------------------------------------------------------- warm


def test_several_notebooks_run_at_the_same_time(warm: Workers, ask: Ask) -> None:
    requests = [ask(f"import time\ntime.sleep(0.3)\n{number}") for number in range(4)]
    threads = [threading.Thread(target=warm.execute, args=[request]) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [shown(request) for request in requests] == [["0"], ["1"], ["2"], ["3"]]


LEAKS = {
    "variable": ("leaked = 1", "'leaked' in globals()", "False"),
    "builtin": ("import builtins; builtins.leaked = 1", "import builtins; hasattr(builtins, 'leaked')", "False"),
    "environment": ("import os; os.environ['LEAKED'] = '1'", "import os; 'LEAKED' in os.environ", "False"),
    "folder": ("import os; os.chdir('/')", "import os; os.getcwd() == '/'", "False"),
    "import path": ("import sys; sys.path.insert(0, '/leak')", "import sys; '/leak' in sys.path", "False"),
    "module": ("import sys; sys.modules['leak'] = sys", "import sys; 'leak' in sys.modules", "False"),
    "loaded module": ("import colorsys", "import sys; 'colorsys' in sys.modules", "False"),
    "monkeypatch": ("import json; json.dumps = None", "import json; json.dumps(1)", "'1'"),
    "pandas option": (
        "import pandas; pandas.options.display.max_rows = 3",
        "import pandas; pandas.options.display.max_rows",
        "60",
    ),
    "matplotlib settings": (
        "import matplotlib.pyplot as plt; plt.rcParams['lines.linewidth'] = 9; plt.figure()",
        "import matplotlib.pyplot as plt; plt.rcParams['lines.linewidth'], plt.get_fignums()",
        "(1.5, [])",
    ),
    "warning filters": (
        "import warnings; warnings.simplefilter('error')",
        "import warnings; any(f[0] == 'error' and f[2] is Warning for f in warnings.filters)",
        "False",
    ),
    "logging": (
        "import logging; logging.basicConfig(level=10)",
        "import logging; logging.getLogger().level, logging.getLogger().handlers",
        "(30, [])",
    ),
    "locale": ("import locale; locale.setlocale(locale.LC_ALL, 'C')", "3", "3"),
    "recursion limit": (
        "import sys; sys.setrecursionlimit(500)",
        "import sys; sys.getrecursionlimit() == 500",
        "False",
    ),
    "signal": ("import signal; signal.alarm(1)", "import signal; signal.alarm(0)", "0"),
    "magic": ("%precision 2", "3.14159", "3.14159"),
    "umask": ("import os; _ = os.umask(0o777)", "import os; m = os.umask(0o22); m == 0o777", "False"),
}


@pytest.fixture(scope="module", params=WARM)
def before_and_after(
    request: pytest.FixtureRequest, every_kind: Callable[[str], Workers], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """One notebook does all that could leak, the next one looks."""
    folder, workers = tmp_path_factory.mktemp("leaks"), every_kind(request.param)
    for column in (0, 1):
        cells = [nbformat.v4.new_code_cell(case[column]) for case in LEAKS.values()]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
        asked = Request(folder / "in.ipynb", folder / "out.ipynb", {}, folder, dict(os.environ))
        workers.execute(asked)
    return dict(zip(LEAKS, shown(asked), strict=True))


@pytest.mark.parametrize("name", list(LEAKS))
def test_nothing_leaks_into_the_next_notebook(name: str, before_and_after: dict[str, str]) -> None:
    assert before_and_after[name] == LEAKS[name][2]


def test_random_numbers_differ_unless_seeded(warm: Workers, ask: Ask) -> None:
    draw = "import random, uuid, numpy\nrandom.random(), numpy.random.rand(), "
    draw += "numpy.random.default_rng().random(), uuid.uuid4()"
    seeded = "import random, numpy\nrandom.seed(1); numpy.random.seed(1); random.random(), numpy.random.rand()"
    requests = [ask(draw, seeded) for _ in range(3)]
    for request in requests:
        warm.execute(request)
    drawn, again = zip(*map(shown, requests), strict=True)
    parts = [part for text in drawn for part in text.split(", ")]
    assert len(set(parts)) == len(parts)
    assert len(set(again)) == 1


def test_a_workers_own_modules_are_not_the_notebooks(warm: Workers, ask: Ask) -> None:
    request = ask("import sys\nsorted(name for name in sys.modules if name.startswith(('mlops_course', 'papermill')))")
    assert warm.execute(request).modules == []
    assert shown(request) == ["[]"]


def test_threads_are_bounded(warm: Workers, ask: Ask) -> None:
    request = ask("import os\n[os.environ[f'{name}_NUM_THREADS'] for name in ('OMP', 'OPENBLAS', 'MKL')]")
    warm.execute(request)
    assert shown(request) == ["['1', '1', '1']"]
    passive = ask("import os\nos.environ['OMP_WAIT_POLICY']")
    passive.environment.pop("OMP_WAIT_POLICY", None)
    warm.execute(passive)
    assert shown(passive) == ["'PASSIVE'"]
    assert "OMP_NUM_THREADS" not in request.environment or request.environment["OMP_NUM_THREADS"] == os.environ.get(
        "OMP_NUM_THREADS"
    )


def test_other_start_variables_get_a_process_of_their_own(first: Workers, ask: Ask) -> None:
    request = ask("import sys\nsys.flags.hash_randomization, hash('a')")
    request.environment["PYTHONHASHSEED"] = "0"
    first.execute(request)
    expected = subprocess.run(
        [sys.executable, "-c", "import sys; print((sys.flags.hash_randomization, hash('a')))"],
        env=request.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown(request) == [expected.stdout.strip()]


def test_a_changed_project_module_is_loaded_anew(ask: Ask, tmp_path: Path) -> None:
    module = tmp_path / "changing_module.py"
    module.write_text("value = 'old'")
    request = ask("import changing_module\nchanging_module.value")
    request.environment["PYTHONPATH"] = str(tmp_path)
    with Workers(WARM[0], preload=["changing_module"]) as workers:
        workers.execute(request)
        old = shown(request)
        module.write_text("value = 'new one'")
        workers.execute(request)
    assert (old, shown(request)) == (["'old'"], ["'new one'"])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_the_first_notebook_runs_while_others_modules_are_still_imported(ask: Ask, tmp_path: Path) -> None:
    flag = tmp_path / "first-has-run"
    (tmp_path / "quick_module.py").write_text("value = 'quick'")
    (tmp_path / "slow_module.py").write_text(
        "import pathlib, time\nend = time.monotonic() + 30\n"
        f"while not pathlib.Path({str(flag)!r}).exists():\n"
        "    assert time.monotonic() < end, 'nobody ran meanwhile'\n    time.sleep(0.01)\nvalue = 'slow'"
    )
    look = "import sys\n'quick_module' in sys.modules, 'slow_module' in sys.modules"
    first = ask(look, f"open({str(flag)!r}, 'w').close()")
    second = ask(look, "import slow_module\nslow_module.value")
    environment = first.environment | {"PYTHONPATH": str(tmp_path)}
    with Workers("fork", preload=["quick_module", "slow_module"]) as workers:
        workers.execute(dataclasses.replace(first, environment=environment, modules=("quick_module",)))
        early = shown(first)
        workers.execute(dataclasses.replace(second, environment=environment))
        late = shown(second)
    assert early == ["(True, False)", ""]
    assert late == ["(True, True)", "'slow'"]


def test_files_left_open_are_written_and_exit_functions_called(warm: Workers, ask: Ask, tmp_path: Path) -> None:
    request = ask(
        "import atexit\nfile = open('left.txt', 'w')\n_ = file.write('kept')",
        "_ = atexit.register(lambda: open('exit.txt', 'w').close())",
    )
    outcome = warm.execute(request)
    assert (tmp_path / "left.txt").read_text() == "kept"
    assert (tmp_path / "exit.txt").exists()
    assert outcome.peak_memory is None or outcome.peak_memory > 1_000_000


def test_the_notebook_is_saved_while_it_runs(first: Workers, ask: Ask) -> None:
    request = ask("print('early')", "import time\ntime.sleep(1.5)\nprint('late', flush=True)\ntime.sleep(1.2)")
    seen: list[list[str]] = []
    thread = threading.Thread(target=first.execute, args=[request])
    thread.start()
    while thread.is_alive():
        if request.output.exists():
            seen.append(shown(request))
        time.sleep(0.1)
    thread.join()
    assert ["early\n", ""] in seen and ["early\n", "late\n"] in seen


# ---------------------------------------------------------------- as a papermill engine


def as_papermill(request: Request, **options: Any) -> Any:
    notebook = nbformat.read(request.notebook, 4)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, request.notebook)
    given = {"parameters": request.parameters, "progress_bar": False, "cwd": request.folder}
    return papermill.execute_notebook(request.notebook, request.output, **{**given, **options})


@pytest.fixture(autouse=True, scope="module")
def close_engine() -> Iterator[None]:
    yield
    engine.close_kept()


def test_papermill_finds_the_engine_and_keeps_it_warm(ask: Ask) -> None:
    request = ask("x = 1", "import os\nx, os.getcwd()", parameters={"x": 5})
    engine.close_kept()  # of another test
    for _ in range(2):
        made = as_papermill(request, engine_name="mlops-course")
    assert made.cells[-1].outputs[0].data["text/plain"] == f"(5, {str(request.folder)!r})"
    assert [len(kept.pools.live) for kept in engine.KEPT] == [1]


def test_papermill_gets_the_same_error(ask: Ask) -> None:
    errors = []
    for options in ({"engine_name": "mlops-course"}, {}):
        request = ask("x = 1", "1 / 0")
        with pytest.raises(papermill.PapermillExecutionError) as caught:
            as_papermill(request, **options)
        errors.append((caught.value.exec_count, caught.value.ename, caught.value.evalue, caught.value.traceback))
        assert "In [2]" in nbformat.read(request.output, 4).cells[0].source
    assert errors[0] == errors[1]


def test_papermills_time_limit_and_options_for_nbclient(first: Workers, ask: Ask) -> None:
    begin = time.monotonic()
    with pytest.raises(TimedOut, match="the cell took longer than 1 second"):
        stuck = ask("1", "import ctypes\nctypes.PyDLL(None).pause()")
        as_papermill(stuck, engine_name="mlops-course", execution_timeout=1, workers=first)
    assert time.monotonic() - begin < 30
    skipping = ask("1", "2", tags={1: "skip-me"})
    as_papermill(skipping, engine_name="mlops-course", skip_cells_with_tag="skip-me", workers=first)
    assert shown(skipping) == ["1", ""]


def test_the_command_line_of_papermill(ask: Ask, tmp_path: Path) -> None:
    request = ask("x = 1", "print('x is', x)")
    nbformat.write(nbformat.read(request.notebook, 4), request.notebook)
    command = ["papermill", "--engine", "mlops-course", "-k", "python3", "-l", "python", "--log-output"]
    files = [request.notebook.name, "out.ipynb", "-p", "x", "7"]
    done = subprocess.run([sys.executable, "-m", *command, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x is 7" in done.stderr
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    assert cells[-1]["outputs"][0]["text"] == ["x is 7\n"]


def test_the_engines_module_is_light() -> None:
    code = (
        "import sys; before = set(sys.modules); import mlops_course.pipelines.engine; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"papermill", "IPython", "nbclient", "nbformat", "pandas", "mlflow"} & set(loaded)


def test_only_installed_packages_are_loaded_ahead() -> None:
    found = imports_of(
        ["import os, numpy.linalg as x", "from mlops_course import data", "%magic\nfrom pandas import NA", "("]
    )
    assert found == {"os", "numpy.linalg", "mlops_course", "pandas"}
    assert installed(found | {"no_such_module"}) >= {"numpy.linalg", "pandas"}
    assert not installed(found | {"no_such_module"}) & {"os", "no_such_module"}
