# SPDX-License-Identifier: Apache-2.0
"""The group page of a large cohort: size, build time, time to show and to sort in Chromium.

``python benchmarks/group_page.py RESULT.json [--subjects 2000] [--methods irem ...]``
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from irem_bids.pages import run_group
from irem_bids.settings import Settings
from tests.app.group_material import write_cohort

SORT = """
const done = arguments[arguments.length - 1];
const begin = performance.now();
document.querySelectorAll('#rows thead button')[arguments[0]].click();
requestAnimationFrame(() => setTimeout(() => done(performance.now() - begin)));
"""


def in_browser(page: Path) -> dict[str, float] | None:
    """Seconds until the page is ready, and of the first sort; ``None`` without Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        return None
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        window = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(executable_path=driver)
        )
        try:
            window.get("about:blank")
            window.get(page.as_uri())
            timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            ready = window.execute_script(f"return {timing}")
            sort = window.execute_async_script(SORT, 3)
        finally:
            window.quit()
    return {
        "ready_s": round(ready / 1000, 3),
        "first_sort_s": round(sort / 1000, 3),
        "start_to_first_sort_s": round((ready + sort) / 1000, 3),
    }


def main() -> int:
    """Build the cohort, measure, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--subjects", type=int, default=2000)
    parser.add_argument("--methods", nargs="+", default=["irem", "srr", "bspline"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        write_cohort(out, arguments.subjects, tuple(arguments.methods))
        begin, cpu = time.monotonic(), time.process_time()
        run_group(out, Settings())
        seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
        page = out / "group_T1w.html"
        size = page.stat().st_size
        browser: Any = in_browser(page)
    record = {
        **machine(),
        "rows": arguments.subjects * len(arguments.methods),
        "megabytes": round(size / 1e6, 2),
        "build_s": round(seconds, 2),
        "build_cpu_s": round(cpu, 2),
        "browser": browser,
    }
    arguments.result.write_text(json.dumps(record, indent=2) + "\n")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
