# SPDX-License-Identifier: Apache-2.0
"""Image and acquisition together: poses of stacks or slices, gain, bias, width of the profile.

Each round linearises what is free about the present volume,

    r_s  ~  y_s - G_s A_s x - D_s theta_s,

solves for the image with theta eliminated (variable projection, Golub and Pereyra 1973: the
residuals count by M = W - W D H^-1 D^T W with H = D^T W D + L), then takes the step theta that
the remaining residual asks for.  L is the prior of the slices' path (:mod:`.trajectory`) and of the
bias: a polynomial that little of the head holds would run away and shade all of it.

Gauge: the reference stack's pose, gain and bias stay fixed while the others move (its step of the
gain is taken by the image), and the mean motion of its slices is 0; in the end the shading is
shared out (:func:`share_shading`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .acquisition import Receiver, StackModel
from .geometry import RigidTransform
from .linear import Metric, Prior, System, solve
from .trajectory import MISFIT, Path

LEVER = 50.0  # mm from the pivot at which a rotation's size is measured
LARGEST = 5.0  # mm: a linearisation holds for about a voxel, so a step goes no further
WIDTHS = (0.25, 1.7)  # bounds of the width of the profile over the assumed one
DISTRUSTED = 0.9  # weight of a slice below which it has no say in where others were
BELIEVABLE = 8.0  # standard deviations of the walk that a distrusted slice may be off its mean
DIMMED = 0.6  # of a slice's brightness: it was dropped if less is left
LITTLE = 0.1  # of the largest slice's voxels: a slice with less may go astray
BENDS = 0.3  # standard deviation of a coefficient of the bias
ALIKE = 100.0  # residuals that count as one where they speak of the bias: they are alike in regions
RIDGE = 1e-7  # of each unknown's own curvature: keeps H invertible


@dataclass(frozen=True)
class Freedom:
    """What of the acquisition is refined beside the image.

    ``paths``: per stack the prior of its slices' motion, where slices move one by one;
    ``gains``: these have gains, too, taken between the rounds (:func:`.robust.slice_gains`).
    """

    receiver: bool = True
    width: bool = False
    paths: Sequence[Path] | None = None
    gains: bool = False


class _Linearised:
    """D, H and L theta_0 of one stack about a volume."""

    def __init__(self, system: System, s: int, volume: Tensor, weight: Tensor, free: Freedom):
        model, receiver = system.models[s], system.receivers[s]
        self.model, self.weight = model, weight
        self.trust = system.slice_weights[s]
        self.whole = (system.confidence[s] * model.counts).to(model.device)
        self.path = free.paths[s] if free.paths else None
        factor = receiver.rows(model)
        columns: list[Tensor] = []
        self.names: list[tuple[str, int]] = []
        moving = free.width or s != system.reference or self.path is not None
        self.bias, self.stiffness = receiver.bias, 0.0
        found: Tensor | None = None
        if moving:
            found = model.derivatives(volume) * factor[:, None]
        self.local: Tensor | None = None
        if found is not None and self.path is not None:
            self.local = found[:, :6].contiguous()
        if found is not None and self.path is None and s != system.reference:
            self._add("pose", found[:, :6], columns)
        if free.receiver and s != system.reference:
            predicted = (factor * model.forward(volume))[:, None]
            residual = model.values - predicted[:, 0]
            self.stiffness = float((weight * residual**2).mean()) * ALIKE / BENDS**2
            terms = Receiver.terms(model.voxels).to(model.device)
            self._add("gain", predicted, columns)
            self._add("bias", predicted * terms, columns)
        if free.width and found is not None:
            self._add("width", found[:, 6:7] * model.width, columns)
        rows = len(model.values)
        empty = torch.zeros((rows, 0), device=model.device)
        self.shared = torch.cat(columns, dim=1) if columns else empty
        self.curvature()

    def _add(self, name: str, columns: Tensor, into: list[Tensor]) -> None:
        into.append(columns)
        self.names.append((name, columns.shape[1]))

    @property
    def free(self) -> bool:
        """Whether anything of the stack is refined."""
        return self.local is not None or self.shared.shape[1] > 0

    def curvature(self) -> None:
        """H^-1 and L theta_0; the slices' unknowns come first, six a slice."""
        model, m = self.model, self.shared.shape[1]
        slices = 6 * model.slices if self.local is not None else 0
        full = np.zeros((slices + m, slices + m))
        self.pull = np.zeros(slices + m)
        self.blocks = np.zeros((model.slices, 6, 6))
        columns = self.shared if self.local is None else torch.cat([self.local, self.shared], 1)
        for k in range(model.slices):  # products of a slice in float32, their sum in float64
            part = slice(int(model.starts[k]), int(model.starts[k + 1]))
            block = columns[part]
            own = (block.T @ (self.weight[part, None] * block)).double().cpu().numpy()
            inner = own.shape[0] - m
            full[slices:, slices:] += own[inner:, inner:]
            if inner:
                at = slice(6 * k, 6 * k + 6)
                full[at, at] = self.blocks[k] = own[:6, :6]
                full[at, slices:], full[slices:, at] = own[:6, 6:], own[6:, :6]
        if self.local is not None and self.path is not None:
            prior = self.path.precision()
            full[:slices, :slices] += prior
            self.pull[:slices] = prior @ self.path.motion.ravel()
        first = slices
        for name, count in self.names:
            if name == "bias":
                own = np.arange(first, first + count)
                full[own, own] += self.stiffness
                self.pull[own] = self.stiffness * self.bias
            first += count
        size = np.sqrt(np.maximum(np.diag(full), 1e-12))
        scaled = full / size[:, None] / size[None, :] + RIDGE * np.eye(len(full))
        self.inverse = np.linalg.inv(scaled) / size[:, None] / size[None, :]

    def project(self, values: Tensor) -> NDArray[np.float64]:
        """D^T values, float64."""
        shared = (self.shared.T @ values).double().cpu().numpy()
        if self.local is None:
            return np.asarray(shared)
        starts = self.model.starts
        parts = [
            self.local[starts[k] : starts[k + 1]].T @ values[starts[k] : starts[k + 1]]
            for k in range(self.model.slices)
        ]
        return np.concatenate([torch.cat(parts).double().cpu().numpy(), shared])

    def expand(self, theta: NDArray[np.float64]) -> Tensor:
        """D theta."""
        device, model = self.weight.device, self.model
        numbers = torch.from_numpy(theta).float().to(device)
        slices = 6 * model.slices if self.local is not None else 0
        out = self.shared @ numbers[slices:]
        if self.local is not None:
            each = numbers[:slices].reshape(-1, 6)
            for k in range(model.slices):
                part = slice(int(model.starts[k]), int(model.starts[k + 1]))
                out[part] += self.local[part] @ each[k]
        return out

    def metric(self) -> Metric:
        """The residuals' metric with theta eliminated."""
        if not self.free:
            return Metric(lambda r: self.weight * r)

        def apply(residual: Tensor) -> Tensor:
            weighted = self.weight * residual
            theta = self.inverse @ self.project(weighted)
            return weighted - self.weight * self.expand(theta)

        return Metric(apply, self.weight * self.expand(self.inverse @ self.pull))

    def step(self, residual: Tensor) -> NDArray[np.float64]:
        """theta for a residual; the order of acquisition is chosen for the next round."""
        asked = self.project(self.weight * residual)
        if self.path is not None:
            self.path.choose(self.blocks, asked[: 6 * self.model.slices])
        theta = np.asarray(self.inverse @ (asked - self.pull))
        self._keep(theta, residual)
        return theta

    def _keep(self, theta: NDArray[np.float64], residual: Tensor) -> None:
        """Put the steps of slices that may go astray into ``theta``, kept near the walk.

        A bad image, or one with next to no head in it, fits best where there is nothing to see:
        a distrusted slice takes a step of its own, but goes no further than ``BELIEVABLE`` from
        the walk's mean between the others; one that shows little goes no further than
        ``LARGEST``; else to that mean.
        """
        if self.path is None:
            return
        prior = self.path.precision(gauge=False)
        pull = prior @ self.path.motion.ravel()
        distrusted = self.trust < DISTRUSTED
        for k in np.flatnonzero(distrusted | shows_little(self.model)):
            at = slice(6 * int(k), 6 * int(k) + 6)
            own = prior[at, at]
            if distrusted[k]:
                theta[at] = self._alone(int(k), residual, own, pull[at])
            home = -np.linalg.solve(own, pull[at])
            away = theta[at] - home
            unlikely = away @ own @ away > self.path.noise * MISFIT * BELIEVABLE**2
            if unlikely if distrusted[k] else float(sizes(away[None])[0]) > LARGEST:
                theta[at] = home

    def _alone(
        self, k: int, residual: Tensor, prior: NDArray[np.float64], pull: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(6,) step of a distrusted slice: as if it were sound, with the others where they are.

        It may only lie wrong; where that is so it comes to fit, and counts again.  ``prior``
        (6, 6) is the slice's own block of the walk's precision L, ``pull`` (6,) its part of
        L theta_0.
        """
        if self.local is None:
            return np.zeros(6)
        part = slice(int(self.model.starts[k]), int(self.model.starts[k + 1]))
        whole, acquired = self.whole[part], self.model.values[part]
        predicted = acquired - residual[part]
        left = brightness_left(whole, acquired, predicted)
        columns = left * self.local[part]
        own = (columns.T @ (whole[:, None] * columns)).double().cpu().numpy()
        asked = (columns.T @ (whole * (acquired - left * predicted))).double().cpu().numpy()
        step = np.linalg.solve(own + prior, asked - pull)
        return np.asarray(step)


def brightness_left(weight: Tensor, acquired: Tensor, predicted: Tensor) -> float:
    """What is left of a slice's brightness: the factor at which the prediction of its rows fits
    best what was acquired, where that is below ``DIMMED``, else 1.

    With it free, a slice that was dropped is brought to the image by its structure; without, it
    goes to where the head is as dark.
    """
    weighted = (weight * predicted).double()
    seen = float((weighted * predicted).sum())
    factor = max(float((weighted * acquired).sum()) / seen, 0.0) if seen > 0 else 1.0
    return factor if factor < DIMMED else 1.0


def shows_little(model: StackModel) -> NDArray[np.bool_]:
    """(K,) slices with so few voxels that their poses mean little."""
    rows = np.diff(model.starts)
    return np.asarray(rows < LITTLE * rows.max())


def refine(
    system: System,
    start: Tensor,
    prior: Prior,
    freedom: Freedom,
    *,
    rounds: int,
    iterations: int,
    after: Callable[[System, list[Tensor]], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, list[float]]:
    """Image and acquisition by Gauss-Newton rounds; changes ``system`` in place.

    ``after`` sees the system and the residuals (before the step) of each round: robust weights.
    Returns the volume and the largest step of each round (mm, 50 mm from the centre).
    """
    volume, steps = start, []
    for turn in range(rounds):
        parts = [
            _Linearised(system, s, volume, weight, freedom)
            for s, weight in enumerate(system.weights())
        ]
        volume = solve(
            system,
            volume,
            prior,
            iterations=iterations,
            reweightings=1,
            metrics=[part.metric() for part in parts],
        )
        residuals = system.residuals(volume)
        sizes = [
            _take(system, s, part, part.step(r))
            for s, (part, r) in enumerate(zip(parts, residuals, strict=True))
            if part.free
        ]
        steps.append(max(sizes, default=0.0))
        if freedom.receiver:
            r = system.reference
            volume = _pinned(system, volume, residuals[r], parts[r].weight)
        if after:
            after(system, residuals)
        if progress:
            progress((turn + 1) / rounds)
    return volume, steps


def _pinned(system: System, volume: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Take the gain step that the reference asks for, by the image and the others' gains.

    The penalty likes a fainter image, and while the others' gains are free only the reference
    holds it up: without this they end too large, by 0.3 to 0.5 % at usual noise.
    """
    acquired = system.models[system.reference].values
    predicted = acquired - residual
    weighted = (weight * predicted).double()
    gain = float((weighted * acquired).sum() / (weighted * predicted).sum().clamp(min=1e-12))
    gain = float(np.clip(gain, 0.5, 2.0))
    system.receivers = [
        r if s == system.reference else replace(r, gain=r.gain / gain)
        for s, r in enumerate(system.receivers)
    ]
    return volume * gain


def _take(system: System, s: int, part: _Linearised, theta: NDArray[np.float64]) -> float:
    """Take the step of a stack; returns the largest motion in mm."""
    model, largest = system.models[s], 0.0
    poses, width = model.poses, model.width
    at = 0
    if part.local is not None and part.path is not None:
        each = np.stack([bounded(v) for v in theta[: 6 * model.slices].reshape(-1, 6)])
        moves = [RigidTransform.from_vector(v, model.pivot).matrix for v in each]
        poses = np.stack(moves) @ poses
        part.path.follow(poses, model.pivot)
        largest, at = float(sizes(each).max()), 6 * model.slices
    receiver = system.receivers[s]
    for name, count in part.names:
        values, at = theta[at : at + count], at + count
        if name == "pose":
            largest = float(sizes(values[None])[0])
            moved = RigidTransform.from_vector(bounded(values), model.pivot)
            poses = moved.matrix @ poses
        elif name == "gain":
            gain = receiver.gain * float(np.clip(1.0 + values[0], 0.5, 2.0))
            receiver = replace(receiver, gain=gain)
        elif name == "bias":
            receiver = replace(receiver, bias=np.clip(receiver.bias + values, -1.0, 1.0))
        elif name == "width":
            width = float(np.clip(width * (1.0 + np.clip(values[0], -0.2, 0.2)), *WIDTHS))
    system.receivers[s] = receiver
    model.set_poses(poses, width)
    return largest


def sizes(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) size of motions (K, 6) in mm."""
    return np.asarray(
        np.linalg.norm(vectors[:, :3], axis=1) * LEVER + np.linalg.norm(vectors[:, 3:], axis=1)
    )


def bounded(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """A motion (6,), or as much of it as is ``LARGEST``."""
    size = float(sizes(vector[None])[0])
    return vector if size <= LARGEST else vector * (LARGEST / size)


def share_shading(system: System, volume: Tensor) -> Tensor:
    """Make the geometric mean of the stacks' bias fields 1; returns the volume that goes with it.

    While the others were refined, the reference, without bias, held the head's shading.
    """
    mean = np.mean([r.bias for r in system.receivers], axis=0)
    system.receivers = [replace(r, bias=r.bias - mean) for r in system.receivers]
    grid = system.grid
    shading = Receiver(bias=mean).image(grid, RigidTransform(), grid.centre)
    return volume * torch.from_numpy(shading).to(volume.device)
