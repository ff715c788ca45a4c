"""The page about drift: whole in a browser without network, wide and narrow, by day and by night; data stay data."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser_helpers import CHROMIUM, open_offline

from mlops_course.monitoring.comparing import drift
from mlops_course.monitoring.drift_page import write_drift_page

EVIL = "<script>document.title='taken'</script><img src=x onerror=alert(1)>&\"'"


def frames(columns: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A past, and thirty days of which the last ten are shifted in every fourth column."""
    random = np.random.default_rng(12)
    past, now = (pd.DataFrame(random.normal(5, 1, (3000, columns))) for _ in range(2))
    past.columns = now.columns = pd.Index([f"column number {number}" for number in range(columns)])
    now["day"] = np.repeat([f"2013-03-{day:02d}" for day in range(1, 31)], 100)
    now.loc[now["day"] > "2013-03-20", now.columns[:columns:4]] += 4
    past[EVIL], now[EVIL] = "calm", EVIL
    now["numbers"], past["numbers"] = "1", 1.0
    return past, now.drop(columns="column number 1")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    past, now = frames(198)
    table = drift(past, now.drop(columns="day"))
    return write_drift_page(tmp_path_factory.mktemp("page") / "drift.html", past, now, table, "day", "March & April")


def test_it_says_which_how_much_since_when_and_which_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert "<title>March &amp; April</title>" in text
    assert "An alarm for 53 of 200 columns." in text, "50 shifted, one absent, one that is text, one of new text"
    assert "<p>Since 2013-03-21.</p>" in text and "absent from the current data" in text
    assert "numbers have become text" in text and "<caption>Rows from the bins of column number 0 that grew" in text
    assert not any(words in text for words in ("http:", "https:", "url(", "@import", "<script", "<img"))


def test_nothing_to_say_is_a_page_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0] * 100})
    assert "An alarm for 0 of 1 column." in write_drift_page(tmp_path / "calm.html", frame, frame).read_text()


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_whole_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    shown, complaints = open_offline(browser, page, width, scheme)
    assert complaints == [] and shown.title() == "March & April"
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.locator("h1").count() == 1 and shown.locator("section h2").count() == 30
    assert shown.locator("table").count() == shown.locator("table > caption").count()
    assert shown.locator("svg").count() == shown.locator("svg > title").count() > 30
    assert shown.locator("table").last.locator("tbody tr").count() == 200
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")
    shown.context.close()
