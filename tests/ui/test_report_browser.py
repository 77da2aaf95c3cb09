"""A report in a real browser, where there is one: Chromium and its driver (on Debian the package chromium-driver)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from toolchain.ui.report.facts import bundle_facts
from toolchain.ui.report.page import render
from toolchain.ui.report.timeline import trace_timelines
from toolchain.ui.report.video import golden_clip

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH to look at the page with"
    ),
]
SECONDS = 60.0
"""What a page may take on a busy machine."""


@pytest.fixture(scope="module")
def address(shown: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    timeline = trace_timelines(shown.trace, shown.bundle)[1]
    path.write_text(render(bundle_facts(shown.bundle), [timeline], golden_clip(shown.bundle)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def look(browser: Any, address: str) -> Callable[..., Any]:
    """Open the page at a width in pixels and in a colour scheme, and wait until its charts are drawn."""

    def open_(width: int, scheme: str) -> Any:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(address)
        drawn = "return document.documentElement.dataset.charts === 'drawn'"
        WebDriverWait(browser, SECONDS).until(lambda b: b.execute_script(drawn))
        return browser

    return open_


@pytest.fixture(scope="module")
def wide(look: Callable[..., Any]) -> Any:
    """The page in a wide window, light."""
    return look(1280, "light")


def test_charts_are_drawn_and_nothing_is_said_or_fetched(wide: Any) -> None:
    assert wide.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in wide.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("file:") for url in asked)  # the page itself: the log is on
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert len({url for url in asked if url.startswith("file:")}) == 1
    wanted = json.loads(wide.execute_script("return document.getElementById('charts').textContent"))
    for id_ in wanted:
        marks = "return document.querySelectorAll(arguments[0]).length"
        assert wide.execute_script(marks, f"#{id_} svg [role=graphics-symbol][aria-roledescription]"), id_
        assert wide.execute_script(marks, f"#{id_}[role=graphics-document][aria-label]"), id_


def test_hostile_texts_run_nothing(wide: Any, shown: Any) -> None:
    assert wide.execute_script("return window.hacked") is None
    assert wide.execute_script("return document.querySelector('h1').textContent") == shown.bundle.manifest.name
    assert wide.execute_script("return document.querySelectorAll('main img, main script').length") == 0


def test_a_tooltip_shows_a_hostile_name_as_text(wide: Any, shown: Any) -> None:
    place = "#chart-bytes-0 svg [aria-label*='hacked'][aria-roledescription=bar]"
    hover = """
        const bar = document.querySelector(arguments[0]), box = bar.getBoundingClientRect();
        const at = {bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
        for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"])
          bar.dispatchEvent(new (kind.startsWith("pointer") ? PointerEvent : MouseEvent)(kind, at));
    """
    wide.execute_script(hover, place)
    text = "const e = document.getElementById('vg-tooltip-element'); return e && e.textContent"
    WebDriverWait(wide, SECONDS).until(lambda b: b.execute_script(text))
    assert f"{shown.bundle.manifest.name}pair" in wide.execute_script(text)
    assert wide.execute_script("return window.hacked") is None


def test_the_video_plays(wide: Any) -> None:
    play = """
        const video = document.querySelector("video"), done = arguments[arguments.length - 1];
        video.play().then(() => video.addEventListener("timeupdate", () => video.currentTime > 0 &&
            done([video.readyState, video.videoWidth, video.videoHeight, video.error])), e => done(String(e)));
    """
    ready, width, height, error = wide.execute_async_script(play)
    assert (ready >= 2, width, height, error) == (True, 32, 32, None)


def test_the_keyboard_reaches_everything_in_order(look: Callable[..., Any]) -> None:
    page = look(1280, "light")
    here = """
        const e = document.activeElement;
        const top = e.getBoundingClientRect().top + scrollY;
        return [e.tagName, e.className, e.getAttribute("aria-label") || e.textContent.slice(0, 40), top];
    """
    visited = []
    body = page.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    for _ in range(80):
        visited.append(page.execute_script(here))
        if visited[-1][0] == "BODY":
            break
        page.switch_to.active_element.send_keys(Keys.TAB)
    assert visited[0][:2] == ["A", "skip"]
    labels = {v[2] for v in visited if v[1].startswith("scroll")}
    shown = "return [...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).map(e => e.ariaLabel)"
    assert set(page.execute_script(shown)) == labels
    assert {v[2] for v in visited if v[0] == "BUTTON"} >= {"Zoom in", "Zoom out", "Earlier", "Later", "Whole"}
    assert sum(v[0] == "SUMMARY" for v in visited) == page.execute_script(
        "return document.querySelectorAll('summary').length"
    )
    tops = [v[3] for v in visited[1:] if v[1].startswith("scroll") or v[0] == "SUMMARY"]
    assert tops == sorted(tops)  # as it is read
    steps = page.find_element("xpath", "//summary[contains(., 'Steps')]")
    steps.send_keys(Keys.ENTER)
    assert page.execute_script("return arguments[0].parentElement.open", steps)


def test_buttons_choose_what_part_of_the_timeline_is_shown(wide: Any) -> None:
    shown = "return document.getElementById('shown').value"
    whole = wide.execute_script(shown)
    press = "document.querySelector(`[data-move=${arguments[0]}]`).click()"
    wide.execute_script(press, "in")
    WebDriverWait(wide, SECONDS).until(lambda b: b.execute_script(shown) != whole)
    near = wide.execute_script(shown)
    start, end = (float(t.removesuffix(" s")) for t in near.split(" to "))
    full = float(whole.split(" to ")[1].removesuffix(" s"))
    assert end - start == pytest.approx(full / 2, abs=2e-3)
    wide.execute_script(press, "whole")
    assert wide.execute_script(shown) == whole


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(width: int, look: Callable[..., Any]) -> None:
    page = look(width, "light")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """
        return [...document.querySelectorAll("body *")]
            .filter(e => !e.closest(".scroll, pre, .chart, .skip, #vg-tooltip-element"))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
    """
    assert page.execute_script(outside) == []
    charts = "return [...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().width)"
    places = "return [...document.querySelectorAll('.chart')].map(e => e.getBoundingClientRect().width)"
    for chart, place in zip(page.execute_script(charts), page.execute_script(places), strict=True):
        assert place - 12 <= chart <= place + 1


def test_dark_and_light_differ_and_can_be_read(look: Callable[..., Any]) -> None:
    colours = """
        const of = (place, what) => getComputedStyle(document.querySelector(place))[what];
        return [of("body", "backgroundColor"), of("section", "backgroundColor"), of("body", "color"), of("td", "color"),
                of("#chart-bytes-0 svg [aria-roledescription=bar]", "fill"), of("#chart-bytes-0 svg text", "fill")];
    """
    light, dark = (look(1280, scheme).execute_script(colours) for scheme in ("light", "dark"))
    assert all(a != b for a, b in zip(light, dark, strict=True))
    for _, card, _, text, bar, label in (light, dark):
        assert contrast(text, card) >= 7
        assert contrast(label, card) >= 4.5
        assert contrast(bar, card) >= 3


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast of two colours as CSS computes them: ``rgb(1, 2, 3)``."""

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_is_a_page_without_javascript_too(browser: Any, address: str, tmp_path: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
        text = browser.find_element("tag name", "body").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "The charts need JavaScript; the tables have the same figures." in text
    assert "Zoom in" not in text
