# SPDX-License-Identifier: Apache-2.0
"""The profile-aware solution of a set of stacks: coarse to fine.

This is ``srr``, and what ``irem`` stands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ..settings import Settings
from .acquisition import Receiver, StackModel, interpolation_matrix
from .geometry import Grid, RigidTransform
from .linear import Prior, System, refine, solve
from .prepare import Prepared
from .training import Progress

STRENGTH = 0.13  # weight of total variation over the noise, both in scaled intensity
MASK_MARGIN = 4.0  # mm around a given mask that are trained on
COARSE = 2.0  # voxel of the first, coarse solution over the result's


@dataclass(frozen=True)
class Job:
    """What every method gets."""

    prepared: Prepared
    grid: Grid
    settings: Settings
    device: str
    checkpoint: Path | None
    progress: Progress | None

    def tell(self, fraction: float, message: str) -> None:
        """Report progress, if anybody listens."""
        if self.progress:
            self.progress(fraction, message)

    def part(self, start: float, end: float, name: str) -> Progress:
        """Progress of a part of the job."""
        return lambda fraction, text: self.tell(start + (end - start) * fraction, f"{name}: {text}")

    @property
    def uses(self) -> list[np.ndarray]:
        """Per stack the voxels that are trained on.

        The foreground; 4 mm more where a brain mask was given, so that the brain's edge is
        seen from both sides.
        """
        rows = []
        for stack, held in zip(self.prepared.stacks, self.prepared.held_out, strict=True):
            use = stack.mask
            if self.prepared.metrics["masked"][stack.label] == "given":
                distance = distance_transform_edt(~use, sampling=stack.grid.voxel_size)
                use = distance <= MASK_MARGIN
            rows.append(use & ~held)
        return rows


@dataclass
class Linear:
    """The profile-aware solution: volume (X, Y, Z), and the system that it solves."""

    volume: Tensor
    system: System
    info: dict[str, Any]


def build_system(
    job: Job, grid: Grid, poses: list[RigidTransform], receivers: list[Receiver]
) -> System:
    """The stacks' linear models on ``grid``; voxels seen by no stack stay 0."""
    prepared, kind = job.prepared, job.settings.acquisition.profile
    models = [
        StackModel(stack, use, grid, kind, job.device)
        for stack, use in zip(prepared.stacks, job.uses, strict=True)
    ]
    noise = np.array([prepared.metrics["noise"][s.label] for s in prepared.stacks])
    variance = np.maximum(noise, 1e-4) ** 2
    confidence = np.clip(variance.mean() / variance, 0.25, 4.0)
    system = System(
        models,
        list(poses),
        list(receivers),
        [float(c) for c in confidence],
        torch.empty(0),
        prepared.reference,
    )
    system.place()
    seen = torch.stack([model.coverage() for model in models]).sum(0)
    system.domain = (seen > 1e-3).float().reshape(grid.shape)
    return system


class Prediction:
    """Chosen voxels of each stack, predicted with a system's poses and receivers."""

    def __init__(self, job: Job, system: System, uses: Sequence[NDArray[np.bool_]]) -> None:
        kind = job.settings.acquisition.profile
        rows = zip(job.prepared.stacks, uses, system.poses, strict=True)
        self.models, self.factors = [], []
        for (stack, use, pose), receiver in zip(rows, system.receivers, strict=True):
            model = StackModel(stack, use, job.grid, kind, job.device)
            model.set_pose(pose)
            self.models.append(model)
            self.factors.append(receiver.factors(model.voxels).to(job.device))

    def residuals(self, volume: Tensor) -> list[Tensor]:
        """Per stack: acquired minus predicted."""
        flat = volume.reshape(-1)
        pairs = zip(self.models, self.factors, strict=True)
        return [m.values - g * m.forward(flat) for m, g in pairs]


def penalty_strength(prepared: Prepared, settings: Settings) -> Prior:
    """The setting, or in proportion to the stacks' mean noise."""
    weight = settings.srr.srr_lambda
    if weight is None:
        noise = float(np.mean(list(prepared.metrics["noise"].values())))
        weight = STRENGTH * max(noise, 1e-3)
    return Prior(weight, settings.srr.srr_huber)


def solve_linear(job: Job, *, refined: bool, progress: Progress) -> Linear:
    """Coarse then fine; with ``refined``, poses and gains along with the image."""
    options, prior = job.settings.srr, penalty_strength(job.prepared, job.settings)
    coarse = job.grid.resampled(COARSE * float(job.grid.voxel_size[0]))
    system = build_system(
        job, coarse, list(job.prepared.poses), [Receiver()] * len(job.prepared.stacks)
    )
    start = torch.zeros(coarse.shape, device=job.device)
    volume = solve(system, start, prior, iterations=20, reweightings=2)
    progress(0.2, "coarse solution")
    steps: list[float] = []
    rounds = job.settings.irem.pose_rounds if refined else 0
    if rounds:
        volume, steps = refine(
            system,
            volume,
            prior,
            rounds=rounds,
            iterations=10,
            reweightings=1,
            progress=lambda f: progress(0.2 + 0.2 * f, "poses and gains"),
        )
    poses, receivers = system.poses, system.receivers
    del system
    volume = _carry(volume, coarse, job.grid)
    system = build_system(job, job.grid, poses, receivers)
    progress(0.5, "fine grid")
    if rounds:
        volume = solve(system, volume, prior, iterations=10, reweightings=1)
        volume, more = refine(system, volume, prior, rounds=2, iterations=8, reweightings=1)
        steps += more
    volume = solve(
        system,
        volume,
        prior,
        iterations=options.srr_iterations,
        reweightings=options.srr_reweightings,
        progress=lambda f: progress(0.6 + 0.4 * f, "fine solution"),
    )
    return Linear(volume, system, {"penalty": asdict(prior), "pose_steps_mm": steps})


def _carry(volume: Tensor, coarse: Grid, fine: Grid) -> Tensor:
    """A volume on a finer grid (trilinear), slab by slab."""
    flat, out = volume.reshape(-1).cpu().numpy(), np.empty(fine.shape, dtype=np.float32)
    plane = np.indices((1, *fine.shape[1:])).reshape(3, -1).T
    for x in range(fine.shape[0]):
        index = coarse.to_index(fine.to_world(plane + np.array([x, 0, 0])))
        index = np.clip(index, 0, np.array(coarse.shape) - 1.0001)
        out[x] = (interpolation_matrix(index, coarse.shape) @ flat).reshape(fine.shape[1:])
    return torch.from_numpy(out).to(volume.device)
