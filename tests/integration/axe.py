# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.integration.axe AXE.min.js``: axe-core on a subject's and the group's page."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from selenium import webdriver

from irem_bids.pages import run_group
from irem_bids.report import build_report
from irem_bids.settings import Settings

from ..app.group_material import write_cohort
from ..app.report_material import make_input, with_uncertainty

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
BAD = ("serious", "critical")
RUN = """
const done = arguments[arguments.length - 1];
for (const details of document.querySelectorAll('details')) details.open = true;
axe.run(document, {resultTypes: ['violations']}).then(r => done(JSON.stringify({
    passes: r.passes.length,
    violations: r.violations.map(v => ({
        id: v.id, impact: v.impact, help: v.help,
        nodes: v.nodes.slice(0, 5).map(n => n.html.slice(0, 200)),
    })),
})), e => done(JSON.stringify({error: String(e)})));
"""


def make_pages(root: Path) -> list[Path]:
    """A report with a finding and an error text, and a group page with outliers."""
    out = root / "out"
    out.mkdir()
    inp = replace(with_uncertainty(make_input(root / "work"), irem=20.0), out_dir=out)
    write_cohort(out, 30, ("irem", "bspline"), pages=False)
    run_group(out, Settings())  # the report shows the range of the cohort
    subject = build_report([inp], out, "03")
    run_group(out, Settings())  # the page of the group links to the report
    return [subject, out / "group_T1w.html"]


def audit(browser: Any, page: Path, axe: str, scheme: str) -> dict[str, Any]:
    """What axe-core says of a page in a colour scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    browser.execute_script(axe)
    return dict(json.loads(browser.execute_async_script(RUN)))


def main(path: str) -> int:
    """Audit both pages; 1 where a serious or critical problem was found."""
    axe = Path(path).read_text(encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for flag in (*FLAGS, f"--user-data-dir={scratch}/profile"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        pages = make_pages(Path(scratch))
        browser = webdriver.Chrome(options=options, service=service)
        browser.set_script_timeout(300)
        try:
            for page in pages:
                for scheme in ("light", "dark"):
                    found = audit(browser, page, axe, scheme)
                    bad = [v for v in found.get("violations", ()) if v["impact"] in BAD]
                    failed |= bool(bad) or "error" in found or not found.get("passes")
                    counts = f"{found.get('passes', 0)} rules passed, {len(bad)} serious problems"
                    sys.stdout.write(f"{page.name} ({scheme}): {counts}\n")
                    for one in found.get("violations", ()):
                        sys.stdout.write(f"  {json.dumps(one, indent=2)}\n")
                    if "error" in found:
                        sys.stdout.write(f"  {found['error']}\n")
        finally:
            browser.quit()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
