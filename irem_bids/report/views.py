# SPDX-License-Identifier: Apache-2.0
"""Slices of volumes as grey pictures, always in radiological convention.

Axial and coronal pictures have the patient's right at the left edge; sagittal
ones have the front of the head at the left edge.  A picture is first an array
``(rows, columns)``, row 0 on top.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import map_coordinates

from ..reconstruction.geometry import Grid, RigidTransform
from ..reconstruction.stack import Stack

PLANES = ("axial", "coronal", "sagittal")
NORMAL = {"sagittal": 0, "coronal": 1, "axial": 2}  # axis of a RAS+ grid
EDGES = {  # left, right, top, bottom
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}
Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Canonical:
    """A volume with its axes permuted and flipped to be nearest to R, A, S.

    ``origin`` (3,) and ``sign`` (3,) lead back: index along the file's axis =
    ``origin + sign * canonical index``, in canonical order of axes.
    """

    data: NDArray
    grid: Grid
    origin: NDArray[np.int64]
    sign: NDArray[np.int64]
    file_axis: tuple[int, int, int]

    def file_index(self, axis: int, index: int) -> int:
        """Index along the file's own axis of a canonical ``index`` along ``axis``."""
        return int(self.origin[axis] + self.sign[axis] * index)


def canonical(data: NDArray, grid: Grid) -> Canonical:
    """Turn ``data`` (I, J, K) on ``grid`` to the nearest RAS+ order, without resampling."""
    orientation = nib.orientations.io_orientation(np.array(grid.affine))
    turned = nib.orientations.apply_orientation(np.asarray(data), orientation)
    back = nib.orientations.inv_ornt_aff(orientation, grid.shape)
    file_axis = np.argsort(orientation[:, 0])
    sign = orientation[file_axis, 1].astype(int)
    sizes = np.array(grid.shape)[file_axis]
    return Canonical(
        data=turned,
        grid=Grid(turned.shape, grid.affine @ back),
        origin=np.where(sign > 0, 0, sizes - 1),
        sign=sign,
        file_axis=(int(file_axis[0]), int(file_axis[1]), int(file_axis[2])),
    )


def picture(data: NDArray, plane: str, index: int) -> NDArray:
    """Slice ``index`` of a RAS+ array (X, Y, Z, ...) as (rows, columns, ...), radiological."""
    piece = np.take(data, index, axis=NORMAL[plane])[::-1, ::-1]
    return np.swapaxes(piece, 0, 1)


def pixel_size(grid: Grid, plane: str) -> tuple[float, float]:
    """(row, column) sizes in mm of a picture of ``plane`` from a RAS+ ``grid``."""
    column, row = (float(v) for i, v in enumerate(grid.voxel_size) if i != NORMAL[plane])
    return row, column


def slice_points(grid: Grid, plane: str, index: int) -> NDArray[np.float64]:
    """(rows, columns, 3) world points in mm of the pixels of a picture."""
    axes = [np.arange(n) for n in grid.shape]
    axes[NORMAL[plane]] = np.array([index])
    return picture(grid.to_world(np.stack(np.meshgrid(*axes, indexing="ij"), -1)), plane, 0)


def sample_stack(
    stack: Stack, pose: RigidTransform, points: NDArray[np.float64], *, order: int
) -> Picture:
    """Intensities of ``stack`` at ``points`` (..., 3) of reference space, 0 outside.

    ``pose`` maps the stack's scanner coordinates into reference space.
    """
    index = stack.grid.to_index(pose.inverse().apply(points))
    values = map_coordinates(
        stack.data,
        np.moveaxis(index, -1, 0),
        order=order,
        mode="grid-constant",
        cval=0.0,
        prefilter=False,
    )
    return np.asarray(values, dtype=np.float32)


def box(mask: NDArray[np.bool_], margin: tuple[float, float, float]) -> list[tuple[int, int]]:
    """(first, last + 1) along each axis of the voxels in ``mask``, ``margin`` voxels wider."""
    limits = []
    for axis, extra in enumerate(margin):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (hits[0], hits[-1] + 1) if hits.size else (0, mask.shape[axis])
        limits.append((max(0, int(low - extra)), min(mask.shape[axis], int(np.ceil(high + extra)))))
    return limits


def crop(volume: Canonical, limits: list[tuple[int, int]]) -> Canonical:
    """The part of a volume within ``limits`` (canonical axes)."""
    low = np.array([a for a, _ in limits])
    data = volume.data[tuple(slice(a, b) for a, b in limits)]
    affine = np.array(volume.grid.affine)
    affine[:3, 3] = volume.grid.to_world(low)
    return Canonical(
        data,
        Grid(data.shape, affine),
        volume.origin + volume.sign * low,
        volume.sign,
        volume.file_axis,
    )


def spread(limits: tuple[int, int], count: int) -> list[int]:
    """``count`` indices evenly over the middle nine tenths of ``limits``, without repeats."""
    low, high = limits
    inner = 0.05 * (high - low)
    places = np.linspace(low + inner, high - 1 - inner, min(count, high - low))
    return sorted({round(float(p)) for p in places})


def window(values: NDArray, low: float = 0.5, high: float = 99.5) -> tuple[float, float]:
    """Black and white levels: percentiles of foreground ``values``."""
    finite = np.asarray(values)[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    black, white = (float(v) for v in np.percentile(finite, [low, high]))
    black = min(black, 0.0) if black < 0.1 * white else black
    return black, white if white > black else black + 1.0


def grey(values: NDArray, levels: tuple[float, float]) -> NDArray[np.uint8]:
    """Values to 0-255 within ``levels`` (black, white)."""
    black, white = levels
    scaled = (np.nan_to_num(values) - black) / (white - black)
    return np.asarray(np.clip(scaled, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def enlarge(pixels: NDArray, size: tuple[float, float], mm_per_pixel: float) -> NDArray:
    """Nearest-neighbour copy with square pixels, so that voxels stay visible.

    ``size`` (row, column) in mm of one input pixel.
    """
    rows, columns = (
        np.minimum(
            np.arange(max(1, round(n * s / mm_per_pixel))) * mm_per_pixel / s + 1e-6, n - 1
        ).astype(int)
        for n, s in zip(pixels.shape[:2], size, strict=True)
    )
    return pixels[rows][:, columns]


def label_edges(pixels: NDArray[np.uint8], plane: str, corner: str = "") -> Image.Image:
    """A picture with the letters of its edges and a text in the upper left corner."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    height, width = pixels.shape[:2]
    size = int(np.clip(min(height, width) / 11, 10, 24))
    font = ImageFont.load_default(size=size)
    left, right, top, bottom = EDGES[plane]
    places = (
        (left, (3, height / 2), "lm"),
        (right, (width - 3, height / 2), "rm"),
        (top, (width / 2, 2), "ma"),
        (bottom, (width / 2, height - 2), "md"),
        (corner, (3, 2), "la"),
    )
    black, white = (0, 255) if pixels.ndim == 2 else ((0, 0, 0), (255, 255, 255))
    for text, place, anchor in places:
        if text:
            draw.text(
                place, text, fill=white, font=font, anchor=anchor, stroke_width=2, stroke_fill=black
            )
    return image


def montage(tiles: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Tiles in rows of ``columns`` on black."""
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new(tiles[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(
            tile,
            (
                column * (width + gap) + (width - tile.width) // 2,
                row * (height + gap) + (height - tile.height) // 2,
            ),
        )
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a PNG whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        image.save(temporary, format="PNG", compress_level=7)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
