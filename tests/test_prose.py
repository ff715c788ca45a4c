"""What people read: one English without misspelt words, and no reference that leads nowhere."""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import codespell_lib
import pytest
import typer
from spellchecker import SpellChecker

from mlops_course.cli import app
from mlops_course.course.lessons import read_notebook, read_question, tags

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
CODE = [path for folder in ("tests", "tools", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [*NOTEBOOKS, *PAGES, *CODE, ROOT / "tasks.py"]
READ = [*NOTEBOOKS, *PAGES, ROOT / "README.md"]
WORDS = Path(__file__).with_name("words.txt")
DICTIONARIES = Path(codespell_lib.__file__).parent / "data"
# American in one sense and British in another, or the field's own spelling
ALSO_BRITISH = {"artifact", "artifacts", "practice", "program", "programs", "story", "writable"}
WORD = re.compile(r"(?<![\w./@=%$\\-])[A-Za-z]+(?:['’][a-z]+)?(?![\w/@=(\\]|\.\w)")
ENDING = re.compile(r"(?<!n)['’](?:s|d|ll|re|ve|t|m)$")


def found_in(paths: Iterable[Path], look: Callable[[Path], Any]) -> dict[str, Any]:
    """What is wrong with each file, by its name; a file with which nothing is wrong isn't there."""
    found = {path.relative_to(ROOT).as_posix(): look(path) for path in paths}
    return {name: wrong for name, wrong in found.items() if wrong}


# ---------------------------------------------------------------- what is prose


@cache
def cells(path: Path) -> list[tuple[str, str]]:
    """The kind and text of each of a notebook's cells."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in found]


def without_code(markdown: str) -> str:
    """A Markdown text without its blocks and pieces of code."""
    return re.sub(r"^(```|~~~).*?^\1|``[^`]*``|`[^`\n]*`", " ", markdown, flags=re.DOTALL | re.MULTILINE)


def without_blocks(markdown: str) -> str:
    """A Markdown text without its blocks of code; commands and names in the sentences stay."""
    return re.sub(r"^(```|~~~).*?^\1", " ", markdown, flags=re.DOTALL | re.MULTILINE)


def plain_text(markdown: str) -> str:
    """A Markdown text without code, formulas, addresses and tags."""
    text = re.sub(r"\]\([^)]*\)", "]", without_code(markdown))
    return re.sub(r"<[^>]*>|https?://\S+|\$\$.*?\$\$|\$[^$\n]*\$", " ", text, flags=re.DOTALL)


def said_in_code(source: str, messages: bool = False) -> str:
    """Comments and docstrings; with messages: also strings of four words and more."""
    source = "\n".join("" if re.match(r"\s*[!%]|#\|", line) else line for line in source.splitlines())
    tokens = tokenize.generate_tokens(io.StringIO(source + "\n").readline)
    said = [token.string for token in tokens if token.type == tokenize.COMMENT]
    said = [re.sub(r"#\s*(noqa|type|fmt)\b.*|^#\s*%%.*|^#!.*", "", line) for line in said]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            said += [ast.get_docstring(node) or ""]
        if messages and isinstance(node, ast.Constant) and isinstance(node.value, str):
            readable = not re.search(r"[{}\[\]=<>_\\]|\(\)|^#!|://", node.value)
            said += [node.value] if readable and len(node.value.split()) > 3 else []
    return "\n".join(without_code(text) for text in said)


@cache
def prose(path: Path) -> str:
    """All that a file says to people."""
    if path.suffix == ".ipynb":
        said = [plain_text(text) if kind == "markdown" else said_in_code(text, True) for kind, text in cells(path)]
        return "\n".join(said)
    text = path.read_text(encoding="utf-8")
    return said_in_code(text) if path.suffix == ".py" else plain_text(text)


def words_of(text: str) -> set[str]:
    """The words of a text, as a dictionary has them; names such as `PR-AUC` and `DataFrame` aren't words."""
    found = {ENDING.sub("", word) for word in WORD.findall(text)}
    return {
        word.lower().replace("’", "'")
        for word in found
        if len(word) > 1 and not re.search(r"[a-z][A-Z]|[A-Z]{2}", word)
    }


# ---------------------------------------------------------------- one English


@pytest.fixture(scope="module", autouse=True)
def read_once() -> None:
    """What all tests look at is read before the first of them."""
    for path in SOURCES:
        prose(path)


@pytest.fixture(scope="module")
def dictionary() -> SpellChecker:
    return SpellChecker(language="en")


@cache
def own_words() -> frozenset[str]:
    return frozenset(WORDS.read_text(encoding="utf-8").split())


def pairs(name: str) -> dict[str, str]:
    """One of codespell's lists: what is written, and what it should be."""
    lines = (DICTIONARIES / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("->", 1) for line in lines if "->" in line)


def test_every_word_is_in_the_dictionary(dictionary: SpellChecker) -> None:
    """A new word that is right goes into tests/words.txt."""
    assert len(SOURCES) > 200
    assert found_in(SOURCES, lambda path: sorted(dictionary.unknown(words_of(prose(path))) - own_words())) == {}


def test_no_word_is_a_known_misspelling() -> None:
    misspelt = pairs("dictionary.txt")
    assert len(misspelt) > 10_000
    found = found_in(SOURCES, lambda path: {word: misspelt[word] for word in words_of(prose(path)) & misspelt.keys()})
    assert found == {}


def test_the_english_is_british() -> None:
    american = {us.strip(): gb for gb, both in pairs("dictionary_en-GB_to_en-US.txt").items() for us in both.split(",")}
    ours = set(american) - ALSO_BRITISH
    assert len(ours) > 500
    assert found_in(SOURCES, lambda path: {word: american[word] for word in words_of(prose(path)) & ours}) == {}


def test_the_words_of_our_own_are_sorted_needed_and_used(dictionary: SpellChecker) -> None:
    listed = WORDS.read_text(encoding="utf-8").split()
    used = set().union(*(words_of(prose(path)) for path in SOURCES))
    assert listed == sorted(set(listed))
    assert sorted(set(listed) - used) == [], "nobody uses these any more"
    assert sorted(set(listed) - dictionary.unknown(listed)) == [], "the dictionary has these"


@pytest.mark.parametrize("text", ["A recieved flight", "# it is sepparate", "the flihgt"])
def test_a_slip_is_found(text: str, dictionary: SpellChecker) -> None:
    found = words_of(plain_text(text))
    assert dictionary.unknown(found) - own_words()


# ---------------------------------------------------------------- the project's own words

WORDS_NOT_OURS = {  # what isn't written here, and what is written in its place
    r"\bcannot\b": "can't",
    r"(?<!\bthere )\bis no (?!longer\b|more\b)\w+": "isn't a, or isn't a valid",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bsay `?make\b": "run `make …`",
    r"\binner rooms?\b": "module",
    r"\bthe front\b": "the public API",
    r"\bmistakes? in the program\b": "a bug",
}
MODULES = sorted((ROOT / "mlops_course").rglob("*.py"))
TEXTS = [*SOURCES, ROOT / "README.md", *(path for path in MODULES if path.name != "_modidx.py")]


def words_not_ours(text: str) -> dict[str, str]:
    """What a text says otherwise than the project does, each with what is written in its place."""
    found = [(re.findall(pattern, text, re.IGNORECASE), instead) for pattern, instead in WORDS_NOT_OURS.items()]
    return {word: instead for words, instead in found for word in words}


def test_one_thing_is_called_by_one_name() -> None:
    def look(path: Path) -> dict[str, str]:
        page = without_blocks(page_text(path)) if path.suffix in {".ipynb", ".md"} else ""
        return words_not_ours(f"{prose(path)}\n{page}")

    assert found_in(TEXTS, look) == {}


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("It cannot be read.", "can't"),
        ("The key x is no parameter", "isn't a, or isn't a valid"),
        ("Mending it takes a day", "fix"),
        ("Say `make export`, then commit", "run `make …`"),
        ("the inner rooms of the engine", "module"),
        ("what the front offers", "the public API"),
        ("a mistake in the program", "a bug"),
    ],
)
def test_a_word_that_is_not_ours_is_found(text: str, instead: str) -> None:
    assert list(words_not_ours(text).values()) == [instead]


@pytest.mark.parametrize("text", ["There is no month", "it is no longer kept", "a front door", "I recommend it"])
def test_a_word_that_only_looks_like_it_is_not(text: str) -> None:
    assert words_not_ours(text) == {}


# ---------------------------------------------------------------- references


def anchors(text: str) -> set[str]:
    """The names of a page's headings in links, as GitHub and as Jupyter make them."""
    headings = re.findall(
        r"^#{1,6}\s+(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M
    )
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading) for heading in headings]
    github = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in plain}
    return github | {heading.replace(" ", "-") for heading in plain}


def page_text(path: Path) -> str:
    if path.suffix == ".ipynb":
        return "\n\n".join(text for kind, text in cells(path) if kind == "markdown")
    return path.read_text(encoding="utf-8")


def links(text: str) -> Iterator[str]:
    """Where links and pictures lead, other than to the web."""
    found = re.findall(r"\]\(([^)\s]+)|(?:src|href)=[\"']([^\"']+)", without_code(text))
    yield from (link for pair in found for link in pair if link and not re.match(r"[a-z]+:", link))


def lost_links(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    lost = []
    for link in links(page_text(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(page_text(target))):
            lost.append(link)
    return lost


def test_links_pictures_and_anchors_lead_somewhere() -> None:
    assert found_in(READ, lost_links) == {}


@cache
def exercises() -> set[str]:
    every = "\n".join(page_text(path) for path in NOTEBOOKS)
    return set(re.findall(r"^### Exercise (\d+\.\d+)", every, re.MULTILINE))


@cache
def units() -> set[str]:
    every = "\n".join(page_text(path) for path in NOTEBOOKS)
    return set(re.findall(r"^## (\d+\.\d+) ", every, re.MULTILINE))


MEANT_TO_FAIL = {"1.9"}  # lesson 1 shows what happens


def lost_numbers(path: Path) -> list[str]:
    """The exercises, units and sections that a notebook names, and that aren't there."""
    code = "\n".join(text for kind, text in cells(path) if kind == "code" and not re.search(r"^#\|\s*export", text))
    text = page_text(path)
    called = re.findall(r"^\s*(?:check|hint|solution|wrong_answers)\(\"(\d+\.\d+)\"", code, re.MULTILINE)
    named = re.findall(r"\b[Ee]xercises? (\d+\.\d+)", text)
    named += re.findall(r"(?:mlops-course (?:check|hint|solution|reset|watch)|check\(\"|hint\(\") ?(\d+\.\d+)", text)
    lesson = path.name[:2].isdigit() and path.parent == ROOT / "nbs"
    lost = sorted({*called, *named} - exercises() - MEANT_TO_FAIL) if lesson else []
    places = re.findall(r"\b(?:[Uu]nit|[Ss]ection|[Ll]esson) (\d+\.\d+)", text)
    sections = re.findall(r"\b(?:[Ss]ections?|[Ll]essons?) (\d+)(?![\d.]*\d)", text)
    return [*lost, *sorted(set(places) - units()), *(number for number in sections if not 1 <= int(number) <= 15)]


def test_exercises_units_and_sections_that_are_named_exist() -> None:
    assert len(exercises()) > 40
    assert len(units()) > 40
    assert found_in(NOTEBOOKS, lost_numbers) == {}


FOLDERS = "nbs|tests|benchmarks|tools|deploy|mlops_course|\\.github|\\.ci"


def lost_files(path: Path) -> list[str]:
    """The files that a page names, and that aren't there."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", page_text(path))
    return [name for name in named if not (list(ROOT.glob(name.rstrip("/"))) or name.startswith("nbs/_"))]


def test_files_that_are_named_exist() -> None:
    assert found_in(READ, lost_files) == {}


def commands(group: typer.Typer) -> set[str]:
    """The words that may follow `mlops-course`."""
    command = typer.main.get_command(group)
    return set(getattr(command, "commands", {}))


def test_commands_that_are_named_exist() -> None:
    listed = re.search(r"^TASKS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed is not None
    ours, tasks = commands(app), set(listed[1].split())

    def look(path: Path) -> list[str]:
        text = page_text(path)
        wrong = set(re.findall(r"(?:^|`|bin/)mlops-course ([a-z][a-z-]*)", text, re.MULTILINE)) - ours
        wrong |= {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"^make ([a-z-]+)", text, re.M)} - tasks
        return sorted(wrong | set(re.findall(r"tasks\.py ([a-z-]+)`", text)) - tasks)

    assert found_in(READ, look) == {}


# ---------------------------------------------------------------- what every section opens with


def test_a_section_opens_with_its_time_what_it_needs_and_a_picture() -> None:
    lacking = {}
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        if "### Exercise" not in page_text(path):
            continue  # it isn't written as a lesson yet
        opening = page_text(path).partition("\n## ")[0]
        wanted = {"time": r"\bhours?\b", "needs": r"\bneed\b|nothing but", "picture": r"^```mermaid"}
        lacking[path.name] = [name for name, words in wanted.items() if not re.search(words, opening, re.MULTILINE)]
    assert {name: what for name, what in lacking.items() if what} == {}


def test_a_lab_folds_how_its_author_looks_for_the_fault() -> None:
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        text = page_text(path)
        if "lab-hint" in path.read_text(encoding="utf-8"):
            assert "<summary>How I look for it</summary>" in text, path.name
            assert "### How I look for it" not in text, path.name


def test_the_readme_has_a_clone_line_that_can_be_pasted() -> None:
    lines = (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()
    said = dict(line.replace(" ", "").split("=", 1) for line in lines if re.match(r"(user|repo|lib_name) ?=", line))
    repo = said["repo"].replace("%(lib_name)s", said["lib_name"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"git clone https://github.com/{said['user']}/{repo}\ncd {repo}\n" in readme
    assert readme.index("make run") < readme.index("start 1") < readme.index("PR-AUC")


# ---------------------------------------------------------------- the glossary

GLOSSARY = ROOT / "nbs" / "glossary.ipynb"
MUST_BE_THERE = {"ASGI", "kubelet", "mesh", "principal", "canary", "idempotent", "ONNX", "SLO", "SBOM", "calibration"}


def glossary() -> dict[str, tuple[str, str]]:
    """Each term with its sentence and the lesson that introduces it."""
    entries = re.split(r"^### ", page_text(GLOSSARY), flags=re.MULTILINE)[1:]
    found = {}
    for entry in entries:
        term, sentence = entry.strip().split("\n\n")
        lesson = re.fullmatch(r"(.+) \(\[section \d+\]\((\d\d_\w+\.ipynb)\)\)", sentence)
        assert lesson is not None, f"{term}: a sentence and the section that introduces it"
        found[term] = (lesson[1], lesson[2])
    return found


def test_the_glossary_has_each_term_once_in_a_plain_sentence() -> None:
    found = glossary()
    assert found.keys() >= MUST_BE_THERE
    assert len(found) == page_text(GLOSSARY).count("### ")
    assert [term for term, (sentence, _) in found.items() if not sentence.endswith(".") or len(sentence) > 200] == []
    assert list(found) == sorted(found, key=str.lower)


def test_a_term_of_the_glossary_is_linked_from_the_lesson_that_introduces_it() -> None:
    texts = {path.name: page_text(path) for path in NOTEBOOKS if path.parent == GLOSSARY.parent}
    unlinked = {
        term: name
        for term, (_, name) in glossary().items()
        if "glossary.ipynb" in texts[name] and texts[name].count(f"(glossary.ipynb#{term})") != 1
    }
    assert unlinked == {}


# ---------------------------------------------------------------- what a lesson uses is introduced in it, or before

LESSONS = [path for path in NOTEBOOKS if path.parent == GLOSSARY.parent and path.name[:2].isdigit()]
NOT_READ = {"wrong-answers", "lab-prepare", "lab-check", "lab-break", "lab-fix", "helper"}  # folded, or never shown
CALLED = {  # libraries that a text calls otherwise than a program does
    "sklearn": "scikit-learn", "yaml": "YAML", "deltalake": "Delta Lake", "distributed": "Dask", "scipy": "SciPy",
}  # fmt: skip
LENT = {("01_welcome", "environment"): "a loan from section 2"}  # a later section's, and where the text says so
EVERYDAY = {"run", "window", "signature", "contract", "role", "gate", "bundle"}  # they mean something without us, too


@cache
def program(path: Path) -> ast.Module:
    """The code of a lesson that its readers see."""
    body = []
    for cell in read_notebook(path)["cells"]:
        source = re.sub(r"^\s*[!%].*$", "", cell["source"], flags=re.MULTILINE)
        seen = not (NOT_READ & tags(cell)) and "### BEGIN HIDDEN TESTS" not in source and "#| hide" not in source
        if cell["cell_type"] == "code" and seen:
            body += ast.parse(source).body
    return ast.Module(body, [])


def imported(path: Path) -> set[str]:
    """All modules that a lesson imports from."""
    found = set()
    for node in ast.walk(program(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {*names, node.module or ""} if isinstance(node, ast.ImportFrom) else set(names)
    return found


def paragraphs(path: Path) -> list[str]:
    """The text of a lesson in its parts, without its quiz."""
    cells = [cell["source"] for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown"]
    text = "\n\n".join(source for source in cells if read_question(source) is None)
    return re.split(r"\n\s*\n|\n(?=[|-])", text)


def test_a_library_is_named_in_the_text_of_the_lesson_that_uses_it_first_or_before() -> None:
    unnamed, said = {}, ""
    for path in LESSONS:
        said += page_text(path)
        libraries = {module.partition(".")[0] for module in imported(path)} - {"mlops_course", ""}
        for name in libraries - sys.stdlib_module_names:
            words = rf"(?<!\w){re.escape(CALLED.get(name, name)).replace('_', '[-_ ]')}(?!\w)"
            if not re.search(words, said, re.IGNORECASE):
                unnamed.setdefault(name, path.name)
    assert unnamed == {}


def section(module: str) -> int:
    """Which section's notebook a module comes from; 0: that of the command line, which is of no section."""
    place = ROOT / module.replace(".", "/")
    file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    source = re.search(r"File to edit: \S*?(?:(\d\d)_)?\w+\.ipynb", file.read_text(encoding="utf-8"))
    return int(source[1] or 0) if source else 0


def test_a_function_comes_from_the_lessons_own_section_or_an_earlier_one() -> None:
    ahead = {}
    for path in LESSONS:
        ours = [module for module in imported(path) if module.startswith("mlops_course.")]
        later = {module.partition(".")[2] for module in ours if section(module) > int(path.name[:2])}
        text = path.read_text(encoding="utf-8")
        borrowed = {module for module in later if LENT.get((path.stem, module), "\0") in text}
        if later - borrowed:
            ahead[path.name] = later - borrowed
    assert len({section(module) for path in LESSONS for module in imported(path) if "mlops_course." in module}) > 12
    assert ahead == {}


def test_a_word_of_the_glossary_that_is_used_early_is_linked_or_its_section_is_named() -> None:
    unexplained = {}
    for term, (_, introduced) in glossary().items():
        words = re.escape(term).replace(r"\-", "[-/ ]")
        used = re.compile(rf"(?<![\w-]){words}s?(?![\w-])", 0 if term.isupper() else re.IGNORECASE)
        for path in [path for path in LESSONS if path.name < introduced and term not in EVERYDAY]:
            first = next((part for part in paragraphs(path) if used.search(plain_text(part))), "")
            explained = "Section" in first or "section" in first or re.match(r"\| .*\d+ ", first)
            if first and not explained and f"(glossary.ipynb#{term})" not in page_text(path):
                unexplained[term] = path.name
                break
            if first:
                break
    assert unexplained == {}
