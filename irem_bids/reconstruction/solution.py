# SPDX-License-Identifier: Apache-2.0
"""The profile-aware solution of a set of stacks: coarse to fine.

This is ``srr``, and what ``irem`` stands on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, map_coordinates
from torch import Tensor

from ..settings import Settings
from . import trajectory
from .acquisition import Receiver, StackModel
from .geometry import Grid, RigidTransform
from .linear import FIRM, Prior, System, restored, slice_sums, solve
from .prepare import Prepared
from .refine import Freedom, refine, share_shading, shows_little
from .robust import slice_gains, slice_weights
from .search import reattach, seek
from .stack import Stack

Progress = Callable[[float, str], None]
STRENGTH = 0.08  # weight of total variation over the noise, both in scaled intensity
BARE = 0.155  # the same over the noise without texture, where that gives more
TEXTURE = 0.0205  # of what is measured as noise, scaled intensity
MASK_MARGIN = 4.0  # mm around a given mask that are trained on
LEVELS = (4.0, 2.0, 1.0)  # voxels of the solutions over the result's
DECIDE = 2.0  # level at which the kind of motion and whether to learn the width are chosen
BETTER = 0.85  # slices move if that brings the held-out error below this share
TRUER = 0.99  # the width of the profile is learned if that brings it below this share
CROSSED = 0.87  # cosine of the angle (30 degrees) from which slices see each other's profile
SLICE_ROUNDS = {4.0: 5, 2.0: 8, 1.0: 2}
ROUND_ITERATIONS = 5  # conjugate gradients of a round
TRIAL_ROUNDS = 2  # of those at the level where the motion is chosen, before it is
FINE_ROUNDS = 3  # of stack poses on the result's grid
WIDTH_ROUNDS = 3
SEEK_ROUNDS = 8  # of the slices that do not fit, each by itself
BAD = 0.5  # weight of a slice below which its pose is that between its neighbours in time
UNSEEN = 3e-3  # of a stack: a voxel of which no more is seen stays 0
CLOSED = 1.01  # spacing of slices over their thickness: they leave gaps if it is more
FAINT = 0.5  # of a stack: what is seen less is made anew before the last solution
ANEW = 2.0  # voxels of the grid on which it is, over the result's
WIDTH_SHARE = 0.05  # of the penalty, while the width of the profile is learned


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
                use = (distance <= MASK_MARGIN) & ~stack.empty
            rows.append(use & ~held)
        return rows


@dataclass
class State:
    """The acquisition as known so far, stack by stack.

    ``poses``: (K, 4, 4) per slice; ``slice_weights``: (K,); ``widths``: of the profile over
    the assumed one; ``paths``: where slices move one by one.
    """

    poses: list[NDArray[np.float64]]
    receivers: list[Receiver]
    slice_weights: list[NDArray[np.float64]]
    widths: list[float]
    paths: list[trajectory.Path] | None = None

    @classmethod
    def registered(cls, prepared: Prepared) -> State:
        """What registration left."""
        counts = [s.grid.shape[s.slice_axis] for s in prepared.stacks]
        return cls(
            [
                np.repeat(p.matrix[None], k, axis=0)
                for p, k in zip(prepared.poses, counts, strict=True)
            ],
            [Receiver()] * len(counts),
            [np.ones(k) for k in counts],
            [1.0] * len(counts),
        )

    @classmethod
    def of(cls, system: System, paths: list[trajectory.Path] | None) -> State:
        """What a system holds."""
        return cls(
            [m.poses for m in system.models],
            list(system.receivers),
            [np.array(w) for w in system.slice_weights],
            [m.width for m in system.models],
            paths,
        )

    def record(self) -> dict[str, Any]:
        """JSON-safe; :meth:`restored` reads it."""
        return {
            "poses": [p.tolist() for p in self.poses],
            "gains": [r.gain for r in self.receivers],
            "bias": [r.bias.tolist() for r in self.receivers],
            "slice_gains": [
                r.slices if r.slices is None else r.slices.tolist() for r in self.receivers
            ],
            "slice_weights": [w.tolist() for w in self.slice_weights],
            "widths": list(self.widths),
        }

    @classmethod
    def restored(cls, record: dict[str, Any]) -> State:
        """From :meth:`record`."""
        each = record.get("slice_gains") or [None] * len(record["gains"])
        rows = zip(record["gains"], record["bias"], each, strict=True)
        return cls(
            [np.array(p) for p in record["poses"]],
            [Receiver(g, np.array(b), None if k is None else np.array(k)) for g, b, k in rows],
            [np.array(w) for w in record["slice_weights"]],
            [float(w) for w in record["widths"]],
        )


@dataclass
class Linear:
    """The profile-aware solution: volume (X, Y, Z), the acquisition, and how it came about."""

    volume: Tensor
    state: State
    info: dict[str, Any] = field(default_factory=dict)


def binned(
    stack: Stack, use: NDArray[np.bool_], size: float
) -> tuple[Stack, NDArray[np.bool_], NDArray[np.float32]]:
    """The stack with in-plane voxels of about ``size`` mm: means over those in ``use``.

    Returns the stack, the voxels that hold any, and how many each holds; slices stay.
    """
    factors = [
        1 if a == stack.slice_axis else max(1, int(size / float(v) + 0.25))
        for a, v in enumerate(stack.grid.voxel_size)
    ]
    if max(factors) == 1:
        return stack, use, use.astype(np.float32)
    pads = [(0, -n % f) for n, f in zip(stack.grid.shape, factors, strict=True)]
    weight = np.pad(use, pads).astype(np.float32)
    total = np.pad(stack.data, pads) * weight
    shape = [n for size_, f in zip(weight.shape, factors, strict=True) for n in (size_ // f, f)]
    counts = weight.reshape(shape).sum(axis=(1, 3, 5))
    data = total.reshape(shape).sum(axis=(1, 3, 5)) / np.maximum(counts, 1)
    affine = np.array(stack.grid.affine)
    affine[:3, 3] = stack.grid.to_world((np.array(factors) - 1) / 2.0)
    affine[:3, :3] *= np.array(factors)
    grid = Grid(data.shape, affine)
    return replace(stack, data=data, mask=counts > 0, grid=grid), counts > 0, counts


def build_system(job: Job, grid: Grid, state: State) -> System:
    """The stacks' models on ``grid``, binned to its voxel.

    Voxels that no stack comes near stay as they are; where slices leave gaps, each slice stands
    for what lies half-way to its neighbours.
    """
    prepared, models = job.prepared, []
    rows = zip(prepared.stacks, job.uses, state.poses, state.widths, strict=True)
    for stack, use, poses, width in rows:
        small, where, counts = binned(stack, use, float(grid.voxel_size[0]))
        model = StackModel(small, where, grid, job.settings.acquisition, job.device, counts)
        model.set_poses(poses, width)
        models.append(model)
    noise = np.array([prepared.metrics["noise"][s.label] for s in prepared.stacks])
    variance = np.maximum(noise, 1e-4) ** 2
    confidence = np.clip(variance.mean() / variance, 0.25, 4.0)
    return System(
        models,
        list(state.receivers),
        [float(c) for c in confidence],
        [np.array(w) for w in state.slice_weights],
        (seen_by(job, models) > UNSEEN).float(),
        prepared.reference,
    )


def seen_by(job: Job, models: Sequence[StackModel]) -> Tensor:
    """(X, Y, Z) how many stacks see a voxel of the models' grid, by what slices hold of it.

    Where slices leave gaps, each counts as if it reached half-way to its neighbours.
    """
    grid, prepared = models[0].grid, job.prepared
    total = torch.zeros(grid.shape, device=job.device)
    rows = zip(models, prepared.stacks, job.uses, prepared.held_out, strict=True)
    for model, stack, use, held in rows:
        gaps = model.gap > 0 or model.apart > CLOSED
        whole = _without_gaps(job, grid, stack, use | held, model) if gaps else model
        parts = torch.zeros((whole.parts, *grid.shape), device=job.device)
        whole.spread(whole.counts, parts)
        total += parts.sum(0) * float(np.prod(stack.grid.voxel_size / grid.voxel_size))
    return total


def _without_gaps(
    job: Job, grid: Grid, stack: Stack, use: NDArray[np.bool_], model: StackModel
) -> StackModel:
    """The stack with slices as thick as they are apart."""
    small, where, counts = binned(stack, use, float(grid.voxel_size[0]))
    acquisition = job.settings.acquisition
    if acquisition.profile == "none" or acquisition.profile_file is not None:
        acquisition = replace(acquisition, profile="box", profile_file=None)
    thick = replace(small, slice_thickness=float(small.grid.voxel_size[small.slice_axis]))
    whole = StackModel(thick, where, grid, acquisition, job.device, counts)
    whole.set_poses(model.poses)
    return whole


class Prediction:
    """Chosen voxels of each stack, as acquired and as predicted, on any grid."""

    def __init__(self, job: Job, grid: Grid, state: State, uses: list[NDArray[np.bool_]]) -> None:
        self.models, self.factors = [], []
        rows = zip(
            job.prepared.stacks, uses, state.poses, state.widths, state.receivers, strict=True
        )
        for stack, use, poses, width, receiver in rows:
            model = StackModel(stack, use, grid, job.settings.acquisition, job.device)
            model.set_poses(poses, width)
            self.models.append(model)
            self.factors.append(receiver.rows(model))

    def residuals(self, volume: Tensor) -> list[Tensor]:
        """Per stack: acquired minus predicted, in the models' order of rows."""
        pairs = zip(self.models, self.factors, strict=True)
        return [m.values - g * m.forward(volume) for m, g in pairs]

    def error(self, volume: Tensor, slice_weights: Sequence[NDArray[np.float64]]) -> float:
        """Mean squared residual, each voxel counted as its slice; ``slice_weights``: (K,) each."""
        total, count = 0.0, 0.0
        rows = zip(self.models, self.residuals(volume), slice_weights, strict=True)
        for model, residual, weights in rows:
            each = torch.from_numpy(weights[model.slice_of_row]).to(residual.device)
            total += float((each * residual.double() ** 2).sum())
            count += float(each.sum())
        return total / max(count, 1.0)


def penalty_strength(
    prepared: Prepared, settings: Settings, voxel: float, *, denoised: bool
) -> Prior:
    """On voxels of ``voxel`` mm: the setting, or by the stacks' mean noise.

    In proportion to it, or, where that is more, to what it is without texture; the latter not
    for an image that is ``denoised`` by a network afterwards, which wants less.  That was chosen
    on voxels of the size that the stacks have in plane; on others it is the same penalty per
    volume.
    """
    weight, width = settings.srr.srr_lambda, settings.srr.srr_huber
    if weight is not None:
        return Prior(weight, width)
    noise = max(float(np.mean(list(prepared.metrics["noise"].values()))), 1e-3)
    acquired = min(min(stack.in_plane) for stack in prepared.stacks)
    strength = STRENGTH * noise
    if not denoised:
        strength = max(strength, BARE * float(np.sqrt(max(noise**2 - TEXTURE**2, 0.0))))
    return Prior(strength, width).on_grid(voxel / acquired)


def solve_linear(
    job: Job,
    *,
    refined: bool,
    progress: Progress,
    state: State | None = None,
    image: Callable[..., Tensor] = solve,
) -> Linear:
    """Coarse to fine; with ``refined``, the acquisition along with the image.

    ``state``: the acquisition at first; that of registration if not given.  ``image``: what
    makes the image in the end, :func:`.linear.solve` or, for the network, :func:`.linear.restored`.
    """
    start = state or State.registered(job.prepared)
    return _Solver(job, refined, progress, start, image).run()


class _Solver:
    """The levels of one solution."""

    def __init__(
        self,
        job: Job,
        refined: bool,
        progress: Progress,
        state: State,
        image: Callable[..., Tensor],
    ) -> None:
        self.job, self.refined, self.progress, self.image = job, refined, progress, image
        voxel, denoised = float(job.grid.voxel_size[0]), image is restored
        self.prior = penalty_strength(job.prepared, job.settings, voxel, denoised=denoised)
        self.state = state
        self.volume: Tensor | None = None
        self.grid = job.grid
        options = job.settings.irem
        self.motion = options.motion if refined else "stack"
        self.width = job.settings.acquisition.profile_width
        self.trial: tuple[State, Tensor, Grid] | None = None
        self.info: dict[str, Any] = {"penalty": asdict(self.prior), "pose_steps_mm": []}

    def run(self) -> Linear:
        """Every level, then the image at the acquisition that was found."""
        voxel, options = float(self.job.grid.voxel_size[0]), self.job.settings.srr
        levels = LEVELS if self.refined else LEVELS[1:]
        for number, level in enumerate(levels):
            grid = self.job.grid if level == 1 else self.job.grid.resampled(level * voxel)
            self._enter(grid)
            system, prior = build_system(self.job, grid, self.state), self.prior.on_grid(level)
            if level > 1:  # at the last level the rounds, or the image itself, begin at once
                start = self.volume
                if start is None:
                    start = torch.zeros(grid.shape, device=self.job.device)
                self.volume = solve(system, start, prior, iterations=20, reweightings=2)
            if self.refined:
                system = self._refine(system, prior, level)
            self.state = State.of(system, self.state.paths)
            self.progress(0.6 * (number + 1) / len(levels), f"level {number + 1} of {len(levels)}")
        # the rounds on this grid have already done most of the work
        iterations = options.srr_iterations // 2 if self.refined else options.srr_iterations
        self.volume = self.image(
            system,
            self._settled(system, prior),
            prior,
            iterations=max(iterations, options.srr_reweightings),
            reweightings=options.srr_reweightings,
            progress=lambda f: self.progress(0.6 + 0.4 * f, "image"),
        )
        if self.refined:
            self.volume = share_shading(system, self._volume)
            self.state = State.of(system, self.state.paths)
            self.info |= {"motion": self.motion, "width": self.width}
        return Linear(self._volume, self.state, self.info)

    def _settled(self, system: System, prior: Prior) -> Tensor:
        """The volume to begin the last solution with.

        What only the tails of slices see may hold what was left unexplained before the
        acquisition was found, and no later iteration would take it back; so it is made anew, on
        a coarse grid, where that is quick.
        """
        if not self.refined:
            return self._volume
        job, grid = self.job, self.grid.resampled(ANEW * float(self.grid.voxel_size[0]))
        coarse = build_system(job, grid, State.of(system, None))
        start = torch.zeros(grid.shape, device=job.device)
        firm = replace(prior, weight=FIRM * prior.weight).on_grid(ANEW)
        anew = solve(coarse, start, firm, iterations=20, reweightings=2)
        known = (seen_by(job, system.models) / FAINT).clamp(max=1)
        return carry(anew, grid, self.grid).lerp(self._volume, known)

    @property
    def _volume(self) -> Tensor:
        if self.volume is None:
            raise RuntimeError("no level was solved yet")
        return self.volume

    def _enter(self, grid: Grid) -> None:
        """Carry the volume to the next level's grid."""
        if self.volume is not None:
            self.volume = carry(self.volume, self.grid, grid)
        self.grid = grid

    def _refine(self, system: System, prior: Prior, level: float) -> System:
        """Rounds of one level; at the second the kind of motion is chosen.

        Until then both kinds go on side by side: a slice that moved far is found on the
        coarsest grid, where the image is smooth.
        """
        free = Freedom(paths=self.state.paths)
        if level < DECIDE and self.width == "learned":
            self._learn(system, prior, self.state.paths)
        if self.motion == "slice" and self.state.paths:
            self._rounds(system, prior, free, SLICE_ROUNDS[level])
        else:
            rounds = self.job.settings.irem.pose_rounds if level > 1 else FINE_ROUNDS
            self._rounds(system, prior, free, rounds)
        if self.motion != "stack" and level >= DECIDE:
            system = self._slices(system, prior, level)
        if level == DECIDE:
            if self.width == "auto":
                self._choose_width(system, prior)
            if self.width == "learned":
                self._learn(system, prior, self.state.paths)
        return system

    def _learn(
        self,
        system: System,
        prior: Prior,
        paths: list[trajectory.Path] | None,
    ) -> None:
        """Rounds in which the width of the profile is free, too.

        A strong penalty blurs the image, which then asks for too narrow a profile.  But by the
        residuals of a light one, which fits its own slices closely, a slice that was left out
        seems bad; so other rounds follow.
        """
        light = replace(prior, weight=WIDTH_SHARE * prior.weight)
        self._rounds(system, light, Freedom(width=True, paths=paths), WIDTH_ROUNDS)

    def _choose_width(self, system: System, prior: Prior) -> None:
        """Learn the width of the profile if held-out voxels tell that the stated one is wrong.

        The same rounds are taken with and without it; nothing of either is kept.  The slices'
        weights stay as they are: one that is lost in one trial only costs more than a wrong width.
        Slices that all lie the same way see no other's profile, point samples have none, and a
        profile that was measured is known.
        """
        acquisition = self.job.settings.acquisition
        known = acquisition.profile == "none" or acquisition.profile_file is not None
        self.width = "stated"
        if known or not _crossed(system):
            return
        start, volume = State.of(system, self.state.paths), self._volume
        steps, errors = list(self.info["pose_steps_mm"]), {}
        light = replace(prior, weight=WIDTH_SHARE * prior.weight)
        for name in ("stated", "learned"):
            self.volume, paths = volume, deepcopy(start.paths)
            trial = build_system(self.job, self.grid, start)
            free = Freedom(width=name == "learned", paths=paths)
            self._advance(trial, light, free, WIDTH_ROUNDS)
            self._advance(trial, prior, Freedom(paths=paths), 1)
            errors[name] = self._held_out(State.of(trial, paths))
        self.info["held_out_by_width"] = errors
        if errors["learned"] < TRUER * errors["stated"]:
            self.width = "learned"
        self.volume, self.info["pose_steps_mm"] = volume, steps

    def _slices(self, system: System, prior: Prior, level: float) -> System:
        """Go on with slices that move one by one; at ``DECIDE``, see whether they do."""
        resting, volume = State.of(system, None), self._volume
        if self.trial is None:
            paths, moving = self._paths(system), system
        else:
            state, image, grid = self.trial
            paths = state.paths or []
            moving = build_system(self.job, self.grid, state)
            start = carry(image, grid, self.grid)
            self.volume = solve(moving, start, prior, iterations=10, reweightings=1)
        free = Freedom(paths=paths)
        if level > DECIDE:
            self._rounds(moving, prior, free, SLICE_ROUNDS[level])
            self.trial = (State.of(moving, paths), self._volume, self.grid)
        else:
            self._rounds(moving, prior, free, TRIAL_ROUNDS)
            errors = {"slice": self._held_out(State.of(moving, paths))}
            self.volume, image = volume, self._volume
            errors["stack"] = self._held_out(resting)
            self.info["held_out_by_motion"] = errors
            if self.motion == "slice" or errors["slice"] < BETTER * errors["stack"]:
                self.motion, self.volume = "slice", image
                # before, and where the result's grid asks for more, misfit would pass for them
                free = replace(free, gains=True)
                self._rounds(moving, prior, free, SLICE_ROUNDS[level] - TRIAL_ROUNDS)
                self.state = State.of(moving, paths)
                return moving
            self.motion = "stack"
        self.volume = volume
        return build_system(self.job, self.grid, resting) if moving is system else system

    def _rounds(self, system: System, prior: Prior, free: Freedom, rounds: int) -> None:
        after = self._after(free)

        def go(rounds: int) -> None:
            self._advance(system, prior, free, rounds, after)

        go(rounds)
        if free.paths:
            shares = {"rounds": SEEK_ROUNDS, "iterations": ROUND_ITERATIONS}
            coarse = self.grid != self.job.grid
            if coarse and reattach(system, self._volume, prior, free.paths, **shares):
                go(1)
            self._bridge(system, free.paths)
            lost = [weights < BAD for weights in system.slice_weights]
            seek(system, self._volume, free.paths, SEEK_ROUNDS)
            after(system, system.residuals(self._volume))
            pairs = zip(lost, system.slice_weights, strict=True)
            if any(bool((was & (weights >= BAD)).any()) for was, weights in pairs):
                go(1)  # an image of which they are part
            self._bridge(system, free.paths)

    def _advance(
        self,
        system: System,
        prior: Prior,
        free: Freedom,
        rounds: int,
        after: Callable[[System, list[Tensor]], None] | None = None,
    ) -> None:
        """Rounds that change the system and the volume."""
        self.volume, steps = refine(
            system,
            self._volume,
            prior,
            free,
            rounds=rounds,
            iterations=ROUND_ITERATIONS,
            after=after,
        )
        self.info["pose_steps_mm"] += steps

    @staticmethod
    def _bridge(system: System, paths: Sequence[trajectory.Path]) -> None:
        """Slices that do not fit go where the walk is between their neighbours in time."""
        for path, model, weights in zip(paths, system.models, system.slice_weights, strict=True):
            bad = weights < BAD
            little = shows_little(model)
            if bad.any() and not (bad | little).all():
                poses = path.bridged(bad, model.pivot, little)
                model.set_poses(np.where(bad[:, None, None], poses, model.poses))

    def _after(self, free: Freedom) -> Callable[[System, list[Tensor]], None]:
        def after(system: System, residuals: list[Tensor]) -> None:
            for s, (model, residual) in enumerate(zip(system.models, residuals, strict=True)):
                if self.job.settings.irem.robust:
                    system.slice_weights[s] = slice_weights(model, residual)
                if free.paths:
                    weights = system.slice_weights[s]
                    noise = _noise(model, residual, weights)
                    free.paths[s].adapt(noise)
                    if free.gains:
                        receiver = system.receivers[s]
                        gains = slice_gains(model, residual, noise, weights >= BAD, receiver.slices)
                        system.receivers[s] = replace(receiver, slices=gains)

        return after

    def _paths(self, system: System) -> list[trajectory.Path]:
        """Slices at rest, with the noise that the residuals show."""
        residuals = system.residuals(self._volume)
        stacks = self.job.prepared.stacks
        return [
            trajectory.Path(
                np.zeros((model.slices, 6)),
                trajectory.orders(model.slices, stack.slice_times),
                _noise(model, residual, system.slice_weights[s]),
                shares=_shares(model) if s == system.reference else None,
                base=RigidTransform(model.poses[0]),
            )
            for s, (stack, model, residual) in enumerate(
                zip(stacks, system.models, residuals, strict=True)
            )
        ]

    def _held_out(self, state: State) -> float:
        """Mean squared error of the held-out voxels, slices weighted as in the fit."""
        held = Prediction(self.job, self.grid, state, list(self.job.prepared.held_out))
        return held.error(self._volume, state.slice_weights)


def _crossed(system: System) -> bool:
    """Whether two of the stacks lie at an angle."""
    normals = [model.poses[0, :3, :3] @ model.normal for model in system.models]
    return any(abs(a @ b) < CROSSED for a, b in itertools.combinations(normals, 2))


def _noise(model: StackModel, residual: Tensor, weights: NDArray[np.float64]) -> float:
    """Variance of one acquired voxel's residual, over the sound slices."""
    sums = slice_sums(model, torch.stack([model.counts * residual**2, residual * 0 + 1], 1))
    total = weights @ sums.numpy()
    return max(float(total[0]) / max(float(total[1]), 1.0), 1e-8)


def _shares(model: StackModel) -> NDArray[np.float64]:
    """(K,) share of the acquired voxels in each slice."""
    counts = slice_sums(model, model.counts).numpy()
    return np.asarray(counts / counts.sum())


def carry(volume: Tensor, coarse: Grid, fine: Grid) -> Tensor:
    """A volume on another grid (trilinear; nearest beyond the edge), slab by slab."""
    data, out = volume.cpu().numpy(), np.empty(fine.shape, dtype=np.float32)
    matrix = np.linalg.inv(coarse.affine) @ fine.affine
    plane = np.indices((1, *fine.shape[1:])).reshape(3, -1)
    for x in range(fine.shape[0]):
        index = matrix[:3, :3] @ (plane + np.array([[x], [0], [0]])) + matrix[:3, 3:]
        slab = map_coordinates(data, index, order=1, mode="nearest", output=np.float32)
        out[x] = slab.reshape(fine.shape[1:])
    return torch.from_numpy(out).to(volume.device)
