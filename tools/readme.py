"""Makes README.md from nbs/index.ipynb, and the map of the sections in both from the lessons' notebooks.

With --check it only says, by its exit status, whether one of them is stale.
"""

import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "nbs" / "index.ipynb"
TARGET = ROOT / "README.md"
HEADER = "<!-- Made from nbs/index.ipynb by `make readme`: edit that, not this. -->\n\n"


def joined(text: str | list[str]) -> str:
    """A notebook's text, which may be a list of lines."""
    return (text if isinstance(text, str) else "".join(text)).strip("\n")


def fenced(text: str, language: str = "") -> str:
    """A code block."""
    return f"```{language}\n{text}\n```"


def with_links(text: str) -> str:
    """Markdown whose relative links start at the project's folder instead of nbs."""

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{match[1]}{os.path.relpath(SOURCE.parent / target, ROOT)}".replace(os.sep, "/") + ")"

    return re.sub(r"(\]\()([^)\s]+)\)", moved, text)


def output_text(output: dict) -> str:
    """One output as Markdown; pictures are refused, since a README's pictures are Mermaid text."""
    if output["output_type"] == "stream":
        return fenced(joined(output["text"]), "text")
    data = output.get("data", {})
    if "text/markdown" in data:
        return with_links(joined(data["text/markdown"]))
    if "text/plain" not in data or any(kind.startswith("image/") for kind in data):
        kinds = sorted(data) or output["output_type"]
        raise SystemExit(f"readme: an output of {SOURCE.name} is neither text nor Markdown: {kinds}")
    return fenced(joined(data["text/plain"]), "text")


def cell_text(cell: dict) -> list[str]:
    """A cell as pieces of Markdown: its source unless hidden, then its outputs."""
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        return [with_links(source)]
    directives = re.findall(r"^#\|\s*(.*?)\s*$", source, re.MULTILINE)
    if cell["cell_type"] != "code" or {"hide", "default_exp"} & {line.split()[0] for line in directives if line}:
        return []
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")
    shown = [] if "echo: false" in directives else [fenced(code, "python")]
    return shown + [output_text(output) for output in cell["outputs"]]


def with_map(text: str) -> str:
    """The index with the map as the lessons' notebooks say it today; everything else stays."""
    from mlops_course.course.lessons import course_map

    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## The map"):
            fresh = re.sub(r"^\|.*\|$(\n\|.*\|$)*", lambda _: course_map(), source, count=1, flags=re.MULTILINE)
            cell["source"] = fresh.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def readme(index: str) -> str:
    """The whole README."""
    cells = json.loads(index)["cells"]
    return HEADER + "\n\n".join(piece for cell in cells for piece in cell_text(cell) if piece) + "\n"


def main() -> int:
    """Write the map and the README, or check them."""
    index = with_map(SOURCE.read_text(encoding="utf-8"))
    wanted = {SOURCE: index, TARGET: readme(index)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in stale)
        print(f"{names} is stale: run `make export`" if stale else "README.md is up to date")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
