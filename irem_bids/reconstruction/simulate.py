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

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .geometry import PLANES, FloatArray, Grid, RigidTransform
from .metrics import head_mask
from .spline import PAD, Spline
from .stack import Stack

PROFILES = ("gaussian", "box", "decimate")
FWHM_TO_SIGMA = 1.0 / (2.0 * np.sqrt(2.0 * np.log(2.0)))
GAUSSIAN_REACH = 3.5  # standard deviations on either side; 5e-4 of the profile is cut
MIN_POINTS = 17  # of the quadrature through a slice
SUPPORT_MARGIN = 8.0  # truth voxels; further out the spline of the truth is below 1e-4


class SimulationError(ValueError):
    """A protocol that cannot be simulated."""


@dataclass(frozen=True)
class Protocol:
    """What the simulated scanner does.

    Attributes
    ----------
    orientations
        Planes of the stacks in order; a repeated one is shifted by a part of the spacing.
    in_plane
        In-plane voxel, mm; default: the truth's smallest voxel size.  Averaged in plane
        when it is more than 5 % larger than the truth's (not for 'decimate').
    thickness, gap
        What the sidecar says, mm; slices follow each other by their sum.
    profile
        'gaussian' (full width at half maximum), 'box', or 'decimate' (point samples).
    width_factor
        True width of the profile over ``thickness``.
    obliqueness
        Degrees; the field of view is turned by up to this, and the header knows.
    margin
        mm of air added on each side of the truth's box.
    motion_degrees, motion_mm
        Hidden motion of a stack about the head's centre: rotation vector and translation
        are uniform in balls of these radii.
    slice_degrees, slice_mm, slice_bound
        Hidden motion of slices: a random walk in interleaved order of acquisition, with
        these standard deviations per step and component, reflected at +-bound.
    gain, bias
        Gain uniform in 1 +- gain; largest deviation of the smooth bias field from 1.
    snr
        Mean of the truth's foreground over sigma of the Rician noise; None: no noise.
    damaged
        Fraction of slices dropped or torn, among those through the middle 70 % of a stack.
    """

    orientations: tuple[str, ...] = ("axial", "coronal", "sagittal")
    in_plane: float | None = None
    thickness: float = 4.0
    gap: float = 0.0
    profile: str = "gaussian"
    width_factor: float = 1.0
    obliqueness: float = 0.0
    margin: float = 4.0
    motion_degrees: float = 0.0
    motion_mm: float = 0.0
    slice_degrees: float = 0.0
    slice_mm: float = 0.0
    slice_bound: float = 5.0
    gain: float = 0.0
    bias: float = 0.0
    snr: float | None = None
    damaged: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [o for o in self.orientations if o not in PLANES]
        if unknown or not self.orientations:
            raise SimulationError(f"orientations {unknown} are not among {', '.join(PLANES)}")
        if self.profile not in PROFILES:
            raise SimulationError(f"profile is {self.profile!r}; expected one of {PROFILES}")
        for name in ("thickness", "width_factor", "slice_bound"):
            if not getattr(self, name) > 0:
                raise SimulationError(f"{name} is {getattr(self, name)}; expected above 0")
        for name in ("in_plane", "snr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SimulationError(f"{name} is {value}; expected above 0, or none")
        for name in ("gain", "bias", "damaged"):
            if not 0 <= getattr(self, name) < 1:
                raise SimulationError(f"{name} is {getattr(self, name)}; expected 0 to below 1")

    @property
    def spacing(self) -> float:
        """Distance of slice centres, mm."""
        return self.thickness + self.gap


@dataclass(frozen=True)
class Damage:
    """A bad slice: ``shift`` voxels of the rows beyond ``cut`` (fraction), times ``factor``."""

    slice: int
    kind: str  # 'dropped' (factor only, all rows) or 'torn'
    factor: float
    cut: float = 0.0
    shift: int = 0


@dataclass(frozen=True)
class StackDraw:
    """All that is random about one stack; JSON-safe through :meth:`to_dict`.

    ``affine`` (4, 4) and ``shape`` are the header; ``pose`` (4, 4) maps its scanner space
    to the truth's; ``slice_vectors`` (K, 6) are rotation vectors (rad, about ``centre``)
    and translations (mm) applied before the pose; ``bias`` (9,) are coefficients of a
    quadratic.
    """

    label: str
    plane: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    centre: tuple[float, float, float]
    pose: tuple[tuple[float, ...], ...]
    slice_vectors: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]
    gain: float
    bias: tuple[float, ...]
    sigma: float
    noise_seed: int
    damage: tuple[Damage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StackDraw:
        """What :meth:`to_dict` gave, also after a passage through JSON."""
        parts = {key: _frozen(value) for key, value in values.items() if key != "damage"}
        return cls(**parts, damage=tuple(Damage(**one) for one in values["damage"]))

    @property
    def grid(self) -> Grid:
        """Voxel centres as the header has them."""
        return Grid(self.shape, self.affine)

    def slice_pose(self, index: int) -> RigidTransform:
        """Scanner space to truth space for the tissue that slice ``index`` saw."""
        motion = RigidTransform.from_vector(self.slice_vectors[index], self.centre)
        return RigidTransform(self.pose) @ motion


@dataclass(frozen=True)
class SimulatedStack:
    """A stack as the scanner gives it (mask all true), and what is true about it."""

    stack: Stack
    draw: StackDraw

    @property
    def pose(self) -> RigidTransform:
        """Scanner space of the stack to the truth's space."""
        return RigidTransform(self.draw.pose)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _nested(matrix: NDArray) -> Any:
    return _frozen(np.asarray(matrix, dtype=np.float64).tolist())


def draw(protocol: Protocol, truth: NDArray, grid: Grid) -> tuple[StackDraw, ...]:
    """Draw the random parameters of each stack of ``protocol`` for a truth volume."""
    mask = head_mask(truth)
    centre = grid.to_world(np.argwhere(mask).mean(axis=0))
    signal = float(np.asarray(truth, dtype=np.float64)[mask].mean())
    sigma = signal / protocol.snr if protocol.snr else 0.0
    children = np.random.SeedSequence(protocol.seed).spawn(len(protocol.orientations))
    draws = []
    for number, plane in enumerate(protocol.orientations):
        rng = np.random.default_rng(children[number])
        repeat = protocol.orientations[:number].count(plane)
        turn = RigidTransform.from_vector(
            np.concatenate([np.deg2rad(_in_ball(rng, protocol.obliqueness)), np.zeros(3)]), centre
        )
        stack_grid = _stack_grid(protocol, plane, repeat, grid, turn)
        motion = np.concatenate(
            [np.deg2rad(_in_ball(rng, protocol.motion_degrees)), _in_ball(rng, protocol.motion_mm)]
        )
        slices = stack_grid.shape[2]
        order = [*range(0, slices, 2), *range(1, slices, 2)]
        draws.append(
            StackDraw(
                label=f"{plane}{repeat + 1}",
                plane=plane,
                shape=stack_grid.shape,
                affine=_nested(stack_grid.affine),
                centre=_nested(centre),
                pose=_nested(RigidTransform.from_vector(motion, centre).matrix),
                slice_vectors=_nested(_walk(rng, protocol, order)),
                order=tuple(order),
                gain=float(1 + protocol.gain * rng.uniform(-1, 1)),
                bias=_nested(rng.standard_normal(9) * (protocol.bias > 0)),
                sigma=sigma,
                noise_seed=int(rng.integers(2**31)),
                damage=_draw_damage(rng, protocol, slices),
            )
        )
    return tuple(draws)


def _in_ball(rng: np.random.Generator, radius: float) -> FloatArray:
    direction = rng.standard_normal(3)
    return radius * rng.uniform() ** (1 / 3) * direction / np.linalg.norm(direction)


def _stack_grid(
    protocol: Protocol, plane: str, repeat: int, grid: Grid, turn: RigidTransform
) -> Grid:
    """The header's grid: slices on the third axis, over the truth's box and the margin."""
    normal = PLANES.index(plane)
    columns = [int(np.argmax(np.abs(grid.directions[world]))) for world in range(3)]
    if len(set(columns)) != 3:
        raise SimulationError("the truth's axes are too oblique to tell its planes apart")
    world_axes = [axis for axis in range(3) if axis != normal] + [normal]
    directions = np.stack(
        [
            grid.directions[:, columns[axis]] * np.sign(grid.directions[axis, columns[axis]])
            for axis in world_axes
        ],
        axis=1,
    )
    extent = np.array([grid.shape[columns[a]] * grid.voxel_size[columns[a]] for a in world_axes])
    in_plane = protocol.in_plane or float(grid.voxel_size.min())
    sizes = np.array([in_plane, in_plane, protocol.spacing])
    shape = np.ceil((extent + 2 * protocol.margin) / sizes - 1e-6).astype(int)
    shift = np.array([0, 0, protocol.spacing * repeat / protocol.orientations.count(plane)])
    affine = np.eye(4)
    affine[:3, :3] = directions * sizes
    affine[:3, 3] = grid.centre + directions @ shift - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid(shape, turn.matrix @ affine)


def _walk(rng: np.random.Generator, protocol: Protocol, order: Sequence[int]) -> FloatArray:
    """(K, 6) rotation vectors in rad and translations in mm, by slice index."""
    steps = rng.standard_normal((len(order), 6))
    steps *= np.repeat([protocol.slice_degrees, protocol.slice_mm], 3)
    bound, path, now = protocol.slice_bound, np.zeros((len(order), 6)), np.zeros(6)
    for index, step in zip(order, steps, strict=True):
        now = (now + step + bound) % (4 * bound)
        now = np.where(now > 2 * bound, 4 * bound - now, now) - bound
        path[index] = now
    path[:, :3] = np.deg2rad(path[:, :3])
    return path


def _draw_damage(rng: np.random.Generator, protocol: Protocol, slices: int) -> tuple[Damage, ...]:
    middle = np.arange(int(0.15 * slices), max(int(0.85 * slices), int(0.15 * slices) + 1))
    count = min(len(middle), int(round(protocol.damaged * slices)))
    if protocol.damaged > 0:
        count = max(1, count)
    damage = []
    for index in sorted(rng.choice(middle, size=count, replace=False).tolist()):
        if rng.uniform() < 0.5:
            damage.append(Damage(index, "dropped", float(rng.uniform(0.0, 0.3))))
        else:
            damage.append(
                Damage(
                    index,
                    "torn",
                    float(rng.uniform(0.4, 0.8)),
                    float(rng.uniform(0.3, 0.6)),
                    int(rng.integers(5, 12)),
                )
            )
    return tuple(damage)


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
    field = sum(c * t for c, t in zip(one.bias, terms, strict=True))
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
