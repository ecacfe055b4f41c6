# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, from the disk: Debian's chromium, driven by selenium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from irem_bids.report import build_report

from ..app.report_material import make_input

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with an empty profile that logs its console and its requests."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    window = webdriver.Chrome(options=options, service=service)
    window.set_page_load_timeout(60)
    yield window
    window.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile words, moved together with its figures after it was made."""
    root = tmp_path_factory.mktemp("browser")
    inp = make_input(root / "work")
    words = "<script>document.title='broken'</script><img src=x onerror=\"alert('x')\">"
    inp = replace(inp, group=replace(inp.group, warnings=(words,)))
    (root / "out").mkdir()
    build_report([inp], root / "out", "01")
    (root / "out").rename(root / "moved & renamed #1")
    return root / "moved & renamed #1" / "sub-01.html"


def show(browser: Any, page: Path, width: int = 1440) -> None:
    """Open the page in a window of ``width`` pixels."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())


def requests(browser: Any) -> list[str]:
    """Addresses that the page has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.parametrize("width", [1440, 390])
def test_page_opens_from_disk(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert browser.title == "sub-01"
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.getAttribute('src'), i.complete, i.naturalWidth])"
    )
    assert len(pictures) > 20
    assert [p for p in pictures if not p[1] or not p[2]] == []
    asked = requests(browser)
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith("file:")] == []
    assert browser.get_log("browser") == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, "the page scrolls sideways"


def test_hostile_words_are_shown_and_do_nothing(browser: Any, page: Path) -> None:
    show(browser, page)
    text = browser.execute_script("return document.querySelector('#summary').innerText")
    assert "<script>document.title='broken'</script>" in text
    assert browser.title == "sub-01"


def test_flicker_and_sections_work_by_keyboard_and_mouse(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    moving = "getComputedStyle(document.querySelector('.frames img + img'))"
    assert browser.execute_script(f"return {moving}.visibility") == "visible"
    choice = browser.find_element(By.CSS_SELECTOR, ".flicker input")
    choice.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(f"return {moving}.visibility") == "hidden"
    browser.find_element(By.CSS_SELECTOR, ".flicker label:last-of-type").click()
    assert browser.execute_script(f"return {moving}.animationName") == "flicker"
    details = browser.find_element(By.CSS_SELECTOR, "#settings details")
    assert details.get_attribute("open") is None
    details.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert "[acquisition]" in details.text
    browser.find_element(By.CSS_SELECTOR, "nav a[href='#metrics']").click()
    top = browser.execute_script(
        "return document.querySelector('#metrics').getBoundingClientRect().top"
    )
    assert abs(top) < 900


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two colours as ``rgb(r, g, b)``."""

    def luminance(colour: str) -> float:
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(browser: Any, page: Path, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    show(browser, page)
    colours = browser.execute_script(
        """
        const back = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
        const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
        return [...document.querySelectorAll('body *')].filter(own)
            .map(e => [e.tagName, getComputedStyle(e).color, back(e)]);
        """
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(colours) > 100
    poor = {tuple(c) for c in colours if contrast(c[1], c[2]) < 4.5}
    assert poor == set()
    backs = {c[2] for c in colours}
    assert ("rgb(255, 255, 255)" in backs) == (scheme == "light")
