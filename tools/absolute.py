"""Writes the package's own imports as `from mlops_course.x import y`, as notebooks do: nbdev makes them relative."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "mlops_course"


def absolute(text: str, package: str) -> str:
    """A module's text with absolute imports; `package` is what its dots stand on."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            begin = node.lineno - 1
            lines[begin] = re.sub(r"from\s+\.+[\w.]*\s+import", f"from {base} import", lines[begin], count=1)
    return "".join(lines)


def main() -> None:
    """Do it in all generated modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        made = absolute(text, ".".join(path.relative_to(PACKAGE.parent).parent.parts))
        if made != text:
            path.write_text(made, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
