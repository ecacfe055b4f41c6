# SPDX-License-Identifier: Apache-2.0
"""A synthetic cohort's metrics, as the participant level leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

STACKS = ("axial1", "coronal1", "sagittal1")


def metrics(random: np.random.Generator) -> dict[str, object]:
    """Plausible metrics of one result."""

    def each(mean: float, spread: float) -> dict[str, float]:
        return {label: float(random.normal(mean, spread)) for label in STACKS}

    return {
        "held_out_psnr": float(random.normal(30, 1)),
        "held_out_ncc": float(random.normal(0.97, 0.005)),
        "held_out_voxels": int(random.integers(9_000, 11_000)),
        "self_consistency": each(0.985, 0.004),
        "residual": each(0.03, 0.003),
        "gain": each(1.0, 0.03),
        "rotation_deg": each(2.0, 0.5),
        "translation_mm": each(2.0, 0.5),
        "ncc_before": float(random.normal(0.8, 0.03)),
        "ncc_after": float(random.normal(0.93, 0.01)),
        "snr": each(30, 2),
        "noise": each(0.02, 0.002),
        "masked": dict.fromkeys(STACKS, "otsu"),
        "snr_result": float(random.normal(40, 3)),
    }


def write_cohort(
    out: Path, count: int, methods: tuple[str, ...] = ("irem",), *, pages: bool = True
) -> None:
    """``count`` participants; the third one has a held-out PSNR far too low."""
    random = np.random.default_rng(5)
    width = len(str(count))
    for number in range(1, count + 1):
        name = f"sub-{number:0{width}d}"
        anat = out / name / "anat"
        anat.mkdir(parents=True)
        for method in methods:
            values = metrics(random)
            if number == 3:
                values["held_out_psnr"] = 18.5
            record = {
                "participant_id": name,
                "session_id": "n/a",
                "suffix": "T1w",
                "method": method,
                "stacks": 3,
                "entities": {},
                "metrics": values,
            }
            (anat / f"{name}_desc-{method}_qc.json").write_text(json.dumps(record))
        if pages:
            (out / f"{name}.html").write_text(
                f'<!DOCTYPE html><html lang="en"><title>{name}</title><h1>{name}</h1></html>'
            )
