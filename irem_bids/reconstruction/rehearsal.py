# SPDX-License-Identifier: Apache-2.0
"""A scan of which the truth is known: the linear solution, turned, is scanned and solved again.

What a solver loses of an image it is about to lose of any image like it.  So the linear solution
of a block of the head is turned as a whole, since structures that the stacks hold well then lie
where they hold badly; the same stacks are simulated from it, at the same poses, profiles and
noise; the same solver is run.  The difference teaches the network what is missing.  Nothing but
the subject's own stacks is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from .acquisition import Receiver, StackModel
from .consistency import unseen
from .geometry import Grid, mean_index
from .linear import Prior, System, restored, solve
from .solution import Job, Linear, State, build_system, carry
from .stack import Stack

EDGE = 72  # voxels of the block
BORDER = 8  # voxels at its faces that teach nothing: their slices reach beyond
FEWEST = 50  # voxels of each stack in it

#: Makes another image (X, Y, Z) from the linear solution, which it takes last.
Image = Callable[[Job, State, Tensor], Tensor]


@dataclass(frozen=True)
class Example:
    """What the solver made of an image (X, Y, Z), what it missed, and where that counts.

    ``unseen``: shape of a block to :func:`.consistency.unseen`.
    """

    solution: Tensor
    missing: Tensor
    mask: Tensor
    unseen: Callable[[tuple[int, int, int]], Tensor]

    @property
    def missed(self) -> Tensor:
        """(N,) what was missed where it counts."""
        return self.missing[self.mask]

    @property
    def error(self) -> float:
        """Mean square of what was missed, scaled intensity, where it counts."""
        return float((self.missed.double() ** 2).mean()) if self.mask.any() else 0.0

    def blended(self, other: Example, share: float) -> Example:
        """With so large a share of the other's solution."""
        solution = self.solution.lerp(other.solution, share)
        return replace(self, solution=solution, missing=self.missing.lerp(other.missing, share))


def rehearse(
    job: Job, linear: Linear, noise: Sequence[float], others: Sequence[Image] = ()
) -> list[Example]:
    """What the solver, and then each of ``others``, makes of the block in the middle of the head.

    ``noise``: standard deviation, per stack.  Empty where a stack has next to nothing in it.
    """
    block, turned, mask = _turned(job, linear.volume.cpu().numpy())
    stacks = []
    random = np.random.default_rng(job.settings.run.random_seed)
    for number, stack in enumerate(job.prepared.stacks):
        scan = _scanned(job, linear.state, number, block, turned)
        if scan is None:
            return []
        data = scan.data + np.float32(noise[number]) * random.standard_normal(
            scan.data.shape, dtype=np.float32
        )
        stacks.append(stack.with_data(np.where(scan.mask, data, 0), scan.mask))
    prepared = replace(
        job.prepared,
        stacks=tuple(stacks),
        held_out=tuple(
            held & s.mask for held, s in zip(job.prepared.held_out, stacks, strict=True)
        ),
        metrics={**job.prepared.metrics, "masked": {s.label: "block" for s in stacks}},
    )
    prior = Prior(linear.info["penalty"]["weight"], linear.info["penalty"]["width"])
    part = replace(job, prepared=prepared, grid=block, checkpoint=None, progress=None)
    system = build_system(part, block, _still(linear.state))
    solution = _solved(part, system, prior)
    truth = torch.from_numpy(np.ascontiguousarray(turned.image[::2, ::2, ::2])).to(job.device)
    counts = torch.from_numpy(mask).to(job.device)
    made = [solution, *(other(part, _still(linear.state), solution) for other in others)]
    return [Example(x, truth - x, counts, partial(unseen, system)) for x in made]


@dataclass(frozen=True)
class _Turned:
    """An image on half voxels of the block."""

    grid: Grid
    image: NDArray[np.float32]


def _turned(job: Job, volume: NDArray[np.float32]) -> tuple[Grid, _Turned, NDArray[np.bool_]]:
    """The block's grid, the turned image, and (X, Y, Z) where the block shows the head."""
    shape = np.array(volume.shape)
    inside = volume != 0
    middle = mean_index(inside)
    size = np.minimum(shape, EDGE)
    low = np.clip(np.rint(middle - (size - 1) / 2), 0, shape - size).astype(int)
    affine = np.array(job.grid.affine)
    affine[:3, 3] = job.grid.to_world(low)
    block = Grid(size, affine)
    half = affine.copy()
    half[:3, :3] /= 2
    fine = Grid(2 * size - 1, half)
    seed = np.random.default_rng(job.settings.run.random_seed)
    turn = Rotation.from_quat(seed.standard_normal(4)).as_matrix()
    # only what the block can show of the volume, for the sake of the spline's cost
    centre, reach = low + (size - 1) / 2, np.sqrt(3) * size.max() / 2 + 4
    first = np.clip(np.floor(centre - reach), 0, None).astype(int)
    part = tuple(slice(int(a), int(b)) for a, b in zip(first, centre + reach + 1, strict=True))
    coefficients = ndimage.spline_filter(volume[part], order=3, output=np.float32)
    image = np.empty(fine.shape, np.float32)
    plane = np.indices((1, *fine.shape[1:])).reshape(3, -1) / 2
    for x in range(fine.shape[0]):
        index = plane + np.array([[x / 2], [0], [0]]) - ((size - 1) / 2)[:, None]
        where = turn @ index + (centre - first)[:, None]
        image[x] = ndimage.map_coordinates(
            coefficients, where, order=3, prefilter=False, output=np.float32
        ).reshape(fine.shape[1:])
    index = np.indices(block.shape).reshape(3, -1) - ((size - 1) / 2)[:, None]
    where = np.rint(turn @ index + (centre - first)[:, None])
    shown = ndimage.map_coordinates(inside[part].astype(np.uint8), where, order=0)
    mask = (shown > 0).reshape(block.shape)
    border = np.minimum(BORDER, size // 6)
    for axis in range(3):
        edge = np.moveaxis(mask, axis, 0)
        edge[: border[axis]] = False
        edge[len(edge) - border[axis] :] = False
    return block, _Turned(fine, image), mask


def _scanned(job: Job, state: State, number: int, block: Grid, turned: _Turned) -> Stack | None:
    """The stack's voxels in the block, without noise; its mask says which."""
    stack = job.prepared.stacks[number]
    maps = np.linalg.inv(block.affine) @ state.poses[number] @ stack.grid.affine
    use = np.zeros(stack.grid.shape, bool)
    slices = np.moveaxis(use, stack.slice_axis, 0)
    plane = np.indices(slices.shape[1:]).reshape(2, -1)
    last = np.array(block.shape)[:, None] - 1
    for k in range(len(slices)):
        index = np.insert(plane, stack.slice_axis, k, axis=0)
        at = maps[k, :3, :3] @ index + maps[k, :3, 3:]
        slices[k] = ((at >= 0) & (at <= last)).all(axis=0).reshape(slices.shape[1:])
    if use.sum() < FEWEST:
        return None
    voxel = float(block.voxel_size.min())
    acquisition = job.settings.acquisition
    model = StackModel(stack, use, turned.grid, acquisition, job.device, voxel=voxel)
    model.set_poses(state.poses[number], state.widths[number])
    values = model.forward(torch.from_numpy(turned.image).to(job.device))
    data = np.zeros(stack.grid.shape, np.float32)
    data[tuple(model.index.T.astype(np.intp))] = values.cpu().numpy()
    return stack.with_data(data, use)


def _still(state: State) -> State:
    """The simulated stacks' acquisition: receivers of 1, every slice sound."""
    return State(
        state.poses,
        [Receiver()] * len(state.poses),
        [np.ones(len(p)) for p in state.poses],
        state.widths,
    )


def _solved(job: Job, system: System, prior: Prior) -> Tensor:
    """The simulated stacks' image, by what solves for that of the real ones."""
    options, voxel = job.settings.srr, float(job.grid.voxel_size[0])
    coarse = job.grid.resampled(2 * voxel)
    volume = solve(
        build_system(job, coarse, State.of(system, None)),
        torch.zeros(coarse.shape, device=job.device),
        prior.on_grid(2.0),
        iterations=20,
        reweightings=2,
    )
    return restored(
        system,
        carry(volume, coarse, job.grid),
        prior,
        iterations=options.srr_iterations,
        reweightings=options.srr_reweightings,
    )
