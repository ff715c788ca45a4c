"""Writes what Prometheus and Grafana read, from the pages that define it: rules about the promises, and the dashboard.

    python tools/observe.py            writes; a test proves that what is committed is what this makes
"""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from mlops_course.environment import write_atomic
from mlops_course.monitoring.objectives import slo_rules

ROOT = Path(__file__).resolve().parent.parent


def pages() -> str:
    """Where the web pages are."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]


def made() -> dict[Path, str]:
    """Each file that is made, and its content."""
    return {ROOT / "deploy" / "prometheus" / "slo.yml": slo_rules(pages())}


if __name__ == "__main__":
    for path, content in made().items():
        write_atomic(path, content)
        print(path.relative_to(ROOT))
