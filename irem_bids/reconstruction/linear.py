# SPDX-License-Identifier: Apache-2.0
"""The profile-aware solution on a voxel grid: least squares with total variation.

    minimise over x   1/2 sum_s c_s || y_s - G_s A_s x ||^2 + lambda sum_v h(|grad x|_v)

A_s is the forward model of stack s (:mod:`.acquisition`), G_s its gain times its smooth bias
(:class:`Receiver`), c_s the ratio of the mean noise
variance to the stack's, h the Huber-like sqrt(t^2 + delta^2).  Solved by iteratively
reweighted least squares with preconditioned conjugate gradients (Ebner et al. 2020 use the
same terms).  Poses and gains may be refined at the same time: see :func:`refine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .acquisition import Receiver, StackModel
from .geometry import RigidTransform

Projector = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prior:
    """Strength of the edge-preserving penalty, in scaled intensity per voxel."""

    weight: float
    width: float


@dataclass
class System:
    """The stacks' models with their poses, receivers and weights.

    ``domain``: (X, Y, Z) float, 1 where the volume may differ from 0.
    """

    models: list[StackModel]
    poses: list[RigidTransform]
    receivers: list[Receiver]
    confidence: list[float]
    domain: Tensor
    reference: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the volume."""
        return self.models[0].grid.shape

    def place(self) -> None:
        """Build the models' interpolation for the present poses."""
        for model, pose in zip(self.models, self.poses, strict=True):
            model.set_pose(pose)

    def factors(self) -> list[Tensor]:
        """Per stack (N,): gain times bias."""
        return [
            r.factors(m.voxels).to(m.device)
            for m, r in zip(self.models, self.receivers, strict=True)
        ]

    def residuals(self, volume: Tensor) -> list[Tensor]:
        """Per stack (N,): acquired minus predicted."""
        flat = volume.reshape(-1)
        return [
            m.values - g * m.forward(flat) for m, g in zip(self.models, self.factors(), strict=True)
        ]


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
    projectors: Sequence[Projector] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The volume (X, Y, Z) that minimises the cost at fixed poses and gains.

    ``projectors``: per stack a map of residuals that removes what pose and gain can explain.
    """
    shape, domain = system.shape, system.domain
    remove = projectors or [lambda r: r] * len(system.models)
    parts = list(zip(system.models, system.factors(), system.confidence, remove, strict=True))
    target = torch.stack([c * m.adjoint(g * p(m.values)) for m, g, c, p in parts]).sum(0)
    diagonal = torch.stack(
        [c * float((g * g).mean()) * m.coverage() * _mean_weight(m) for m, g, c, _ in parts]
    )
    diagonal = diagonal.sum(0).reshape(shape)
    target = target.reshape(shape) * domain
    volume = start
    per_round = max(1, iterations // reweightings)
    for turn in range(reweightings):
        weights = huber_weights(volume, prior.width) * prior.weight

        def normal(x: Tensor, weights: Tensor = weights) -> Tensor:
            flat = x.reshape(-1)
            data = torch.zeros_like(flat)
            for m, g, c, p in parts:
                data += c * m.adjoint(g * p(g * m.forward(flat)))
            return (data.reshape(shape) + penalty_gradient(x, weights)) * domain

        scale = diagonal + 6 * weights
        inverse = torch.where(scale > 1e-6, 1 / scale.clamp_min(1e-6), torch.zeros_like(scale))
        volume = conjugate_gradients(normal, target, volume, inverse, per_round)
        if progress:
            progress((turn + 1) / reweightings)
    return volume


def _mean_weight(model: StackModel) -> float:
    """Mean weight of a row of A: coverage times this estimates the diagonal of A^T A."""
    rows = model.profile.shape[0]
    squares = float(model.profile.squared_column_sums().sum()) / max(rows, 1)
    return 0.4 * squares


def refine(
    system: System,
    start: Tensor,
    prior: Prior,
    *,
    rounds: int,
    iterations: int,
    reweightings: int,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, list[float]]:
    """Image, poses, gains and bias together, by Gauss-Newton with the latter projected out.

    Each round linearises the receiver and pose of every stack but the reference about the
    present volume (columns D_s: six of the pose, one of the gain, nine of the bias), solves for
    the image with the data term projected onto the complement of D_s (variable projection),
    then takes the step that the remaining residual asks for.  The reference, which has no
    columns, holds the common motion, scale and shading meanwhile.  In the end the shading is
    shared out: the logarithms of the bias fields sum to 0 over the stacks.

    Changes ``system`` in place; returns the volume and the largest step of each round (mm).
    """
    volume, steps = start, []
    others = [s for s in range(len(system.models)) if s != system.reference]
    for turn in range(rounds):
        bases = {s: _basis(system, s, volume) for s in others}
        projectors: list[Projector] = [
            _complement(bases[s][0]) if s in bases else lambda residual: residual
            for s in range(len(system.models))
        ]
        volume = solve(
            system,
            volume,
            prior,
            iterations=iterations,
            reweightings=reweightings,
            projectors=projectors,
        )
        residuals = system.residuals(volume)
        steps.append(max(_step(system, s, bases[s], residuals[s]) for s in others))
        system.place()
        if progress:
            progress((turn + 1) / rounds)
    mean = np.mean([r.bias for r in system.receivers], axis=0)
    system.receivers = [replace(r, bias=r.bias - mean) for r in system.receivers]
    grid = system.models[0].grid
    shading = Receiver(bias=mean).image(grid, RigidTransform(), grid.centre)
    return volume * torch.from_numpy(shading).to(volume.device), steps


def _complement(orthonormal: Tensor) -> Projector:
    """The projection of residuals that removes the span of the columns (N, k)."""
    return lambda residual: residual - orthonormal @ (orthonormal.T @ residual)


def _basis(system: System, s: int, volume: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns of the derivatives of stack ``s``, and R^-1 of their QR."""
    model, flat = system.models[s], volume.reshape(-1)
    factor = system.receivers[s].factors(model.voxels).to(model.device)
    predicted = (factor * model.forward(flat))[:, None]
    terms = Receiver.terms(model.voxels).to(model.device)
    pose = factor[:, None] * model.pose_derivatives(flat)
    columns = torch.cat([pose, predicted, predicted * terms], dim=1)
    gram = (columns.T.double() @ columns.double()).cpu()
    size = gram.diagonal().sqrt().clamp_min(1e-12)
    identity = torch.eye(len(gram), dtype=torch.float64)
    lower = torch.linalg.cholesky(gram / size[:, None] / size[None, :] + 1e-7 * identity)
    inverse = (torch.linalg.inv(lower).T / size[:, None]).float().to(columns.device)
    return columns @ inverse, inverse


def _step(system: System, s: int, basis: tuple[Tensor, Tensor], residual: Tensor) -> float:
    """Take the step of a stack; returns the motion's size in mm at 50 mm from the centre."""
    orthonormal, inverse = basis
    step = (inverse @ (orthonormal.T @ residual)).double().cpu().numpy()
    receiver = system.receivers[s]
    bias = np.clip(receiver.bias + step[-receiver.bias.size :], -1.0, 1.0)
    size = float(np.linalg.norm(step[:3]) * 50.0 + np.linalg.norm(step[3:6]))
    if size > 5.0:  # a linearisation holds for about a voxel: go only part of the way
        step[:6] *= 5.0 / size
    motion = RigidTransform.from_vector(step[:6], system.models[s].pivot)
    system.poses[s] = motion @ system.poses[s]
    gain = receiver.gain * float(np.clip(1.0 + step[6], 0.5, 2.0))
    system.receivers[s] = replace(receiver, gain=gain, bias=bias)
    return size
