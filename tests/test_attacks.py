"""What one client can do to all others: it may ask without end, and take no answer, and costs little memory by it."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from service_helpers import FIRST, Running, serving, until
from uvicorn.server import ServerState

from mlops_course.serving.limits import Guard
from mlops_course.serving.messages import check_headers, check_objects, decode_batch, read_body, wanted_reasons
from mlops_course.serving.problems import HTTPProblem, Receive, Scope, Send
from mlops_course.serving.server import Connection

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

LIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
PROBLEM = b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n"
MORE = 20 * 2**20  # bytes that an attack may cost


def memory(service: Running) -> int:
    """Bytes that a service holds."""
    own = psutil.Process(service.process.pid)
    return sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))


@pytest.fixture
def record(service: Running) -> dict[str, Any]:
    """A row that the service itself proposes."""
    return dict(service.client.get("/examples").json()[0]["record"])


@contextmanager
def deaf(service: Running) -> Iterator[socket.socket]:
    """A connection whose client takes nothing."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.port))
        yield connection


def pour(connection: socket.socket, data: bytes, seconds: float) -> int:
    """Send the same again and again, as fast as it is taken; the bytes that were."""
    connection.setblocking(False)
    sent, end, rest = 0, time.monotonic() + seconds, b""
    while time.monotonic() < end:
        rest = rest or data
        try:
            taken = connection.send(rest)
            rest, sent = rest[taken:], sent + taken
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    return sent


@pytest.mark.parametrize("kind", ["answers", "refusals"])
def test_whoever_asks_without_end_and_takes_no_answer_costs_little_and_is_cut_off(service: Running, kind: str) -> None:
    assert service.client.get("/health/live").status_code == 200
    before = memory(service)
    with deaf(service) as connection:
        assert pour(connection, {"answers": LIVE, "refusals": PROBLEM}[kind] * 2000, seconds=1.5) > 100_000
        assert service.client.get("/health/live").status_code == 200
        assert memory(service) < before + MORE
        until(lambda: _is_cut_off(connection), seconds=60)  # the limit is 2 seconds, after the last answer that fits
    assert memory(service) < before + MORE


def _is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side has given up on us."""
    try:
        connection.send(b"x")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def test_the_body_of_a_request_that_waits_for_its_turn_is_not_read() -> None:
    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def attempt() -> int:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(Guard(stuck), interface="asgi3", proxy_headers=False, log_config=None)
        config.load()
        server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        begin = LIVE + b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 400000000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(begin)
            sent = await asyncio.to_thread(pour, connection, b"x" * 1_000_000, 1.5)
        server.close()
        for task in state.tasks:
            task.cancel()
        return sent

    assert asyncio.run(attempt()) < 40_000_000  # what the system's own buffers take


@pytest.mark.parametrize("asked", [LIVE, PROBLEM], ids=["answers", "refusals"])
def test_ten_thousand_requests_in_one_go_are_all_answered_in_little_memory(service: Running, asked: bytes) -> None:
    before, count = memory(service), 10_000
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.setblocking(False)
        sent, answers, tail = 0, 0, b""
        data = memoryview(asked * count)
        end = time.monotonic() + 120
        while answers < count and time.monotonic() < end:
            with suppress(BlockingIOError):
                sent += connection.send(data[sent : sent + 65_536])
            try:
                piece = tail + connection.recv(1 << 20)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            answers += piece.count(b"HTTP/1.1 ")
            tail = piece[-8:]
    assert answers == count
    assert memory(service) < before + MORE


def test_headers_that_come_in_one_piece_have_the_limit_of_those_that_come_in_many(service: Running) -> None:
    status, data = service.raw(LIVE.replace(b"host: x", b"host: x\r\nx-more: " + b"y" * 33_000))
    assert (status, b"more than 32768 bytes" in data) == (431, True)
    assert service.raw(LIVE.replace(b"/health/live", b"/health/live?" + b"y" * 33_000))[0] == 431


@pytest.mark.parametrize(
    ("request_line", "hosts", "status"),
    [
        (b"GET /health/live HTTP/1.1", b"", 400),
        (b"GET /health/live HTTP/1.1", b"host: x\r\nhost: y\r\n", 400),
        (b"GET /health/live HTTP/1.1", b"Host: x\r\nhost: x\r\n", 400),
        (b"GET /health/live HTTP/1.1", b"Host: x\r\n", 200),
        (b"GET /health/live HTTP/1.0", b"", 200),
    ],
)
def test_a_request_says_once_whom_it_is_for(service: Running, request_line: bytes, hosts: bytes, status: int) -> None:
    assert service.raw(request_line + b"\r\n" + hosts + b"\r\n")[0] == status


@pytest.mark.parametrize("bad", [b"\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"], ids=["no HTTP", "no host"])
def test_a_refusal_is_never_taken_for_the_answer_to_an_earlier_request(service: Running, bad: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(LIVE * 3 + bad + LIVE)
        data = b""
        while piece := connection.recv(65_536):
            data += piece
    assert [data.count(start) for start in (b"HTTP/1.1 ", b"HTTP/1.1 200 ", b"connection: close")] == [3, 3, 1]


# ---------------------------------------------------------------- what is read before anything is known about it


GROWING: dict[str, Callable[[int], object]] = {
    "a string that never closes": lambda size: check_objects(b'{"' * (size // 2), 1),
    "a string that ends in a backslash": lambda size: check_objects(b'{"' + b"\\" * size, 1),
    "strings that open and close": lambda size: check_objects(b'{""' * (size // 3), 1),
    "quotes that are escaped": lambda size: check_objects(b'{"' + b'\\"{' * (size // 3), 1),
    "brackets": lambda size: read_body(decode_batch, b"[" * size),
    "digits": lambda size: read_body(decode_batch, b'{"rows": ' + b"9" * size),
    "fields of a query": lambda size: wanted_reasons(b"&" * size),
    "a number in a query": lambda size: wanted_reasons(b"reasons=" + b"0" * size),
    "blanks in a header": lambda size: check_headers(
        {"headers": [(b"content-type", b"application/json" + b" " * size + b"x")]}
    ),
}


@pytest.mark.parametrize("kind", GROWING)
def test_what_is_not_understood_yet_costs_time_in_proportion_to_its_size(kind: str) -> None:
    """Sixteen times the bytes: sixteen times the seconds, where a quadratic pattern would take 256 times as many."""

    def seconds(size: int) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            with suppress(HTTPProblem):
                GROWING[kind](size)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(1_600_000) < 64 * max(seconds(100_000), 0.001)


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize("query", ["&".join("abcdefghijklmnopqrstu"), "reasons=" + "0" * 5000], ids=["fields", "zeros"])
def test_a_query_without_sense_is_refused(service: Running, path: str, query: str) -> None:
    assert service.client.post(f"{path}?{query}", json={}).status_code == 422


# ---------------------------------------------------------------- what nobody needs to know


def test_a_slash_too_many_leads_nowhere(service: Running) -> None:
    found = service.client.post("/predict/", json={}, headers={"host": "elsewhere.example"})
    assert (found.status_code, "location" in found.headers) == (404, False)


def test_callers_learn_neither_packages_nor_machine(service: Running) -> None:
    assert set(service.client.get("/model").json()["fingerprint"]) == {"commit"}


def test_callers_learn_no_folder_of_the_machine(home: Path) -> None:
    (home / "serving" / "bundles" / FIRST / "model.onnx").unlink()
    (home / "serving" / "flight-delay" / "features.db").unlink()
    with serving(home, ready=False) as running:
        key = {"carrier": "DL", "flight": 1, "origin": "JFK", "time_hour": "2013-02-01T12:00:00Z"}
        answers = [running.client.get("/health/ready"), running.ask(record={}), running.ask(key=key)]
        assert [each.status_code for each in answers] == [503] * 3
        assert "model.onnx" in answers[0].json()["detail"]
        assert not [each.text for each in answers if str(home.parent) in each.text]
        until(lambda: str(home) in running.errors())  # whoever runs it reads the whole path in the log


# ---------------------------------------------------------------- batches


def test_a_batch_says_why_as_a_single_request_does(service: Running, record: dict[str, Any]) -> None:
    asked = {"rows": [{"record": record}, {"record": record | {"carrier": "DL"}}]}
    rows = service.client.post("/predict/batch?reasons=3", json=asked).json()["predictions"]
    alone = [service.client.post("/predict?reasons=3", json=each).json()["reasons"] for each in asked["rows"]]
    assert [row["reasons"] for row in rows] == alone
    assert "reasons" not in service.client.post("/predict/batch", json=asked).json()["predictions"][0]


def test_as_many_rows_as_are_announced_fit(home: Path, record: dict[str, Any]) -> None:
    with serving(home) as running:
        body = json.dumps({"rows": [{"record": record}] * 1000}, indent=None)
        found = running.client.post("/predict/batch", content=body, headers={"content-type": "application/json"})
        assert (found.status_code, len(found.json()["predictions"])) == (200, 1000)
        body = json.dumps({"rows": [{"record": record}] * 1001})
        found = running.client.post("/predict/batch", content=body, headers={"content-type": "application/json"})
        assert (found.status_code, "1,001 rows" in found.json()["detail"]) == (413, True)
