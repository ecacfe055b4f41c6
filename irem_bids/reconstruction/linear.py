# SPDX-License-Identifier: Apache-2.0
"""The profile-aware solution on a voxel grid: least squares with total variation.

    minimise over x   1/2 sum_s || y_s - G_s A_s x ||^2_{W_s} + lambda sum_v h(|grad x|_v)

A_s is the forward model of stack s (:mod:`.acquisition`), G_s its gain times its smooth bias
(:class:`Receiver`), W_s the weights of its rows, h the Huber-like sqrt(t^2 + delta^2).  Solved
by iteratively reweighted least squares with preconditioned conjugate gradients (Ebner et al.
2020 use the same terms).  Poses and receivers are refined in :mod:`.refine`; the vector work
stands in :mod:`.solver_cpu` and :mod:`.solver_cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import solver_cpu, solver_cuda
from .acquisition import Receiver, StackModel
from .geometry import Grid

PRECONDITION = 0.4  # of the mean squared row: stands for the diagonal of A^T A
FIRM = 2.5  # times the penalty, where what it shrinks is restored


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
        """Per stack (N,): gain times bias, and the slice's gain."""
        return [r.rows(m) for m, r in zip(self.models, self.receivers, strict=True)]

    def weights(self) -> list[Tensor]:
        """Per stack (N,): confidence, weight of the slice, acquired voxels behind the row."""
        out = []
        rows = zip(self.models, self.confidence, self.slice_weights, strict=True)
        for model, confidence, slices in rows:
            each = torch.from_numpy(slices[model.slice_of_row]).float().to(model.device)
            out.append(confidence * each * model.counts)
        return out

    @property
    def kernels(self) -> ModuleType:
        """The solver's vector work on the models' device."""
        return solver_cpu if self.models[0].compiled else solver_cuda

    @cached_property
    def spans(self) -> Tensor:
        """The domain as the kernels take it."""
        found: Tensor = self.kernels.spans(self.domain)
        return found

    @cached_property
    def diagonal(self) -> Tensor:
        """(X, Y, Z) about that of A^T W A, with the weights at its first use; huge outside the
        domain.  It only preconditions, so that weights may change afterwards."""
        parts = self.empty_parts()
        for model, factor, weight in zip(self.models, self.factors(), self.weights(), strict=True):
            model.spread(_mean_weight(model) * weight * factor * factor, parts)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.masked_fill_(self.domain == 0, 1e30)

    def empty_parts(self) -> Tensor:
        """(P, X, Y, Z) zeros for :meth:`.StackModel.add_adjoint`."""
        return torch.zeros((self.models[0].parts, *self.grid.shape), device=self.domain.device)

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


class _Descent:
    """Preconditioned conjugate gradients on the system's normal equations.

    The gradient of the data's part is kept when the penalty's weights change, so that one
    iteration, the first of all included, costs one forward and one adjoint look-up a stack.
    """

    def __init__(
        self, system: System, start: Tensor, prior: Prior, metrics: Sequence[Metric]
    ) -> None:
        self.kernels, self.where, self.prior = system.kernels, system.spans, prior
        self.terms = list(zip(system.models, system.factors(), metrics, strict=True))
        self.diagonal, self.parts = system.diagonal, system.empty_parts()
        self.room = torch.empty_like(self.parts)  # memory that is new costs as much as its use
        self.volume = start.clone()
        self.edges, self.inverse = torch.empty_like(start), torch.zeros_like(start)
        self.residual, self.direction = torch.zeros_like(start), torch.zeros_like(start)
        for model, factor, metric in self.terms:
            rest = metric.target(model.values - factor * model.forward(start, self.room[0]))
            model.add_adjoint(-(factor * rest), self.parts, self.room)
        self._weigh()
        self.kernels.normal(self.volume, self.edges, self.parts, self.where)
        self.product = self._move(0.0, 1.0)

    def _weigh(self) -> None:
        penalty = (self.prior.weight, self.prior.width)
        given = (self.volume, self.diagonal, self.where, penalty)
        self.kernels.reweight(*given, self.edges, self.inverse)

    def _move(self, along: float, against: float) -> float:
        vectors = (self.volume, self.direction, self.residual, self.parts[0], self.inverse)
        product: float = self.kernels.descend(*vectors, self.where, (along, against))
        return product

    def reweight(self) -> None:
        """Take the penalty's weights about the present volume."""
        given = (self.volume, self.edges, self.parts, self.where)
        self.kernels.normal(*given)
        self._move(0.0, -1.0)
        self._weigh()
        self.kernels.normal(*given)
        self.product = self._move(0.0, 1.0)

    def run(self, iterations: int) -> None:
        """Iterations from the steepest descent on; stops at 1e-5 of the residual."""
        vectors = (self.direction, self.residual, self.inverse, self.where)
        self.kernels.turn(*vectors, 0.0)
        limit = self.product * 1e-10
        for _ in range(iterations):
            if self.product <= limit:
                break
            for model, factor, metric in self.terms:
                image = metric.apply(factor * model.forward(self.direction, self.room[0]))
                model.add_adjoint(factor * image, self.parts, self.room)
            curvature = self.kernels.normal(self.direction, self.edges, self.parts, self.where)
            if curvature <= 0:
                self.parts.zero_()
                break
            step, product = self.product / curvature, self.product
            self.product = self._move(step, step)
            self.kernels.turn(*vectors, self.product / product)


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
    if metrics is None:
        metrics = [Metric(lambda r, w=w: w * r) for w in system.weights()]  # type: ignore[misc]
    descent = _Descent(system, start, prior, metrics)
    for turn in range(reweightings):
        if turn:
            descent.reweight()
        descent.run(max(1, iterations // reweightings))
        if progress:
            progress((turn + 1) / reweightings)
    return descent.volume


def restored(
    system: System,
    start: Tensor,
    prior: Prior,
    *,
    iterations: int,
    reweightings: int,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """As :func:`solve`, with the contrast that the penalty took from small things given back.

    One Bregman iteration (Osher et al. 2005, Multiscale Model. Simul. 4:460): what a penalty
    ``FIRM`` times as strong leaves of the data, noise and what it shrank, is added to the data,
    and the same penalty solves again.  Noise has no edges and is taken away once more.  The
    iterations are shared between the two.
    """
    firm = replace(prior, weight=FIRM * prior.weight)
    first = iterations * 2 // 5
    shrunk = solve(system, start, firm, iterations=first, reweightings=max(1, reweightings // 2))
    metrics = [
        Metric(lambda r, w=w: w * r, offset=w * rest)  # type: ignore[misc]
        for w, rest in zip(system.weights(), system.residuals(shrunk), strict=True)
    ]
    return solve(
        system,
        shrunk,
        firm,
        iterations=iterations - first,
        reweightings=reweightings,
        metrics=metrics,
        progress=progress,
    )


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
