"""What the tests of lessons share."""

from pathlib import Path
from typing import Any

import papermill

from mlops_course.course.lessons import find_lessons, read_lesson, read_notebook, tags

CHECKED = [lesson for lesson in map(read_lesson, find_lessons()) if lesson.exercises]
Cell = dict[str, Any]


def run_in_a_kernel(notebook: Path, target: Path) -> list[Cell]:
    """All cells as papermill leaves them, run by a stock Jupyter kernel."""
    papermill.execute_notebook(
        str(notebook),
        str(target),
        cwd=str(notebook.parent),
        progress_bar=False,
        log_output=False,
        kernel_name="python3",
    )
    parameters = {"injected-parameters"}
    return [cell for cell in read_notebook(target)["cells"] if not parameters & tags(cell)]
