# SPDX-License-Identifier: Apache-2.0
"""Slices that lie wrong, sought one by one.

A slice that does not fit may be bad, or may only lie where the Gauss-Newton rounds of
:mod:`.refine` do not bring it back from.  Here each is brought to an image of which it is hardly
part, from several places about where the walk of the others has it (:mod:`.trajectory`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .linear import Prior, System, slice_sums, solve
from .refine import (
    BELIEVABLE,
    DIMMED,
    DISTRUSTED,
    LARGEST,
    bounded,
    brightness_left,
    shows_little,
    sizes,
)
from .sharpening import sharpened
from .trajectory import MISFIT, Path

START_SHIFT, START_TURN = 3.0, 3.0  # mm and degrees from the walk at which a search begins, too
START_ROUNDS = 4  # Gauss-Newton rounds from each of these places
FEW = 4000  # rows of the largest slice that these rounds look at, or up to twice as many

Array = NDArray[np.float64]


def seek(
    system: System, volume: Tensor, paths: Sequence[Path], rounds: int
) -> list[tuple[Array, Array]]:
    """Bring distrusted slices to the volume (X, Y, Z) as it is, each by itself; changes poses
    and paths, no weights.

    A slice ends at the least cost (its squared residuals and the walk's prior) that Gauss-Newton
    rounds find, by some of its voxels from where it is, from where the walk has it, and from six
    shifts and six rotations about that; then, from the best of these, by all of them.

    Returns per stack (K,) the least costs, infinite of those that were not sought, and what is
    left of their brightness (:func:`.refine.brightness_left`).
    """
    found = []
    for s, (model, path) in enumerate(zip(system.models, paths, strict=True)):
        lost = system.slice_weights[s] < DISTRUSTED
        lost &= np.diff(model.starts) > 0
        costs, left = np.full(len(lost), np.inf), np.ones(len(lost))
        found.append((costs, left))
        if not lost.any():
            continue
        every = max(1, int(np.diff(model.starts).max()) // FEW)
        roughly = Search(system, s, volume, path, lost, every)
        roughly.descend(roughly.best, START_ROUNDS)
        for offset in _starts():
            roughly.descend(roughly.mean + offset, START_ROUNDS)
        search = Search(system, s, volume, path, lost)
        search.descend(search.best, 0)
        search.descend(roughly.best, rounds)
        path.motion[lost], costs[lost], left[lost] = search.best, search.least, search.left
        moved = np.where(lost[:, None, None], path.poses(path.motion, search.pivot), model.poses)
        model.set_poses(moved)
        path.follow(moved, model.pivot)
    return found


def _starts() -> Array:
    """(13, 6) the walk's mean itself, shifts and rotations along each axis, both ways."""
    size = np.repeat([np.deg2rad(START_TURN), START_SHIFT], 3)
    return np.concatenate([np.zeros((1, 6)), np.diag(size), -np.diag(size)])


class Search:
    """The lost slices (L of them) of one stack, by every ``every``-th of their rows.

    Attributes
    ----------
    mean, variance
        (L, 6) of the motion that the walk of the other slices expects.
    best, least, left
        (L, 6) motion of least cost so far, about ``pivot``; (L,) that cost, and what is left of the
        slice's brightness there (:func:`.refine.brightness_left`).
    """

    def __init__(
        self,
        system: System,
        s: int,
        volume: Tensor,
        path: Path,
        lost: NDArray[np.bool_],
        every: int = 1,
    ) -> None:
        whole, receiver = system.models[s], system.receivers[s]
        little = shows_little(whole)
        unknown = lost | little
        mean, variance = path.expected(unknown)
        among = lost[unknown]
        self.mean, self.variance = mean[among], variance[among]
        self.little = little[lost]
        self.path, self.lost, self.pivot = path, lost, whole.pivot
        self.volume = sharpened(volume, whole.sharpness)  # once for all
        self.model = whole.only(lost, every)
        self.rows = [
            slice(int(self.model.starts[k]), int(self.model.starts[k + 1]))
            for k in np.flatnonzero(lost)
        ]
        self.factor = receiver.rows(self.model)
        # a row stands for those up to the next, so that the walk's prior keeps its share
        self.weight = every * system.confidence[s] * self.model.counts
        self.best = path.motions(whole.poses, self.pivot)[lost]
        self.least = np.full(len(self.best), np.inf)
        self.left, self._left = np.ones((2, len(self.best)))

    def descend(self, motion: Array, rounds: int) -> None:
        """Gauss-Newton from ``motion`` (L, 6); :attr:`best` is the best place passed."""
        motion = self._believable(motion)
        for turn in range(rounds + 1):
            residual = self._place(motion)
            cost = self._cost(residual, motion)
            better = cost < self.least
            self.best = np.where(better[:, None], motion, self.best)
            self.left = np.where(better, self._left, self.left)
            self.least = np.where(better, cost, self.least)
            if turn < rounds:
                motion = self._believable(motion + self._steps(residual, motion))

    def _place(self, motion: Array) -> Tensor:
        every = self.path.motion.copy()
        every[self.lost] = motion
        self.model.set_poses(self.path.poses(every, self.pivot))
        self.model.pivot = self.pivot  # of the whole stack
        self.model.sharpness = np.zeros(3, np.float32)
        predicted = self.factor * self.model.forward(self.volume)
        for n, part in enumerate(self.rows):
            acquired = self.model.values[part]
            self._left[n] = brightness_left(self.weight[part], acquired, predicted[part])
            predicted[part] *= float(self._left[n])
        return self.model.values - predicted

    @property
    def _prior(self) -> Array:
        """(L, 6) curvature of the prior, in the units of the squared residuals."""
        return np.asarray(self.path.noise * MISFIT / self.variance)

    def _cost(self, residual: Tensor, motion: Array) -> Array:
        squares = slice_sums(self.model, self.weight * residual**2).numpy()[self.lost]
        return np.asarray(squares + (self._prior * (motion - self.mean) ** 2).sum(axis=1)) / 2

    def _steps(self, residual: Tensor, motion: Array) -> Array:
        """(L, 6) Gauss-Newton steps, bounded."""
        columns = self.model.derivatives(self.volume)[:, :6] * self.factor[:, None]
        weighted = self.weight * residual
        out = np.empty_like(motion)
        for n, (part, prior) in enumerate(zip(self.rows, self._prior, strict=True)):
            here = float(self._left[n]) * columns[part]
            own = (here.T @ (self.weight[part, None] * here)).double().cpu().numpy()
            asked = (here.T @ weighted[part]).double().cpu().numpy()
            pull = prior * (motion[n] - self.mean[n])
            out[n] = bounded(np.linalg.solve(own + np.diag(prior), asked - pull))
        return out

    def _believable(self, motion: Array) -> Array:
        """A bad image, or one with next to no head in it, fits best where there is nothing to
        see: a place too far from where the walk has the slice is not looked at."""
        away = motion - self.mean
        far = (away**2 / self.variance).sum(axis=1) > BELIEVABLE**2
        far |= self.little & (sizes(away) > LARGEST)
        return np.where(far[:, None], self.mean, motion)


def reattach(
    system: System,
    volume: Tensor,
    prior: Prior,
    paths: Sequence[Path],
    *,
    rounds: int,
    iterations: int,
) -> bool:
    """Seek slices that broke off the walk anew, from where it has them; whether any moved.

    Together they hold up an image that they fit, and with it each other's weights; so both
    places are judged by an image of which they are no part.  A slice that was dropped may have
    gone to where the head is dark; put back, it counts nothing.  Changes ``system`` in place.
    """
    suspects = [path.broken_off() for path in paths]
    if not any(bool(each.any()) for each in suspects):
        return False
    weights, poses = system.slice_weights, [model.poses for model in system.models]
    system.slice_weights = [
        np.where(each, 0.0, w) for each, w in zip(suspects, weights, strict=True)
    ]
    image = solve(system, volume, prior, iterations=iterations, reweightings=1)
    before = _costs(system, image, paths, suspects)
    for model, path, suspect in zip(system.models, paths, suspects, strict=True):
        little = shows_little(model)
        if suspect.any() and not (suspect | little).all():
            model.set_poses(path.bridged(suspect, model.pivot, little))
    moved = False
    rows = zip(system.models, paths, seek(system, image, paths, rounds), strict=True)
    for s, (model, path, (after, left)) in enumerate(rows):
        better = suspects[s] & (after < before[s])
        moved |= bool(better.any())
        model.set_poses(np.where(better[:, None, None], model.poses, poses[s]))
        path.follow(model.poses, model.pivot)
        counts = np.where(left < DIMMED, 0.0, 1.0)
        system.slice_weights[s] = np.where(better, counts, weights[s])
    return moved


def _costs(
    system: System, volume: Tensor, paths: Sequence[Path], suspects: Sequence[NDArray[np.bool_]]
) -> list[Array]:
    """Per stack (K,): what the suspects' present places cost, as :class:`Search` has it, but that
    none is too far from the walk: a head may have moved at once."""
    costs = []
    rows = zip(system.models, system.residuals(volume), paths, suspects, strict=True)
    for s, (model, residual, path, suspect) in enumerate(rows):
        squares = system.confidence[s] * slice_sums(model, model.counts * residual**2).numpy()
        unknown = suspect | shows_little(model)
        mean, variance = path.expected(unknown)
        away = np.zeros(model.slices)
        away[unknown] = ((path.motion[unknown] - mean) ** 2 / variance).sum(axis=1)
        costs.append((squares + path.noise * MISFIT * np.minimum(away, BELIEVABLE**2)) / 2)
    return costs
