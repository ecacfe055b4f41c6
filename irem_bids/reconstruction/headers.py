# SPDX-License-Identifier: Apache-2.0
"""NIfTI headers before any voxel is read: can they be true, and which of their parts counts?

A header is sixteen numbers that anybody could have written.  What cannot be true is
refused here, before memory is taken for it; where two parts disagree one stated rule
decides, and the reader is told.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .geometry import Grid

VOXEL_RANGE = (0.05, 50.0)  # mm; anything else is a broken header or another unit
MOST_EXTENSION_BYTES = 2**26
MOST_SHRUNK = 1040  # deflate packs no more than 1032 bytes into one
BYTES_PER_VOXEL = 16  # while an image is read: as stored, scaled, single precision
DISAGREEMENT = 1.0  # mm between qform and sform, at the corners, that is told
SIZES_DIFFER = 0.01  # relative, between the header's voxel sizes and the affine's
SHEAR_TOLD = 0.3  # degrees from a right angle
UNITS = {1: ("metres", 1e3), 2: ("millimetres", 1.0), 3: ("microns", 1e-3)}
_MAGIC = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0", b"ni2\0")}


class HeaderError(ValueError):
    """A header that cannot be true; the message is the reason, without the file's name."""


def check_header(path: str | Path) -> NDArray[np.float64] | None:
    """Refuse a NIfTI file whose header the file or the memory cannot hold.

    Returns its (3,) voxel sizes as they are listed, in its own unit and with their signs,
    which nibabel mends without a word.  None for other formats and missing files: they are
    left to the reader.

    Raises
    ------
    HeaderError
        Not NIfTI, sizes that are none, header extensions without end, more voxels than
        the file or the memory can hold.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")) or not path.is_file():
        return None
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            expected, voxels, listed = _read(file)
    except (EOFError, OSError, zlib.error) as error:
        raise HeaderError(f"truncated or damaged ({type(error).__name__}: {error})") from error
    size = os.path.getsize(path)
    if expected > (MOST_SHRUNK * size if packed else size):
        raise HeaderError(f"the file is truncated; its header promises {expected} bytes")
    memory = memory_bytes()
    if voxels * BYTES_PER_VOXEL > memory:
        raise HeaderError(
            f"its {voxels} voxels need {voxels * BYTES_PER_VOXEL / 1e9:.3g} GB to be read; this "
            f"process may use {memory / 1e9:.3g} GB"
        )
    return listed


def _read(file: BinaryIO | gzip.GzipFile) -> tuple[int, int, NDArray[np.float64]]:
    """``(bytes that the file must have, voxels, listed voxel sizes)``."""
    block = file.read(540)
    for order in "<>":
        length = struct.unpack(order + "i", block[:4])[0] if len(block) >= 4 else 0
        if length in _MAGIC and len(block) >= length:
            break
    else:
        if len(block) < min(_MAGIC):
            raise HeaderError(
                f"truncated: no NIfTI header at its start, only {len(block)} bytes of the "
                f"{min(_MAGIC)} that one has"
            )
        raise HeaderError(f"no NIfTI header at its start (found {bytes(block[:8])!r})")
    if length == 348:
        dims = struct.unpack(order + "8h", block[40:56])
        (bits,) = struct.unpack(order + "h", block[72:74])
        sizes = struct.unpack(order + "3f", block[80:92])
        (start,) = struct.unpack(order + "f", block[108:112])
        magic = block[344:348]
    else:
        (bits,) = struct.unpack(order + "h", block[14:16])
        dims = struct.unpack(order + "8q", block[16:80])
        sizes = struct.unpack(order + "3d", block[112:136])
        (start,) = struct.unpack(order + "q", block[168:176])
        magic = block[4:8]
    if magic not in _MAGIC[length]:
        raise HeaderError(f"its magic is {bytes(magic)!r}; expected {_MAGIC[length][0]!r}")
    rank = dims[0]
    if not 1 <= rank <= 7 or min(dims[1 : rank + 1]) < 1:
        raise HeaderError(f"its header gives {rank} sizes {list(dims[1:])}; expected 3 positive")
    if not math.isfinite(start) or not 0 <= start <= length + MOST_EXTENSION_BYTES:
        raise HeaderError(f"its voxels start at byte {start:g}, which cannot be")
    _check_extensions(file, block, length, int(start), order)
    voxels = math.prod(dims[1 : rank + 1])
    return int(start) + voxels * max(bits, 0) // 8, voxels, np.array(sizes)


def _check_extensions(
    file: BinaryIO | gzip.GzipFile, block: bytes, length: int, start: int, order: str
) -> None:
    """Extensions lie between header and voxels; one that claims more would be read whole."""
    block += file.read(max(0, start - len(block)))
    place = length + 4
    if len(block) < place or block[length] == 0:
        return
    while start - place >= 16 and len(block) >= place + 4:
        (size,) = struct.unpack(order + "i", block[place : place + 4])
        if not 8 <= size <= start - place:
            raise HeaderError(
                f"has a header extension of {size} bytes, where {start - place} are left for it"
            )
        place += size


def memory_bytes() -> float:
    """Memory of the machine or of this control group, bytes."""
    sizes = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            sizes.append(float(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # 'max', or no control groups
            continue
    return min(sizes)


def world(
    image: Any, listed: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine (4, 4) in mm of a nibabel image, and what is doubtful about it.

    The sform counts where its code is positive, else the qform.  A unit of metres or
    microns counts where it makes voxels that can be, else millimetres do.  ``listed`` is
    from :func:`check_header`.

    Raises
    ------
    HeaderError
        A voxel size of 0 or that is no number, where only the qform can place the image.
    """
    affine = np.array(image.affine, dtype=np.float64)
    header = image.header
    if listed is None or "xyzt_units" not in header:  # not NIfTI
        return affine, ()
    factor, doubts = _unit(int(header["xyzt_units"]) & 7, affine)
    doubts += _forms(image, factor) + _sizes(header, listed, affine)
    affine[:3] *= factor
    if (angle := shear_degrees(affine)) > SHEAR_TOLD:
        doubts.append(f"its axes are {angle:.2g}° from right angles")
    return affine, tuple(doubts)


def shear_degrees(affine: NDArray[np.float64]) -> float:
    """By how much the axes of an affine (4, 4) depart from right angles; 90 if singular."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(sizes).all() or sizes.min() <= 0:
        return 90.0
    axes = affine[:3, :3] / sizes
    cosines = np.abs((axes.T @ axes)[np.triu_indices(3, 1)])
    return float(np.rad2deg(np.arcsin(min(1.0, cosines.max()))))


def _plausible(sizes: NDArray[np.float64]) -> bool:
    return bool(sizes.min() >= VOXEL_RANGE[0] and sizes.max() <= VOXEL_RANGE[1])


def _unit(code: int, affine: NDArray[np.float64]) -> tuple[float, list[str]]:
    """Factor to millimetres."""
    name, factor = UNITS.get(code, UNITS[2])
    if factor == 1.0:
        return 1.0, []
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if _plausible(sizes * factor):
        return factor, [f"its unit is {name}: sizes were turned into millimetres"]
    if _plausible(sizes):
        return 1.0, [
            f"its unit is {name}, which makes voxels of {_times(sizes * factor)} mm: taken as "
            "millimetres"
        ]
    return factor, []


def _forms(image: Any, factor: float) -> list[str]:
    """Doubt where both forms are said to be valid and place the image differently."""
    header = image.header
    if int(header["qform_code"]) <= 0 or int(header["sform_code"]) <= 0:
        return []
    try:
        qform = np.array(header.get_qform(), dtype=np.float64)
        shape = [*image.shape, 1, 1, 1][:3]
        grids = [Grid(shape, form) for form in (qform, header.get_sform())]
    except Exception:  # a quaternion that is none; the sform does not need it
        return ["its qform cannot be read: the sform was used"]
    apart = float(np.linalg.norm(grids[0].corners() - grids[1].corners(), axis=1).max()) * factor
    if apart <= DISAGREEMENT:
        return []
    return [f"its qform and sform disagree by up to {apart:.3g} mm: the sform was used"]


def _sizes(header: Any, listed: NDArray[np.float64], affine: NDArray[np.float64]) -> list[str]:
    """Doubt where the voxel sizes that the header lists are not those of the affine."""
    finite = bool(np.isfinite(listed).all())
    if int(header["sform_code"]) <= 0:
        if int(header["qform_code"]) > 0 and (not finite or (listed == 0).any()):
            raise HeaderError(f"its voxel sizes are {_times(listed)}, and it has no sform")
        if listed.min() < 0:
            return [f"its voxel sizes are {_times(listed)}: the signs were ignored"]
        return []
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(sizes).all() or sizes.min() <= 0:
        return []  # refused as singular
    if finite and np.abs(np.abs(listed) / sizes - 1).max() <= SIZES_DIFFER:
        return []
    return [
        f"its voxel sizes are {_times(listed)} and those of its sform {_times(sizes)}: the "
        "sform was used"
    ]


def _times(sizes: NDArray[np.float64]) -> str:
    return " × ".join(f"{v:.3g}" for v in sizes)


def undoubted(block: bytes) -> bool:
    """Whether a little-endian NIfTI-1 header (348 bytes or more) leaves nothing to doubt.

    For readers that take a short way round nibabel: where this is false, :func:`world` has
    to decide.  It may be false for a sound header, never true for a doubtful one.
    """
    if not np.isfinite(struct.unpack_from("<2f", block, 112)).all():  # slope and intercept
        return False
    qcode, scode = struct.unpack_from("<2h", block, 252)
    qfac, *listed = struct.unpack_from("<4f", block, 76)
    sform = np.array(struct.unpack_from("<12f", block, 280), dtype=np.float64).reshape(3, 4)
    if scode <= 0 or block[123] & 7 not in (0, 2) or (len(block) > 348 and block[348] != 0):
        return False
    sizes = np.linalg.norm(sform[:, :3], axis=0)
    if not np.isfinite([*sizes, *listed]).all() or sizes.min() <= 0:
        return False
    if np.abs(np.abs(listed) / sizes - 1).max() > SIZES_DIFFER:
        return False
    if shear_degrees(np.vstack([sform, [0, 0, 0, 1]])) > SHEAR_TOLD:
        return False
    if qcode <= 0:
        return True
    b, c, d, *offset = struct.unpack_from("<6f", block, 256)
    square = 1.0 - (b * b + c * c + d * d)
    if not np.isfinite([square, *offset]).all() or square < -1e-6 or abs(qfac) != 1:
        return False
    a = math.sqrt(max(square, 0.0))
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ])  # fmt: skip
    form = np.column_stack([turn * [listed[0], listed[1], listed[2] * qfac], offset])
    _, *dims = struct.unpack_from("<4h", block, 40)
    ends = [(-0.5, n - 0.5) for n in dims]
    corners = np.array(np.meshgrid(*ends, [1.0])).reshape(4, -1)
    apart = np.linalg.norm((form - sform) @ corners, axis=0).max()
    return bool(apart < 0.9 * DISAGREEMENT)
