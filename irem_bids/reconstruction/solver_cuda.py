# SPDX-License-Identifier: Apache-2.0
"""The solver's vector work on a GPU, one pass over memory a step, by our own kernels.

Same arguments and results as :mod:`.solver_torch`, which takes over where there are none.  Sums
are torch's, always in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import solver_torch
from .cuda import kernels
from .solver_torch import spans, turn

__all__ = ["descend", "normal", "reweight", "spans", "turn"]


def reweight(
    volume: Tensor,
    diagonal: Tensor,
    where: Tensor,
    penalty: tuple[float, float],
    edges: Tensor,
    inverse: Tensor,
) -> None:
    """As :func:`.solver_torch.reweight`."""
    ours = kernels(volume.device)
    if ours is None:
        solver_torch.reweight(volume, diagonal, where, penalty, edges, inverse)
        return
    numbers = (float(penalty[0]), float(penalty[1]) ** 2)
    given = (volume, diagonal, where, *numbers, edges, inverse)
    ours.launch("voxels_reweight", volume.numel(), *given, *volume.shape)


def normal(direction: Tensor, edges: Tensor, parts: Tensor, where: Tensor) -> float:
    """As :func:`.solver_torch.normal`."""
    ours = kernels(direction.device)
    if ours is None or len(parts) > 1:
        return solver_torch.normal(direction, edges, parts, where)
    ours.launch(
        "voxels_normal", direction.numel(), direction, edges, where, parts[0], *direction.shape
    )
    return float(torch.sum(direction * parts[0], dtype=torch.float64))


def descend(
    volume: Tensor,
    direction: Tensor,
    residual: Tensor,
    image: Tensor,
    inverse: Tensor,
    where: Tensor,
    steps: tuple[float, float],
) -> float:
    """As :func:`.solver_torch.descend`."""
    ours = kernels(volume.device)
    vectors = (volume, direction, residual, image)
    if ours is None:
        return solver_torch.descend(*vectors, inverse, where, steps)
    numbers = (float(steps[0]), float(steps[1]))
    ours.launch("voxels_descend", volume.numel(), *vectors, *numbers, *volume.shape)
    return float(torch.sum(residual * residual * inverse, dtype=torch.float64))
