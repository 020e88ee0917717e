"""The pages in a real Chromium: `apt-get install chromium chromium-driver`."""

import itertools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee as pw
import pytest
import uvicorn
from dashboard_traffic import XSS, fill, hostile
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from llm_orm import Budget, Store, connect
from llm_orm.dashboard import create_app
from llm_orm.listing import chats
from llm_orm.usage import usage

SPAN = "since=2026-10-01&until=2026-10-31"
OF_SPAN: Any = {"since": "2026-10-01", "until": "2026-10-31"}
HOSTILE_SPAN = "since=2026-11-01&until=2026-11-10"
PAGES = ("/", "/models", "/users", "/agents", "/tools", "/errors", "/chats", "/requests", "/budgets")
WIDEST = ("/", "/users", "/errors", "/chats", "/requests", "/budgets")

IMAGES = Path(__file__).parents[2] / "docs" / "images"
LARGEST_IMAGE = 200_000

OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --lang=en-US"
).split()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("dashboard") / "chats.db"
    own, budgets = {"user_id": pw.TextField(null=True)}, [Budget("0.5", "total", where={"metadata.plan": "free"})]
    with connect(f"sqlite:///{path}", chat_fields=own, budgets=budgets) as store:
        store.create_tables()
        fill(store, days=60, per_day=40)
        hostile(store)
        yield store


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address under which an application answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def address(filled: Store) -> Iterator[str]:
    with served(create_app(filled)) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        missing = "these tests need a Chromium and its driver: apt-get install chromium chromium-driver"
        pytest.fail(missing) if CHROMIUM_IS_REQUIRED else pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as chromium:
        yield chromium


class Browser:
    """A window of Chromium, and what the tests look for in it."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        self.driver, self.address = driver, address

    def open(self, path: str, *, width: int = 1440, height: int = 1000, theme: str = "light") -> None:
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(self.address + path)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def until(self, is_true: Callable[[], Any], within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while True:
            try:
                if is_true():
                    return
            except (NoSuchElementException, StaleElementReferenceException):
                pass  # the page is on its way
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)

    @property
    def text(self) -> str:
        return self.find("body").text

    def complaints(self) -> list[str]:
        """What the console says since it was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def addresses(self) -> list[str]:
        """Whatever was asked for over the network, since this was asked last."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def pixels(self, selector: str) -> int:
        """How many colours a canvas has."""
        return self.run(
            """const canvas = document.querySelector(arguments[0]);
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size""",
            selector,
        )


@pytest.fixture
def browser(chromium: webdriver.Chrome, address: str) -> Iterator[Browser]:
    """A window; whatever is done in it, nothing may be asked of others, and the console has nothing to say."""
    browser = Browser(chromium, address)
    browser.complaints(), browser.addresses()
    yield browser
    chromium.delete_all_cookies()
    assert browser.complaints() == []
    asked = [each for each in browser.addresses() if not each.startswith("data:")]
    assert asked
    assert {f"{urlsplit(each).scheme}://{urlsplit(each).netloc}" for each in asked} == {address}


def test_each_page_is_drawn_and_asks_nobody_else(browser, filled):
    line = next(each for each in chats(filled, **OF_SPAN) if each.requests > 2)
    for path in (*PAGES, f"/chats/{line.id}"):
        browser.open(f"{path}?{SPAN}")
        assert browser.find("h1").is_displayed()
        charts = browser.all("[data-chart]")
        assert len(charts) == {"/": 5, "/models": 1, "/users": 1, "/agents": 1, "/tools": 1, "/errors": 1}.get(path, 0)
        for chart in charts:
            assert browser.pixels(f"#{chart.get_attribute('id')} canvas") > 10
        assert browser.run("return document.documentElement.scrollWidth") == 1440


def test_a_chart_draws_the_figures_of_usage(browser, filled):
    browser.open(f"/?{SPAN}")
    rows = usage(filled, ("day",), **OF_SPAN)
    drawn = browser.run("return document.querySelector('#chart-spend').plot.data")
    assert drawn[1] == pytest.approx([float(row.cost) for row in rows])  # the highest: all models together
    assert browser.find("#card-requests .value").text == f"{sum(row.requests for row in rows):,}"
    webdriver.ActionChains(browser.driver, duration=0).move_to_element(browser.find("#chart-spend .u-over")).perform()
    assert "Oct 1" in browser.find("#chart-spend .tip").text
    assert "$" in browser.find("#chart-spend .tip").text


LABELS = """
const axis = document.querySelector(arguments[0]).plot.axes[0], plot = document.querySelector(arguments[0]).plot;
const context = document.createElement("canvas").getContext("2d");
context.font = "12px system-ui, sans-serif";
return axis._values.map((text, place) => {
  const width = Math.max(...text.split("\\n").map((line) => context.measureText(line).width));
  const middle = plot.valToPos(axis._splits[place], "x") + plot.over.offsetLeft;
  return [text, middle - width / 2, middle + width / 2, plot.width];
}).filter(([text]) => text);
"""


def test_the_labels_of_hours_have_room(browser):
    a_day, two_days = "since=2026-10-28T14:00&until=2026-10-29T14:00", "since=2026-10-28&until=2026-10-30"
    for span, width in ((a_day, 1280), (two_days, 390)):
        browser.open(f"/?{span}", width=width)
        for chart in ("#chart-spend", "#chart-tokens", "#chart-latency"):
            labels = browser.run(LABELS, chart)
            assert len(labels) > 2
            assert all(left[2] + 4 < right[1] for left, right in itertools.pairwise(labels)), labels
            assert all(label[1] >= 0 and label[2] <= label[3] for label in labels), labels
            assert next(label[0] for label in labels if "\n" in label[0]).endswith("\nOct 28")


def test_what_matters_most_is_seen_without_scrolling_aside(browser):
    for path, width, selectors in (
        ("/errors", 1280, ("section:last-of-type .long", "section:last-of-type td a code")),
        ("/requests", 1280, ("td a code",)),
        ("/users", 1280, ("th a[href*='order=-unpriced_requests']",)),
        ("/budgets", 390, ("td .badge", "td.over")),
    ):
        browser.open(f"{path}?{SPAN}", width=width)
        for selector in selectors:
            edge = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().right", selector)
            assert edge < width - 16, selector


def test_a_hostile_chat_is_shown_and_does_nothing(browser, filled):
    (line,) = chats(filled, since="2026-11-01")
    for path in ("/", "/errors", "/chats", f"/chats/{line.id}"):
        browser.open(f"{path}?{HOSTILE_SPAN}")
        assert browser.run("return window.__pwned") is None
        assert "<script>window.__pwned" in browser.text
    for fold in browser.all("main details:not([open]) > summary"):
        fold.click()
    assert browser.text.count(XSS.partition("\u202e")[0]) >= 10
    assert browser.all("main img, main script, main b > b, main a[href^='javascript:']") == []
    assert browser.run("return window.__pwned") is None


def test_filters_are_set_and_taken_off_by_clicking(browser, filled):
    browser.open(f"/?{SPAN}")
    browser.find(".bar details:nth-of-type(3) > summary").click()  # Filter
    form = ".bar details[open] "
    browser.find(f"{form}option[value='model']").click()
    browser.find(f"{form}[name='value']").send_keys("gpt-4o", Keys.ENTER)
    browser.until(lambda: "model=gpt-4o" in browser.driver.current_url)
    (row,) = usage(filled, (), where={"model": "gpt-4o"}, **OF_SPAN)
    assert browser.find("#card-requests .value").text == f"{row.requests:,}"
    browser.find(".bar details:nth-of-type(2) > summary").click()  # By
    browser.find(".bar [value='user_id']").click()
    browser.until(lambda: "by=user_id" in browser.driver.current_url)
    assert browser.find("#chart-spend h2").text == "Spend by user_id"
    browser.find("nav[aria-label='Pages'] li:nth-child(2) a").click()
    browser.until(lambda: browser.find("h1").text == "Models")
    assert [row.text for row in browser.all("section tbody tr td:nth-child(2)")] == ["gpt-4o"]
    browser.find(".chips a").click()
    browser.until(lambda: len(browser.all("section tbody tr")) == 5)
    browser.find(".pills a").click()
    browser.until(lambda: "range=24h" in browser.driver.current_url)
    assert "Nothing in this span of time." in browser.text


def test_a_chat_is_reached_from_the_list(browser):
    browser.open(f"/chats?{SPAN}")
    title = browser.find("tbody a").text
    browser.find("tbody a").click()
    assert browser.find("h1").text.startswith(title.rstrip("…"))
    assert browser.find(".turn .message.user").is_displayed()


def test_it_is_used_by_keyboard_alone(browser):
    browser.open(f"/models?{SPAN}")
    browser.press(Keys.TAB)
    focused = "return document.activeElement.textContent.trim()"
    assert browser.run(focused) == "Skip to content"
    shown = "return document.activeElement.getBoundingClientRect().top >= 0"
    browser.until(lambda: browser.run(shown))
    browser.press(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "content"
    browser.open(f"/models?{SPAN}")
    browser.run("window.reached = []; addEventListener('focusin', (e) => reached.push(e.target.textContent.trim()))")
    browser.press(*[Keys.TAB] * 20)
    reached = browser.run("return reached")
    assert reached[2:5] == ["Overview", "Models", "Users"]
    assert "Filter" in reached
    browser.run("document.querySelector('.bar details summary').focus()")
    browser.press(Keys.ENTER)
    assert browser.find(".panel").is_displayed()
    browser.press(Keys.ESCAPE)
    assert not browser.find(".panel").is_displayed()
    assert browser.run("return document.activeElement.tagName") == "SUMMARY"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"


def test_on_a_phone_no_page_is_wider_than_the_screen(browser, filled):
    (line,) = chats(filled, since="2026-11-01")
    for path in (*(f"{path}?{HOSTILE_SPAN}" for path in WIDEST), f"/chats/{line.id}", f"/?{SPAN}"):
        browser.open(path, width=390, height=844)
        assert browser.run("return document.documentElement.scrollWidth") == 390, path


def test_light_and_dark_are_as_the_system_says_until_somebody_chooses(browser):
    background = "return getComputedStyle(document.body).backgroundColor"
    browser.open("/models")
    light = browser.run(background)
    browser.open("/models", theme="dark")
    dark = browser.run(background)
    assert light != dark
    browser.find("[data-theme-toggle]").click()
    assert browser.run(background) == light
    browser.driver.refresh()
    assert browser.run(background) == light


CONTRAST = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const known = new Map();
const light = (color) => {
  if (!known.has(color)) {
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((each) => each / 255);
    const [r, g, b] = parts.map((each) => (each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    known.set(color, 0.2126 * r + 0.7152 * g + 0.0722 * b);
  }
  return known.get(color);
};
const colorBehind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
  return "white";
};
const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
return [...document.querySelectorAll("body *")]
  .filter((element) => hasText(element) && element.checkVisibility() && !element.closest(".sr, script"))
  .filter((element) => {
    const both = [light(getComputedStyle(element).color), light(colorBehind(element))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05) < 4.5;
  })
  .map((element) => [element.tagName, element.className, element.textContent.slice(0, 30)]);
"""


def test_text_can_be_told_from_what_is_behind_it(browser, filled):
    failed = next(each for each in chats(filled, **OF_SPAN) if each.failed_requests)
    for theme in ("light", "dark"):
        for path in ("/", f"/chats/{failed.id}"):
            browser.open(f"{path}?{SPAN}", theme=theme)
            assert browser.run(CONTRAST) == []


def test_without_javascript_all_but_the_charts_is_there(browser):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(f"/?{SPAN}&refresh=5")
        assert browser.find("#card-cost .value").text.startswith("$")
        browser.find("#chart-spend summary").click()
        assert "claude-sonnet-4-5" in browser.find("#chart-spend table").text
        browser.find("nav[aria-label='Pages'] li:nth-child(7) a").click()
        assert browser.find("h1").text == "Chats"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_page_is_refreshed_and_keeps_its_place(browser, filled):
    browser.open(f"/requests?{SPAN}&refresh=1")
    browser.run("document.querySelector('tbody tr:nth-child(30) a').focus(); scrollTo(0, 700)")
    focused = browser.run("return document.activeElement.href")
    browser.run("document.querySelector('tbody').dataset.mark = 'old'; document.body.dataset.here = 'yes'")
    browser.until(lambda: browser.run("return document.getElementById('content').dataset.refreshed"))
    assert browser.all("[data-mark='old']") == []
    assert browser.find("body").get_attribute("data-here") == "yes"  # it is still the same page
    assert browser.run("return [document.activeElement.href, scrollY]") == [focused, 700]
    assert "Live, as of" in browser.find("[data-live]").text


def test_the_login_is_passed_in_the_browser(chromium, filled):
    with served(create_app(filled, token="correct horse battery staple")) as address:
        browser = Browser(chromium, address)
        browser.open(f"/models?{SPAN}")
        assert browser.run("return document.activeElement.id") == "token"
        browser.press("wrong", Keys.ENTER)
        browser.until(lambda: browser.all("[role='alert']"))
        browser.find("#token").send_keys("correct horse battery staple", Keys.ENTER)
        browser.until(lambda: browser.find("h1").text == "Models")
        assert "token" not in browser.driver.current_url
        assert browser.run("return document.cookie") == ""
        browser.find("form[action='/logout'] button").click()
        browser.until(lambda: browser.find("h1").text == "Log in")


@pytest.mark.parametrize(
    ("name", "path", "options"),
    [
        ("overview-light", f"/?{SPAN}", {}),
        ("overview-dark", f"/?{SPAN}&by=user_id", {"theme": "dark"}),
        ("chat", "/chats/CHAT", {"width": 1100, "height": 1250}),
        ("errors", f"/errors?{SPAN}", {"height": 900}),
        ("phone", f"/?{SPAN}", {"width": 390, "height": 844}),
    ],
)
def test_what_it_looks_like(browser, filled, tmp_path, name, path, options):
    """Written into the documentation where $LLM_ORM_SCREENSHOTS is set."""
    with_a_bit_of_all = {"model": "gpt-4o", "agent_class": "ResearchAgent"}
    found = chats(filled, where=with_a_bit_of_all, **OF_SPAN, limit=None)
    line = next(each for each in found if each.failed_requests and each.requests > 4)
    browser.open(path.replace("CHAT", str(line.id)), **options)
    folder = IMAGES if SCREENSHOTS else tmp_path
    folder.mkdir(exist_ok=True)
    image = folder / f"dashboard-{name}.png"
    assert browser.driver.save_screenshot(str(image))
    assert 20_000 < image.stat().st_size < LARGEST_IMAGE


SCREENSHOTS = bool(os.environ.get("LLM_ORM_SCREENSHOTS"))  # before the environment is cleared of ours
CHROMIUM_IS_REQUIRED = os.environ.get("LLM_ORM_TEST_CHROMIUM") == "required"
