# SPDX-License-Identifier: Apache-2.0
"""How far an image may be from the head: a standard deviation for each voxel.

Two parts, both from the subject's own images:

    sd^2 = b + L sqrt(b) / mean(sqrt(b)),    b = smooth((x - R)^2) / max(s, 1/4)

b, by repetition: the image x is taken for the head.  Stacks of it are predicted, at the
acquisition that was found; the residuals of the real stacks, each with a random sign (the
wild bootstrap, Wu 1986), stand for noise and for what the model does not know; these stacks
are reconstructed again, and what that reconstruction R misses of x, x misses of the head.  s
is the share of the stacks that see the voxel.

L, by isotropy (:mod:`.isotropy`): detail that x itself has lost, or has taken for other detail
where slices are too far apart to tell, does not come back in R.  The waves that some stack passes
well say how much of it a head has; as a mean square over the head.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..settings import Settings
from .gaps import blended
from .geometry import Grid
from .isotropy import lost_power, passed_power, slicings
from .linear import restored, solve
from .optimise import Fit
from .prepare import Prepared
from .solution import Job, Prediction, Progress, State, build_system, seen_by, solve_linear
from .stack import Mask

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
    stacks = slicings(job)
    passed = passed_power(stacks, grid.shape)
    lost = lost_power(np.where(known, image, 0), passed, stacks) * image.size
    root = np.sqrt(repeated)
    if known.any() and root[known].any():
        repeated += lost / known.sum() * root / root[known].mean(dtype=np.float64)
    out = np.sqrt(repeated)
    out[seen == 0] = np.sqrt(np.mean(image[mask] ** 2)) if mask.any() else 0.0
    return np.asarray(np.where(mask, out, 0), dtype=np.float32)


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
