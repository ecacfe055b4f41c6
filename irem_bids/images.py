# SPDX-License-Identifier: Apache-2.0
"""Is this image a stack?  Header, length, voxels; each refusal has its reason."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .database import Database
from .reconstruction.geometry import GeometryError, Grid, plane, through_plane_axis
from .reconstruction.headers import (
    VOXEL_RANGE,
    HeaderError,
    check_header,
    shear_degrees,
    undoubted,
    world,
)
from .reconstruction.stack import ImageError, read_image

MIN_SLICES = 4
MOST_SHEAR = 3.0  # degrees that axes may depart from right angles
MOST_SURPLUS = 2**26  # bytes behind the voxels that are still read, for the check sum
#: A sidecar's thickness is believed between these multiples of the slice spacing.
THICKNESS_RANGE = (0.1, 1.5)
#: Fields of sidecars that are looked at here.
SIDECAR_FIELDS = (
    "SliceThickness", "SliceTiming", "SliceEncodingDirection", "SeriesDescription",
    "ProtocolName", "ImageType",
)  # fmt: skip
_HEADER_BYTES = 352  # with the flag of extensions
#: Codes of NIfTI for the types of voxels that scanners and converters write.
_DTYPES = {
    2: "uint8", 4: "int16", 8: "int32", 16: "float32", 64: "float64", 256: "int8", 512: "uint16",
    768: "uint32",
}  # fmt: skip
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


@dataclass(frozen=True)
class _RawHeader:
    """A NIfTI header as far as it is judged; ``affine`` row by row, mm; ``kind`` as numpy's."""

    shape: tuple[int, ...]
    affine: tuple[float, ...]
    oriented: bool
    dtype: str
    kind: str
    bytes_promised: int
    doubts: tuple[str, ...] = ()


def read_header(path: Path, isotropic_ratio: float, database: Database | None = None) -> Header:
    """Read and judge the header, or judge what ``database`` remembers; no voxel is read.

    The length of the file is compared with what the header promises, for
    compressed files by the length that gzip keeps in the last four bytes.

    Raises
    ------
    ImageError
        Not usable as a stack; the message is the reason, without the file's name.
    """
    memory = database or Database(path.parent)
    *values, doubts, long_enough = memory.recall(path, "header", lambda: _look(path))
    shape, affine, oriented, dtype, kind, promised = values
    raw = _RawHeader(tuple(shape), tuple(affine), oriented, dtype, kind, promised, tuple(doubts))
    header = replace(_judge_geometry(raw, isotropic_ratio), doubts=raw.doubts)
    if raw.kind not in "biuf":
        raise NotAStack(f"has values of type {raw.dtype}; expected real numbers")
    if not long_enough:
        raise ImageError(f"the file is truncated; its header promises {raw.bytes_promised} bytes")
    return header


def _look(path: Path) -> list[Any]:
    """Header and whether the file is long enough, as values of JSON's types."""
    try:
        size = path.stat().st_size
    except OSError as error:
        if not path.is_symlink() and path.exists():
            raise
        raise ImageError(
            "the file is missing: a link to nowhere; get its content first "
            f"(datalad get {path}, or git annex get)"
            if path.is_symlink()
            else "the file is missing"
        ) from error
    if size == 0:
        raise ImageError("the file is empty (0 bytes)")
    if not path.is_file():
        raise ImageError("is no file; expected a NIfTI image")
    try:
        listed = check_header(path)
    except HeaderError as error:
        raise ImageError(f"cannot be read as NIfTI: {error}") from error
    except Exception as error:  # nibabel, zlib and numpy raise many kinds for a broken header
        raise ImageError(_damaged(error)) from error
    raw = _plain_header(path) or _any_header(path, listed)
    return [
        list(raw.shape),
        list(raw.affine),
        raw.oriented,
        raw.dtype,
        raw.kind,
        raw.bytes_promised,
        list(raw.doubts),
        _long_enough(path, raw.bytes_promised),
    ]


def _plain_header(path: Path) -> _RawHeader | None:
    """The header of an ordinary NIfTI-1 file with an sform; None if it is anything else.

    Twenty times as fast as nibabel, which reads what is left.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            block = stream.read(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return None
    if len(block) < _HEADER_BYTES or block[344:348] != b"n+1\0":
        return None
    if struct.unpack_from("<i", block, 0)[0] != 348:
        return None
    if not undoubted(block):
        return None
    count, *sizes = struct.unpack_from("<8h", block, 40)
    code, bits = struct.unpack_from("<2h", block, 70)
    handed, offset = struct.unpack_from("<f", block, 76)[0], struct.unpack_from("<f", block, 108)[0]
    sform = struct.unpack_from("<h", block, 254)[0]
    dtype = _DTYPES.get(code)
    shape = tuple(sizes[: max(count, 0)])
    usual = dtype is not None and bits == 8 * np.dtype(dtype).itemsize
    usual = usual and abs(handed) == 1 and offset >= 352 and offset % 16 == 0
    if not usual or dtype is None or not 1 <= count <= 7 or min(shape) < 1 or sform <= 0:
        return None
    promised = int(offset) + np.dtype(dtype).itemsize * math.prod(shape)
    affine = (*struct.unpack_from("<12f", block, 280), 0.0, 0.0, 0.0, 1.0)
    return _RawHeader(shape, affine, True, dtype, np.dtype(dtype).kind, promised)


def _any_header(path: Path, listed: NDArray[np.float64] | None) -> _RawHeader:
    import nibabel as nib

    try:
        listed = check_header(path)
        image: Any = nib.load(path)
        dtype = image.get_data_dtype()
        shape = tuple(int(n) for n in image.shape)
        codes = [image.header[key] for key in ("qform_code", "sform_code") if key in image.header]
        matrix, doubts = world(image, listed)
        affine = tuple(float(v) for v in np.ravel(matrix))
        promised = int(image.dataobj.offset) + dtype.itemsize * math.prod(shape)
    except HeaderError as error:
        raise ImageError(f"cannot be read as NIfTI: {error}") from error
    except Exception as error:  # nibabel, zlib and numpy raise many kinds for a broken header
        raise ImageError(_damaged(error)) from error
    oriented = any(int(code) for code in codes)
    return _RawHeader(shape, affine, oriented, str(dtype), dtype.kind, promised, tuple(doubts))


def _damaged(error: Exception) -> str:
    return f"cannot be read as NIfTI: truncated or damaged ({type(error).__name__}: {error})"


def check_voxels(path: Path) -> None:
    """Read the whole image.

    Raises
    ------
    ImageError
        Damaged, not finite, or the same value everywhere.
    """
    import nibabel as nib

    if path.suffix == ".gz":
        try:
            image: Any = nib.load(path)
        except Exception as error:  # as where the header is read
            raise ImageError(_damaged(error)) from error
        _check_sum(path, 16 * math.prod(image.shape) + MOST_SURPLUS)
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


def slice_times(
    metadata: dict[str, Any], slices: int, axis: int
) -> tuple[tuple[float, ...] | None, str | None]:
    """``(seconds per slice along the array's axis, warning)`` of ``SliceTiming``.

    ``SliceEncodingDirection`` with a minus counts the slices from the other end (BIDS).
    """
    value = metadata.get("SliceTiming")
    if value is None or value == []:  # converters leave an empty list
        return None, None
    direction = str(metadata.get("SliceEncodingDirection", "ijk"[axis]))
    sound = isinstance(value, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if not sound or len(value) != slices or direction.rstrip("-") != "ijk"[axis]:
        count = f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
        return None, (
            f"SliceTiming ({count}, direction {direction[:8]!r}) does not fit {slices} slices "
            f"along {'ijk'[axis]}; the order of acquisition is guessed"
        )
    times = tuple(float(v) for v in value)
    return (times[::-1] if direction.endswith("-") else times), None


def _judge_geometry(raw: _RawHeader, isotropic_ratio: float) -> Header:
    sizes = raw.shape
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) == 2 or (len(sizes) == 3 and min(sizes) == 1):
        raise NotAStack(f"a single slice {sizes}")
    if len(sizes) != 3:
        raise NotAStack(f"has {len(sizes)} dimensions {sizes}; expected 3")
    if not raw.oriented:
        raise ImageError("the header has no orientation (qform and sform codes are 0)")
    try:
        grid = Grid(sizes, np.reshape(raw.affine, (4, 4)))
    except GeometryError as error:
        raise ImageError(str(error)) from error
    zooms = [float(v) for v in grid.voxel_size]
    if min(zooms) < VOXEL_RANGE[0] or max(zooms) > VOXEL_RANGE[1]:
        raise ImageError(f"voxels of {_millimetres(zooms)} are not plausible")
    if shear_degrees(grid.affine) > MOST_SHEAR:
        raise ImageError(
            f"its axes are {shear_degrees(grid.affine):.2g}° from right angles; resample it first"
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
