"""The page `/ops` in a real browser: it follows what happens, by keyboard, on a phone, in light and dark, offline."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_in
from service_helpers import FIRST, SECOND, Running, serving, until

from mlops_course.capstone.ops_page import OPERATIONS_FILES
from mlops_course.ledger import LedgerEntry, append_entry
from mlops_course.security.keys import create_key
from mlops_course.serving import publish

pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning"),  # inside pyarrow
]
APP = ("--app", "mlops_course.capstone.production:production_app")
CARDS = ("alerts", "models", "performance", "latency", "drift", "retraining", "releases", "ledger", "parts")
CONTRAST = """() => {
    const part = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4
    const light = colour => colour.match(/[\\d.]+/g).slice(0, 3)
        .reduce((sum, each, place) => sum + part(each / 255) * [.2126, .7152, .0722][place], 0)
    const behind = each => {
        const colour = getComputedStyle(each).backgroundColor
        return /, 0\\)$/.test(colour) && each.parentElement ? behind(each.parentElement) : colour
    }
    const own = each => [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
    const ratio = each => {
        const drawn = each.namespaceURI.endsWith('svg')
        const colour = getComputedStyle(each)[drawn ? 'fill' : 'color']
        const pair = [light(colour), light(behind(each))].sort((a, b) => a - b)
        return (pair[1] + .05) / (pair[0] + .05)
    }
    const text = [...document.querySelectorAll('body *')].filter(each => own(each) && each.checkVisibility())
    return text.filter(each => ratio(each) < 4.5).map(each => `${ratio(each)} ${each.outerHTML.slice(0, 80)}`)
}"""
MONTHS = [("2013-05", 0.47, 0.46), ("2013-06", 0.48, 0.52), ("2013-07", 0.47, None)]


def write_months(home: Path) -> None:
    """What the monthly looks have found."""
    usual = {"model": FIRST, "features": 103, "score_psi": 0.1, "interval": [0.44, 0.5], "trust": "trusted"}
    usual |= {"tables": {}, "trained": ["2013-01", "2013-03"]}
    usual |= {"performance": "", "coverage": {"share": 0.97}, "verdict": "alarm"}
    usual |= {"moved": ["temperature", "dew_point"], "alarms": ["the loss is above what the scores promised"]}
    found = [
        {**usual, "month": month, "estimated": one, "labelled": other, "page": f"flight-delay-{month}.html",
         "time": f"{month}-28T00:00:00.000Z"} for month, one, other in MONTHS
    ]  # fmt: skip
    (home / "production").mkdir(exist_ok=True)
    (home / "production" / "reviews-flight-delay.json").write_text(json.dumps(found), encoding="utf-8")
    (home / "reports").mkdir(exist_ok=True)
    (home / "reports" / "flight-delay-2013-07.html").write_text("<title>July</title><p>The report", encoding="utf-8")


@pytest.fixture
def running(home: Path) -> Iterator[Running]:
    """A service of the test's own."""
    write_months(home)
    with serving(home, *APP) as service:
        yield service


@pytest.fixture(scope="module")
def shared(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for all tests that leave it as it is, but for lines of the ledger."""
    own = tmp_path_factory.mktemp("shared") / "workspace"
    shutil.copytree(published / "serving", own / "serving")
    settings_in(own)
    write_months(own)
    with serving(own, *APP) as service:
        yield service


def open_page(browser: Any, running: Running, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, once it has drawn its last card, and what went wrong in it."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if str(running.port) not in asked.url else None)
    page.goto(f"{running.url}/ops")
    page.locator("#parts > *").first.wait_for()
    return page, wrong


def test_it_shows_what_is_and_follows_what_happens(browser: Any, running: Running) -> None:
    page, wrong = open_page(browser, running)
    assert all(page.locator(f"#{name} > *").count() for name in CARDS)
    assert page.locator("#models").inner_text().count(FIRST) == 1
    assert "the loss is above" in page.locator("#alerts").inner_text()
    chart = page.get_by_role("img").get_attribute("aria-label")
    assert "2013-07" in chart and "estimated 0.470" in chart and "labelled –" in chart
    assert page.locator("#performance circle.labelled").count() == 2
    record = running.client.get("/examples").json()[0]["record"]
    for _ in range(7):
        assert running.ask(record=record).status_code == 200
    page.locator("#models td.number", has_text="7").first.wait_for()
    publish(settings_in(running.settings.home), SECOND, reason="tested in the browser")
    page.locator("#models a", has_text=SECOND).wait_for()
    page.locator("#ledger td", has_text="tested in the browser").wait_for()
    assert wrong == []
    page.context.close()


def test_each_fact_leads_to_what_proves_it(browser: Any, shared: Running) -> None:
    page, _ = open_page(browser, shared)
    page.locator("#drift a").click()
    page.wait_for_url("**/ops/report?name=flight-delay-2013-07.html")
    assert page.title() == "July"
    page.go_back()
    page.locator("#ledger td a").first.click()
    page.wait_for_url("**/ops/ledger?number=*")
    assert '"hash"' in page.content()
    page.go_back()
    links = page.locator("main a").evaluate_all("all => all.map(each => each.getAttribute('href'))")
    assert len(links) > 5
    reports = ("/ops/report?name=flight-delay-2013-05.html", "/ops/report?name=flight-delay-2013-06.html")  # not there
    for link in {link for link in links if link.startswith("/ops/")} - set(reports):
        assert shared.client.get(link).status_code == 200, link
    page.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390), ("dark", 1280), ("light", 390)])
def test_it_can_be_read_in_any_light_and_on_a_phone(browser: Any, shared: Running, scheme: str, width: int) -> None:
    page, wrong = open_page(browser, shared, width, scheme)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    headings = page.locator("h1, h2").evaluate_all("all => all.map(each => each.tagName)")
    assert headings == ["H1", *["H2"] * len(CARDS)]
    assert page.locator("th:not([scope])").count() == 0
    assert wrong == []
    page.context.close()


def test_it_is_used_by_keyboard(browser: Any, shared: Running) -> None:
    page, _ = open_page(browser, shared)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the alerts"
    assert page.locator(".skip").bounding_box()["x"] >= 0, "who has the focus is seen"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "alerts"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.ariaLabel || ''"))
    assert {"/metrics", "Ledger", "Models and traffic", f"/ops/model?name={FIRST}"} <= seen
    page.locator("#pause").focus()
    page.keyboard.press("Enter")
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    page.wait_for_timeout(300)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []
    page.keyboard.press("Enter")
    until(lambda: (page.wait_for_timeout(100), bool(asked))[1], 10)
    page.context.close()


def test_the_focus_and_what_is_announced_stay_while_nothing_changes(browser: Any, shared: Running) -> None:
    page, _ = open_page(browser, shared)
    page.evaluate("document.querySelector('#ledger td a').focus()")
    page.evaluate("""() => { window.changes = 0
        new MutationObserver(found => window.changes += found.length)
            .observe(document.querySelector('#alerts'), { childList: true, subtree: true, characterData: true }) }""")
    before = page.locator("#fresh").inner_text()
    until(lambda: page.locator("#fresh").inner_text() != before, 15)
    assert page.evaluate("document.activeElement.closest('#ledger') !== null")
    assert page.evaluate("window.changes") == 0
    page.context.close()


def test_text_of_the_workspace_is_never_markup(browser: Any, shared: Running) -> None:
    evil = "<img src=x onerror=document.title='gone'>"
    entry = LedgerEntry(event=evil, use_case="x", subject=evil, by=evil, reason=evil)
    append_entry(settings_in(shared.settings.home), entry)
    page, wrong = open_page(browser, shared)
    page.locator("#ledger td", has_text="onerror").first.wait_for()
    assert page.locator("img").count() == 0 and page.title() == "Operations" and wrong == []
    page.route("**/ops.json", lambda route: route.fulfill(status=503, json={"detail": evil}))
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == evil
    page.context.close()


def test_a_service_that_is_gone_is_said(browser: Any, running: Running) -> None:
    page, _ = open_page(browser, running)
    running.stop()
    page.get_by_role("alert").wait_for(timeout=15_000)
    assert page.get_by_role("alert").inner_text() == "The service does not answer."
    page.context.close()


def test_with_keys_it_asks_for_one_of_whoever_operates(browser: Any, home: Path) -> None:
    write_months(home)
    keys = {role: create_key(settings_in(home), role, role).text for role in ("predict", "operate")}
    with serving(home, *APP) as running:
        page = browser.new_page()
        page.goto(f"{running.url}/ops")
        page.locator("#key").wait_for()
        assert FIRST not in page.content()
        page.locator("#key").fill(keys["predict"])
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("the role predict may not").wait_for()
        page.locator("#key").fill(keys["operate"])
        page.keyboard.press("Enter")
        page.locator("#models a", has_text=FIRST).wait_for()
        assert page.locator("#key").is_hidden()
        with page.expect_download() as saved:
            page.locator("#drift a").click()
        assert saved.value.suggested_filename == "flight-delay-2013-07.html"
        assert "The report" in Path(saved.value.path()).read_text(encoding="utf-8")
        page.close()


def test_the_browser_is_told_to_load_nothing_else() -> None:
    text = "".join(content for content, _ in OPERATIONS_FILES.values())
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http:\\/\\/127", "")


@pytest.mark.parametrize(
    ("address", "is_link"),
    [
        ("/ops/report?name=x.html", True), ("/", True), ("http://127.0.0.1:9090/alerts", True),
        ("//example.org/x", False), ("/\\example.org", False), ("http://127.0.0.1:80" "@example.org/", False),
        ("https://example.org", False), ("javascript:alert(1)", False), ("", False),
    ],
)  # fmt: skip
def test_only_what_is_on_this_machine_becomes_a_link(address: str, is_link: bool) -> None:
    script = next(text for name, (text, *_) in OPERATIONS_FILES.items() if name.endswith(".js"))
    pattern = re.search(r"const near = /(.*)/;", script if isinstance(script, str) else script.decode())
    assert pattern is not None
    assert bool(re.search(pattern[1], address)) is is_link
