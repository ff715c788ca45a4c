"""The web pages, made as `make docs` makes them without Quarto, in a real browser that has no network."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser_helpers import CHROMIUM
from run_rules import each_fourth

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
PAGES = ["index", "benchmarks", *LESSONS]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome"),
    pytest.mark.filterwarnings("default"),
]
SPOILERS = ("BEGIN SOLUTION", "BEGIN HIDDEN TESTS", "Hint 2.", 'wrong_answers("')
TOO_WIDE = """() => {
    const edge = document.documentElement.clientWidth + 1
    const moves = each => ['auto', 'scroll'].includes(getComputedStyle(each).overflowX)
    const scrolls = each => each && (moves(each) || scrolls(each.parentElement))
    const found = [...document.querySelectorAll('main *')].filter(each => each.getBoundingClientRect().right > edge)
    return found.filter(each => !scrolls(each.parentElement)).map(each => each.outerHTML.slice(0, 80))
}"""
UNSAID = """() => {  // what moves under the finger, and nothing says so
    const wide = [...document.querySelectorAll('pre.mermaid, .table, .output_area')]
    return wide.filter(each => each.scrollWidth > each.clientWidth + 1 && !each.classList.contains('wide'))
        .map(each => each.outerHTML.slice(0, 80))
}"""
TOO_SMALL = """() => [...document.images]  // plots whose letters are less than half as large as they were drawn
    .filter(each => each.width && each.width < Math.min(each.naturalWidth, 1100) / 2)
    .map(each => `${each.width} of ${each.naturalWidth}`)
"""
CONTRAST = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
    const light = colour => parts(colour).reduce((sum, part, place) => sum + part / 255 * [.21, .72, .07][place], 0)
    const behind = each => {
        const colour = getComputedStyle(each).backgroundColor
        return /, 0\\)$/.test(colour) && each.parentElement ? behind(each.parentElement) : colour
    }
    const text = [...document.querySelectorAll('main p, main td, main th, main summary, .highlight span')]
    const weak = text.filter(each => Math.abs(light(getComputedStyle(each).color) - light(behind(each))) < .25)
    return weak.filter(each => each.textContent.trim()).map(each => each.outerHTML.slice(0, 80))
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, stride: int) -> Path:
    """The plain pages, from a copy of the project in which nothing else is at work; not all of the reference pages."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("nbs", "mlops_course", "tools", "settings.ini", "_quarto.yml", "setup.py"):
        source = ROOT / name
        unwanted = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        (
            shutil.copytree(source, folder / name, symlinks=True, ignore=unwanted)
            if source.is_dir()
            else shutil.copy(source, folder)
        )
    for number, path in enumerate(sorted((folder / "nbs" / "internals").glob("*.ipynb"))):
        if number % stride:
            path.unlink()
    without_quarto = os.pathsep.join(
        place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "quarto").exists()
    )
    variables = {**os.environ, "PATH": without_quarto, "PYTHONPATH": str(folder), "MPLBACKEND": "agg"}
    made = subprocess.run(
        [sys.executable, "tools/docs.py"], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "_docs"


def open_page(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page, drawn to its end, and what the browser complained about."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, complaints = context.new_page(), []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"not loaded: {request.url}"))
    page.goto(path.as_uri())
    if page.locator("pre.mermaid").count():
        page.wait_for_function(
            "() => [...document.querySelectorAll('pre.mermaid')].every(each => each.querySelector('svg'))"
        )
    return page, complaints


def is_whole(page: Any, complaints: list[str], width: int) -> None:
    assert complaints == []
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".error-icon").count() == 0, "Mermaid could not read a diagram"
    assert all(size > 50 for size in page.evaluate("[...document.images].map(each => each.naturalWidth)"))


WIDTHS = {"telephone": 390, "tablet": 768, "screen": 1280}


@pytest.mark.parametrize(("name", "scheme", "device"), each_fourth(product(PAGES, ("light", "dark"), WIDTHS)))
def test_a_page_is_whole_and_can_be_read(site: Path, browser: Any, name: str, scheme: str, device: str) -> None:
    width = WIDTHS[device]
    page, complaints = open_page(browser, site / f"{name}.html", width, scheme)
    is_whole(page, complaints, width)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate(CONTRAST) == []
    backgrounds = page.evaluate("[...document.images].map(each => getComputedStyle(each).backgroundColor)")
    assert "rgba(0, 0, 0, 0)" not in backgrounds, "a plot without background would lose its black text in the dark"
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_keeps_answers_folded(site: Path, browser: Any, name: str) -> None:
    page, _ = open_page(browser, site / f"{name}.html", 1280)
    written = (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8").count('"```mermaid')
    assert page.locator("pre.mermaid svg").count() == written
    assert page.locator("main details[open]").count() == 0
    assert page.locator("main li input:checked").count() == 0, "the right answers of the quiz are ticked"
    visible = page.locator("main").inner_text()
    assert [spoiler for spoiler in SPOILERS if spoiler in visible] == []
    page.context.close()


@pytest.mark.parametrize("name", each_fourth(PAGES))
def test_a_telephone_shows_the_title_first_and_says_what_can_be_moved(site: Path, browser: Any, name: str) -> None:
    page, _ = open_page(browser, site / f"{name}.html", 390)
    assert page.locator("h1").first.bounding_box()["y"] < 200, "the title isn't on the first screen"
    assert page.locator("nav").bounding_box()["y"] > page.locator("main").bounding_box()["y"]
    assert page.locator("a.to-menu").is_visible()
    assert page.evaluate(UNSAID) == []
    assert page.evaluate(TOO_SMALL) == []
    page.context.close()


def test_every_paragraph_of_a_notebook_is_on_its_page(site: Path) -> None:
    lost = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        page = site / path.relative_to(ROOT / "nbs").with_suffix(".html")
        if page.is_file():
            text = letters(html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8"))))
            lost[path.name] = [each[:60] for each in paragraphs(path) if letters(each) not in text]
    assert len(lost) > 70
    assert {name: each for name, each in lost.items() if each} == {}


# a table's row, an option of a question, a formula, a numbered list, code with a sign that HTML takes for a tag
NO_SENTENCE = re.compile(r"^\s*[|]|^\s*[-*] \[[xX ]\]|\$|^\s*\d+\.|`[^`]*<|_[0-9]", re.MULTILINE)


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a notebook's Markdown, as they are read; what isn't a sentence is left out."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = re.sub(r"^(```|~~~).*?^\1", "\n\n", "".join(cell["source"]), flags=re.DOTALL | re.MULTILINE)
        every = re.split(r"\n\s*\n", text) if cell["cell_type"] == "markdown" else []
        found += [each for each in every if each.strip() and not NO_SENTENCE.search(each)]
    return [re.sub(r"\]\([^)]*\)(\{[^}]*\})?|<[^>]*>", "", each) for each in found]


def letters(text: str) -> str:
    """A text without all that its layout may change."""
    return re.sub(r"[\W_]+", "", text)


def test_a_reader_can_unfold_a_hint_and_an_answer(site: Path, browser: Any) -> None:
    page, _ = open_page(browser, site / "01_welcome.html", 1280)
    page.locator("summary", has_text="Hints").first.click()
    assert page.get_by_text("Hint 1.", exact=False).first.is_visible()
    answer = page.locator("details", has_text="Outputs are saved text.")
    answer.locator("summary").click()
    assert answer.get_by_text("That some code produced this number at some time.").is_visible()
    page.context.close()


def test_what_only_other_tools_understand_is_not_shown(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = re.sub(r"<script.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for residue in ("{target=", "show_doc(", "#| echo", "__pydantic_self__", "AUTOGENERATED"):
            assert residue not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL), f"{path.name} shows {residue}"


def test_links_between_pages_lead_somewhere(site: Path) -> None:
    dead = []
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r'href="(?![a-z]+:)([^"#]*)(?:#[^"]*)?"', text):
            target = path.parent / link
            if link and not target.exists() and not left_out(site, target):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def left_out(site: Path, page: Path) -> bool:
    """Whether a page isn't made because this run leaves out its notebook."""
    source = Path("nbs") / os.path.relpath(page.with_suffix(".ipynb"), site)
    return (ROOT / source).is_file() and not (site.parent / source).exists()


def test_every_page_of_the_sites_map_is_made(site: Path) -> None:
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    text = str(contents)
    assert all((site / f"{name}.html").is_file() for name in PAGES)
    assert all(f"{name}.ipynb" in text for name in PAGES)
