# SPDX-License-Identifier: Apache-2.0
"""Reconstructions without a network: cubic B-spline averaging."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, map_coordinates, spline_filter

from .geometry import Grid, RigidTransform
from .stack import Stack

CHUNK = 2**20


def resample_stack(
    stack: Stack, pose: RigidTransform, grid: Grid, *, order: int = 3
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A stack interpolated by B-splines on ``grid``, and the voxels inside its field of view.

    Voxels outside are 0.  ``pose`` maps the stack's scanner space to reference space.
    """
    coefficients = stack.data
    if order > 1:
        coefficients = spline_filter(stack.data, order=order, output=np.float32, mode="mirror")
    back = np.linalg.inv(stack.grid.affine) @ pose.inverse().matrix @ grid.affine
    values = np.zeros(grid.shape, dtype=np.float32)
    inside = np.zeros(grid.shape, dtype=bool)
    rows = max(1, CHUNK // (grid.shape[1] * grid.shape[2]))
    limits = np.array(stack.data.shape)[:, None] - 0.5
    for start in range(0, grid.shape[0], rows):
        part = np.indices((min(rows, grid.shape[0] - start), *grid.shape[1:])).reshape(3, -1)
        part[0] += start
        index = back[:3, :3] @ part + back[:3, 3:]
        shape = values[start : start + rows].shape
        values[start : start + rows] = map_coordinates(
            coefficients, index, order=order, mode="mirror", prefilter=False, output=np.float32
        ).reshape(shape)
        inside[start : start + rows] = (
            ((index >= -0.5) & (index <= limits)).all(axis=0).reshape(shape)
        )
    values[~inside] = 0
    return values, inside


def without(stack: Stack, held_out: NDArray[np.bool_]) -> Stack:
    """The stack with held-out voxels (I, J, K) replaced from around them within the slice.

    Each becomes the mean of its 3 x 3 neighbours that are known, from the rim of a hole inwards;
    0 where a whole slice is held out.
    """
    axes = [a for a in range(3) if a != stack.slice_axis]
    known, data = ~held_out, np.where(held_out, 0, stack.data)
    while True:
        weight, total = known.astype(np.float32), data
        for axis in axes:
            weight = correlate1d(weight, np.ones(3), axis=axis, mode="constant")
            total = correlate1d(total, np.ones(3), axis=axis, mode="constant")
        rim = ~known & (weight > 0)
        if not rim.any():
            return stack.with_data(data)
        data = np.where(rim, total / np.maximum(weight, 1), data)
        known |= rim


def bspline(
    stacks: Sequence[Stack], poses: Sequence[RigidTransform], grid: Grid
) -> NDArray[np.float32]:
    """Cubic B-spline up-sampling of each registered stack and their average (paper 3.2).

    Each voxel is the mean over the stacks whose field of view holds it.
    """
    total = np.zeros(grid.shape, dtype=np.float32)
    count = np.zeros(grid.shape, dtype=np.uint8)
    for stack, pose in zip(stacks, poses, strict=True):
        values, inside = resample_stack(stack, pose, grid)
        total += values
        count += inside
    return np.asarray(total / np.maximum(count, 1), dtype=np.float32)
