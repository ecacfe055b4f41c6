# SPDX-License-Identifier: Apache-2.0
"""What every figure of a group shares: names of files, one window, letters at the edges."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..reconstruction.geometry import Grid
from . import views
from .material import Material, MethodResult

Made = TypeVar("Made")
MARGIN = 6.0  # mm around the head in pictures


@dataclass(frozen=True)
class Figure:
    """A file of the figures folder and what a reader who cannot see it is told."""

    path: Path
    section: str  # inputs | registration | reconstruction | mosaic | residual | training ..
    alt: str
    caption: str = ""
    stack: str = ""
    method: str = ""
    plane: str = ""
    state: str = ""  # of registration: reference | before | after


class Studio:
    """Draws one group: names of files, and one window for everything compared."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material = material
        self.folder = folder
        group = material.inp.group
        stem, _, self.suffix = group.name.rpartition("_")
        self.stem = re.sub(r"[/\0]", "_", stem)
        prepared = material.prepared
        self.levels = (0.0, 1.0)
        if prepared is not None:
            pooled = [s.data[s.mask][:: max(1, s.mask.sum() // 200_000)] for s in prepared.stacks]
            self.levels = views.window(np.concatenate(pooled))

    def path(self, what: str, extension: str = "png") -> Path:
        """``sub-X[_ses-Y]_desc-<what>_<suffix>.<extension>`` in the figures folder."""
        what = re.sub(r"[^A-Za-z0-9]", "", what)
        return self.folder / f"{self.stem}_desc-{what}_{self.suffix}.{extension}"

    def attempt(self, what: str, draw: Callable[[], list[Figure]]) -> list[Figure]:
        """Draw, or note why it could not be done: a report must come in any case."""
        return self.try_to(what, draw) or []

    def try_to(self, what: str, make: Callable[[], Made]) -> Made | None:
        """What ``make`` gives; ``None``, and a note, where it fails."""
        try:
            return make()
        except Exception as error:
            self.material.problem(f"the figure '{what}' could not be drawn", error)
            return None


def head_limits(mask: NDArray[np.bool_], grid: Grid) -> list[tuple[int, int]]:
    """(first, last + 1) along each axis of the head with :data:`MARGIN` around it."""
    edge = MARGIN / grid.voxel_size
    return views.box(mask, (float(edge[0]), float(edge[1]), float(edge[2])))


def around_head(
    result: MethodResult, values: NDArray | None
) -> tuple[views.Canonical, dict[str, int]]:
    """The part of ``values`` (on the grid of a result) around its head; its middle per plane."""
    if values is None or result.grid is None or result.mask is None:
        raise ValueError(f"{result.name} left no volume")
    mask = views.canonical(result.mask, result.grid)
    limits = head_limits(mask.data, mask.grid)
    part = views.crop(views.canonical(values, result.grid), limits)
    return part, middle_index(part.grid, part.grid.middle_of(views.crop(mask, limits).data))


def middle_index(grid: Grid, centre: NDArray[np.float64]) -> dict[str, int]:
    """Index, along the normal of each plane, of the section through ``centre`` (mm)."""
    index = np.clip(np.round(grid.to_index(centre)), 0, np.array(grid.shape) - 1).astype(int)
    return {plane: int(index[axis]) for plane, axis in views.NORMAL.items()}


def zoomed(
    pixels: NDArray[np.uint8], grid: Grid, plane: str, mm: float, corner: str = ""
) -> Image.Image:
    """A picture of ``plane`` with square pixels of ``mm`` and the letters of its edges."""
    large = views.enlarge(pixels, views.pixel_size(grid, plane), mm)
    return views.label_edges(large, plane, corner)


def coloured(values: NDArray, name: str) -> NDArray[np.uint8]:
    """(..., 3) colours of ``values`` from 0 to 1 in a map of matplotlib."""
    colours = matplotlib.colormaps[name](np.clip(values, 0, 1))
    return np.asarray(colours[..., :3] * 255 + 0.5).astype(np.uint8)
