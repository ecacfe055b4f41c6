# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, from the disk: Debian's chromium, driven by selenium."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from irem_bids.pages import run_group
from irem_bids.report import build_report
from irem_bids.settings import Settings

from ..app.group_material import write_cohort
from ..app.report_material import make_input, with_uncertainty
from ..stacks import write_description
from .cohorts import TINY, run, tiny_subject

LOCAL = ("file:", "data:")  # addresses that no request leaves the machine for
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
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    window = webdriver.Chrome(options=options, service=service)
    window.set_page_load_timeout(180)
    yield window
    window.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile words, moved together with its figures after it was made."""
    root = tmp_path_factory.mktemp("browser")
    inp = with_uncertainty(make_input(root / "work"), irem=20.0)
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
    assert [url for url in asked if not url.startswith(LOCAL)] == []
    assert browser.get_log("browser") == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, "the page scrolls sideways"


def test_hostile_words_are_shown_and_do_nothing(browser: Any, page: Path) -> None:
    show(browser, page)
    text = browser.execute_script("return document.querySelector('#summary').innerText")
    assert "<script>document.title='broken'</script>" in text
    assert browser.title == "sub-01"


def test_flicker_and_sections_work_by_keyboard_and_mouse(browser: Any, page: Path) -> None:
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


def shown(browser: Any, canvas: str) -> str:
    """What a canvas of the viewer shows, as text to compare."""
    script = f"return document.querySelector('canvas[data-plane={canvas}]').toDataURL()"
    return str(browser.execute_script(script))


def wait_for(browser: Any, script: str) -> Any:
    """The value of ``script`` once it is true, a minute at most."""
    return WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {script}"))


READOUT = "document.querySelector('.viewer output').textContent"


def test_viewer_moves_one_cursor_in_all_planes(browser: Any, page: Path) -> None:
    show(browser, page)
    browser.find_element(By.CSS_SELECTOR, "nav a[href='#reconstruction']").click()
    before = wait_for(browser, READOUT)
    assert before.startswith("irem at ")
    planes = ("axial", "coronal", "sagittal")
    old = {plane: shown(browser, plane) for plane in planes}
    canvas = browser.find_element(By.CSS_SELECTOR, "canvas[data-plane=axial]")
    canvas.send_keys(Keys.ARROW_LEFT * 4)
    after = wait_for(browser, READOUT)
    assert after.split(", ")[0] != before.split(", ")[0], "four voxels to the patient's right"
    assert after.split(", ")[1] == before.split(", ")[1]
    for plane in planes:
        assert shown(browser, plane) != old[plane], f"the {plane} plane did not follow"
    canvas.click()
    centred = wait_for(browser, READOUT)
    canvas.send_keys(Keys.PAGE_UP * 3)
    moved = wait_for(browser, READOUT)
    assert moved.split(", ")[:2] == centred.split(", ")[:2]
    assert moved.split(", ")[2].split(":")[0] != centred.split(", ")[2].split(":")[0]
    assert browser.get_log("browser") == []


def test_viewer_switches_images_and_zooms(browser: Any, page: Path) -> None:
    show(browser, page)
    wait_for(browser, READOUT)
    of_method = shown(browser, "coronal")
    place = wait_for(browser, READOUT).split(" at ")[1].split(" mm")[0]
    labels = browser.find_elements(By.CSS_SELECTOR, ".viewer fieldset label")
    assert [label.text for label in labels] == [
        "▶ irem", "▶ bspline", "irem uncertainty", "axial1", "coronal1", "sagittal1",
    ]  # fmt: skip
    labels[3].click()
    wait_for(browser, f"{READOUT}.startsWith('axial1 at {place}')")
    of_stack = shown(browser, "coronal")
    assert of_stack != of_method
    browser.find_element(By.CSS_SELECTOR, ".viewer button[value='in']").click()
    assert "zoom 1.5" in wait_for(browser, READOUT)
    assert shown(browser, "coronal") != of_stack
    canvas = browser.find_element(By.CSS_SELECTOR, "canvas[data-plane=coronal]")
    canvas.send_keys("pp")
    wait_for(browser, f"{READOUT}.startsWith('bspline at')")
    canvas.send_keys("n")
    wait_for(browser, f"{READOUT}.startsWith('irem uncertainty at')")
    canvas.send_keys("n")
    wait_for(browser, f"{READOUT}.startsWith('axial1 at')")
    asked = requests(browser)
    assert [url for url in asked if not url.startswith(LOCAL)] == []
    assert browser.get_log("browser") == []


HUES = """
return [...document.querySelectorAll('.viewer canvas')].map(canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let most = 0;
    for (let i = 0; i < pixels.length; i += 4) most = Math.max(most,
        Math.max(...pixels.slice(i, i + 3)) - Math.min(...pixels.slice(i, i + 3)));
    return most; });
"""


def test_viewer_shows_uncertainty_at_the_same_place(browser: Any, page: Path) -> None:
    """The cursor stays, the legend appears, and the number under it is that of the map."""
    show(browser, page)
    place = wait_for(browser, READOUT).split(" at ")[1].split(" mm")[0]
    legend = browser.find_element(By.CSS_SELECTOR, ".viewer .scale")
    assert not legend.is_displayed()
    browser.find_elements(By.CSS_SELECTOR, ".viewer fieldset label")[2].click()
    words = wait_for(browser, f"{READOUT}.startsWith('irem uncertainty at {place}') && {READOUT}")
    value, interval = re.findall(r"deviation ([\d.]+), 95 % within ± ([\d.]+)", words)[0]
    assert 5 < float(value) < 15, "the middle of a ramp from 0 to 20"
    assert float(interval) == pytest.approx(1.96 * float(value), rel=0.01)
    assert legend.is_displayed() and "standard deviation: 0" in legend.text
    assert min(browser.execute_script(HUES)) > 60, "the map has colours in every plane"
    browser.find_element(By.CSS_SELECTOR, "canvas[data-plane=axial]").send_keys(Keys.ARROW_LEFT * 4)
    moved = re.findall(r"deviation ([\d.]+)", wait_for(browser, READOUT))[0]
    assert float(moved) != float(value)
    browser.find_elements(By.CSS_SELECTOR, ".viewer fieldset label")[0].click()
    wait_for(browser, f"{READOUT}.startsWith('irem at')")
    assert not legend.is_displayed()
    assert browser.get_log("browser") == []


SIDECAR = {
    "SliceThickness": '<script>throw 2</script>&ü"',
    "SliceTiming": "</script><script>alert('x')</script>",
    "SeriesDescription": "<img src=x onerror=alert('x')>",
}


def test_hostile_dataset_is_text_in_both_pages(browser: Any, tmp_path: Path) -> None:
    """Labels, sidecars and paths with markup go through the whole app and stay words."""
    label = "x<script>throw 1<!--&'\"ü脳"
    data, out = tmp_path / "a <script> & 'q' \"d\" ü", tmp_path / "out <b>&'\" 脳#1"
    write_description(data, Name="<script>document.title='broken'</script>")
    tiny_subject(data, "01")
    for path in list((data / "sub-01" / "anat").iterdir()):
        name = path.name.replace("sub-01", f"sub-{label}")
        path = path.rename(path.with_name(name.replace("acq-ax", "acq-axial<img src=x>&'\"ü")))
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(SIDECAR))
    (data / "sub-01").rename(data / f"sub-{label}")
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    words = ["participant", "group", "--skip-bids-validation", "--method", "bspline"]
    words += ["--config-file", str(config), "--work-dir", str(tmp_path / "work")]
    code, log = run([sys.executable, "-m", "irem_bids", str(data), str(out), *words], tmp_path)
    assert code == 0, log
    show(browser, out / "group_T1w.html")
    assert browser.title == "All participants, T1w"
    link = browser.find_element(By.CSS_SELECTOR, "#rows tbody th a")
    assert link.text == f"sub-{label}"
    link.click()
    wait_for(browser, "document.querySelector('.viewer output').textContent")
    assert browser.title == f"sub-{label}"
    text = browser.execute_script("return document.body.innerText")
    for shown in (SIDECAR["SliceThickness"], f"sub-{label}_acq-axial<img src=x>&'\"ü_T1w.nii.gz"):
        assert shown in text
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    broken = "return [...document.images].filter(i => !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert [url for url in requests(browser) if not url.startswith(LOCAL)] == []
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The group page of 60 participants; the one that is far off has a real report."""
    root = tmp_path_factory.mktemp("group")
    inp = make_input(root / "work", names=("irem",))
    (root / "out").mkdir()
    write_cohort(root / "out", 60)
    build_report([inp], root / "out", "03")
    run_group(root / "out", Settings())
    return root / "out" / "group_T1w.html"


ROWS = "[...document.querySelectorAll('#rows tbody tr')]"


@pytest.mark.parametrize("width", [1440, 390])
def test_group_page_opens_from_disk(browser: Any, cohort: Path, width: int) -> None:
    show(browser, cohort, width)
    assert browser.title == "All participants, T1w"
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('#plots > .strips canvas')]"
        ".map(c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)"
    )
    assert len(drawn) == 5 and min(drawn) > 5, "a plot is empty"
    assert [url for url in requests(browser) if not url.startswith(LOCAL)] == []
    assert browser.get_log("browser") == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, "the page scrolls sideways"


def test_group_table_sorts_and_filters(browser: Any, cohort: Path) -> None:
    show(browser, cohort)
    first = f"{ROWS}.map(r => r.querySelector('th').innerText)"
    assert browser.execute_script(f"return {first}.length") == 50
    heading = "//thead//button[starts-with(., 'held_out_psnr')]"
    browser.find_element(By.XPATH, heading).click()
    values = browser.execute_script(
        f"return {ROWS}.map(r => parseFloat(r.querySelector('td.number').innerText))"
    )
    assert values == sorted(values)
    assert browser.execute_script(f"return {first}[0]") == "sub-03"
    assert browser.find_element(By.CSS_SELECTOR, "th[aria-sort]").get_attribute("aria-sort") == (
        "ascending"
    )
    browser.find_element(By.XPATH, heading).click()
    assert browser.execute_script(f"return {first}[0]") != "sub-03"
    box = browser.find_element(By.ID, "filter")
    box.send_keys("held_out_psnr<20 irem")
    assert browser.execute_script(f"return {first}") == ["sub-03"]
    assert browser.find_element(By.ID, "count").text == "1 of 60 rows"
    box.clear()
    box.send_keys("sub-1")
    assert browser.execute_script(f"return {first}.length") == 10
    assert browser.get_log("browser") == []


def test_selection_is_carried_between_plots_and_table(browser: Any, cohort: Path) -> None:
    show(browser, cohort)
    plots = browser.find_elements(By.CSS_SELECTOR, ".strips canvas")[:2]
    script = "return arguments[0].toDataURL()"
    before = [browser.execute_script(script, plot) for plot in plots]
    plots[0].send_keys(Keys.HOME + Keys.ENTER)
    assert "sub-03" in browser.find_element(By.ID, "chosen").text
    after = [browser.execute_script(script, plot) for plot in plots]
    assert after[0] != before[0] and after[1] != before[1]
    browser.find_element(By.ID, "only-selected").click()
    names = browser.execute_script(f"return {ROWS}.map(r => r.querySelector('th').innerText)")
    assert [name.replace("◆", "").strip() for name in names] == ["sub-03"]
    browser.find_element(By.CSS_SELECTOR, "#rows tbody input").click()
    assert browser.find_element(By.ID, "chosen").text == "Nothing is selected."


def test_an_outlier_leads_to_its_report(browser: Any, cohort: Path) -> None:
    show(browser, cohort)
    browser.find_element(By.CSS_SELECTOR, "#summary .verdict a").click()
    wait_for(browser, "document.title === 'sub-03'")
    assert wait_for(browser, READOUT).startswith("irem at ")
    browser.back()
    wait_for(browser, "document.title === 'All participants, T1w'")
    link = browser.find_element(By.CSS_SELECTOR, ".outliers a")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    wait_for(browser, "document.title === 'sub-03'")
    assert browser.current_url.endswith("/sub-03.html")


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two colours as ``rgb(r, g, b)``."""

    def luminance(colour: str) -> float:
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("what", ["page", "cohort"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(
    browser: Any, scheme: str, what: str, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(what)
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
