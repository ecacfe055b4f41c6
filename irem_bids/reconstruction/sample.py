# SPDX-License-Identifier: Apache-2.0
"""A field on any grid (paper 2.3)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .fields import Field
from .geometry import Grid
from .recovery import Pieces


def evaluate(field: Field, points: NDArray[np.float64], *, chunk: int = 2**18) -> NDArray:
    """The field (on any device) at points (N, 3), mm: (N,) float32, scaled intensity."""
    tensors = [*field.parameters(), *field.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    values = np.empty(len(points), dtype=np.float32)

    def work(most: int) -> None:
        with torch.inference_mode():
            for start in range(0, len(points), most):
                part = torch.from_numpy(points[start : start + most]).float().to(device)
                values[start : start + len(part)] = field(part).cpu().numpy()

    Pieces("evaluating the field").run(chunk, work)
    return values


def sample(
    field: Field, grid: Grid, *, device: str = "cpu", chunk: int = 2**18
) -> NDArray[np.float32]:
    """The field at every voxel centre of ``grid``, in scaled intensity, float32.

    Memory beyond the result is bounded by ``chunk`` points, by fewer where that is too much.
    """
    field = field.to(device).eval()
    with torch.inference_mode():
        nodes = field.nodes(grid)
    if nodes is not None:
        return np.array(nodes.cpu().numpy(), dtype=np.float32)
    total = int(np.prod(grid.shape))
    values = np.empty(total, dtype=np.float32)

    def work(most: int) -> None:
        with torch.inference_mode():
            for start in range(0, total, most):
                flat = np.arange(start, min(start + most, total))
                index = np.stack(np.unravel_index(flat, grid.shape), axis=1)
                points = torch.from_numpy(grid.to_world(index)).float().to(device)
                values[flat] = field(points).cpu().numpy()

    Pieces("sampling the field").run(chunk, work)
    return values.reshape(grid.shape)
