# SPDX-License-Identifier: Apache-2.0
"""Between slices that leave gaps: the most likely image of a head's spectrum.

Total variation joins what lies far apart by plateaus.  The power of heads falls with about the
third power of the frequency, so that all octaves hold the same; of such images (Gaussian, with
power c |2 pi k|^-3) the most likely one, given the stacks, is

    x = argmin  sum_s || y_s - G_s A_s x ||^2_{W_s} + sigma^2 / c sum_k |2 pi k|^3 |x_k|^2,

the Wiener filter for samples with gaps (kriging, in geostatistics).  The weight of the penalty has
no unit, and is the same on every grid.  Solved coarse to fine by conjugate gradients on waves
that are scaled to be about alike: (d / 1000 + sigma^2 / c |2 pi k|^3)^{1/2} x, with d the stacks'
weight per voxel.  With all of d, what no slice comes near is slow; without it, the rest is.

Both images are used, by shares (:func:`share_of`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.fft import next_fast_len
from scipy.ndimage import gaussian_filter
from torch import Tensor

from .consistency import density
from .linear import System
from .masks import output_mask
from .solution import Job, State, build_system, carry

POWER = 3.0  # of the frequency
SLOWEST = 0.01  # cycles per voxel, added in squares: the mean, too, has a finite power
LEAST = 1e-3  # of the penalty's weight: less changes the image by 0.01 dB, but takes longer
MARGIN = 16  # voxels beside the grid at least, since the waves go round
SEEN = 1e-3  # of the data's weight, in the scale of the waves
APART = 1.99  # of the slice thickness: gaps as wide as the slices; half as wide, it gains nothing
FADE = 1.0  # voxels: standard deviation of the Gaussian that fades it out at the head's edge
ITERATIONS = {2.0: 40, 1.0: 40}  # by voxels of a level's grid over the result's


def leave_gaps(system: System) -> bool:
    """Whether the slices of every stack leave voxels between them that none sees, or as much as
    they cover."""
    return all(model.gap > 0 or model.apart >= APART for model in system.models)


def joined(job: Job, state: State, start: Tensor) -> Tensor:
    """The most likely image (X, Y, Z) on the job's grid; ``start``: one to begin with.

    ``start`` also tells c, by its waves between two and four slices long, which the stacks hold.
    """
    voxel, volume, last = float(job.grid.voxel_size[0]), start, job.grid
    spacing = max(float(s.grid.voxel_size[s.slice_axis]) for s in job.prepared.stacks)
    noise = float(np.mean(list(job.prepared.metrics["noise"].values())))
    power = _power(start, spacing / voxel)
    weight = max(noise**2 / power, LEAST) if power > 0 else LEAST
    for level, iterations in ITERATIONS.items():
        grid = job.grid if level == 1 else job.grid.resampled(level * voxel)
        volume, last = carry(volume, last, grid), grid
        volume = _most_likely(build_system(job, grid, state), volume, weight, iterations)
    return volume


def blended(job: Job, state: State, volume: Tensor, share: float) -> Tensor:
    """The volume (X, Y, Z) with so large a share of the most likely image.

    Within the head: of air the spectrum knows nothing, and would leave a glow there.
    """
    if share == 0:
        return volume
    head = gaussian_filter(output_mask(job.prepared, job.grid).astype(np.float32), FADE)
    each = torch.from_numpy(share * head).to(volume.device)
    return volume.lerp(joined(job, state, volume), each)


def share_of(edges: Tensor, spectrum: Tensor) -> float:
    """The share of the spectrum's image, 0 to 1, by what either image missed of a known one.

    The share w for which (1 - w) ``edges`` + w ``spectrum`` is smallest is too small where the
    known image has the plateaus of total variation (:mod:`.rehearsal`): of three blocks of heads
    with five kinds of gaps its cube root is near to the best.
    """
    apart = (edges - spectrum).double()
    square = float((apart**2).sum())
    least = float((edges.double() * apart).sum()) / square if square > 0 else 0.0
    return min(max(least, 0.0), 1.0) ** (1 / 3)


def _torus(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The grid with its margin, of a size that transforms fast."""
    return tuple(next_fast_len(n + MARGIN, real=True) for n in shape)


def _frequencies(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """|k| in cycles per voxel, as ``torch.fft.rfftn`` has them."""
    sides = [torch.fft.fftfreq(n, device=device) for n in shape[:2]]
    sides.append(torch.fft.rfftfreq(shape[2], device=device))
    total = sides[0][:, None, None] ** 2 + sides[1][:, None] ** 2 + sides[2] ** 2
    return total.sqrt()


def _power(volume: Tensor, spacing: float) -> float:
    """c: mean of |2 pi k|^3 times the power of a voxel's waves; ``spacing`` in voxels."""
    window = torch.ones((), device=volume.device)
    for axis, size in enumerate(volume.shape):
        shape = [1, 1, 1]
        shape[axis] = size
        window = window * torch.hann_window(size, False, device=volume.device).reshape(shape)
    waves = torch.fft.rfftn((volume - volume.mean()) * window)
    k = _frequencies(tuple(volume.shape), volume.device)
    band = (k > 1 / (4 * spacing)) & (k <= 1 / (2 * spacing))
    each = waves.abs()[band] ** 2 * (2 * math.pi * k[band]) ** POWER
    return float(each.mean() / (window**2).sum()) if len(each) else 0.0


def _most_likely(system: System, start: Tensor, weight: float, iterations: int) -> Tensor:
    """Conjugate gradients on scaled waves; outside the domain ``start`` stays."""
    shape = tuple(start.shape)
    wide = _torus(shape)
    place = tuple(slice(MARGIN // 2, MARGIN // 2 + n) for n in shape)
    k = (_frequencies(wide, start.device) ** 2 + SLOWEST**2).sqrt()
    penalty = weight * (2 * math.pi * k) ** POWER
    whole = penalty + SEEN * sum(density(system))
    root, share = whole.sqrt(), penalty / whole
    twice = torch.full_like(root, 2.0)  # waves that stand for their opposites, too
    twice[:, :, 0] = 1.0
    if wide[2] % 2 == 0:
        twice[:, :, -1] = 1.0
    rows = list(zip(system.models, system.factors(), system.weights(), strict=True))
    inside = system.domain > 0
    mean = float(start[inside].mean()) if bool(inside.any()) else 0.0

    def image(scaled: Tensor) -> Tensor:
        return torch.fft.irfftn(scaled / root, s=wide)[place].contiguous()

    def waves(volume: Tensor) -> Tensor:
        padded = torch.zeros(wide, device=start.device)
        padded[place] = volume
        return torch.fft.rfftn(padded)

    def back(residuals: list[Tensor]) -> Tensor:
        parts = system.empty_parts()
        for (model, factor, weights), residual in zip(rows, residuals, strict=True):
            model.add_adjoint(factor * weights * residual, parts)
        return waves(parts.sum(0)) / root

    def dot(one: Tensor, other: Tensor) -> float:
        products = one.real * other.real + one.imag * other.imag
        return float((twice * products).sum(dtype=torch.float64))

    scaled = waves((start - mean) * system.domain) * root
    residual = back(system.residuals(image(scaled) + mean)) - share * scaled
    direction, square = residual.clone(), dot(residual, residual)
    for _ in range(iterations):
        if square <= 0:
            break
        seen = image(direction)
        product = back([f * m.forward(seen) for m, f, _ in rows]) + share * direction
        step = square / dot(direction, product)
        scaled += step * direction
        residual -= step * product
        last, square = square, dot(residual, residual)
        direction = residual + (square / last) * direction
    return torch.where(inside, image(scaled) + mean, start)
