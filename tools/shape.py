"""Counts what the source is made of: how much of it shows something, class ladders, names with two homes, unused names.

Prints tables, or with --json one document. It only reads: a figure is a place to look at, not a verdict.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlops_course"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs" / "internals").glob("*.ipynb"))
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_modidx.py"]
USERS = [*MODULES, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


def name_of(path: Path) -> str:
    """A file as it is named from the project's folder."""
    return path.relative_to(ROOT).as_posix()


def source_of(cell: dict[str, Any]) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def code_lines(text: str) -> int:
    """Lines that say something: neither blank, nor a comment, nor nbdev's."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


def notebook_shape(path: Path) -> dict[str, Any] | None:  # None: it exports nothing
    """How a notebook tells and shows: shares of code lines, the first output, the longest run of exported cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = exported = run = longest = 0
    first = None
    for number, cell in enumerate(cells, 1):
        text = source_of(cell)
        export = cell["cell_type"] == "code" and re.search(r"^#\|\s*exporti?\b", text, re.MULTILINE) is not None
        run = run + 1 if export else run if cell["cell_type"] == "code" and not text.strip() else 0
        longest = max(longest, run)
        if cell["cell_type"] == "code" and export:
            exported += code_lines(text)
        elif cell["cell_type"] == "code":
            shown += code_lines(text)
            first = first or (number if cell["outputs"] else None)
    if not exported:
        return None
    share = round(shown / (shown + exported), 3)
    return {"exported": exported, "shown": shown, "share": share, "first": first, "cells": len(cells), "run": longest}


def bases_in(tree: ast.Module) -> dict[str, list[str]]:
    """The classes of a module, each with those of its bases that are in the module, too."""
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return {
        name: [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        for name, node in classes.items()
    }


def ladders(tree: ast.Module) -> list[list[str]]:
    """Classes cut into steps: each step has one base in the module that has no other child. Errors don't count."""
    bases = bases_in(tree)
    children = Counter(base for found in bases.values() for base in found)
    steps = {name: found[0] for name, found in bases.items() if len(found) == 1 and children[found[0]] == 1}
    steps = {name: base for name, base in steps.items() if not base.endswith(("Error", "Exception"))}
    found = []
    for top in set(steps) - set(steps.values()):
        ladder = [top]
        while ladder[-1] in steps:
            ladder.append(steps[ladder[-1]])
        found.append(ladder)
    return sorted(found)


def public_names(tree: ast.Module) -> list[str]:
    """What a module defines for others, by the names that have no underscore in front."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return [name for name in found if not name.startswith("_") and name != "app"]


def words_of(path: Path) -> Counter[str]:
    """Every word of a file; of a notebook, those of its code and text, not of its outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(source_of(cell) for cell in json.loads(text)["cells"])
    return Counter(re.findall(r"\w+", text))


def measure() -> dict[str, Any]:
    """Everything."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for name in dict.fromkeys(public_names(tree)):
            homes[name].append(name_of(path))
    used: Counter[str] = Counter()
    for path in [path for path in USERS if path not in trees] + sorted((ROOT / "nbs").rglob("*.ipynb")):
        used += words_of(path)
    lines: Counter[str] = Counter()
    for path in MODULES:
        lines[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] += len(path.read_text("utf-8").splitlines())
    shapes = {name_of(path): shape for path in NOTEBOOKS if (shape := notebook_shape(path))}
    return {
        "notebooks": shapes,
        "ladders": {name_of(path): found for path, tree in trees.items() if (found := ladders(tree))},
        "two_homes": {name: found for name, found in sorted(homes.items()) if len(found) > 1},
        "unused": {name: found[0] for name, found in sorted(homes.items()) if used[name] <= len(found)},
        "public": len(homes),
        "lines": dict(lines.most_common()),
    }


def share_of(shapes: list[dict[str, Any]]) -> float:
    """The part of the code lines of some notebooks that shows something."""
    shown = sum(shape["shown"] for shape in shapes)
    return shown / max(1, shown + sum(shape["exported"] for shape in shapes))


def show(found: dict[str, Any]) -> None:
    """Print it for people."""
    inner = {name: shape for name, shape in found["notebooks"].items() if "/internals/" in name}
    print(f"{len(inner)} reference pages, {100 * share_of([*inner.values()]):.0f} % of their code lines show something")
    print(f"\n{'page':44}{'exports':>8}{'shows':>7}{'share':>7}{'first output':>14}{'export run':>12}")
    for name, shape in sorted(inner.items(), key=lambda pair: pair[1]["share"]):
        first = f"{shape['first'] or 'none'} of {shape['cells']}"
        figures = f"{shape['exported']:8}{shape['shown']:7}{shape['share']:7.0%}{first:>14}{shape['run']:12}"
        print(f"{name.removeprefix('nbs/internals/'):44}{figures}")
    steps = [ladder for ladders in found["ladders"].values() for ladder in ladders]
    print(f"\n{len(steps)} classes in steps:")
    for path, ladders_of in found["ladders"].items():
        for ladder in ladders_of:
            print(f"  {path}: {' < '.join(ladder)}")
    print(f"\n{len(found['two_homes'])} of {found['public']} public names are defined in more than one module:")
    for name, homes in found["two_homes"].items():
        print(f"  {name}: {', '.join(homes)}")
    print(f"\n{len(found['unused'])} public names are named nowhere but where they are defined:")
    for name, home in found["unused"].items():
        print(f"  {home}: {name}")
    print("\nlines: " + ", ".join(f"{name} {lines:,}" for name, lines in found["lines"].items()))


if __name__ == "__main__":
    everything = measure()
    print(json.dumps(everything, indent=1)) if "--json" in sys.argv[1:] else show(everything)
