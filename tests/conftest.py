"""What the tests share."""

import os
import shutil
import signal
import socket
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from mlops_course.data import build_features, ingest, labelled_features, month_after, validate
from mlops_course.environment import Settings
from mlops_course.experiments import make_store
from mlops_course.project import flight_delay, read_delivery

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait don't spin: tests may share a busy machine
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # whoever starts the tests in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest_plugins = ["service_helpers", "delivery_helpers", "run_rules"]  # fixtures; options of .ci/run
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens to now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


LONGEST = ("test_image.py", "test_lessons.py")  # the first waits for downloads, and the second has much to compute


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with many slow tests: the short ones fill up the rest of the time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name not in LONGEST, -slow[item.path]))  # stable: otherwise as it was


@pytest.fixture(autouse=True)
def workspace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of whoever runs it, or writes into their workspace."""
    for name in ("SEED", "THREADS", "TRACKING_URI", "FEATURES_URL", "USE_CASE", "STORAGE"):
        monkeypatch.delenv(f"MLOPS_COURSE_{name}", raising=False)
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(tmp_path / "workspace"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with the test's own workspace, the one that programs started by the test use too."""
    return Settings(home=tmp_path / "workspace").prepare()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@dataclass(frozen=True)
class Quarter:
    """A workspace with every fifth flight of January to March 2013 in its tables, and an empty tracking store."""

    settings: Settings
    tables: dict[str, str]  # references to the clean tables
    features: str  # reference to the features

    @property
    def source(self) -> Path:
        """The deliveries that the tables were made of."""
        return self.settings.home.parent / "source"

    @property
    def rows(self) -> str:
        """Reference to the clean flights."""
        return self.tables["flights"]

    def labelled(self, first: str, last: str | None = None) -> pd.DataFrame:
        """Features and labels of some months."""
        return labelled_features(self.settings, flight_delay, self.features, self.rows, first, last or first)

    def copy(self, home: Path) -> "Quarter":
        """The same in another folder, with models of its own."""
        shutil.copytree(self.settings.home, home, dirs_exist_ok=True)
        return replace(self, settings=settings_in(home))

    def fresh(self, home: Path) -> "Quarter":
        """As it was in the beginning, in another folder: the tracking store is empty."""
        shutil.copytree(self.settings.home.parent / "template", home, dirs_exist_ok=True)
        return replace(self, settings=settings_in(home))


def settings_in(home: Path) -> Settings:
    """Settings that depend on nobody's environment."""
    nothing = dict.fromkeys(("threads", "tracking_uri", "features_url", "use_case", "storage"))
    return Settings(home=home, seed=2013, **nothing).prepare()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an MLflow store in which nothing is: making one takes seconds."""
    settings = settings_in(tmp_path_factory.mktemp("store"))
    make_store(settings)
    return settings.home / "mlflow.db"


@pytest.fixture(scope="session")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Quarter:
    """Shared by all tests: they read its tables and train in it, and neither change a table nor register a model."""
    folder = tmp_path_factory.mktemp("quarter")
    settings, periods = settings_in(folder / "workspace"), [month_after("2013-01", steps) for steps in range(3)]
    for month in periods:
        source = folder / "source" / month
        source.mkdir(parents=True)
        for name, table in read_delivery(month).items():
            (table.iloc[::5] if name == "flights" else table).to_parquet(source / f"{name}.parquet", index=False)
        delivery = ingest(settings, flight_delay, month, folder / "source")
    tables = validate(settings, flight_delay, delivery.tables, periods).tables
    features = build_features(settings, flight_delay, tables, periods[0], periods[-1])
    make_store(settings)
    shutil.copytree(settings.home, folder / "template")
    return Quarter(settings, tables, features)


@pytest.fixture
def own_quarter(quarter: Quarter, tmp_path: Path) -> Quarter:
    """One that the test may change as it likes: it begins with an empty tracking store."""
    return quarter.fresh(tmp_path / "workspace")
