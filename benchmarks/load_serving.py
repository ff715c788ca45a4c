"""Does the service hold out: half a million requests, and whatever may go wrong meanwhile?

The model is swapped twenty times, five workers are killed (SIGKILL), writing fails for a while as it does on a full
disk (the system refuses each byte: RLIMIT_FSIZE of the workers, so that nobody's disk has to be filled; Linux only),
and a release puts the other model beside the live one until its guard decides. Then each claim is one line: nothing
lost, no 5xx but where the disk was full, log = answers, each answer with the score and the threshold of the very model
that it names, memory flat. Exit status 1 when one of them is broken. What a killed worker was at work on ends as a
broken connection; its client asks again, and so does one that was refused. A smaller try: --requests 20000. Needs a
workspace with two bundles and a table of features (--home; without it, two models of different size are made as
bench_serving.py does).
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from apart import keys_of_its_own

from mlops_course.deployment import ReleaseLimits, release_status, start_release
from mlops_course.environment import Settings, load_settings
from mlops_course.serving import load_predictor, publish
from mlops_course.serving.bundle import bundles_folder
from mlops_course.serving.predictions import log_folder, read_segment
from mlops_course.serving.publishing import for_case, live_bundle


@dataclass
class Seen:
    """What came of it."""

    answered: set[str] = field(default_factory=set)  # ids
    models: Counter[str] = field(default_factory=Counter)
    triples: Counter[tuple[str, float, float]] = field(default_factory=Counter)  # model, score, threshold
    expected: set[tuple[str, float, float]] = field(default_factory=set)  # what the bundles say themselves
    broken: int = 0  # connections that ended without an answer
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests so far, MB of the largest worker
    killed: int = 0  # workers
    swapped: int = 0  # models
    full: bool = False  # whether the disk is full, or was a moment ago
    refused: int = 0  # requests that were refused, since the prediction could not be recorded
    strange: Counter[str] = field(default_factory=Counter)  # other refusals
    release: str = ""  # how it ended
    over: bool = False  # whether all that was to go wrong has gone wrong

    def goes_on(self, todo: list[int]) -> bool:
        """Whether somebody has to ask."""
        return todo[0] > 0 or not self.over


async def client(port: int, body: bytes, todo: list[int], seen: Seen) -> None:
    """Ask over one connection, again and again; open another one when it breaks."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    head = head % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while seen.goes_on(todo):
        todo[0] -= 1
        try:
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            document = json.loads(await reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError):
            seen.broken += 1
            todo[0] += 1
            writer.close()
            reader, writer = await reopen(port)
            continue
        if "score" in document:
            seen.answered.add(document["request_id"])
            seen.models[document["model"]] += 1
            seen.triples[document["model"], document["score"], document["threshold"]] += 1
        elif seen.full and "can't be recorded" in document.get("detail", ""):
            seen.refused += 1
            todo[0] += 1
            await asyncio.sleep(0.01)
        else:
            seen.strange[f"{answer[9:12].decode()} {document.get('detail', '')[:80]}"] += 1
    writer.close()


async def reopen(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Another connection, as soon as there is somebody."""
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)


def workers(process: int) -> list[psutil.Process]:
    """Who answers, in the order of their birth."""
    found = []
    for each in psutil.Process(process).children():
        try:
            found += [each] if "resource_tracker" not in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue
    return sorted(found, key=lambda each: each.create_time())


def two_bundles(settings: Settings) -> list[Path]:
    """The models that are swapped."""
    return sorted(path for path in bundles_folder(settings).iterdir() if not path.name.startswith("."))[:2]


async def disturb(settings: Settings, process: int, options: argparse.Namespace, todo: list[int], seen: Seen) -> None:
    """Swap models and kill workers in the first half; then a full disk, and a release; and look at the memory."""
    names = [path.name for path in two_bundles(settings)]
    watch = asyncio.create_task(watch_memory(process, options.requests, todo, seen))
    while seen.swapped < options.swaps or seen.killed < options.kills:
        await asyncio.sleep(0.1)
        part = 2 * (options.requests - todo[0]) / options.requests  # of the first half
        if seen.swapped < options.swaps and part > seen.swapped / options.swaps:
            publish(settings, names[(seen.swapped + 1) % 2])
            seen.swapped += 1
        if seen.killed < options.kills and part > (seen.killed + 0.5) / options.kills:
            with suppress(psutil.NoSuchProcess):  # one that was killed before is still ending: look again
                max(workers(process), key=lambda each: sum(each.cpu_times()[:2])).kill()
                seen.killed += 1
    while len(workers(process)) < options.workers or todo[0] > options.requests * 0.4:
        await asyncio.sleep(0.1)
    await fill_disk(process, seen)
    await release(settings, names, seen)
    seen.over = True
    while seen.goes_on(todo):
        await asyncio.sleep(0.1)
    await watch


async def watch_memory(process: int, total: int, todo: list[int], seen: Seen) -> None:
    """Note the size of the largest worker, five times a second."""
    while seen.goes_on(todo):
        sizes = []
        for each in workers(process):
            with suppress(psutil.Error):  # it has just been killed
                sizes.append(each.memory_info().rss / 1e6)
        seen.memory.append((total - todo[0], max(sizes, default=0)))
        await asyncio.sleep(0.2)


async def fill_disk(process: int, seen: Seen) -> None:
    """Have the system refuse each byte that a worker writes for two seconds, and let it write again."""
    seen.full, before = True, list[tuple[psutil.Process, tuple[int, int]]]()
    for each in workers(process):
        with suppress(psutil.NoSuchProcess):  # it was killed before, and is still ending
            before.append((each, each.rlimit(psutil.RLIMIT_FSIZE)))
            each.rlimit(psutil.RLIMIT_FSIZE, (1, before[-1][1][1]))
    await asyncio.sleep(2)
    for each, limits in before:
        with suppress(psutil.NoSuchProcess):
            each.rlimit(psutil.RLIMIT_FSIZE, limits)
    await asyncio.sleep(5)  # once a second a worker looks whether it can write again
    seen.full = False


async def release(settings: Settings, names: list[str], seen: Seen) -> None:
    """Put the model that isn't live beside the one that is, and wait until the guard has decided."""
    live = live_bundle(settings)
    candidate = next(name for name in names if live is None or name != live.name)
    limits = ReleaseLimits(trust_records=True, caller_share=1.0, min_requests=1000, hold_seconds=2.0)
    await asyncio.to_thread(start_release, for_case(settings, candidate), candidate, "canary", (0.3,), limits)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        await asyncio.sleep(0.5)
        found = release_status(for_case(settings, candidate))["release"]
        if found and found["status"] != "running":
            seen.release = f"{candidate} was {found['status']}: {found['reason']}"
            return


async def load(settings: Settings, url: str, process: int, options: argparse.Namespace) -> Seen:
    """All clients and disturbances, until the requests are used up."""
    with urllib.request.urlopen(f"{url}/examples?count=1") as answer:
        record = json.load(answer)[0]["record"]
    body = json.dumps({"record": record}).encode()
    seen, todo, port = Seen(), [options.requests], int(url.rpartition(":")[2])
    for folder in two_bundles(settings):
        predictor = load_predictor(folder)
        score = float(predictor.scores(predictor.encode([record]))[0])
        seen.expected.add((predictor.reference, score, predictor.threshold))
    clients = [client(port, body, todo, seen) for _ in range(options.clients)]
    await asyncio.gather(*clients, disturb(settings, process, options, todo, seen))
    return seen


def claims(seen: Seen, settings: Settings, options: argparse.Namespace) -> list[tuple[bool, str]]:
    """What was promised, with the figures, and whether it was kept."""
    entries = [each for path in log_folder(settings, "flight-delay").iterdir() for each in read_segment(path)[0]]
    ids, early = {each.id for each in entries}, options.requests / 5
    before = max((size for done, size in seen.memory if done <= early), default=0)
    after = max((size for done, size in seen.memory if done > early), default=0)
    given, lost, others = sum(seen.triples.values()), seen.answered - ids, ids - seen.answered
    wrong = sum(count for triple, count in seen.triples.items() if triple not in seen.expected)
    return [
        (given >= options.requests, f"{given:,} requests were answered, of {options.requests:,}"),
        (len(seen.answered) == given, f"{len(seen.answered):,} ids: each answer has one of its own"),
        (seen.swapped == options.swaps, f"{seen.swapped} swaps of the model; {dict(seen.models)}"),
        (seen.killed == options.kills, f"{seen.killed} workers killed"),
        (seen.broken <= options.clients * options.kills, f"{seen.broken} connections broke: a killed worker's own"),
        (seen.refused > 0, f"{seen.refused:,} requests refused while the disk was full"),
        (not seen.strange, f"{sum(seen.strange.values())} other refusals {dict(seen.strange.most_common(3)) or ''}"),
        (bool(seen.release), f"a guarded release: {seen.release or 'nobody has decided'}"),
        (not lost, f"{len(lost)} answers are not in the log"),
        (len(entries) == len(ids), f"{len(entries) - len(ids)} predictions are in the log twice"),
        (len(others) <= seen.broken, f"{len(others)} in the log were never answered: {seen.broken} connections broke"),
        (not wrong, f"{wrong} answers with a score or a threshold that their model doesn't give"),
        (len({score for _, score, _ in seen.expected}) == 2, "the two models give different scores"),
        (after <= before * 1.1 + 5, f"memory of the largest worker: {before:.0f} MB, then {after:.0f} MB"),
    ]


def show_memory(seen: Seen, requests: int) -> None:
    """The largest worker so far, by tenths of the requests."""
    tenths = [requests * part / 10 for part in range(1, 11)]
    steps = [max((size for done, size in seen.memory if done <= tenth), default=0) for tenth in tenths]
    print("largest worker so far, MB, by tenths of the requests: " + " ".join(f"{size:.0f}" for size in steps))


def prepare(settings: Settings) -> None:
    """Two bundles in the workspace."""
    from bench_serving import prepare as prepare_one

    for trees in (500, 300):
        prepare_one(settings, trees)


def main() -> int:
    """Load, look, and print."""
    keys_of_its_own()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=load_settings().home / "bench_serving")
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = load_settings(home=options.home).prepare()
    if len(list(bundles_folder(settings).glob("*@*"))) < 2:
        prepare(settings)
    shutil.rmtree(log_folder(settings, "flight-delay"), ignore_errors=True)
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()", "serve", "--home", str(settings.home)]
    with tempfile.TemporaryFile("w+") as errors:
        program += ["--port", "0", "--workers", str(options.workers), "--app", "mlops_course.deployment:release_app"]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            url = process.stdout.readline().strip() if process.stdout else ""
            while len(workers(process.pid)) < options.workers:
                time.sleep(0.1)
            begin = time.perf_counter()
            seen = asyncio.run(load(settings, url, process.pid, options))
            seconds = time.perf_counter() - begin
        finally:
            process.terminate()
            status = process.wait(30)
        errors.seek(0)
        tracebacks = [line for line in errors if "Traceback" in line]
    show_memory(seen, options.requests)
    found = claims(seen, settings, options)
    found += [(status == 0, f"it ended with status {status}")]
    found += [(not tracebacks, f"{len(tracebacks)} tracebacks in its log")]
    for kept, text in found:
        print(f"{'ok    ' if kept else 'BROKEN'} {text}")
    print(f"{options.requests:,} requests in {seconds:.0f} s")
    return 0 if all(kept for kept, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
