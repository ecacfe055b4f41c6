# SPDX-License-Identifier: Apache-2.0
"""Values as text: metrics with their definitions, numbers, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# name, unit or form, definition
METRICS: dict[str, tuple[str, str, str]] = {
    "held_out_psnr": (
        "Held-out PSNR (dB)",
        ".2f",
        "Peak signal-to-noise ratio of the prediction of voxels that were never trained on; the "
        "peak is the percentile of the foreground that intensities are scaled to. Higher is "
        "better.",
    ),
    "held_out_ncc": (
        "Held-out NCC",
        ".4f",
        "Normalised cross-correlation of those voxels with their prediction; 1 is perfect.",
    ),
    "snr_result": (
        "SNR of the result",
        ".1f",
        "Mean of the foreground over the noise within it, estimated from its finest detail "
        "(Immerkaer's mixed second difference). A blurred result has little fine detail, so that a "
        "high value alone is no sign of quality.",
    ),
    "ncc_before": (
        "NCC before",
        ".3f",
        "Mean normalised cross-correlation of all pairs of stacks, placed by their headers.",
    ),
    "ncc_after": (
        "NCC after",
        ".3f",
        "The same after registration.",
    ),
    "self_consistency": (
        "Self-consistency (NCC)",
        ".4f",
        "Normalised cross-correlation of a stack with what the field predicts for it.",
    ),
    "snr": (
        "SNR",
        ".1f",
        "Of a stack: mean of its foreground over the standard deviation of its noise within "
        "slices, estimated from mixed second differences (Immerkaer 1996).",
    ),
    "gain": (
        "Gain",
        ".3f",
        "Factor by which a stack is brighter than the field predicts, after all stacks were "
        "scaled alike; 1 is no difference.",
    ),
    "profile_width": (
        "Slice profile (mm)",
        ".2f",
        "Width of a stack's slice profile as learned from the data, where they contradict the "
        "stated slice thickness.",
    ),
    "held_out_voxels": ("Held-out voxels", ".0f", "How many voxels were never trained on."),
    "residual": (
        "Residual",
        ".4f",
        "Root mean square of acquired less predicted over a stack's foreground, in scaled "
        "intensity; as large as the noise at best.",
    ),
    "noise": (
        "Noise",
        ".4f",
        "Standard deviation of a stack's noise, in scaled intensity.",
    ),
}


def plain(value: Any) -> str:
    """Any value as text that can be written in UTF-8."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(k)}: {plain(v)}" for k, v in value.items())
    return str(value).encode("utf-8", "replace").decode("utf-8")


def number(value: Any, form: str = ".3g") -> str:
    """A number in ``form``; 'n/a' where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return "n/a" if value is None else plain(value)
    if not np.isfinite(value):
        return "n/a"
    text = format(float(value), form)
    return text.lstrip("+-") if float(text) == 0.0 else text


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Columns (title, kind: 'number', 'path', 'wide' or '') and rows for the templates."""
    return {
        "columns": [{"name": n, "number": k == "number", "kind": k} for n, k in columns],
        "rows": [[plain(cell) for cell in row] for row in rows],
    }
