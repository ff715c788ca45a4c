"""What the service says about itself holds for whatever is sent: requests made from its own description, and spoilt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from service_helpers import Running

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "negative_data_rejection", "unsupported_method",
)  # fmt: skip


@pytest.mark.slow
def test_whatever_is_sent_the_answer_is_as_described(service: Running, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{service.url}/openapi.json"]
    checks = ["--checks", ",".join(CHECKS), "--max-examples", "60", "--seed", "2013", "--no-color"]
    done = subprocess.run([*command, *checks], capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    text = service.client.get("/metrics").text
    assert 'status="500"' not in text
    for status in ("200", "400", "422"):
        assert f'path="/predict",status="{status}"' in text, "it has tried what is right and what is wrong"


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
