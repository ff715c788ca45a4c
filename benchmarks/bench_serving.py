"""How many predictions a second does one worker give on one core, beside other ways to serve the same model?

The same model and the same flight, asked over HTTP by wrk with 1, 8 and 32 connections: the server on one core, wrk on
the other. `mlflow models serve`, BentoML (with --bentoml, the Python of an environment that has it), FastAPI with a
DataFrame a request, this service bare, this service with key check, limits, counters and prediction log, the same as
`mlops-course serve` starts it where a key is trusted and there is a file of keys (keys with roles, signature check at
load, a record of refusals: it should give at least nine tenths of the one before), and apps that score nothing: FastAPI
with the flight as a pydantic body, FastAPI with one field, Starlette with a constant. All that score must give the same
score, but for MLflow without a signature, which is faster and scores JSON's float64: it is in the table, and its ratios
are printed, but the bars count against what gives the right answer. Each is started and measured in turn, three times
(--rounds); medians are shown. The model has 500 trees, as the best one of section 6 (--trees). Exit status 1 when a bar
is missed. Needs Linux, two cores and wrk (apt install wrk); nothing else should run. The first run trains a model on
January in --home.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from apart import keys_of_its_own

from mlops_course.environment import Settings, load_settings
from mlops_course.serving import publish

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

CONNECTIONS = (1, 8, 32)
BARS = (  # what, at least or at most, the bar
    ("full / mlflow", ">=", 60.0),
    ("full / fastapi hello", ">=", 0.93),
    ("bare / mlflow", ">=", 110.0),
    ("hardened / full", ">=", 0.9),
    ("full: p99 at 8 connections, ms", "<=", 10.0),
    ("full: resident memory, MB", "<=", 200.0),
    ("full: ready after, s", "<=", 2.0),
)
HARDENED = "full, keys, signed, audit"  # with metrics and limits, too, as "full" has them
SKEWED = "mlflow, no signature"  # it scores float64: faster, and another score than in training
LUA = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {key}"
local file = io.open("{path}")
wrk.body = file:read("*a")
"""


# ---------------------------------------------------------------- the model


def prepare(settings: Settings, trees: int = 500) -> Path:
    """A bundle, the same model for scikit-learn, and one flight; made once and kept in the workspace."""
    folder = settings.home / f"bench_{trees}"
    if (folder / "one.json").is_file() and (folder / "mlflow_plain").is_dir():  # else an earlier version made it
        publish(settings, f"flight-delay@{trees}")
        return folder
    import joblib

    from mlops_course.data import build_features, ingest, labelled_features, validate
    from mlops_course.experiments import TrainingConfig, train
    from mlops_course.project import flight_delay
    from mlops_course.serving import Origin, materialise, write_bundle

    month = "2013-01"
    delivery = ingest(settings, flight_delay, month)
    tables = validate(settings, flight_delay, delivery.tables, [month]).tables
    features = build_features(settings, flight_delay, tables, month, month)
    rows = labelled_features(settings, flight_delay, features, tables["flights"], month, month)
    model = train(rows, flight_delay, TrainingConfig(trees, learning_rate=20 / trees))
    origin = Origin(run_id="benchmark", data={"features": features}, first=month, last=month)
    publish(settings, write_bundle(settings, flight_delay, model, rows, f"flight-delay@{trees}", origin))
    materialise(settings, flight_delay, features, [month])
    folder.mkdir(exist_ok=True)
    joblib.dump(model, folder / "model.joblib")
    save_mlflow(model, folder / "mlflow")
    record = json.loads(rows[list(model.feature_names_in_)].iloc[5000:5001].to_json(orient="records"))[0]
    (folder / "one.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def save_mlflow(model: Pipeline, folder: Path) -> None:
    """The model as MLflow serves it, with a signature, and without, when numbers stay as JSON has them."""
    import mlflow.sklearn

    from mlops_course.experiments.tracking import model_signature
    from mlops_course.project import flight_delay

    options = {"serialization_format": "cloudpickle", "pyfunc_predict_fn": "predict_proba"}
    for place, signature in ((folder, model_signature(model, flight_delay)), (folder.with_name("mlflow_plain"), None)):
        shutil.rmtree(place, ignore_errors=True)
        mlflow.sklearn.save_model(model, place, signature=signature, **options)


# ---------------------------------------------------------------- the others: each is a whole program


DATAFRAME = """
import joblib, pandas as pd, uvicorn
from fastapi import FastAPI
from typing import Any
model = joblib.load("{folder}/model.joblib")
app = FastAPI()
@app.post("/predict")
def predict(record: dict[str, Any]) -> dict[str, float]:
    texts = ("carrier", "origin", "dest")
    frame = pd.DataFrame([record]).astype({{name: "float32" for name in record if name not in texts}})
    return {{"score": float(model.predict_proba(frame)[0, 1])}}
uvicorn.run(app, port={port}, access_log=False, log_level="warning")
"""
BENTOML = """
import bentoml, joblib, pandas as pd
from typing import Any
@bentoml.service(workers=1)
class Flights:
    def __init__(self) -> None:
        self.model = joblib.load("{folder}/model.joblib")
    @bentoml.api(route="/predict")
    def predict(self, record: dict[str, Any]) -> dict[str, float]:
        texts = ("carrier", "origin", "dest")
        frame = pd.DataFrame([record]).astype({{name: "float32" for name in record if name not in texts}})
        return {{"score": float(self.model.predict_proba(frame)[0, 1])}}
"""
BARE = """
import uvicorn
from pathlib import Path
from mlops_course.environment import Settings
from mlops_course.serving.limits import Limits
from mlops_course.serving.models import LiveModels
from mlops_course.serving.app import FastPath
from mlops_course.serving.lookup import OnlineTable
from mlops_course.serving.predict import Service
settings = Settings(home=Path("{home}"))
app = FastPath(Service(LiveModels(settings), Limits(), OnlineTable(settings)))
uvicorn.run(app, port={port}, access_log=False, log_level="warning")
"""
FULL = """
from mlops_course.environment import Settings
from mlops_course.serving.app import create_app
import hashlib, hmac
KNOWN = hashlib.sha256(b"Bearer key").digest()
def authorize(scope):
    for name, value in scope["headers"]:
        if name == b"authorization" and hmac.compare_digest(hashlib.sha256(value).digest(), KNOWN):
            return "ann"
def make(settings, limits):
    return create_app(settings, limits, authorize)
"""
HELLO_ANSWER = """
class Answer(BaseModel):
    score: float
    warned: bool
    model: str
app = FastAPI()
@app.post("/predict")
async def predict(question: Question) -> Answer:
    return Answer(score=0.5, warned=False, model="hello")
uvicorn.run(app, port={port}, access_log=False, log_level="warning")
"""
HELLO_FASTAPI = (
    """
import json, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model
record = json.load(open("{folder}/one.json"))
kinds = {{name: (str | None if isinstance(value, str) else float | None, ...) for name, value in record.items()}}
Question = create_model("Record", **kinds)"""
    + HELLO_ANSWER
)
HELLO_SMALL = (
    """
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
class Question(BaseModel):
    name: str"""
    + HELLO_ANSWER
)
HELLO_STARLETTE = """
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
async def predict(request):
    return JSONResponse({{"score": 0.5, "warned": False, "model": "hello"}})
app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
uvicorn.run(app, port={port}, access_log=False, log_level="warning")
"""


@dataclass
class Server:
    """One way to serve."""

    name: str
    command: list[str]
    body: str  # how the record is wrapped
    path: str = "/predict"
    key: str = "key"  # what is sent as a bearer token
    variables: dict[str, str] = field(default_factory=dict)  # of the environment
    rates: dict[int, float] = field(default_factory=dict)  # requests a second, by connections
    p99: dict[int, float] = field(default_factory=dict)  # milliseconds
    cpu: float = 0.0  # microseconds of processor time a request, at 8 connections: less shaken by neighbours
    ready: float = 0.0  # seconds
    memory: float = 0.0  # MB
    score: float | None = None  # of the flight; None: it scores nothing


def servers(settings: Settings, folder: Path, scratch: Path, port: int, bentoml: str | None) -> Iterator[Server]:
    """All of them; their programs are written into the scratch folder."""

    def program(name: str, text: str) -> list[str]:
        (scratch / f"{name}.py").write_text(text.format(folder=folder, home=settings.home, port=port), encoding="utf-8")
        return [sys.executable, str(scratch / f"{name}.py")]

    mlflow = [sys.executable, "-m", "mlflow", "models", "serve", "-p", str(port), "-w", "1", "--env-manager", "local"]
    for name, model in (("mlflow", "mlflow"), (SKEWED, "mlflow_plain")):
        yield Server(name, [*mlflow, "-m", str(folder / model)], '{"dataframe_records": [%s]}', "/invocations")
    if bentoml:
        (scratch / "bento.py").write_text(BENTOML.format(folder=folder), encoding="utf-8")
        command = [bentoml, "-m", "bentoml", "serve", "bento:Flights", "--port", str(port)]
        yield Server("bentoml", [*command, "--working-dir", str(scratch)], '{"record": %s}')
    yield Server("fastapi + DataFrame", program("dataframe", DATAFRAME), "%s")
    yield Server("bare", program("bare", BARE), '{"record": %s}')
    (scratch / "bench_full.py").write_text(FULL, encoding="utf-8")
    full = [str(Path(sys.executable).with_name("mlops-course")), "serve", "--home", str(settings.home)]
    full += ["--limit", "rate=1e9"]  # the limiter works, and never refuses
    full += ["--port", str(port)]
    yield Server("full", [*full, "--app", "bench_full:make"], '{"record": %s}')
    yield hardened(settings, folder.name.removeprefix("bench_"), scratch, full)
    yield Server("fastapi hello", program("hello_fastapi", HELLO_FASTAPI), "%s")
    yield Server("fastapi hello, one field", program("hello_small", HELLO_SMALL), '{"name": "ann"}')
    yield Server("starlette hello", program("hello_starlette", HELLO_STARLETTE), "%s")


def hardened(settings: Settings, version: str, scratch: Path, command: list[str]) -> Server:
    """The service as it is started where a key is trusted and there is a file of keys: each is made here."""
    from mlops_course.security.keys import create_key
    from mlops_course.security.vouching import vouch
    from mlops_course.serving.bundle import bundles_folder

    own = settings.model_copy(update={"trust": scratch / "trust", "keys_file": scratch / "keys.json"})
    own.keys_file.unlink(missing_ok=True)
    vouch(own, bundles_folder(own) / f"flight-delay@{version}")
    key = create_key(own, "bench", "predict", rate=1e9)
    variables = {"MLOPS_COURSE_TRUST": str(own.trust), "MLOPS_COURSE_KEYS_FILE": str(own.keys_file)}
    return Server(HARDENED, command, '{"record": %s}', key=key.text, variables=variables)


# ---------------------------------------------------------------- measuring


def ask(url: str, body: bytes, key: str = "key") -> dict[str, Any] | None:
    """The answer; None: there is none yet."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise RuntimeError(f"{url} answers {error.code}: {error.read()[:500]!r}") from error
        return None
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def score_in(answer: dict[str, Any]) -> float | None:
    """The score of the flight; None: the app knows no model."""
    if "predictions" in answer:  # MLflow's: a probability for each class
        return float(answer["predictions"][0][1])
    return None if answer.get("model") == "hello" else float(answer["score"])


@contextmanager
def running(server: Server, scratch: Path, url: str, body: bytes) -> Iterator[psutil.Process]:
    """The server on the first core, until the end of the block."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/no.db"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # mlflow starts uvicorn by its name
    others = {"PATH": path, "PYTHONPATH": str(scratch), "BENTOML_DO_NOT_TRACK": "True"}
    environment = {**os.environ, **threads, **others, **server.variables}
    begin = time.perf_counter()
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(
            ["taskset", "-c", "0", *server.command], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while (answer := ask(url, body, server.key)) is None:
            if process.poll() is not None or time.perf_counter() - begin > 90:
                raise RuntimeError(f"{server.name} did not start:\n{(scratch / 'server.log').read_text()[-2000:]}")
            time.sleep(0.01)
        server.ready, server.score = time.perf_counter() - begin, score_in(answer)
        yield psutil.Process(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def first_in_line(processes: list[psutil.Process], wanted: bool) -> Iterator[list[str]]:
    """Nothing else runs on their core until the end of the block; gives what to put before a command to do the same."""
    threads = [thread.id for process in processes for thread in process.threads()] if wanted else []
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(20))
    try:
        yield ["chrt", "--rr", "20"] if wanted else []
    finally:
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def load(server: Server, scratch: Path, url: str, connections: int, seconds: int, prefix: list[str]) -> None:
    """Ask with wrk on the second core."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency"]
    command = [*prefix, "taskset", "-c", "1", "wrk", *options]
    done = subprocess.run([*command, "-s", str(scratch / "post.lua"), url], capture_output=True, text=True, check=True)
    rate, p99 = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout), re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout)
    if not rate or not p99 or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(f"{server.name} did not answer everything:\n{done.stdout}")
    if rate and p99:
        server.rates[connections] = float(rate[1])
        server.p99[connections] = float(p99[1]) * {"us": 0.001, "ms": 1, "s": 1000}[p99[2]]


def used(processes: list[psutil.Process]) -> float:
    """Seconds of processor time."""
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def measure(server: Server, scratch: Path, port: int, record: str, seconds: int, alone: bool) -> None:
    """All figures of one server."""
    url, body = f"http://127.0.0.1:{port}{server.path}", server.body % record if "%s" in server.body else server.body
    (scratch / "body.json").write_text(body, encoding="utf-8")
    (scratch / "post.lua").write_text(LUA.format(path=scratch / "body.json", key=server.key), encoding="utf-8")
    with running(server, scratch, url, body.encode()) as process:
        load(server, scratch, url, 8, 1, [])  # warm
        processes = [process, *process.children(recursive=True)]
        for connections in CONNECTIONS:
            before = used(processes)
            with first_in_line(processes, alone) as prefix:
                load(server, scratch, url, connections, seconds, prefix)
            if connections == 8:
                server.cpu = (used(processes) - before) / (server.rates[8] * seconds) * 1e6
        server.memory = sum(each.memory_info().rss for each in processes) / 1e6


def typical(rounds: list[Server]) -> Server:
    """The medians of one way to serve. Raises: RuntimeError when its score was another one in another round."""
    first, middle = rounds[0], statistics.median
    same_score(rounds)
    return replace(
        first,
        rates={each: middle(one.rates[each] for one in rounds) for each in CONNECTIONS},
        p99={each: middle(one.p99[each] for one in rounds) for each in CONNECTIONS},
        **{name: middle(getattr(one, name) for one in rounds) for name in ("cpu", "ready", "memory")},
    )


def same_score(servers: Iterable[Server]) -> None:
    """Make sure that all who score have given one flight one score. Raises: RuntimeError."""
    scores = [(each.score, each.name) for each in servers if each.score is not None]
    if scores and max(scores)[0] - min(scores)[0] > 1e-5:
        raise RuntimeError(f"they don't serve the same model: {scores}")


def figures(found: dict[str, Server]) -> dict[str, float]:
    """What the bars are about; rates at 8 connections, beside the MLflow that gives the same score."""
    full, rate = found["full"], {name: server.rates[8] for name, server in found.items()}
    return {
        "full / mlflow": rate["full"] / rate["mlflow"],
        "full / fastapi hello": rate["full"] / rate["fastapi hello"],
        "bare / mlflow": rate["bare"] / rate["mlflow"],
        "hardened / full": rate[HARDENED] / rate["full"],
        "full: p99 at 8 connections, ms": full.p99[8],
        "full: resident memory, MB": full.memory,
        "full: ready after, s": full.ready,
    }


def as_table(found: dict[str, Server]) -> list[dict[str, Any]]:
    """The table for others to read: requests a second by connections, and what they cost."""
    return [
        {
            "way": server.name,
            **{f"{each} conn., 1/s": round(server.rates[each]) for each in CONNECTIONS},
            "p99 of 8, ms": round(server.p99[8], 1), "cpu, us": round(server.cpu),
            "memory, MB": round(server.memory), "ready, s": round(server.ready, 1),
        }
        for server in found.values()
    ]  # fmt: skip


def show(found: dict[str, Server]) -> None:
    """The table."""
    columns = "".join(f"{f'{each} conn.':>10}" for each in CONNECTIONS)
    print(f"\n{'':26}{columns}{'x mlflow':>10}{'p99 of 8':>11}{'cpu':>10}{'MB':>7}{'ready':>8}")
    base = found["mlflow"].rates[8] if "mlflow" in found else float("nan")
    for server in found.values():
        rates = "".join(f"{server.rates.get(each, 0):10,.0f}" for each in CONNECTIONS)
        times = f"{server.p99[8]:8.1f} ms{server.cpu:7,.0f} us{server.memory:7.0f}{server.ready:6.1f} s"
        print(f"{server.name:26}{rates}{server.rates[8] / base:10.1f}{times}", flush=True)


def main() -> int:
    """Measure and print."""
    keys_of_its_own()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=load_settings().home / "bench_serving")
    parser.add_argument("--bentoml", help="the Python of an environment with bentoml and this one's scikit-learn")
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is started and measured")
    parser.add_argument("--trees", type=int, default=500, help="of the model")
    parser.add_argument("--first", action="store_true", help="go before all else on a busy machine (needs root)")
    parser.add_argument("--only", nargs="*", help="names of servers")
    parser.add_argument("--json", action="store_true", help="print the table as JSON; the bars go to standard error")
    options = parser.parse_args()
    settings = load_settings(home=options.home).prepare()
    folder = prepare(settings, options.trees)
    record, rounds = (folder / "one.json").read_text(encoding="utf-8"), dict[str, list[Server]]()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for number in range(options.rounds):
            for server in servers(settings, folder, Path(temporary), port, options.bentoml):
                if not options.only or server.name in options.only:
                    print(f"{number + 1}. {server.name} ...", file=sys.stderr, flush=True)
                    measure(server, Path(temporary), port, record, options.seconds, options.first)
                    rounds.setdefault(server.name, []).append(server)
    found = {name: typical(each) for name, each in rounds.items()}
    same_score(each for each in found.values() if each.name != SKEWED)
    shutil.rmtree(settings.serving / "predictions", ignore_errors=True)
    print(json.dumps(as_table(found), indent=1)) if options.json else show(found)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        return show_bars(found, whole=not options.only)


def show_bars(found: dict[str, Server], whole: bool) -> int:
    """The ratios; 1 when a bar is missed."""
    if not whole:
        if {HARDENED, "full"} <= set(found):
            print(f"\nhardened / full {found[HARDENED].rates[8] / found['full'].rates[8]:.2f}")
        return 0
    missed = 0
    print()
    for (name, sign, bar), value in zip(BARS, figures(found).values(), strict=True):
        fine = value >= bar if sign == ">=" else value <= bar
        missed += not fine
        print(f"{name:34}{value:8.2f}   bar {sign} {bar:g}   {'reached' if fine else 'MISSED'}")
    wrong = found[SKEWED].rates[8]
    beside = {name: found[name].rates[8] / wrong for name in ("full", "bare", "fastapi hello")}
    print(f"beside {SKEWED}: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in beside.items()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
