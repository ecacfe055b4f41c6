# SPDX-License-Identifier: Apache-2.0
"""A small head-like volume without symmetry, with smooth edges and a zero background."""

from __future__ import annotations

import numpy as np

from irem_bids.reconstruction.geometry import Grid

# centre and radii in half widths of the box, rotation about S in rad, added intensity
ELLIPSOIDS = (
    ((0.00, 0.00, 0.00), (0.70, 0.80, 0.74), 0.00, 60.0),  # scalp
    ((0.00, -0.02, 0.02), (0.60, 0.71, 0.64), 0.05, 240.0),  # brain
    ((-0.14, 0.08, 0.10), (0.10, 0.30, 0.16), 0.30, -200.0),  # ventricles
    ((0.16, 0.02, 0.12), (0.12, 0.24, 0.20), -0.25, -180.0),
    ((0.30, -0.30, -0.20), (0.16, 0.12, 0.10), 0.60, 250.0),  # landmarks, each another
    ((-0.28, -0.34, 0.26), (0.09, 0.15, 0.13), -0.40, 180.0),
    ((-0.30, 0.38, -0.16), (0.12, 0.09, 0.20), 0.20, 300.0),
    ((0.10, 0.45, 0.24), (0.20, 0.07, 0.08), 0.50, -150.0),
    ((0.02, 0.20, -0.42), (0.14, 0.16, 0.08), 0.00, 160.0),
)


def head(
    shape: tuple[int, int, int] = (40, 44, 36), voxel: float = 2.0, *, edge: float = 0.9
) -> tuple[np.ndarray, Grid]:
    """(I, J, K) float32 intensities of 0 to about 850 and their grid, RAS+ mm.

    ``edge`` is the width of the edges in voxels (a logistic step); folds of a few voxels
    fill the brain so that every place differs from its neighbours.
    """
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = -voxel * (np.array(shape) - 1) / 2.0 + np.array([3.0, -5.0, 7.0])
    axes = [(np.arange(n) - (n - 1) / 2.0) / (n / 2.0) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    half = min(shape) / 2.0
    volume = np.zeros(shape)
    for (cx, cy, cz), (rx, ry, rz), angle, value in ELLIPSOIDS:
        u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
        v = -np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)
        radius = np.sqrt((u / rx) ** 2 + (v / ry) ** 2 + ((z - cz) / rz) ** 2)
        depth = (1.0 - radius) * min(rx, ry, rz) * half  # voxels inside the surface, about
        volume += value / (1.0 + np.exp(-np.clip(depth / (0.5 * edge), -40, 40)))
    folds = np.sin(9 * x + 4 * y + 2) * np.sin(8 * y - 5 * z + 1) * np.sin(10 * z + 3 * x)
    volume *= 1.0 + 0.25 * folds
    volume[volume < 2.0] = 0.0
    return volume.astype(np.float32), Grid(shape, affine)
