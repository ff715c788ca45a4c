"""What hostile, slow, loud and broken clients get: a cheap refusal, and the next client an answer."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from service_helpers import Running, read_answer, serving

from mlops_course.environment import CourseError
from mlops_course.serving.limits import Guard, Limits, RateLimiter, read_limits
from mlops_course.serving.messages import check_objects
from mlops_course.serving.problems import HTTPProblem, respond
from mlops_course.serving.server import Connection, watch_connections

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JSON_TYPE = b"content-type: application/json\r\n"


def post(body: bytes, path: str = "/predict", headers: bytes = JSON_TYPE, length: int | None = None) -> bytes:
    """A request as bytes."""
    announced = b"content-length: %d\r\n" % (len(body) if length is None else length)
    return b"POST %s HTTP/1.1\r\nhost: x\r\n%s%s\r\n%s" % (path.encode(), announced, headers, body)


def chunked(*parts: bytes) -> bytes:
    """A request whose body has no announced length."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n" + JSON_TYPE + b"\r\n" + body


@pytest.fixture(autouse=True)
def still_there(service: Running) -> Any:
    """Whatever was sent, the next client gets an answer, and no answer was a mistake of the program."""
    yield
    assert service.client.get("/health/ready").status_code == 200
    assert 'status="500"' not in service.client.get("/metrics").text


# ---------------------------------------------------------------- bodies


HOSTILE: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"hello", 400),
    "half of it": (b'{"record": {"carrier":', 400),
    "too much of it": (b'{"key": {}} {}', 400),
    "NaN": (b'{"record": {"distance": NaN}}', 400),
    "Infinity": (b'{"record": {"distance": -Infinity}}', 400),
    "a number without an end": (b'{"record": {"distance": ' + b"9" * 100_000 + b"}}", 422),
    "a number that is too large": (b'{"key": {"flight": 1e999}}', 422),
    "a whole number that is too large": (b'{"key": {"flight": ' + b"1" * 5000 + b"}}", 422),
    "deep arrays": (b"[" * 100_000, 422),
    "deep arrays in a record": (b'{"record": ' + b"[" * 100_000 + b"]" * 10 + b"}", 400),
    "deep objects": (b'{"record": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}", 400),
    "deep values": (b'{"key": {"flight": ' + b"[" * 100_000 + b"}}", 422),
    "no UTF-8": (b'{"key": {"carrier": "\xff\xfe"}}', 400),
    "no UTF-8 in a name": (b'{"key": {"\xff": 1}}', 400),
    "half a character": (b'{"key": {"carrier": "\\ud800"}}', 400),
    "UTF-16": ('{"key": {}}'.encode("utf-16"), 400),
    "a mark at the beginning": (b"\xef\xbb\xbf{}", 400),
    "a zero byte": (b'{"key": \x00}', 400),
    "an array": (b"[1, 2]", 422),
    "null": (b"null", 422),
    "text": (b'"record"', 422),
    "many names": (b'{"key": {' + b",".join(b'"n%d": 1' % each for each in range(5000)) + b"}}", 422),
    "a name of great length": (b'{"key": {"' + b"n" * 100_000 + b'": 1}}', 422),
    "the same name again and again": (b'{"key": {' + b",".join([b'"flight": 1'] * 9000) + b"}}", 422),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused(service: Running, name: str) -> None:
    body, expected = HOSTILE[name]
    for path, content in (("/predict", body), ("/predict/batch", b'{"rows": [' + (body or b" ,") + b"]}")):
        status, data = service.raw(post(content, path))
        found = json.loads(data.partition(b"\r\n\r\n")[2])
        assert status in ({expected} if path == "/predict" else {400, 413, 422}), data[:500]
        assert found["status"] == status
        assert len(data) < 2000, "a refusal doesn't send back what it was sent"


def test_what_is_announced_too_large_is_refused_before_it_is_sent(service: Running) -> None:
    status, data = service.raw(post(b"", length=1_000_000_000))
    assert (status, b"1000000000 bytes" in data) == (413, True)


def test_what_grows_too_large_is_refused_while_it_grows(service: Running) -> None:
    status, _ = service.raw(chunked(*[b" " * 10_000] * 100))
    assert status == 413
    status, _ = service.raw(post(b"", length=1_000_000) + b" " * 1_000_000)
    assert status == 413, "the client that goes on sending can read the answer"


def test_a_stream_that_goes_on_after_it_was_refused_is_cut(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(post(b"", length=10**12))
        end, sent = time.monotonic() + 15, 0
        with pytest.raises(OSError):
            while time.monotonic() < end:
                sent += connection.send(b" " * 65536)
                time.sleep(0.01)


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"99999999999999999999999", b"", b"5, 5"])
def test_a_nonsensical_length_is_refused(service: Running, length: bytes) -> None:
    request = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n" + JSON_TYPE + b"\r\n{}"
    assert service.raw(request)[0] in (400, 413, 422)


def test_too_many_rows_are_refused(service: Running) -> None:
    answer = service.client.post("/predict/batch", json={"rows": [{"key": {}}] * 51})
    assert (answer.status_code, answer.json()["field"]) == (413, "rows")


def test_too_many_rows_are_refused_before_they_are_read(service: Running) -> None:
    hundred = b"[" + b",".join([b'{"a":{}}'] * 5000) + b"]"
    status, data = service.raw(post(b'{"rows": ' + hundred + b", and this isn't JSON", "/predict/batch"))
    assert (status, b'"rows"' in data) == (413, True)
    text = json.dumps({"rows": [{"key": {"carrier": "{" * 90}}] * 40}).encode()
    check_objects(text, 40)  # braces in texts are no objects
    assert service.raw(post(text, "/predict/batch"))[0] in (404, 422)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"content-type: text/plain\r\n", 415),
        (b"content-type: application/x-www-form-urlencoded\r\n", 415),
        (b"content-type: application/json; charset=utf-16\r\n", 415),
        (b"content-type: application/jsonp\r\n", 415),
        (JSON_TYPE + b"content-encoding: gzip\r\n", 415),
        (b"content-type: application/json; charset=UTF-8\r\n", 422),
        (b"Content-Type: APPLICATION/JSON\r\n", 422),
    ],
)
def test_a_body_that_is_no_json_by_its_headers_is_refused(service: Running, headers: bytes, status: int) -> None:
    assert service.raw(post(b"{}", headers=headers))[0] == status


# ---------------------------------------------------------------- connections


def test_headers_without_an_end_are_refused(service: Running) -> None:
    status, _ = service.raw(b"GET / HTTP/1.1\r\nhost: x\r\n", *[b"x-more: " + b"y" * 5000 + b"\r\n"] * 20)
    assert status == 431


TRAILERS = {"many": b"x-more: " + b"y" * 5000 + b"\r\n", "one": b"y" * 5000}


@pytest.mark.parametrize("kind", TRAILERS)
def test_headers_after_the_body_have_the_limit_of_those_before_it(service: Running, kind: str) -> None:
    request = chunked(b"{}") + b"0\r\n" + (b"x-more: " if kind == "one" else b"")
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(request)
        sent = 0
        with suppress(OSError):
            while sent < 20_000_000:
                sent += connection.send(TRAILERS[kind])
        assert sent < 20_000_000
    assert service.raw(request, *[TRAILERS[kind]] * 20)[0] == 431


def test_a_chunk_whose_length_has_no_end_is_refused(service: Running) -> None:
    assert service.raw(chunked(b"{}") + b"5;a=", *[b"y" * 5000] * 20)[0] == 431


def test_a_header_after_the_body_says_nothing(service: Running) -> None:
    status, data = service.raw(chunked(b"{}") + b"0\r\nx-request-id: mine\r\ncontent-type: text/plain\r\n\r\n")
    assert (status, b"mine" in data) == (422, False)


def test_a_mistake_with_one_connection_does_not_end_the_watch() -> None:
    later: list[Callable[[], None]] = []

    class Broken(Connection):
        def __init__(self) -> None:
            self.loop: Any = SimpleNamespace(call_later=lambda _, look: later.append(look))
            self.server_state, self.connections = SimpleNamespace(), {self}  # and no limits to look at

    watch_connections(Broken())
    later.pop()()
    assert len(later) == 1, "it looks again a second later"


def test_an_address_without_an_end_is_refused(service: Running) -> None:
    status, _ = service.raw(b"GET /", *[b"a" * 10_000] * 8)
    assert status in (414, 431)


JUNK = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELO me\r\n\r\n", b"\x00" * 100, b"GET\r\n\r\n"]


@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_http_is_refused(service: Running, junk: bytes) -> None:
    status, data = service.raw(junk)
    assert status == 400
    assert json.loads(data.partition(b"\r\n\r\n")[2])["title"] == "Bad Request"


STRANGE = [b"/%ff", b"/\xff", b"/../../etc/passwd", b"//predict", b"/%00", b"http://[::1/", b"*"]


@pytest.mark.parametrize("path", STRANGE)
def test_a_strange_address_is_refused(service: Running, path: bytes) -> None:
    assert service.raw(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")[0] in (400, 404)


def test_a_body_that_comes_too_slowly_is_given_up(service: Running) -> None:
    begin = time.monotonic()
    status, data = service.raw(post(b'{"key', length=100), *[b" "] * 40, pause=0.1)
    assert (status, b"not complete after 2 seconds" in data) == (408, True)
    assert time.monotonic() - begin < 10


def test_headers_that_come_too_slowly_are_given_up(service: Running) -> None:
    status, _ = service.raw(b"POST /predict HTTP/1.1\r\n", *[b"x: y\r\n"] * 60, pause=0.1)
    assert status == 408


def test_a_connection_that_says_nothing_is_closed(service: Running) -> None:
    assert service.raw(seconds=15) == (0, b"")


def test_slow_ones_do_not_hold_up_the_others(service: Running) -> None:
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(200)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(post(b'{"key', length=100) if number % 2 else b"POST /predict HT")
        begin = time.monotonic()
        assert service.ask().status_code == 422
        assert time.monotonic() - begin < 5
    finally:
        for connection in slow:
            connection.close()


def test_whoever_leaves_in_the_middle_is_forgotten(service: Running) -> None:
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(post(b'{"key', length=100))
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(post(b'{"key": {}}'))


def test_several_requests_in_one_go_are_answered_in_order(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(post(b"{}") + post(b"no") + b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        data = b""
        while data.count(b"HTTP/1.1 ") < 3 or b"alive" not in data:
            data += connection.recv(65536)
    assert data.index(b"HTTP/1.1 422") < data.index(b"HTTP/1.1 400") < data.index(b"HTTP/1.1 200")


# ---------------------------------------------------------------- how often, how many at once


def test_more_than_the_rate_is_refused_and_health_is_not(home: Path) -> None:
    with serving(home, "--limit", "rate=1", "--limit", "burst=3") as running:
        statuses = [running.ask().status_code for _ in range(5)]
        assert statuses == [422, 422, 422, 429, 429]
        refused = running.ask()
        assert int(refused.headers["retry-after"]) >= 1
        assert "batch" in refused.json()["remedy"]
        assert running.client.get("/health/ready").status_code == 200


class Answers:
    """An app that answers when it is told to, behind the layer, without a network."""

    def __init__(self, **limits: Any) -> None:
        self.go, self.begun = asyncio.Event(), 0
        self.guard = Guard(self, Limits(**limits))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        await self.go.wait()
        await respond(send, 200, b"{}")

    async def ask(self, *parts: bytes | None, path: str = "/", headers: list[Any] | None = None) -> int:
        waiting = iter([*parts, b""])
        sent: list[Any] = []

        async def receive() -> Any:
            part = next(waiting)
            if part is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": part, "more_body": part != b""}

        async def send(message: Any) -> None:
            sent.append(message)

        announced = [(b"transfer-encoding", b"chunked")] if parts else []
        scope = {"type": "http", "method": "POST", "path": path, "headers": [*announced, *(headers or [])]}
        await self.guard(scope, receive, send)
        return int(sent[0]["status"])


def test_more_requests_than_may_run_are_refused_but_not_health() -> None:
    async def try_it() -> list[int]:
        app = Answers(running=3)
        running = [asyncio.create_task(app.ask()) for _ in range(3)]
        await asyncio.sleep(0)
        statuses = [await app.ask(), await app.ask()]
        health = asyncio.create_task(app.ask(path="/health/live"))
        await asyncio.sleep(0)
        app.go.set()
        return [*statuses, await health, *await asyncio.gather(*running), await app.ask()]

    assert asyncio.run(try_it()) == [503, 503, 200, 200, 200, 200, 200]


def test_what_takes_too_long_is_ended_and_makes_room() -> None:
    async def try_it() -> list[int]:
        app = Answers(running=1, seconds=0.2)
        late, slow = await app.ask(), await app.ask(b"ab", None)
        app.go.set()
        return [late, slow, await app.ask(), app.guard.running, app.guard.held, len(app.guard.under_way)]

    assert asyncio.run(try_it()) == [503, 408, 200, 0, 0, 0]


def test_bodies_that_wait_share_a_limited_memory() -> None:
    async def try_it() -> list[int]:
        app = Answers(body=1000, waiting=1500)
        waiting = asyncio.create_task(app.ask(b"x" * 900, None))
        await asyncio.sleep(0)
        refused = await app.ask(b"x" * 900)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        app.go.set()
        return [refused, await app.ask(b"x" * 900), app.guard.held]

    assert asyncio.run(try_it()) == [503, 200, 0]


@pytest.mark.parametrize(
    ("authorize", "status"),
    [
        (lambda scope: "ann", 200),
        (lambda scope: None, 401),
        (lambda scope: (_ for _ in ()).throw(PermissionError("only for admins")), 403),
        (lambda scope: (_ for _ in ()).throw(HTTPProblem(401, "the key has expired")), 401),
        (lambda scope: (_ for _ in ()).throw(RuntimeError("a mistake")), 500),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_hook_decides_who_may(authorize: Callable[[Any], Any], status: int, asynchronous: bool) -> None:
    async def later(scope: Any) -> Any:
        return authorize(scope)

    async def try_it() -> tuple[int, int, int]:
        app = Answers()
        app.go.set()
        app.guard.authorize = later if asynchronous else authorize
        return await app.ask(), app.begun, await app.ask(path="/health/live")

    assert asyncio.run(try_it()) == (status, int(status == 200), 200)


def test_a_mistake_in_the_app_is_a_500_in_our_form_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Answers):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            raise ZeroDivisionError("secret detail")

    assert asyncio.run(Broken().ask()) == 500
    assert "secret detail" in caplog.text


def test_tokens_come_back_at_the_rate_and_no_faster() -> None:
    buckets = RateLimiter(rate=10, burst=5)
    passed = sum(buckets.wait("ann", now / 100) == 0 for now in range(1000))  # ten seconds, a hundred a second
    assert passed in (104, 105)


def test_a_crowd_of_clients_is_not_remembered_for_ever() -> None:
    buckets = RateLimiter(rate=1, burst=1, most=100)
    for number in range(1000):
        buckets.wait(str(number), 0.0)
    assert len(buckets.levels) == 100


NONSENSE = ["lines=7", "rows", "rows=many", "rows=1.5", "rows=0", "rows=-1", "seconds=nan", "seconds=inf"]


@pytest.mark.parametrize("pair", NONSENSE)
def test_a_limit_that_makes_no_sense_is_refused(pair: str) -> None:
    with pytest.raises(CourseError, match="limit"):
        read_limits([pair])


def test_answers_are_read_whole() -> None:
    """The helper that reads answers in this file."""
    one, other = socket.socketpair()
    with one, other:
        other.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")
        assert read_answer(one) == (200, b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")
