# SPDX-License-Identifier: Apache-2.0
"""How slices move: a random walk in the order in which they were acquired."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .geometry import RigidTransform

MISFIT = 2.0  # residuals of neighbouring voxels are alike: each counts as half a sample
STEP = (0.5, 0.5)  # degrees and mm between slices that follow each other, at first
SMALLEST, LARGEST = 0.08, 2.0  # bounds of both
ANCHOR = 5.0  # degrees and mm: standard deviation of a slice's place about its stack's
GAUGE = 1e4  # strength, over the anchor's, that keeps the reference's mean motion at 0


def orders(slices: int, times: Sequence[float] | None = None) -> dict[str, NDArray[np.intp]]:
    """Candidates of the order of acquisition; one where ``SliceTiming`` (s) tells it."""
    if times is not None and len(times) == slices and np.ptp(times) > 0:
        return {"SliceTiming": np.argsort(times, kind="stable")}
    every = np.arange(slices)
    return {
        "sequential": every,
        "interleaved": np.concatenate([every[0::2], every[1::2]]),
        "interleaved, odd first": np.concatenate([every[1::2], every[0::2]]),
        "interleaved by 3": np.concatenate([every[0::3], every[1::3], every[2::3]]),
    }


@dataclass
class Path:
    """The slices' motion in one stack and its prior.

    Attributes
    ----------
    motion
        (K, 6) rotation vectors (rad) and translations (mm) about the stack's middle, of each
        slice relative to the pose that its stack had at first.
    candidates
        Name of an order of acquisition to the order; the smoothest is used.
    noise
        Variance of the residuals, scaled intensity squared.
    shares
        (K,) of the stack's foreground in each slice, sum 1; where given (of the reference), the
        mean motion is kept at 0.
    base
        The pose that the stack had at first.
    """

    motion: NDArray[np.float64]
    candidates: dict[str, NDArray[np.intp]]
    noise: float
    shares: NDArray[np.float64] | None = None
    base: RigidTransform = field(default_factory=RigidTransform)
    order: str = ""
    step: tuple[float, float] = STEP
    _scale: NDArray[np.float64] = field(
        default_factory=lambda: np.repeat([np.deg2rad(1.0), 1.0], 3), repr=False
    )

    def __post_init__(self) -> None:
        self.order = self.order or next(iter(self.candidates))

    def precision(self) -> NDArray[np.float64]:
        """(6K, 6K) L: of the walk's steps, the anchor and, of the reference, the gauge."""
        slices = len(self.motion)
        order = self.candidates[self.order]
        walk = np.zeros((slices, slices))
        for a, b in itertools.pairwise(order):
            walk[a, a] += 1
            walk[b, b] += 1
            walk[a, b] -= 1
            walk[b, a] -= 1
        per_step = 1 / (np.repeat(self.step, 3) * self._scale) ** 2
        per_slice = 1 / (ANCHOR * self._scale) ** 2
        total = np.kron(walk, np.diag(per_step)) + np.kron(np.eye(slices), np.diag(per_slice))
        if self.shares is not None:
            mean = slices * np.outer(self.shares, self.shares)
            total += GAUGE * np.kron(mean, np.diag(per_slice))
        return np.asarray(total * self.noise * MISFIT)

    def follow(self, poses: NDArray[np.float64], pivot: NDArray[np.float64]) -> None:
        """Take over the slices' poses (K, 4, 4); the motion is about ``pivot``."""
        back = self.base.inverse()
        self.motion = np.stack([(RigidTransform(p) @ back).to_vector(pivot) for p in poses])

    def adapt(self, noise: float) -> None:
        """Take the order in which the path is smoothest, and its steps' size."""
        self.noise = noise
        units = self.motion / self._scale
        lengths = {
            name: float(np.mean(np.diff(units[order], axis=0) ** 2))
            for name, order in self.candidates.items()
        }
        self.order = min(lengths, key=lambda name: lengths[name])
        steps = np.diff(units[self.candidates[self.order]], axis=0)
        # the median does not see the few slices that were damaged
        size = 1.4826 * np.median(np.abs(steps), axis=0)
        turn, shift = (float(np.sqrt(np.mean(part**2))) for part in (size[:3], size[3:]))
        self.step = (
            float(np.clip(turn, SMALLEST, LARGEST)),
            float(np.clip(shift, SMALLEST, LARGEST)),
        )
