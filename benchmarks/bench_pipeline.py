"""What does it cost to run nine notebooks as a pipeline, beside the same code as plain functions, and beside others?

The nine stage notebooks of `training` run on a small slice of the real data (every so many flights of January to
March), so that what is compared is what surrounds the work. Each way runs in fresh processes and in a fresh workspace,
one after the other, several times; the median counts. Then: a trivial notebook, a pipeline in which nothing changed,
and a model for each of twelve months on one core and on two.

    python benchmarks/bench_pipeline.py --repeat 3
    python benchmarks/bench_pipeline.py --ploomber PYTHON --dvc DVC --snakemake SNAKEMAKE   # peers from environments
                                                                              # in which this project is importable
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from apart import keys_of_its_own

from mlops_course.pipelines import Pipeline, check_parameters, find_pipeline, read_result
from mlops_course.pipelines.notebooks import read_code
from mlops_course.pipelines.parameters import fill
from mlops_course.project import read_delivery

ME = Path(__file__).resolve()
COURSE = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
MONTHS = ("2013-01", "2013-02", "2013-03")
EVERY = 40  # of the flights


# ---------------------------------------------------------------- what is run


def write_source(folder: Path) -> None:
    """The slice, as a supplier would deliver it."""
    for month in MONTHS:
        (folder / month).mkdir(parents=True)
        for name, table in read_delivery(month).items():
            rows = table.iloc[::EVERY] if name == "flights" else table
            rows.to_parquet(folder / month / f"{name}.parquet", index=False)


def given(source: Path) -> dict[str, object]:
    """The pipeline's parameters."""
    values = {"first": MONTHS[0], "train_last": MONTHS[1], "test_last": MONTHS[2], "iterations": 5}
    return {**values, "source": str(source)}


def values_for(pipeline: Pipeline, name: str, source: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a stage's notebook is given."""
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    fixed = fill(dict(stage.parameters), check_parameters(pipeline, given(source)))
    made = {key: results[pipeline.producers[output]][output] for key, output in dict(stage.inputs).items()}
    return {**fixed, **made}


def earlier(folder: Path, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Results of the notebooks that were executed so far."""
    executed = {stage.name: folder / f"{stage.name}.ipynb" for stage in pipeline.stages}
    return {name: read_result(path) for name, path in executed.items() if path.exists()}


# ---------------------------------------------------------------- the ways, each in a process of its own


def as_functions(folder: Path, source: Path) -> None:
    """The code of all stages, one after the other, in one process: no notebook, no kernel, no report."""
    import matplotlib as mpl

    from mlops_course import pipelines

    mpl.use("Agg")
    found: dict[str, dict[str, Any]] = {}
    pipeline = find_pipeline("training")
    for stage in pipeline.stages:
        record: dict[str, Any] = {}
        pipelines.record_result = lambda record=record, **values: record.update(values)
        code = [source for source, _ in read_code(pipeline.notebook(stage))]  # without nbformat: 1.4 s to import
        names: dict[str, Any] = {"display": lambda *_: None}
        exec(code[0], names)
        names.update(values_for(pipeline, stage.name, source, found))
        for each in code[1:]:
            exec(compile(each, stage.name, "exec"), names)
        found[stage.name] = record


def by_papermill(folder: Path, source: Path, engine: str | None = None) -> None:
    """papermill from one parent process, with its own engine or another one's."""
    import papermill

    pipeline = find_pipeline("training")
    for stage in pipeline.stages:
        values = values_for(pipeline, stage.name, source, earlier(folder, pipeline))
        options = {"engine_name": engine} if engine else {}
        notebook, executed = str(pipeline.notebook(stage)), str(folder / f"{stage.name}.ipynb")
        papermill.execute_notebook(notebook, executed, values, kernel_name="python3", progress_bar=False, **options)


def stage_command(folder: Path, source: Path, name: str) -> None:
    """One stage by papermill's command line: what a stage of DVC or Snakemake calls."""
    pipeline = find_pipeline("training")
    values = values_for(pipeline, name, source, earlier(folder, pipeline))
    notebook = pipeline.notebook(next(stage for stage in pipeline.stages if stage.name == name))
    command = [sys.executable, "-m", "papermill", str(notebook), str(folder / f"{name}.ipynb"), "-k", "python3"]
    subprocess.run([*command, "--no-progress-bar", "-y", yaml.safe_dump(values)], check=True, capture_output=True)


def by_command_line(folder: Path, source: Path) -> None:
    """papermill's command line, once for each stage."""
    for stage in find_pipeline("training").stages:
        stage_command(folder, source, stage.name)


def write_dvc(folder: Path, source: Path) -> None:
    """The same stages as a dvc.yaml."""
    pipeline = find_pipeline("training")
    stages = {}
    for stage in pipeline.stages:
        needs = [f"{name}.ipynb" for name in sorted(pipeline.needs[stage.name])]
        command = f"{sys.executable} {ME} --way stage --folder {folder} --source {source} --stage {stage.name}"
        notebook = str(pipeline.notebook(stage))
        stages[stage.name] = {"cmd": command, "deps": [notebook, *needs], "outs": [f"{stage.name}.ipynb"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def write_snakefile(folder: Path, source: Path) -> None:
    """The same stages as a Snakefile."""
    pipeline = find_pipeline("training")
    last = [f"{stage.name}.ipynb" for stage in pipeline.stages]
    rules = [f"rule all:\n    input: {last}"]
    for stage in pipeline.stages:
        needs = [str(pipeline.notebook(stage)), *(f"{name}.ipynb" for name in sorted(pipeline.needs[stage.name]))]
        command = f"{sys.executable} {ME} --way stage --folder {folder} --source {source} --stage {stage.name}"
        made = f"output: '{stage.name}.ipynb'"
        rules.append(f"rule {stage.name}:\n    input: {needs}\n    {made}\n    shell: {command!r}")
    (folder / "Snakefile").write_text("\n\n".join(rules) + "\n")


# ---------------------------------------------------------------- measuring


def seconds(command: list[str], home: Path, cwd: Path | None = None) -> float:
    """One run, from the start of Python to its end."""
    variables = {**os.environ, "MLOPS_COURSE_HOME": str(home), "MPLBACKEND": "Agg", "DVC_NO_ANALYTICS": "1"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # without compiled files, every start would compile ours anew
    begin = time.perf_counter()
    done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - begin


def script(way: str, folder: Path, source: Path, python: str = sys.executable) -> list[str]:
    """This file as the process of one way."""
    return [python, str(ME), "--way", way, "--folder", str(folder), "--source", str(source)]


def course(source: Path, *more: str) -> list[str]:
    """Our command."""
    parameters = [part for name, value in given(source).items() for part in ("-p", f"{name}={value}")]
    return [*COURSE, "run", "training", *parameters, *more]


def ways(source: Path, peers: argparse.Namespace) -> dict[str, Callable[[Path], float]]:
    """Each way's name, and what measures it in a fresh folder."""
    found: dict[str, Callable[[Path], float]] = {
        "plain functions, one process": lambda folder: seconds(script("functions", folder, source), folder),
        "this runner": lambda folder: seconds(course(source), folder),
        "papermill from one parent": lambda folder: seconds(script("papermill", folder, source), folder),
        "papermill's command line": lambda folder: seconds(script("command", folder, source), folder),
    }
    if peers.quick:
        del found["papermill's command line"]
    if peers.ploomber:
        found["Ploomber's engine, one parent"] = lambda folder: seconds(
            script("ploomber", folder, source, peers.ploomber), folder
        )
    if peers.dvc:
        found["dvc repro"] = lambda folder: _dvc(folder, source, peers.dvc)
    if peers.snakemake:
        found["snakemake"] = lambda folder: _snakemake(folder, source, peers.snakemake)
    return found


def _dvc(folder: Path, source: Path, dvc: str) -> float:
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([dvc, "init", "-q"], cwd=folder, check=True, capture_output=True)
    write_dvc(folder, source)
    return seconds([dvc, "repro", "-q"], folder / "workspace", folder)


def _snakemake(folder: Path, source: Path, snakemake: str) -> float:
    write_snakefile(folder, source)
    return seconds([snakemake, "--cores", "1", "-q"], folder / "workspace", folder)


def nothing_to_do(source: Path, folders: dict[str, Path], peers: argparse.Namespace, repeat: int) -> dict[str, float]:
    """The same command once more, when everything is there."""
    home = folders["this runner"]
    for _ in range(2):  # the first run changed the registry, so that three stages look again once
        seconds(course(source), home)
    commands: dict[str, tuple[list[str], Path | None, Path]] = {"this runner": (course(source), None, home)}
    if peers.dvc:
        commands["dvc repro"] = ([peers.dvc, "repro", "-q"], folders["dvc repro"], home)
    if peers.snakemake:
        commands["snakemake"] = ([peers.snakemake, "--cores", "1", "-q"], folders["snakemake"], home)
    return {
        name: statistics.median(seconds(command, home, cwd) for _ in range(max(5, repeat)))
        for name, (command, cwd, home) in commands.items()
    }


# ---------------------------------------------------------------- one trivial notebook, and twelve months


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell takes parameters."""
    import nbformat

    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=made)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, path)
    return path


def trivial(folder: Path, repeat: int = 20) -> dict[str, float]:
    """Milliseconds for a notebook that does nothing, in a process that is warm."""
    import papermill

    from mlops_course.pipelines.engine.requests import Request
    from mlops_course.pipelines.engine.workers import Workers

    notebook, out = write_notebook(folder / "trivial.ipynb", "x = 1", "x + 1"), folder / "out.ipynb"
    request = Request(notebook, out, {"x": 2}, folder, dict(os.environ))
    with Workers(spare=1) as workers:
        warm = [_timed(lambda: workers.execute(request)) for _ in range(repeat)][3:]
    stock = [
        _timed(lambda: papermill.execute_notebook(str(notebook), str(out), {"x": 2}, progress_bar=False))
        for _ in range(3)
    ]
    return {"this runner's worker": statistics.median(warm) * 1e3, "papermill": statistics.median(stock) * 1e3}


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


MODEL = """
from sklearn.ensemble import HistGradientBoostingClassifier
from mlops_course.project import read_delivery
flights = read_delivery(month)["flights"]
late = flights["arr_delay"] > 15
columns = flights[["month", "day", "hour", "distance", "sched_dep_time", "sched_arr_time", "flight"]]
model = HistGradientBoostingClassifier(max_iter=1000, early_stopping=False, random_state=0).fit(columns, late)
"""


def twelve_months(folder: Path) -> dict[int, float]:
    """Seconds for a model of each month, on one core and on two."""
    write_notebook(folder / "model.ipynb", 'month: str = "2013-01"', MODEL.strip())
    (folder / "months.yaml").write_text(
        textwrap.dedent(
            """
            name: months
            parameters: {month: {type: month}}
            preload: [sklearn.ensemble]
            stages: [{name: model, notebook: model.ipynb, parameters: {month: "${month}"}}]
            """
        )
    )
    found = {}
    for width in (1, 2):
        command = [*COURSE, "backfill", str(folder / "months.yaml"), "--first", "2013-01", "--last", "2013-12"]
        os.environ["MLOPS_COURSE_THREADS"] = "1"
        found[width] = seconds([*command, "--width", str(width)], folder / f"workspace{width}")
        del os.environ["MLOPS_COURSE_THREADS"]
    return found


# ---------------------------------------------------------------- the table


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, in one run."""
    source = work / "source"
    write_source(source)
    found = ways(source, arguments)
    times: dict[str, list[float]] = {name: [] for name in found}
    folders: dict[str, Path] = {}
    for turn in range(arguments.repeat):
        for number, (name, once) in enumerate(found.items()):
            folder = work / f"{number}-{turn}"
            folder.mkdir()
            times[name].append(once(folder))
            folders[name] = folder
            print(f"  {name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return {
        "nine stages, s": {name: statistics.median(each) for name, each in times.items()},
        "nothing to do, s": nothing_to_do(source, folders, arguments, arguments.repeat),
        "a trivial notebook, ms": trivial(work),
        "a model for each of 12 months, s": {f"width {key}": value for key, value in twelve_months(work).items()},
    }


def bars(found: dict[str, Any]) -> dict[str, bool]:
    """What should hold, in words with the figure."""
    stages, idle = found["nine stages, s"], found["nothing to do, s"]["this runner"]
    months, small = found["a model for each of 12 months, s"], found["a trivial notebook, ms"]["this runner's worker"]
    ours, parent = stages["this runner"], stages["papermill from one parent"]
    overhead, gain = ours / stages["plain functions, one process"], months["width 1"] / months["width 2"]
    return {
        f"{overhead:.2f} x plain functions (bar: at most 1.05)": overhead <= 1.05,
        f"{parent / ours:.1f} x faster than papermill from one parent (bar: 6)": parent >= 6 * ours,
        f"a trivial notebook in {small:.0f} ms (bar: 25)": small <= 25,
        f"nothing to do in {idle:.2f} s (bar: 0.3)": idle <= 0.3,
        f"12 months {gain:.2f} x faster on two cores (bar: 1.8)": gain >= 1.8,
    }


def main() -> int:
    """Print the tables and the bars; 1 when a bar isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without papermill's command line, which takes longest")
    for peer in ("ploomber", "dvc", "snakemake"):
        parser.add_argument(f"--{peer}", help="the peer's Python (ploomber) or program")
    for hidden in ("way", "stage"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    for hidden in ("folder", "source"):
        parser.add_argument(f"--{hidden}", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_way(arguments)
        return 0
    keys_of_its_own()
    work = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        found = measure(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    kept = bars(found)
    if arguments.json:
        figures = [(what, way, round(figure, 3)) for what, ways in found.items() for way, figure in ways.items()]
        print(json.dumps([{"what": what, "way": way, "figure": figure} for what, way, figure in figures], indent=1))
    else:
        show(found, kept)
    return 0 if all(kept.values()) else 1


def run_way(arguments: argparse.Namespace) -> None:
    """What a measured process does."""
    folder, source = arguments.folder, arguments.source
    if arguments.way == "stage":
        stage_command(folder, source, arguments.stage)
    elif arguments.way == "ploomber":
        by_papermill(folder, source, "embedded")
    else:
        ways = {"functions": as_functions, "papermill": by_papermill, "command": by_command_line}
        ways[arguments.way](folder, source)


def show(found: dict[str, Any], kept: dict[str, bool]) -> None:
    """The tables for people."""
    for title, table in found.items():
        print(f"\n{title}")
        least = min(table.values())
        for name, value in table.items():
            print(f"  {name:<32}{value:>9.2f}{value / least:>8.1f} x")
    print()
    for line, holds in kept.items():
        print(f"{'reached' if holds else 'MISSED '}  {line}")


if __name__ == "__main__":
    sys.exit(main())
