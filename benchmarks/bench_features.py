"""How long do the features of a year take, beside plain pandas, and how does that grow with the data?

All 336,776 flights of 2013, every feature, each measurement in a process of its own, which also says how much memory it
took. There are two pandas versions, and both must give the same values in every column. The straightforward one puts
events and questions under each other and takes `groupby().rolling()`. The clever one takes `groupby().cumsum()` and
`merge_asof` at both ends of each window: the same idea as ours. Both have integer keys and no Python loop over rows.
Then the year is repeated, each time 364 days later, with the same airports, carriers and aircraft, and kept in tables
by month. From there the features are built as a pipeline builds them, read and written, some months at a time with the
history before them: a flight should take as long at ten years as at one, the memory should not grow, and the features
should be the same, to the last bit, whichever way the years are cut. The budget is 5 s for a year on 2 threads.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

BUDGET = 5.0  # seconds for a year on 2 threads
RUNS = {
    "ours, 2 threads": ("ours", 2),
    "ours, 1 thread": ("ours", 1),
    "pandas, rolling": ("straightforward", 1),
    "pandas, cumsum + merge_asof": ("clever", 1),
}
GROWTH = 1.3  # how much more time of a flight, and memory, the largest size may take than one year
AT_ONCE = (12, 1)  # months in memory together; the first is what a pipeline does, and what is judged


def year(copies: int) -> dict:
    """The clean tables of 2013, repeated."""
    import pandas as pd

    from mlops_course.data import conform
    from mlops_course.project import find_file, flight_delay, read_file, supplier_folder

    tables = {
        table.name: conform(read_file(find_file(supplier_folder(), table.name)), table.contract())
        for table in flight_delay.tables
    }
    for name in ("flights", "weather"):
        later = [pd.Timedelta(days=364 * copy) for copy in range(copies)]
        parts = (tables[name].assign(time_hour=tables[name]["time_hour"] + shift) for shift in later)
        tables[name] = pd.concat(parts, ignore_index=True)
    return tables


def keep(home: str, copies: int) -> None:
    """Write the years into the tables of a workspace, one at a time."""
    import pandas as pd

    from mlops_course.data import replace_months
    from mlops_course.environment import Settings
    from mlops_course.project import NEW_YORK, flight_delay

    settings, tables, rest = Settings(home=home).prepare(), year(1), {}
    for table in flight_delay.tables:
        frame = tables[table.name]
        if table.period is None:
            replace_months(settings, table.name, frame.assign(period="all"))
            continue
        for copy in range(copies):
            later = frame.assign(time_hour=frame["time_hour"] + pd.Timedelta(days=364 * copy))
            period = later["time_hour"].dt.tz_convert(NEW_YORK).dt.strftime("%Y-%m")
            later = pd.concat([rest.pop(table.name, None), later.assign(period=period)], ignore_index=True)
            last = later["period"] == later["period"].max() if copy < copies - 1 else later["period"] == ""
            rest[table.name] = later[last]  # the next year begins in it
            replace_months(settings, table.name, later[~last])


def piecewise(home: str, at_once: int) -> dict:
    """Build the features of all that a workspace holds, some months at a time."""
    from mlops_course.data import build_features, newest_reference, partition_rows
    from mlops_course.environment import Settings
    from mlops_course.project import flight_delay

    settings = Settings(home=home)
    tables = {table.name: newest_reference(settings, table.name) for table in flight_delay.tables}
    rows = partition_rows(settings, tables["flights"])
    shutil.rmtree(settings.data / "features", ignore_errors=True)
    before, began, worked = peak(), time.perf_counter(), time.process_time()
    reference = build_features(settings, flight_delay, tables, min(rows), max(rows), at_once)
    found = {"who": "pieces", "at_once": at_once, "flights": sum(rows.values()), "months": len(rows)}
    found |= {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
    found |= {"peak_megabytes": peak(), "megabytes_before": before}
    return found | {"digest": digest(settings, reference, list(rows))}


def digest(settings: object, reference: str, months: list[str]) -> str:
    """One number for all values of all columns, whatever the order of the rows."""
    import pandas as pd

    from mlops_course.data import read_table

    total = 0
    for month in months:
        total += int(pd.util.hash_pandas_object(read_table(settings, reference, [month]), index=False).sum())
    return f"{total % 2**64:016x}"


# ---------------------------------------------------------------------------------------------------------------------
# The pandas version

KEYS = {
    "system": [], "origin": ["origin"], "carrier": ["carrier"], "dest": ["dest"], "route": ["origin", "dest"],
    "origin_carrier": ["origin", "carrier"], "origin_hour": ["origin", "hour"], "flight_number": ["carrier", "flight"],
    "aircraft": ["tailnum"],
}  # fmt: skip
ARRIVED = {  # group: window: statistics
    "system": {"2d": "late_rate mean_delay"},
    "origin": {"2h": "mean_delay", "6h": "mean_delay", "2d": "late_rate mean_delay"},
    "carrier": {"2h": "mean_delay", "6h": "mean_delay", "7d": "late_rate mean_delay", "28d": "late_rate mean_delay"},
    "origin_hour": {"7d": "late_rate mean_delay", "28d": "late_rate mean_delay"},
    "route": {"6h": "overrun", "7d": "late_rate mean_delay", "28d": "late_rate mean_delay overrun"},
    "dest": {
        "2h": "mean_delay", "6h": "mean_delay overrun", "7d": "late_rate mean_delay", "28d": "late_rate mean_delay"
    },
    "flight_number": {"7d": "late_rate mean_delay count", "28d": "late_rate mean_delay count"},
    "aircraft": {"7d": "late_rate mean_delay count", "28d": "late_rate mean_delay count"},
}  # fmt: skip
BOTH = "departure_delay departed_late"
LEFT = {
    "system": dict.fromkeys(("30m", "1h", "2h", "6h"), BOTH),
    "origin": dict.fromkeys(("30m", "1h", "2h", "6h"), BOTH),
    "carrier": dict.fromkeys(("2h", "6h"), BOTH),
    "origin_carrier": dict.fromkeys(("2h", "6h"), BOTH),
    "dest": dict.fromkeys(("2h", "6h"), "departure_delay"),
}
OVERDUE = ("system", "origin", "carrier", "origin_carrier", "dest")
WEATHER = {
    "temp": "temperature", "dewp": "dew_point", "humid": "humidity", "wind_dir": "wind_direction",
    "wind_speed": "wind_speed", "wind_gust": "wind_gust", "precip": "precipitation", "pressure": "pressure",
    "visib": "visibility",
}  # fmt: skip
CHANGES = ("temperature", "humidity", "wind_speed", "precipitation", "pressure", "visibility")
CARIBBEAN = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")


class Clever:
    """The same features, with pandas alone: running sums, looked up at both ends of each window."""

    def __init__(self, tables: dict) -> None:
        import pandas as pd

        self.pd, self.tables = pd, tables
        keys = ["time_hour", "minute", "carrier", "flight", "origin"]
        self.flights = tables["flights"].sort_values(keys, ignore_index=True)

    def features(self) -> object:
        """All of them, as float32, in the order of time."""
        self.clock()
        columns = self.schedule() | self.weather()
        for group, windows in ARRIVED.items():
            columns |= self.windows(group, "arrived", windows, ("late_rate", "mean_delay", "overrun"))
        for group, windows in LEFT.items():
            columns |= self.windows(group, "left", windows, ("departure_delay", "departed_late"))
        for group in OVERDUE:
            columns |= self.overdue(group)
        for steps in (1, 2):
            columns |= self.previous_leg(steps)
        return self.pd.DataFrame(columns).astype("float32")

    def clock(self) -> None:
        """When each flight should leave, is asked about, left and arrived."""
        pd, flights = self.pd, self.flights
        flights["scheduled"] = flights["time_hour"] + pd.to_timedelta(flights["minute"], unit="m")
        flights["asked"] = flights["scheduled"] - pd.Timedelta(hours=2)
        zones = CARIBBEAN | self.tables["airports"].dropna().set_index("faa")["tzone"].to_dict()
        local = pd.Series(index=flights.index, dtype="datetime64[us]")
        for zone, some in flights.groupby(flights["dest"].map(zones).fillna("America/New_York")):
            local[some.index] = some["scheduled"].dt.tz_convert(zone).dt.tz_localize(None)
        arrival = flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100
        flights["block"] = (arrival - local.dt.hour * 60 - local.dt.minute) % 1440
        flights["left"] = flights["scheduled"] + pd.to_timedelta(flights["dep_delay"], unit="m")
        flights["arrived"] = flights["scheduled"] + pd.to_timedelta(flights["block"] + flights["arr_delay"], unit="m")
        flights["late_rate"], flights["mean_delay"] = flights["arr_delay"] > 15, flights["arr_delay"]
        flights["overrun"] = flights["arr_delay"] - flights["dep_delay"]
        flights["departure_delay"], flights["departed_late"] = flights["dep_delay"], flights["dep_delay"] > 15
        for group, keys in KEYS.items():
            flights[f"key_{group}"] = flights.groupby(keys).ngroup() if keys else 0
        flights["key_aircraft"] = flights["key_aircraft"].where(flights["tailnum"].notna(), -1).astype("int64")

    def schedule(self) -> dict:
        """What has been known for weeks."""
        flights, planes = self.flights, self.tables["planes"].set_index("tailnum")
        hourly = {"origin": ["origin"], "origin_carrier": ["origin", "carrier"], "dest": ["dest"]}
        return {
            "scheduled_hour": flights["hour"],
            "scheduled_minute_of_day": flights["sched_dep_time"] // 100 * 60 + flights["sched_dep_time"] % 100,
            "scheduled_arrival_minute_of_day": flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100,
            "weekday": flights["time_hour"].dt.tz_convert("America/New_York").dt.weekday,
            "block_minutes": flights["block"], "distance": flights["distance"],
            "planned_speed": flights["distance"] / flights["block"].clip(lower=1),
            "seats": flights["tailnum"].map(planes["seats"]),
            "aircraft_age": flights["year"] - flights["tailnum"].map(planes["year"]),
        } | {
            f"departures_same_hour_{name}": flights.groupby([*keys, "time_hour"])["flight"].transform("size")
            for name, keys in hourly.items()
        }  # fmt: skip

    def weather(self) -> dict:
        """The newest report that was out, and its change over four hours."""
        pd, asked = self.pd, self.flights[["asked", "origin"]]
        reports = self.tables["weather"].rename(columns=WEATHER)
        reports["asked"] = reports["time_hour"] + pd.Timedelta(hours=1)
        reports = reports.astype(dict.fromkeys(WEATHER.values(), "float32")).sort_values("asked")
        reports = reports[["asked", "origin", *WEATHER.values()]]
        tolerance = pd.Timedelta(hours=6) - pd.Timedelta(minutes=1)
        now = pd.merge_asof(asked, reports, on="asked", by="origin", tolerance=tolerance)
        earlier = asked.assign(asked=asked["asked"] - pd.Timedelta(hours=4))
        before = pd.merge_asof(earlier, reports, on="asked", by="origin", tolerance=tolerance)
        changes = {f"{name}_change_4h": now[name] - before[name] for name in CHANGES}
        return {name: now[name] for name in WEATHER.values()} | changes

    def windows(self, group: str, known: str, windows: dict, values: Iterable[str]) -> dict:
        """Means over what became known in windows: sums up to their end less sums up to their start."""
        pd, key, columns = self.pd, f"key_{group}", {}
        used = [name for name in values if any(name in statistics.split() for statistics in windows.values())]
        events = self.flights.loc[self.flights[known].notna() & (self.flights[key] >= 0), [known, key, *used]]
        events = events.assign(count=1).sort_values(known)
        sums = events.groupby(key)[[*used, "count"]].cumsum().assign(**{known: events[known], key: events[key]})
        queries = self.flights[["asked", key]]
        end = pd.merge_asof(queries, sums, left_on="asked", right_on=known, by=key)[[*used, "count"]].fillna(0)
        for window, statistics in windows.items():
            from_here = queries.assign(asked=queries["asked"] - pd.Timedelta(window.replace("m", "min")))
            start = pd.merge_asof(from_here, sums, left_on="asked", right_on=known, by=key)[[*used, "count"]].fillna(0)
            inside = end - start
            for name in statistics.split():
                mean = inside[name] if name == "count" else inside[name] / inside["count"].where(inside["count"] > 0)
                columns[f"{name}_{group}_{window}"] = mean
        return columns

    def overdue(self, group: str) -> dict:
        """Flights that began to wait, less those that stopped, and the same for the sum of their schedules."""
        pd, flights, key = self.pd, self.flights, f"key_{group}"
        patience = flights["scheduled"] + pd.Timedelta(hours=6)
        gone = flights["left"].clip(lower=flights["scheduled"]).fillna(patience).clip(upper=patience)
        minute = (flights["scheduled"] - flights["scheduled"].iloc[0]).dt.total_seconds() // 60
        totals = []
        for event in (flights["scheduled"], gone):
            events = pd.DataFrame({"asked": event, key: flights[key], "minute": minute, "count": 1}).sort_values(
                "asked"
            )
            sums = events.groupby(key)[["minute", "count"]].cumsum()
            sums = sums.assign(asked=events["asked"], **{key: events[key]})
            merged = pd.merge_asof(flights[["asked", key]], sums, on="asked", by=key)
            totals.append(merged[["minute", "count"]].fillna(0))
        waiting = totals[0] - totals[1]
        return {
            f"overdue_{group}": waiting["count"],
            f"overdue_minutes_{group}": (minute - 120) * waiting["count"] - waiting["minute"],
        }

    def previous_leg(self, steps: int) -> dict:
        """The aircraft's earlier flight, as it looked when asked."""
        pd, flights = self.pd, self.flights
        wanted = ["scheduled", "left", "arrived", "block", "dep_delay", "arr_delay"]
        leg = flights.groupby("tailnum")[wanted].shift(steps)
        gap = (flights["scheduled"] - leg["scheduled"]).dt.total_seconds() / 60
        gap = gap.where(gap < 2 * 1440)
        asked, there = flights["asked"], gap.notna()
        state = pd.Series(0.0, index=flights.index).where(there)
        delay = pd.Series(float("nan"), index=flights.index)
        waited = (asked - leg["scheduled"]).dt.total_seconds() / 60
        steps_of = ((1, "scheduled", waited), (2, "left", leg["dep_delay"]), (3, "arrived", leg["arr_delay"]))
        for number, event, value in steps_of:
            reached = there & (leg[event] <= asked)
            state, delay = state.mask(reached, number), delay.mask(reached, value)
        slack = gap - 2 * leg["block"]
        values = {"state": state, "delay": delay, "gap": gap, "slack": slack, "slack_left": slack - delay.fillna(0)}
        return {f"previous_leg_{steps}_{name}": value for name, value in values.items()}


class Straightforward(Clever):
    """The same, but with the rolling windows that pandas offers."""

    def windows(self, group: str, known: str, windows: dict, values: Iterable[str]) -> dict:
        """Means over rolling windows of events, read off at rows that are questions."""
        pd, key, columns = self.pd, f"key_{group}", {}
        used = [name for name in values if any(name in statistics.split() for statistics in windows.values())]
        events = self.flights.loc[self.flights[known].notna() & (self.flights[key] >= 0), [known, key, *used]]
        events = events.astype(dict.fromkeys(used, "float64")).rename(columns={known: "time"}).assign(count=1.0)
        questions = self.flights[["asked", key]].rename(columns={"asked": "time"}).assign(flight=self.flights.index)
        rows = pd.concat([events, questions], ignore_index=True)
        rows = rows.sort_values([key, "time"], kind="stable", ignore_index=True)  # at the same time, events go first
        asked = rows["flight"].notna().to_numpy()
        flight = rows["flight"][asked].astype("int64")
        for window, statistics in windows.items():
            names = statistics.split()
            rolling = rows.groupby(key)[["time", *names]].rolling(window.replace("m", "min"), on="time")
            means = pd.DataFrame(rolling[names].mean().to_numpy()[asked], flight, names).sort_index()
            if "count" in names:
                means["count"] = pd.Series(rolling["count"].sum().to_numpy()[asked], flight).sort_index().fillna(0)
            columns |= {f"{name}_{group}_{window}": means[name] for name in names}
        return columns


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def fastest(work: Callable[[], object], repeat: int) -> tuple[float, object]:
    """The shortest time of some tries, and the last result."""
    times, result = [], None
    for _ in range(repeat):
        del result
        begin = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - begin)
    return min(times), result


def peak() -> float:
    """The most memory that this process has held, megabytes."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(who: str, threads: int, copies: int, repeat: int) -> dict:
    """One measurement, in this process."""
    from mlops_course.project.features import flight_features

    tables = year(copies)
    few = tables | {"flights": tables["flights"].head(5000)}
    ours = {
        few_or_all: (lambda some=some: flight_features(some, threads)) for few_or_all, some in ((0, few), (1, tables))
    }
    plain = {"straightforward": Straightforward, "clever": Clever}.get(who, Clever)
    pandas = {key: (lambda some=some: plain(some).features()) for key, some in ((0, few), (1, tables))}
    work = ours if who == "ours" else pandas
    work[0]()  # imports, and whatever else happens once
    before = peak()
    seconds, result = fastest(work[1], repeat)
    found = {"who": who, "threads": threads, "copies": copies, "flights": len(tables["flights"]), "seconds": seconds}
    found |= {"peak_megabytes": peak(), "megabytes_before": before}
    return found if who == "ours" else found | compare(result, ours[1]())


def compare(pandas: object, ours: object) -> dict:
    """In which columns both give the same values, bit for bit."""
    names = [name for name in ours.columns if ours[name].dtype == "float32"]
    different = [name for name in names if name not in pandas or not ours[name].equals(pandas[name])]
    return {"columns": len(names), "different": different, "unknown": sorted(set(pandas.columns) - set(names))}


def in_a_process(work: str, *arguments: object) -> dict:
    """One call, in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([work, *arguments])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grow(sizes: Iterable[int], say: Callable[[dict, str], object]) -> dict[str, dict]:
    """The features of one year and of many, from tables, cut in several ways."""
    found = {}
    for copies in sizes:
        with tempfile.TemporaryDirectory() as home:
            in_a_process("keep", home, copies)
            for at_once in AT_ONCE:
                name = f"{copies} x year, {at_once} months at once"
                found[name] = in_a_process("piecewise", home, at_once)
                say(found[name], name)
    return found


def show(found: dict, name: str) -> None:
    """One line of the table."""
    per_million = found["seconds"] / found["flights"] * 1e6
    print(f"{name:<28}{found['flights']:>11,}{found['seconds']:>10.2f}{per_million:>14.2f}", end="")
    print(f"{found['peak_megabytes']:>14,.0f}{found['megabytes_before']:>14,.0f}", flush=True)


def main() -> int:
    """Print the table, or JSON; 1 when over budget, when values differ, or when time grows faster than the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2, help="the fastest of so many counts, for one year")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 10], help="how many times the year")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work, *arguments = json.loads(options.measure)
        print(json.dumps({"measure": measure, "keep": keep, "piecewise": piecewise}[work](*arguments)))
        return 0
    say = (lambda *_: None) if options.json else show
    if not options.json:
        print(f"{'':<28}{'flights':>11}{'seconds':>10}{'s/million':>14}{'peak MB':>14}{'MB before':>14}")
    beside = {}
    for name, (who, threads) in RUNS.items():
        beside[name] = in_a_process("measure", who, threads, 1, options.repeat)
        say(beside[name], name)
    return judge(beside, grow(options.sizes, say), options.json)


def growth_of(growth: dict) -> tuple[float, float, bool]:
    """How much more time a flight takes and memory is held at the largest size, and whether all cuts agree."""
    runs = list(growth.values())
    if len(runs) < 2 * len(AT_ONCE):
        return 1.0, 1.0, True
    small, large = runs[: len(AT_ONCE)], runs[-len(AT_ONCE) :]
    each = [[found["processor_seconds"] / found["flights"] for found in some] for some in (small, large)]
    time_factor = each[1][0] / each[0][0]  # as a pipeline does it: twelve months at once
    memory = large[0]["peak_megabytes"] / small[0]["peak_megabytes"]
    return time_factor, memory, all(len({found["digest"] for found in some}) == 1 for some in (small, large))


def judge(beside: dict, growth: dict, as_json: bool) -> int:
    """Say what the figures mean."""
    ours, alone, *pandas = beside.values()
    factor, memory, alike = growth_of(growth)
    same = not any(found["different"] or found["unknown"] for found in pandas)
    good = ours["seconds"] <= BUDGET and same and alike and max(factor, memory) <= GROWTH
    if as_json:
        summary = {"growth_per_flight": factor, "growth_of_memory": memory, "same_values": same and alike, "good": good}
        print(json.dumps({"beside": beside, "growth": growth} | summary, indent=2))
        return 0 if good else 1
    for name, found in list(beside.items())[2:]:
        two, one = (found["seconds"] / run["seconds"] for run in (ours, alone))
        print(f"{name}: takes {two:.1f} times as long as ours on 2 threads, {one:.1f} times as long as on 1; ", end="")
        print(f"{found['columns']} columns compared, {found['different'] or 'all the same to the last bit'}")
    if growth:
        print(f"at the largest size a flight takes {factor:.2f} times as long (time of the processors) as at one year,")
        print(f"and {memory:.2f} times as much memory is held; up to {GROWTH} is good")
        print(
            f"however the months are cut, the features are {'the same, to the last bit' if alike else 'NOT the same'}"
        )
    print(f"budget {BUDGET} s for a year on 2 threads: {'kept' if ours['seconds'] <= BUDGET else 'over'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
