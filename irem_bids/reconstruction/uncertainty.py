# SPDX-License-Identifier: Apache-2.0
"""How far an image may be from the head: a standard deviation for each voxel.

Two parts, both from the subject's own images:

    sd^2 = b + L sqrt(b) / mean(sqrt(b)),    b = smooth((x - R)^2) / max(s, 1/4)

b, by repetition: the image x is taken for the head.  Stacks of it are predicted, at the
acquisition that was found; the residuals of the real stacks, each with a random sign (the
wild bootstrap, Wu 1986), stand for noise and for what the model does not know; these stacks
are reconstructed again, and what that reconstruction R misses of x, x misses of the head.  s
is the share of the stacks that see the voxel.

L, by isotropy: detail that x itself has lost does not come back in R.  The power of a head
depends little on the direction of a wave vector k; where some stack passes k well that power
is seen, and what x has less where all stacks suppress k was lost:

    L = sum over suppressed k of (mean power of the passed k of the same |k| - power of k)

as a mean square over the head.

Between slices that leave gaps R misses little of x, which is smooth there, and the head may hold
what neither has.  There sd^2 is as many times as large as the held-out voxels, which lie in holes
as wide as the gaps, ask for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import fftfreq, rfftn
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..settings import Settings
from .acquisition import quadrature
from .gaps import blended, leave_gaps
from .geometry import Grid
from .linear import restored, solve
from .optimise import Fit
from .prepare import Prepared
from .solution import Job, Prediction, Progress, State, build_system, seen_by, solve_linear
from .stack import Mask

PASSED, SUPPRESSED = 0.6, 0.25  # of the power of a wave, by the slice profile
SHELL = 0.0125  # width of the shells of |k|, cycles per voxel
SMOOTH = 2.0  # voxels: standard deviation of the Gaussian that averages squared errors
LEAST_SHARE = 0.25  # of the stacks: fewer count as this many
ITERATIONS = {"srr_iterations": 16, "srr_reweightings": 2}


def standard_deviation(
    prepared: Prepared,
    result: Fit,
    image: NDArray[np.float32],
    grid: Grid,
    mask: Mask,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Standard deviation of each voxel of ``image`` on ``grid``, scaled intensity.

    Parameters
    ----------
    image
        (X, Y, Z) the result; the method of ``result`` is one of ``settings.WITH_DEVIATION``.
    mask
        (X, Y, Z) of the head.  Outside the standard deviation is 0; inside, where no stack
        sees anything, it is the root mean square of the image.
    """
    job = Job(prepared, grid, settings.updated({"srr": ITERATIONS}), device, None, progress)
    state, volume = _state(prepared, result), torch.from_numpy(image).to(device)
    again = replace(job, prepared=_repeated(job, state, volume))
    linear = solve_linear(
        again,
        refined=False,
        state=state,
        progress=job.part(0, 1, "repeat"),
        image=restored if result.method == "irem" else solve,
    )
    linear.volume = blended(again, state, linear.volume, result.info.get("spectrum_share", 0.0))
    error = (volume - linear.volume).cpu().numpy()
    system = build_system(job, grid, state)
    share = (seen_by(job, system.models) / len(system.models)).cpu().numpy()
    seen = system.domain.cpu().numpy()
    mean = gaussian_filter(seen * error**2, SMOOTH) / np.maximum(gaussian_filter(seen, SMOOTH), 0.1)
    repeated = mean / np.clip(share, LEAST_SHARE, 1)
    known = mask & (share > LEAST_SHARE)
    lost = lost_power(np.where(known, image, 0), passed_power(job)) * image.size
    root = np.sqrt(repeated)
    if known.any() and root[known].any():
        repeated += lost / known.sum() * root / root[known].mean(dtype=np.float64)
    if leave_gaps(system):
        repeated *= _beyond(job, state, volume, repeated)
    out = np.sqrt(repeated)
    out[seen == 0] = np.sqrt(np.mean(image[mask] ** 2)) if mask.any() else 0.0
    return np.asarray(np.where(mask, out, 0), dtype=np.float32)


def _beyond(job: Job, state: State, volume: Tensor, variance: NDArray[np.float32]) -> float:
    """The squared error of the held-out voxels over ``variance`` (X, Y, Z) there; at least 1."""
    held = Prediction(job, job.grid, state, list(job.prepared.held_out))
    squares = torch.from_numpy(variance).to(volume.device)
    expected = found = 0.0
    rows = zip(held.models, held.residuals(volume), state.slice_weights, strict=True)
    for model, residual, weights in rows:  # what is wrong with a bad slice is not the image's
        each = torch.from_numpy(weights[model.slice_of_row]).to(volume.device)
        expected += float((each * model.forward(squares)).sum())
        found += float((each * residual.double() ** 2).sum())
    return max(found / expected, 1.0) if expected > 0 else 1.0


def passed_power(job: Job) -> NDArray[np.float32]:
    """(X, Y, Z // 2 + 1) share of each wave's power that the best stack passes.

    Of the waves of ``scipy.fft.rfftn`` on the job's grid; by the slice profiles alone.
    """
    grid = job.grid
    x, y, z = (fftfreq(n) for n in grid.shape)
    z = np.abs(z[: grid.shape[2] // 2 + 1])
    best = np.zeros((len(x), len(y), len(z)), np.float32)
    fine = np.linspace(0, 1, 201)  # |k| along a normal never exceeds 1 cycle per voxel
    for stack, pose in zip(job.prepared.stacks, job.prepared.poses, strict=True):
        size = float(grid.voxel_size[0])
        profile = quadrature(job.settings.acquisition, stack.slice_thickness, size / 4)
        phase = 2 * np.pi * np.multiply.outer(fine, profile.offsets / size)
        power = (np.cos(phase) @ profile.weights) ** 2 + (np.sin(phase) @ profile.weights) ** 2
        n = grid.directions.T @ (pose.matrix[:3, :3] @ stack.normal)
        for number, kx in enumerate(x):
            along = np.abs(n[0] * kx + n[1] * y[:, None] + n[2] * z[None, :])
            best[number] = np.maximum(best[number], np.interp(along, fine, power))
    return best


def lost_power(image: NDArray[np.float32], passed: NDArray[np.float32]) -> float:
    """Mean square (over all voxels of ``image``) of the detail that no stack passed: L."""
    power = np.abs(rfftn(np.asarray(image, np.float32))) ** 2
    counts = np.full(image.shape[2] // 2 + 1, 2.0)  # of k and -k, which rfftn leaves out
    counts[0] = 1.0
    if image.shape[2] % 2 == 0:
        counts[-1] = 1.0
    x, y = fftfreq(image.shape[0]), fftfreq(image.shape[1])
    z = np.arange(len(counts)) / image.shape[2]
    shells = int(1 / SHELL) + 1
    seen, numbers, have, missing = (np.zeros(shells) for _ in range(4))
    for i, kx in enumerate(x):
        radius = np.sqrt(kx**2 + y[:, None] ** 2 + z[None, :] ** 2)
        shell = np.minimum((radius / SHELL).astype(int), shells - 1)
        twice = np.broadcast_to(counts, shell.shape)
        well, badly = passed[i] > PASSED, passed[i] < SUPPRESSED
        for where, values, total in (
            (well, twice * power[i], seen),
            (well, twice, numbers),
            (badly, twice * power[i], have),
            (badly, twice, missing),
        ):
            total += np.bincount(shell[where], values[where], minlength=shells)
    wanted = seen / np.maximum(numbers, 1) * missing
    return float(np.maximum(wanted - have, 0)[numbers > 0].sum() / image.size**2)


def _state(prepared: Prepared, result: Fit) -> State:
    """The acquisition as the fit found it."""
    state = State.registered(prepared)
    for s, stack in enumerate(prepared.stacks):
        label = stack.label
        own = np.repeat(result.poses[label].matrix[None], len(state.poses[s]), axis=0)
        state.poses[s] = result.slice_poses.get(label, own)
        state.receivers[s] = result.receivers[label]
        state.slice_weights[s] = result.slice_weights.get(label, state.slice_weights[s])
        state.widths[s] = result.widths.get(label, 1.0)
    return state


def _repeated(job: Job, state: State, volume: Tensor) -> Prepared:
    """The stacks that would come from ``volume``, with residuals of random signs."""
    random = np.random.default_rng(job.settings.run.random_seed)
    chosen = Prediction(job, job.grid, state, job.uses)
    stacks = []
    rows = zip(job.prepared.stacks, chosen.models, chosen.residuals(volume), strict=True)
    for stack, model, left in rows:
        residual = left.cpu().numpy()
        values = model.values.cpu().numpy() - residual
        signs = random.integers(0, 2, len(residual), dtype=np.int8) * np.float32(2) - np.float32(1)
        data = np.array(stack.data)
        data[tuple(model.index.T.astype(np.intp))] = values + signs * residual
        stacks.append(stack.with_data(data))
    return replace(job.prepared, stacks=tuple(stacks))
