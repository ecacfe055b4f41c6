# SPDX-License-Identifier: Apache-2.0
"""Metrics as rows: of one group, and the table over all participants."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import log

if TYPE_CHECKING:
    from .groups import Group

LOG = logging.getLogger(log.PACKAGE)


def quality_row(group: Group, method: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """One flat row of metrics; nested ones are joined by underscores."""
    row: dict[str, Any] = {
        "participant_id": f"sub-{group.subject}",
        "session_id": f"ses-{group.session}" if group.session else "n/a",
        "suffix": group.suffix,
        "method": method,
        "stacks": len(group.stacks),
    }
    return {**row, **flatten(metrics)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars of a nested dictionary under joined names; lists are left out.

    >>> flatten({"psnr": 30.0, "ncc": {"axial1": 0.9}, "curve": [1, 2]})
    {'psnr': 30.0, 'ncc_axial1': 0.9}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}_"))
        elif isinstance(value, (str, int, float, bool)) or value is None:
            flat[f"{prefix}{key}"] = value
    return flat


def table_text(rows: list[dict[str, Any]]) -> str:
    """Rows as tab-separated values; what a row lacks is ``n/a``."""
    columns = columns_of(rows)
    lines = ["\t".join(columns)]
    for row in rows:
        lines.append("\t".join(_cell(row.get(column)) for column in columns))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split()) or "n/a"


def collect(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of all participants' ``*_qc.json`` by contrast; files of others are left out."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("sub-*/**/*_qc.json")):
        try:
            content = json.loads(path.read_text())
            row = {key: content[key] for key in ("participant_id", "session_id", "suffix")}
            row |= {"entities": _joined(content["entities"]), "method": content["method"]}
            row |= {"stacks": content["stacks"], **flatten(content["metrics"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            LOG.warning("%s: not metrics of this app (%s)", path.name, error)
            continue
        rows.setdefault(row["suffix"], []).append(row)
    return rows


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the columns of a table, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _joined(entities: dict[str, str]) -> str:
    return "_".join(f"{key}-{value}" for key, value in entities.items()) or "n/a"


# description, and unit where there is one
COLUMNS: dict[str, tuple[str, str]] = {
    "participant_id": ("Participant, with the prefix sub-", ""),
    "session_id": ("Session, with the prefix ses-", ""),
    "suffix": ("Contrast", ""),
    "entities": ("Entities that keep groups of this contrast apart", ""),
    "method": ("Reconstruction method", ""),
    "stacks": ("Number of stacks used", "stacks"),
    "held_out_psnr": ("Peak signal-to-noise ratio of the prediction of held-out voxels", "dB"),
    "held_out_ncc": ("Normalised cross-correlation of predicted and measured held-out voxels", "1"),
    "held_out_voxels": ("Number of held-out voxels", "voxels"),
    "ncc_before": ("Mean normalised cross-correlation of pairs of stacks before registration", "1"),
    "ncc_after": ("Mean normalised cross-correlation of pairs of stacks after registration", "1"),
    "snr_result": ("Signal-to-noise ratio of the reconstruction", "1"),
}
PREFIXES: dict[str, tuple[str, str]] = {
    "self_consistency_": ("Normalised cross-correlation of a stack and its prediction: ", "1"),
    "snr_": ("Signal-to-noise ratio of a stack: ", "1"),
    "noise_": ("Standard deviation of the noise within slices of a stack: ", "scaled intensity"),
    "masked_": ("Origin of the mask of a stack: ", ""),
    "gain_": ("Gain of a stack: ", "1"),
    "residual_": ("Root mean square residual of a stack: ", "scaled intensity"),
    "rotation_deg_": ("Rotation of a stack to the reference: ", "degrees"),
    "translation_mm_": ("Movement of the head's centre in a stack to the reference: ", "mm"),
}


def describe_column(name: str) -> tuple[str, str]:
    """What a column of the group table means, and its unit ('1': a ratio; '': no number)."""
    if name in COLUMNS:
        return COLUMNS[name]
    for prefix, (words, unit) in PREFIXES.items():
        if name.startswith(prefix):
            return words + name.removeprefix(prefix), unit
    return name.replace("_", " "), ""


def column_record(name: str) -> dict[str, str]:
    """A column as the JSON beside a TSV file describes it."""
    words, unit = describe_column(name)
    return {"Description": words, **({"Units": unit} if unit else {})}
