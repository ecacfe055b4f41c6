# SPDX-License-Identifier: Apache-2.0
"""Is this image a stack?  Header, length, voxels; each refusal has its reason."""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reconstruction.geometry import GeometryError, Grid, plane, through_plane_axis
from .reconstruction.headers import VOXEL_RANGE, HeaderError, check_header, shear_degrees, world
from .reconstruction.stack import ImageError, read_image

MIN_SLICES = 4
MOST_SHEAR = 3.0  # degrees that axes may depart from right angles
MOST_SURPLUS = 2**26  # bytes behind the voxels that are still read, for the check sum
#: A sidecar's thickness is believed between these multiples of the slice spacing.
THICKNESS_RANGE = (0.1, 1.5)
_LOCALISER_LABEL = re.compile(r"^loc\d*$|locali[sz]|scout|survey|^3plane", re.IGNORECASE)
_LOCALISER_WORD = re.compile(r"locali[sz]er|scout|\bsurvey\b", re.IGNORECASE)


class NotAStack(ImageError):
    """A sound image of another kind; what is no :class:`NotAStack` is damaged."""


@dataclass(frozen=True)
class Header:
    """What the header says of a stack."""

    grid: Grid
    slice_axis: int
    plane: str
    in_plane: tuple[float, float]
    spacing: float
    doubts: tuple[str, ...] = ()


def reason_by_name(entities: dict[str, str]) -> str | None:
    """Why the file name alone rules an image out, or None."""
    if "rec" in entities:
        return f"rec-{entities['rec']}: the result of a reconstruction, not an acquired stack"
    if entities.get("part") in ("phase", "imag"):
        return f"part-{entities['part']}: not a magnitude image"
    for key in ("acq", "desc"):
        if _LOCALISER_LABEL.search(entities.get(key, "")):
            return f"{key}-{entities[key]}: a localiser"
    return None


def reason_by_sidecar(metadata: dict[str, Any]) -> str | None:
    """Why the sidecar rules an image out, or None."""
    for key in ("SeriesDescription", "ProtocolName"):
        value = metadata.get(key)
        if isinstance(value, str) and _LOCALISER_WORD.search(value):
            return f"{key} is {value!r}: a localiser"
    kinds = metadata.get("ImageType")
    if isinstance(kinds, list) and "LOCALIZER" in kinds:
        return "ImageType holds 'LOCALIZER': a localiser"
    return None


def read_header(path: Path, isotropic_ratio: float) -> Header:
    """Read and judge the header; the voxels are not read.

    The length of the file is compared with what the header promises, for
    compressed files by the length that gzip keeps in the last four bytes.

    Raises
    ------
    ImageError
        Not usable as a stack; the message is the reason, without the file's name.
    """
    import nibabel as nib

    if not path.exists():
        raise ImageError(
            "the file is missing: a link to nowhere; get its content first "
            f"(datalad get {path}, or git annex get)"
            if path.is_symlink()
            else "the file is missing"
        )
    if path.stat().st_size == 0:
        raise ImageError("the file is empty (0 bytes)")
    if not path.is_file():
        raise ImageError("is no file; expected a NIfTI image")
    try:
        listed = check_header(path)
        image: Any = nib.load(path)
        dtype = image.get_data_dtype()
        affine, doubts = world(image, listed)
    except HeaderError as error:
        raise ImageError(f"cannot be read as NIfTI: {error}") from error
    except Exception as error:  # nibabel, zlib and numpy raise many kinds for a broken header
        raise ImageError(
            f"cannot be read as NIfTI: truncated or damaged ({type(error).__name__}: {error})"
        ) from error
    shape = tuple(int(n) for n in image.shape)
    header = replace(_judge_geometry(shape, image, affine, isotropic_ratio), doubts=doubts)
    if dtype.kind not in "biuf":
        raise NotAStack(f"has values of type {dtype}; expected real numbers")
    expected = int(image.dataobj.offset) + dtype.itemsize * _product(shape)
    if not _long_enough(path, expected):
        raise ImageError(f"the file is truncated; its header promises {expected} bytes")
    return header


def check_voxels(path: Path) -> None:
    """Read the whole image.

    Raises
    ------
    ImageError
        Damaged, not finite, or the same value everywhere.
    """
    import nibabel as nib

    if path.suffix == ".gz":
        header: Any = nib.load(path)
        _check_sum(path, 16 * _product(header.shape) + MOST_SURPLUS)
    data, _ = read_image(path)
    if data.min() == data.max():
        raise ImageError(f"every voxel is {float(data.min()):g}; expected an image")


def slice_thickness(
    metadata: dict[str, Any], spacing: float, setting: float | None
) -> tuple[float, str, str | None]:
    """``(thickness in mm, source, warning)``: setting, plausible sidecar value, else spacing."""
    if setting is not None:
        return setting, "setting", None
    value = metadata.get("SliceThickness")
    if value is None:
        return spacing, "spacing", None
    low, high = (factor * spacing for factor in THICKNESS_RANGE)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and low <= value <= high:
        return float(value), "sidecar", None
    return (
        spacing,
        "spacing",
        f"SliceThickness {str(value)[:40]!r} in the sidecar is not plausible for slices "
        f"{spacing:g} mm apart; the spacing is used (--slice-thickness overrides)",
    )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _judge_geometry(
    shape: tuple[int, ...], image: Any, affine: NDArray[np.float64], isotropic_ratio: float
) -> Header:
    sizes = shape
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) == 2 or (len(sizes) == 3 and min(sizes) == 1):
        raise NotAStack(f"a single slice {sizes}")
    if len(sizes) != 3:
        raise NotAStack(f"has {len(sizes)} dimensions {sizes}; expected 3")
    codes = [int(image.header[key]) for key in ("qform_code", "sform_code") if key in image.header]
    if not any(codes):
        raise ImageError("the header has no orientation (qform and sform codes are 0)")
    try:
        grid = Grid(sizes, affine)
    except GeometryError as error:
        raise ImageError(str(error)) from error
    zooms = [float(v) for v in grid.voxel_size]
    if min(zooms) < VOXEL_RANGE[0] or max(zooms) > VOXEL_RANGE[1]:
        raise ImageError(f"voxels of {_millimetres(zooms)} are not plausible")
    if shear_degrees(affine) > MOST_SHEAR:
        raise ImageError(
            f"its axes are {shear_degrees(affine):.2g}° from right angles; resample it first"
        )
    axis = through_plane_axis(grid)
    in_plane = [v for number, v in enumerate(zooms) if number != axis]
    if zooms[axis] < isotropic_ratio * max(in_plane) - 1e-3:
        raise NotAStack(f"near-isotropic, {_millimetres(zooms)}: not a stack of thick slices")
    if sizes[axis] < MIN_SLICES:
        raise NotAStack(f"has {sizes[axis]} slices; a stack has {MIN_SLICES} or more")
    return Header(grid, axis, plane(grid, axis), (in_plane[0], in_plane[1]), zooms[axis])


def _millimetres(zooms: list[float]) -> str:
    return " × ".join(f"{v:.3g}" for v in zooms) + " mm"


def _check_sum(path: Path, most: int) -> None:
    """Decompress to the end, where gzip's check sum is; nibabel stops before it."""
    total = 0
    try:
        with gzip.open(path) as stream:
            while block := stream.read(2**20):
                total += len(block)
                if total > most:
                    raise ImageError(f"unpacks to more than {most} bytes, far behind its voxels")
    except (EOFError, OSError, zlib.error) as error:
        if "Not a gzipped file" in str(error):  # other bytes behind the complete image
            return
        raise ImageError(f"the file is damaged ({error})") from error


def _long_enough(path: Path, expected: int) -> bool:
    """Whether the (uncompressed) file has at least ``expected`` bytes."""
    if path.suffix != ".gz":
        return os.path.getsize(path) >= expected
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        (length,) = struct.unpack("<I", file.read(4))
    if length == expected % 2**32:
        return True
    # Several gzip members, bytes behind them, or a truncated file: only reading it tells.
    total = 0
    try:
        with gzip.open(path) as stream:
            while total < expected and (block := stream.read(2**20)):
                total += len(block)
    except (EOFError, OSError, zlib.error):
        pass  # what could be read before the damage decides
    return total >= expected
