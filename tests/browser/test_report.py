"""The page of a spec in a real browser: it draws, zooms, answers pointer and keys, fits a phone, and asks nothing of the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attncc import AttentionSpec, simulate
from attncc.simulator.html import page

pytest.importorskip("matplotlib")
pytest.importorskip("selenium")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and chromedriver: apt-get install chromium chromium-driver"
)

FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
HEADS = AttentionSpec.model_validate(
    {"tokens": [640], "heads": 3, "head_dim": 64, "dtype": "bfloat16", "mask": {"kind": "predicate", "text": "k <= q - 130 * h"}}
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = Chrome(options=options, service=Service(str(DRIVER)))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(simulate(HEADS, "h100", (64,), (64,))), encoding="utf-8")
    return path


@pytest.fixture
def report(browser: Any, file: Path) -> Any:
    """The page, just opened, 1100 pixels wide."""
    _resize(browser, 1100)
    browser.get_log("performance")
    browser.get(file.as_uri())
    WebDriverWait(browser, 10).until(lambda b: _pixels(b) != "")
    return browser


def _resize(browser: Any, width: int) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})


def _pixels(browser: Any) -> str:
    found: str = browser.execute_script("const c = document.getElementById('mask'); return c.width ? c.toDataURL() : ''")
    return found


def _said(browser: Any) -> str:
    return str(browser.find_element(By.ID, "cell").text)


def _colors(browser: Any) -> list[list[int]]:
    """Colors in the middle of the canvas's cells of the first column of key tiles, row by row."""
    found: list[list[int]] = browser.execute_script(
        "const c = document.getElementById('mask'), x = c.getContext('2d');"
        "return [...Array(10).keys()].map(i => [...x.getImageData(c.width / 20, (i + 0.5) * c.height / 10, 1, 1).data].slice(0, 3))"
    )
    return found


def test_no_errors_and_no_requests(report: Any) -> None:
    assert [entry for entry in report.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in report.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_canvas_shows_the_block_mask(report: Any) -> None:
    """Head 0 is causal: its first column is partial in the first row and full below. Head 2 starts later."""
    first, *below = _colors(report)
    assert len({tuple(c) for c in below}) == 1 and tuple(first) != tuple(below[0])
    Select(report.find_element(By.ID, "head")).select_by_value("2")
    empty, partial, full = _colors(report)[0], _colors(report)[4], _colors(report)[9]
    assert full == below[0] and partial == first and empty not in (partial, full)


def test_zoom_and_show_all(report: Any) -> None:
    before = _pixels(report)
    report.find_element(By.ID, "in").click()
    closer = _pixels(report)
    assert closer != before
    report.find_element(By.ID, "all").click()
    assert _pixels(report) == before
    canvas = report.find_element(By.ID, "mask")
    report.execute_script("arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 300, clientY: 300}))", canvas)
    assert _pixels(report) != before


def test_the_pointer_and_the_keys_tell_a_cell(report: Any) -> None:
    canvas = report.find_element(By.ID, "mask")
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(report).move_to_element_with_offset(canvas, -width // 2 + width // 20, height // 2 - height // 20).perform()
    assert _said(report) == "query tile 9, key tile 0: full"
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert _said(report) == "query tile 8, key tile 1: full"
    canvas.send_keys(*[Keys.ARROW_UP] * 12)
    assert _said(report) == "query tile 0, key tile 1: empty"


@pytest.mark.parametrize("width", [320, 400, 768, 1100])
def test_the_page_fits_the_screen(report: Any, width: int) -> None:
    _resize(report, width)
    assert report.execute_script("return document.documentElement.scrollWidth") <= width


def test_dark_screens_get_dark_paper(report: Any) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    light = report.execute_script(background)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert report.execute_script(background) != light
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_everything_that_acts_has_a_name(report: Any) -> None:
    """Buttons, selector and canvas can be reached with the keyboard and say what they are."""
    for element in report.find_elements(By.CSS_SELECTOR, "button, select, canvas"):
        assert element.get_attribute("tabIndex") == "0"
        assert element.accessible_name
