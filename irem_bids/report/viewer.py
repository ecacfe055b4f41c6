# SPDX-License-Identifier: Apache-2.0
"""Volumes for the viewer of the page: every method and stack on one grid, at bounded size.

A volume travels in the page as one WebP picture of its axial sections, side by side, so that
the viewer needs no file, no network and no library.  The figures stay the place for voxel-true
detail: these pictures are compressed.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ..reconstruction.geometry import Grid, RigidTransform
from ..reconstruction.stack import FloatImage, Stack
from . import uncertainty, views
from .material import Material, MethodResult
from .studio import Studio, head_limits

LONGEST = 192  # voxels along the longest side of the grid
QUALITY = 85  # of the compression; hardly visible
MOST = 12  # volumes of a page


@dataclass(frozen=True)
class Volume:
    """One image: ``data`` is the base64 text of a WebP picture with ``columns`` tiles a row.

    ``ends`` are the intensities, in units of the image, that are black and white.
    """

    name: str
    kind: str  # 'method', 'std' or 'stack'
    columns: int
    ends: tuple[float, float]
    data: str


@dataclass(frozen=True)
class Viewer:
    """What the page embeds: ``shape`` in voxels of ``voxel`` mm, axes R, A, S.

    ``origin`` is the world position (mm) of the first voxel, ``axes`` (9,) the columns of the
    directions, ``start`` the voxel that the cursor is at first.
    """

    shape: tuple[int, int, int]
    voxel: float
    origin: tuple[float, ...]
    axes: tuple[float, ...]
    start: tuple[int, int, int]
    volumes: tuple[Volume, ...]


def build(studio: Studio) -> Viewer | None:
    """The volumes of a group; ``None`` where nothing was reconstructed."""
    material = studio.material
    done = [m for m in material.methods.values() if m.volume is not None and m.grid is not None]
    if material.prepared is None or not done:
        return None
    grid, start = common_grid(done[0])
    scale, most = material.prepared.scale, uncertainty.top(material)
    black, white = (level * scale for level in studio.levels)
    volumes = []
    for result in done:
        values = _resampled(result, result.volume, grid)
        volumes.append(_volume(result.name, "method", values, (black, white)))
    for result in done:
        if result.std is not None:
            name = f"{result.name} uncertainty"
            volumes.append(_volume(name, "std", _resampled(result, result.std, grid), (0.0, most)))
    for stack, pose in _stacks(material, done[0])[: MOST - len(volumes)]:
        values = sample(stack, pose, grid, order=0) * scale
        volumes.append(_volume(stack.label, "stack", values, (black, white)))
    return Viewer(
        shape=(grid.shape[0], grid.shape[1], grid.shape[2]),
        voxel=float(grid.voxel_size[0]),
        origin=tuple(round(float(v), 4) for v in grid.to_world([0, 0, 0])),
        axes=tuple(round(float(v), 6) for v in grid.directions.T.ravel()),
        start=start,
        volumes=tuple(volumes),
    )


def common_grid(result: MethodResult) -> tuple[Grid, tuple[int, int, int]]:
    """A grid around the head, near RAS, :data:`LONGEST` voxels at most; the head's middle."""
    if result.mask is None or result.grid is None:
        raise ValueError(f"{result.name} left no volume")
    mask = views.canonical(result.mask, result.grid)
    part = views.crop(mask, head_limits(mask.data, mask.grid))
    extent = float((np.array(part.grid.shape) * part.grid.voxel_size).max())
    voxel = max(float(part.grid.voxel_size.min()), extent / LONGEST)
    grid = part.grid.resampled(voxel)
    centre = part.grid.middle_of(part.data)
    index = np.clip(np.round(grid.to_index(centre)), 0, np.array(grid.shape) - 1).astype(int)
    return grid, (int(index[0]), int(index[1]), int(index[2]))


def _stacks(material: Material, first: MethodResult) -> list[tuple[Stack, RigidTransform]]:
    prepared = material.prepared
    if prepared is None:
        return []
    pairs = zip(prepared.stacks, prepared.poses, strict=True)
    return [(stack, first.poses.get(stack.label, pose)) for stack, pose in pairs]


def _resampled(result: MethodResult, volume: FloatImage | None, grid: Grid) -> NDArray[np.float32]:
    """A volume of a result on ``grid``, smoothed before where that is coarser."""
    if volume is None or result.grid is None:
        raise ValueError(f"{result.name} left no volume")
    data = np.asarray(volume, dtype=np.float32)
    factor = float(grid.voxel_size[0] / result.grid.voxel_size.min())
    if factor > 1.2:
        data = ndimage.gaussian_filter(data, 0.4 * factor)
    shell = Stack(result.name, data, result.grid, 2, 1.0, np.ones(data.shape, dtype=bool))
    return sample(shell, RigidTransform(), grid, order=1)


def sample(stack: Stack, pose: RigidTransform, grid: Grid, *, order: int) -> NDArray[np.float32]:
    """(X, Y, Z) intensities of a stack at the voxels of ``grid``, slab by slab, 0 outside."""
    out = np.empty(grid.shape, dtype=np.float32)
    plane = np.moveaxis(np.indices((grid.shape[0], grid.shape[1], 1)), 0, -1)[:, :, 0]
    for z in range(grid.shape[2]):
        points = grid.to_world(plane + np.array([0, 0, z]))
        out[:, :, z] = views.sample_stack(stack, pose, points, order=order)
    return out


def _volume(
    name: str, kind: str, intensities: NDArray[np.float32], ends: tuple[float, float]
) -> Volume:
    """(X, Y, Z) intensities as tiles: column along X, row along Y, one tile per Z."""
    values = views.grey(intensities, ends)
    x, y, z = values.shape
    columns = max(1, round(np.sqrt(z * y / x)))
    rows = -(-z // columns)
    tiles = np.zeros((rows * columns, y, x), dtype=np.uint8)
    tiles[:z] = values.transpose(2, 1, 0)
    sheet = tiles.reshape(rows, columns, y, x).swapaxes(1, 2).reshape(rows * y, columns * x)
    buffer = io.BytesIO()
    Image.fromarray(sheet).convert("RGB").save(buffer, "WEBP", quality=QUALITY, method=2)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Volume(name, kind, columns, ends, data)
