# SPDX-License-Identifier: Apache-2.0
"""A stack of thick slices, and NIfTI in and out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .geometry import Grid, plane, through_plane_axis
from .headers import HeaderError, check_header, world

FloatImage = NDArray[np.float32]
Mask = NDArray[np.bool_]


class ImageError(ValueError):
    """An image that cannot be used: unreadable, not 3D, not finite, empty."""


@dataclass(frozen=True)
class Stack:
    """One acquired stack.

    Attributes
    ----------
    label
        Name within its group, letters and digits: ``axial1``, ``coronal1`` ...
    data
        (I, J, K) float32 intensities.
    grid
        Voxel centres in the scanner's coordinates of this stack, RAS+ mm.
    slice_axis
        Axis of ``data`` along which slices follow each other.
    slice_thickness
        Width of the slice profile in mm; differs from the spacing when there is a gap.
    mask
        (I, J, K) foreground.
    slice_times
        When each slice was acquired, s, where that is known (``SliceTiming``).
    """

    label: str
    data: FloatImage
    grid: Grid
    slice_axis: int
    slice_thickness: float
    mask: Mask
    slice_times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.data.shape != self.grid.shape or self.mask.shape != self.grid.shape:
            raise ImageError(
                f"{self.label}: data {self.data.shape}, mask {self.mask.shape} and grid "
                f"{self.grid.shape} must have one shape"
            )

    @property
    def spacing(self) -> float:
        """Distance of neighbouring slice centres, mm."""
        return float(self.grid.voxel_size[self.slice_axis])

    @property
    def in_plane(self) -> tuple[float, float]:
        """Voxel sizes within a slice, mm."""
        sizes = [float(v) for i, v in enumerate(self.grid.voxel_size) if i != self.slice_axis]
        return sizes[0], sizes[1]

    @property
    def plane(self) -> str:
        """'axial', 'coronal' or 'sagittal'."""
        return plane(self.grid, self.slice_axis)

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) unit vector along increasing slice index, RAS+."""
        return self.grid.directions[:, self.slice_axis]

    def by_slice(self, values: ArrayLike) -> NDArray:
        """(I, J, K) view of ``values`` (K,) of the slices, or of the one for all."""
        each = np.broadcast_to(values, (self.grid.shape[self.slice_axis],))
        across = tuple(a for a in range(3) if a != self.slice_axis)
        return np.broadcast_to(np.expand_dims(each, across), self.grid.shape)

    @property
    def empty_slices(self) -> list[int]:
        """Slices of one value between slices that have several.

        They hold nothing: a scanner or a converter dropped them.  At the ends it may be air.
        """
        across = tuple(a for a in range(3) if a != self.slice_axis)
        known = np.flatnonzero(self.data.max(across) > self.data.min(across))
        between = range(known[0], known[-1]) if len(known) else range(0)
        return sorted(set(between) - set(known.tolist()))

    @property
    def empty(self) -> Mask:
        """(I, J, K) voxels of :attr:`empty_slices`."""
        slices = np.arange(self.grid.shape[self.slice_axis])
        return self.by_slice(np.isin(slices, self.empty_slices))

    def filled(self) -> Stack:
        """The stack with its empty slices between their neighbours: for what interpolates it."""
        if not (empty := self.empty_slices):
            return self
        data = np.moveaxis(self.data.copy(), self.slice_axis, 0)
        known = np.setdiff1d(np.arange(len(data)), empty)
        for k in empty:
            low, high = known[known < k][-1], known[known > k][0]
            share = np.float32((k - low) / (high - low))
            data[k] = (1 - share) * data[low] + share * data[high]
        return self.with_data(np.moveaxis(data, 0, self.slice_axis))

    def with_data(self, data: NDArray, mask: Mask | None = None) -> Stack:
        """The same stack with other intensities (and mask)."""
        new_mask = self.mask if mask is None else np.asarray(mask, dtype=bool)
        return replace(self, data=np.asarray(data, dtype=np.float32), mask=new_mask)


def read_image(path: str | Path) -> tuple[FloatImage, Grid]:
    """Read a 3D NIfTI image.

    Trailing axes of length 1 are dropped.  The affine is the sform where its
    code is positive, else the qform, as nibabel and ITK-SNAP do; units as in
    :func:`.headers.world`.  No memory is taken before the header has been judged.

    Raises
    ------
    ImageError
        The message says what was found and what was expected.
    """
    import nibabel as nib

    name = Path(path).name
    try:
        listed = check_header(path)
        image: Any = nib.load(path)
        affine, _ = world(image, listed)
        data = np.asanyarray(image.dataobj)
    except FileNotFoundError as error:
        raise ImageError(
            f"{name}: the file is missing (a link to nowhere? try 'datalad get')"
        ) from error
    except HeaderError as error:
        raise ImageError(f"{name}: cannot be read as NIfTI: {error}") from error
    except Exception as error:  # nibabel, zlib and numpy raise many kinds for a broken file
        raise ImageError(
            f"{name}: cannot be read as NIfTI ({type(error).__name__}: {error})"
        ) from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise ImageError(f"{name}: has {data.ndim} dimensions {data.shape}; expected 3")
    if data.dtype.kind not in "biuf":
        raise ImageError(f"{name}: has values of type {data.dtype}; expected real numbers")
    with np.errstate(over="ignore"):  # what single precision cannot hold is told as infinite
        data = np.asarray(data, dtype=np.float32)
    if not np.isfinite(data).all():
        count = int((~np.isfinite(data)).sum())
        raise ImageError(f"{name}: {count} voxels are NaN or infinite; expected finite intensities")
    return data, Grid(data.shape, affine)


def write_image(path: str | Path, data: NDArray, grid: Grid) -> Path:
    """Write a NIfTI image (float32, or uint8 for booleans) whole or not at all."""
    import nibabel as nib

    path = Path(path)
    array = data.astype(np.uint8) if data.dtype == bool else np.asarray(data, dtype=np.float32)
    image = nib.Nifti1Image(array, np.array(grid.affine))
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_stack(
    path: str | Path,
    *,
    label: str,
    slice_thickness: float | None = None,
    mask_path: str | Path | None = None,
    slice_times: Sequence[float] | None = None,
) -> Stack:
    """Read a stack; the slice axis is the one with the largest voxels.

    ``slice_thickness`` in mm defaults to the slice spacing.  Without a mask
    every voxel is foreground.  A mask on another grid is resampled by nearest
    neighbour where it covers the stack.
    """
    data, grid = read_image(path)
    axis = through_plane_axis(grid)
    thickness = float(grid.voxel_size[axis]) if slice_thickness is None else float(slice_thickness)
    mask = np.ones(data.shape, dtype=bool)
    if mask_path is not None:
        mask = read_mask(mask_path, grid)
    times = None if slice_times is None else tuple(slice_times)
    return Stack(label, data, grid, axis, thickness, mask, times)


def read_mask(path: str | Path, grid: Grid) -> Mask:
    """Read a mask onto ``grid`` (nearest neighbour where the grids differ).

    Raises
    ------
    ImageError
        The mask is empty on ``grid``; both grids are printed.
    """
    from scipy.ndimage import map_coordinates

    values, mask_grid = read_image(path)
    if mask_grid == grid:
        mask = values > 0.5
    else:
        indices = np.indices(grid.shape).reshape(3, -1).T
        positions = mask_grid.to_index(grid.to_world(indices)).T
        mask = (
            map_coordinates(
                (values > 0.5).astype(np.uint8), positions, order=0, mode="constant", cval=0
            ).reshape(grid.shape)
            > 0
        )
    if not mask.any():
        raise ImageError(
            f"{Path(path).name}: no voxel of the mask lies in the image; "
            f"mask grid {mask_grid.shape} {mask_grid.affine.round(3).tolist()}, "
            f"image grid {grid.shape} {grid.affine.round(3).tolist()}"
        )
    return mask
