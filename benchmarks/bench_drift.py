"""What does a drift report of the real flights cost, beside SciPy, Evidently and NannyML, and do they say the same?

Twenty columns of all 336,776 flights and their weather: the first half of the year is the reference, the second half is
compared with it. Each way runs in a process of its own, which has the data in memory before the clock starts; time is
the best of some rounds, memory what the peak of the process grows by. Evidently and NannyML get environments of their
own, made with uv under --folder, since they need other versions than this project. Then: ten times the rows, the
profiles of a stream, and the numbers where the definition is the same (KS, and Wasserstein over the deviation of the
reference).
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow

TEXTS = ["carrier", "origin", "dest"]
NUMBERS = ["month_day", "sched_dep_time", "dep_delay", "sched_arr_time", "arr_delay", "air_time", "distance", "flight"]
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
PACKAGES = {"evidently": ["evidently", "pandas<3"], "nannyml": ["nannyml>=0.13", "pandas<3", "statsmodels"]}


def write_data(folder: Path) -> None:
    """Both halves of the year as Parquet."""
    from mlops_course.project.supplier import find_file, read_file, supplier_folder

    root = supplier_folder()
    flights, weather = (read_file(Path(str(find_file(root, name)))) for name in ("flights", "weather"))
    key = ["origin", "month", "day", "hour"]
    frame = flights.merge(weather[[*key, *WEATHER]].drop_duplicates(key), on=key, how="left")
    frame = frame.assign(month_day=frame["day"]).sort_values(["month", "day"], kind="stable")
    columns = [*TEXTS, *NUMBERS, *WEATHER]
    for name, rows in (("then", frame["month"] <= 6), ("now", frame["month"] > 6)):
        half = frame.loc[rows, columns].astype(dict.fromkeys([*NUMBERS, *WEATHER], "float64"))
        half.to_parquet(folder / f"{name}.parquet", index=False)


def ours(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, dict[str, float]]:
    """This project: all distances, floors and verdicts."""
    from mlops_course.monitoring.comparing import drift

    return drift(then, now)[["ks", "wasserstein", "js"]].dropna(subset="ks").to_dict()


def profiles(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, dict[str, float]]:
    """This project, by profiles of pieces of 10,000 rows."""
    from mlops_course.monitoring.profiles import merge_profiles, profile_drift, profile_frame

    def of(frame: pd.DataFrame) -> Any:
        return merge_profiles(profile_frame(frame.iloc[at : at + 10_000]) for at in range(0, len(frame), 10_000))

    return profile_drift(of(then), of(now))[["ks", "wasserstein"]].dropna(subset="ks").to_dict()


def scipy(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, dict[str, float]]:
    """SciPy, column by column: KS, Wasserstein, and chi-square for texts."""
    from scipy import stats

    found: dict[str, dict[str, float]] = {"ks": {}, "wasserstein": {}}
    for name in [*NUMBERS, *WEATHER]:
        one, other = then[name].dropna(), now[name].dropna()
        found["ks"][name] = float(stats.ks_2samp(one, other, method="asymp").statistic)
        found["wasserstein"][name] = float(stats.wasserstein_distance(one, other) / one.std(ddof=0))
    for name in TEXTS:
        counts = pd.concat([then[name].value_counts(), now[name].value_counts()], axis=1).fillna(0)
        stats.chi2_contingency(counts.T, correction=False)
    return found


def evidently(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Evidently's drift preset as it comes: Wasserstein and Jensen-Shannon for so many rows."""
    from evidently import Report
    from evidently.presets import DataDriftPreset

    result = Report([DataDriftPreset()]).run(now, then).dict()
    found: dict[str, float] = {}
    for metric in result["metrics"]:
        told = metric.get("config", {})
        if "wasserstein" in str(told.get("method", "")).lower() and told.get("column") in [*NUMBERS, *WEATHER]:
            found[told["column"]] = float(metric["value"])
    return {"wasserstein": found}


def nannyml(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, dict[str, float]]:
    """NannyML's drift of single columns, one chunk: KS, Jensen-Shannon and Wasserstein."""
    import nannyml as nml

    methods = ["kolmogorov_smirnov", "jensen_shannon", "wasserstein"]
    names = [*NUMBERS, *WEATHER, *TEXTS]
    made = nml.UnivariateDriftCalculator(
        column_names=names, continuous_methods=methods, categorical_methods=["jensen_shannon", "chi2"], chunk_number=1
    )
    made.fit(then)
    table = made.calculate(now).filter(period="analysis").to_df()
    return {"ks": {name: float(table[name, "kolmogorov_smirnov", "value"].iloc[0]) for name in [*NUMBERS, *WEATHER]}}


TOOLS: dict[str, Callable[..., dict[str, dict[str, float]]]] = {
    "ours": ours, "profiles": profiles, "scipy": scipy, "evidently": evidently, "nannyml": nannyml,
}  # fmt: skip


def memory_now() -> int:
    """Resident memory in kB; from here on the peak is counted anew (Linux alone can do that)."""
    if (reset := Path("/proc/self/clear_refs")).exists():
        gc.collect()
        pyarrow.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind would hide what is asked for next
        reset.write_text("5")
        return _status("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_peak() -> int:
    """The peak since then, in kB."""
    linux = Path("/proc/self/status").exists()
    return _status("VmHWM") if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(tool: str, folder: Path, rounds: int, times: int) -> None:
    """Run one way in this process, and print what it cost."""
    then, now = (pd.concat([pd.read_parquet(folder / f"{name}.parquet")] * times) for name in ("then", "now"))
    then, now = then.reset_index(drop=True), now.reset_index(drop=True)
    start = time.perf_counter()
    TOOLS[tool](then.head(500), now.head(500))  # imports, and whatever is made once
    first, before = time.perf_counter() - start, memory_now()
    best, found = np.inf, {}
    for _ in range(rounds):
        start = time.perf_counter()
        found = TOOLS[tool](then, now)
        best = min(best, time.perf_counter() - start)
    grown = (memory_peak() - before) / 1024
    print(json.dumps({"seconds": best, "megabytes": grown, "start": first, "found": found}))


def run(python: Path, tool: str, folder: Path, rounds: int, times: int = 1) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [str(python), __file__, "--tool", tool, "--folder", str(folder), "--rounds", str(rounds)]
    quiet = {**os.environ, "NML_DISABLE_USAGE_LOGGING": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([*command, "--times", str(times)], capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def environment(tool: str, folder: Path) -> Path:
    """An interpreter that has the tool, made once."""
    place = folder / f"venv-{tool}"
    if not (place / "bin" / "python").exists():
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(place)], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(place / "bin" / "python"), *PACKAGES[tool], "pyarrow"]
        subprocess.run(install, check=True)
    return place / "bin" / "python"


def show(name: str, result: dict[str, Any], own: dict[str, Any]) -> None:
    """A line for each way, and how far its numbers lie from ours."""
    if "error" in result:
        return print(f"{name:12} left out: {result['error'][:150]}")
    ratio, memory = result["seconds"] / own["seconds"], result["megabytes"] / max(own["megabytes"], 0.1)
    told = f"{name:12} {result['seconds']:7.2f} s ({ratio:5.1f} ×)  +{result['megabytes']:6.0f} MB ({memory:5.1f} ×)"
    apart = {
        distance: max((abs(value - own["found"][distance][column]) for column, value in each.items()), default=np.nan)
        for distance, each in result["found"].items()
    }
    print(told, " largest difference:", ", ".join(f"{key} {value:.2g}" for key, value in apart.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without Evidently and NannyML, and one round")
    parser.add_argument("--folder", type=Path, help="where data and environments are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        return measure(options.tool, options.folder, options.rounds, options.times)
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        here = Path(sys.executable)
        own = run(here, "ours", folder, rounds)
        if "error" in own:
            raise SystemExit(own["error"])
        for tool in ("ours", "profiles", "scipy"):
            show(tool, own if tool == "ours" else run(here, tool, folder, rounds), own)
        for tool in () if options.quick else tuple(PACKAGES):
            show(tool, run(environment(tool, folder), tool, folder, rounds), own)
        ten = run(here, "ours", folder, 1, times=10)
        if "error" not in ten:
            grown = ten["seconds"] / own["seconds"]
            print(f"ten times the rows: {ten['seconds']:.2f} s ({grown:.1f} ×), +{ten['megabytes']:.0f} MB")


if __name__ == "__main__":
    main()
