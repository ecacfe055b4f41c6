# SPDX-License-Identifier: Apache-2.0
"""Everything random about a simulated scan, drawn once.

:func:`draw` picks; ``simulate.acquire`` applies.  What was drawn is JSON-safe, so a test
can replay it or change one thing in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .geometry import PLANES, FloatArray, Grid, RigidTransform
from .metrics import head_mask
from .protocol import Protocol, SimulationError


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


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _nested(matrix: NDArray) -> Any:
    return _frozen(np.asarray(matrix, dtype=np.float64).tolist())


def draw(protocol: Protocol, truth: NDArray, grid: Grid) -> tuple[StackDraw, ...]:
    """Draw the random parameters of each stack of ``protocol`` for a truth volume."""
    mask = head_mask(truth)
    centre = grid.middle_of(mask)
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
    count = min(len(middle), round(protocol.damaged * slices))
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
