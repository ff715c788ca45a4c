"""Makes the web pages in _docs from the notebooks: with Quarto when it is there, else plain pages that work offline."""

import ast
import builtins
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "_docs"
STYLE = """
body { display: flex; margin: 0; font: 16px/1.6 system-ui, sans-serif; color: #222 }
nav { flex: 0 0 15rem; padding: 1.5rem; background: #f5f5f5; min-height: 100vh; font-size: .9rem }
nav a { display: block; color: #225; text-decoration: none; padding: .15rem 0 }
nav b { display: block; margin-top: 1rem }
main { flex: 1; min-width: 0; max-width: 55rem; padding: 1.5rem 3rem } img { max-width: 100% }
pre { background: #f7f7f7; padding: .7rem; overflow-x: auto; line-height: 1.4 }
.jp-OutputArea-prompt, .prompt { display: none }
table { border-collapse: collapse; font-size: .9rem } td, th { border: 1px solid #ddd; padding: .2rem .6rem }
"""


def sidebar(folder: Path) -> list[tuple[str, list[str]]]:
    """The site's sections and their pages, from _quarto.yml."""
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    sections: list[tuple[str, list[str]]] = []
    for entry in contents:
        title, pages = ("", [entry]) if isinstance(entry, str) else (entry["section"], entry["contents"])
        pages = [pages] if isinstance(pages, str) else pages
        found = [path.relative_to(folder).as_posix() for page in pages for path in sorted(folder.glob(page))]
        sections.append((title, found))
    return sections


def title_of(notebook: nbformat.NotebookNode) -> str:
    """A page's first heading."""
    heading = re.search(r"^#\s+(.+)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    title = re.search(r"^title:\s*(.+)$", notebook.cells[0].source if notebook.cells else "", re.MULTILINE)
    return next((match[1].strip("\"'* ") for match in (title, heading) if match), "?")


def page(name: str, body: str, sections: list[tuple[str, list[str]]], titles: dict[str, str]) -> str:
    """A whole page: what is on all of them, and the notebook's own part."""
    up = "../" * name.count("/")
    links = []
    for title, pages in sections:
        links += [f"<b>{html.escape(title)}</b>"] if title else []
        links += [f'<a href="{up}{p.replace(".ipynb", ".html")}">{html.escape(titles[p])}</a>' for p in pages]
    body = re.sub(r'(href="(?![a-z]+:)[^"#]+)\.ipynb', r"\1.html", body)
    head = f"<meta charset='utf-8'><title>{html.escape(titles[name])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body><nav>{''.join(links)}</nav><main>{body}</main>"


def plain_site(folder: Path) -> None:
    """The pages without Quarto; diagrams are shown as their source."""
    sections = sidebar(folder)
    notebooks = {name: nbformat.read(folder / name, 4) for _, names in sections for name in names}
    titles = {name: title_of(notebook) for name, notebook in notebooks.items()}
    exporter = HTMLExporter(template_name="basic")
    shutil.rmtree(TARGET, ignore_errors=True)
    for name, notebook in notebooks.items():
        path = TARGET / name.replace(".ipynb", ".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(name, exporter.from_notebook_node(notebook)[0], sections, titles), encoding="utf-8")
    print(f"{len(notebooks)} pages in {TARGET.name}: open {TARGET.name}/index.html")


def quarto_site(folder: Path) -> None:
    """The pages with Quarto, which draws Mermaid diagrams when they are written its own way."""
    for path in folder.rglob("*.ipynb"):
        path.write_text(path.read_text(encoding="utf-8").replace("```mermaid", "```{mermaid}"), encoding="utf-8")
    subprocess.run(["quarto", "render", str(folder), "--no-cache"], check=True)
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.move(folder / TARGET.name, TARGET)


def import_types() -> None:
    """Make known what modules import for type checkers only: nbdev evaluates the annotations that it shows."""
    for path in sorted((ROOT / "mlops_course").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                exec(compile(ast.Module(node.body, []), str(path), "exec"), vars(builtins))


def main() -> None:
    """Let nbdev prepare the notebooks, in this process, then make pages of them."""
    import_types()
    with tempfile.TemporaryDirectory() as workspace:  # nbdev runs the cells that it needs to show functions
        os.environ["MLOPS_COURSE_HOME"] = workspace
        folder = Path(proc_nbs(force=True, n_workers=0))
    copy = folder / "_quarto.yml"  # where git can't make links, nbs/_quarto.yml is a text file with the link's target
    copy.unlink(missing_ok=True)
    shutil.copyfile(ROOT / copy.name, copy)
    (quarto_site if shutil.which("quarto") else plain_site)(folder)


if __name__ == "__main__":
    sys.exit(main())
