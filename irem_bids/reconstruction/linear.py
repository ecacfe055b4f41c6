# SPDX-License-Identifier: Apache-2.0
"""The profile-aware solution on a voxel grid: least squares with total variation.

    minimise over x   1/2 sum_s || y_s - G_s A_s x ||^2_{W_s} + lambda sum_v h(|grad x|_v)

A_s is the forward model of stack s (:mod:`.acquisition`), G_s its gain times its smooth bias
(:class:`Receiver`), W_s the weights of its rows, h the Huber-like sqrt(t^2 + delta^2).  Solved
by iteratively reweighted least squares with preconditioned conjugate gradients (Ebner et al.
2020 use the same terms).  Poses and receivers are refined in :mod:`.refine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .acquisition import Receiver, StackModel
from .geometry import Grid

PRECONDITION = 0.4  # of the mean squared row: stands for the diagonal of A^T A


@dataclass(frozen=True)
class Prior:
    """Strength of the edge-preserving penalty, in scaled intensity per voxel."""

    weight: float
    width: float

    def on_grid(self, factor: float) -> Prior:
        """The same penalty per volume on voxels ``factor`` times as large."""
        return Prior(self.weight * factor**2, self.width * factor)


@dataclass
class System:
    """The stacks' models with their receivers and weights.

    ``confidence``: per stack; ``slice_weights``: per stack (K,);
    ``domain``: (X, Y, Z) float, 1 where the volume may differ from 0.
    """

    models: list[StackModel]
    receivers: list[Receiver]
    confidence: list[float]
    slice_weights: list[NDArray[np.float64]]
    domain: Tensor
    reference: int

    @property
    def grid(self) -> Grid:
        """Of the volume."""
        return self.models[0].grid

    def factors(self) -> list[Tensor]:
        """Per stack (N,): gain times bias."""
        return [
            r.factors(m.voxels).to(m.device)
            for m, r in zip(self.models, self.receivers, strict=True)
        ]

    def weights(self) -> list[Tensor]:
        """Per stack (N,): confidence, weight of the slice, acquired voxels behind the row."""
        out = []
        rows = zip(self.models, self.confidence, self.slice_weights, strict=True)
        for model, confidence, slices in rows:
            each = torch.from_numpy(slices[model.slice_of_row]).float().to(model.device)
            out.append(confidence * each * model.counts)
        return out

    def residuals(self, volume: Tensor) -> list[Tensor]:
        """Per stack (N,): acquired minus predicted."""
        return [
            m.values - g * m.forward(volume)
            for m, g in zip(self.models, self.factors(), strict=True)
        ]


@dataclass(frozen=True)
class Metric:
    """How the residual r of a stack counts: 1/2 r^T M r - r^T offset, M symmetric, positive."""

    apply: Callable[[Tensor], Tensor]
    offset: Tensor | None = field(default=None)

    def target(self, values: Tensor) -> Tensor:
        """M values + offset."""
        image = self.apply(values)
        return image if self.offset is None else image + self.offset


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


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    inverse_diagonal: Tensor,
    iterations: int,
) -> Tensor:
    """Preconditioned CG on ``apply(x) = target`` from ``start``; stops at 1e-5 of the residual."""
    x = start.clone()
    residual = target - apply(x)
    z = inverse_diagonal * residual
    direction = z.clone()
    product = torch.sum(residual * z, dtype=torch.float64)
    limit = product * 1e-10
    for _ in range(iterations):
        image = apply(direction)
        curvature = torch.sum(direction * image, dtype=torch.float64)
        if curvature <= 0 or product <= limit:
            break
        step = (product / curvature).float()
        x += step * direction
        residual -= step * image
        z = inverse_diagonal * residual
        new = torch.sum(residual * z, dtype=torch.float64)
        direction = z + (new / product).float() * direction
        product = new
    return x


def solve(
    system: System,
    start: Tensor,
    prior: Prior,
    *,
    iterations: int,
    reweightings: int,
    metrics: Sequence[Metric] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The volume (X, Y, Z) that minimises the cost at fixed poses and receivers.

    ``metrics``: per stack, in place of its row weights (:mod:`.refine`).
    """
    domain = system.domain
    weights = system.weights()
    metrics = metrics or [Metric(lambda r, w=w: w * r) for w in weights]  # type: ignore[misc]
    parts = list(zip(system.models, system.factors(), metrics, strict=True))
    target, diagonal = torch.zeros_like(start), torch.zeros_like(start)
    for (model, factor, metric), weight in zip(parts, weights, strict=True):
        target += model.adjoint(factor * metric.target(model.values))
        diagonal += model.adjoint(weight * factor * factor) * _mean_weight(model)
    target *= domain
    volume = start
    per_round = max(1, iterations // reweightings)
    for turn in range(reweightings):
        edges = huber_weights(volume, prior.width) * prior.weight

        def normal(x: Tensor, edges: Tensor = edges) -> Tensor:
            out = penalty_gradient(x, edges)
            for model, factor, metric in parts:
                out += model.adjoint(factor * metric.apply(factor * model.forward(x)))
            return out.mul_(domain)

        scale = diagonal + 6 * edges
        inverse = torch.where(scale > 1e-6, 1 / scale.clamp_min(1e-6), torch.zeros_like(scale))
        volume = conjugate_gradients(normal, target, volume, inverse, per_round)
        if progress:
            progress((turn + 1) / reweightings)
    return volume


def _mean_weight(model: StackModel) -> float:
    """Mean weight of a row of A, estimated: coverage times it stands for diag(A^T A).

    A tap's weight spreads over eight neighbours, whose squares sum to 8/27 on average; taps
    that are about a voxel apart share neighbours along the normal.
    """
    taps = model.rows.weights
    return PRECONDITION * float((taps * taps).sum())


def slice_sums(model: StackModel, values: Tensor) -> Tensor:
    """(N, ...) rows to (K, ...) sums over each slice, float64 on the CPU."""
    out = torch.zeros((model.slices, *values.shape[1:]), dtype=torch.float64)
    starts = model.starts
    for k in range(model.slices):
        if starts[k + 1] > starts[k]:
            out[k] = values[starts[k] : starts[k + 1]].sum(0, dtype=torch.float64).cpu()
    return out
