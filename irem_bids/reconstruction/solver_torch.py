# SPDX-License-Identifier: Apache-2.0
"""The solver's vector work in plain PyTorch: the oracle, and a GPU's path without our kernels.

Same arguments and results as :mod:`.solver_cpu`, with tensors on any device; what a GPU takes is
:mod:`.solver_cuda`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(domain: Tensor) -> Tensor:
    """Where the volume may differ from 0: here the domain itself, (X, Y, Z)."""
    return domain


def huber_weights(volume: Tensor, width: float) -> Tensor:
    """(X, Y, Z) 1 / sqrt(|forward difference|^2 + width^2)."""
    total = torch.full_like(volume, width**2)
    for axis in range(3):
        step = volume.diff(dim=axis)
        total.narrow(axis, 0, step.shape[axis]).add_(step * step)
    return total.rsqrt_()


def penalty_gradient(volume: Tensor, weights: Tensor) -> Tensor:
    """Gradient of 1/2 sum weights |forward difference|^2: a weighted negative Laplacian."""
    out = torch.zeros_like(volume)
    for axis in range(3):
        size = volume.shape[axis] - 1
        flow = volume.diff(dim=axis)
        flow *= weights.narrow(axis, 0, size)
        out.narrow(axis, 0, size).sub_(flow)
        out.narrow(axis, 1, size).add_(flow)
    return out


def reweight(
    volume: Tensor,
    diagonal: Tensor,
    where: Tensor,
    penalty: tuple[float, float],
    edges: Tensor,
    inverse: Tensor,
) -> None:
    """``edges``: the penalty's weights about ``volume``; ``inverse``: the preconditioner, 0
    outside the domain.  ``penalty``: its weight and its width."""
    edges.copy_(huber_weights(volume, penalty[1]) * penalty[0])
    scale = diagonal + 6 * edges
    inverse.copy_(where / scale.clamp_min(1e-6))


def normal(direction: Tensor, edges: Tensor, parts: Tensor, where: Tensor) -> float:
    """The sum of ``parts`` (P, X, Y, Z) and the penalty's gradient goes into the first of them,
    0 into the others; returns its product with ``direction``."""
    image = (parts.sum(0) + penalty_gradient(direction, edges)) * where
    parts.zero_()
    parts[0] = image
    return float(torch.sum(direction * image, dtype=torch.float64))


def descend(
    volume: Tensor,
    direction: Tensor,
    residual: Tensor,
    image: Tensor,
    inverse: Tensor,
    where: Tensor,
    steps: tuple[float, float],
) -> float:
    """``volume`` goes along ``direction`` and ``residual`` against ``image``, which becomes 0,
    by the two ``steps``; returns residual^T inverse residual."""
    volume += steps[0] * direction
    residual -= steps[1] * image
    image.zero_()
    return float(torch.sum(residual * residual * inverse, dtype=torch.float64))


def turn(direction: Tensor, residual: Tensor, inverse: Tensor, where: Tensor, share: float) -> None:
    """The next direction: the preconditioned residual and a ``share`` of the present one."""
    direction *= share
    direction += inverse * residual
