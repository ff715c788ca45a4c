"""The Open Inference Protocol beside the service's own API: other clients can ask, and the rows go the same way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from service_helpers import FIRST, Running, serving

from mlops_course.serving.predictions import log_folder, read_segment

TRITON = Path(sys.prefix) / "tritonclient" / "bin" / "python"  # make system
NAME, _, VERSION = FIRST.partition("@")
MODEL, VERSIONED = f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/{VERSION}"
_TEXT = {"type": "string"}
TENSOR = {"name": _TEXT, "datatype": _TEXT, "shape": {"type": "array", "items": {"type": "integer"}}}
RESPONSES: dict[str, Any] = {  # what the protocol demands of each response
    "server": {
        "required": ["name", "version", "extensions"],
        "properties": {"name": {"type": "string"}, "version": {"type": "string"}, "extensions": {"type": "array"}},
    },
    "model": {
        "required": ["name", "platform", "inputs", "outputs"],
        "properties": {
            each: {"type": "array", "minItems": 1, "items": {"required": [*TENSOR], "properties": TENSOR}}
            for each in ("inputs", "outputs")
        },
    },
    "infer": {
        "required": ["model_name", "outputs"],
        "properties": {
            "id": {"type": "string"}, "model_version": {"type": "string"},
            "outputs": {"type": "array", "items": {"required": [*TENSOR, "data"], "properties": TENSOR}},
        },
    },
    "error": {"required": ["error"], "properties": {"error": {"type": "string"}}, "additionalProperties": False},
}  # fmt: skip


def told(answer: httpx.Response, kind: str, status: int = 200) -> dict[str, Any]:
    """A response that has the status and the form that are expected."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    Draft202012Validator({"type": "object", **RESPONSES[kind]}).validate(answer.json())
    return dict(answer.json())


@pytest.fixture(scope="module")
def records(service: Running) -> list[dict[str, Any]]:
    return [each["record"] for each in service.client.get("/examples?count=5").json()]


def columns(service: Running, records: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The records as tensors, of the types that the service itself names."""
    model = told(service.client.get(MODEL), "model")
    return [
        {"name": each["name"], "datatype": each["datatype"], "shape": [len(records)],
         "data": [record[each["name"]] for record in records], **changes}
        for each in model["inputs"]
    ]  # fmt: skip


def test_a_program_finds_out_what_to_send(service: Running) -> None:
    told(service.client.get("/v2"), "server")
    for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready", f"{VERSIONED}/ready"):
        assert service.client.get(path).status_code == 200
    model = told(service.client.get(MODEL), "model")
    assert model == told(service.client.get(VERSIONED), "model")
    assert [each["name"] for each in model["inputs"]] == [
        each["name"] for each in service.client.get("/model").json()["features"]
    ]


@pytest.mark.parametrize("path", [MODEL, VERSIONED])
def test_columns_get_the_scores_of_their_rows(service: Running, records: list[dict[str, Any]], path: str) -> None:
    rows = service.client.post("/predict/batch", json={"rows": [{"record": each} for each in records]}).json()
    answer = told(service.client.post(f"{path}/infer", json={"id": "42", "inputs": columns(service, records)}), "infer")
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("42", NAME, VERSION)
    found = {each["name"]: each["data"] for each in answer["outputs"]}
    assert found == {name: [each[name] for each in rows["predictions"]] for name in ("score", "warned")}


def test_a_column_may_be_a_matrix_of_one_column_and_outputs_may_be_chosen(
    service: Running, records: list[dict[str, Any]]
) -> None:
    flat = columns(service, records)
    nested = [{**each, "shape": [len(records), 1], "data": [[value] for value in each["data"]]} for each in flat]
    asked = [{"inputs": inputs, "outputs": [{"name": "score"}]} for inputs in (flat, nested)]
    first, second = (told(service.client.post(f"{MODEL}/infer", json=each), "infer")["outputs"] for each in asked)
    assert first == second
    assert [each["name"] for each in first] == ["score"]


def test_both_ways_are_written_down_counted_and_found_by_key(home: Path) -> None:
    with serving(home) as running:
        example = running.client.get("/examples").json()[0]
        types = {str: "BYTES", int: "INT64"}
        inputs = [
            {"name": f"key.{name}", "datatype": types[type(value)], "shape": [1], "data": [value]}
            for name, value in example["key"].items()
        ]
        found = told(running.client.post(f"{MODEL}/infer", json={"inputs": inputs}), "infer")
        own = running.ask(key=example["key"]).json()
        assert found["outputs"][0]["data"] == [own["score"]], "its features were looked up"
        numbers = running.client.get("/metrics").text
        assert running.stop() == 0
    logged = [each for path in log_folder(running.settings, NAME).iterdir() for each in read_segment(path)[0]]
    assert [(each.id, each.key) for each in logged] == [
        (found["id"], example["key"]), (own["request_id"], example["key"]),
    ]  # fmt: skip
    assert 'serving_requests_total{method="POST",path="/v2/models/{name}/infer",status="200"} 1.0' in numbers
    assert f'serving_predictions_total{{model="{FIRST}",role="live"' in numbers


def broken(inputs: list[dict[str, Any]]) -> dict[str, tuple[int, Any, str]]:
    """Requests that are refused: the status, the body, and words of the message."""
    text, number = (next(each for each in inputs if each["datatype"] == kind) for kind in ("BYTES", "FP64"))
    rest = [each for each in inputs if each is not number]
    few = number["data"][1:]
    return {
        "nothing": (422, {}, "inputs"),
        "no columns": (422, {"inputs": []}, "inputs"),
        "a column too few": (422, {"inputs": rest}, number["name"]),
        "a column twice": (422, {"inputs": [*inputs, number]}, "same name"),
        "a column that nobody knows": (422, {"inputs": [*inputs, {**number, "name": "colour"}]}, "colour"),
        "a shape that lies": (422, {"inputs": [*rest, {**number, "shape": [99]}]}, "50 at a time"),
        "a value too few": (422, {"inputs": [*rest, {**number, "data": few}]}, "has the shape"),
        "a row too few": (422, {"inputs": [*rest, {**number, "data": few, "shape": [len(few)]}]}, "rows"),
        "no rows": (422, {"inputs": [{**each, "shape": [0], "data": []} for each in inputs]}, "has the shape"),
        "a text as number": (422, {"inputs": [*rest, {**number, "data": ["x"] * 5}]}, "not a valid FP64"),
        "a number as text": (422, {"inputs": [*rest, {**text, "name": number["name"]}]}, number["name"]),
        "too large for its type": (422, {"inputs": [*rest, {**number, "datatype": "INT8", "data": [300] * 5}]}, "INT8"),
        "a type that nobody knows": (422, {"inputs": [*rest, {**number, "datatype": "FP128"}]}, "FP128"),
        "a truth value": (422, {"inputs": [*rest, {**number, "data": [True] * 5}]}, "bool"),
        "an output that nobody knows": (422, {"inputs": inputs, "outputs": [{"name": "mood"}]}, "mood"),
        "a field that nobody knows": (422, {"inputs": inputs, "colour": 1}, "colour"),
        "a number of 5000 digits": (400, "1" * 5000, ""),
        "no JSON": (400, "NaN", ""),
    }  # fmt: skip


def test_what_is_wrong_is_refused_in_the_protocols_form(service: Running, records: list[dict[str, Any]]) -> None:
    inputs = columns(service, records)
    for name, (status, body, words) in broken(inputs).items():
        if isinstance(body, str):  # in the place of a value
            body = json.dumps({"inputs": inputs}).replace("null", body, 1) if "null" in json.dumps(inputs) else body
        sent = body if isinstance(body, str) else json.dumps(body)
        answer = service.client.post(f"{MODEL}/infer", content=sent, headers={"content-type": "application/json"})
        assert answer.status_code in (status, 413, 422), (name, answer.text)
        assert words in told(answer, "error", answer.status_code)["error"], name


def test_other_models_and_versions_are_not_there(service: Running, records: list[dict[str, Any]]) -> None:
    body = {"inputs": columns(service, records)}
    for path in ("/v2/models/flight-price", f"{MODEL}/versions/9", f"{MODEL}/versions/x"):
        for what in ("", "/ready"):
            assert "there is no model" in told(service.client.get(f"{path}{what}"), "error", 404)["error"]
        told(service.client.post(f"{path}/infer", json=body), "error", 404)
    for path in ("/v2/", "/v2/nothing", f"{MODEL}/explain"):
        told(service.client.get(path), "error", 404)
    told(service.client.get(f"{MODEL}/infer"), "error", 405)


def test_a_name_that_is_given_twice_is_refused(service: Running, records: list[dict[str, Any]]) -> None:
    whole = json.dumps({"inputs": columns(service, records)})
    for twice in (whole.replace('"shape"', '"shape": [1], "shape"', 1), whole[:-1] + ', "inputs": []}'):
        answer = service.client.post(f"{MODEL}/infer", content=twice, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text
        told(answer, "error", 422)


def test_what_is_too_large_is_refused_in_the_protocols_form(service: Running, records: list[dict[str, Any]]) -> None:
    head = {"content-type": "application/json"}
    many = b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [' + b"1," * 60_000 + b"1]}]}"
    told(service.client.post(f"{MODEL}/infer", content=many, headers=head), "error", 413)
    told(service.client.post(f"{MODEL}/infer", content=b" " * 300_000, headers=head), "error", 413)
    rows = columns(service, records * 11)
    told(service.client.post(f"{MODEL}/infer", json={"inputs": rows}), "error", 413)
    binary = {**head, "inference-header-content-length": "20"}
    told(service.client.post(f"{MODEL}/infer", content=b"{}", headers=binary), "error", 415)


def test_a_service_without_a_model_says_so_in_the_protocols_form(tmp_path: Path) -> None:
    with serving(tmp_path, ready=False) as running:
        assert running.client.get("/v2/health/live").json() == {"live": True}
        for path in ("/v2/health/ready", MODEL, f"{MODEL}/ready"):
            assert "no model" in told(running.client.get(path), "error", 503)["error"]


def test_a_public_client_gets_the_same_scores(service: Running, records: list[dict[str, Any]]) -> None:
    if not TRITON.is_file():
        pytest.skip("tritonclient is not installed apart: make system")
    known = {name: value for each in records for name, value in each.items() if value is not None}
    whole = [
        {name: known.get(name, 0.0) if value is None else value for name, value in each.items()} for each in records
    ]
    program = [TRITON, Path(__file__).with_name("triton_program.py"), service.url.removeprefix("http://"), NAME]
    done = subprocess.run(program, input=json.dumps(whole), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = service.client.post("/predict/batch", json={"rows": [{"record": each} for each in whole]}).json()
    assert json.loads(done.stdout) == {
        "live": True, "ready": True, "model ready": True, "inputs": len(whole[0]),
        "score": [each["score"] for each in rows["predictions"]],
        "warned": [each["warned"] for each in rows["predictions"]],
        "refused": "there is no model",
    }  # fmt: skip
