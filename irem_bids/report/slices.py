# SPDX-License-Identifier: Apache-2.0
"""How well each slice agrees with the result, measured quickly on some of its voxels.

The prediction (:mod:`.predicted`) is made for no more than :data:`VOXELS` voxels of a slice,
so that a whole head takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..reconstruction.geometry import RigidTransform
from ..reconstruction.stack import Stack
from ..settings import Acquisition
from . import predicted
from .material import Material, MethodResult

VOXELS = 500  # of a slice, at most
ENOUGH = 0.2  # of the foreground of the largest slice, for a slice to be judged
WINDOW = 7  # slices, for what is usual in a place of the stack
RESIDUAL_FACTOR = 2.2  # of the usual residual
RESIDUAL_EXCESS = 0.03  # scaled intensity beyond the usual residual
DIM, BRIGHT = 0.7, 1.45  # of the usual brightness
LOW_WEIGHT = 0.3  # that the method itself gave to the slice
PREFERRED = ("irem", "srr")  # methods that know the slice profile


@dataclass(frozen=True)
class SliceFit:
    """One stack against the result; NaN for slices with too little foreground.

    Attributes
    ----------
    residual
        (K,) median absolute difference of acquired and predicted, scaled intensity.
    brightness
        (K,) factor by which the slice is brighter than predicted.
    """

    residual: NDArray[np.float64]
    brightness: NDArray[np.float64]


def judge(material: Material) -> MethodResult | None:
    """The method whose result the slices are compared with."""
    done = {n: m for n, m in material.methods.items() if m.volume is not None}
    for name in (*PREFERRED, *done):
        if name in done:
            return done[name]
    return None


def fit_slices(material: Material) -> dict[str, SliceFit]:
    """Every stack against the result of the method that knows most; {} without one."""
    result, prepared = judge(material), material.prepared
    if result is None or prepared is None:
        return {}
    found = {}
    for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
        moved = result.poses.get(stack.label, pose)
        acquisition = material.inp.settings.acquisition
        found[stack.label] = fit_stack(stack, moved, result, prepared.scale, acquisition)
    return found


def fit_stack(
    stack: Stack,
    pose: RigidTransform,
    result: MethodResult,
    scale: float,
    acquisition: Acquisition,
) -> SliceFit:
    """One stack at ``pose`` against ``result``, whose intensities are ``scale`` times ours."""
    axis = stack.slice_axis
    mask = np.moveaxis(_inner(stack), axis, 0)
    counts = mask.reshape(len(mask), -1).sum(axis=1)
    random = np.random.default_rng(0)
    residual, brightness = np.full(len(mask), np.nan), np.full(len(mask), np.nan)
    pairs: dict[int, tuple[NDArray, NDArray]] = {}
    shading, gains = predicted.receiver(result, stack, pose), predicted.slice_gains(result, stack)
    for k in map(int, np.flatnonzero(counts >= max(20, ENOUGH * counts.max()))):
        index = np.insert(np.argwhere(mask[k]), axis, k, axis=1)
        if len(index) > VOXELS:
            index = index[random.choice(len(index), VOXELS, replace=False)]
        acquired = stack.data[tuple(index.T)].astype(np.float64)
        guess = predicted.voxels(stack, result, pose, index, acquisition) / scale
        guess *= shading[tuple(index.T)]
        if not np.any(guess > 0):
            continue
        pairs[k] = acquired, guess
        brightness[k] = gains[k] * np.median(acquired) / max(float(np.median(guess)), 1e-6)
    usual = running_median(brightness)
    for k, (acquired, guess) in pairs.items():
        residual[k] = np.median(np.abs(acquired - usual[k] * guess))
    return SliceFit(residual, brightness / np.where(np.isfinite(usual), usual, 1.0))


def _inner(stack: Stack) -> NDArray[np.bool_]:
    """The foreground less two voxels at its edge in plane, where there is enough of it."""
    shape = np.ones(3, dtype=int)
    shape[[a for a in range(3) if a != stack.slice_axis]] = 5
    inner = ndimage.binary_erosion(stack.mask, np.ones(shape, dtype=bool))
    return inner if inner.sum() > 0.3 * stack.mask.sum() else stack.mask


def running_median(values: NDArray[np.float64], window: int = WINDOW) -> NDArray[np.float64]:
    """(K,) median of the finite values of ``window`` neighbours; NaN where there is none."""
    half = window // 2
    out = np.full(values.shape, np.nan)
    for k in range(len(values)):
        near = values[max(0, k - half) : k + half + 1]
        near = near[np.isfinite(near)]
        if near.size:
            out[k] = np.median(near)
    return out


def bad_slices(fit: SliceFit, weights: NDArray[np.float64] | None = None) -> dict[int, str]:
    """Slice index to what is wrong with it; ``weights`` (K,) are what a method gave, if any.

    The outermost slice at either end is not judged: it is partly out of the head.
    """
    usual = running_median(fit.residual)
    known = fit.residual[np.isfinite(fit.residual)]
    if known.size < 5:
        return {}
    spread = 1.4826 * float(np.median(np.abs(known - np.median(known))))
    found = {}
    for k in map(int, np.flatnonzero(np.isfinite(fit.residual))[1:-1]):
        off = fit.residual[k] > max(
            RESIDUAL_FACTOR * usual[k], usual[k] + RESIDUAL_EXCESS, np.median(known) + 4 * spread
        )
        if fit.brightness[k] < DIM:
            found[k] = f"signal dropped to {100 * fit.brightness[k]:.0f} %"
        elif fit.brightness[k] > BRIGHT:
            found[k] = f"{fit.brightness[k]:.1f} times as bright as its neighbours"
        elif off:
            times = fit.residual[k] / max(usual[k], 1e-9)
            found[k] = f"torn or moved: residual {times:.1f} times the usual"
        elif weights is not None and k < len(weights) and weights[k] < LOW_WEIGHT:
            found[k] = f"weighted down to {weights[k]:.2f} by the method"
    return found
