# SPDX-License-Identifier: Apache-2.0
"""Truth volume -> stacks of thick slices with known poses.

``draw`` picks everything random, ``acquire`` applies it, so a test can replay or change
what was drawn.  The slice integral is a dense deterministic quadrature of the truth's
cubic spline; nothing is shared with the reconstruction's forward model, whose oracle
this is.

A voxel at scanner position p of slice k sees::

    gain * Rician(bias(p) * integral of truth(pose_k(p + offset)) * profile(offset), sigma)

where ``pose_k = pose of the stack after the motion of slice k``, scanner to truth space.
The header shows the position p: motion is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .draws import Damage, StackDraw, draw
from .geometry import FloatArray, Grid, RigidTransform
from .protocol import PROFILES, Protocol, SimulationError
from .spline import PAD, Spline
from .stack import Stack

__all__ = [
    "PROFILES",
    "Damage",
    "Protocol",
    "SimulatedStack",
    "SimulationError",
    "StackDraw",
    "acquire",
    "draw",
    "simulate",
]

FWHM_TO_SIGMA = 1.0 / (2.0 * np.sqrt(2.0 * np.log(2.0)))
GAUSSIAN_REACH = 3.5  # standard deviations on either side; 5e-4 of the profile is cut
MIN_POINTS = 17  # of the quadrature through a slice
SUPPORT_MARGIN = 8.0  # truth voxels; further out the spline of the truth is below 1e-4


@dataclass(frozen=True)
class SimulatedStack:
    """A stack as the scanner gives it (mask all true), and what is true about it."""

    stack: Stack
    draw: StackDraw

    @property
    def pose(self) -> RigidTransform:
        """Scanner space of the stack to the truth's space."""
        return RigidTransform(self.draw.pose)


def acquire(
    truth: NDArray, grid: Grid, protocol: Protocol, draws: Sequence[StackDraw], *, threads: int = 1
) -> list[SimulatedStack]:
    """Simulate the stacks whose parameters :func:`draw` gave.

    Of ``protocol`` only the profile, its true width and the thickness are used; the rest
    is in ``draws``.
    """
    volume = np.asarray(truth, dtype=np.float32)
    spline = Spline(volume, grid)
    support = _support_distance(volume, grid)
    stacks = []
    for one in draws:
        signal = integrate(spline, support, protocol, one, threads=threads)
        data = degrade(signal, one, protocol.bias)
        stack = Stack(
            one.label, data, one.grid, 2, protocol.thickness, np.ones(data.shape, dtype=bool)
        )
        stacks.append(SimulatedStack(stack, one))
    return stacks


def simulate(
    truth: NDArray, grid: Grid, protocol: Protocol, *, threads: int = 1
) -> list[SimulatedStack]:
    """:func:`draw` and :func:`acquire` in one go."""
    return acquire(truth, grid, protocol, draw(protocol, truth, grid), threads=threads)


def _support_distance(volume: NDArray, grid: Grid) -> NDArray[np.float32]:
    """Distance (mm) of each voxel of the padded truth to its nearest nonzero voxel."""
    empty = np.pad(np.abs(volume) <= 1e-6 * np.abs(volume).max(), PAD, constant_values=True)
    if empty.all():
        raise SimulationError("the truth is zero everywhere")
    distance = ndimage.distance_transform_edt(empty, sampling=grid.voxel_size)
    return np.asarray(distance, dtype=np.float32)


def quadrature(
    protocol: Protocol, truth_voxel: float, in_plane: float
) -> tuple[FloatArray, FloatArray]:
    """Offsets (Q, 3) from a voxel's centre in mm along the stack's axes, and weights (Q,).

    The third offset runs through the slice: equidistant nodes for a Gaussian (the
    trapezoidal rule converges faster than any power), Gauss-Legendre for a box.
    """
    if protocol.profile == "decimate":
        return np.zeros((1, 3)), np.ones(1)
    width = protocol.thickness * protocol.width_factor
    sigma = width * FWHM_TO_SIGMA
    span = 2 * GAUSSIAN_REACH * sigma if protocol.profile == "gaussian" else width
    count = max(MIN_POINTS, int(np.ceil(span / (0.75 * truth_voxel))) | 1)
    if protocol.profile == "gaussian":
        nodes = np.linspace(-span / 2, span / 2, count)
        weights = np.exp(-0.5 * (nodes / sigma) ** 2)
    else:
        unit, weights = np.polynomial.legendre.leggauss(count)
        nodes = unit * span / 2
    planar, planar_weights = np.zeros(1), np.ones(1)
    if in_plane > 1.05 * truth_voxel:
        unit, planar_weights = np.polynomial.legendre.leggauss(int(np.ceil(in_plane / truth_voxel)))
        planar = unit * in_plane / 2
    x, y, z = np.meshgrid(planar, planar, nodes, indexing="ij")
    product = planar_weights[:, None, None] * planar_weights[None, :, None] * weights
    return np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1), product.ravel() / product.sum()


def integrate(
    spline: Spline,
    support: NDArray[np.float32],
    protocol: Protocol,
    one: StackDraw,
    *,
    threads: int = 1,
) -> NDArray[np.float32]:
    """(I, J, K) what an ideal scanner sees: no gain, bias, damage or noise."""
    stack_grid, truth_grid = one.grid, spline.grid
    voxel = float(truth_grid.voxel_size.min())
    offsets, weights = quadrature(protocol, voxel, float(stack_grid.voxel_size[0]))
    reach = float(np.abs(offsets).max()) * 1.75 + SUPPORT_MARGIN * float(
        truth_grid.voxel_size.max()
    )
    plane = np.indices(stack_grid.shape[:2]).reshape(2, -1)
    to_index = np.linalg.inv(truth_grid.affine)

    def one_slice(k: int) -> NDArray[np.float32]:
        values = np.zeros(plane.shape[1], dtype=np.float32)
        motion = to_index @ one.slice_pose(k).matrix
        indices = np.vstack([plane, np.full((1, plane.shape[1]), k)])
        base = (motion @ stack_grid.affine)[:3] @ np.vstack([indices, np.ones_like(indices[:1])])
        near = (
            ndimage.map_coordinates(support, base + PAD, order=0, mode="nearest", prefilter=False)
            <= reach
        )
        steps = motion[:3, :3] @ stack_grid.directions @ offsets.T  # (3, Q), truth voxels
        picked = base[:, near]
        total = np.zeros(picked.shape[1])
        for step, weight in zip(steps.T, weights, strict=True):
            total += weight * spline.at_index(picked + step[:, None])
        values[near] = total
        return values.reshape(stack_grid.shape[:2])

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return np.stack(list(pool.map(one_slice, range(stack_grid.shape[2]))), axis=2)


def bias_field(one: StackDraw, bias: float) -> NDArray[np.float32]:
    """(I, J, K) smooth field between 1 - bias and 1 + bias, a quadratic of the position."""
    if bias == 0 or not np.any(one.bias):
        return np.ones(one.shape, dtype=np.float32)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in one.shape], indexing="ij", sparse=True)
    terms = (x, y, z, x * x, y * y, z * z, x * y, x * z, y * z)
    field = np.zeros(one.shape)
    for coefficient, term in zip(one.bias, terms, strict=True):
        field += coefficient * term
    field = field - (field.max() + field.min()) / 2
    return np.asarray(1 + bias * field / np.abs(field).max(), dtype=np.float32)


def degrade(signal: NDArray, one: StackDraw, bias: float) -> NDArray[np.float32]:
    """Bias, damage, noise and gain on an ideal stack (I, J, K)."""
    data = np.asarray(signal, dtype=np.float64) * bias_field(one, bias)
    for bad in one.damage:
        image = data[:, :, bad.slice]
        start = int(bad.cut * image.shape[1])
        image[:, start:] = bad.factor * np.roll(image[:, start:], bad.shift, axis=0)
    if one.sigma > 0:
        rng = np.random.default_rng(one.noise_seed)
        real = data + one.sigma * rng.standard_normal(data.shape)
        data = np.hypot(real, one.sigma * rng.standard_normal(data.shape))
    return np.asarray(one.gain * data, dtype=np.float32)
