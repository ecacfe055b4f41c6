# SPDX-License-Identifier: Apache-2.0
"""Where a group's metrics lie among those of the cohort, from the table of the level 'group'."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .material import Material
from .wording import METRICS, number, table

FEWEST = 5  # results of a method for a range to mean something


def ranges(path: Path) -> dict[tuple[str, str], list[float]]:
    """(method, metric) to the values of all rows of a ``group_*.tsv``; {} where it is absent."""
    found: dict[tuple[str, str], list[float]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            for name in METRICS:
                try:
                    value = float(row.get(name) or "n/a")
                except ValueError:
                    continue
                found.setdefault((row.get("method") or "", name), []).append(value)
    return found


def among_others(material: Material) -> dict[str, Any]:
    """A table of this group's metrics beside the median and the range of the cohort."""
    folder = material.inp.out_dir
    path = None if folder is None else Path(folder) / f"group_{material.inp.group.suffix}.tsv"
    known = {} if path is None else ranges(path)
    rows, bars = [], []
    for result in material.methods.values():
        for name, (title, form, _) in METRICS.items():
            value, others = result.quality.get(name), known.get((result.name, name), [])
            if not isinstance(value, (int, float)) or len(others) < FEWEST:
                continue
            low, middle, high = np.percentile(others, [5, 50, 95])
            place = "below" if value < low else "above" if value > high else "within"
            rows.append(
                (
                    result.name,
                    title,
                    number(value, form),
                    number(middle, form),
                    f"{number(low, form)} to {number(high, form)}",
                    place,
                    len(others),
                )
            )
            bars.append(bar(value, others))
    columns = (
        ("Method", ""),
        ("Metric", ""),
        ("Here", "number"),
        ("Median", "number"),
        ("5–95 %", "number"),
        ("Place", ""),
        ("Results", "number"),
    )
    return {**table(columns, rows), "bars": bars}


def bar(value: float, others: Sequence[float]) -> dict[str, float]:
    """Where the 5-95 % band, the median and ``value`` lie, in % of the range of all of them."""
    low, high = min(value, *others), max(value, *others)
    start, middle, end, here = (
        round(100 * (float(v) - low) / (high - low), 1) if high > low else 50.0
        for v in (*np.percentile(others, [5, 50, 95]), value)
    )
    return {"start": start, "width": round(end - start, 1), "middle": middle, "here": here}
