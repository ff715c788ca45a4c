"""Traces: a real collector gets a span of each answered request, and nothing of what was asked."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service_helpers import FIRST, serving, until

from mlops_course.serving.tracing import TracingError, tracing_layers

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Takes traces as an OpenTelemetry collector does: OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.spans: list[dict[str, Any]] = []
        self.services: set[str] = set()
        self.raw = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Taking(BaseHTTPRequestHandler):
    """One delivery."""

    server: Collector

    def do_POST(self) -> None:
        from gzip import decompress

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        body = decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        assert self.path == "/v1/traces"
        self.server.raw += body
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {one.key: one.value.string_value for one in each.resource.attributes}
            self.server.services.add(named["service.name"])
            self.server.spans += [self.read(span) for scope in each.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def read(self, span: Any) -> dict[str, Any]:
        values = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
        ids = {"trace": span.trace_id.hex(), "span": span.span_id.hex(), "parent": span.parent_span_id.hex()}
        return {"name": span.name, "failed": span.status.code == 2, **ids, **values}

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_collector_gets_a_span_of_each_request_and_the_log_its_ids(
    home: Path, collector: Collector, workers: str
) -> None:
    with serving(home, "--json", "--access-log", "--workers", workers, "--trace-to", collector.url) as running:
        example = running.client.get("/examples").json()[0]
        header = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-17"}
        assert running.client.post("/predict?reasons=2", json=example, headers=header).status_code == 200
        assert running.client.post("/predict", json={"key": {"flight": -1}}).status_code in (404, 422)
        running.client.get("/metrics")
        running.stop()  # what waits is sent before it ends
        time.sleep(0.2)
        lines = [json.loads(line) for line in running.errors().splitlines()]
    asked = [span for span in collector.spans if span["name"] == "POST /predict"]
    assert len(asked) == 2
    ours = next(span for span in asked if span["trace"] == TRACE)
    assert (ours["parent"], ours["failed"]) == (PARENT, False)
    wanted = {"http.route": "/predict", "http.response.status_code": 200, "mlops_course.model": FIRST}
    assert wanted.items() <= ours.items()
    refused = next(span for span in asked if span is not ours)
    assert refused["trace"] != TRACE and refused["parent"] == ""
    assert refused["mlops_course.refusal"] in ("not_found", "invalid")
    assert not [span for span in collector.spans if "metrics" in span["name"] or "health" in span["name"]]
    assert collector.services == {"mlops-course"}
    line = next(line for line in lines if line.get("request_id") == "r-17")
    assert (line["trace_id"], line["span_id"]) == (TRACE, ours["span"])
    for secret in (b"reasons", b"127.0.0.1", str(example["key"]["flight"]).encode()):
        assert secret not in collector.raw


def test_a_collector_that_is_gone_costs_spans_and_no_answer(home: Path) -> None:
    with serving(home, "--trace-to", "http://127.0.0.1:9") as running:
        record = running.client.get("/examples").json()[0]["record"]
        for _ in range(20):
            assert running.ask(record=record).status_code == 200
        assert running.stop(30) == 0


def test_what_is_refused_at_the_door_leaves_no_span(home: Path, collector: Collector) -> None:
    with serving(home, "--limit", "body=10", "--trace-to", collector.url) as running:
        for _ in range(5):
            assert running.ask(key={"flight": 1}).status_code == 413
        assert running.client.get("/model").status_code == 200
        until(lambda: bool(collector.spans))
        running.stop()
    assert {span["name"] for span in collector.spans} == {"GET /model"}


def test_a_variable_of_opentelemetry_is_enough_and_without_one_nothing_is_loaded(monkeypatch: Any) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing_layers(None) == ()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing_layers(None) == ("mlops_course.serving.tracing:trace_requests",)
    code = "import sys, mlops_course.serving.server, mlops_course.serving.app, mlops_course.serving.tracing as t\n"
    code += "print(t.tracing_layers(None), end=' ')\n"
    code += "print([each for each in sys.modules if each.startswith(('opentelemetry.sdk', 'opentelemetry.exp'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""})
    assert done.stdout.strip() == "() []", done.stderr


def test_without_the_packages_it_is_said_which_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("mlops_course.serving.tracing.find_spec", lambda name: None)
    with pytest.raises(TracingError, match=r"pip install 'mlops_course\[tracing\]'"):
        tracing_layers("http://localhost:4318")
