# SPDX-License-Identifier: Apache-2.0
"""Tiny thick-slice stacks of the phantom, and datasets of them, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates

from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.stack import write_image

from .phantom import head

#: World axes (R, A, S) along the three axes of the image; the last is through the slices.
AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
DESCRIPTION = {"Name": "tiny", "BIDSVersion": "1.9.0", "DatasetType": "raw"}


def stack_grid(
    plane: str, in_plane: float = 3.0, spacing: float = 6.0, oblique: float = 0.0
) -> Grid:
    """Grid of a stack over the phantom; ``oblique`` degrees turn it about (1, 1, 1)."""
    _, truth = head()
    extent = np.array(truth.shape) * truth.voxel_size
    steps = np.array([in_plane, in_plane, spacing])
    shape = np.ceil(extent[list(AXES[plane])] / steps).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(AXES[plane])] * steps
    turn = RigidTransform.from_vector([*np.full(3, np.deg2rad(oblique) / np.sqrt(3)), 0, 0, 0])
    affine = turn.matrix @ affine
    affine[:3, 3] = truth.centre - affine[:3, :3] @ ((shape - 1) / 2.0)
    return Grid(shape, affine)


def stack_data(grid: Grid) -> np.ndarray:
    """(I, J, K) float32: the phantom, averaged through the slices (the third axis)."""
    volume, truth = head()
    indices = np.indices(grid.shape).reshape(3, -1).T.astype(float)
    total = np.zeros(len(indices))
    for offset in (-0.3, 0.0, 0.3):
        points = truth.to_index(grid.to_world(indices + np.array([0.0, 0.0, offset]))).T
        total += map_coordinates(volume, points, order=1, mode="constant", cval=0.0)
    return (total / 3).reshape(grid.shape).astype(np.float32)


def write_stack(
    path: Path, plane: str = "axial", *, sidecar: dict[str, Any] | None = None, **geometry: float
) -> Path:
    """Write a stack of the phantom and, if given, its sidecar; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = stack_grid(plane, **geometry)
    write_image(path, stack_data(grid), grid)
    if sidecar is not None:
        name = path.name.removesuffix(".gz").removesuffix(".nii") + ".json"
        path.with_name(name).write_text(json.dumps(sidecar))
    return path


def write_description(root: Path, **fields: Any) -> Path:
    """Write ``dataset_description.json``; returns ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({**DESCRIPTION, **fields}))
    return root


def centred(shape: tuple[int, ...], sizes: tuple[float, ...]) -> Grid:
    """A grid about the origin."""
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * sizes
    return Grid(shape, affine)
