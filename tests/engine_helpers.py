"""Notebooks for the engine's tests, and what may be compared of them."""

import itertools
import os
import re
from pathlib import Path
from typing import Any

import nbformat

from mlops_course.pipelines.engine.requests import Request
from mlops_course.pipelines.engine.workers import Workers

PRELOAD = ["numpy", "pandas", "matplotlib.pyplot", "rich", "mlflow"]  # loaded ahead, they must behave the same


def write_notebook(path: Path, cells: dict[str, str] | list[str], tags: tuple[str, ...] = ()) -> Path:
    sources = list(cells.values()) if isinstance(cells, dict) else cells
    made = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def request(notebook: Path, folder: Path, **more: Any) -> Request:
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return Request(notebook, folder / "out.ipynb", {}, folder, environment, **more)


def run(kind: str, notebook: Path, folder: Path) -> Any:
    with Workers(kind, preload=PRELOAD if kind == "fork" else ()) as workers:
        workers.execute(request(notebook, folder, timeout=120))
    return nbformat.read(folder / "out.ipynb", 4)


def normal(text: Any) -> Any:
    """Without what differs between any two runs: process ids, addresses, times, folders."""
    if isinstance(text, dict):
        return {key: normal(value) for key, value in text.items()}
    if isinstance(text, list):
        return [normal(value) for value in text]
    if not isinstance(text, str):
        return text
    text = re.sub(r"ipykernel_\d+/\d+\.py", "ipykernel_N/N.py", text)
    text = re.sub(r"\(\d+\.py, line", "(N.py, line", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0xN", text)
    text = re.sub(r"(pytest-\d+|(kernel|fork|spawn)\d+)", "N", text)
    text = re.sub(r"<dc:date>.*?</dc:date>", "", text)
    return re.sub(r"\d[\d.e+]* (ns|[mμµ]?s)\b", "T", text)


def comparable(cell: Any) -> list[Any]:
    """A cell's outputs; texts between two other outputs are put together, first stdout, then stderr.

    How the stock kernel cuts and interleaves the two streams depends on when its timer strikes.
    """
    found: list[Any] = []
    for is_text, group in itertools.groupby(cell.outputs, key=lambda output: output.output_type == "stream"):
        outputs = [dict(output) for output in group]
        if is_text:
            texts = {name: "".join(o["text"] for o in outputs if o["name"] == name) for name in ("stdout", "stderr")}
            outputs = [{"output_type": "stream", "name": name, "text": text} for name, text in texts.items() if text]
        found += [normal(output) for output in outputs]
    return found
