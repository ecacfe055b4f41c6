# SPDX-License-Identifier: Apache-2.0
"""Scores of a reconstruction against a truth, raw and after the gauge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gauge import gauge, resample_near, target_registration_error
from .geometry import Grid, RigidTransform
from .metrics import MetricError, head_mask, ncc, psnr, ssim

TRE_POINTS = 5000


@dataclass(frozen=True)
class Scores:
    """How near a reconstruction is to the truth, in the mask.

    ``*_raw`` compares as it stands (resampled to the truth's grid by cubic B-splines), the
    others after the rigid motion, scale and offset that fit best.  PSNR in dB, its peak the
    99.9th percentile of the truth in the mask.  ``rotation`` (degrees, rotation vector
    about the mask's centre) and ``translation`` (mm) take points of the truth to points of
    the reconstruction; ``scale * reconstruction + offset`` is in the truth's unit.
    """

    psnr: float
    ssim: float
    ncc: float
    psnr_raw: float
    ssim_raw: float
    rotation: tuple[float, float, float]
    translation: tuple[float, float, float]
    scale: float
    offset: float
    coverage: float
    peak: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def evaluate(
    reconstruction: tuple[NDArray, Grid],
    truth: tuple[NDArray, Grid],
    mask: NDArray[np.bool_] | None = None,
    *,
    threads: int = 1,
) -> Scores:
    """Score a reconstruction; ``mask`` is on the truth's grid (default: the head in the truth)."""
    volume, grid = truth
    inside = head_mask(volume) if mask is None else np.asarray(mask, dtype=bool)
    found = gauge(*reconstruction, volume, grid, inside, threads=threads)
    raw, _ = resample_near(*reconstruction, grid, inside, RigidTransform(), threads)
    centre = grid.middle_of(inside)
    vector = found.transform.to_vector(centre)
    peak = float(np.percentile(volume[inside], 99.9))
    rotation, translation = np.rad2deg(vector[:3]).tolist(), vector[3:].tolist()
    return Scores(
        psnr=psnr(found.volume, volume, inside, peak=peak),
        ssim=ssim(found.volume, volume, inside, peak=peak),
        ncc=ncc(found.volume, volume, inside),
        psnr_raw=psnr(raw, volume, inside, peak=peak),
        ssim_raw=ssim(raw, volume, inside, peak=peak),
        rotation=(rotation[0], rotation[1], rotation[2]),
        translation=(translation[0], translation[1], translation[2]),
        scale=found.scale,
        offset=found.offset,
        coverage=found.coverage,
        peak=peak,
    )


def pose_errors(
    estimated: Mapping[str, RigidTransform],
    true: Mapping[str, RigidTransform],
    mask: NDArray[np.bool_],
    grid: Grid,
) -> dict[str, float]:
    """Mean target registration error (mm) of each stack over the points of ``mask``.

    Poses are scanner space to the space of the result or truth, by the stack's label; one
    rigid motion common to all stacks is removed first.
    """
    missing = sorted(set(true) - set(estimated))
    if missing:
        raise MetricError(f"no estimated pose for {', '.join(missing)}")
    indices = np.argwhere(mask)
    picked = indices[np.linspace(0, len(indices) - 1, min(TRE_POINTS, len(indices))).astype(int)]
    labels = list(true)
    errors = target_registration_error(
        [estimated[name] for name in labels], [true[name] for name in labels], grid.to_world(picked)
    )
    return dict(zip(labels, errors, strict=True))
