"""What the tests share."""

from pathlib import Path

import pytest

from mlops_course.environment import Settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def workspace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of whoever runs it, or writes into their workspace."""
    for name in ("SEED", "THREADS", "TRACKING_URI"):
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
