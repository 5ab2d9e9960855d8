"""The dashboard: its files keep the rules of its security policy, and it does in a browser what it should.

What needs a browser is skipped where there is no Chromium.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from chromium import Page
from dashboard_service import EMPTY, EXAMPLE, HOSTILE, HOSTILE_STATUS, MODELS, NOW_S, Scripted

from edgert.service.contract import PowerStatus, ServiceEvent, Status

pytest.importorskip("uvicorn")
from served import KEY, serving

FILES = sorted((Path(__file__).parents[1] / "edgert" / "service" / "dashboard").iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
UP = "!document.getElementById('main').hidden"

needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no chromium here")


class Tags(HTMLParser):
    """Start tags of a page with their attributes, and the text inside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in ("script", "style"):
            self.inline += data.strip()


def test_the_page_is_made_of_its_own_files_only() -> None:
    page = Tags((FILES[0].parent / "index.html").read_text("utf-8"))
    names = {f"/ui/{file.name}" for file in FILES}
    linked = {attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs} - {"#models"}
    assert linked <= names
    assert {"/ui/app.js", "/ui/style.css"} <= linked
    assert page.inline == ""
    assert [(tag, key) for tag, attrs in page.tags for key in attrs if key == "style" or key.startswith("on")] == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for script in SCRIPTS:
        text = script.read_text("utf-8")
        assert {f"/ui/{name}" for name in re.findall(r'from "\./(.+?)"', text)} <= names, script.name
        assert set(re.findall(r'byId\("(.+?)"\)', text)) <= set(ids), script.name
    for file in FILES:
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//cdn|@import|url\(", text), file.name
        assert len(text.splitlines()) < 400, file.name


def test_no_text_becomes_markup() -> None:
    for script in SCRIPTS:
        text = script.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", text), (
            script
        )


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


Visit = Callable[..., Scripted]


@pytest.fixture
def visit(browser: Page) -> Iterator[Visit]:
    """Serves a state and opens the page on it, with the right key unless another fragment is given."""
    with ExitStack() as stack:

        def go(
            shown: Status = EXAMPLE, *, fragment: str = f"#token={KEY.replace(' ', '%20')}", until: str = UP
        ) -> Scripted:
            service = Scripted(shown)
            url = stack.enter_context(serving(service))
            stack.callback(browser.open, "about:blank")  # or its stream of events would keep the server
            browser.requests.clear()
            browser.problems.clear()
            browser.open(f"{url}/{fragment}")
            browser.until(until)
            return service

        yield go


@needs_browser
def test_it_shows_what_the_status_says(browser: Page, visit: Visit) -> None:
    visit()
    figures = {name: browser.text(f"#{name}") for name in ("speed", "watts", "token", "running", "memory", "mode")}
    assert figures == {
        "speed": "41.6", "watts": "9.80", "token": "0.236", "running": "3", "memory": "1.9", "mode": "balanced",
    }  # fmt: skip
    assert [browser.text(f"#{name}-note") for name in ("speed", "watts", "token")] == ["measured"] * 3
    assert browser.text("#queue-note") == "1 waiting, of 64 a model"
    assert browser.js("document.querySelector('#memory-bar').getAttribute('aria-valuenow')") == "24"
    assert browser.text("#models-count") == "2 of 4 loaded"
    card = browser.text(".model")
    for told in (
        "qwen3-1.7b",
        "working",
        "pinned",
        "41.6 tok/s",
        "9.80 W",
        "0.236 J/token",
        "212.0 MB",
        "32768 tokens",
    ):
        assert told in card
    assert browser.js("document.querySelectorAll('.strip')[1].getAttribute('aria-label')") == (
        "decode: blocks 0 to 15 on NPU@f16+static (8 attention, 8 ffn); blocks 16 to 39 on GPU@f16 (12 attention, "
        "12 ffn); blocks 40 to 55 on CPU@kernels (8 attention, 8 ffn)"
    )
    colours = browser.js(
        "[...document.querySelectorAll('.strip')[1].children].map(e => getComputedStyle(e).background)"
    )
    assert len(set(colours)) == 3
    widths = browser.js("[...document.querySelectorAll('.strip')[1].children].map(e => e.offsetWidth)")
    assert widths[1] / widths[0] == pytest.approx(24 / 16, abs=0.05)
    assert "GPU.1 failed and is left alone" in browser.text(".model:nth-child(2) .warnings")
    assert "did not answer within 60 s" in browser.text("#quarantine-list")
    assert browser.text("#power-facts").replace("\n", " ") == (
        "Power source battery, 64 % Slowed by heat no Somebody there yes Limit 15.0 W Last hour 8.41 kJ of 20.0 kJ"
    )
    assert browser.js("document.querySelectorAll('#event-rows tr').length") == 7
    assert browser.text("#event-rows tr td:nth-child(2)") == "recovery"  # the newest first
    assert browser.problems == []


@needs_browser
def test_what_is_not_known_is_a_dash(browser: Page, visit: Visit) -> None:
    blind = replace(MODELS[0], watts=None, joules_per_token=None, energy_provenance="unavailable", memory_bytes=None)
    visit(replace(EXAMPLE, models=(blind,), memory_bytes=None, memory_limit_bytes=None, power=PowerStatus()))
    assert [browser.text(f"#{name}") for name in ("speed", "watts", "token", "memory")] == ["41.6", "–", "–", "–"]
    assert browser.text("#watts-note") == "unknown: nothing here counts joules"
    assert "– W unknown" in re.sub(r"\s+", " ", browser.text(".figures"))
    assert browser.text("#power-facts").count("–") == 4
    assert browser.js("document.querySelector('#watts-spark .line').getAttribute('d')") == ""


@needs_browser
def test_joules_say_where_they_come_from(browser: Page, visit: Visit) -> None:
    models = (MODELS[0], replace(MODELS[0], name="guessed", energy_provenance="estimated", tokens_per_second=10.0))
    visit(replace(EXAMPLE, models=models))
    assert [browser.text("#speed"), browser.text("#watts")] == ["51.6", "19.6"]
    assert browser.text("#watts-note") == "estimated"  # a sum is as good as its worst part
    assert browser.js("[...document.querySelectorAll('.source')].map(e => e.textContent)") == [
        "measured", "measured", "measured", "measured", "estimated", "estimated",
    ]  # fmt: skip


@needs_browser
def test_buttons_work_by_keyboard(browser: Page, visit: Visit) -> None:
    service = visit()

    def tab_to(label: str) -> None:
        for _ in range(30):
            browser.key("Tab")
            if browser.js("document.activeElement.getAttribute('aria-label')") == label:
                assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        raise AssertionError(f"{label} is not reached")

    tab_to("Load gemma-3-1b")
    browser.key("Enter")
    browser.until("document.activeElement.getAttribute('aria-label') === 'Unload gemma-3-1b'")
    assert service.loaded == [("gemma-3-1b", None, None)]
    tab_to("Load minilm-embeddings")
    browser.key(" ")
    browser.until("[...document.querySelectorAll('.model .wrong')].some(e => e.innerText.includes('do not fit'))")
    browser.js("document.body.focus()")
    browser.js("document.activeElement.blur()")
    tab_to("Unpin qwen3-1.7b")
    browser.key("Enter")
    browser.until("document.activeElement.getAttribute('aria-label') === 'Pin qwen3-1.7b'")
    assert service.loaded[-1] == ("qwen3-1.7b", False, None)
    tab_to("Unload qwen3-1.7b")
    browser.key("Enter")
    browser.until("document.activeElement.getAttribute('aria-label') === 'Load qwen3-1.7b'")
    assert service.unloaded == ["qwen3-1.7b"]


@needs_browser
def test_hostile_names_stay_text(browser: Page, visit: Visit) -> None:
    service = visit(HOSTILE_STATUS)
    browser.until("document.querySelectorAll('.model').length === 3")
    assert browser.text(".model h3") == HOSTILE
    assert browser.js("document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert browser.js("document.title") == "41.6 tok/s – edgert"
    assert browser.text("#event-rows tr:last-child td:last-child") == HOSTILE
    browser.js("document.querySelector('.model .buttons button:last-child').click()")
    browser.until("document.querySelector('.model').classList.contains('away')")
    assert service.unloaded == [HOSTILE]
    for width in (1280, 360):
        browser.size(width, 800)
        assert browser.js("document.documentElement.scrollWidth") <= width
    browser.size(1280, 900)
    assert browser.problems == []


@needs_browser
def test_nothing_leaves_the_host_and_the_key_stays_out_of_sight(browser: Page, visit: Visit) -> None:
    service = visit()
    browser.until("document.getElementById('events-live').textContent === 'live'")
    base = browser.js("location.origin")
    assert {url.partition("#")[0].removeprefix(base)[:4] for url in browser.requests} == {"/", "/ui/", "/v1/"}
    assert browser.js("location.href") == f"{base}/"
    assert browser.js("document.documentElement.outerHTML").count(KEY) == 0
    assert service.listening == 1
    assert browser.problems == []


@needs_browser
def test_without_the_key_it_asks_for_it(browser: Page, visit: Visit) -> None:
    asked = "!document.getElementById('key-form').hidden"
    service = visit(fragment="#token=wrong", until=asked)
    assert not browser.js("document.getElementById('key-wrong').hidden")
    assert browser.js("document.getElementById('main').hidden")
    assert browser.js("document.activeElement.id") == "key"
    assert service.asked == 0
    browser.type(KEY)
    browser.key("Enter")
    browser.until(UP)
    assert browser.js(asked) is False
    browser.js("location.reload()")  # this tab remembers it
    browser.until(f"document.readyState === 'complete' && document.getElementById('main') && {UP}")


@needs_browser
def test_events_come_as_they_happen(browser: Page, visit: Visit) -> None:
    service = visit()
    browser.until("document.getElementById('events-live').textContent === 'live'")
    assert browser.text("#news") == ""  # the past is not read out
    service.tell(ServiceEvent(8, NOW_S, "plan", "qwen3-1.7b", "balanced → saver"))
    browser.until("document.querySelectorAll('#event-rows tr').length === 8")
    assert browser.text("#event-rows tr td:last-child") == "balanced → saver"
    assert browser.text("#news") == "plan: qwen3-1.7b: balanced → saver"


@needs_browser
def test_a_page_that_nobody_sees_asks_nothing(browser: Page, visit: Visit) -> None:
    watch = browser.send(
        "Page.addScriptToEvaluateOnNewDocument",
        source="""window.pending = new Set();
        const [set, clear] = [window.setTimeout, window.clearTimeout];
        window.setTimeout = (f, ms) => {
          const id = set(() => { pending.delete(id); f(); }, ms);
          pending.add(id);
          return id;
        };
        window.clearTimeout = id => { pending.delete(id); clear(id); };""",
    )["identifier"]
    visit()
    browser.until("document.getElementById('events-live').textContent === 'live' && pending.size === 1")
    browser.js("""Object.defineProperty(document, 'visibilityState', {value: 'hidden', configurable: true});
                  document.dispatchEvent(new Event('visibilitychange'))""")
    assert browser.js("pending.size") == 0
    browser.until("document.getElementById('events-live').textContent === ''")
    browser.requests.clear()
    browser.js("delete document.visibilityState; document.dispatchEvent(new Event('visibilitychange'))")
    browser.until("document.getElementById('events-live').textContent === 'live'")
    assert [url.rpartition("/")[2] for url in browser.requests] == ["status", "events"]
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=watch)


@needs_browser
def test_a_service_that_is_gone_is_told_and_found_again(browser: Page, visit: Visit) -> None:
    visit()
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.send("Network.emulateNetworkConditions", offline=True, **network)
    browser.js("document.dispatchEvent(new Event('visibilitychange'))")  # looks at once
    browser.until("!document.getElementById('banner').hidden")
    assert browser.text("#banner-text").startswith("The service does not answer. Trying again in")
    assert browser.text("#link-text") == "not connected"
    assert browser.text(".model h3") == "qwen3-1.7b"  # the last state is still there, and marked as such
    assert browser.js("document.body.classList.contains('stale')")
    browser.send("Network.emulateNetworkConditions", offline=False, **network)
    browser.js("document.getElementById('retry').focus()")
    browser.key("Enter")
    browser.until("document.getElementById('banner').hidden")
    assert browser.text("#link-text") == "live"


@needs_browser
def test_an_empty_service_says_what_to_do(browser: Page, visit: Visit) -> None:
    visit(EMPTY)
    assert "edgert serve model.edge" in browser.text("#no-models")
    assert browser.text("#no-events") == "Nothing has happened yet."
    assert browser.js("document.getElementById('quarantine').hidden")


@needs_browser
def test_light_dark_and_narrow(browser: Page, visit: Visit) -> None:
    visit()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.js(paper)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = browser.js(paper)
    assert light != dark
    button = "document.getElementById('theme')"
    seen = []
    for _ in range(3):
        browser.js(f"{button}.click()")
        seen.append((browser.js(f"{button}.textContent"), browser.js(paper)))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", dark)]
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.size(360, 780)
    assert browser.js("document.documentElement.scrollWidth") == 360
    low = "[...document.querySelectorAll('button')].filter(b => b.offsetParent && b.offsetHeight < 28).length"
    assert browser.js(low) == 0  # nothing too small for a finger
    browser.size(1280, 900)
