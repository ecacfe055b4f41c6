# SPDX-License-Identifier: Apache-2.0
"""A field on any grid (paper 2.3)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .fields import Field
from .geometry import Grid


def evaluate(field: Field, points: NDArray[np.float64], *, chunk: int = 2**18) -> NDArray:
    """The field (on any device) at points (N, 3), mm: (N,) float32, scaled intensity."""
    tensors = [*field.parameters(), *field.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    values = np.empty(len(points), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(points), chunk):
            part = torch.from_numpy(points[start : start + chunk]).float().to(device)
            values[start : start + len(part)] = field(part).cpu().numpy()
    return values


def sample(
    field: Field, grid: Grid, *, device: str = "cpu", chunk: int = 2**18
) -> NDArray[np.float32]:
    """The field at every voxel centre of ``grid``, in scaled intensity, float32.

    Memory beyond the result is bounded by ``chunk`` points.
    """
    field = field.to(device).eval()
    total = int(np.prod(grid.shape))
    values = np.empty(total, dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, total, chunk):
            flat = np.arange(start, min(start + chunk, total))
            index = np.stack(np.unravel_index(flat, grid.shape), axis=1)
            points = torch.from_numpy(grid.to_world(index)).float().to(device)
            values[flat] = field(points).cpu().numpy()
    return values.reshape(grid.shape)
