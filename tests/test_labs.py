"""Labs refuse what isn't a repair: constants, evidence that was overwritten, rows that were deleted."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops_course.course.labs import break_lab, check_lab
from mlops_course.course.lessons import find_lesson
from mlops_course.environment import load_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NO_REPAIR = {  # section: what somebody does instead of a repair, and what the check says
    "1": [
        (
            "cell = nbformat.v4.new_code_cell(wanted(lab_folder))\n"
            'nbformat.write(nbformat.v4.new_notebook(cells=[cell]), lab_folder / "report.ipynb")',
            "it doesn't count",
        )
    ],
    "2": [
        (
            "exec(fix)\nemptied = notebook_text([None, None]).replace(CELLS[0][1], '')\n"
            'write_atomic(project / "late.ipynb", emptied)',
            "has lost its cell",
        )
    ],
    "3": [
        (
            'table = pd.read_parquet(lab / "warehouse.parquet")\n'
            'table[table["month"] > 9].to_parquet(lab / "recorded.parquet", index=False)',
            "recorded.parquet isn't what was written down",
        ),
        (
            'table = pd.read_parquet(lab / "warehouse.parquet").assign(minutes_at_gate=float("nan"))\n'
            'table.to_parquet(lab / "warehouse.parquet", index=False)',
            "warehouse.parquet isn't what was written down",
        ),
        (
            'table = pd.read_parquet(lab / "warehouse.parquet").drop(columns="minutes_at_gate")\n'
            'table.to_parquet(lab / "warehouse.parquet", index=False)',
            r"warehouse.parquet has lost \['minutes_at_gate'\]",
        ),
        ('(lab / "recorded.parquet").unlink()', "recorded.parquet is gone"),
        ('(lab / "features.json").unlink()', "features.json is gone"),
        ('(lab / "recorded.parquet").write_text("")', "recorded.parquet can't be read"),
        ('(lab / "features.json").write_text("[")', "features.json can't be read: Expecting value"),
        ('(lab / "features.json").write_text("[]")', r"has to be a list of names.* not \[\]"),
        ('(lab / "features.json").write_text(\'{"wind": 1}\')', "has to be a list of names"),
        ('(lab / "features.json").write_text(\'["gust"]\')', "the warehouse has no such column"),
        ('(lab / "features.json").write_text(json.dumps([*safe, "wind"]))', "more than once"),
        ('(lab / "features.json").write_text(json.dumps([*safe, "late"]))', "names late: that is the label"),
    ],
    "5": [
        (
            "exec(fix)\nrows = january.drop_duplicates(list(flight_delay.key)).dropna(subset='arr_delay')\n"
            'replace_months(settings, "flight-delay/raw_flights", rows, by="delivery")',
            "find the rest",
        )
    ],
    "7": [
        ("desk.unlink()\nexec(prepare)", "desk.py is gone"),
        ("shutil.rmtree(lab.home)\nexec(prepare)", "desk.py and contract.json are gone"),
        ("write_atomic(desk, DESK)", "lacks warned"),
        ('write_atomic(desk, DESK)\nwrite_atomic(contract, json.dumps(["score", "model"]))', "isn't as it was"),
        ("exec(fix)\ncontract.write_text('[')", "isn't as it was"),
        (
            'exec(fix)\nwrite_atomic(desk, desk.read_text().replace("error.field", "None"))',
            "gets 422 and names the field None, not 'visibility'",
        ),
    ],
    "11": [
        (
            'exec(fix)\nrows = pd.read_csv(desk.home / "supplier.csv")\n'
            'rows[rows["carrier"] != "WN"].to_csv(desk.home / "supplier.csv", index=False)',
            "not deleted",
        ),
        (
            'exec(fix)\nrows = pd.read_csv(desk.home / "supplier.csv")\n'
            'rows.loc[rows["carrier"] == "WN", "arr_delay"] = 0.0\n'
            'rows.to_csv(desk.home / "supplier.csv", index=False)',
            "In supplier.csv the flights of WN",
        ),
    ],
}


@pytest.fixture(scope="module")
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names of a lab whose fault is in its workspace, and a way to put that state back."""
    lab = find_lesson(request.param).lab
    assert lab is not None
    home, kept = (tmp_path_factory.mktemp(f"lab{request.param}") / name for name in ("workspace", "kept"))
    scope: dict[str, Any] = {"__name__": "lab", "settings": load_settings(home=home).prepare(), "fix": lab.fix}
    scope |= {"prepare": lab.prepare, "breaks": lab.breaks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLOPS_COURSE_HOME", str(home))
        for part in (lab.prepare, lab.check, lab.breaks):
            exec(part, scope)
    shutil.copytree(home, kept, symlinks=True)

    def put_back() -> None:
        shutil.rmtree(home)
        shutil.copytree(kept, home, symlinks=True)

    yield scope | {"put_back": put_back}


@pytest.mark.parametrize("broken", NO_REPAIR, indirect=True)
def test_a_lab_refuses_what_is_no_repair_and_takes_its_own(
    broken: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = request.node.callspec.params["broken"]
    sound, settings = broken["sound"], broken["settings"]
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(settings.home))  # for who prepares it once more
    for instead, said in NO_REPAIR[section]:
        broken["put_back"]()
        exec(instead, broken)
        with pytest.raises(AssertionError, match=said):
            sound(settings)
    broken["put_back"]()
    exec(broken["fix"], broken)
    sound(settings)


OTHER_REPAIR = """
    names = [feature.name for feature in predictor.manifest.features]
    for name in [*names, *record]:
        if name not in record or name not in names:
            raise InputError("what is this?", "", name)
    return predictor.encode([record])
"""


@pytest.mark.parametrize("broken", ["7"], indirect=True)
def test_a_lab_is_broken_again_whatever_stands_there(broken: dict[str, Any]) -> None:
    broken["put_back"]()
    exec(broken["fix"], broken)
    desk = broken["desk"]
    desk.write_text(desk.read_text().replace("    return predictor.encode([record])\n", OTHER_REPAIR.lstrip("\n")))
    broken["sound"](broken["settings"])
    exec(broken["breaks"], broken)
    with pytest.raises(AssertionError, match="5 of 5 bad records"):
        broken["sound"](broken["settings"])


def test_a_lab_that_has_hints_has_two_of_them(root: Path) -> None:
    every = {number: find_lesson(number).lab for number in range(1, 12)}
    assert {number: len(lab.hints) for number, lab in every.items() if lab and len(lab.hints) != 2} == {}


@pytest.mark.slow
def test_what_is_deleted_from_lab_3_is_no_repair_and_it_can_be_broken_again(tmp_path: Path) -> None:
    lesson, home = find_lesson("3"), tmp_path / "workspace"
    load_settings(home=home).prepare()
    folder = home / "labs" / "03_lifecycle"
    said = [break_lab(lesson, home).symptom]
    (folder / "recorded.parquet").unlink()
    assert (check_lab(lesson, home) or ("", ""))[1].startswith("recorded.parquet is gone")
    shutil.rmtree(home / "labs")  # to begin again
    assert "prepared anew, and isn't broken" in (check_lab(lesson, home) or ("", ""))[1]
    assert break_lab(lesson, home).symptom == said[0]
