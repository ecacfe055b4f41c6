# SPDX-License-Identifier: Apache-2.0
"""The stacks' masks brought together on the grid of the result."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .geometry import Grid
from .prepare import Prepared
from .stack import Mask


def output_mask(prepared: Prepared, grid: Grid) -> Mask:
    """(grid.shape) mask: where at least half of the stacks that cover a voxel see foreground.

    Masks are interpolated linearly at the registered poses, one slab of the grid at a
    time.  If no voxel has a majority, any foreground counts.
    """
    votes = np.zeros(grid.shape, dtype=np.float32)
    covered = np.zeros(grid.shape, dtype=np.float32)
    plane = np.indices((1, *grid.shape[1:])).reshape(3, -1).T
    poses = [pose.inverse() for pose in prepared.poses]
    for first in range(grid.shape[0]):
        points = grid.to_world(plane + np.array([first, 0, 0]))
        for stack, pose in zip(prepared.stacks, poses, strict=True):
            index = stack.grid.to_index(pose.apply(points)).T
            size = np.array(stack.grid.shape)[:, None]
            inside = ((index >= -0.5) & (index <= size - 0.5)).all(axis=0)
            seen = ndimage.map_coordinates(
                stack.mask.astype(np.float32), index, order=1, mode="nearest"
            )
            votes[first] += (seen * inside).reshape(grid.shape[1:])
            covered[first] += inside.reshape(grid.shape[1:])
    mask = (votes >= 0.5 * covered) & (covered > 0)
    return mask if mask.any() else votes > 0
