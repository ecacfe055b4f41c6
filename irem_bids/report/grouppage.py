# SPDX-License-Identifier: Apache-2.0
"""The page over all participants: a strip plot per metric, outliers by name, one table.

Everything is in one file: the rows as JSON, the script that draws them, no library.  What a
reader without scripts needs (medians, ranges, outliers with their links) is plain HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .policy import header
from .sections import TEMPLATES, environment
from .wording import number, plain

OUTLIER = 3.5  # robust standard deviations from the median
FEWEST = 5  # rows of a method for an outlier to be named
#: Beginnings of names, and the least robust standard deviation that is believed: when all
#: others agree by chance or by definition, a difference without weight is no outlier.
LEAST_SPREAD = {
    "held_out_psnr": 0.3,
    "held_out_ncc": 0.002,
    "ncc_": 0.002,
    "self_consistency_": 0.002,
    "residual_": 0.001,
    "noise_": 0.001,
    "gain_": 0.02,
    "rotation_deg_": 0.5,
    "translation_mm_": 0.5,
}
OF_REFERENCE = ("rotation_deg_", "translation_mm_")  # 0 says that the stack is the reference
NAMED = 8  # outliers named below a plot
DIGITS = 6  # significant, in the page; the TSV has the same
IDENTITY = ("participant_id", "session_id", "suffix", "entities", "method")
FIRST = (
    "held_out_psnr",
    "held_out_ncc",
    "ncc_before",
    "ncc_after",
    "snr_result",
)  # shown at once; what comes per stack is folded


@dataclass(frozen=True)
class Column:
    """A column of the table and what it means."""

    name: str
    description: str
    unit: str = ""


@dataclass(frozen=True)
class Metric:
    """A numeric column: its values (rows,), NaN where absent, and the outliers.

    ``scores`` maps the row of an outlier to its distance in robust standard deviations.
    """

    column: Column
    values: NDArray[np.float64]
    scores: Mapping[int, float]

    @property
    def outliers(self) -> list[int]:
        """Rows of outliers, the farthest first."""
        return sorted(self.scores, key=lambda row: (-self.scores[row], row))


def group_page(
    suffix: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    links: Sequence[str | None],
) -> str:
    """The page of one contrast as HTML.

    ``links`` are the file names of the subjects' reports, one per row; ``None`` where there is
    none.
    """
    methods = [plain(row.get("method", "")) for row in rows]
    metrics = [m for c in columns if (m := _metric(c, rows, methods)) is not None]
    metrics.sort(key=lambda m: _rank(m.column.name))
    urls = [None if link is None else quote(link) for link in links]
    data = {
        "columns": [vars(c) for c in columns],
        "metrics": [
            {"column": list(columns).index(m.column), "outliers": m.outliers} for m in metrics
        ],
        "rows": [[_cell(row.get(c.name)) for c in columns] for row in rows],
        "links": urls,
        "identity": [i for i, c in enumerate(columns) if c.name in IDENTITY],
        "shown": _shown(rows, columns),
        "method": next((i for i, c in enumerate(columns) if c.name == "method"), -1),
    }
    script = (TEMPLATES / "group.js").read_text(encoding="utf-8").strip()
    plots = [_plot(m, list(columns).index(m.column), rows, urls) for m in metrics]
    return (
        environment()
        .get_template("group.html")
        .render(
            suffix=plain(suffix),
            header=header(script),
            script=script,
            data=safe_json(data),
            first=[p for p in plots if p["name"] in FIRST],
            others=[p for p in plots if p["name"] not in FIRST],
            subjects=len({plain(row.get("participant_id", "")) for row in rows}),
            rows=len(rows),
            methods=sorted(set(methods)),
            named=_worst(metrics, rows, urls),
        )
    )


def _shown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[int]:
    """Columns of the table at first: who, what is not the same everywhere, the main metrics."""
    return [
        i
        for i, c in enumerate(columns)
        if i == 0
        or c.name in FIRST
        or (c.name in IDENTITY and len({plain(row.get(c.name)) for row in rows}) > 1)
    ]


def safe_json(value: Any) -> str:
    """JSON that no HTML parser can take for a tag; NaN is refused."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _rank(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def _cell(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value)
    if isinstance(value, (int, float)):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return plain(value)


def _metric(
    column: Column, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]
) -> Metric | None:
    if column.name in IDENTITY:
        return None
    found = [row.get(column.name) for row in rows]
    if any(isinstance(v, (str, bool)) for v in found):
        return None
    values = np.array([math.nan if v is None else float(v) for v in found])
    if not np.isfinite(values).any():
        return None
    judged = values
    if column.name.startswith(OF_REFERENCE):
        judged = np.where(np.abs(values) < 1e-6, math.nan, values)
    least = next((v for k, v in LEAST_SPREAD.items() if column.name.startswith(k)), 0.0)
    return Metric(column, values, outliers(judged, methods, least))


def outliers(
    values: NDArray[np.float64], methods: Sequence[str], least: float = 0.0
) -> dict[int, float]:
    """Rows far from the median of their method, with how far.

    Far is more than :data:`OUTLIER` robust standard deviations (1.4826 median absolute
    deviations, but not below ``least``).
    """
    found: dict[int, float] = {}
    labels = np.array(methods)
    for method in sorted(set(methods)):
        where = np.flatnonzero((labels == method) & np.isfinite(values))
        if where.size < FEWEST:
            continue
        distance = np.abs(values[where] - np.median(values[where]))
        spread = max(1.4826 * float(np.median(distance)), least)
        if spread > 1e-9 * max(1e-12, float(np.abs(values[where]).max())):
            scores = distance / spread
            found |= {int(i): float(s) for s, i in zip(scores, where, strict=True) if s > OUTLIER}
    return found


def _who(row: Mapping[str, Any]) -> str:
    parts = [row.get(k) for k in ("participant_id", "session_id", "entities")]
    return " ".join(plain(p) for p in parts if p not in (None, "", "n/a"))


def _plot(
    metric: Metric, index: int, rows: Sequence[Mapping[str, Any]], urls: Sequence[str | None]
) -> dict[str, Any]:
    known = metric.values[np.isfinite(metric.values)]
    low, middle, high = np.percentile(known, [5, 50, 95])
    named = [
        {
            "who": _who(rows[i]),
            "method": plain(rows[i].get("method", "")),
            "value": number(metric.values[i], ".4g"),
            "url": urls[i],
            "row": i,
        }
        for i in metric.outliers[:NAMED]
    ]
    return {
        "name": metric.column.name,
        "index": index,
        "description": metric.column.description,
        "unit": metric.column.unit,
        "count": int(known.size),
        "median": number(middle, ".4g"),
        "low": number(low, ".4g"),
        "high": number(high, ".4g"),
        "named": named,
        "more": len(metric.outliers) - len(named),
    }


def _worst(
    metrics: Sequence[Metric], rows: Sequence[Mapping[str, Any]], urls: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Participants with the farthest outliers, for the top of the page."""
    people: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        for row, score in metric.scores.items():
            who = _who(rows[row])
            found = people.setdefault(
                who, {"who": who, "url": urls[row], "score": 0.0, "metrics": {}, "methods": set()}
            )
            found["score"] = max(found["score"], score)
            best = found["metrics"].get(metric.column.name, 0.0)
            found["metrics"][metric.column.name] = max(best, score)
            found["methods"].add(plain(rows[row].get("method", "")))
    worst = sorted(people.values(), key=lambda p: (-p["score"], p["who"]))[:NAMED]
    for person in worst:
        names = sorted(person["metrics"], key=lambda name: -person["metrics"][name])
        person["metrics"] = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        person["methods"] = ", ".join(sorted(person["methods"]))
        person["score"] = number(person["score"], ".0f")
    return worst
