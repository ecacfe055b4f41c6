# SPDX-License-Identifier: Apache-2.0
"""How slices move: a random walk in the order in which they were acquired."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, solve_triangular

from .geometry import RigidTransform

MISFIT = 2.0  # residuals of neighbouring voxels are alike: each counts as half a sample
STEP = (0.5, 0.5)  # degrees and mm between slices that follow each other, at first
TRIALS = (0.15, 0.5, 1.5)  # degrees and mm: sizes of the steps at which orders are compared
SMALLEST, LARGEST = 0.08, 2.0  # bounds of both
ANCHOR = 5.0  # degrees and mm: standard deviation of a slice's place about its stack's
BREAK = 12.0  # squared size of a step, of six numbers in standard deviations, that is a break
TAIL = 1 / 8  # of a stack's slices: a piece between two breaks is suspected where it is shorter
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
        Name of an order of acquisition to the order; :meth:`choose` takes one.
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

    def _walk(self, name: str | None = None) -> NDArray[np.float64]:
        """(K, K) x^T walk x: the sum of squared steps in the order of acquisition."""
        order = self.candidates[name or self.order]
        walk = np.zeros((len(order), len(order)))
        for a, b in itertools.pairwise(order):
            walk[a, a] += 1
            walk[b, b] += 1
            walk[a, b] -= 1
            walk[b, a] -= 1
        return walk

    def precision(
        self,
        order: str | None = None,
        step: tuple[float, float] | None = None,
        *,
        gauge: bool = True,
    ) -> NDArray[np.float64]:
        """(6K, 6K) L: of the walk's steps, the anchor and, of the reference, the gauge.

        At another order of acquisition or another size of its steps, where given.  Without the
        ``gauge``, L also says where one slice is with the others where they are.
        """
        slices, walk = len(self.motion), self._walk(order)
        per_step = 1 / (np.repeat(step or self.step, 3) * self._scale) ** 2
        per_slice = 1 / (ANCHOR * self._scale) ** 2
        total = np.kron(walk, np.diag(per_step)) + np.kron(np.eye(slices), np.diag(per_slice))
        if gauge and self.shares is not None:
            mean = slices * np.outer(self.shares, self.shares)
            total += GAUGE * np.kron(mean, np.diag(per_slice))
        return np.asarray(total * self.noise * MISFIT)

    def follow(self, poses: NDArray[np.float64], pivot: NDArray[np.float64]) -> None:
        """Take over the slices' poses (K, 4, 4); the motion is about ``pivot``."""
        self.motion = self.motions(poses, pivot)

    def motions(
        self, poses: NDArray[np.float64], pivot: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(K, 6) motion about ``pivot`` of slices at ``poses`` (K, 4, 4)."""
        back = self.base.inverse()
        return np.stack([(RigidTransform(p) @ back).to_vector(pivot) for p in poses])

    def expected(
        self, unknown: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(U, 6) mean and variance of the motion of the ``unknown`` slices (K,), given the others':
        the prior's conditional ones, in the units of :attr:`motion`, one slice by itself."""
        walk, mean, variance = self._walk(), [], []
        for number, (size, unit) in enumerate(
            zip(np.repeat(self.step, 3), self._scale, strict=True)
        ):
            precision = walk / size**2 + np.eye(len(walk)) / ANCHOR**2
            own = np.linalg.inv(precision[np.ix_(unknown, unknown)])
            known = precision[np.ix_(unknown, ~unknown)] @ self.motion[~unknown, number]
            mean.append(-own @ known)
            variance.append(np.diag(own) * unit**2)
        return np.stack(mean, axis=1), np.stack(variance, axis=1)

    def bridged(
        self,
        distrusted: NDArray[np.bool_],
        pivot: NDArray[np.float64],
        ignored: NDArray[np.bool_] | bool = False,
    ) -> NDArray[np.float64]:
        """(K, 4, 4) poses of the slices, with those of the ``distrusted`` (K,) taken from the
        others: the mean of the walk between their neighbours in time (:meth:`expected`).  The
        ``ignored`` (K,) keep theirs without being asked.  The motion follows; it is about
        ``pivot``.
        """
        unknown = distrusted | ignored
        self.motion[distrusted] = self.expected(unknown)[0][distrusted[unknown]]
        return self.poses(self.motion, pivot)

    def poses(self, motion: NDArray[np.float64], pivot: NDArray[np.float64]) -> NDArray[np.float64]:
        """(K, 4, 4) poses of slices that have a ``motion`` (K, 6) about ``pivot``."""
        moves = [RigidTransform.from_vector(v, pivot) @ self.base for v in motion]
        return np.stack([move.matrix for move in moves])

    def broken_off(self) -> NDArray[np.bool_]:
        """(K,) slices of a short piece of the walk that a step far larger than the others parts
        from the rest: together they may have slipped to where they fit each other."""
        order = self.candidates[self.order]
        steps = np.diff((self.motion / self._scale)[order], axis=0)
        size = ((steps / np.repeat(self.step, 3)) ** 2).sum(axis=1)
        ends = np.concatenate([[0], 1 + np.flatnonzero(size > BREAK), [len(order)]])
        out = np.zeros(len(order), bool)
        for first, last in itertools.pairwise(ends):
            out[order[first:last]] = last - first <= TAIL * len(order)
        return out

    def choose(self, blocks: NDArray[np.float64], pull: NDArray[np.float64]) -> None:
        """Take the order of acquisition that the data make most likely, by its evidence.

        The present path was smoothed in the present order, which would confirm itself.  The
        data alone say 1/2 (m - m_0)^T B (m - m_0) - p^T (m - m_0) of a motion m, in units of
        the noise, about the present one: ``blocks`` B (K, 6, 6) and ``pull`` p (6K,).  With the
        prior m ~ N(0, L^-1) the evidence is 1/2 log |L| - 1/2 log |B + L| +
        1/2 b^T (B + L)^-1 b, with b = p + B m_0.
        """
        if len(self.candidates) < 2:
            return
        units = np.tile(self._scale, len(self.motion))  # to degrees and mm: better conditioned
        unit = self.noise * MISFIT * units[:, None] ** -1 * units[None, :] ** -1
        data = block_diag(*(blocks / (self.noise * MISFIT)))
        aim = (pull / (self.noise * MISFIT) + data @ self.motion.ravel()) * units
        data *= units[:, None] * units[None, :]
        found: dict[str, float] = {}
        for name in self.candidates:
            for size in TRIALS:
                prior = self.precision(name, (size, size)) / unit
                whole = np.linalg.cholesky(data + prior)
                half = solve_triangular(whole, aim, lower=True)
                spread = np.log(np.diag(np.linalg.cholesky(prior))).sum()
                evidence = spread - np.log(np.diag(whole)).sum() + half @ half / 2
                found[name] = max(found.get(name, -np.inf), float(evidence))
        self.order = max(found, key=lambda name: found[name])

    def adapt(self, noise: float) -> None:
        """Take the size of the path's steps in the order of acquisition."""
        self.noise = noise
        units = self.motion / self._scale
        steps = np.diff(units[self.candidates[self.order]], axis=0)
        # the median does not see the few slices that were damaged
        size = 1.4826 * np.median(np.abs(steps), axis=0)
        turn, shift = (float(np.sqrt(np.mean(part**2))) for part in (size[:3], size[3:]))
        self.step = (
            float(np.clip(turn, SMALLEST, LARGEST)),
            float(np.clip(shift, SMALLEST, LARGEST)),
        )
