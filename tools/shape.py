"""Counts what the source is made of: how much of it shows something, class ladders, names with two homes, unused names.

Prints tables, or with --json one document. The bars that a test holds the source to are here, too: see BARS.

What counts: a ladder is a class that continues its only base of the same module, which has no other child; errors, and
bases that promise something to be filled in (Protocol, ABC), make none, nor does a class of a library. A name is public
where it is defined, not where it is handed on. It is used when another file names it, and when a decorator registers it
(a command, a route). Lines are those of the generated modules, blank ones and comments included, as `wc -l` counts.
"""

import ast
import itertools
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
USERS = [
    *(ROOT / name for name in ("settings.ini", "setup.py", "tasks.py")),
    *(path for folder in ("tests", "benchmarks", "tools") for path in sorted((ROOT / folder).glob("*.py"))),
]
BY_CONVENTION = {"app", "main"}  # others expect a module to call it so
BARS = {  # what the source is held to: the first is the least, all others are the most
    "share of the reference pages' code that shows something, in %": 30,
    "pages that show with less than 15 % of their code": 0,
    "pages whose first output comes after cell 12": 0,
    "pages with more than 3 exports in a row": 0,
    "class ladders": 0,
    "public names in more than one module": 0,
    "public names that nobody uses": 0,
    "lines of pipelines": 6000,
}
NOT_YET = {  # what may not get worse until the bar is reached; then its entry goes
    "lines of pipelines": 9588,
}
LIMITS = BARS | NOT_YET


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


def words(node: ast.AST) -> set[str]:
    """The names in a piece of code."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def registered(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator such as `@app.command()` hands it to somebody who calls it, under whatever name."""
    calls = [each for each in node.decorator_list if isinstance(each, ast.Call)]
    return any(
        isinstance(each.func, ast.Attribute) and isinstance(each.func.value, ast.Name) for each in calls
    ) and any(
        each.func.attr in {"command", "callback", "get", "post", "middleware", "exception_handler"}
        for each in calls
        if isinstance(each.func, ast.Attribute)
    )


def ladders(tree: ast.Module) -> list[list[str]]:
    """Classes cut into steps: each step has one base in the module that has no other child."""
    bases = bases_in(tree)
    promises = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and {"Protocol", "ABC"} & {word for base in node.bases for word in words(base)}
    }
    children = Counter(base for found in bases.values() for base in found)
    steps = {name: found[0] for name, found in bases.items() if len(found) == 1 and children[found[0]] == 1}
    steps = {
        name: base for name, base in steps.items() if not base.endswith(("Error", "Exception")) and base not in promises
    }
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
            found += [] if registered(node) else [node.name]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            continue  # another name for what is defined elsewhere
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return [name for name in found if not name.startswith("_") and name not in BY_CONVENTION]


def words_of(path: Path) -> Counter[str]:
    """Every word of a file's code, comments apart; of a notebook, of its code cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(source_of(cell) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return Counter(re.findall(r"\w+", re.sub(r"(?m)(^|\s)#.*", "", text)))


def notebook_of(module: Path) -> Path | None:
    """The notebook that a module is made from."""
    found = re.search(r"AUTOGENERATED! DO NOT EDIT! File to edit: (\S+)\.$", module.read_text("utf-8"), re.MULTILINE)
    return (module.parent / found[1]).resolve() if found else None


def measure() -> dict[str, Any]:
    """Everything."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for name in dict.fromkeys(public_names(tree)):
            homes[name].append(name_of(path))
    words_in = {path: words_of(path) for path in [*USERS, *sorted((ROOT / "nbs").rglob("*.ipynb"))]}
    used: Counter[str] = Counter()
    for found in words_in.values():
        used += found
    inside = {name_of(path): words_in.get(notebook_of(path) or path, Counter()) for path in MODULES}
    lines: Counter[str] = Counter()
    for path in MODULES:
        lines[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] += len(path.read_text("utf-8").splitlines())
    shapes = {name_of(path): shape for path in NOTEBOOKS if (shape := notebook_shape(path))}
    return {
        "notebooks": shapes,
        "ladders": {name_of(path): found for path, tree in trees.items() if (found := ladders(tree))},
        "two_homes": {name: found for name, found in sorted(homes.items()) if len(found) > 1},
        "unused": {name: found[0] for name, found in sorted(homes.items()) if used[name] <= len(found)},
        "inner": {
            name: found[0]
            for name, found in sorted(homes.items())
            if used[name] == sum(inside[home][name] for home in found)
        },
        "public": len(homes),
        "lines": dict(lines.most_common()),
    }


def share_of(shapes: list[dict[str, Any]]) -> float:
    """The part of the code lines of some notebooks that shows something."""
    shown = sum(shape["shown"] for shape in shapes)
    return shown / max(1, shown + sum(shape["exported"] for shape in shapes))


def summary(found: dict[str, Any]) -> dict[str, int]:
    """What was measured, under the names of the bars."""
    inner = [shape for name, shape in found["notebooks"].items() if "/internals/" in name]
    measured = [
        int(100 * share_of(inner)),
        sum(shape["share"] < 0.15 for shape in inner),
        sum((shape["first"] or 10**9) > 12 for shape in inner),
        sum(shape["run"] > 3 for shape in inner),
        sum(map(len, found["ladders"].values())),
        len(found["two_homes"]),
        len(found["unused"]),
        found["lines"]["pipelines"],
    ]
    return dict(zip(BARS, measured, strict=True))


def breaches(measured: dict[str, int], limits: dict[str, int]) -> list[str]:
    """The limits that don't hold, each with what was measured."""
    least = next(iter(BARS))
    return [
        f"{name}: {measured[name]}, but {'at least' if name == least else 'at most'} {limit}"
        for name, limit in limits.items()
        if (measured[name] < limit if name == least else measured[name] > limit)
    ]


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
    print(f"\n{len(found['inner'])} public names are used in their own notebook only: an underscore would say so")
    for home, names in itertools.groupby(sorted(found["inner"], key=found["inner"].get), found["inner"].get):
        print(f"  {home}: {', '.join(names)}")
    print("\nthe bars, and what is:")
    for name, figure in summary(found).items():
        print(f"  {BARS[name]:6,} {figure:6,}  {name}")
    print("\nlines: " + ", ".join(f"{name} {lines:,}" for name, lines in found["lines"].items()))


if __name__ == "__main__":
    everything = measure()
    print(json.dumps(everything, indent=1)) if "--json" in sys.argv[1:] else show(everything)
