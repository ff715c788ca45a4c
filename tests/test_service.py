"""The REST service, asked by a real client over a real connection: answers, refusals, and what it says about itself."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from bundle_helpers import reseal, rewrite
from fastapi.testclient import TestClient
from service_helpers import FIRST, SECOND, Running, serving, until

from mlops_course.deployment import create_release
from mlops_course.deployment.workers import ReleaseModels
from mlops_course.environment import Settings
from mlops_course.serving import BundleError, Predictor, load_predictor, open_feature_table, publish
from mlops_course.serving import models as models_module
from mlops_course.serving.app import create_app
from mlops_course.serving.metrics import Metrics
from mlops_course.serving.models import Asked, Choice, LiveModels, Models
from mlops_course.serving.publishing import live_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow


@pytest.fixture(scope="module")
def examples(service: Running) -> list[dict[str, Any]]:
    return service.client.get("/examples?count=5").json()


@pytest.fixture(scope="module")
def record(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return examples[0]["record"]


@pytest.fixture(scope="module")
def key(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return examples[0]["key"]


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """A refusal has the form that the standard asks for, and says what to do."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["detail"] and found["title"]
    return found


# ---------------------------------------------------------------- answers


def test_one_flight_gets_the_score_of_the_bundle(service: Running, record: dict[str, Any]) -> None:
    answer = service.ask(record=record).json()
    predictor = load_predictor(live_bundle(service.settings) or "")
    expected = float(predictor.scores(predictor.encode([record]))[0])
    assert answer.pop("request_id")
    assert answer == {
        "score": expected, "warned": expected >= predictor.threshold, "threshold": predictor.threshold, "model": FIRST,
    }  # fmt: skip


def test_a_flight_by_its_key_has_the_score_of_its_record(service: Running, examples: list[dict[str, Any]]) -> None:
    for example in examples:
        by_key, by_record = service.ask(key=example["key"]).json(), service.ask(record=example["record"]).json()
        assert by_key["score"] == by_record["score"]


def test_a_batch_has_the_scores_of_its_rows_one_by_one(service: Running, examples: list[dict[str, Any]]) -> None:
    by_record, by_key = ({"record": examples[0]["record"]}, {"key": examples[1]["key"]})
    rows = [by_record, by_key, examples[2], {"record": examples[3]["record"]}]
    answer = service.client.post("/predict/batch", json={"rows": rows * 10}).json()
    alone = [service.ask(**row).json() for row in rows]
    assert [row["score"] for row in answer["predictions"]] == [each["score"] for each in alone] * 10
    assert [row["warned"] for row in answer["predictions"]] == [each["warned"] for each in alone] * 10
    assert answer["model"] == FIRST
    assert service.client.post("/predict/batch", json={"rows": []}).json()["predictions"] == []


def test_whoever_wants_to_know_why_gets_reasons(service: Running, record: dict[str, Any]) -> None:
    def ask(query: str) -> list[dict[str, Any]] | None:
        return service.client.post(f"/predict?{query}", json={"record": record}).json().get("reasons")

    assert ask("") is None
    assert ask("reasons=false") is None
    assert len(ask("reasons=true") or []) == 5
    few = ask("reasons=2") or []
    assert len(few) == 2
    assert few == (ask("reasons=5") or [])[:2]
    assert all(set(each) == {"name", "values", "effect"} for each in few)


def test_each_request_has_an_id_of_its_own_or_the_one_it_brought(service: Running, record: dict[str, Any]) -> None:
    def ask(**headers: str) -> str:
        answer = service.client.post("/predict", json={"record": record}, headers=headers)
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        return answer.headers["x-request-id"]

    assert ask() != ask()
    assert ask(**{"x-request-id": "trace-7.a:b_c"}) == "trace-7.a:b_c"
    for bad in ("a b", "x" * 65, "<script>", "{}", 'a"b'):
        assert re.fullmatch(r"[0-9a-f]{24}", ask(**{"x-request-id": bad})), bad


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (lambda record: record.pop("carrier"), "record.carrier", "missing required field `carrier`"),
        (lambda record: record.update(colour="red"), "record.colour", "unknown field `colour`"),
        (lambda record: record.update(distance="far"), "record.distance", "got `str`"),
        (lambda record: record.update(distance=[1]), "record.distance", "got `array`"),
        (lambda record: record.update(distance=True), "record.distance", "got `bool`"),
        (lambda record: record.update(carrier=7), "record.carrier", "got `int`"),
        (lambda record: record.update(distance=1e300), "record.distance", "1e+300"),
    ],
)
def test_a_wrong_field_is_named(service: Running, record: dict[str, Any], change: Any, field: str, words: str) -> None:
    spoilt = dict(record)
    change(spoilt)
    found = problem(service.ask(record=spoilt), 422)
    assert (found["field"], "row" in found) == (field, False)
    assert words in found["detail"]
    assert found["remedy"]
    rows = {"rows": [{"record": record}, {"record": spoilt}]}
    found = problem(service.client.post("/predict/batch", json=rows), 422)
    assert (found["field"], found["row"]) == (f"rows[1].{field}", 1)


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"flight": "many"}, 422, "key.flight"),
        ({"flight": None}, 422, "key.flight"),
        ({"flight": 1.5}, 422, "key[...]"),
        ({"time_hour": "yesterday"}, 422, "key.time_hour"),
        ({"time_hour": "2013-02-01T10:00:00"}, 422, "key.time_hour"),
        ({"colour": "red"}, 422, "key.colour"),
        ({"carrier": "x" * 101}, 422, "key[...]"),
        ({"flight": 2**60}, 422, "key[...]"),
        ({"flight": 9999}, 404, "key"),
    ],
)
def test_a_wrong_key_is_named(
    service: Running, key: dict[str, Any], change: dict[str, Any], status: int, field: str
) -> None:  # fmt: skip
    assert problem(service.ask(key={**key, **change}), status)["field"] == field


def test_a_question_without_a_question_is_refused(service: Running) -> None:
    assert problem(service.ask(), 422)["field"] == "record"
    assert problem(service.ask(record=None), 422)["field"] == "record"
    assert problem(service.ask(key=None), 422)["field"] == "key"
    assert problem(service.client.post("/predict/batch", json={"rows": [{}]}), 422)["field"] == "rows[0].record"
    assert problem(service.client.post("/predict/batch", json={}), 422)["field"] == "rows"


@pytest.mark.parametrize("query", ["reasons=21", "reasons=-1", "reasons=", "reasons=many", "reasons=" + "9" * 5000])
def test_a_wrong_number_of_reasons_is_refused(service: Running, record: dict[str, Any], query: str) -> None:
    assert problem(service.client.post(f"/predict?{query}", json={"record": record}), 422)["field"] == "query reasons"


def test_a_name_that_is_given_twice_is_refused(service: Running, record: dict[str, Any], key: dict[str, Any]) -> None:
    def post(body: str, path: str = "/predict") -> httpx.Response:
        return service.client.post(path, content=body, headers={"content-type": "application/json"})

    good = json.dumps({"record": record, "key": key})
    assert post(good).status_code == 200
    assert post(good.replace(": ", ":")).status_code == 200
    for body in (
        good.replace('"distance":', '"distance": 1, "distance":'),
        good.replace('"record":', '"key": {}, "record":'),
        good.replace('"flight":', '"flight": 1, "flight":'),
        json.dumps({"key": key}).replace('"flight":', '"fl\\u0069ght": 1, "flight":'),
    ):
        assert "given twice" in problem(post(body), 422)["detail"]
        assert "given twice" in problem(post(f'{{"rows": [{good}, {body}]}}', "/predict/batch"), 422)["detail"]


def test_other_paths_and_methods_are_refused_in_the_same_form(service: Running) -> None:
    problem(service.client.get("/nothing"), 404)
    found = service.client.get("/predict")
    problem(found, 405)
    assert found.headers["allow"] == "POST"
    problem(service.client.delete("/model"), 405)
    assert problem(service.client.get("/examples?count=1000"), 422)["field"] == "query count"


# ---------------------------------------------------------------- what it says about itself


def test_it_knows_its_model(service: Running) -> None:
    found = service.client.get("/model").json()
    assert found["reference"] == FIRST
    assert found["data"] == {"features": "flight-delay/features@1"}
    assert found["threshold"] == pytest.approx(40 / 150)
    assert found["fingerprint"]["commit"]
    assert found["card"].startswith(f"# Model card: {FIRST}")
    assert {each["name"] for each in found["features"]} >= {"carrier", "distance"}


def test_ready_says_that_nobody_can_ask_by_key(home: Path) -> None:
    (home / "serving" / "flight-delay" / "features.db").unlink()
    with serving(home) as running:
        (warning,) = running.client.get("/health/ready").json()["warnings"]
        assert warning.startswith("requests by key are refused: there is no online feature table"), warning


def test_it_lives_and_is_ready_and_counts(service: Running, record: dict[str, Any]) -> None:
    assert service.client.get("/health/live").json() == {"status": "alive"}
    assert service.client.get("/health/ready").json() == {"status": "ready", "model": FIRST, "warnings": []}

    def count(pattern: str) -> float:
        found = re.search(rf"^{pattern} ([\d.e+]+)$", service.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    answers = r'serving_requests_total\{method="POST",path="/predict",status="200"\}'
    scored = rf'serving_scores_count\{{model="{FIRST}",role="live"\}}'
    before = count(answers), count(scored)
    for _ in range(3):
        service.ask(record=record)
    service.client.post("/predict/batch", json={"rows": [{"record": record}] * 4})
    assert (count(answers) - before[0], count(scored) - before[1]) == (3, 7)
    service.client.get("/a/stranger's/path")
    assert "stranger" not in service.client.get("/metrics").text


def test_it_describes_itself_for_its_own_model(service: Running, record: dict[str, Any]) -> None:
    found = service.client.get("/openapi.json").json()
    schema = found["components"]["schemas"]
    assert set(schema["Record"]["properties"]) == set(record)
    example = schema["Record"]["example"]
    assert service.ask(record=example).status_code == 200
    assert service.ask(key=schema["Key"]["example"]).status_code == 200
    assert {"/predict", "/predict/batch", "/model", "/health/live", "/health/ready", "/metrics"} <= set(found["paths"])


# ---------------------------------------------------------------- other models


@pytest.mark.slow
def test_without_a_model_it_lives_but_is_not_ready_and_it_takes_the_first_one(
    home: Path, record: dict[str, Any], key: dict[str, Any]
) -> None:  # fmt: skip
    (home / "serving" / "flight-delay" / "live.json").unlink()
    (home / "serving" / "flight-delay" / "features.db").rename(home / "features.db")
    with serving(home, ready=False) as running:
        assert running.client.get("/health/live").status_code == 200
        assert "no model has been published" in problem(running.client.get("/health/ready"), 503)["detail"]
        refused = running.ask(record=record)
        problem(refused, 503)
        assert int(refused.headers["retry-after"]) > 0
        problem(running.client.get("/model"), 503)
        assert running.client.get("/openapi.json").status_code == 200
        publish(running.settings, FIRST)
        running.wait_ready()
        assert running.ask(record=record).json()["model"] == FIRST
        assert "online feature table" in problem(running.ask(key=key), 503)["detail"]
        assert problem(running.ask(record=record, key={"flight": 1.5}), 422)["field"] == "key[...]"
        (home / "features.db").rename(home / "serving" / "flight-delay" / "features.db")
        until(lambda: running.ask(key=key).status_code == 200)
        (home / "serving" / "flight-delay" / "live.json").unlink()
        until(lambda: bool(running.client.get("/health/ready").json()["warnings"]))
        assert running.ask(record=record).json()["model"] == FIRST, "what is loaded stays"


def test_a_new_model_takes_over_and_a_broken_one_does_not(home: Path, record: dict[str, Any]) -> None:
    with serving(home) as running:
        publish(running.settings, SECOND)
        until(lambda: running.ask(record=record).json()["model"] == SECOND)
        content = (home / "serving" / "flight-delay" / "live.json").read_bytes()
        publish(running.settings, FIRST)
        until(lambda: running.ask(record=record).json()["model"] == FIRST)
        graph = home / "serving" / "bundles" / SECOND / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1])
        (home / "serving" / "flight-delay" / "live.json").write_bytes(content)
        until(lambda: bool(running.client.get("/health/ready").json()["warnings"]))
        assert "damaged" in running.client.get("/health/ready").json()["warnings"][0]
        assert running.ask(record=record).json()["model"] == FIRST
        assert "serving_model_refused_total 1.0" in running.client.get("/metrics").text
        assert "damaged" in running.errors()


class Silent(Predictor):
    """A model that answers with no number."""

    def __init__(self, real: Predictor) -> None:
        self.__dict__.update(real.__dict__)

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(matrix)) == 0, np.nan, 0.5)


class Fixed(Models):
    """A choice that stays."""

    ready = True

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.seen: list[tuple[str, bool]] = []

    def live(self) -> Choice:
        return self.choice

    def choose(self, sticky: str | None) -> Choice:
        return self.choice

    def observe(self, choice: Choice, seconds: float, scores: Any, ok: bool, records: Any, asked: Asked) -> None:
        self.seen.append((choice.role, ok))


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_a_score_that_is_no_number_is_a_failure_of_the_model(
    home: Path, record: dict[str, Any], path: str
) -> None:  # fmt: skip
    real = load_predictor(home / "serving" / "bundles" / FIRST)
    body = {"record": record} if path == "/predict" else {"rows": [{"record": record}] * 20}
    for fallback, status, seen in (
        (None, 503, [("candidate", False)]),
        (Choice(real, "stable"), 200, [("candidate", False), ("stable", True)]),
    ):
        models = Fixed(Choice(Silent(real), "candidate", fallback=fallback))
        client = TestClient(create_app(Settings(home=home), models=models), raise_server_exceptions=False)
        answer = client.post(path, json=body)
        assert (answer.status_code, models.seen) == (status, seen), answer.text
        assert "null" not in answer.text


def test_a_model_that_cannot_answer_is_not_published(home: Path) -> None:
    folder = home / "serving" / "bundles" / SECOND
    broken = onnx.load_model(folder / "model.onnx")
    broken.graph.node[0].domain = "else.where"
    rewrite(folder, "model.onnx", broken.SerializeToString())
    live = (home / "serving" / "flight-delay" / "live.json").read_bytes()
    with pytest.raises(BundleError, match="operations are"):
        publish(Settings(home=home), SECOND)
    assert (home / "serving" / "flight-delay" / "live.json").read_bytes() == live


def test_a_model_that_answers_otherwise_than_it_should_does_not_take_over(home: Path) -> None:
    models = LiveModels(Settings(home=home), patience=0)
    models.refresh()
    before = models.live().predictor.reference
    folder = publish(Settings(home=home), SECOND)
    features = json.loads((folder / "bundle.json").read_bytes())["features"]
    next(known for feature in features if (known := feature.get("categories"))).reverse()
    reseal(folder, features=features)
    live = home / "serving" / "flight-delay" / "live.json"
    digest = hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()
    live.write_text(json.dumps({"bundle": SECOND, "manifest": digest}))
    models.refresh()
    assert (models.live().predictor.reference, "golden rows otherwise" in models.problem) == (before, True)


def test_whatever_a_new_model_raises_is_counted_and_tried_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = LiveModels(Settings(home=home), patience=0)
    with monkeypatch.context() as patch:
        patch.setattr(models_module, "load_predictor", lambda _, **__: (_ for _ in ()).throw(MemoryError("too large")))
        models.refresh()
        models.refresh()
    assert (models.failures, models.ready, "too large" in models.problem) == (2, False, True)
    models.refresh()
    assert (models.ready, models.problem) == (True, "")


def test_a_models_failures_are_shown_before_it_fails(home: Path) -> None:
    with TestClient(create_app(Settings(home=home))) as client:
        text = client.get("/metrics").text
    assert f'serving_model_failures_total{{model="{FIRST}",role="live"}} 0.0' in text


def test_so_are_those_of_both_versions_of_a_release(home: Path) -> None:
    settings, metrics = Settings(home=home), Metrics()
    create_release(settings, "canary", FIRST, SECOND, (0.5,))
    models = ReleaseModels(settings)
    models.start(None, metrics)
    models.refresh()
    models.leader.resign()
    for reference, role in ((FIRST, "stable"), (SECOND, "candidate")):
        labels = {"model": reference, "role": role}
        assert metrics.registry.get_sample_value("serving_model_failures_total", labels) == 0


def test_the_score_is_the_same_whoever_asks(service: Running, examples: list[dict[str, Any]]) -> None:
    table = open_feature_table(service.settings)
    predictor = load_predictor(live_bundle(service.settings) or "")
    records = table.get([table.key(each["key"]) for each in examples], predictor.features)
    expected = predictor.scores(predictor.encode([each for each in records if each is not None]))
    rows = {"rows": [{"key": each["key"]} for each in examples]}
    found = [row["score"] for row in service.client.post("/predict/batch", json=rows).json()["predictions"]]
    np.testing.assert_array_equal(found, expected)
