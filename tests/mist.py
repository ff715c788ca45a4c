"""A second use case, as somebody else would write it: will it be misty within three hours? Real weather, hour by hour.

Its features are pandas' float64, integers, and true or false; it has no categories, no slices and no words of its own.
"""

from datetime import timedelta
from functools import cache
from pathlib import Path

import pandas as pd
import pandera.pandas as pandera

from mlops_course.framing import Costs
from mlops_course.project import SuccessMetrics, Table, UseCase, read_delivery

HOURS, CLEAR = 3, 8.0  # how far ahead; miles of visibility
NUMBERS = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


def read_reports(month: str, source: str | Path | None = None) -> dict[str, pd.DataFrame]:
    """One month of reports."""
    return {"reports": read_delivery(month, source, ("weather",))["weather"]}


@cache
def reports_contract() -> pandera.DataFrameSchema:
    """One row a station and hour."""
    whole = {name: pandera.Column("int64") for name in ("year", "month", "hour")}
    numbers = {name: pandera.Column("float64", nullable=True) for name in NUMBERS}
    names = {"origin": pandera.Column("str"), "time_hour": pandera.Column("datetime64[us, UTC]")}
    return pandera.DataFrameSchema({**names, **whole, **numbers}, name="reports")


def misty(reports: pd.DataFrame) -> pd.Series:
    """Whether a report of the next hours is misty; unknown where one of them is missing."""
    seen = reports.set_index(["origin", "time_hour"])["visib"]
    ahead = []
    for hours in range(1, HOURS + 1):
        later = reports["time_hour"] + pd.Timedelta(hours=hours)
        ahead.append(seen.reindex(pd.MultiIndex.from_arrays([reports["origin"], later])).to_numpy())
    worst = pd.DataFrame(ahead).T.min(axis=1, skipna=False).set_axis(reports.index)
    return (worst < CLEAR).astype("float64").where(worst.notna())


def make_features(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What is known when a report has come in."""
    reports = tables["reports"].sort_values(["origin", "time_hour"]).reset_index(drop=True)
    before = reports.groupby("origin")[["temp", "pressure", "visib"]].shift(HOURS)
    return reports[["origin", "time_hour", "period", *NUMBERS]].assign(
        due=reports["time_hour"] + pd.Timedelta(hours=HOURS),
        predicted_at=reports["time_hour"],
        spread=reports["temp"] - reports["dewp"],
        warmer=reports["temp"] - before["temp"],
        falling=reports["pressure"] < before["pressure"],
        visibility_before=before["visib"],
        hour_of_day=reports["hour"],
    )


mist = UseCase(
    name="mist",
    question="At each hour: will it be misty at the station within three hours?",
    tables=(Table("reports", reports_contract, key=("origin", "time_hour")),),
    read=read_reports,
    features="mist:make_features",
    label=misty,
    time="due",
    categorical=(),
    slices=(),
    time_zone="America/New_York",
    horizon=timedelta(hours=HOURS),
    lookback=timedelta(days=1),
    label_delay=timedelta(0),
    costs=Costs(missed=10, warning=2),
    success=SuccessMetrics(pr_auc=0.3, roc_auc=0.6, log_loss=0.6),
)
