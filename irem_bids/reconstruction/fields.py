# SPDX-License-Identifier: Apache-2.0
"""Continuous fields: functions of position in mm that give an intensity."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .geometry import Grid

SLAB = 32  # voxels of a volume that the network works on at a time, along the first axis


class ModelError(ValueError):
    """A model file that cannot be read."""


class Field(torch.nn.Module):
    """A function from reference space to scaled intensity.

    ``forward`` takes points (N, 3), float32, RAS+ mm, and returns (N,) intensities in
    scaled units.  ``config`` returns what the constructor needs, JSON-safe.
    """

    kind: ClassVar[str]

    def forward(self, points: Tensor) -> Tensor:
        """(N, 3) points in mm to (N,) intensities."""
        raise TypeError("Field is abstract: use one of its kinds")

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild the field, without its weights."""
        raise TypeError("Field is abstract: use one of its kinds")

    def nodes(self, grid: Grid) -> Tensor | None:
        """The field's own numbers, if its voxels are those of ``grid``; else None."""
        return None


class _Box(Field):
    """A field that lives in the box of a grid; beyond it, 0."""

    to_unit: Tensor

    def __init__(self, shape: tuple[int, int, int], affine: list[list[float]]) -> None:
        super().__init__()
        self.grid = Grid(shape, affine)
        # world to grid_sample's coordinates: -1 and 1 are the first and last voxel centres
        scale = 2.0 / np.maximum(np.array(self.grid.shape) - 1, 1)
        matrix = scale[:, None] * np.linalg.inv(self.grid.affine)[:3]
        matrix[:, 3] -= 1.0
        self.register_buffer("to_unit", torch.from_numpy(matrix).float(), persistent=False)

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()}

    def unit(self, points: Tensor) -> Tensor:
        """(N, 3) mm to (N, 3) with the box at [-1, 1], axes in the grid's order."""
        return points @ self.to_unit[:, :3].T + self.to_unit[:, 3]


class GridField(_Box):
    """A volume with trilinear interpolation."""

    kind: ClassVar[str] = "grid"
    volume: Tensor

    def __init__(
        self, shape: tuple[int, int, int], affine: list[list[float]], volume: Tensor | None = None
    ) -> None:
        super().__init__(shape, affine)
        if volume is None:
            volume = torch.zeros(tuple(shape))
        self.register_buffer("volume", volume.float())

    def forward(self, points: Tensor) -> Tensor:
        return _look_up(self.volume[None, None], self.unit(points))[:, 0]

    def nodes(self, grid: Grid) -> Tensor | None:
        return self.volume if grid == self.grid else None


class ResidualField(_Box):
    """The default field: a volume (the linear solution) plus a learned residual.

    A small convolutional network turns what surrounds a voxel of the linear solution into what
    is missing there; between voxels that is trilinear.  It sees no position, so that it can be
    learned on one part of a head (:mod:`.rehearsal`) and used everywhere.  The last layer starts
    at 0: an untrained field is the linear solution.  Where the volume is 0, it stays 0.
    ``correction`` is what the stacks then change of it (:meth:`settle`).

    Parameters
    ----------
    shape, affine
        Grid of the linear solution.
    hidden, layers
        Channels, and convolutions of 3 x 3 x 3 voxels, the last included.
    scale
        Of the residual, scaled intensity.
    """

    kind: ClassVar[str] = "irem"
    correction: Tensor
    whole: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int, int],
        affine: list[list[float]],
        *,
        hidden: int,
        layers: int,
        scale: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(shape, affine)
        self.options = {"hidden": hidden, "layers": layers, "scale": scale}
        random = generator or torch.Generator().manual_seed(0)
        self.base = GridField(shape, affine)
        self.network = torch.nn.ModuleList()
        widths = [1, *[hidden] * (layers - 1), 1]
        for inputs, outputs in itertools.pairwise(widths):
            layer = torch.nn.utils.skip_init(torch.nn.Conv3d, inputs, outputs, 3)
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
            torch.nn.init.zeros_(layer.bias)
            # the order in which the CPU's convolutions work: none is turned at each step
            self.network.append(layer.to(memory_format=torch.channels_last_3d))
        torch.nn.init.zeros_(layer.weight)
        self.register_buffer("correction", torch.zeros(tuple(shape)))
        self.register_buffer("whole", None, persistent=False)

    def config(self) -> dict[str, Any]:
        return {**super().config(), **self.options}

    @property
    def reach(self) -> int:
        """Voxels in each direction that the residual of a voxel depends on."""
        return len(self.network)

    def missing(self, patches: Tensor) -> Tensor:
        """(B, X, Y, Z) of the linear solution to the residual, :attr:`reach` less on each side."""
        hidden = patches[:, None]
        for layer in self.network[:-1]:
            hidden = torch.relu_(layer(hidden))
        return self.options["scale"] * self.network[-1](hidden)[:, 0]

    @torch.no_grad()
    def learned(self) -> Tensor:
        """(X, Y, Z) the residual on the grid of the linear solution, slab by slab."""
        volume, edge = self.base.volume, self.reach
        out = torch.zeros_like(volume)
        padded = torch.nn.functional.pad(volume[None, None], (edge,) * 6)[0, 0]
        for first in range(0, len(volume), SLAB):
            box = _filled(volume[first : first + SLAB])
            if box is None:
                continue
            box = (slice(box[0].start + first, box[0].stop + first), *box[1:])
            wide = tuple(slice(side.start, side.stop + 2 * edge) for side in box)
            out[box] = self.missing(padded[wide][None])[0] * (volume[box] != 0)
        return out

    @property
    def trained(self) -> bool:
        """Whether the network adds anything at all."""
        return any(bool(p.any()) for p in self.network[-1].parameters())

    def forget(self) -> None:
        """The network has changed: the residual is computed again when next asked for."""
        self.whole = None

    def corrected(self) -> Tensor:
        """(X, Y, Z) the linear solution with what is learned beyond it, corrected."""
        if self.whole is None:
            volume = self.base.volume
            self.whole = volume + self.learned() + self.correction if self.trained else volume
        return self.whole

    @torch.no_grad()
    def settle(self, reconcile: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Let ``reconcile`` correct what the network says; returns :meth:`corrected`.

        It takes a volume (X, Y, Z) to one that agrees with the stacks (:mod:`.consistency`); with
        None, what the network says stands.  An untrained one says nothing, and nothing is
        corrected.
        """
        self.forget()
        self.correction.zero_()
        said = self.corrected()
        if self.trained and reconcile:
            self.correction.copy_(reconcile(said) - said)
            self.whole = said + self.correction  # to the bit what a saved field adds up to
        return self.corrected()

    def forward(self, points: Tensor) -> Tensor:
        return _look_up(self.corrected()[None, None], self.unit(points))[:, 0]

    def nodes(self, grid: Grid) -> Tensor | None:
        return self.corrected() if grid == self.grid else None


def _filled(volume: Tensor) -> tuple[slice, slice, slice] | None:
    """The smallest box with all that is not 0; None where all is."""
    where = volume.nonzero()
    if not len(where):
        return None
    low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _look_up(table: Tensor, unit: Tensor) -> Tensor:
    """Trilinear look-up: table (1, C, X, Y, Z) at (N, 3) in [-1, 1] to (N, C)."""
    if table.is_cuda and torch.are_deterministic_algorithms_enabled():
        return gathered_look_up(table, unit)
    where = unit.flip(-1).reshape(1, -1, 1, 1, 3)  # grid_sample wants the last axis first
    values = torch.nn.functional.grid_sample(
        table, where, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return values.reshape(table.shape[1], -1).T


def gathered_look_up(table: Tensor, unit: Tensor) -> Tensor:
    """The same, corner by corner: torch's own has no deterministic gradient on a GPU."""
    sizes = torch.tensor(table.shape[2:], device=table.device)
    place = (unit + 1) / 2 * (sizes - 1)
    low = place.floor()
    part, flat = place - low, table.reshape(table.shape[1], -1)
    total = torch.zeros(len(unit), table.shape[1], device=table.device)
    for corner in itertools.product((0, 1), repeat=3):
        bits = torch.tensor(corner, device=table.device)
        index = low.long() + bits
        inside = ((index >= 0) & (index < sizes)).all(-1)
        x, y, z = torch.minimum(index.clamp_min(0), sizes - 1).unbind(-1)
        weight = torch.where(bits > 0, part, 1 - part).prod(-1) * inside
        total = total + weight[:, None] * flat[:, (x * sizes[1] + y) * sizes[2] + z].T
    return total


def kinds() -> dict[str, type[Field]]:
    """Kind of a field to its class."""
    from .paper2021 import PaperNetwork

    classes: tuple[type[Field], ...] = (GridField, ResidualField, PaperNetwork)
    return {cls.kind: cls for cls in classes}


@dataclass(frozen=True)
class Model:
    """A trained field with the grid it was made for.

    Scaled intensity times ``scale`` is the intensity of the reference stack; ``metadata``
    holds what the file says beside the field (method, poses, gains, settings ...).
    """

    field: Field
    grid: Grid
    scale: float
    metadata: dict[str, Any]


def save_model(
    path: Path, field: Field, grid: Grid, scale: float, metadata: dict[str, Any]
) -> Path:
    """Write a field as safetensors (no pickle), whole or not at all."""
    from safetensors.torch import save_file

    header = {
        "kind": field.kind,
        "config": field.config(),
        "scale": scale,
        "metadata": metadata,
        "shape": list(grid.shape),
        "affine": grid.affine.tolist(),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in field.state_dict().items()}
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    save_file(tensors, temporary, metadata={"irem_bids": json.dumps(header, allow_nan=False)})
    os.replace(temporary, path)
    return path


def load_model(path: str | Path) -> Model:
    """Read what :func:`save_model` wrote.

    Raises
    ------
    ModelError
        Not a safetensors file, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["irem_bids"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        field = kinds()[header["kind"]](**header["config"])
        field.load_state_dict(tensors)
        field.eval()
        grid = Grid(header["shape"], header["affine"])
        return Model(field, grid, float(header["scale"]), header["metadata"])
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file; expected a model of irem-bids") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{path}: not a model of irem-bids ({error}); expected a file written with --model-out"
        ) from error
