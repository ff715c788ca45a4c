"""Makes the web pages in _docs from the notebooks: with Quarto when it is there, else plain pages that work offline."""

import ast
import builtins
import gc
import html
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import yaml
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter, TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.serve import proc_nbs
from pygments.formatters import HtmlFormatter

import mlops_course
from mlops_course.course.copies import fold_answer

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "_docs"
FILES = (ROOT / "tools" / "page.css", ROOT / "tools" / "mermaid" / "mermaid.min.js")
DARK = "(prefers-color-scheme: dark)"
DRAW = f"""
const fits = !matchMedia('(max-width: 50rem)').matches, theme = matchMedia('{DARK}').matches ? 'dark' : 'default'
mermaid.initialize({{startOnLoad: true, theme: theme, flowchart: {{useMaxWidth: fits}}}})
"""
# What is wider than the screen moves under the finger; that it does so has to be said, for it can't be seen.
CUE = """
const mark = () => document.querySelectorAll('pre.mermaid, .table, .output_area').forEach(
  each => each.classList.toggle('wide', each.scrollWidth > each.clientWidth + 1))
new MutationObserver(mark).observe(document.body, {childList: true, subtree: true})
addEventListener('resize', mark); addEventListener('load', mark); addEventListener('toggle', mark, true)
"""

# A page's cells. What an exercise hides from its learner is folded: the reader, too, should think first.
TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{%- macro folded(title, body) -%}<details><summary>{{ title }}</summary>{{ body }}</details>{%- endmacro -%}
{%- block codecell -%}
{%- set exercise = cell.metadata.get('nbgrader', {}) -%}
{%- if 'wrong-answers' in cell.metadata.get('tags', []) -%}
{{ folded('Wrong answers that the check knows', super()) }}
{%- elif 'lab-look' in cell.metadata.get('tags', []) -%}{{ folded('How I look for it', super()) }}
{%- elif 'helper' in cell.metadata.get('tags', []) -%}{{ folded('What the check needs', super()) }}
{%- elif exercise.solution -%}{{ folded('A solution', super()) }}
{%- elif exercise.grade -%}{{ folded('The check', super()) }}
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock codecell -%}
{%- block input -%}{%- if '#| echo: false' not in cell.source -%}{{ super() }}{%- endif -%}{%- endblock input -%}
{%- block rawcell -%}{%- endblock rawcell -%}
{%- block markdowncell -%}
{%- set marks = cell.metadata.get('tags', []) -%}
{%- if 'hint' in marks or 'lab-hint' in marks -%}{{ folded('Hints', super()) }}
{%- elif 'right-answers' in marks -%}{{ folded('Other right answers', super()) }}
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock markdowncell -%}
"""


class Renderer(IPythonRenderer):
    """Markdown as nbconvert shows it, with formulas that a browser draws by itself."""

    def block_math(self, body: str) -> str:
        """A formula in a line of its own."""
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        """A formula in a line of text."""
        return convert(body)


def to_html(source: str) -> str:
    """Markdown as HTML, without the attributes that only Quarto understands."""
    source = re.sub(r"(?<=\))\{target=[^}]*\}", "", source)
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


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


def repository() -> str:
    """Where files are that are no pages, such as the licence."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"


def front_matter(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What nbdev took from a notebook's first cell: title and description."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "raw" or not first.source.startswith("---"):
        return {}
    found = yaml.safe_load(first.source.strip().strip("-"))
    return found if isinstance(found, dict) else {}


def title_of(notebook: nbformat.NotebookNode) -> str:
    """A page's title, or its first heading."""
    heading = re.search(r"^#\s+(.+)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    return front_matter(notebook).get("title") or (heading[1].strip("\"'* ") if heading else "?")


def navigation(name: str, sections: list[tuple[str, list[str]]], titles: dict[str, str]) -> str:
    """The links to all pages; sections that this page isn't in are folded."""
    up, parts = "../" * name.count("/"), []
    for title, pages in sections:
        links = ""
        for other in pages:
            here = ' aria-current="page"' if other == name else ""
            address = f"{up}{other.replace('.ipynb', '.html')}"
            links += f'<a href="{address}"{here}>{html.escape(titles[other])}</a>'
        is_open = " open" if name in pages or title == sections[1][0] else ""
        parts += [f"<details{is_open}><summary>{html.escape(title)}</summary>{links}</details>" if title else links]
    return f"<nav id='menu'>{''.join(parts)}</nav>"


def page(name: str, notebook: nbformat.NotebookNode, body: str, around: str) -> str:
    """A whole page: what is on all of them, and the notebook's own part."""
    up, front, title = "../" * name.count("/"), front_matter(notebook), html.escape(title_of(notebook))
    body = re.sub(r'href="(?:\.\./)+(?=[A-Z])', f'href="{repository()}/', body)
    body = re.sub(r"(<table(?! border).*?</table>)", r'<div class="table">\1</div>', body, flags=re.DOTALL)
    top = f"<h1>{title}</h1>" if "title" in front else ""
    top += f"<blockquote>{to_html(front['description'])}</blockquote>" if "description" in front else ""
    body = re.sub(r'(href="(?![a-z]+:)[^"#]+)\.ipynb', r"\1.html", top + body)
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{title}</title>"
        f"<link rel='stylesheet' href='{up}code.css'><link rel='stylesheet' href='{up}page.css'>"
    )
    around = f"<a class='to-menu' href='#menu'>Menu</a>{around}"
    if 'class="mermaid"' in body:
        body += f"<script src='{up}mermaid.min.js'></script><script>{DRAW}</script>"
    main = f"<main>{body}<script>{CUE}</script></main>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{around}{main}</body></html>\n"


def code_colours() -> str:
    """The colours of code, for light and for dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    plain = ".highlight, .highlight .err { background: none; border: 0 }"
    return f"{light}\n@media {DARK} {{\n{dark}\n}}\n{plain}\n"


def page_exporter() -> HTMLExporter:
    """What makes a page's body of a notebook.

    The notebooks are the project's own, so nothing is done that only strangers' need: coloured code isn't cleaned,
    a notebook isn't validated after each step. `plain_site` calls the base class: the finished page isn't parsed
    once more. That took three quarters of the time.
    """
    loader = DictLoader({"page.html.j2": TEMPLATE})
    exporter = HTMLExporter(template_name="basic", template_file="page.html.j2", extra_loaders=[loader])
    exporter.optimistic_validation = True
    exporter.register_filter("markdown2html", to_html)
    exporter.register_filter("highlight_code", Highlight2HTML(pygments_lexer="ipython3"))
    exporter.register_filter("clean_html", lambda code: code)
    return exporter


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook that nbdev has just written: nobody needs to validate it."""
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def plain_site(folder: Path) -> None:
    """The pages without Quarto."""
    sections = sidebar(folder)
    notebooks = {name: read_notebook(folder / name) for _, names in sections for name in names}
    titles = {name: title_of(notebook) for name, notebook in notebooks.items()}
    exporter = page_exporter()
    shutil.rmtree(TARGET, ignore_errors=True)
    for name, notebook in notebooks.items():
        path = TARGET / name.replace(".ipynb", ".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        body = TemplateExporter.from_notebook_node(exporter, notebook)[0]
        body = re.sub(r"<img(?![^>]*\balt=)", '<img alt="A picture that this cell makes"', body)
        path.write_text(page(name, notebook, body, navigation(name, sections, titles)), encoding="utf-8")
    (TARGET / "code.css").write_text(code_colours(), encoding="utf-8")
    for path in FILES:
        shutil.copyfile(path, TARGET / path.name)
    print(f"{len(notebooks)} pages in {TARGET.name}: open {TARGET.name}/index.html")


def quarto_site(folder: Path) -> None:
    """The pages with Quarto, which draws Mermaid diagrams when they are written its own way."""
    for path in folder.rglob("*.ipynb"):
        path.write_text(path.read_text(encoding="utf-8").replace("```mermaid", "```{mermaid}"), encoding="utf-8")
    subprocess.run(["quarto", "render", str(folder), "--no-cache"], check=True)
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.move(folder / TARGET.name, TARGET)


def tidy(folder: Path) -> None:
    """Take out what helps nobody on a page: ticked boxes of quizzes, and the signature of pydantic's own settings."""
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = fold_answer(cell.source)
            for output in cell.get("outputs", []):
                shown = output.get("data", {}).get("text/markdown")
                if shown:
                    pattern = r"\(\s*__pydantic_self__.*?\)->None:"
                    output["data"]["text/markdown"] = re.sub(pattern, "(**values):", shown, flags=re.DOTALL)
        nbformat.write(notebook, path)


def import_types() -> None:
    """Make known what modules import for type checkers only: nbdev evaluates the annotations that it shows."""
    for path in sorted((ROOT / "mlops_course").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                exec(compile(ast.Module(node.body, []), str(path), "exec"), vars(builtins))


def name_classes() -> None:
    """Make the package's own classes known, too: a page shows a function before the class below that it names."""
    for found in pkgutil.walk_packages(mlops_course.__path__, "mlops_course."):
        for name, value in vars(importlib.import_module(found.name)).items():
            if inspect.isclass(value) and value.__module__ == found.name:
                vars(builtins).setdefault(name, value)


def main() -> None:
    """Let nbdev prepare the notebooks, in this process, then make pages of them."""
    import_types()
    name_classes()
    with tempfile.TemporaryDirectory() as workspace:  # nbdev runs the cells that it needs to show functions
        os.environ["MLOPS_COURSE_HOME"] = workspace
        folder = Path(proc_nbs(force=True, n_workers=0))
    tidy(folder)
    copy = folder / "_quarto.yml"  # where git can't make links, nbs/_quarto.yml is a text file with the link's target
    copy.unlink(missing_ok=True)
    shutil.copyfile(ROOT / copy.name, copy)
    (quarto_site if shutil.which("quarto") else plain_site)(folder)
    gc.freeze()  # at exit each of nbdev's shells, one for a notebook, collects garbage: that took longer than the pages


if __name__ == "__main__":
    sys.exit(main())
