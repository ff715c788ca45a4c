"""The alerts: their numbers are the promises', each fires and is silent as it should, and each has a playbook."""

import json
import re
import shlex
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
import typer
import yaml

from mlops_course.cli import app
from mlops_course.environment import Settings, load_settings
from mlops_course.monitoring.exposition import FIGURES, ExpositionError, exposition, exposition_folder, write_exposition
from mlops_course.monitoring.objectives import (
    BURN_RATES,
    OBJECTIVES,
    WITHIN,
    budget_spent,
    burn_alerts,
    playbook_of,
    recording_rules,
    slo_rules,
)  # fmt: skip
from mlops_course.monitoring.retraining import RetrainingPolicy
from mlops_course.serving.metrics import Metrics, expose
from mlops_course.serving.problems import REASONS

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
Document = dict[str, Any]


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=PROMETHEUS)


def rules(*names: str) -> list[Document]:
    groups = [yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))["groups"] for name in names]
    return [rule for each in groups for group in each for rule in group["rules"]]


ALL = rules("slo.yml", "alerts.yml")
ALERTS = [rule for rule in ALL if "alert" in rule]
by_alert = pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"] + rule["labels"].get("window", ""))


def pages() -> str:
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]


# ---------------------------------------------------------------- the promises


def test_the_promises_are_those_of_section_4() -> None:
    cells = json.loads((ROOT / "nbs" / "04_project.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    waiting = re.search(r"^\| waiting time: (\d+) % of the requests are answered within \| (\d+) ms \|", text, re.M)
    there = re.search(r"^\| availability: [^|]+\| ([\d.]+) % \|", text, re.M)
    assert waiting and there
    shares = {each.name: each.share for each in OBJECTIVES}
    assert shares == {"availability": float(there[1]) / 100, "latency": float(waiting[1]) / 100}
    assert float(waiting[2]) / 1000 == WITHIN


def test_what_is_fast_enough_is_a_border_of_the_histogram() -> None:
    metrics = Metrics()
    metrics.answered("/predict", "POST", 200, 0.01)
    assert f'le="{WITHIN}"' in expose(metrics).decode()


def test_the_rules_about_the_promises_are_what_the_page_makes() -> None:
    assert (PROMETHEUS / "slo.yml").read_text(encoding="utf-8") == slo_rules(pages()), "run python tools/observe.py"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: each.name)
def test_each_pace_is_asked_for_over_both_windows_with_the_promises_own_bar(objective: Any) -> None:
    recorded = {rule["record"] for rule in recording_rules(objective)}
    found = burn_alerts(objective, pages())
    assert len(found) == len(BURN_RATES) == 4
    for rate, rule in zip(BURN_RATES, found, strict=True):
        asked = re.findall(r"(\S+) > ([\d.]+) \* \(1 - ([\d.]+)\)", rule["expr"])
        assert {name for name, _, _ in asked} <= recorded
        assert [name.rpartition("_")[2] for name, _, _ in asked] == [rate.long, rate.short]
        assert {(float(times), float(share)) for _, times, share in asked} == {(rate.times, objective.share)}
        assert rule["labels"]["severity"] == rate.severity
    assert [round(budget_spent(rate), 2) for rate in BURN_RATES] == [0.02, 0.05, 0.1, 0.1]


def test_the_dashboard_has_the_promises_bars() -> None:
    text = (ROOT / "deploy" / "grafana" / "dashboards" / "serving.json").read_text(encoding="utf-8")
    shown = dict(re.findall(r"slo:(\w+):bad_1h / \(1 - ([\d.]+)\)", text))
    assert shown == {each.name: f"{each.share:g}" for each in OBJECTIVES}


def test_drift_alone_calls_nobody() -> None:
    asked = [rule["alert"] for rule in ALERTS if "drift" in rule["expr"]]
    assert asked == [], "a season moves features each year; what counts is broken input, and the loss"


def test_nobody_is_told_that_a_model_is_old_before_the_policy_would_train_again() -> None:
    (rule,) = [rule for rule in ALERTS if rule["alert"] == "ModelTooOld"]
    (days,) = re.findall(r"> (\d+) \* 86400", rule["expr"])
    longest = max((pd.Timestamp(2013, month, 1) + pd.DateOffset(months=RetrainingPolicy().age)
                   - pd.Timestamp(2013, month, 1)).days for month in range(1, 13))  # fmt: skip
    assert longest <= int(days) <= longest + 31


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize("name", ["rules.yml", "slo.yml", "alerts.yml"])
def test_prometheus_accepts_the_rules(name: str) -> None:
    checked = run(program("promtool"), "check", "rules", name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alerts_test.yml", "alerts_old_test.yml"])
def test_each_alert_fires_and_is_silent_when_it_should(name: str) -> None:
    checked = run(program("promtool"), "test", "rules", name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_alert_is_without_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, silent = set(), set()
    for name in ("alerts_test.yml", "alerts_old_test.yml"):
        for test in yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))["tests"]:
            for each in test["alert_rule_test"]:
                (fires if each["exp_alerts"] else silent).add(each["alertname"])
    names = {rule["alert"] for rule in ALERTS}
    assert (names - fires, names - silent) == (set(), set())


@by_alert
def test_an_alert_asks_for_what_there_is(rule: Document) -> None:
    metrics = Metrics()
    metrics.answered("/predict", "POST", 200, 0.01)
    metrics.failed.labels("flight-delay@1", "live").inc()
    there = set(re.findall(r"^([a-z_]+)", expose(metrics).decode(), re.MULTILINE))
    there |= {f"monitoring_{name}" for name in FIGURES} | {each["record"] for each in ALL if "record" in each} | {"up"}
    asked = set(re.findall(r"\b(?:serving|monitoring|slo)[a-z0-9_:]+", rule["expr"])) or {"up"}
    assert asked <= there
    for words in re.findall(r'reason=~"([^"]+)"', rule["expr"]):
        assert set(words.split("|")) <= REASONS


@by_alert
def test_an_alert_says_how_urgent_it_is_and_where_to_read_on(rule: Document) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["runbook_url"] == playbook_of(rule["alert"], pages())
    assert len(rule["annotations"]["summary"]) > 10


# ---------------------------------------------------------------- the playbooks


def playbooks() -> dict[str, str]:
    cells = json.loads((ROOT / "nbs" / "playbooks.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_alert_has_a_playbook_and_each_playbook_an_alert() -> None:
    assert sorted(playbooks()) == sorted({rule["alert"] for rule in ALERTS})
    assert "playbooks.ipynb" in (ROOT / "_quarto.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", playbooks())
def test_a_playbook_says_what_to_look_at_what_to_do_and_when_it_is_over(name: str) -> None:
    text = playbooks()[name]
    wanted = ("**What it means.**", "**Look first**", "**What to do.**", "**It is over when**")
    parts = [text.find(each) for each in wanted]
    assert parts == sorted(parts) and parts[0] >= 0
    assert len(re.findall(r"^```sh\n(.+?)^```", text, re.MULTILINE | re.DOTALL)) == 1


def named_commands() -> list[str]:
    text = "\n".join(playbooks().values())
    inline = [each for each in re.findall(r"`([^`\n]+)`", text) if each.startswith("mlops-course ")]
    blocks = re.findall(r"^(mlops-course [^#\n|]+)", text, re.MULTILINE)
    return sorted({each.strip() for each in [*inline, *blocks]})


@pytest.mark.parametrize("line", named_commands())
def test_a_command_in_a_playbook_is_one_that_there_is(line: str) -> None:
    words, command = shlex.split(line)[1:], typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        found = command.get_command(click.Context(command), words[0])
        if found is None:
            assert not command.no_args_is_help, line
            break
        command = found
        words.pop(0)
    options = {name: each for each in command.params for name in each.opts if name.startswith("-")}
    given = [word for word in words if word.startswith("--") and word != "--help"]
    assert [word for word in given if word not in options] == []
    asked = {each.name for each in command.params if each.required and each.param_type_name == "option"}
    assert words or not getattr(command, "no_args_is_help", False), "it shows its help, and nothing else"
    if "--help" not in words:
        assert asked <= {options[word].name for word in given}, line


def test_a_metric_in_a_playbook_is_one_that_there_is() -> None:
    metrics = Metrics()
    metrics.answered("/predict", "POST", 200, 0.01)
    told = expose(metrics).decode()
    for words in re.findall(r"grep ([^\n]+)", "\n".join(playbooks().values())):
        for word in re.findall(r"(?:-e )?'?([a-z_]{6,})'?", words):
            assert word in told or word == "failed", word


# ---------------------------------------------------------------- who is told


def test_alertmanager_accepts_its_configuration() -> None:
    checked = run(program("amtool"), "check-config", "alertmanager.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@by_alert
def test_a_page_goes_where_pages_go_and_a_ticket_where_tickets_go(rule: Document) -> None:
    labels = [f"{name}={value}" for name, value in {"alertname": rule["alert"], **rule["labels"]}.items()]
    told = run(program("amtool"), "config", "routes", "test", "--config.file=alertmanager.yml", *labels)
    assert (told.returncode, told.stdout.strip()) == (0, rule["labels"]["severity"]), told.stderr


def test_what_one_alert_silences_are_alerts() -> None:
    names = {rule["alert"] for rule in ALERTS}
    found = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text(encoding="utf-8"))
    for inhibit in found["inhibit_rules"]:
        for matcher in [*inhibit["source_matchers"], *inhibit["target_matchers"]]:
            if matcher.startswith("alertname"):
                for word in matcher.split('"')[1].split("|"):
                    assert any(re.fullmatch(word, name) for name in names), word


# ---------------------------------------------------------------- what monitoring found


def test_figures_are_written_as_a_whole_and_read_by_prometheus(settings: Settings) -> None:
    path = write_exposition(settings, "flight-delay", dict.fromkeys(FIGURES, 1.5))
    assert path.parent == exposition_folder(settings)
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=path.read_text(), capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr
    assert [each.name for each in path.parent.iterdir()] == ["flight-delay.prom"]


@pytest.mark.parametrize("figures", [{"alarm": 1}, {"rows": "3"}, {"rows": True}, {"rows": None}])
def test_what_is_no_figure_is_refused_and_leaves_the_file_alone(settings: Settings, figures: Any) -> None:
    path = write_exposition(settings, "flight-delay", {"rows": 3})
    with pytest.raises(ExpositionError):
        write_exposition(settings, "flight-delay", figures)
    assert path.read_text() == exposition("flight-delay", {"rows": 3})


def test_the_folder_that_is_shown_is_the_one_that_compose_mounts() -> None:
    found = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    (volume,) = found["services"]["node-exporter"]["volumes"]
    home = load_settings(home=ROOT / "workspace")
    assert (ROOT / "deploy" / volume.split(":")[0]).resolve() == exposition_folder(home)
