"""Who wrote that file? Each stage has a folder of its own, and nobody changes what another one has made."""

import os
import re
from pathlib import Path

import pytest
from pipeline_helpers import RECORD, statuses, write_notebook, write_pipeline

from mlops_course.environment import Settings
from mlops_course.pipelines import Options, PipelineRun, ResultError, backfill, plan, run

HEAD = RECORD + "from pathlib import Path\nimport os, time\n"


def write_stages(folder: Path, **stages: tuple[str, str, str]) -> Path:
    """A pipeline of stages, each with its inputs, its outputs and its code."""
    lines = []
    for name, (inputs, outputs, code) in stages.items():
        parameters = "".join(f"{each}: str = None\n" for each in inputs.split())
        write_notebook(folder / f"{name}.ipynb", parameters, HEAD + code)
        made = ", ".join(f"{each}: {'value' if each == 'v' else 'file'}" for each in outputs.split())
        ends = f"inputs: [{', '.join(inputs.split())}], outputs: {{{made}}}"
        lines.append(f"  - {{name: {name}, notebook: {name}.ipynb, {ends}}}\n")
    return write_pipeline(folder, f"name: files\nstages:\n{''.join(lines)}", "files")


def planned(pipeline: Path, settings: Settings) -> dict[str, str]:
    return {each.stage: each.action for each in plan(pipeline, settings=settings)}


READ_BOTH = "record_result(v=Path({0}).read_text() + '|' + Path({1}).read_text())"


def test_two_stages_may_call_their_files_alike(tmp_path: Path, settings: Settings) -> None:
    write = "Path('out.txt').write_text('{0}'); time.sleep(0.2)\nrecord_result({1}='out.txt')"
    pipeline = write_stages(
        tmp_path,
        a=("", "one", write.format("A", "one")),
        b=("", "two", write.format("B", "two")),
        c=("one two", "v", READ_BOTH.format("one", "two")),
    )
    first = run(pipeline, settings=settings)
    again = run(pipeline, settings=settings)
    assert first.results["c"] == again.results["c"] == {"v": "A|B"}
    assert set(statuses(again).values()) == {"cached"}
    for record in (first, again):
        written = {path.relative_to(record.folder).as_posix() for path in record.folder.rglob("*.txt")}
        assert written == {"files/a/out.txt", "files/b/out.txt"}
    assert first.stage("c").parameters == {"one": "../a/out.txt", "two": "../b/out.txt"}


def test_a_stage_may_call_its_file_like_the_one_that_it_got(tmp_path: Path, settings: Settings) -> None:
    clean = "Path('data.csv').write_text(Path(raw).read_text() + '+clean')\nrecord_result(clean='data.csv')"
    pipeline = write_stages(
        tmp_path,
        a=("", "raw", "Path('data.csv').write_text('raw')\nrecord_result(raw='data.csv')"),
        b=("raw", "clean", clean),
        c=("raw clean", "v", READ_BOTH.format("raw", "clean")),
    )
    assert run(pipeline, settings=settings).results["c"] == {"v": "raw|raw+clean"}
    assert run(pipeline, settings=settings).results["c"] == {"v": "raw|raw+clean"}


def test_a_folder_without_files_does_not_stay(tmp_path: Path, settings: Settings) -> None:
    pipeline = write_stages(tmp_path, a=("", "v", "record_result(v=os.getcwd())"))
    record = run(pipeline, settings=settings)
    assert record.results["a"]["v"] == str(record.folder / "files" / "a")
    assert sorted(path.name for path in record.folder.iterdir()) == ["01_a.ipynb", "run.json"]


CHANGES = {
    "the same name, by its absolute path": "Path({0!r}).write_text('clean')\nrecord_result(clean={0!r})",
    "in place, by the path that it was given": "Path(raw).write_text('clean')\nrecord_result(clean=raw)",
    "in place, and another file is recorded": "Path(raw).write_text('x')\nopen('c', 'w')\nrecord_result(clean='c')",
    "moved away": "Path(raw).rename('mine.csv')\nrecord_result(clean='mine.csv')",
    "through a link": "Path('here').symlink_to({0!r})\nPath('here').write_text('c')\nrecord_result(clean='here')",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_stage_that_changes_another_ones_file_is_an_error(tmp_path: Path, settings: Settings, change: str) -> None:
    data = str(tmp_path / "data.csv")
    made = data if "{0" in change else "data.csv"
    pipeline = write_stages(
        tmp_path,
        a=("", "raw", f"Path({made!r}).write_text('raw')\nrecord_result(raw={made!r})"),
        b=("raw", "clean", change.format(data)),
        c=("raw clean", "v", READ_BOTH.format("raw", "clean")),
    )
    expected = r"data\.csv, which stage a made as raw, (was changed|is gone) while stage b ran"
    with pytest.raises(ResultError, match=expected):
        run(pipeline, settings=settings)
    assert planned(pipeline, settings) == {"a": "cached", "b": "run", "c": "perhaps"}, "nothing of b is kept"
    write_notebook(
        tmp_path / "b.ipynb",
        "raw: str = None",
        HEAD + "Path('own.csv').write_text(Path(raw).read_text() + '+clean')\nrecord_result(clean='own.csv')",
    )
    mended = run(pipeline, settings=settings)
    assert mended.results["c"] == {"v": "raw|raw+clean"}
    assert statuses(mended) == {"a": "cached", "b": "done", "c": "done"}


def test_a_file_inside_another_stages_folder_is_an_error(tmp_path: Path, settings: Settings) -> None:
    out = str(tmp_path / "out")
    pipeline = write_stages(
        tmp_path,
        a=("", "all", f"Path({out!r}).mkdir(exist_ok=True); Path({out!r}, 'a').touch()\nrecord_result(all={out!r})"),
        b=("all", "mine", "Path(all, 'b').touch()\nrecord_result(mine=all + '/b')"),
    )
    with pytest.raises(ResultError, match="which stage a made as all, was changed while stage b ran"):
        run(pipeline, settings=settings)


PLACES = {
    "the same path": ("{0}/x", "{0}/x"),
    "through a linked folder": ("{0}/x", "{0}/link/x"),
    "two names of one file": ("{0}/x", "{0}/y"),
    "one inside the other": ("{0}", "{0}/x"),
}


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("places", PLACES.values(), ids=list(PLACES))
def test_one_file_of_two_stages_is_an_error_that_names_both(
    tmp_path: Path, settings: Settings, places: tuple[str, str], first: str
) -> None:
    """They run side by side; a begins to write, b writes, then they end one after the other."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "x").touch()
    os.link(shared / "x", shared / "y")
    (shared / "link").symlink_to(shared, target_is_directory=True)
    if places[0] == "{0}":
        (shared / "link").unlink()  # it would only be one more difficulty
    recorded = [place.format(shared) for place in places]
    writes = [place if place != str(shared) else f"{shared}/a" for place in recorded]
    wait = f"while not Path({str(tmp_path / 'next')!r}).exists(): time.sleep(0.02)\ntime.sleep(0.3)\n"
    done = f"Path({str(tmp_path / 'next')!r}).touch()\n"
    code = {"a": f"Path({writes[0]!r}).write_text('A')\n"}
    code["b"] = f"time.sleep(0.3)\nPath({writes[1]!r}).write_text('B')\n"
    second = "b" if first == "a" else "a"
    code[first] += "time.sleep(0.6)\n" + done
    code[second] += wait
    pipeline = write_stages(
        tmp_path,
        a=("", "one", f"{code['a']}record_result(one={recorded[0]!r})"),
        b=("", "two", f"{code['b']}record_result(two={recorded[1]!r})"),
    )
    with pytest.raises(ResultError) as caught:
        run(pipeline, settings=settings, options=Options(width=2))
    assert re.search(r"stage [ab] recorded .* as (one|two), and stage [ab] recorded", str(caught.value))
    assert {"stage a ", "stage b "} <= set(re.findall("stage . ", str(caught.value)))
    assert planned(pipeline, settings) == {"a": "run", "b": "run"}, "nobody knows whose bytes were kept"


def test_what_was_given_may_be_passed_on(tmp_path: Path, settings: Settings) -> None:
    """A stage that only looks at a file: it's the same file, and there is no dispute."""
    pipeline = write_stages(
        tmp_path,
        a=("", "raw", "Path('data.csv').write_text('raw')\nrecord_result(raw='data.csv')"),
        b=("raw", "good", "assert Path(raw).read_text()\nrecord_result(good=raw)"),
        c=("good", "best", "record_result(best=str(Path(good).resolve()))"),
        d=("good best", "v", READ_BOTH.format("good", "best")),
    )
    first = run(pipeline, settings=settings)
    write_notebook(tmp_path / "d.ipynb", "good: str = None\nbest: str = None", HEAD + READ_BOTH.format("best", "good"))
    for path in first.folder.rglob("*.csv"):
        path.unlink()
    again = run(pipeline, settings=settings)
    assert first.results["d"] == again.results["d"] == {"v": "raw|raw"}
    assert statuses(again) == {"a": "cached", "b": "cached", "c": "cached", "d": "done"}
    assert again.results["c"]["best"] == str(again.folder / "files" / "a" / "data.csv")


def test_who_runs_at_the_same_time_is_named_as_well(tmp_path: Path, settings: Settings) -> None:
    """b changes what a has made and goes on; c ends meanwhile. It may have been either of them."""
    data, changed = str(tmp_path / "data.csv"), str(tmp_path / "changed")
    wait = f"while not Path({changed!r}).exists(): time.sleep(0.02)\n"
    meddle = f"Path({data!r}).write_text('x')\nPath({changed!r}).touch()\ntime.sleep(2)\n"
    pipeline = write_stages(
        tmp_path,
        a=("", "raw", f"Path({data!r}).write_text('raw')\nrecord_result(raw={data!r})"),
        b=("raw", "two", f"{meddle}record_result(two=raw)"),
        c=("raw", "three", f"{wait}Path('c').touch()\nrecord_result(three='c')"),
    )
    with pytest.raises(ResultError, match="made as raw, was changed while stage c ran, at the same time as b"):
        run(pipeline, settings=settings, options=Options(width=2))
    assert planned(pipeline, settings) == {"a": "cached", "b": "run", "c": "run"}


def test_a_file_that_changed_before_a_stage_got_it_is_an_error(tmp_path: Path, settings: Settings) -> None:
    pipeline = write_stages(
        tmp_path,
        a=("", "raw", "Path('data.csv').write_text('raw')\nrecord_result(raw='data.csv')"),
        b=("raw", "v", "record_result(v=Path(raw).read_text())"),
    )

    def meddle(kind: str, record: PipelineRun, stage: object) -> None:
        if kind == "stage ended":
            (record.folder / "files" / "a" / "data.csv").write_text("other")

    with pytest.raises(ResultError, match="which stage a made as raw, was changed before stage b could begin"):
        run(pipeline, settings=settings, on_event=meddle)


# ---------------------------------------------------------------- one list of claims for a backfill


def write_months(folder: Path, path: Path, wait: float) -> Path:
    """A stage that writes each month's figures into one file."""
    code = f"Path({str(path)!r}).write_text(month); time.sleep({wait})\nrecord_result(f={str(path)!r})"
    write_notebook(folder / "count.ipynb", "month: str = None", HEAD + code)
    entries = 'name: count, notebook: count.ipynb, parameters: {month: "${month}"}, outputs: {f: file}'
    text = f"name: months\nparameters: {{month: {{type: text}}}}\nstages:\n  - {{{entries}}}\n"
    return write_pipeline(folder, text, "months")


@pytest.mark.parametrize("width", [1, 2])
def test_a_file_of_two_runs_of_a_backfill_is_an_error_and_neither_is_kept(
    tmp_path: Path, settings: Settings, width: int
) -> None:
    pipeline = write_months(tmp_path, tmp_path / "x.csv", 1.5)
    filled = backfill(pipeline, "month", ["one", "two"], settings=settings, options=Options(width=width))
    assert sorted(each.status for each in filled) == ["done", "failed"]
    (error,) = [each.error for each in filled if each.error]
    assert re.search(r"stage count recorded .*x\.csv as f, and stage count of the run .* that is one file", error)
    actions = [plan(pipeline, {"month": month}, settings)[0].action for month in ("one", "two")]
    assert actions == ["run", "run"], "nobody knows whose bytes were kept"


def test_cached_stages_of_one_file_complain_before_they_overwrite_it(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "x.csv"
    pipeline = write_months(tmp_path, path, 0)
    for month in ("one", "two"):
        run(pipeline, {"month": month}, settings)
    filled = backfill(pipeline, "month", ["one", "two"], settings=settings, options=Options(width=1))
    assert [each.status for each in filled] == ["cached", "failed"]
    assert path.read_text() == "one"


def test_a_result_that_all_runs_of_a_backfill_share_is_no_dispute(tmp_path: Path, settings: Settings) -> None:
    path = str(tmp_path / "raw.csv")
    write_notebook(tmp_path / "get.ipynb", "", HEAD + f"Path({path!r}).write_text('raw')\nrecord_result(raw={path!r})")
    use = HEAD + "record_result(v=Path(raw).read_text() + month)"
    write_notebook(tmp_path / "use.ipynb", "raw: str = None\nmonth: str = None", use)
    stages = "  - {name: get, notebook: get.ipynb, outputs: {raw: file}}\n  - {name: use, notebook: use.ipynb, "
    stages += 'inputs: [raw], parameters: {month: "${month}"}, outputs: {v: value}}\n'
    text = f"name: shared\nparameters: {{month: {{type: text}}}}\nstages:\n{stages}"
    pipeline = write_pipeline(tmp_path, text, "shared")
    filled = backfill(pipeline, "month", ["one", "two"], settings=settings, options=Options(width=2))
    assert [each.status for each in filled] == ["done", "done"], filled
