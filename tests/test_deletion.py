"""Deletion: a caller's predictions are gone from every place, what is signed is true, and others' rows stay."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Quarter
from deletion_helpers import NOW, ONLINE, bytes_of, collected, key_of, log_lines
from registry_helpers import add_run
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.data import newest_reference, read_table, replace_months
from mlops_course.environment import Settings
from mlops_course.experiments import quiet_mlflow
from mlops_course.ledger import read_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import register
from mlops_course.registry.data_versions import read_notes, table_history, tag_version
from mlops_course.registry.table_ledger import check_tables
from mlops_course.security.deletion import (
    DeletionStatement,
    Expired,
    RetentionPolicy,
    check_deletion,
    expire_predictions,
    forget_rows,
    whom,
)
from mlops_course.security.envelopes import SignatureError
from mlops_course.security.finding import (
    DeletionError,
    SeenBy,
    Selection,
    choose_rows,
    find_rows,
    models_that_saw,
    select_rows,
    tell_rows,
    tell_rows_of_file,
)
from mlops_course.serving.predictions import LoggedPrediction, PredictionLog, collect_predictions, log_folder

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

@pytest.fixture
def busy(settings: Settings) -> Settings:
    """A workspace with somebody's request, `secret-1`, in every place where predictions get to."""
    collected(settings, ("secret-1", 12), ("other-1", 700))
    collected(settings, ("other-2", 701))
    log_lines(settings, ("secret-1", 12), ("other-3", 702)).close()
    for folder in (settings.runs / "january", settings.home / "reports", settings.cache / "blobs" / "ab" / "abcd"):
        folder.mkdir(parents=True)
    shown = {"output_type": "stream", "name": "stdout", "text": ["other-1 700\n", "secret-1 12\n"]}
    plain = {"output_type": "stream", "name": "stdout", "text": ["27,004 flights\n"]}
    cells = [{"cell_type": "code", "source": "x", "metadata": {}, "execution_count": 1, "outputs": [plain, shown]}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (settings.runs / "january" / "look.ipynb").write_text(json.dumps(notebook))
    (settings.home / "reports" / "flight-delay-2013-02.html").write_text("<tr><td>secret-1</td></tr>")
    (settings.home / "reports" / "flight-delay-2013-01.html").write_text("<tr><td>27,004</td></tr>")
    read_table(settings, newest_reference(settings, ONLINE), by="segment").to_parquet(
        settings.cache / "blobs" / "ab" / "abcd" / "copy.parquet"
    )
    return settings


MINE = choose_rows(flight_delay, ids=["secret-1"])


def test_nothing_of_a_request_is_left_anywhere_and_all_others_are(busy: Settings) -> None:
    assert b"secret-1" in bytes_of(busy)
    done = forget_rows(busy, flight_delay, MINE, "asked for", by="ann")
    assert done.complete and done.statement.left == ()
    assert {each.place for each in done.statement.found} == {"log", "table", "table log", "run", "report", "cache"}
    assert b"secret-1" not in bytes_of(busy)
    kept = read_table(busy, newest_reference(busy, ONLINE), by="segment")
    assert sorted(kept["id"]) == ["other-1", "other-2", "other-3"]
    assert kept["score"].eq(0.5).all() and kept["flight"].tolist().count(12) == 0


def test_the_rest_of_a_notebook_and_the_reports_of_other_months_stay(busy: Settings) -> None:
    forget_rows(busy, flight_delay, MINE, "asked for")
    [cell] = json.loads((busy.runs / "january" / "look.ipynb").read_text())["cells"]
    assert cell["source"] == "x" and cell["outputs"][0]["text"] == ["27,004 flights\n"]
    assert "deleted" in cell["outputs"][1]["text"][0]
    assert [path.name for path in (busy.home / "reports").iterdir()] == ["flight-delay-2013-01.html"]


def test_old_versions_go_although_they_have_a_tag(settings: Settings) -> None:
    tag_version(settings, collected(settings, ("secret-1", 12), ("other-1", 700)), "golden")
    forget_rows(settings, flight_delay, MINE, "asked for", by="ann")
    assert read_notes(settings, ONLINE).tags == {}
    with_rows = [each for each in table_history(settings, ONLINE) if each.rows]
    assert [each.gone for each in with_rows] == ["pruned", ""]
    assert check_tables(settings) == [] and verify_ledger(settings) == []


def test_what_a_living_worker_writes_to_is_left_alone_and_said_to_be_left(settings: Settings) -> None:
    log = log_lines(settings, ("secret-1", 12))
    done = forget_rows(settings, flight_delay, MINE, "asked for")
    assert not done.complete and [(each.place, each.rows) for each in done.statement.left] == [("log", 1)]
    log.close()
    assert forget_rows(settings, flight_delay, MINE, "asked for").complete


def test_who_is_unknown_gets_a_statement_of_where_was_looked(settings: Settings) -> None:
    done = forget_rows(settings, flight_delay, choose_rows(flight_delay, ids=["nobody"]), "asked for")
    assert done.complete and done.statement.found == () and done.statement.searched["log"] == 0


def test_deleting_again_finds_nothing(busy: Settings) -> None:
    forget_rows(busy, flight_delay, MINE, "asked for")
    before = table_history(busy, ONLINE)
    assert forget_rows(busy, flight_delay, MINE, "asked for").statement.found == ()
    assert table_history(busy, ONLINE)[-1] == before[-1]


def test_a_row_is_found_however_its_time_was_written(settings: Settings) -> None:
    collected(settings, ("secret-1", 12))
    for text in ("2013-02-01T10:00:00Z", "2013-02-01 11:00+01:00", "2013-02-01T10:00"):
        wanted = choose_rows(flight_delay, key={"time_hour": text, "flight": "12"})
        assert sum(each.rows for each in find_rows(settings, flight_delay, wanted).found if each.place == "table") == 1
    other = choose_rows(flight_delay, key={"time_hour": "2013-02-01T11:00:00Z", "flight": "12"})
    assert find_rows(settings, flight_delay, other).found == ()


def test_predictions_of_a_batch_are_deleted_by_their_row(settings: Settings) -> None:
    key = pd.DataFrame([key_of(12) | {"score": 0.1}, key_of(13) | {"score": 0.2}])
    rows = key.assign(time_hour=pd.to_datetime(key["time_hour"]), period="2013-02", model="flight-delay@1")
    replace_months(settings, "flight-delay/predictions", rows, sources={"features": "flight-delay/features@0"})
    forget_rows(settings, flight_delay, choose_rows(flight_delay, key={"flight": "12"}), "asked for")
    newest = newest_reference(settings, "flight-delay/predictions")
    assert read_table(settings, newest)["flight"].tolist() == [13]
    assert table_history(settings, "flight-delay/predictions")[-1].sources == {"features": "flight-delay/features@0"}


# ---------------------------------------------------------------- the statement


def test_the_statement_names_nobody_and_only_the_receipt_shows_whom_it_is_about(busy: Settings) -> None:
    done = forget_rows(busy, flight_delay, MINE, "asked for", by="ann")
    said, found = check_deletion(busy, flight_delay, done.file, MINE, done.receipt)
    assert said == done.statement and found == () and isinstance(said, DeletionStatement)
    assert "secret-1" not in repr(said) and said.whom == whom(MINE, done.receipt)
    assert done.receipt.encode() not in bytes_of(busy) + busy.ledger.read_bytes()
    for wanted, receipt in ((MINE, "0" * 32), (choose_rows(flight_delay, ids=["other-1"]), done.receipt)):
        with pytest.raises(DeletionError, match="about somebody else"):
            check_deletion(busy, flight_delay, done.file, wanted, receipt)


def test_a_statement_that_was_changed_is_refused(busy: Settings) -> None:
    done = forget_rows(busy, flight_delay, MINE, "asked for")
    outer = json.loads(done.file.read_bytes())
    outer["payload"] = outer["payload"][:-8] + "AAAA" + outer["payload"][-4:]
    done.file.write_text(json.dumps(outer))
    with pytest.raises(SignatureError, match="changed after it was signed"):
        check_deletion(busy, flight_delay, done.file, MINE, done.receipt)


def test_what_comes_back_later_is_found_by_the_check(busy: Settings) -> None:
    done = forget_rows(busy, flight_delay, MINE, "asked for")
    (busy.runs / "restored.csv").write_text("id,score\nsecret-1,0.5\n")
    assert [each.what for each in check_deletion(busy, flight_delay, done.file, MINE, done.receipt)[1]] == [
        "runs/restored.csv"
    ]


def test_the_ledger_says_that_something_was_deleted_and_not_whose(busy: Settings) -> None:
    done = forget_rows(busy, flight_delay, MINE, "asked for", by="ann")
    line = read_ledger(busy)[-1]
    assert (line.event, line.by, line.reason) == ("forget", "ann", "asked for")
    assert line.after == {"statement": done.file.name, "whom": done.statement.whom}
    assert b"secret-1" not in busy.ledger.read_bytes() and verify_ledger(busy) == []


def test_nothing_is_deleted_where_nobody_can_sign(busy: Settings) -> None:
    inside = busy.model_copy(update={"trust": busy.home / "trust"})
    with pytest.raises(Exception, match="inside the workspace"):
        forget_rows(inside, flight_delay, MINE, "asked for")
    assert b"secret-1" in bytes_of(busy)


# ---------------------------------------------------------------- models


def test_each_model_that_was_trained_on_the_row_is_named_and_no_other(own_quarter: Quarter) -> None:
    settings = own_quarter.settings
    row = read_table(settings, own_quarter.features, ["2013-01"]).iloc[0]
    wanted = choose_rows(flight_delay, key={name: str(row[name]) for name in flight_delay.key})
    absent = choose_rows(flight_delay, key={"flight": "999999"})
    run = add_run(settings, "d1")
    quiet_mlflow().MlflowClient().set_tag(run, "data.features", own_quarter.features)
    quiet_mlflow().MlflowClient().set_tag(run, "test.features", own_quarter.rows)
    register(settings, flight_delay, run, by="ann")
    register(settings, flight_delay, add_run(settings, "d2"), by="ann")
    seen = models_that_saw(settings, flight_delay, wanted)
    assert seen == [SeenBy("flight-delay@1", own_quarter.features, 1)]
    assert models_that_saw(settings, flight_delay, absent) == []


def test_a_request_leads_to_the_models_that_saw_its_row(own_quarter: Quarter) -> None:
    settings = own_quarter.settings
    row = read_table(settings, own_quarter.features, ["2013-01"]).iloc[0]
    key = {name: row[name].isoformat() if name == "time_hour" else row[name] for name in flight_delay.key}
    plain = {name: value if isinstance(value, str) else int(value) for name, value in key.items()}
    log = PredictionLog(log_folder(settings, "flight-delay"))
    log.append([LoggedPrediction("secret-1", 1.36e9, "flight-delay@1", 0.5, True, b"", key=plain)])
    log.close()
    run = add_run(settings, "d1")
    quiet_mlflow().MlflowClient().set_tag(run, "data.features", own_quarter.features)
    register(settings, flight_delay, run, by="ann")
    done = forget_rows(settings, flight_delay, MINE, "asked for")
    assert done.statement.models == (SeenBy("flight-delay@1", own_quarter.features, 1),)
    assert own_quarter.features in {each.reference for each in table_history(settings, "flight-delay/features")}


# ---------------------------------------------------------------- texts


def notebook(**error: Any) -> str:
    """A notebook with one cell, which failed."""
    return json.dumps({"cells": [{"cell_type": "code", "outputs": [{"output_type": "error"} | error]}]})


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.html", "<tr><td>UA</td>\n<td>12</td></tr><tr><td>UA</td>\n<td>13</td></tr>", 1),
        ("a.html", "<tr><td>UA</td></tr><tr><td>12</td></tr>", 0),
        ("a.txt", "UA 12\nUA 120\nUA-12\nDL 12", 1),
        ("a.csv", "carrier,flight\nUA,12\nUA,112\nUA,1.12\n", 1),
        ("a.json", '[{"carrier": "UA", "flight": 12}, {"carrier": "UA", "flight": "13"}]', 1),
        ("a.json", '{"UA": 12}', 0),
        ("a.jsonl", '{"carrier": "UA", "flight": 12}\n{"carrier": "UA", "flight": 13}\n', 1),
        ("a.bin", "UA 12", 0),
        ("a.ipynb", notebook(ename="KeyError", evalue="UA 12"), 1),
        ("a.ipynb", notebook(ename="KeyError", traceback=["KeyError", "\x1b[0;31mUA 12\x1b[0m"]), 1),
    ],
)
def test_a_text_tells_a_row_where_all_of_its_key_stands_together(
    tmp_path: Path, name: str, text: str, rows: int
) -> None:
    (tmp_path / name).write_text(text)
    wanted = choose_rows(flight_delay, key={"carrier": "UA", "flight": "12"})
    assert tell_rows_of_file(tmp_path / name, wanted, flight_delay) == rows


def test_an_id_is_found_in_the_middle_of_a_line() -> None:
    assert tell_rows("x-request-id: secret-1; 0.5\nnothing", MINE) == 1
    assert tell_rows("", MINE) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nobody is named"),
        ({"ids": [""]}, "not the id"),
        ({"ids": ["x"]}, "not the id"),
        ({"key": {"tailnum": "N1"}}, "isn't a column"),
        ({"key": {"flight": "twelve"}}, "not a value of flight"),
        ({"key": {"flight": "12.5"}}, "not a value of flight"),
        ({"key": {"time_hour": "soon"}}, "not a value of time_hour"),
    ],
)
def test_whoever_names_nobody_deletes_nothing(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DeletionError, match=said):
        choose_rows(flight_delay, **given)


# ---------------------------------------------------------------- retention


def test_what_is_older_than_the_policy_goes_and_nothing_younger(settings: Settings) -> None:
    collected(settings, ("old", 1), moment=NOW - timedelta(days=41))
    collected(settings, ("young", 2), moment=NOW - timedelta(days=39))
    log_lines(settings, ("waits too long", 3), moment=NOW - timedelta(days=11)).close()
    log_lines(settings, ("waits", 4), moment=NOW - timedelta(days=9)).close()
    policy = RetentionPolicy(log=10, table=40)
    before = bytes_of(settings)
    looked = expire_predictions(settings, flight_delay, policy, NOW, dry_run=True)
    assert bytes_of(settings) == before and looked.found == looked.left
    assert sorted((each.place, each.rows) for each in looked.found) == [("log", 1), ("table", 1), ("table", 1)]
    done = expire_predictions(settings, flight_delay, policy, NOW, by="cron")
    assert done == Expired(looked.found, ())
    table = collect_predictions(settings, flight_delay).table
    assert sorted(read_table(settings, str(table), by="segment")["id"]) == ["waits", "young"]
    assert b'"old"' not in bytes_of(settings)


@pytest.mark.parametrize("days", [0, -1, float("nan"), 1e9])
def test_a_policy_is_a_number_of_days(days: float) -> None:
    with pytest.raises(DeletionError, match="not a policy"):
        RetentionPolicy(log=days)


# ---------------------------------------------------------------- the commands


def run(settings: Settings, *words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["data", *words, "--home", str(settings.home), "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.output


def test_the_commands_look_delete_and_check(busy: Settings) -> None:
    before = bytes_of(busy)
    status, told = run(busy, "forget", "--id", "secret-1", "--reason", "asked for", "--dry-run")
    assert status == 0 and {each["place"] for each in told["found"]} >= {"log", "table"} and bytes_of(busy) == before
    status, told = run(busy, "forget", "--id", "secret-1", "--reason", "asked for")
    assert status == 0 and told["complete"] and b"secret-1" not in bytes_of(busy)
    given = ("forgotten", told["file"], "--receipt", told["receipt"], "--id")
    assert run(busy, *given, "secret-1")[0] == 0
    assert run(busy, *given, "other-1")[0] == 1
    assert run(busy, "expire", "--table-days", "36000", "--log-days", "36000")[1] == {"found": [], "left": []}


def test_the_command_fails_while_something_is_left(settings: Settings) -> None:
    log = log_lines(settings, ("secret-1", 12))
    assert run(settings, "forget", "--id", "secret-1", "--reason", "asked for")[0] == 1
    log.close()


@pytest.mark.parametrize("words", [["--key", "UA"], ["--key", "tailnum=N1"], []])
def test_the_command_says_what_to_write_instead(settings: Settings, words: list[str]) -> None:
    status, said = run(settings, "forget", "--reason", "asked for", *words)
    assert status == 1 and re.search(r"Write it (like|as)|Those are|Name ids", said)


def test_a_long_number_is_not_rounded() -> None:
    wanted = choose_rows(flight_delay, key={"flight": str(2**53 + 1)})
    frame = pd.DataFrame({"flight": [2**53, 2**53 + 1]})
    assert select_rows(frame, wanted, flight_delay).tolist() == [False, True]


def test_a_selection_of_nothing_finds_nothing(busy: Settings) -> None:
    assert find_rows(busy, flight_delay, Selection()).found == ()
