# SPDX-License-Identifier: Apache-2.0
"""The forward model: how the voxels of a thick slice see the head.

A voxel of stack *s* in slice *k* with centre p sees

    y = g_s(p) * sum_q w_q F(T_sk(p + z_q n_s)),

with F the image, T_sk the pose of the slice (scanner to reference space), n_s the slices'
normal, z_q and w_q the quadrature of the slice profile and g_s the stack's receiver, a gain
times a smooth bias.  F is trilinear on a grid; the loops stand in :mod:`.operator_cpu` and
:mod:`.operator_cuda`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import Acquisition
from . import operator_cpu, operator_cuda
from .geometry import Grid, RigidTransform
from .lattice import Lattice, Taps
from .operator_torch import DeviceRows
from .sharpening import add_sharpened, amounts, sharpened
from .stack import Stack

FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))  # of a Gaussian, in standard deviations
TRUNCATION = 3.0  # standard deviations at which a Gaussian profile ends (0.3 % outside)
STEP = 1.0  # largest distance of the nodes through a slice, in voxels of the field's grid
LOBES = 4.0  # time-bandwidth product of the windowed sinc pulse
SINC_REACH = 1.6  # slice thicknesses on either side of a sinc profile's middle


class ProfileError(ValueError):
    """A file that holds no slice profile."""


@dataclass(frozen=True)
class Quadrature:
    """Nodes through a slice: offsets in mm along the normal, weights that sum to 1."""

    offsets: NDArray[np.float64]
    weights: NDArray[np.float64]


def sinc_profile(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Response at ``z`` (slice thicknesses) to a Hamming-windowed sinc pulse, small flip angle.

    The Fourier transform of the pulse (Pauly et al. 1991, the k-space view of small tips), with
    the time-bandwidth product 4; its full width at half maximum is 1.
    """
    times = np.linspace(-LOBES / 2, LOBES / 2, 513)
    pulse = np.sinc(times) * (0.54 + 0.46 * np.cos(2 * np.pi * times / LOBES))
    response = np.cos(2 * np.pi * np.multiply.outer(z, times)) @ pulse
    return np.asarray(response / pulse.sum())


def read_profile(path: str | Path) -> NDArray[np.float64]:
    """(N, 2) offsets in mm, increasing, and responses of a measured slice profile.

    Raises
    ------
    ProfileError
        Not two columns of numbers, fewer than three rows, or no positive area.
    """
    try:
        table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"{path}: no slice profile ({error}); expected two columns, mm and response"
        ) from error
    if table.shape[1] != 2 or len(table) < 3 or not np.isfinite(table).all():
        raise ProfileError(
            f"{path}: a table of shape {table.shape}; expected two columns, mm and response, and "
            "three rows or more"
        )
    table = table[np.argsort(table[:, 0])]
    if not np.trapezoid(table[:, 1], table[:, 0]) > 0:
        raise ProfileError(f"{path}: the response sums to nothing; expected a positive area")
    return np.asarray(table, dtype=np.float64)


def profile_quadrature(
    kind: str, thickness: float, step: float, measured: NDArray[np.float64] | None = None
) -> Quadrature:
    """Quadrature of a slice profile on equidistant nodes about the slice's middle.

    Parameters
    ----------
    kind
        ``gaussian``: full width at half maximum ``thickness``, cut at 3 standard
        deviations; the rectangle rule, which converges faster than any power of the step.
        ``box``: width ``thickness``; equal weights but for the two ends, which give the rule
        the variance of the box, thickness^2 / 12.
        ``sinc``: :func:`sinc_profile`, side lobes and all; means over the nodes' cells.
        ``file``: ``measured`` (:func:`read_profile`), likewise; linear between its rows.
        ``none``: one node, the paper's point sample.
    thickness, step
        mm; the nodes are ``step`` apart, a Gaussian's 1.2 standard deviations at most.
    """
    if kind == "none":
        return Quadrature(np.zeros(1), np.ones(1))
    if kind == "gaussian":
        sigma = thickness / FWHM
        step = min(step, 1.2 * sigma)
        reach = max(1, round(TRUNCATION * sigma / step))
        offsets = step * np.arange(-reach, reach + 1)
        weights = np.asarray(np.exp(-0.5 * (offsets / sigma) ** 2))
    elif kind == "box":
        reach, square = 1, (thickness / step) ** 2
        while 4 * (reach + 1) * reach <= square:
            reach += 1
        offsets = step * np.arange(-reach, reach + 1)
        inner = reach * (reach - 1) / 3  # mean of j^2 over the inner nodes
        end = (square / 12 - inner) / (2 * (reach**2 - inner))
        weights = np.full(2 * reach + 1, (1 - 2 * end) / (2 * reach - 1))
        weights[[0, -1]] = end
    elif kind == "sinc" or (kind == "file" and measured is not None):
        if kind == "sinc" or measured is None:
            far = SINC_REACH * thickness
        else:
            far = float(np.abs(measured[:, 0]).max())
        reach = max(1, math.ceil(far / step - 0.5))
        offsets = step * np.arange(-reach, reach + 1)
        cell = (np.arange(33) - 16) / 33 * step
        points = offsets[:, None] + cell
        if kind == "sinc" or measured is None:
            weights = sinc_profile(points / thickness).mean(1)
        else:
            weights = np.interp(points, measured[:, 0], measured[:, 1], left=0, right=0).mean(1)
    else:
        raise ValueError(f"unknown slice profile {kind!r}; expected gaussian, box, sinc or none")
    total = float(weights.sum())
    return Quadrature(offsets.astype(np.float64), (weights / total).astype(np.float64))


def quadrature(acquisition: Acquisition, thickness: float, step: float) -> Quadrature:
    """The quadrature that the settings ask for: :func:`profile_quadrature`."""
    if acquisition.profile_file and acquisition.profile != "none":
        measured = read_profile(acquisition.profile_file)
        return profile_quadrature("file", thickness, step, measured)
    return profile_quadrature(acquisition.profile, thickness, step)


def between_slices(stack: Stack, acquisition: Acquisition) -> float:
    """mm between two neighbouring slices that neither sees; 0 where they meet."""
    spacing = float(stack.grid.voxel_size[stack.slice_axis])
    nodes, _ = _shared_nodes(acquisition, stack.slice_thickness, spacing, min(stack.in_plane))
    return max(0.0, spacing - float(np.ptp(nodes.offsets)))


def _shared_nodes(
    acquisition: Acquisition, thickness: float, spacing: float, limit: float
) -> tuple[Quadrature, int]:
    """A quadrature whose step, ``limit`` at most, is the ``spacing`` over a whole number: then
    neighbouring slices share nodes.  Returns it and that number."""
    fine = max(1, math.ceil(spacing / limit - 1e-3))
    found = quadrature(acquisition, thickness, spacing / fine)
    if len(found.offsets) > 1:
        step = float(found.offsets[1] - found.offsets[0])
        if step < 0.999 * spacing / fine:  # a narrow profile asks for a finer one
            fine = math.ceil(spacing / step - 1e-3)
            found = quadrature(acquisition, thickness, spacing / fine)
    return found, fine


@dataclass(frozen=True)
class Receiver:
    """What a scan multiplies the head's intensity by: a gain, a smooth bias, a gain a slice.

    The bias is exp of a quadratic without constant in reference space, about the middle of the
    result in units of 100 mm; ``bias`` are its nine coefficients.  ``slices`` (K,), where slices
    differ beyond both.

    >>> float(Receiver(2.0).factors(np.zeros((1, 3), np.float32))[0])
    2.0
    """

    gain: float = 1.0
    bias: NDArray[np.float64] = field(default_factory=lambda: np.zeros(9))
    slices: NDArray[np.float64] | None = None

    @staticmethod
    def terms(voxels: NDArray[np.float32]) -> Tensor:
        """(N, 9) x, y, z, xx, yy, zz, xy, xz, yz of :func:`bias_positions` (N, 3)."""
        x, y, z = torch.from_numpy(voxels).T
        return torch.stack([x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], dim=1)

    def factors(self, voxels: NDArray[np.float32]) -> Tensor:
        """(N,) gain times bias."""
        if not self.bias.any():
            return torch.full((len(voxels),), self.gain)
        threads = torch.get_num_threads()
        return torch.from_numpy(operator_cpu.factors(voxels, self.gain, self.bias, threads))

    def rows(self, model: StackModel) -> Tensor:
        """(N,) of the model's rows, on its device."""
        found = self.factors(model.voxels).to(model.device)
        if self.slices is None:
            return found
        return found * torch.from_numpy(self.slices[model.slice_of_row]).float().to(model.device)

    def image(self, grid: Grid, pose: RigidTransform, origin: NDArray) -> NDArray[np.float32]:
        """Gain times bias at every voxel of ``grid``, moved by ``pose``; one slab at a time."""
        out = np.empty(grid.shape, dtype=np.float32)
        plane = np.indices((1, *grid.shape[1:])).reshape(3, -1).T
        for first in range(grid.shape[0]):
            points = pose.apply(grid.to_world(plane + np.array([first, 0, 0])))
            values = self.factors(bias_positions(points, origin))
            out[first] = values.numpy().reshape(grid.shape[1:])
        return out


def bias_positions(points: NDArray, origin: NDArray) -> NDArray[np.float32]:
    """Points of reference space (N, 3), mm, about ``origin`` in units of 100 mm."""
    return ((points - origin) / 100.0).astype(np.float32)


@dataclass
class Rows:
    """The voxels of a stack that are predicted, slice after slice, and where they look.

    Attributes
    ----------
    index
        (N, 3) int16 voxel indices in the stack, sorted by slice.
    axis
        Slice axis.
    maps
        (K, 3, 4) per slice: voxel of the stack to voxel of the volume.
    steps, through
        (K, T, 3) float32, voxels of the volume: the taps about the centre, and their part
        along the slices' normal.
    weights
        (T,) float32, sum 1.
    """

    index: NDArray[np.int16]
    axis: int
    maps: NDArray[np.float64]
    steps: NDArray[np.float32]
    through: NDArray[np.float32]
    weights: NDArray[np.float32]


class StackModel:
    """The linear forward model of one stack on a voxel grid: volume to predicted voxels.

    Parameters
    ----------
    stack
        Its slice axis, thickness and grid are used; in-plane voxels more than 1.5 times those
        of ``grid`` are averaged over (box), finer ones are points.
    use
        (I, J, K) voxels that are predicted.
    grid
        Of the volume.
    counts
        (I, J, K) acquired voxels behind each voxel of a binned stack; 1 if not given.
    voxel
        mm; the nodes are as dense as for this voxel of the volume; default: that of ``grid``.

    Attributes
    ----------
    index
        (N, 3) voxels, sorted by slice: the order of all rows here.
    starts
        (K + 1,) row at which each slice starts.
    values
        (N,) tensor, the stack's intensities.
    counts
        (N,) tensor, acquired voxels behind each row.
    voxels
        (N, 3) where the bias is evaluated (:func:`bias_positions`).
    poses
        (K, 4, 4) scanner space to reference space, one per slice.
    width
        True width of the profile over the one that was asked for.
    sharpness
        (3,) :func:`.sharpening.amounts`.
    pivot
        (3,) mean of the moved voxel centres, reference space, mm.
    normal
        (3,) of the slices, scanner space.
    gap
        Voxels of the volume between two slices that neither sees; 0 where they meet.
    apart
        Spacing of the slices over their thickness.
    """

    def __init__(
        self,
        stack: Stack,
        use: NDArray[np.bool_],
        grid: Grid,
        acquisition: Acquisition,
        device: str = "cpu",
        counts: NDArray[np.float32] | None = None,
        voxel: float | None = None,
    ) -> None:
        self.grid, self.device = grid, torch.device(device)
        self._voxel = float(grid.voxel_size.min()) if voxel is None else voxel
        axis = stack.slice_axis
        order = [axis, *(a for a in range(3) if a != axis)]
        found = np.argwhere(np.transpose(use, order))
        index = np.empty_like(found, dtype=np.int16)
        index[:, order] = found
        self.index = index
        self.slices = stack.grid.shape[axis]
        self.starts = np.searchsorted(found[:, 0], np.arange(self.slices + 1))
        where = tuple(index.T.astype(np.intp))
        self.values = torch.from_numpy(stack.data[where]).to(self.device)
        behind = np.ones(len(index), np.float32) if counts is None else counts[where]
        self.counts = torch.from_numpy(np.ascontiguousarray(behind, np.float32)).to(self.device)
        self._affine = np.array(stack.grid.affine)
        self._taps(stack, acquisition)
        self.poses = np.repeat(np.eye(4)[None], self.slices, axis=0)
        self.width = 1.0
        self._rows: DeviceRows | None = None
        self._shape = stack.grid.shape
        self._lattice: Lattice | None = None
        self.set_poses(RigidTransform())

    def _taps(self, stack: Stack, acquisition: Acquisition) -> None:
        """(T, 3) offsets in mm along the stack's axes: in plane, and through it; weights."""
        voxel = self._voxel
        spacing = float(stack.grid.voxel_size[stack.slice_axis])
        profile, fine = _shared_nodes(acquisition, stack.slice_thickness, spacing, STEP * voxel)
        sizes, parts, coarse = stack.grid.voxel_size, [], [1, 1, 1]
        for axis in range(3):
            if axis == stack.slice_axis:
                parts.append(profile.offsets)
                continue
            count = 1
            if acquisition.profile != "none":
                count = max(1, math.floor(float(sizes[axis]) / voxel + 0.5))
            parts.append(((np.arange(count) + 0.5) / count - 0.5) * sizes[axis])
            coarse[axis] = count
        taps = np.stack(np.meshgrid(*parts, indexing="ij"), axis=-1)
        shape = [1, 1, 1]
        shape[stack.slice_axis] = -1
        weights = np.broadcast_to(profile.weights.reshape(shape), taps.shape[:3])
        directions = stack.grid.directions
        normal = np.zeros((3, 3))
        normal[:, stack.slice_axis] = directions[:, stack.slice_axis]
        self._through = taps.reshape(-1, 3) @ normal.T  # (T, 3) scanner mm
        self._within = taps.reshape(-1, 3) @ (directions - normal).T
        self._weights = np.ascontiguousarray(weights.ravel() / weights.sum(), np.float32)
        self._axis = stack.slice_axis
        between = spacing - float(np.ptp(profile.offsets)) - 2 * voxel
        self.gap = max(0.0, between / voxel)
        self.apart = spacing / stack.slice_thickness
        self.normal = directions[:, stack.slice_axis]
        thin = np.ascontiguousarray(profile.weights / profile.weights.sum(), np.float32)
        self._lattice_taps = Taps(fine, (coarse[0], coarse[1], coarse[2]), thin)

    def set_poses(
        self, poses: RigidTransform | NDArray[np.float64], width: float | None = None
    ) -> None:
        """Place the stack (a pose, or one per slice (K, 4, 4)) and set the profile's width."""
        if isinstance(poses, RigidTransform):
            poses = np.repeat(poses.matrix[None], self.slices, axis=0)
        self.poses = np.array(poses, dtype=np.float64)
        self.width = self.width if width is None else float(width)
        into = np.linalg.inv(self.grid.affine)
        turn = into[:3, :3] @ self.poses[:, :3, :3]  # scanner mm to voxels of the volume
        through = np.einsum("kab,tb->kta", turn, self._through * self.width)
        within = np.einsum("kab,tb->kta", turn, self._within)
        self.rows = Rows(
            self.index,
            self._axis,
            np.ascontiguousarray((into @ self.poses @ self._affine)[:, :3]),
            (through + within).astype(np.float32),
            through.astype(np.float32),
            self._weights,
        )
        # between gaps it would ask for voxels that no slice sees, which would ring
        self.sharpness = amounts(self.rows) if self.gap == 0 else np.zeros(3, np.float32)
        self._whole = bool((self.poses == self.poses[:1]).all()) and self.width == 1.0
        self._whole &= self._lattice_taps.worth_it(len(self.index), self._shape, self._axis)
        if self._lattice is not None:
            self._lattice.place(self.rows.maps[0])
        points = np.empty((len(self.index), 3), np.float32)
        where = self.poses @ self._affine
        for k in range(self.slices):
            part = slice(self.starts[k], self.starts[k + 1])
            moved = self.index[part] @ where[k, :3, :3].T + where[k, :3, 3]
            points[part] = bias_positions(moved, self.grid.centre)
        self.voxels, self.pivot = points, np.array(self.grid.centre)
        if len(points):
            self.pivot += points.mean(axis=0, dtype=np.float64) * 100.0
        if self._rows is not None:
            self._rows.place(self.rows)

    def only(self, slices: NDArray[np.bool_], every: int = 1) -> StackModel:
        """The same with the rows of the chosen ``slices`` (K,) alone, or every ``every``-th of
        them; with poses of its own."""
        part = copy.copy(self)
        keep = np.flatnonzero(slices[self.slice_of_row])[::every]
        rows = torch.from_numpy(keep).to(self.device)
        part.index, part.values, part.counts = (
            self.index[keep],
            self.values[rows],
            self.counts[rows],
        )
        part.starts = np.searchsorted(part.slice_of_row, np.arange(self.slices + 1))
        part._rows, part._lattice = None, None
        part.set_poses(self.poses)
        return part

    @property
    def compiled(self) -> bool:
        """Whether the loops are those of the CPU; else those of a GPU."""
        return self.device.type == "cpu"

    def _on_device(self) -> DeviceRows:
        if self._rows is None:
            self._rows = DeviceRows(self.rows, self.device)
        return self._rows

    def as_lattice(self) -> Lattice | None:
        """The stack's lattice, if it moves as a whole and that is less work."""
        if not self._whole:
            return None
        if self._lattice is None:
            taps, matrix = self._lattice_taps, self.rows.maps[0]
            self._lattice = Lattice(self.index, self._shape, self._axis, taps, matrix)
        return self._lattice

    def forward(self, volume: Tensor, room: Tensor | None = None) -> Tensor:
        """(X, Y, Z) to (N,), before the receiver; ``room`` (X, Y, Z) may be written over."""
        volume = sharpened(volume, self.sharpness, room)
        if not self.compiled:
            return operator_cuda.forward(volume, self._on_device())
        image, threads = np.ascontiguousarray(volume.numpy()), torch.get_num_threads()
        lattice = self.as_lattice()
        if lattice is not None:
            return torch.from_numpy(lattice.forward(image, threads))
        return torch.from_numpy(operator_cpu.forward(image, self.rows, threads))

    @property
    def parts(self) -> int:
        """Partial volumes that :meth:`add_adjoint` fills."""
        return operator_cpu.BLOCKS if self.compiled else 1

    def add_adjoint(self, values: Tensor, out: Tensor, room: Tensor | None = None) -> None:
        """Add the adjoint of (N,) to ``out`` (:attr:`parts`, X, Y, Z), spread over its parts.

        ``room``, of the shape of ``out``, may be written over.
        """
        if not self.sharpness.any():
            self.spread(values, out)
            return
        parts = torch.zeros_like(out) if room is None else room.zero_()
        self.spread(values, parts)
        add_sharpened(parts, self.sharpness, out[0])

    def spread(self, values: Tensor, out: Tensor) -> None:
        """:meth:`add_adjoint` with positive weights only: without the sharpening."""
        if not self.compiled:
            out[0] += operator_cuda.adjoint(values, self._on_device(), self.grid.shape)
            return
        lattice, threads = self.as_lattice(), torch.get_num_threads()
        if lattice is not None:
            lattice.adjoint(values.numpy(), out.numpy(), threads)
        else:
            operator_cpu.adjoint(values.numpy(), self.rows, out.numpy(), threads)

    def adjoint(self, values: Tensor) -> Tensor:
        """(N,) to (X, Y, Z), before the receiver."""
        out = torch.zeros((self.parts, *self.grid.shape), device=self.device)
        self.add_adjoint(values, out)
        return out.sum(0)

    def derivatives(self, volume: Tensor) -> Tensor:
        """(N, 7): by rotation about :attr:`pivot` (rad, RAS+ axes), shift (mm), relative width.

        The motion is applied after the pose, in reference space.
        """
        pivot = self.grid.to_index(self.pivot)
        volume = sharpened(volume, self.sharpness)
        if not self.compiled:
            found = operator_cuda.derivatives(volume, self._on_device(), self.grid.affine, pivot)
        else:
            image, threads = np.ascontiguousarray(volume.numpy()), torch.get_num_threads()
            given = (image, self.rows, self.grid.affine, pivot, threads)
            found = torch.from_numpy(operator_cpu.derivatives(*given))
        found[:, 6] /= self.width
        return found

    @property
    def slice_of_row(self) -> NDArray[np.intp]:
        """(N,) slice of each row."""
        return np.asarray(self.index[:, self._axis], dtype=np.intp)


def predict(
    volume: NDArray[np.float32],
    grid: Grid,
    stack: Stack,
    poses: RigidTransform | NDArray[np.float64],
    acquisition: Acquisition,
    *,
    width: float = 1.0,
) -> NDArray[np.float32]:
    """The stack as the volume (X, Y, Z) on ``grid`` predicts it, before the receiver.

    ``poses``: of the stack or of each slice (K, 4, 4).  Returns (I, J, K), 0 outside the mask.
    """
    model = StackModel(stack, stack.mask, grid, acquisition)
    model.set_poses(poses, width)
    out = np.zeros(stack.grid.shape, dtype=np.float32)
    values = model.forward(torch.from_numpy(np.asarray(volume, dtype=np.float32)))
    out[tuple(model.index.T.astype(np.intp))] = values.numpy()
    return out
