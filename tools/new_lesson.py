"""Makes the notebook of a new section, which passes as it is: `python tasks.py new-lesson 13 --name security`.

The text of the notebook stands in lesson_template.txt. It has all that a section needs, in the smallest form: four
exercises with hints, checks and wrong answers, a lab, a quiz. Write your own over it, piece by piece.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mlops_course.course.lessons import SECTIONS, find_lessons

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("lesson_template.txt")
SITE = ROOT / "_quarto.yml"


def cell_of(head: str, source: str, number: int, place: int) -> dict[str, Any]:
    """A cell; `head` is its kind, and perhaps its tags, as the template has them."""
    kind, *tags = head.split()
    metadata: dict[str, Any] = {"tags": tags} if tags else {}
    marked = re.match(r"# (Exercise|Check) (\d+)\.(\d+)$", source.partition("\n")[0])
    if marked:  # what nbgrader needs to know
        checks = marked[1] == "Check"
        metadata["nbgrader"] = {
            "grade": checks, "grade_id": f"{marked[1].lower()}-{marked[2]}-{marked[3]}", "locked": checks,
            "schema_version": 3, "solution": not checks, "task": False, **({"points": 1} if checks else {}),
        }  # fmt: skip
    cell = {"cell_type": kind, "id": f"s{number:02}c{place:03}", "metadata": metadata}
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {**cell, **code, "source": source.splitlines(keepends=True)}


def lesson(number: int, name: str, title: str) -> dict[str, Any]:
    """The notebook of a section, not yet run."""
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{N}", str(number)).replace("{name}", name).replace("{title}", title)
    parts = [part.partition("\n") for part in re.split(r"^%%% ", text, flags=re.MULTILINE)[1:]]
    cells = [cell_of(head, source.strip("\n"), number, place) for place, (head, _, source) in enumerate(parts)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "mlops_course": {"timeout": 60}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(path: Path) -> None:
    """Run the notebook once, so that what it shows is saved in it."""
    import papermill

    before = json.loads(path.read_text(encoding="utf-8"))
    done = path.with_suffix(".run.ipynb")
    how = {"engine_name": "mlops-course", "cwd": str(path.parent), "kernel_name": "python3"}
    try:
        papermill.execute_notebook(str(path), str(done), progress_bar=False, **how)
        made = json.loads(done.read_text(encoding="utf-8"))["cells"]
    finally:
        done.unlink(missing_ok=True)
    for cell, after in zip(before["cells"], made, strict=True):
        if cell["cell_type"] == "code":
            cell["outputs"] = after["outputs"]
    path.write_text(json.dumps(before, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def add_page(path: Path) -> None:
    """Name the page in the site's configuration, in the order of the sections."""
    pages = re.findall(r"^ +- (\d\d_\w+\.ipynb)$", SITE.read_text(encoding="utf-8"), re.MULTILINE)
    before = max((page for page in pages if page < path.name), default=pages[0])
    text = SITE.read_text(encoding="utf-8")
    text = re.sub(rf"^( +- ){re.escape(before)}$", rf"\g<0>\n\g<1>{path.name}", text, flags=re.MULTILINE)
    SITE.write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Make the notebook, unless the section has one."""
    parser = argparse.ArgumentParser(prog="new-lesson", description="Make the notebook of a new section.")
    parser.add_argument("number", type=int, help="the section's number")
    parser.add_argument("--name", required=True, help="of the module, such as security; the notebook is NN_name.ipynb")
    parser.add_argument("--title", help="default: the planned title of the section")
    options = parser.parse_args()
    planned = 1 <= options.number <= len(SECTIONS)
    if not options.title and not planned:
        parser.error(f"section {options.number} isn't among SECTIONS in nbs/internals/01_lessons.ipynb: give a --title")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", options.name):
        parser.error(f"--name is {options.name!r}, but should be the name of a module: letters, digits, underscores")
    if there := [path.name for path in find_lessons() if int(path.name[:2]) == options.number]:
        parser.error(f"section {options.number} has a notebook: {there[0]}")
    path = ROOT / "nbs" / f"{options.number:02}_{options.name}.ipynb"
    made = lesson(options.number, options.name, options.title or SECTIONS[options.number - 1][0])
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    run(path)
    add_page(path)
    print(f"Made {path.relative_to(ROOT)}, and a line for it in {SITE.name}.")
    print(f"Next: make lab to write, make prove N={options.number} to try it, make export for the package and the map.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
