# SPDX-License-Identifier: Apache-2.0
"""The page over all participants: outliers, links, what it says without scripts, escaping."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from irem_bids.pages import run_group
from irem_bids.report import grouppage
from irem_bids.report.grouppage import Column, group_page
from irem_bids.settings import Settings
from irem_bids.tables import column_record, table_text

from .group_material import write_cohort

HOSTILE = "<script>alert('x')</script> & \"q\" ünïcødé 脳 </script> {{ 7*7 }}"


class Parsed(HTMLParser):
    """Tags, visible text, and the rows in the page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.skip = ""
        self.feed(html)
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
        self.data = json.loads(found.group(1)) if found else {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.skip = tag if tag in ("style", "script") else ""

    def handle_endtag(self, tag: str) -> None:
        self.skip = ""

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    write_cohort(out, 12, ("irem", "bspline"))
    run_group(out, Settings())
    return out


def test_outlier_is_named_and_linked(cohort):
    html = (cohort / "group_T1w.html").read_text()
    page = Parsed(html)
    links = [a["href"] for a in page.all("a")]
    assert links.count("sub-03.html") >= 3, "in the summary and below the plot, by two methods"
    assert re.search(r"others:\s+sub-03 +\(bspline, irem\): held_out_psnr", page.text)
    assert "12 participants, 24 results" in page.text
    assert re.search(r"Outliers:\s+sub-03 +\((irem|bspline), 18.5\)", page.text)
    assert "group_T1w.tsv" in links and "group_T1w.json" in links
    psnr = next(
        m for m in page.data["metrics"]
        if page.data["columns"][m["column"]]["name"] == "held_out_psnr"
    )  # fmt: skip
    assert sorted(psnr["outliers"]) == [4, 5]
    assert page.data["links"][4] == "sub-03.html"


def test_page_has_all_rows_and_every_metric(cohort):
    page = Parsed((cohort / "group_T1w.html").read_text())
    lines = (cohort / "group_T1w.tsv").read_text().splitlines()
    assert [c["name"] for c in page.data["columns"]] == lines[0].split("\t")
    assert len(page.data["rows"]) == len(lines) - 1 == 24
    plots = page.all("canvas")
    assert len(plots) == len(page.data["metrics"]) > 20
    assert all(re.search(r"median -?[\d.e+-]+, from", a["aria-label"] or "") for a in plots)


def test_only_its_own_script_may_run(cohort):
    html = (cohort / "group_T1w.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|https?:|@import", html)
    for tag, attributes in Parsed(html).tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "img")
        assert not re.match(r"\s*([a-z+.-]+:|//)", attributes.get("href") or "")
        assert not any(name.startswith("on") for name in attributes)


def test_hostile_words_are_text():
    rows = [
        {"participant_id": f"sub-{i}{HOSTILE}", "method": HOSTILE, "score": v, HOSTILE: v}
        for i, v in enumerate([1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 50.0])
    ]
    columns = [Column(n, f"about {n}", HOSTILE) for n in rows[0]]
    html = group_page(HOSTILE, rows, columns, [f"sub-{i}{HOSTILE}.html" for i in range(7)])
    assert html.count("<script") == 2
    page = Parsed(html)
    assert page.data["rows"][6][0] == f"sub-6{HOSTILE}"
    assert page.text.count(HOSTILE) >= 5
    assert all("<" not in (a["href"] or "") for a in page.all("a"))
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


def test_one_participant_and_missing_values():
    rows = [{"participant_id": "sub-01", "method": "irem", "held_out_psnr": 30.0, "gap": None}]
    html = group_page("T1w", rows, [Column(n, n) for n in rows[0]], [None])
    page = Parsed(html)
    assert "1 participant, 1 result;" in page.text
    assert "No outlier." in page.text
    assert [m["column"] for m in page.data["metrics"]] == [2]
    assert page.data["links"] == [None]


def test_outliers_are_robust_and_per_method():
    values = np.array([1, 1.1, 0.9, 1, 1.05, 9, 50, 50.1, 49.9, 50, 50.05, np.nan])
    methods = ["a"] * 6 + ["b"] * 6
    assert list(grouppage.outliers(values, methods)) == [5]
    assert grouppage.outliers(np.ones(9), ["a"] * 9) == {}
    assert grouppage.outliers(np.array([1.0, 2.0, 99.0]), ["a"] * 3) == {}, "too few to say"


def test_columns_are_described_with_units():
    assert column_record("translation_mm_axial1")["Units"] == "mm"
    assert column_record("method") == {"Description": "Reconstruction method"}
    assert column_record("something_else") == {"Description": "something else"}
    assert table_text([{"a": 1.0}, {"b": None}]) == "a\tb\n1\tn/a\nn/a\tn/a\n"


def test_two_thousand_participants_stay_small():
    random = np.random.default_rng(0)
    names = [f"metric_{i}" for i in range(30)]
    rows = [
        {"participant_id": f"sub-{i:04d}", "method": "irem", **dict.fromkeys(names, 0.0)}
        | {n: float(v) for n, v in zip(names, random.normal(size=30), strict=True)}
        for i in range(2000)
    ]
    html = group_page("T1w", rows, [Column(n, n) for n in rows[0]], [None] * 2000)
    assert len(html) < 5_000_000


def test_a_difference_without_weight_is_no_outlier():
    """A cohort that agrees by chance, and stacks that are the reference, hide no false alarm."""
    rows = [
        {"participant_id": f"sub-{i}", "method": "irem", "ncc_after": 0.998 + 1e-5 * (i % 3),
         "translation_mm_axial1": 0.0 if i < 14 else 1.0 + 0.8 * (i % 5), "gain_axial1": 1.0}
        for i in range(20)
    ]  # fmt: skip
    rows[4]["ncc_after"], rows[5]["gain_axial1"] = 0.996, 1.03
    columns = [Column(name, name) for name in rows[0]]
    page = Parsed(group_page("T1w", rows, columns, [None] * 20))
    assert [m["outliers"] for m in page.data["metrics"]] == [[], [], []]
    rows[4]["ncc_after"], rows[5]["gain_axial1"] = 0.98, 2.0
    rows[16]["translation_mm_axial1"] = 25.0
    page = Parsed(group_page("T1w", rows, columns, [None] * 20))
    named = {page.data["columns"][m["column"]]["name"]: m["outliers"] for m in page.data["metrics"]}
    assert named == {"ncc_after": [4], "gain_axial1": [5], "translation_mm_axial1": [16]}
