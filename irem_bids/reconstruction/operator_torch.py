# SPDX-License-Identifier: Apache-2.0
"""The forward model's three loops in plain PyTorch: the oracle, and a GPU's path without ours.

Same arguments and results as :mod:`.operator_cpu`, with tensors on any device; what a GPU takes
is :mod:`.operator_cuda`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .recovery import Pieces

if TYPE_CHECKING:
    from .acquisition import Rows

CHUNK = 2**22  # points at a time, fewer where memory ends


class DeviceRows:
    """:class:`Rows` as tensors on a device."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.axis = rows.axis
        self.index = torch.from_numpy(np.ascontiguousarray(rows.index)).to(device)
        self.slices = self.index[:, rows.axis].long()
        self.weights = torch.from_numpy(rows.weights).to(device)
        self.pieces = Pieces("forward model")
        self.place(rows)

    def place(self, rows: Rows) -> None:
        """Take over the maps of new poses or widths."""
        device = self.index.device
        self.maps = torch.from_numpy(rows.maps).float().to(device)
        self.steps = torch.from_numpy(np.ascontiguousarray(rows.steps)).to(device)
        self.through = torch.from_numpy(np.ascontiguousarray(rows.through)).to(device)

    def chunks(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their points (n, T, 3) in voxel indices, about ``most`` points at a time."""
        size = max(1, most // len(self.weights))
        for first in range(0, len(self.index), size):
            part = slice(first, min(first + size, len(self.index)))
            k = self.slices[part]
            maps, index = self.maps[k], self.index[part].float()
            centre = torch.einsum("nab,nb->na", maps[:, :, :3], index) + maps[:, :, 3]
            yield part, centre[:, None, :] + self.steps[k]


def _corners(
    points: Tensor, shape: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Of eight neighbours: flat index (clamped), weight (0 outside) and the weight's slopes."""
    base = points.floor()
    fraction = points - base
    base = base.long()
    sizes = torch.tensor(shape, device=points.device)
    for corner in range(8):
        bits = [corner >> 2 & 1, corner >> 1 & 1, corner & 1]
        where = base + torch.tensor(bits, device=points.device)
        inside = ((where >= 0) & (where < sizes)).all(-1)
        where = torch.minimum(where.clamp_min(0), sizes - 1)
        flat = (where[..., 0] * shape[1] + where[..., 1]) * shape[2] + where[..., 2]
        parts = [fraction[..., a] if bits[a] else 1 - fraction[..., a] for a in range(3)]
        signs = [1.0 if bits[a] else -1.0 for a in range(3)]
        slopes = [
            inside * signs[0] * parts[1] * parts[2],
            inside * signs[1] * parts[0] * parts[2],
            inside * signs[2] * parts[0] * parts[1],
        ]
        yield flat, inside * parts[0] * parts[1] * parts[2], slopes


def forward(volume: Tensor, rows: DeviceRows) -> Tensor:
    """Volume (X, Y, Z) to predicted rows (N,)."""
    flat, out = volume.reshape(-1), torch.empty(len(rows.index), device=volume.device)

    def work(most: int) -> None:
        for part, points in rows.chunks(most):
            values = torch.zeros(points.shape[:2], device=volume.device)
            for where, weight, _ in _corners(points, tuple(volume.shape)):
                values += weight * flat[where]
            out[part] = values @ rows.weights

    rows.pieces.run(CHUNK, work)
    return out


def adjoint(values: Tensor, rows: DeviceRows, shape: tuple[int, ...]) -> Tensor:
    """Rows (N,) to volume (X, Y, Z), the exact adjoint of :func:`forward`."""
    out = torch.zeros(int(np.prod(shape)), device=values.device)

    def work(most: int) -> None:
        out.zero_()
        for part, points in rows.chunks(most):
            spread = values[part][:, None] * rows.weights
            for where, weight, _ in _corners(points, shape):
                out.index_add_(0, where.reshape(-1), (weight * spread).reshape(-1))

    rows.pieces.run(CHUNK, work)
    return out.reshape(shape)


def derivatives(
    volume: Tensor, rows: DeviceRows, affine: NDArray[np.float64], pivot: NDArray[np.float64]
) -> Tensor:
    """(N, 7): by rotation about ``pivot`` (voxel indices; per rad, world axes), shift (per mm)
    and relative width of the profile; a tap whose cell is not wholly inside counts as 0."""
    device = volume.device
    flat, out = volume.reshape(-1), torch.empty(len(rows.index), 7, device=device)
    matrix = torch.from_numpy(np.array(affine[:3, :3])).float().to(device)
    inverse = torch.linalg.inv(matrix)
    middle = torch.from_numpy(np.array(pivot)).float().to(device)
    last = torch.tensor(volume.shape, device=device) - 1

    def work(most: int) -> None:
        for part, points in rows.chunks(most):
            slope = torch.zeros_like(points)
            for where, _, slopes in _corners(points, tuple(volume.shape)):
                slope += torch.stack(slopes, dim=-1) * flat[where][..., None]
            whole = ((points >= 0) & (points < last)).all(-1)
            slope = slope * (whole * rows.weights)[..., None]
            world = slope @ inverse
            arm = (points - middle) @ matrix.T
            out[part, :3] = torch.linalg.cross(arm, world).sum(1)
            out[part, 3:6] = world.sum(1)
            out[part, 6] = (slope * rows.through[rows.slices[part]]).sum((1, 2))

    rows.pieces.run(CHUNK, work)
    return out
