# SPDX-License-Identifier: Apache-2.0
"""How much detail of a head its stacks do not hold.

The power P of a head depends little on the direction of a wave vector k, so that the waves that
some stack passes well tell the power of all others of the same length.  What the image has less
among the waves that all stacks suppress was lost.  Slices that are d apart pass no wave with a
component above 1 / (2 d) along their normal n: they fold it into a longer one, k0, where it is
taken for head.  With H the transfer of the slice profile, of that sample

    y = H(k0) x(k0) + H(k) x(k)

the best guess of x(k0) has the squared error P(k0) a / (a + b), a = H(k)^2 P(k) and
b = H(k0)^2 P(k0) (Wiener).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import fftfreq, rfftn

from .acquisition import quadrature
from .solution import Job

PASSED, SUPPRESSED = 0.6, 0.25  # of the power of a wave
SHELL = 0.0125  # width of the shells of |k|, cycles per voxel
SHELLS = int(1 / SHELL) + 1
FINE = np.linspace(0, 1, 201)  # |k| along a normal never exceeds 1 cycle per voxel


@dataclass(frozen=True)
class Slicing:
    """How a stack holds waves; frequencies are in cycles per voxel of the result.

    ``normal``: (3,) of its slices, along the axes of the result; ``limit``: half a cycle per
    distance of its slices; ``power``: on ``FINE``, what the slice profile passes.
    """

    normal: NDArray[np.float64]
    limit: float
    power: NDArray[np.float64]

    def profile(self, along: NDArray[np.float64]) -> NDArray[np.float64]:
        """Power of waves that the profile passes, by their component along the normal."""
        return np.interp(np.abs(along), FINE, self.power)

    def folded(self, along: NDArray[np.float64]) -> NDArray[np.float64]:
        """The component below the limit that gives the same samples."""
        return along - 2 * self.limit * np.rint(along / (2 * self.limit))


def slicings(job: Job) -> list[Slicing]:
    """Of each stack, by its slice profile and its registered pose."""
    out, size = [], float(job.grid.voxel_size[0])
    for stack, pose in zip(job.prepared.stacks, job.prepared.poses, strict=True):
        nodes = quadrature(job.settings.acquisition, stack.slice_thickness, size / 4)
        phase = 2 * np.pi * np.multiply.outer(FINE, nodes.offsets / size)
        power = (np.cos(phase) @ nodes.weights) ** 2 + (np.sin(phase) @ nodes.weights) ** 2
        normal = job.grid.directions.T @ (pose.matrix[:3, :3] @ stack.normal)
        spacing = float(stack.grid.voxel_size[stack.slice_axis])
        out.append(Slicing(normal, size / (2 * spacing), power))
    return out


def passed_power(stacks: Sequence[Slicing], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """(X, Y, Z // 2 + 1) share of each wave's power that the best stack holds.

    Of the waves of ``scipy.fft.rfftn`` on a grid of ``shape``.
    """
    waves = _Waves(shape)
    best = np.zeros((*shape[:2], shape[2] // 2 + 1), np.float32)
    for i in range(shape[0]):
        for stack in stacks:
            along = waves.along(i, stack.normal)
            held = np.where(np.abs(along) > stack.limit, 0, stack.profile(along))
            best[i] = np.maximum(best[i], held)
    return best


def lost_power(
    image: NDArray[np.float32], passed: NDArray[np.float32], stacks: Sequence[Slicing] = ()
) -> float:
    """Mean square (over all voxels of ``image``) of the detail that it lacks or has folded.

    ``passed``: of :func:`passed_power`; ``stacks``: those that fold.
    """
    power = np.abs(rfftn(np.asarray(image, np.float32))) ** 2
    waves = _Waves(image.shape)
    counts = np.full(power.shape[2], 2.0)  # of k and -k, which rfftn leaves out
    counts[0] = 1.0
    if image.shape[2] % 2 == 0:
        counts[-1] = 1.0
    seen, numbers, have, missing = (np.zeros(SHELLS) for _ in range(4))
    for i in range(len(power)):
        shell = _shell(waves.squared(i))
        twice = np.broadcast_to(counts, shell.shape)
        well, badly = passed[i] > PASSED, passed[i] < SUPPRESSED
        for where, values, total in (
            (well, twice * power[i], seen),
            (well, twice, numbers),
            (badly, twice * power[i], have),
            (badly, twice, missing),
        ):
            total += np.bincount(shell[where], values[where], minlength=SHELLS)
    mean = seen / np.maximum(numbers, 1)
    lost = float(np.maximum(mean * missing - have, 0)[numbers > 0].sum())
    for i in range(len(power)):
        badly = passed[i] < SUPPRESSED
        squared, twice = waves.squared(i)[badly], np.broadcast_to(counts, badly.shape)[badly]
        for stack in stacks:
            along = waves.along(i, stack.normal)[badly]
            into = stack.folded(along)
            before, after = mean[_shell(squared)], mean[_shell(squared - along**2 + into**2)]
            held = stack.profile(into)  # where it holds little, the loss was counted above
            taken = (np.abs(along) > stack.limit) & (held >= SUPPRESSED)
            a, b = stack.profile(along) * before, held * after
            error = after * a / np.maximum(a + b, np.finfo(float).tiny)
            lost += float((twice * error)[taken].sum())
    return lost / image.size**2


class _Waves:
    """The wave vectors of ``rfftn`` on a shape, one plane at a time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x, self.y = fftfreq(shape[0]), fftfreq(shape[1])[:, None]
        self.z = np.arange(shape[2] // 2 + 1)[None] / shape[2]

    def squared(self, i: int) -> NDArray[np.float64]:
        """|k|^2 of plane i."""
        return np.asarray(self.x[i] ** 2 + self.y**2 + self.z**2)

    def along(self, i: int, normal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Components along a normal."""
        return np.asarray(normal[0] * self.x[i] + normal[1] * self.y + normal[2] * self.z)


def _shell(squared: NDArray[np.float64]) -> NDArray[np.intp]:
    radius = np.sqrt(np.maximum(squared, 0))
    return np.minimum((radius / SHELL).astype(np.intp), SHELLS - 1)
