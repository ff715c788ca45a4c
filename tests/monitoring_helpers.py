"""Rows in service that are made up, so that the truth about them is known."""

import numpy as np
import pandas as pd


def served_rows(
    days: int, rows: int = 300, begin: str = "2013-04-01", wrong: float = 0.0, seed: int = 1
) -> pd.DataFrame:
    """Rows in service whose scores mean what they say, but for a constant."""
    random = np.random.default_rng(seed)
    score = random.beta(1.5, 4, days * rows)
    time = pd.Timestamp(begin, tz="America/New_York") + pd.to_timedelta(np.repeat(np.arange(days), rows), unit="D")
    label = (random.random(len(score)) < np.clip(score + wrong, 0, 1)).astype(float)
    return pd.DataFrame({"scheduled_departure": time + pd.Timedelta(hours=12), "score": score, "label": label})
