"""Does the service hold out: half a million requests, no refusal, no growth, every prediction on the disk?

Meanwhile the model is swapped twenty times and a worker is killed. Needs a workspace with two bundles and a feature
table (--home; without it, two models of different size are made as bench_serving.py does). Each answer must have the
score and the threshold of the very model that it names. Exit status 1 when something is lost, mixed up, counted twice,
answered with a 5xx, or when a worker's memory grows by more than a tenth after the first fifth.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mlops_course.environment import Settings, load_settings
from mlops_course.serving import load_predictor, publish
from mlops_course.serving.bundle import bundles_folder
from mlops_course.serving.predictions import log_folder, read_segment


@dataclass
class Seen:
    """What came of it."""

    answered: set[str] = field(default_factory=set)  # ids
    statuses: Counter[int] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    triples: Counter[tuple[str, float, float]] = field(default_factory=Counter)  # model, score, threshold
    expected: set[tuple[str, float, float]] = field(default_factory=set)  # what the bundles say themselves
    broken: int = 0  # connections that ended without an answer
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests so far, MB of the largest worker
    killed: int = 0


async def client(port: int, body: bytes, todo: list[int], seen: Seen) -> None:
    """Ask over one connection, again and again; open another one when it breaks."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    head = head % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while todo[0] > 0:
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
        seen.statuses[int(answer.split()[1])] += 1
        if "score" in document:
            seen.answered.add(document["request_id"])
            seen.models[document["model"]] += 1
            seen.triples[document["model"], document["score"], document["threshold"]] += 1
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


async def disturb(settings: Settings, process: int, total: int, swaps: int, todo: list[int], seen: Seen) -> None:
    """Swap models, kill a worker half-way, and look at the memory."""
    names = [path.name for path in two_bundles(settings)]
    swapped = 0
    while todo[0] > 0:
        await asyncio.sleep(0.2)
        done = total - todo[0]
        largest = max((each.memory_info().rss for each in workers(process)), default=0) / 1e6
        seen.memory.append((done, largest))
        if swapped < swaps and done > total * swapped / swaps:
            publish(settings, names[(swapped + 1) % 2])
            swapped += 1
        if not seen.killed and done > total / 2:
            seen.killed = max(workers(process), key=lambda each: sum(each.cpu_times()[:2])).pid  # the busiest
            os.kill(seen.killed, signal.SIGKILL)


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
    await asyncio.gather(*clients, disturb(settings, process, options.requests, options.swaps, todo, seen))
    return seen


def complaints(seen: Seen, settings: Settings, options: argparse.Namespace) -> list[str]:
    """What isn't as it should be."""
    entries = [each for path in log_folder(settings, "flight-delay").iterdir() for each in read_segment(path)[0]]
    ids, early = {each.id for each in entries}, options.requests / 5
    before = max((size for done, size in seen.memory if done <= early), default=0)
    after = max((size for done, size in seen.memory if done > early), default=0)
    checks = {
        f"{seen.statuses} were answered": set(seen.statuses) == {200},
        f"{len(seen.answered)} ids for {options.requests} requests": len(seen.answered) == options.requests,
        f"{len(seen.answered - ids)} answered predictions are not on the disk": seen.answered <= ids,
        f"{len(entries) - len(ids)} predictions are there twice": len(entries) == len(ids),
        f"{len(ids - seen.answered)} on the disk were never answered": len(ids - seen.answered) <= seen.broken,
        f"{seen.broken} connections broke": seen.broken <= options.clients,
        f"memory went from {before:.0f} to {after:.0f} MB": after <= before * 1.1 + 5,
        f"{len(seen.models)} models answered": len(seen.models) == 2,
        f"{sorted(set(seen.triples) - seen.expected)[:3]} is no model's answer": set(seen.triples) == seen.expected,
        "the two models give the same score": len({score for _, score, _ in seen.expected}) == 2,
        "no worker was killed": bool(seen.killed),
    }
    tenths = [options.requests * part / 10 for part in range(1, 11)]
    steps = [max((size for done, size in seen.memory if done <= tenth), default=0) for tenth in tenths]
    print("largest worker so far, MB, by tenths of the requests: " + " ".join(f"{size:.0f}" for size in steps))
    print(f"memory {before:.0f} -> {after:.0f} MB, {len(ids):,} predictions on disk, {seen.broken} connections broke")
    return [text for text, fine in checks.items() if not fine]


def prepare(settings: Settings) -> None:
    """Two bundles in the workspace."""
    from bench_serving import prepare as prepare_one

    for trees in (500, 300):
        prepare_one(settings, trees)


def main() -> int:
    """Load, look, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=load_settings().home / "bench_serving")
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = load_settings(home=options.home).prepare()
    if len(list(bundles_folder(settings).glob("*@*"))) < 2:
        prepare(settings)
    shutil.rmtree(log_folder(settings, "flight-delay"), ignore_errors=True)
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()", "serve", "--home", str(settings.home)]
    with tempfile.TemporaryFile("w+") as errors:
        program += ["--port", "0", "--workers", str(options.workers)]
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
    print(f"{options.requests:,} requests in {seconds:.0f} s, {dict(seen.models)}")
    found = complaints(seen, settings, options)
    found += [f"it ended with status {status}"] if status else []
    found += [f"{len(tracebacks)} tracebacks in its log"] if tracebacks else []
    print("\n".join(f"WRONG: {each}" for each in found) or "nothing was lost")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
