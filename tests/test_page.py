"""The page at `/` in a real browser: a flight is chosen and changed, the score follows, nothing is from elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_helpers import FIRST, Running

from mlops_course.serving.page import FILES

pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning"),  # inside pyarrow
]


@pytest.fixture
def page(browser: Any, service: Running) -> Iterator[Any]:
    """The page, and what went wrong in it: nothing."""
    opened, wrong, hosts = browser.new_page(), [], set()
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    opened.goto(service.url)
    opened.locator("#reasons li").first.wait_for()
    yield opened
    opened.close()
    assert wrong == []
    assert hosts == {f"127.0.0.1:{service.port}"}


def shown_score(page: Any) -> float:
    return float(page.locator("#score").inner_text().removesuffix(" %"))


def test_a_flight_is_there_with_its_score_its_reasons_and_the_model(page: Any) -> None:
    assert 0 <= shown_score(page) <= 100
    assert page.locator("#reasons li").count() == 6
    assert page.locator("#choice option").count() == 12
    assert FIRST in page.locator("#model").inner_text()
    assert "26.7 %" in page.locator("#threshold").inner_text()
    warned = page.locator("#verdict").inner_text() == "warn"
    assert warned == (shown_score(page) >= 26.7)


def test_another_flight_has_another_score(page: Any) -> None:
    """Each is the one that the service answered: a page that goes on showing the first would be found."""
    scores = set()
    for number in range(1, 6):
        with page.expect_response("**/predict*") as asked:
            page.locator("#choice").select_option(index=number)
        answered = 100 * asked.value.json()["score"]
        page.wait_for_timeout(100)
        assert shown_score(page) == pytest.approx(answered, abs=0.06)
        scores.add(shown_score(page))
    assert len(scores) > 1


def test_a_changed_field_is_scored_anew_and_nonsense_is_said_so(page: Any) -> None:
    field = page.locator("#fields input[name=carrier]")
    with page.expect_response("**/predict*") as asked:
        field.fill("ZZ")
    assert asked.value.ok
    assert '"carrier":"ZZ"' in asked.value.request.post_data
    number = page.locator("#fields input[type=number]").first
    with page.expect_response("**/predict*") as asked:
        number.fill("")
    assert f'"{number.get_attribute("name")}":null' in asked.value.request.post_data
    assert page.locator("#trouble").is_hidden()


def test_a_refusal_is_shown_in_its_own_words(browser: Any, service: Running) -> None:
    opened = browser.new_page()
    opened.route("**/predict*", lambda route: route.fulfill(status=503, json={"detail": "too busy", "remedy": "Wait"}))
    opened.goto(service.url)
    opened.get_by_role("alert").wait_for()
    assert opened.get_by_role("alert").inner_text() == "too busy. Wait"
    opened.close()


def test_text_of_the_service_is_never_markup(browser: Any, service: Running) -> None:
    evil = "<img src=x onerror=document.title='gone'>"
    opened = browser.new_page()
    opened.route("**/examples*", lambda route: route.fulfill(json=[{"key": {"carrier": evil}, "record": {}}]))
    answer = {
        "score": 0.5, "warned": True, "threshold": 0.2, "model": evil, "request_id": "1",
        "reasons": [{"name": evil, "values": {evil: evil}, "effect": 0.1}],
    }  # fmt: skip
    opened.route("**/predict*", lambda route: route.fulfill(json=answer))
    opened.goto(service.url)
    opened.locator("#reasons li").first.wait_for()
    assert opened.locator("img").count() == 0
    assert evil in opened.locator("#choice").inner_text()
    assert opened.title() == "Will this flight be late?"
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark_and_on_a_phone(browser: Any, service: Running, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 700})
    opened = context.new_page()
    opened.goto(service.url)
    opened.locator("#reasons li").first.wait_for()
    text, back = (
        brightness(opened.locator(".card").first.evaluate(f"card => getComputedStyle(card).{name}"))
        for name in ("color", "backgroundColor")
    )
    assert (text < back) == (scheme == "light")
    assert (max(text, back) + 0.05) / (min(text, back) + 0.05) > 7, "contrast, as WCAG counts it"
    assert opened.evaluate("() => document.documentElement.scrollWidth") <= 360
    context.close()


def brightness(color: str) -> float:
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_browser_is_told_to_load_nothing_else(service: Running) -> None:
    for path in FILES:
        answer = service.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert service.client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304


def test_nothing_on_it_is_from_elsewhere(root: Path) -> None:
    assert all("//" not in content.replace("// ", "") for content, _ in FILES.values())
