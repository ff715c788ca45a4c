"""What the tests share."""

import json
import logging
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from mlops_course.data import build_features, ingest, labelled_features, month_after, validate
from mlops_course.environment import Settings
from mlops_course.experiments import make_store
from mlops_course.project import flight_delay, read_delivery

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait don't spin: tests may share a busy machine
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # whoever starts the tests in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest_plugins = ["browser_helpers", "service_helpers", "delivery_helpers", "redis_helpers", "run_rules"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens to now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


LONGEST = (  # in this order: they take a minute and more, the first ones several
    "test_lessons.py", "test_image.py", "test_replay.py", "test_registry_changes.py", "test_delivery.py",
    "test_production.py", "test_use_cases.py", "test_workflows.py", "test_pages.py", "test_cache.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with many slow tests: the short ones fill up the rest of the time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (order.get(item.path.name, len(order)), -slow[item.path]))  # stable: else as it was


@pytest.fixture(scope="session", autouse=True)
def keys_of_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is started for several tests knows no key to verify with, whatever whoever runs the tests has."""
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("MLOPS_COURSE_TRUST", str(tmp_path_factory.mktemp("nobody") / "trust"))
        yield


@pytest.fixture(autouse=True)
def workspace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of whoever runs it, or writes into their workspace."""
    own = "SEED THREADS TRACKING_URI FEATURES_URL GUARD_URL USE_CASE STORAGE KEYS_FILE FOUR_EYES"
    for name in own.split():
        monkeypatch.delenv(f"MLOPS_COURSE_{name}", raising=False)
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(tmp_path / "workspace"))
    monkeypatch.setenv("MLOPS_COURSE_TRUST", str(tmp_path / "trust"))


@pytest.fixture(autouse=True)
def messages_are_heard() -> None:
    """A lesson or a service that was run in this process may have wanted its quiet; the next test wants to hear."""
    for name in ("mlops_course", "mlops_course.serving", "mlops_course.security", "papermill", "traitlets"):
        logger = logging.getLogger(name)
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)


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
    made: Path  # where it was made: as it was in the beginning, with the deliveries that the tables were made of

    @property
    def source(self) -> Path:
        """The deliveries that the tables were made of."""
        return self.made / "source"

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
        shutil.copytree(self.made / "workspace", home, dirs_exist_ok=True)
        return replace(self, settings=settings_in(home))


def settings_in(home: Path) -> Settings:
    """Settings that depend on nobody's environment."""
    nothing = dict.fromkeys(("threads", "tracking_uri", "features_url", "use_case", "storage"))
    return Settings(home=home, seed=2013, **nothing).prepare()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of a test run fills and all others read, when there are several."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an MLflow store in which nothing is: making one takes seconds."""
    return made_once(tmp_path_factory, "store", lambda folder: make_store(settings_in(folder))) / "mlflow.db"


def make_quarter(folder: Path) -> None:
    """Take in the deliveries, check them, build the features; say what they are called."""
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
    (folder / "names.json").write_text(json.dumps({"tables": tables, "features": features}), encoding="utf-8")


@pytest.fixture(scope="session")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Quarter:
    """Shared by the tests of a process: they read its tables and train in it, and neither change them nor register."""
    made = made_once(tmp_path_factory, "quarter", make_quarter)
    home = shutil.copytree(made / "workspace", tmp_path_factory.mktemp("quarter") / "workspace")
    return Quarter(settings_in(home), made=made, **json.loads((made / "names.json").read_text(encoding="utf-8")))


@pytest.fixture
def own_quarter(quarter: Quarter, tmp_path: Path) -> Quarter:
    """One that the test may change as it likes: it begins with an empty tracking store."""
    return quarter.fresh(tmp_path / "workspace")
