"""Keys to the service: who has none, a wrong one or the wrong role gets nothing, and no key is ever written down."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_helpers import Running, serving, until

from mlops_course.commands.serve import locks_of
from mlops_course.environment import CourseError, Settings, load_settings
from mlops_course.ledger import as_time, read_ledger, verify_ledger
from mlops_course.security.access import (
    AccessRefusal,
    KeyRing,
    Principal,
    RefusalLog,
    ask_for_keys,
    protect,
    read_refusals,
    refusal_file,
)
from mlops_course.security.keys import (
    KEY_ROLES,
    OPEN_ROUTES,
    KeyFileError,
    KeyRecord,
    NewKey,
    create_key,
    find_key,
    hide_keys,
    key_file,
    read_duration,
    read_keys,
    revoke_key,
    rotate_key,
)
from mlops_course.serving.app import PATHS, create_app
from mlops_course.serving.forwarded import Network, client_of, read_proxies
from mlops_course.serving.limits import Limits
from mlops_course.serving.problems import SAFE_HEADERS, HTTPProblem
from mlops_course.serving.server import Access, ServeError

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
DAY = timedelta(days=1)


def bearer(key: NewKey | str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.text if isinstance(key, NewKey) else key}"}


def scope(*values: str, method: str = "POST", path: str = "/predict") -> dict[str, Any]:
    headers = [(b"authorization", value.encode()) for value in values]
    return {"method": method, "path": path, "headers": headers, "state": {"client": "203.0.113.9"}}


# ---------------------------------------------------------------- the file


def test_a_key_is_nowhere_but_in_what_is_returned(settings: Settings) -> None:
    key = create_key(settings, "desk", "predict", DAY)
    made = rotate_key(settings, key.record.id)
    revoke_key(settings, made.record.id, f"seen: {made.text}")
    for path in settings.home.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (key.text, made.text):
            assert secret.encode() not in content and secret[17:].encode() not in content, path
    assert os.name == "nt" or key_file(settings).stat().st_mode & 0o777 == 0o600


def test_the_ledger_says_who_did_what_to_which_key(settings: Settings) -> None:
    key = create_key(settings, "desk", "predict", DAY, by="ann")
    made = rotate_key(settings, key.record.id, by="bob")
    revoke_key(settings, key.record.id, "leaked", by="eve")
    revoke_key(settings, key.record.id, "leaked", by="eve")  # once is enough
    lines = [(line.event, line.subject, line.by) for line in read_ledger(settings)]
    first, second = f"key {key.record.id}", f"key {made.record.id}"
    assert lines == [("create-key", first, "ann"), ("rotate-key", second, "bob"), ("revoke-key", first, "eve")]
    assert verify_ledger(settings) == []


def test_every_shorter_longer_or_other_text_is_nobodys_key(settings: Settings) -> None:
    key = create_key(settings, "desk", "predict")
    other = create_key(settings, "else", "admin")
    keys = read_keys(settings)
    assert find_key(keys, key.text) == key.record
    wrong = [key.text[:end] for end in range(len(key.text))] + [key.text + "A", " " + key.text, key.text + "\n"]
    wrong += [key.text[:place] + "~" + key.text[place + 1 :] for place in range(len(key.text))]
    wrong += [key.text[:17] + other.text[17:], key.text.upper(), key.record.sha256, key.record.id]
    assert [text for text in wrong if find_key(keys, text) is not None] == []


def test_processes_that_make_keys_at_once_lose_none(settings: Settings) -> None:
    code = "import sys; from mlops_course.cli import main; main()"
    make = [sys.executable, "-c", code, "keys", "create", "desk", "--role", "predict", "--json"]
    started = [subprocess.Popen(make, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    made = [json.loads(each.communicate(timeout=60)[0])["key"] for each in started]
    keys = read_keys(settings)
    assert len(keys) == 3 and all(find_key(keys, text) for text in made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("{"), "isn't a file of keys"),
        (lambda path: path.write_text('{"keys": [{"id": 1}]}'), "isn't a file of keys"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "isn't a file of keys"),
        (lambda path: path.chmod(0o666), "others may write"),
    ],
)
def test_a_file_that_cannot_be_trusted_lets_nobody_in(settings: Settings, change: Any, words: str) -> None:
    key = create_key(settings, "desk", "predict")
    ring = KeyRing(settings)
    ring._next_look = 0.0
    assert ring.keys()
    change(key_file(settings))
    ring._next_look = 0.0
    with pytest.raises(HTTPProblem, match="can't read its keys") as refused:
        ask_for_keys(ring)(scope(f"Bearer {key.text}"))
    assert refused.value.status == 503 and words in ring.problem
    with pytest.raises(KeyFileError, match=words):
        create_key(settings, "desk", "predict")


def test_a_file_that_is_gone_lets_nobody_in(settings: Settings) -> None:
    key = create_key(settings, "desk", "predict")
    ring = KeyRing(settings)
    assert isinstance(ask_for_keys(ring)(scope(f"Bearer {key.text}")), Principal)
    key_file(settings).unlink()
    ring._next_look = 0.0
    with pytest.raises(AccessRefusal, match="isn't valid"):
        ask_for_keys(ring)(scope(f"Bearer {key.text}"))


def test_a_container_has_its_keys_from_a_file_of_its_own(settings: Settings, tmp_path: Path) -> None:
    mounted = load_settings(home=settings.home, keys_file=tmp_path / "secret" / "keys.json")
    with pytest.raises(KeyFileError, match="no file of keys"):
        locks_of(mounted, None)
    create_key(mounted, "desk", "predict")
    assert locks_of(mounted, None) and not key_file(settings).exists()
    assert locks_of(settings, None) == "" and locks_of(mounted, False) == ""


@pytest.mark.parametrize("text", ["", "90", "d", "1w", "-1d", "1.5h", "1d ", "10000000d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(KeyFileError, match="isn't a valid duration"):
        read_duration(text)


def test_a_successor_lives_as_long_as_the_old_one_and_overlaps_with_it(settings: Settings) -> None:
    old = create_key(settings, "desk", "predict", 90 * DAY, rate=3)
    new = rotate_key(settings, old.record.id, 2 * DAY)
    kept = read_keys(settings)

    def states(days: float) -> list[str]:
        return [each.state(as_time(datetime.now(UTC) + days * DAY)) for each in kept.values()]

    assert [states(days) for days in (0, 1.9, 2.1, 89, 91)] == [
        ["valid", "valid"], ["valid", "valid"], ["expired", "valid"], ["expired", "valid"], ["expired", "expired"]
    ]  # fmt: skip
    assert (new.record.rate, new.record.role, new.record.replaces) == (3, "predict", old.record.id)
    rotate_key(settings, new.record.id, 1000 * DAY)
    assert read_keys(settings)[new.record.id].expires == new.record.expires, "a rotation makes no key live longer"


def test_a_key_that_was_rotated_is_not_rotated_again(settings: Settings) -> None:
    old = create_key(settings, "desk", "predict", 90 * DAY)
    new = rotate_key(settings, old.record.id, 2 * DAY)
    with pytest.raises(KeyFileError, match=f"successor already: {new.record.id}"):
        rotate_key(settings, old.record.id, DAY)
    assert [*read_keys(settings)] == [old.record.id, new.record.id]


def test_a_revocation_on_record_is_in_force_and_one_that_failed_is_made_up_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create_key(settings, "desk", "predict")

    def full(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlops_course.security.keys.write_atomic", full)
        with pytest.raises(CourseError, match="no space left"):
            revoke_key(settings, key.record.id)
    assert [line.event for line in read_ledger(settings)] == ["create-key"]
    with monkeypatch.context() as patch:
        patch.setattr("mlops_course.security.keys.append_entry", full)
        with pytest.raises(OSError, match="no space left"):
            revoke_key(settings, key.record.id)
    assert read_keys(settings)[key.record.id].revoked
    revoke_key(settings, key.record.id)
    assert [line.event for line in read_ledger(settings)] == ["create-key", "revoke-key"]


# ---------------------------------------------------------------- the roles


def routes(settings: Settings) -> set[tuple[str, str]]:
    """Every method and path that the app answers."""
    app: Any = create_app(settings).app
    return {(method, route.path) for route in app.api.routes for method in route.methods or ()}


def test_every_route_has_a_role_or_is_open_and_no_role_has_more(settings: Settings) -> None:
    found = {(method, path) for method, path in routes(settings) if method != "HEAD"}
    assert {path for _, path in found} == set(PATHS)
    assert found == OPEN_ROUTES | frozenset().union(*KEY_ROLES.values())
    assert KEY_ROLES["predict"] | KEY_ROLES["operate"] == KEY_ROLES["admin"]
    assert not OPEN_ROUTES & KEY_ROLES["admin"], "what is open needs no role"


@pytest.mark.parametrize("role", [*KEY_ROLES, "of a later version"])
def test_whoever_has_a_role_may_do_what_it_says_and_nothing_else(settings: Settings, role: str) -> None:
    key = create_key(settings, "desk", role if role in KEY_ROLES else "admin")
    if role not in KEY_ROLES:
        file = key_file(settings)
        file.write_text(file.read_text().replace('"admin"', f'"{role}"'))
    authorize = ask_for_keys(KeyRing(settings))
    tricks = ["//predict", "/predict/", "/predict/../metrics", "/%70redict", "/Predict", "/metrics\x00", "", "*"]
    methods = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "CONNECT"]
    for method in methods:
        for path in [*PATHS, *tricks]:
            allowed = (method, path) in KEY_ROLES.get(role, ()) or (method, path) in OPEN_ROUTES
            try:
                authorize(scope(f"Bearer {key.text}", method=method, path=path))
            except AccessRefusal as refusal:
                assert refusal.status == 403 and not allowed, (method, path)
            else:
                assert allowed, (method, path)


# ---------------------------------------------------------------- a real service


@pytest.fixture(scope="module")
def locked(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, NewKey]]]:
    """A service that asks for keys, and a key for each role, an expired and a revoked one."""
    import shutil

    home = tmp_path_factory.mktemp("locked") / "workspace"
    shutil.copytree(published / "serving", home / "serving")
    settings = Settings(home=home)
    keys = {role: create_key(settings, role, role) for role in KEY_ROLES}
    keys["expired"] = create_key(settings, "expired", "admin", timedelta(milliseconds=1))
    keys["revoked"] = create_key(settings, "revoked", "admin")
    keys["slow"] = create_key(settings, "slow", "predict", rate=0.01)
    revoke_key(settings, keys["revoked"].record.id)
    limits = [part for limit in ("seconds=2", "body=100000", "burst=20") for part in ("--limit", limit)]
    with serving(home, *limits) as running:
        yield running, keys


def recorded(running: Running, request_id: str) -> dict[str, Any]:
    """What is on record about a request."""
    return next(line for line in read_refusals(refusal_file(running.settings)) if line["request_id"] == request_id)


def test_a_service_with_keys_answers_their_holders(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, keys = locked
    get = running.client.get
    record = get("/examples", headers=bearer(keys["predict"])).json()[0]["record"]
    for role in ("predict", "admin"):
        assert running.client.post("/predict", json={"record": record}, headers=bearer(keys[role])).status_code == 200
    assert get("/metrics", headers=bearer(keys["operate"])).status_code == 200
    for path in ("/", "/page.js", "/page.css", "/health/live", "/health/ready"):
        assert get(path).status_code == 200, "the page has the field for the key, and a supervisor has none"


@pytest.mark.parametrize(
    ("headers", "status", "why"),
    [
        (lambda keys: [], 401, "no key"),
        (lambda keys: [b"Bearer " + keys["admin"].text.encode()[:-1]], 401, "a wrong secret"),
        (lambda keys: [b"Bearer " + keys["admin"].text.encode()[:-5] + b"aaaaa"], 401, "a wrong secret"),
        (lambda keys: [b"Bearer mlc_000000000000_" + b"a" * 43], 401, "an unknown key"),
        (lambda keys: [b"Bearer \xff\xfe"], 401, "an unknown key"),
        (lambda keys: [b"Bearer"], 401, "an unknown key"),
        (lambda keys: [b"Basic " + keys["admin"].text.encode()], 401, "another scheme"),
        (lambda keys: [b"Bearer " + keys["admin"].text.encode()] * 2, 401, "2 Authorization headers"),
        (lambda keys: [b"Bearer x", b"Bearer " + keys["admin"].text.encode()], 401, "2 Authorization headers"),
        (lambda keys: [b"Bearer " + keys["expired"].text.encode()], 401, "expired since"),
        (lambda keys: [b"Bearer " + keys["revoked"].text.encode()], 401, "revoked since"),
        (lambda keys: [b"Bearer " + keys["predict"].text.encode()], 403, "not this role's"),
    ],
)
def test_who_is_refused_is_told_and_on_record_without_the_key(
    locked: tuple[Running, dict[str, NewKey]], headers: Any, status: int, why: str
) -> None:
    running, keys = locked
    sent = b"".join(b"Authorization: " + value + b"\r\n" for value in headers(keys))
    request_id = f"test-{os.urandom(6).hex()}"
    head = f"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Request-ID: {request_id}\r\n".encode()
    found, answer = running.raw(head + sent + b"\r\n")
    assert found == status
    line = recorded(running, request_id)
    assert why in str(line["why"]) and line["path"] == "/metrics" and line["status"] == status
    kept = answer.decode() + running.errors() + "".join(map(json.dumps, read_refusals(refusal_file(running.settings))))
    assert not re.search(r"mlc_[0-9a-f]{12}_[A-Za-z0-9_-]{4}", kept)
    assert not any(key.text[17:37] in kept for key in keys.values())


@pytest.mark.parametrize(
    "target",
    ["//predict", "/predict/../metrics", "/predict/%2e%2e/metrics", "/./metrics", "/metrics%00", "/metrics/",
     "/%2fmetrics", "/predict;/metrics", "/METRICS", "/predict?/metrics=1"],
)  # fmt: skip
def test_no_way_of_writing_a_path_leads_past_the_role(locked: tuple[Running, dict[str, NewKey]], target: str) -> None:
    running, keys = locked
    request_id = f"test-{os.urandom(6).hex()}"
    key = keys["predict"].text
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {request_id}\r\nAuthorization: Bearer {key}\r\n\r\n"
    status, answer = running.raw(head.encode())
    assert status == 403 and b"serving_requests" not in answer
    assert recorded(running, request_id)["key"] == keys["predict"].record.id


def test_a_path_that_is_written_with_escapes_is_the_same_path(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, keys = locked
    for who, status in (("operate", 200), ("predict", 403)):
        head = f"GET /%6detrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys[who].text}\r\n\r\n"
        assert running.raw(head.encode())[0] == status


def test_oversized_and_slow_requests_are_refused_and_on_record(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, keys = locked
    common = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys['predict'].text}\r\n"
    large, slow, stranger = (f"test-{os.urandom(6).hex()}" for _ in range(3))
    assert running.raw(f"{common}X-Request-ID: {large}\r\nContent-Length: 999999\r\n\r\n".encode())[0] == 413
    assert running.raw(f"{common}X-Request-ID: {slow}\r\nContent-Length: 9\r\n\r\n{{".encode(), pause=0)[0] == 408
    nobody = f"POST /predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: {stranger}\r\nContent-Length: 9\r\n\r\n".encode()
    assert running.raw(nobody)[0] == 401, "of a stranger no body is read"
    assert [recorded(running, each)["status"] for each in (large, slow, stranger)] == [413, 408, 401]
    assert recorded(running, slow)["key"] == keys["predict"].record.id
    before = len(list(read_refusals(refusal_file(running.settings))))
    assert running.raw(b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")[0] == 431
    assert running.raw(b"NONSENSE\r\n\r\n")[0] == 400
    lines = list(read_refusals(refusal_file(running.settings)))[before:]
    assert [line["status"] for line in lines] == [431, 400]


def test_a_key_with_a_rate_has_that_one_wherever_it_comes_from(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, keys = locked
    statuses = [running.client.get("/model", headers=bearer(keys["slow"])).status_code for _ in range(22)]
    assert statuses == [200] * 20 + [429] * 2
    assert running.client.get("/model", headers=bearer(keys["predict"])).status_code == 200
    line = [each for each in read_refusals(refusal_file(running.settings)) if each["status"] == 429][-1]
    assert (line["key"], line["role"]) == (keys["slow"].record.id, "predict")


def test_every_answer_tells_browsers_what_they_must_not_do(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, keys = locked
    names = {name.decode() for name, _ in SAFE_HEADERS}
    asked = [("/model", "predict"), ("/metrics", "operate"), ("/model", "revoked"), ("/", "predict"), ("/x", "admin")]
    for path, who in asked:
        answer = running.client.get(path, headers=bearer(keys[who]))
        assert names <= set(answer.headers), (path, names - set(answer.headers))
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert len(answer.headers.get_list("cache-control")) == 1
    bad = running.raw(b"NONSENSE\r\n\r\n")[1].lower()
    assert all(name.encode() in bad for name in names)


def test_a_key_is_rotated_under_load_and_no_request_is_lost(locked: tuple[Running, dict[str, NewKey]]) -> None:
    running, _ = locked
    settings = running.settings
    current, failed, asked = [create_key(settings, "load", "predict")], list[str](), [0]
    stopping = threading.Event()
    time.sleep(1)

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            while not stopping.is_set():
                answer = client.get("/model", headers=bearer(current[-1]))
                asked[0] += 1
                failed.extend([answer.text] if answer.status_code != 200 else [])

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for each in clients:
        each.start()
    for _ in range(3):
        made = rotate_key(settings, current[-1].record.id, timedelta(seconds=5))
        time.sleep(1)  # the service knows it by now; whoever has the old one changes to it
        current.append(made)
        time.sleep(0.3)
    stopping.set()
    for each in clients:
        each.join()
    assert failed == [] and asked[0] > 30
    revoke_key(settings, current[-1].record.id)
    until(lambda: running.client.get("/model", headers=bearer(current[-1])).status_code == 401, 3)


def test_whoever_is_refused_a_thousand_times_neither_fills_the_disk_nor_the_record(tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "audit" / "access.jsonl", size=10_000, files=3, rate=5, burst=100)
    for number in range(1000):
        log(scope(path=f"/{number}/" + "x" * 1000), HTTPProblem(401, "no"))
    assert sum(path.stat().st_size for path in log.path.parent.glob("*.jsonl*")) < 3 * 11_000
    assert log.skipped > 800
    log._limiter = RefusalLog(log.path)._limiter
    log._clients = RefusalLog(log.path)._clients
    log(scope(path="/last"), HTTPProblem(401, "no"))
    last = [*read_refusals(log.path)][-1]
    assert last["path"] == "/last" and int(str(last["skipped"])) > 800, "what was left out is counted"


def test_one_client_that_floods_hides_no_other(tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "access.jsonl")
    for number in range(2000):
        log(scope(path=f"/{number}"), HTTPProblem(401, "no"))
    quiet = scope(path="/quiet") | {"state": {"client": "198.51.100.7"}}
    log(quiet, HTTPProblem(401, "no"))
    found = [*read_refusals(log.path)]
    assert found[-1]["client"] == "198.51.100.7" and found[0]["path"] == "/0", "the flood has erased nothing"
    assert len(found) - 1 + sum(int(str(line.get("skipped", 0))) for line in found) == 2000
    for number in range(3000):
        log(scope() | {"state": {"client": f"192.0.2.{number}"}}, HTTPProblem(401, "no"))
    assert len([*read_refusals(log.path)]) < 2000, "all of them together are bounded, too"


def test_a_record_that_cannot_be_written_costs_nobody_an_answer(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    log = RefusalLog(tmp_path / "taken" / "access.jsonl")
    log(scope(), HTTPProblem(401, "no"))
    assert log.failing


def test_processes_that_refuse_at_once_mix_no_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlops_course.security.access import RefusalLog\n"
        "from mlops_course.serving.problems import HTTPProblem\n"
        "log = RefusalLog(Path(sys.argv[1]), size=20_000, files=50, rate=1e6, burst=10**6,\n"
        "    client_rate=1e6, client_burst=10**6)\n"
        "for number in range(300):\n"
        "    log({'method': 'GET', 'path': f'/{sys.argv[2]}/{number}', 'state': {}}, HTTPProblem(401, 'no'))"
    )
    path = tmp_path / "access.jsonl"
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(3)]
    assert [each.wait(60) for each in started] == [0, 0, 0]
    found = [str(line["path"]) for line in read_refusals(path)]
    assert len(found) == len(set(found)) == 900


# ---------------------------------------------------------------- the way in


def test_others_can_reach_a_service_that_asks_for_keys(home: Path) -> None:
    create_key(Settings(home=home), "desk", "predict")
    with serving(home, "--host", "0.0.0.0") as running:
        assert httpx.get(f"http://127.0.0.1:{running.port}/model").status_code == 401


def test_keys_that_are_wanted_must_be_there(settings: Settings) -> None:
    code = "import sys; from mlops_course.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--keys", "--home", str(settings.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "mlops-course keys create" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for this machine that nobody else has signed, and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = made.add_extension(address, critical=False).sign(key, hashes.SHA256())
    files = tmp_path / "certificate.pem", tmp_path / "certificate_key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    return files


def test_a_service_with_a_certificate_speaks_https(home: Path, certificate: tuple[Path, Path]) -> None:
    import ssl

    options = ["--tls-certificate", str(certificate[0]), "--tls-key", str(certificate[1])]
    with serving(home, *options, ready=False) as running:
        assert running.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=running.url, verify=trusting) as client:
            until(lambda: client.get("/health/ready").status_code == 200)
            record = client.get("/examples").json()[0]["record"]
            assert client.post("/predict", json={"record": record}).status_code == 200


def test_half_a_certificate_is_refused(certificate: tuple[Path, Path]) -> None:
    with pytest.raises(ServeError, match="belong together"):
        Access(certificate=certificate[0])
    certificate[1].write_text("no key")
    with pytest.raises(ServeError, match="can't be used"):
        Access(certificate=certificate[0], certificate_key=certificate[1])


def test_behind_a_trusted_proxy_limits_are_by_client(home: Path) -> None:
    limits = ["--limit", "rate=0.01", "--limit", "burst=2"]

    def statuses(running: Running, *forwarded: str) -> list[int]:
        return [running.client.get("/model", headers={"X-Forwarded-For": each}).status_code for each in forwarded]

    with serving(home, *limits, "--trusted-proxy", "127.0.0.1") as running:
        assert statuses(running, "203.0.113.1", "203.0.113.1", "203.0.113.1", "203.0.113.2") == [200, 200, 429, 200]
        assert statuses(running, *(f"198.51.100.{number}, 203.0.113.1" for number in range(3))) == [429] * 3
    with serving(home, *limits) as running:
        assert statuses(running, "203.0.113.1", "203.0.113.2", "203.0.113.3") == [200, 200, 429], "nobody is believed"


def test_a_proxy_is_one_address_or_one_network() -> None:
    networks: tuple[Network, ...] = read_proxies(["10.0.0.0/8", "::1"])
    assert client_of({"client": ("::1", 1), "headers": [(b"x-forwarded-for", b"192.0.2.1")]}, networks) == "192.0.2.1"
    for wrong in ("*", "", "10.0.0.1/8", "localhost"):
        with pytest.raises(CourseError, match="isn't a valid address"):
            read_proxies([wrong])


def test_each_worker_process_has_its_share_of_a_keys_rate(settings: Settings) -> None:
    key = create_key(settings, "desk", "predict", rate=10)
    app = create_app(settings, Limits())
    protect(app, settings, workers=4)
    assert app.authorize is not None and app.authorize(scope(f"Bearer {key.text}")).rate == 2.5


def test_a_record_of_a_key_shows_no_key() -> None:
    record = KeyRecord(id="0" * 12, name="desk", role="predict", sha256="0" * 64, created="2013-11-05T12:00:00.000Z")
    assert record.state("2013-11-05T12:00:00.000Z") == "valid"
    assert hide_keys(f"a mlc_{'0' * 12}_{'s' * 43} and mlc_{'0' * 12}_ss") == f"a mlc_{'0' * 12}_… and mlc_{'0' * 12}_…"


@pytest.mark.slow
def test_whatever_is_sent_with_a_key_nothing_goes_wrong_inside(
    locked: tuple[Running, dict[str, NewKey]], tmp_path: Path
) -> None:
    running, keys = locked
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{running.url}/openapi.json"]
    checks = ["--checks", "not_a_server_error", "--max-examples", "15", "--seed", "2013", "--no-color"]
    key = create_key(running.settings, "fuzz", "predict", rate=1e6)
    time.sleep(1)
    headers = ["--header", f"Authorization: Bearer {key.text}"]
    done = subprocess.run([*command, *checks, *headers], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    numbers = running.client.get("/metrics", headers=bearer(keys["operate"])).text
    assert 'status="500"' not in numbers and 'path="/predict",status="422"' in numbers
