# SPDX-License-Identifier: Apache-2.0
"""What linear interpolation blurs, undone on average.

Between voxels at distance f and 1 - f, linear interpolation is too high by f (1 - f) / 2 times
the second difference.  A stack that is turned against the volume's grid meets all f, so that its
predicted voxels come out blurred and the image that explains them too sharp.  Before a stack's
look-up the volume therefore loses half of the mean f (1 - f), axis by axis, times its second
difference.  Where the stack's voxels fall on the grid's, f is 0 and nothing happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cuda import kernels
from .operator_cpu import compiled, in_blocks

if TYPE_CHECKING:
    from .acquisition import Rows

ROWS = 4096  # of a stack that are looked at
LITTLE = 1e-3  # smaller amounts are left alone


def amounts(rows: Rows) -> NDArray[np.float32]:
    """(3,) half of the mean f (1 - f) over the taps, along each axis of the volume."""
    index = rows.index[:: max(1, len(rows.index) // ROWS)].astype(np.float64)
    if not len(index):
        return np.zeros(3, np.float32)
    which = index[:, rows.axis].astype(np.intp)
    maps = rows.maps[which]
    centres = np.einsum("nab,nb->na", maps[:, :, :3], index) + maps[:, :, 3]
    points = centres[:, None, :] + rows.steps[which]
    fraction = points - np.floor(points)
    mean = np.einsum("t,nta->a", rows.weights, fraction * (1 - fraction)) / len(index)
    half = np.maximum(mean / 2, 0)
    return np.where(half < LITTLE, 0, half).astype(np.float32)


@compiled
def _add(parts: Any, each: Any, out: Any, afresh: Any, ends: Any) -> None:
    """Add the sharpened sum of ``parts`` (P, X, Y, Z) to ``out`` (X, Y, Z), or to 0."""
    count, nx, ny, nz = parts.shape
    a, b, c = each[0], each[1], each[2]
    for i in range(ends[0], ends[1]):
        left, right = max(i - 1, 0), min(i + 1, nx - 1)
        for j in range(ny):
            above, below = max(j - 1, 0), min(j + 1, ny - 1)
            line = out[i, j]
            if afresh:
                line[:] = 0
            for p in range(count):
                here = parts[p, i, j]
                one, two = parts[p, left, j], parts[p, right, j]
                three, four = parts[p, i, above], parts[p, i, below]
                for k in range(nz):
                    twice = here[k] + here[k]
                    value = a * (twice - one[k] - two[k]) + b * (twice - three[k] - four[k])
                    line[k] += here[k] + value
                for k in range(1, nz - 1):
                    line[k] += c * (here[k] + here[k] - here[k - 1] - here[k + 1])
                line[0] += c * (here[0] - here[1])
                line[nz - 1] += c * (here[nz - 1] - here[nz - 2])


def add_sharpened(
    parts: Tensor, each: NDArray[np.float32], out: Tensor, *, afresh: bool = False
) -> None:
    """Add the sharpened sum of ``parts`` (P, X, Y, Z) to ``out`` (X, Y, Z): symmetric, so that
    it is its own adjoint; at the volume's ends the second difference is a first one.

    ``afresh``: what stood in ``out`` does not count.
    """
    if parts.device.type == "cpu" and min(parts.shape[1:]) > 1:
        given, total = parts.numpy(), out.numpy()
        threads = torch.get_num_threads()
        in_blocks(len(total), threads, lambda _, ends: _add(given, each, total, afresh, ends))
        return
    ours = kernels(parts.device)
    if ours is not None and len(parts) == 1:
        numbers = (*map(float, each), int(afresh))
        ours.launch("voxels_sharpen", out.numel(), parts, out, *numbers, *out.shape)
        return
    volume = parts.sum(0)
    if afresh:
        out.zero_()
    out += volume
    for axis in range(3):
        size = volume.shape[axis] - 1
        step = volume.diff(dim=axis) * float(each[axis])
        out.narrow(axis, 0, size).sub_(step)
        out.narrow(axis, 1, size).add_(step)


def sharpened(volume: Tensor, each: NDArray[np.float32], room: Tensor | None = None) -> Tensor:
    """The volume (X, Y, Z) less ``each`` (3,) times its second differences.

    ``room`` (X, Y, Z) may be written over.
    """
    if not each.any():
        return volume
    out = torch.empty_like(volume) if room is None else room
    add_sharpened(volume.contiguous()[None], each, out, afresh=True)
    return out
