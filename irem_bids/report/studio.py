# SPDX-License-Identifier: Apache-2.0
"""What every figure of a group shares: names of files, one window, letters at the edges."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..reconstruction.geometry import Grid
from . import views
from .material import Material

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
    edge = MARGIN / grid.voxel_size
    return views.box(mask, (float(edge[0]), float(edge[1]), float(edge[2])))


def zoomed(
    pixels: NDArray[np.uint8], grid: Grid, plane: str, mm: float, corner: str = ""
) -> Image.Image:
    large = views.enlarge(pixels, views.pixel_size(grid, plane), mm)
    return views.label_edges(large, plane, corner)
