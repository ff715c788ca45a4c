"""Predictions that were logged and collected, and all that a workspace holds as bytes."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from mlops_course.environment import Settings
from mlops_course.project import flight_delay
from mlops_course.serving.predictions import LoggedPrediction, PredictionLog, collect_predictions, log_folder

ONLINE = "flight-delay/predictions_online"
NOW = datetime(2013, 3, 1, tzinfo=UTC)


def key_of(flight: int, day: int = 1) -> dict[str, Any]:
    return {"time_hour": f"2013-02-{day:02}T10:00:00Z", "minute": 5, "carrier": "UA", "flight": flight, "origin": "EWR"}


def log_lines(settings: Settings, *lines: tuple[str, int], moment: datetime = NOW) -> PredictionLog:
    """A closed segment with a prediction for each pair of an id and a flight."""
    features, when = np.array([1, np.nan], dtype="<f4").tobytes(), moment.timestamp()
    log = PredictionLog(log_folder(settings, "flight-delay"))
    log.append([LoggedPrediction(id, when, "flight-delay@1", 0.5, True, features, key=key_of(f)) for id, f in lines])
    return log


def collected(settings: Settings, *lines: tuple[str, int], moment: datetime = NOW) -> str:
    log_lines(settings, *lines, moment=moment).close()
    return str(collect_predictions(settings, flight_delay).table)


def bytes_of(settings: Settings) -> bytes:
    """Everything that is in the workspace, but for the ledger and the statements."""
    files = [path for path in settings.home.rglob("*") if path.is_file() and "audit" not in path.parts]
    return b"\n".join(path.read_bytes() for path in files if path != settings.ledger)
