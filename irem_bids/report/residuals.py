# SPDX-License-Identifier: Apache-2.0
"""Figures of how acquired and predicted slices differ, of the weights and motion of slices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..reconstruction.geometry import RigidTransform
from ..reconstruction.stack import Stack
from ..settings import Acquisition
from . import plots, predicted, views
from .finding import listed
from .material import MethodResult
from .slices import bad_slices
from .studio import Figure, Studio, coloured, head_limits, zoomed

TILE = 340  # pixels, about, of the longer side of a picture
SPAN = 0.25  # residuals are shown within this part of the window, either way


def residuals(studio: Studio, result: MethodResult) -> list[Figure]:
    """The middle slice of each stack: acquired, predicted from the result, and the difference."""
    prepared = studio.material.prepared
    if prepared is None or result.volume is None:
        return []
    black, white = studio.levels
    span = SPAN * (white - black)
    settings = studio.material.inp.settings
    percentile, acquisition = settings.normalise.intensity_percentile, settings.acquisition
    figures = []
    for stack, registered in zip(prepared.stacks, prepared.poses, strict=True):
        pose = result.poses.get(stack.label, registered)
        counts = stack.mask.sum(axis=tuple(a for a in range(3) if a != stack.slice_axis))
        k = int(np.argmax(np.cumsum(counts) >= counts.sum() / 2))
        guess = slice_prediction(stack, result, pose, k, prepared.scale, acquisition)
        image = _triple(studio, stack, guess, k, span)
        figures.append(
            Figure(
                views.save_png(image, studio.path(f"residual{result.name}{stack.label}")),
                "residual",
                method=result.name,
                stack=stack.label,
                alt=f"middle slice of stack {stack.label} as acquired, as {result.name} predicts "
                "it, and the residual",
                caption=f"residual: purple is acquired above predicted by {span:.3g} or more, "
                f"orange the reverse, in units of the {percentile:g}th percentile of the "
                "foreground",
            )
        )
    return figures


def slice_prediction(
    stack: Stack,
    result: MethodResult,
    pose: RigidTransform,
    k: int,
    scale: float,
    acquisition: Acquisition,
) -> NDArray[np.float64]:
    """(I, J, K) zero but for the foreground of slice ``k``, which is as ``result`` predicts it."""
    out = np.zeros(stack.grid.shape)
    keep = np.zeros(stack.grid.shape, dtype=bool)
    place: list[slice | int] = [slice(None)] * 3
    place[stack.slice_axis] = k
    keep[tuple(place)] = stack.mask[tuple(place)]
    index = np.argwhere(keep)
    if len(index):
        out[keep] = predicted.voxels(stack, result, pose, index, acquisition) / scale
        out[keep] *= predicted.receiver(result, stack, pose)[keep]
    return out


def _triple(studio: Studio, stack: Stack, guess: NDArray, k: int, span: float) -> Image.Image:
    full = views.canonical(stack.data, stack.grid)
    normal = full.file_axis.index(stack.slice_axis)
    plane = next(p for p, axis in views.NORMAL.items() if axis == normal)
    mask = views.canonical(stack.mask, stack.grid)
    limits = head_limits(mask.data, full.grid)
    at = k if full.sign[normal] > 0 else full.grid.shape[normal] - 1 - k
    limits[normal] = (at, at + 1)
    part = views.crop(full, limits)
    other = views.crop(views.canonical(guess, stack.grid), limits).data
    inside = views.crop(mask, limits).data
    size = views.pixel_size(part.grid, plane)
    mm = min(size) / max(1, round(TILE / max(views.picture(part.data, plane, 0).shape)))
    tiles = []
    for name, values in (("acquired", part.data), ("predicted", other)):
        pixels = views.grey(views.picture(values, plane, 0), studio.levels)
        tiles.append(zoomed(np.repeat(pixels[..., None], 3, axis=2), part.grid, plane, mm, name))
    difference = views.picture(np.where(inside, part.data - other, 0.0), plane, 0)
    pixels = coloured(0.5 + difference / (2 * span), "PuOr")
    tiles.append(zoomed(pixels, part.grid, plane, mm, "residual"))
    return views.montage(tiles, 3)


def slice_plots(studio: Studio) -> list[Figure]:
    """Per stack: residual of each slice, and the weights that methods gave, if any."""
    figures = []
    for label, fit in studio.material.slice_fits.items():
        given = {
            result.name: found[label]
            for result in studio.material.methods.values()
            if label in (found := predicted.slice_values(result, "slice_weights"))
            and found[label].ndim == 1
        }
        bad = sorted(bad_slices(fit))
        path = plots.slice_curves(fit.residual, given, bad, studio.path(f"slices{label}", "svg"))
        if path is None:
            continue
        words = f"; marked: slice {listed([str(k) for k in bad])}" if bad else "; none stands out"
        also = f" and weight by {listed(list(given))}" if given else ""
        figures.append(
            Figure(
                path,
                "slices",
                stack=label,
                alt=f"residual{also} of each slice of stack {label}{words}",
                caption=f"stack {label}: residual{also} of each slice{words}",
            )
        )
    return figures


def motion_plots(studio: Studio, result: MethodResult) -> list[Figure]:
    """Per stack: rotation and translation of each slice beyond its stack's pose."""
    figures = []
    for label, motion in predicted.slice_values(result, "slice_motion").items():
        if motion.ndim != 2 or motion.shape[1] != 6 or not np.any(motion):
            continue
        path = studio.path(f"motion{result.name}{label}", "svg")
        turn = float(np.rad2deg(np.linalg.norm(motion[:, :3], axis=1)).max())
        shift = float(np.linalg.norm(motion[:, 3:], axis=1).max())
        figures.append(
            Figure(
                plots.slice_motion(motion, path),
                "motion",
                method=result.name,
                stack=label,
                alt=f"motion of each slice of stack {label} as {result.name} found it: up to "
                f"{turn:.2f} degrees and {shift:.2f} mm",
                caption=f"stack {label}, {result.name}: up to {turn:.2f}° and {shift:.2f} mm",
            )
        )
    return figures
