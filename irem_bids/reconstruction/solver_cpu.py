# SPDX-License-Identifier: Apache-2.0
"""The solver's vector work on the CPU: one pass over memory a step, compiled when first used.

Only the domain is visited: per line of the volume the voxels from its first to its last one.
Sums run in the fixed blocks of :mod:`.operator_cpu`, so that they do not depend on the number
of threads.  The plain twin, and the oracle in the tests, is :mod:`.solver_torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .lattice import bounds
from .operator_cpu import BLOCKS, compiled, in_blocks

OUTSIDE = np.float32(1e20)  # of the diagonal where the volume stays as it is


def spans(domain: Tensor) -> Tensor:
    """(X, Y, 2) int64: first voxel of each line that may differ from 0, and one beyond the last."""
    return torch.from_numpy(bounds(domain.numpy() > 0))


@compiled
def _reweight(
    volume: Any, diagonal: Any, where: Any, weight: Any, square: Any, edges: Any, inverse: Any,
    ends: Any,
) -> None:  # fmt: skip
    nx, ny, nz = volume.shape
    for i in range(ends[0], ends[1]):
        for j in range(ny):
            # at the volume's end the difference is that of a line to itself, 0
            here, right = volume[i, j], volume[min(i + 1, nx - 1), j]
            below, out = volume[i, min(j + 1, ny - 1)], edges[i, j]
            for k in range(nz - 1):
                a, b, c = right[k] - here[k], below[k] - here[k], here[k + 1] - here[k]
                out[k] = weight / np.sqrt(square + a * a + b * b + c * c)
            k = nz - 1
            a, b = right[k] - here[k], below[k] - here[k]
            out[k] = weight / np.sqrt(square + a * a + b * b)
            low, high = where[i, j, 0], where[i, j, 1]
            each, own = inverse[i, j], diagonal[i, j]
            for k in range(low, high):
                scale = max(own[k] + np.float32(6) * out[k], np.float32(1e-6))
                each[k] = np.float32(1) / scale if scale < OUTSIDE else np.float32(0)


@compiled
def _normal(x: Any, edges: Any, parts: Any, where: Any, sums: Any, ends: Any) -> None:
    nx, ny, nz = x.shape
    total: Any = 0.0
    for i in range(ends[0], ends[1]):
        for j in range(ny):
            low, high = where[i, j, 0], where[i, j, 1]
            if low >= high:
                continue
            left, above = max(i - 1, 0), max(j - 1, 0)
            here, weight, out, other = x[i, j], edges[i, j], parts[0, i, j], parts[1, i, j]
            x0, w0, x1 = x[left, j], edges[left, j], x[min(i + 1, nx - 1), j]
            y0, v0, y1 = x[i, above], edges[i, above], x[i, min(j + 1, ny - 1)]
            for k in range(low, high):
                c = here[k]
                value = weight[k] * ((c - x1[k]) + (c - y1[k]))
                value += w0[k] * (c - x0[k]) + v0[k] * (c - y0[k])
                out[k] += other[k] + value
                other[k] = 0
            for k in range(max(low, 1), high):
                out[k] += weight[k - 1] * (here[k] - here[k - 1])
            for k in range(low, min(high, nz - 1)):
                out[k] += weight[k] * (here[k] - here[k + 1])
            line = np.float32(0)
            for k in range(low, high):
                line += here[k] * out[k]
            total += line
    sums[0] = total


@compiled
def _descend(
    volume: Any, direction: Any, residual: Any, image: Any, inverse: Any, where: Any, along: Any,
    against: Any, sums: Any, ends: Any,
) -> None:  # fmt: skip
    total: Any = 0.0
    for i in range(ends[0], ends[1]):
        for j in range(volume.shape[1]):
            low, high = where[i, j, 0], where[i, j, 1]
            x, d, r = volume[i, j], direction[i, j], residual[i, j]
            a, m, line = image[i, j], inverse[i, j], np.float32(0)
            for k in range(low, high):
                x[k] += along * d[k]
                r[k] -= against * a[k]
                a[k] = 0
                line += r[k] * r[k] * m[k]
            total += line
    sums[0] = total


@compiled
def _turn(direction: Any, residual: Any, inverse: Any, where: Any, share: Any, ends: Any) -> None:
    for i in range(ends[0], ends[1]):
        for j in range(direction.shape[1]):
            d, r, m = direction[i, j], residual[i, j], inverse[i, j]
            for k in range(where[i, j, 0], where[i, j, 1]):
                d[k] = m[k] * r[k] + share * d[k]


def _run(kernel: Callable[..., None], *given: Any) -> None:
    arrays = [g.numpy() if isinstance(g, Tensor) else g for g in given]
    in_blocks(len(arrays[0]), torch.get_num_threads(), lambda _, ends: kernel(*arrays, ends))


def _summed(kernel: Callable[..., None], *given: Any) -> float:
    arrays = [g.numpy() if isinstance(g, Tensor) else g for g in given]
    sums: NDArray[np.float64] = np.zeros((BLOCKS, 1))

    def work(block: int, ends: NDArray[np.int64]) -> None:
        kernel(*arrays, sums[block], ends)

    in_blocks(len(arrays[0]), torch.get_num_threads(), work)
    return float(sums.sum())


def reweight(
    volume: Tensor,
    diagonal: Tensor,
    where: Tensor,
    penalty: tuple[float, float],
    edges: Tensor,
    inverse: Tensor,
) -> None:
    """See :func:`.solver_torch.reweight`; ``inverse`` stays as it is outside the spans."""
    weight, square = np.float32(penalty[0]), np.float32(penalty[1] ** 2)
    _run(_reweight, volume, diagonal, where, weight, square, edges, inverse)


def normal(direction: Tensor, edges: Tensor, parts: Tensor, where: Tensor) -> float:
    """See :func:`.solver_torch.normal`."""
    return _summed(_normal, direction, edges, parts, where)


def descend(
    volume: Tensor,
    direction: Tensor,
    residual: Tensor,
    image: Tensor,
    inverse: Tensor,
    where: Tensor,
    steps: tuple[float, float],
) -> float:
    """See :func:`.solver_torch.descend`."""
    along, against = np.float32(steps[0]), np.float32(steps[1])
    arrays = (volume, direction, residual, image, inverse, where)
    return _summed(_descend, *arrays, along, against)


def turn(direction: Tensor, residual: Tensor, inverse: Tensor, where: Tensor, share: float) -> None:
    """See :func:`.solver_torch.turn`."""
    _run(_turn, direction, residual, inverse, where, np.float32(share))
