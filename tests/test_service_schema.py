"""What the service says about itself holds for whatever is sent: requests made from its own description, and spoilt."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from service_helpers import Running, serving

from mlops_course.environment import Settings
from mlops_course.security.keys import KEY_ROLES, OPEN_ROUTES, create_key

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "negative_data_rejection", "unsupported_method",
)  # fmt: skip
# What is too long is refused as well, with 413, which the tool alone would not expect.
REFUSED = "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 403, 404, 405, 413, 415, 422]\n"


@pytest.mark.slow
def test_whatever_is_sent_the_answer_is_as_described(service: Running, tmp_path: Path, thorough: bool) -> None:
    (tmp_path / "schemathesis.toml").write_text(REFUSED)
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{service.url}/openapi.json"]
    examples = ["--max-examples", "200" if thorough else "15", "--seed", "2013", "--no-color"]
    checks = ["--checks", ",".join(CHECKS), *examples]
    done = subprocess.run([*command, *checks], capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    text = service.client.get("/metrics").text
    assert 'status="500"' not in text
    for status in ("200", "400", "422"):
        assert f'path="/predict",status="{status}"' in text, "it has tried what is right and what is wrong"


def fuzzing(url: str, description: Path, key: str) -> "subprocess.Popen[str]":
    """Begin to send what a description allows and what it doesn't, with a key or without."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", description, "--url", url, "--no-color"]
    command += ["--checks", ",".join(CHECKS[:5]), "--phases", "examples,fuzzing", "--max-examples", "2", "--seed", "1"]
    headers = ["--header", f"Authorization: Bearer {key}"] if key else []
    return subprocess.Popen([*command, *headers], stdout=subprocess.PIPE, text=True, cwd=description.parent)


@pytest.mark.slow
def test_with_keys_on_the_answer_is_as_described_whatever_key_is_sent(home: Path, tmp_path: Path) -> None:
    keys = {role: create_key(Settings(home=home), role, role, rate=1e6).text for role in KEY_ROLES}
    wrong = keys["predict"][:-1] + "AB"[keys["predict"][-1] == "A"]
    with serving(home, "--limit", "rate=1e6") as running:
        running.client.headers["authorization"] = f"Bearer {keys['admin']}"
        description = tmp_path / "openapi.json"
        description.write_bytes(running.client.get("/openapi.json").content)
        (tmp_path / "schemathesis.toml").write_text(REFUSED)
        sending = [fuzzing(running.url, description, key) for key in (keys["predict"], wrong, "")]
        for each in sending:
            said, _ = each.communicate(timeout=300)
            assert each.returncode == 0, said[-6000:]
        text = running.client.get("/metrics").text
    assert 'status="500"' not in text
    heard = set(re.findall(r'path="([^"]*)",status="(\d+)"', text))
    assert {("/predict", "401"), ("/v2", "401"), ("/metrics", "403")} <= heard
    assert {("/predict", "200"), ("/predict", "400"), ("/predict", "422")} & heard, "the right key is let in"


def test_the_description_is_valid(service: Running) -> None:
    from jsonschema import Draft202012Validator

    found = service.client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    references = {part.split('"')[0] for part in json.dumps(found).split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    operations = [each for path in found["paths"].values() for each in path.values()]
    assert all(each["summary"] and each["responses"] for each in operations)


def test_with_keys_the_description_says_which_routes_ask_for_one(home: Path) -> None:
    key = create_key(Settings(home=home), "tester", "admin")
    with serving(home) as running:
        running.client.headers["authorization"] = f"Bearer {key.text}"
        found = running.client.get("/openapi.json").json()
    assert found["components"]["securitySchemes"]["key"] == {
        "type": "http", "scheme": "bearer", "description": "A key, from whoever runs the service."
    }  # fmt: skip
    guarded = set()
    for path, operations in found["paths"].items():
        for method, about in operations.items():
            asks = about.get("security") == [{"key": []}]
            assert asks == ({"401", "403"} <= set(about["responses"])) == ((method.upper(), path) not in OPEN_ROUTES)
            guarded |= {(method.upper(), path)} if asks else set()
    assert guarded <= set().union(*KEY_ROLES.values()) and ("POST", "/predict") in guarded


def test_without_keys_the_description_asks_for_none(service: Running) -> None:
    found = service.client.get("/openapi.json").json()
    assert "securitySchemes" not in found["components"] and "401" not in found["paths"]["/predict"]["post"]["responses"]
