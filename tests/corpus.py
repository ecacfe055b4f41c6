# SPDX-License-Identifier: Apache-2.0
"""A corpus of bad inputs: what is wrong, and what the app has to say of it.

Each case is a small stack that one thing was done to.  ``says`` are words of the reason
for which it is left out, ``doubt`` words of the warning with which it is used; a case with
neither is used in silence, because nothing is wrong with it.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from irem_bids.reconstruction.geometry import Grid

from .stacks import AXES, write_description

LABELS = {"ax": "axial", "cor": "coronal", "sag": "sagittal"}
SHAPE, STEPS = (12, 12, 6), (2.5, 2.5, 6.0)
Edit = Callable[[nib.Nifti1Header], None]


def small_stack(plane: str, seed: int = 0) -> tuple[np.ndarray, Grid]:
    """(12, 12, 6) float32 noise and a grid about the origin, slices along the last axis."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(AXES[plane])] * STEPS
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2.0)
    values = np.random.default_rng(seed).uniform(10, 500, SHAPE)
    return values.astype(np.float32), Grid(SHAPE, affine)


def nifti_bytes(
    data: np.ndarray,
    affine: np.ndarray,
    *,
    edit: Edit | None = None,
    order: str = "<",
    extension: bytes = b"",
    qform: np.ndarray | None = None,
) -> bytes:
    """A NIfTI-1 file whose header ``edit`` may break in any way; nothing is checked."""
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_zooms([*nib.affines.voxel_sizes(affine), *[1.0] * (data.ndim - 3)])
    header.set_qform(affine if qform is None else qform, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm", "sec")
    header["magic"], header["vox_offset"] = b"n+1", 352 + len(extension)
    if edit is not None:
        edit(header)
    flag = b"\1\0\0\0" if extension else b"\0\0\0\0"
    body = data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")
    return header.structarr.tobytes() + flag + extension + body


@dataclass(frozen=True)
class Case:
    """``make(plane)`` gives the bytes of the unpacked file; ``pack`` what is done to them."""

    make: Callable[[str], bytes]
    says: str = ""
    doubt: str = ""
    pack: Callable[[bytes], bytes] = lambda content: gzip.compress(content, 1, mtime=0)


def fields(**values: Any) -> Callable[[str], bytes]:
    """A stack whose header has these fields."""

    def make(plane: str) -> bytes:
        def edit(header: nib.Nifti1Header) -> None:
            for name, value in values.items():
                header[name] = value

        data, grid = small_stack(plane)
        return nifti_bytes(data, grid.affine, edit=edit)

    return make


def values_of(change: Callable[[np.ndarray], np.ndarray], **options: Any) -> Callable[[str], bytes]:
    """A stack with other values."""

    def make(plane: str) -> bytes:
        data, grid = small_stack(plane)
        return nifti_bytes(change(data), grid.affine, **options)

    return make


def placed(change: Callable[[np.ndarray], np.ndarray], **edits: Any) -> Callable[[str], bytes]:
    """A stack with another sform; listed voxel sizes and qform stay."""

    def make(plane: str) -> bytes:
        data, grid = small_stack(plane)
        affine = change(np.array(grid.affine))

        def edit(header: nib.Nifti1Header) -> None:
            for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
                header[name] = affine[row]
            for name, value in edits.items():
                header[name] = value

        return nifti_bytes(data, grid.affine, edit=edit)

    return make


def only_qform(**edits: Any) -> Callable[[str], bytes]:
    """A stack without sform."""
    return fields(sform_code=0, **edits)


def scaled(factor: float, unit: int) -> Callable[[str], bytes]:
    """A stack in another unit (1 metres, 2 millimetres, 3 microns), sizes times ``factor``."""

    def make(plane: str) -> bytes:
        data, grid = small_stack(plane)
        affine = np.array(grid.affine)
        affine[:3] *= factor
        return nifti_bytes(data, affine, edit=lambda header: header.__setitem__("xyzt_units", unit))

    return make


def sheared(degrees: float) -> Callable[[str], bytes]:
    def make(plane: str) -> bytes:
        data, grid = small_stack(plane)
        affine = np.array(grid.affine)
        angle = np.deg2rad(degrees)
        affine[:3, 0] = (
            np.cos(angle) * affine[:3, 0] + np.sin(angle) * affine[:3, 1]
        )  # both have one size
        return nifti_bytes(data, affine, qform=np.array(grid.affine))

    return make


def turned(plane: str) -> bytes:
    data, grid = small_stack(plane)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    return nifti_bytes(data, grid.affine, qform=flip @ np.array(grid.affine))


def with_extension(size: int | None) -> Callable[[str], bytes]:
    """An extension that says it has ``size`` bytes (None: the truth)."""

    def make(plane: str) -> bytes:
        data, grid = small_stack(plane)
        content = b"PatientName=Nobody".ljust(56, b"\0")
        said = np.array([64 if size is None else size, 6], "<i4").tobytes()
        return nifti_bytes(data, grid.affine, extension=said + content)

    return make


def nan_at(data: np.ndarray) -> np.ndarray:
    data[2, 3, 4] = np.nan
    return data


def inf_at(data: np.ndarray) -> np.ndarray:
    data[2, 3, 4] = -np.inf
    return data


def nan_intercept(header: nib.Nifti1Header) -> None:
    header["scl_slope"], header["scl_inter"] = 1, np.nan


def rgb(data: np.ndarray) -> np.ndarray:
    return np.zeros(data.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


def dims(*sizes: int) -> Callable[[str], bytes]:
    return fields(dim=[*sizes, *[1] * (8 - len(sizes))])


def bomb(content: bytes) -> bytes:
    """Packed, with a long tail of zeros that packs to little."""
    tail = gzip.compress(bytes(2**20), 9, mtime=0)
    return gzip.compress(content, 1, mtime=0) + 120 * tail


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


IMAGES: dict[str, Case] = {
    "whole": Case(fields()),
    "truncated": Case(fields(), "truncated", pack=lambda c: _packed(c)[:-600]),
    "truncated inside": Case(fields(), "truncated", pack=lambda c: _packed(c[:-100])),
    "header cut": Case(fields(), "no NIfTI header", pack=lambda c: _packed(c[:100])),
    "header and no voxels": Case(fields(), "truncated", pack=lambda c: _packed(c[:352])),
    "empty archive": Case(fields(), "no NIfTI header", pack=lambda c: _packed(b"")),
    "no archive": Case(fields(), "cannot be read as NIfTI", pack=lambda c: c),
    "wrong magic": Case(fields(magic=b"n-1"), "its magic is b'n-1"),
    "wrong length of header": Case(fields(sizeof_hdr=7), "no NIfTI header at its start"),
    "huge dims": Case(dims(3, 30000, 30000, 30000), "the file is truncated"),
    "dims that overflow": Case(
        fields(dim=[7, 32767, 32767, 32767, 32767, 32767, 32767, 32767]), "truncated"
    ),
    "negative dims": Case(dims(3, 12, -12, 6), "its header gives 3 sizes"),
    "no dims": Case(dims(0), "its header gives 0 sizes"),
    "nine dims": Case(dims(9, 12, 12, 6), "its header gives 9 sizes"),
    "voxels start at infinity": Case(fields(vox_offset=np.inf), "which cannot be"),
    "voxels start behind the end": Case(fields(vox_offset=2e7), "truncated"),
    "unknown type": Case(fields(datatype=9999), "cannot be read as NIfTI"),
    "zero zooms": Case(only_qform(pixdim=[1, 0, 0, 0, 1, 1, 1, 1]), "and it has no sform"),
    "negative zooms": Case(
        only_qform(pixdim=[-1, -2.5, 2.5, 6, 1, 1, 1, 1]), doubt="the signs were ignored"
    ),
    "other zooms": Case(
        fields(pixdim=[1, 1, 1, 1, 1, 1, 1, 1]), doubt="those of its sform 2.5 × 2.5 × 6"
    ),
    "NaN zooms": Case(fields(pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1]), doubt="those of its sform"),
    "singular": Case(placed(lambda a: a @ np.diag([1, 1, 0, 1])), "the affine is singular"),
    "NaN affine": Case(placed(lambda a: a * np.nan), "the affine is not finite"),
    "sheared": Case(sheared(20), "from right angles; resample it first"),
    "a little sheared": Case(sheared(1), doubt="axes are 1° from right angles"),
    "qform against sform": Case(turned, doubt="qform and sform disagree by up to"),
    "qform that is none": Case(
        fields(quatern_b=2.0, quatern_c=2.0), doubt="its qform cannot be read"
    ),
    "no orientation": Case(fields(sform_code=0, qform_code=0), "has no orientation"),
    "metres": Case(scaled(1e-3, 1), doubt="turned into millimetres"),
    "microns": Case(scaled(1e3, 3), doubt="turned into millimetres"),
    "wrong unit": Case(scaled(1, 1), doubt="taken as millimetres"),
    "millimetres in metres": Case(scaled(1e-3, 2), "are not plausible"),
    "4D": Case(values_of(lambda d: np.stack([d, d], 3)), "has 4 dimensions (12, 12, 6, 2)"),
    "4D of one": Case(values_of(lambda d: d[..., None])),
    "one slice": Case(values_of(lambda d: d[:, :, :1]), "a single slice"),
    "RGB": Case(values_of(rgb), "expected real numbers"),
    "complex": Case(values_of(lambda d: d.astype(np.complex64)), "expected real numbers"),
    "NaN": Case(values_of(nan_at), "1 voxels are NaN or infinite"),
    "infinite": Case(values_of(inf_at), "1 voxels are NaN or infinite"),
    "beyond single": Case(
        values_of(lambda d: d.astype(np.float64) * 1e300), "864 voxels are NaN or infinite"
    ),
    "all zero": Case(values_of(lambda d: 0 * d), "every voxel is 0"),
    "constant": Case(values_of(lambda d: 0 * d + 7), "every voxel is 7"),
    "slope 0": Case(
        values_of(
            lambda d: d.astype(np.int16), edit=lambda header: header.__setitem__("scl_slope", 0)
        )
    ),
    "infinite slope": Case(
        values_of(
            lambda d: d.astype(np.int16), edit=lambda header: header.__setitem__("scl_slope", 1e38)
        ),
        "voxels are NaN or infinite",
    ),
    "NaN intercept": Case(
        values_of(lambda d: d.astype(np.int16), edit=nan_intercept), "invalid intercept"
    ),
    "big-endian": Case(values_of(lambda d: d, order=">")),
    "bomb": Case(fields(), "unpacks to more than", pack=bomb),
    "extension": Case(with_extension(None)),
    "extension without end": Case(with_extension(2**31 - 16), "has a header extension of"),
    "extension of no length": Case(with_extension(0), "has a header extension of 0 bytes"),
}

#: Text of a sidecar to words of the warning, '' for none.
SIDECARS: dict[str, tuple[str, str]] = {
    "good": ('{"SliceThickness": 6.0}', ""),
    "not JSON": ("{", "is not valid JSON"),
    "no text": ("\xff\xfe\0", "is not valid JSON"),
    "an array": ("[1, 2]", "holds a list, expected an object"),
    "a number": ("5", "holds a int, expected an object"),
    "deep": ("[" * 100000, "is not valid JSON"),
    "long number": ('{"SliceThickness": ' + "9" * 5000 + "}", "is not valid JSON"),
    "thickness 0": ('{"SliceThickness": 0}', "is not plausible"),
    "thickness 5000": ('{"SliceThickness": 5000}', "is not plausible"),
    "thickness -3": ('{"SliceThickness": -3}', "is not plausible"),
    "thickness text": ('{"SliceThickness": "6"}', "is not plausible"),
    "thickness true": ('{"SliceThickness": true}', "is not plausible"),
    "thickness array": ('{"SliceThickness": [6, 6]}', "is not plausible"),
    "thickness NaN": ('{"SliceThickness": NaN}', "is not plausible"),
    "thickness infinite": ('{"SliceThickness": 1e999}', "is not plausible"),
    "thickness null": ('{"SliceThickness": null}', ""),
    "wide gap": ('{"SliceThickness": 3}', "leave a gap of 3 mm"),
    "overlap": ('{"SliceThickness": 8}', "leave an overlap of 2 mm"),
    "other types": ('{"SeriesDescription": [1], "ImageType": {"a": 1}, "ProtocolName": 7}', ""),
}


def write_image_case(path: Path, plane: str, case: Case) -> Path:
    """Write one case as a ``.nii.gz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.pack(case.make(plane)))
    return path


def image_path(root: Path, label: str, subject: str = "01") -> Path:
    return root / f"sub-{subject}" / "anat" / f"sub-{subject}_acq-{label}_T1w.nii.gz"


def write_dataset(root: Path, subject: str = "01") -> Path:
    """A dataset of three small good stacks."""
    write_description(root)
    for label, plane in LABELS.items():
        write_image_case(image_path(root, label, subject), plane, IMAGES["whole"])
    return root


# ------------------------------------------------------------------------------------ trees
def loops(root: Path) -> None:
    """Links that lead back into the tree, to themselves and to nowhere."""
    (root / "sub-01" / "anat" / "up").symlink_to("../..")
    (root / "sub-01" / "ses-1").symlink_to(".")
    (root / "sub-01" / "self").symlink_to("self")
    (root / "sub-02").symlink_to("sub-01/nowhere")


def odd_names(root: Path) -> None:
    """Odd Unicode, spaces, bytes that are no text, and names of 255 bytes."""
    anat = root / "sub-01" / "anat"
    content = _packed(IMAGES["whole"].make("axial"))
    for name in ("sub-01_acq-a b_T1w", "sub-01_acq-\u202e\u0301_T1w", "sub-01_acq-é_T1w"):
        (anat / f"{name}.nii.gz").write_bytes(content)
    (anat / ("x" * 248 + ".nii.gz")).write_bytes(content)
    (Path(os.fsdecode(os.fsencode(anat) + b"/sub-01_acq-\xff_T1w.nii.gz"))).write_bytes(content)
    (root / "sub-é ü").mkdir()
    (root / "sub-").mkdir()


def many_files(root: Path, count: int = 10000) -> None:
    anat = root / "sub-01" / "anat"
    for number in range(count):
        (anat / f"note{number}.txt").touch()


def case_twins(root: Path) -> None:
    anat = root / "sub-01" / "anat"
    content = (anat / "sub-01_acq-ax_T1w.nii.gz").read_bytes()
    (anat / "sub-01_acq-AX_T1w.nii.gz").write_bytes(content)
    (anat / "sub-01_acq-ax_t1w.nii.gz").write_bytes(content)


def no_files(root: Path) -> None:
    """Pipes and folders where files are expected."""
    anat = root / "sub-01" / "anat"
    os.mkfifo(anat / "sub-01_acq-ax_T1w.json")
    os.mkfifo(anat / "sub-01_acq-pipe_T1w.nii.gz")
    (anat / "sub-01_acq-folder_T1w.nii.gz").mkdir()
    (anat / "sub-01_acq-cor_T1w.json").mkdir()


TREES: dict[str, Callable[[Path], None]] = {
    "loops of links": loops,
    "odd names": odd_names,
    "many files": many_files,
    "case twins": case_twins,
    "no files": no_files,
}


# ------------------------------------------------------------------------------------ masks
def write_mask(folder: Path, label: str, values: np.ndarray, grid: Grid) -> Path:
    """A mask of the stack ``label`` in a derivative dataset."""
    path = folder / "sub-01" / "anat" / f"sub-01_acq-{label}_desc-brain_mask.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_packed(nifti_bytes(values, np.array(grid.affine))))
    return path


def half() -> np.ndarray:
    values = np.zeros(SHAPE, np.uint8)
    values[3:9, 3:9, 1:5] = 1
    return values


#: Values on the stack's own grid, reason for leaving the stack out, warning.
MASKS: dict[str, tuple[Callable[[], np.ndarray], str, str]] = {
    "good": (half, "", ""),
    "of 255": (lambda: half() * np.uint8(255), "", ""),
    "empty": (lambda: 0 * half(), "no voxel of the mask lies in the image", ""),
    "all ones": (lambda: 0 * half() + 1, "", "holds every voxel"),
    "non-binary": (lambda: half() * np.arange(6, dtype=np.uint8), "", "more than two values"),
    "probabilities": (lambda: half() * np.linspace(0, 1, 6, dtype=np.float32), "", "more than two"),
    "NaN": (lambda: half() * np.float32(np.nan), "NaN or infinite", ""),
    "4D": (lambda: np.stack([half(), half()], 3), "has 4 dimensions", ""),
}


def write_sidecar(root: Path, label: str, text: str) -> Path:
    path = image_path(root, label).with_name(f"sub-01_acq-{label}_T1w.json")
    path.write_bytes(text.encode("latin-1"))
    return path


def description(root: Path, **fields_: Any) -> None:
    """Another ``dataset_description.json``."""
    (root / "dataset_description.json").write_text(json.dumps(fields_))


def ball(plane: str, seed: int = 0) -> tuple[np.ndarray, Grid]:
    """(24, 24, 10) int16: a ball of 80 mm with landmarks drawn by the seed; air around it."""
    shape, steps = (24, 24, 10), (5.0, 5.0, 12.0)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(AXES[plane])] * steps
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2.0)
    grid = Grid(shape, affine)
    points = grid.to_world(np.indices(shape).reshape(3, -1).T)
    values = 400.0 / (1 + np.exp((np.linalg.norm(points, axis=1) - 40.0) / 2.0))
    rng = np.random.default_rng(seed)
    for centre in rng.uniform(-22, 22, (4, 3)):
        values += 300.0 * np.exp(-np.sum((points - centre) ** 2, axis=1) / (2 * 9.0**2))
    values += np.random.default_rng([seed, *map(ord, plane)]).uniform(0, 4, len(points))
    return values.reshape(shape).astype(np.int16), grid
