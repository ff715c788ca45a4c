"""A portfolio: built from real runs and answers, verified in a clean process; no cheat is taken for an answer."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser_helpers import CHROMIUM, open_offline
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.course.checking import check_notebook
from mlops_course.course.copies import make_copy
from mlops_course.course.lessons import (
    Lesson,
    belongs_to,
    find_lesson,
    find_lessons,
    notebook_text,
    read_lesson,
    with_answer,
)
from mlops_course.course.progress import edit_progress, note_outcomes, section_of
from mlops_course.environment import Settings, load_settings
from mlops_course.ledger import LedgerEntry, append_entry
from mlops_course.pipelines.runs import PipelineRun, StageRun, save_run
from mlops_course.portfolio import (
    Portfolio,
    PortfolioError,
    RunLimits,
    build_portfolio,
    keep_review,
    practise,
    read_portfolio,
    review_form,
    verify_portfolio,
)
from mlops_course.portfolio.answers import reaches
from mlops_course.portfolio.architecture import (
    Architecture,
    ArchitectureError,
    Objection,
    Promises,
    ReleaseWay,
    SystemPart,
    loses,
    read_architecture,
    review_architecture,
    still_works,
)
from mlops_course.portfolio.building import BuiltPortfolio
from mlops_course.portfolio.enclosing import EnclosedNotebook, as_block, enclose_notebook, open_notebook
from mlops_course.portfolio.guarding import compare_notes, guard_process, remember
from mlops_course.portfolio.interview import Practice
from mlops_course.portfolio.judging import enclosed_answers, judge_section, refused_answers
from mlops_course.portfolio.page import architecture_picture, portfolio_page
from mlops_course.portfolio.peers import PEER_RUBRIC, Criterion, kept_reviews, read_review, subject_of
from mlops_course.portfolio.record import collect_record, fixed_labs, passed_exercises
from mlops_course.portfolio.verifying import CheckedClaim, PortfolioCheck

pytestmark = pytest.mark.filterwarnings("ignore")
EVIL = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
SECTION = "2"


def answered(lesson: Lesson, answers: dict[str, str]) -> dict[str, Any]:
    """A learner's copy with answers in the exercises' cells."""
    copy = make_copy(lesson)
    for cell in copy["cells"]:
        if belongs_to(cell) in answers:
            cell["source"] = f"# Exercise {belongs_to(cell)}\n{answers[str(belongs_to(cell))]}"
    return copy


def solved(lesson: Lesson) -> dict[str, str]:
    """Right answers to all exercises of a lesson."""
    return {number: with_answer(each.source, each.solution) for number, each in lesson.exercises.items()}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return find_lesson(SECTION)


@pytest.fixture(scope="module")
def learner(lesson: Lesson, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """A workspace in which somebody has really passed a section, run a pipeline, released, and fixed a lab."""
    place = tmp_path_factory.mktemp("learner")
    settings, work = load_settings(home=place / "workspace").prepare(), place / "work"
    work.mkdir()
    (work / lesson.path.name).write_text(notebook_text(answered(lesson, solved(lesson))), encoding="utf-8")
    report = check_notebook(lesson, work / lesson.path.name, home=settings.home)
    assert report.status == 0, report
    note_outcomes(settings.home, report.exercises)
    with edit_progress(settings.home) as document:
        section_of(document, 3)["lab"].update(passed=True, broken=False, symptom=f"too good {EVIL}\nsecond line")
    figures = {"pr_auc": 0.5655, "pr_auc_low": 0.5039, "pr_auc_high": 0.6103, "roc_auc": 0.774, "log_loss": 0.4315}
    compared = [{"model": "model", **figures}, {"model": "rates", "pr_auc": 0.3194}]
    tested = {"comparison": compared, "made": "tested on 9 rows"}
    seen = {"month": "2013-10", "verdict": "quiet", "alarms": ["wind"], "figures": {"log_loss": 0.38}}
    results = {"evaluate": tested, "register": {"model": "flight-delay@1", "promoted": True}, "monitor": seen}
    folder = settings.runs / "20130101T000000-training"
    folder.mkdir(parents=True)
    stages = [StageRun(name, folder / f"{name}.ipynb", status="done", results=each) for name, each in results.items()]
    save_run(PipelineRun(folder.name, "training", folder, {}, stages, "2013-01-01T00:00:00+00:00", status="done"))
    change = {"use_case": "flight-delay", "subject": "flight-delay@1", "by": "ann"}
    append_entry(settings, LedgerEntry(event="promote", reason=f"better {EVIL}", **change))
    append_entry(settings, LedgerEntry(event="rollback", reason="HA was late", **change))
    return settings, work


@pytest.fixture(scope="module")
def built(learner: tuple[Settings, Path], tmp_path_factory: pytest.TempPathFactory) -> BuiltPortfolio:
    settings, work = learner
    return build_portfolio(settings, f"Ann {EVIL}"[:80], tmp_path_factory.mktemp("page") / "ann.html", work)


def forged(built: BuiltPortfolio, target: Path, **parts: Any) -> Path:
    """The same page with other data in it."""
    text, portfolio = built.path.read_text(encoding="utf-8"), msgspec.structs.replace(built.portfolio, **parts)
    target.write_text(text.replace(as_block(built.portfolio), as_block(portfolio)), encoding="utf-8")
    return target


def results_of(checked: PortfolioCheck) -> dict[str, str]:
    return {claim.id: claim.result for claim in checked.claims}


# ---------------------------------------------------------------- what is said


def test_the_record_is_what_the_workspace_says(learner: tuple[Settings, Path]) -> None:
    record = collect_record(learner[0])
    (model,) = record["models"]
    assert (model["model"], model["pr_auc_low"], model["rivals"]) == ("flight-delay@1", 0.5039, {"rates": 0.3194})
    assert [each["event"] for each in record["ledger"]["changes"]] == ["rollback", "promote"]
    assert record["months"][0]["alarms"] == ["wind"] and record["runs"] == {"done": 1}
    assert set(record["sections"]) == {str(int(path.name[:2])) for path in find_lessons()}


def test_a_ledger_that_was_edited_is_not_called_sound(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path).prepare()
    append_entry(settings, LedgerEntry(event="promote", use_case="a", subject="a@1", by="ann", reason="because"))
    assert collect_record(settings)["ledger"]["sound"] is True
    settings.ledger.write_bytes(settings.ledger.read_bytes().replace(b"because", b"becauSe"))
    record = collect_record(settings)
    assert record["ledger"]["sound"] is False
    parts: dict[str, Any] = {"exercises": {}, "labs": {}, "notebooks": {}, "record": record}
    page = portfolio_page(Portfolio(format=1, name="Ann", made="", version="1", **parts))
    assert "chain of hashes holds" not in page


def test_a_ledger_that_was_cut_off_says_where(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path).prepare()
    for event in ("promote", "rollback"):
        append_entry(settings, LedgerEntry(event=event, use_case="a", subject="a@1", by="ann", reason="because"))
    settings.ledger.write_bytes(settings.ledger.read_bytes()[:-20])
    ledger = collect_record(settings)["ledger"]
    assert ledger["sound"] is False and ledger["lines"] == 1
    assert ledger["problem"].startswith("line 2: it was cut off after")


def test_only_what_can_be_run_again_is_claimed(learner: tuple[Settings, Path], tmp_path: Path) -> None:
    settings = learner[0]
    passed = passed_exercises(settings)
    assert len(passed) == len(find_lesson(SECTION).exercises) and fixed_labs(settings).keys() == {"3"}
    nothing = build_portfolio(settings, "Ann", tmp_path / "a.html", tmp_path / "no copies")
    assert nothing.portfolio.exercises == {} and all(number in nothing.notices[0] for number in passed)
    lesson = find_lesson(SECTION)
    (tmp_path / "work").mkdir()
    one = next(iter(lesson.exercises))
    copy = answered(lesson, {one: solved(lesson)[one]})
    (tmp_path / "work" / lesson.path.name).write_text(notebook_text(copy), encoding="utf-8")
    some = build_portfolio(settings, "Ann", tmp_path / "b.html", tmp_path / "work")
    assert [*some.portfolio.exercises] == [one] and "has no answer" in some.notices[0]


def test_a_page_with_a_secret_in_it_is_not_made(learner: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, work = learner
    lesson = find_lesson(SECTION)
    copy = json.loads((work / lesson.path.name).read_text(encoding="utf-8"))
    secret = "mlc_0123456789ab_" + "s" * 43
    added = {"cell_type": "code", "metadata": {}, "source": [f"key = '{secret}'"], "outputs": []}
    (tmp_path / lesson.path.name).write_text(json.dumps({**copy, "cells": [*copy["cells"], added]}), encoding="utf-8")
    with pytest.raises(PortfolioError, match="looks like a secret") as told:
        build_portfolio(settings, "Ann", tmp_path / "page.html", tmp_path)
    assert secret not in str(told.value) and not (tmp_path / "page.html").exists()


def test_what_comes_from_a_workspace_stays_text(built: BuiltPortfolio) -> None:
    text = built.path.read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<img" not in text and "&lt;script&gt;" in text
    shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    shown = shown.replace("http://www.w3.org/2000/svg", "")
    assert not any(each in shown for each in ("http:", "https:", "url(http", "@import"))
    assert read_portfolio(built.path) == built.portfolio
    for said in ("0.504 to 0.610", "0.319", "HA was late", "wind", "Nobody has reviewed it yet", "only claimed"):
        assert said in shown
    assert "second line" not in shown and "<title>The system: data to features" in architecture_picture({})


# ---------------------------------------------------------------- verified


@pytest.mark.slow
def test_honest_answers_are_verified_in_a_clean_process(
    built: BuiltPortfolio, lesson: Lesson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(tmp_path / "my own workspace"))
    checked = verify_portfolio(built.path, run=True)
    assert results_of(checked) == {**dict.fromkeys(lesson.exercises, "verified"), "lab 3": "only claimed"}
    assert checked.status == 0
    assert not (tmp_path / "my own workspace").exists(), "the verifier's own workspace is not touched"


def test_nothing_runs_without_a_yes(built: BuiltPortfolio) -> None:
    with pytest.raises(PortfolioError, match=r"code of .* has to run for ") as told:
        verify_portfolio(built.path)
    assert told.value.exit_status == 2 and "--run" in str(told.value)


JUDGE = "import mlops_course.course.running as judge\n"
CHEATS: dict[str, tuple[str, str]] = {  # label: (an answer to 2.1 that is wrong but for a trick, words of the reason)
    "patches the judge": (
        JUDGE + "judge.judge_answer = lambda *a, **k: judge.ExerciseOutcome('2.1', 'passed')", "imports"),
    "patches it by its modules": (
        "import sys\nsys.modules['mlops_course.course.running'].judge_answer = print", "imports sys"),
    "reaches them through another": ("import pathlib\npathlib.os.system('true')\nnew_enough = print", "reaches for"),
    "prints an outcome": (
        "display({'application/vnd.mlops-course.check+json': {'kind': 'outcome', 'id': '2.1', 'status': 'passed', "
        "'message': '', 'title': '', 'cell': 1}}, raw=True)\ndef new_enough(version):\n    return True",
        "more than one"),
    "equals everything": (
        "class Yes:\n    def __eq__(self, other):\n        return True\ndef new_enough(version):\n    return Yes()",
        "makes a class"),
    "rebinds a built-in": (
        "def isinstance(*a):\n    return True\ndef new_enough(version):\n    return 1", "another meaning"),
    "walks the frames": (
        "def new_enough(version):\n    g = (x for x in [1])\n    g.gi_frame.f_back.f_globals.clear()\n    return True",
        "reaches"),
    "ends the process": ("def new_enough(version):\n    raise SystemExit(0)", "failed"),
    "a shell": ("!true\nnew_enough = print", "plain Python"),
    "nearly a stub": ("def new_enough(version):\n    ...", "failed"),
    "wrong": ("def new_enough(version):\n    return True", "failed"),
    "by text": ("eval('1')\ndef new_enough(version):\n    return True", "uses eval"),
    "moves the lesson's helper": (
        "def parts(version):\n    return (3, 11)\ndef new_enough(version):\n    return True", ""),
}  # fmt: skip


@pytest.mark.slow
def test_no_cheat_is_verified_and_the_honest_beside_it_are(lesson: Lesson, tmp_path: Path) -> None:
    honest = solved(lesson)
    for label, (answer, words) in CHEATS.items():
        folder = tmp_path / re.sub(r"\W", "", label)
        folder.mkdir()
        cells = answered(lesson, {"2.1": answer, "2.2": honest["2.2"]})["cells"]
        runs = label in ("prints an outcome", "ends the process")
        found = judge_section(2, cells, ["2.1", "2.2"] if runs else ["2.1"], folder)
        assert found["2.1"] and words in found["2.1"], (label, found)
        assert found.get("2.2", "") == "", "the honest one beside it holds"


@pytest.mark.slow
def test_a_forged_claim_and_a_changed_notebook_are_not_verified(built: BuiltPortfolio, tmp_path: Path) -> None:
    name, enclosed = next(iter(built.portfolio.notebooks.items()))
    more = {**built.portfolio.exercises, "2.99": "", "5.1": "", "nonsense": "", "7": ""}
    checked = verify_portfolio(forged(built, tmp_path / "more.html", exercises=more), run=True)
    found = results_of(checked)
    assert {number: found[number] for number in ("2.99", "5.1", "nonsense", "7")} == dict.fromkeys(
        ("2.99", "5.1", "nonsense", "7"), "not verified"
    )
    assert found["2.1"] == "verified" and checked.status == 1
    cells = json.loads(zlib.decompress(base64.b64decode(enclosed.content)))
    cells["cells"][0]["source"] += "\n# better"
    other = base64.b64encode(zlib.compress(json.dumps(cells).encode())).decode()
    changed = {name: EnclosedNotebook(enclosed.sha256, other)}
    checked = verify_portfolio(forged(built, tmp_path / "changed.html", notebooks=changed), run=True)
    assert set(results_of(checked).values()) == {"not verified", "only claimed"}
    assert all("was changed" in claim.reason for claim in checked.claims if claim.result == "not verified")


def test_nothing_claimed_is_not_verified() -> None:
    assert PortfolioCheck("Ann", []).status == 1
    assert PortfolioCheck("Ann", [CheckedClaim("lab 3", "only claimed")]).status == 1
    assert PortfolioCheck("Ann", [CheckedClaim("2.1", "verified"), CheckedClaim("lab 3", "only claimed")]).status == 0


@pytest.mark.slow
def test_an_answer_that_never_ends_is_ended(built: BuiltPortfolio, lesson: Lesson, tmp_path: Path) -> None:
    copy = answered(lesson, {"2.1": "while True:\n    pass"})
    own = [cell for cell in copy["cells"] if belongs_to(cell) == "2.1"]
    notebooks = {lesson.path.name: enclose_notebook({"cells": own})}
    page = forged(built, tmp_path / "slow.html", notebooks=notebooks, exercises={"2.1": ""})
    checked = verify_portfolio(page, run=True, limits=RunLimits(seconds=4))
    assert "didn't end within 4 s" in checked.claims[0].reason and checked.status == 1


# ---------------------------------------------------------------- what keeps cheats out


def test_every_solution_of_the_course_may_run() -> None:
    for path in find_lessons():
        lesson = read_lesson(path)
        answers = {number: each.source for number, each in lesson.exercises.items()}
        assert refused_answers(lesson, answers) == {}
        assert enclosed_answers(lesson, make_copy(lesson)["cells"]) == {}, "stubs are not answers"


TOO_FAR = {  # right answers that ask for more than a stranger's may: a class of their own, files, code in text
    ("4.3", "A class"), ("8.6", "Without a return inside"), ("10.4", "Pandas"), ("10.5", "From the files"),
    ("15.3", "By hand"),
}  # fmt: skip


def test_right_answers_in_other_styles_may_run_but_for_few() -> None:
    refused = set()
    for lesson in map(read_lesson, find_lessons()):
        for number, exercise in lesson.exercises.items():
            for style, code in exercise.right.items():
                said = refused_answers(lesson, {number: with_answer(exercise.source, code)})
                refused |= {(number, style)} if said else set()
    assert refused == TOO_FAR


@pytest.mark.parametrize(
    "answer",
    [
        "from mlops_course.portfolio import verify_portfolio",
        "import numpy as np\nx = np.load('x', allow_pickle=True)",
        "x = ''.__class__",
        "x = [].append.__self__",
        "from operator import attrgetter",
        "import math as __import__",
        "try:\n    x = 1 / 0\nexcept ZeroDivisionError as __import__:\n    pass",
        "match 1:\n    case __import__:\n        x = 1",
        "pd.DataFrame.equals = lambda a, b: True",
        "x = pd.read_pickle('x')",
        "x = df.query('@pd.io.common.os.getcwd()')",
        "x = df.query('a' + 'b')",
        "x = df.apply('eval')",
        "def f():\n    global truth\n    truth = 1",
        "for truth in []:\n    pass",
        "import statistics as truth",
        "x = [truth := 1]",
        "get_ipython().run_cell('1')",
        "x = subprocess.run(['true'])",
        "x = type('X', (float,), {})",
        "def broken(:",
        "x = 1" + " " * 30_000,
    ],
)
def test_what_reaches_further_is_not_run(answer: str) -> None:
    assert reaches(answer, {"stub": "x = ...", "names": ["x"]}, frozenset({"truth"})) != []


def test_a_class_does_not_lie_about_what_it_equals() -> None:
    asked = {"stub": "class X:\n    ...", "names": ["X"]}
    honest = "class X:\n    def __init__(self):\n        self.a = 1\n    def mean(self):\n        return self.a"
    assert reaches(honest, asked, frozenset()) == []
    lying = "class X:\n    def __eq__(self, other):\n        return True"
    assert reaches(lying, asked, frozenset()) == ["it defines __eq__"]


@pytest.mark.parametrize(
    "answer",
    [
        "x = [each for each in values if each > 1]",
        "import numpy as np\nfrom pathlib import Path\nx = np.mean(values)",
        "frame = frame.copy()\nframe.columns = ['a']\nframe['b'] = 1\nx = frame",
        "def x(types):\n    modules = [1]\n    return modules + types",
        "def x(truth):\n    truth = truth + 1\n    return truth",
        "x = df.query('delay > 3 and origin == @origin')",
        "x = '_'.join(values)",
    ],
)
def test_plain_answers_run(answer: str) -> None:
    assert reaches(answer, {"stub": "x = ...", "names": ["x"]}, frozenset({"truth"})) == []


def test_the_guard_and_the_notes_are_there_for_the_process_that_judges() -> None:
    """They can't be tried here: what the guard does lasts, and the notes need a notebook. Their page runs them."""
    assert all(callable(each) for each in (guard_process, remember, compare_notes))


# ---------------------------------------------------------------- files from strangers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "0 blocks"),
        (lambda text: text + text, "2 blocks"),
        (lambda text: text.replace('"format":1', '"format":9'), "format 9"),
        (lambda text: text.replace('"format":1', '"format":"1"'), "not a portfolio"),
        (lambda text: text.replace('"exercises":{', '"exercises":{"1.1":7,'), "not a portfolio"),
        (lambda text: "[" * 100_000 + text.replace('{"format"', "[" * 100_000 + '{"format"', 1), "not a portfolio"),
        (lambda text: text + " " * 21_000_000, "more than 20,000,000 bytes"),
    ],
)
def test_what_is_not_a_portfolio_is_refused(
    built: BuiltPortfolio, tmp_path: Path, change: Callable[[str], str], words: str
) -> None:
    (tmp_path / "page.html").write_text(change(built.path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(PortfolioError, match=words):
        read_portfolio(tmp_path / "page.html")
    with pytest.raises(PortfolioError, match="can't be read"):
        read_portfolio(tmp_path / "nowhere.html")


def test_a_notebook_that_unpacks_for_ever_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(b'{"cells":[' + b" " * 200_000_000 + b"]}", 9)).decode()
    plain, empty = base64.b64encode(b"plain").decode(), base64.b64encode(zlib.compress(b"{}")).decode()
    for content in (bomb, "%%%", "", plain, empty):
        with pytest.raises(PortfolioError):
            open_notebook(EnclosedNotebook("0" * 64, content))


# ---------------------------------------------------------------- a friend, and practice


def test_a_review_goes_out_and_comes_back_onto_the_page(
    learner: tuple[Settings, Path], built: BuiltPortfolio, tmp_path: Path
) -> None:
    settings, work = learner
    form = review_form(built.portfolio)
    assert all(isinstance(each, Criterion) and each.question in form for each in PEER_RUBRIC)
    path = tmp_path / "review.yaml"
    for text, words in (
        (form, "no name"),
        (form.replace("reviewer: ''", "reviewer: Bob"), "level None"),
        ("reviewer: [", "can't be read"),
        ("- 1", "not a review"),
        ("a: " + "x" * 200_000, "not a review"),
        ("reviewer: &a [x, x]\nanswers: {}\nask: *a", "no name"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PortfolioError, match=words):
            read_review(path)
    said = form.replace("reviewer: ''", "reviewer: Bob").replace("    level:", "    level: 2")
    path.write_text(said.replace("because: ''", f"because: I saw it {EVIL}"), encoding="utf-8")
    other = msgspec.structs.replace(built.portfolio, exercises={"2.1": ""})
    assert subject_of(other) != subject_of(built.portfolio)
    with pytest.raises(PortfolioError, match="is about the portfolio"):
        keep_review(settings, path, other)
    keep_review(settings, path, built.portfolio)
    assert [each["reviewer"] for each in kept_reviews(settings)] == ["Bob"]
    again = build_portfolio(settings, built.portfolio.name, tmp_path / "again.html", work)
    text = again.path.read_text(encoding="utf-8")
    assert "Review by Bob" in text and "2 of 3" in text and text.count("<script") == 1
    assert subject_of(again.portfolio) == subject_of(built.portfolio), "a review does not make another portfolio of it"
    (settings.home / "portfolio" / "reviews" / "bob.json").unlink()


def test_answers_point_to_the_own_system_or_say_that_nothing_is_there(
    learner: tuple[Settings, Path], tmp_path: Path
) -> None:
    mine = {each.question: each for each in practise(learner[0])}
    back = mine["Have you ever rolled back?"]
    assert isinstance(back, Practice) and back.yours
    assert "ledger, line 2" in back.points[0] and "HA was late" in back.points[0]
    model = mine["How good is your model, and compared with what?"]
    assert "0.504 to 0.610" in model.points[0] and "rates has 0.319" in model.points[1]
    empty = practise(load_settings(home=tmp_path).prepare())
    assert not any(each.yours for each in empty)
    assert all("Nothing in your workspace" in each.points[0] for each in empty)
    with pytest.raises(Exception, match="no question 99"):
        practise(learner[0], 99)


def test_the_commands_say_it_to_people_and_to_programs(
    learner: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, work = learner
    monkeypatch.chdir(work)
    page, home = tmp_path / "ann.html", ["--home", str(settings.home)]

    def run(*arguments: str) -> Any:
        return CliRunner(env={"FORCE_COLOR": None}).invoke(app, [*arguments])

    made = run("portfolio", "build", "--name", "Ann", "--output", str(page), "--json", *home)
    assert made.exit_code == 0 and json.loads(made.stdout)["exercises"] == [*find_lesson(SECTION).exercises]
    refused = run("portfolio", "verify", str(page))
    assert refused.exit_code == 2 and "--run" in refused.stderr
    assert run("portfolio", "verify", str(tmp_path / "nowhere.html"), "--run").exit_code == 2
    assert run("portfolio", "review", str(page), "--output", str(tmp_path / "form.yaml")).exit_code == 0
    assert run("portfolio", "accept", str(tmp_path / "form.yaml"), str(page), *home).exit_code == 2
    asked = run("interview", "--json", *home)
    assert {"number", "question", "yours", "points", "then"} == json.loads(asked.stdout)[0].keys()
    assert run("interview", "99", *home).exit_code == 1


SYSTEM = """
parts:
  - {name: proxy, copies: 2, needs: [service]}
  - {name: service, copies: 2, needs: [bundle], uses: [predictions], secrets: environment}
  - {name: bundle, copies: 2, keeps_days: 400, backup: archive}
  - {name: predictions, keeps_days: 90, backup: archive}
  - {name: archive, keeps_days: 800}
  - {name: monitor, uses: [predictions]}
release: {gate: true, approvers: 1, share_first: 0.05, watch_minutes: 60, rollback_minutes: 5}
promises: {entry: proxy, availability: 0.999, label_days: 30, predictions: predictions, alarm: monitor,
           watched: [service, predictions]}
"""


@pytest.mark.parametrize(
    ("old", "new", "part", "words"),
    [
        ("", "", "", ""),
        ("{name: proxy, copies: 2", "{name: proxy", "proxy", "answers nobody"),
        ("uses: [predictions], sec", "needs: [bundle, predictions], sec", "predictions", "answers nobody"),
        ("keeps_days: 90", "keeps_days: 20", "predictions", "deleted after 20 days"),
        ("keeps_days: 90, backup: archive", "keeps_days: 90", "predictions", "nowhere else"),
        ("keeps_days: 90, backup: archive", "keeps_days: 90, backup: predictions", "predictions", "nowhere else"),
        ("gate: true", "gate: false", "release", "worse model"),
        ("approvers: 1", "approvers: 0", "release", "one person alone"),
        ("share_first: 0.05", "share_first: 1", "release", "100%"),
        ("rollback_minutes: 5", "rollback_minutes: 60", "release", "43 to spare"),
        ("watched: [service, ", "watched: [", "service", "nobody watches it"),
        ("{name: monitor, uses", "{name: monitor, needs", "monitor", "silence looks like health"),
        ("secrets: environment", "secrets: settings.yaml", "service", "settings.yaml"),
    ],
)
def test_a_review_asks_what_a_description_does(old: str, new: str, part: str, words: str) -> None:
    objections = review_architecture(read_architecture(SYSTEM.replace(old, new, 1)))
    assert all(isinstance(each, Objection) for each in objections) and bool(objections) == bool(part)
    assert not part or any(each.part == part and words in each.problem for each in objections), objections


def test_a_description_that_contradicts_itself_is_refused() -> None:
    found = read_architecture(SYSTEM)
    assert isinstance(found, Architecture) and isinstance(found.release, ReleaseWay)
    assert isinstance(found.parts[0], SystemPart)
    assert isinstance(found.promises, Promises) and loses(found, "predictions") == {"predictions"}
    assert "proxy" not in still_works(found, {"bundle"}) and "proxy" in still_works(found, {"predictions"})
    for old, new in (("needs: [bundle]", "needs: [x]"), ("copies: 2", "copies: two"), ("gate: true", "gates: true")):
        with pytest.raises(ArchitectureError):
            read_architecture(SYSTEM.replace(old, new, 1))


# ---------------------------------------------------------------- in a browser

CONTRAST = """() => {
  const part = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => part(v / 255)); return .2126 * r + .7152 * g + .0722 * b };
  const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                        if (!/, 0\\)$|transparent/.test(c)) return rgb(c) } return [255, 255, 255] };
  const low = [];
  for (const e of document.querySelectorAll('h1,h2,p,th,td,caption,code')) {
    const a = light(rgb(getComputedStyle(e).color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([e.tagName, ratio]);
  }
  return low }"""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_whole_in_a_browser(browser: Any, built: BuiltPortfolio, width: int, scheme: str) -> None:
    shown, complaints = open_offline(browser, built.path, width, scheme)
    assert complaints == [] and shown.title().startswith("Ann <script>"), "a name stays a text"
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.locator("h1").count() == 1 and shown.locator("main section > h2").count() >= 6
    assert shown.locator("table").count() == shown.locator("table > caption").count() > 3
    assert shown.locator("svg").count() == shown.locator("svg > title").count() == 2
    assert shown.evaluate(CONTRAST) == []
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.getAttribute('role')") == "region", "wide tables scroll by keyboard"
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(shown.pdf()) > 10_000
    shown.context.close()
