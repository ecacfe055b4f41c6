# SPDX-License-Identifier: Apache-2.0
"""Image spatial normalisation (paper 2.1): masks, bias, intensity scale, one pose a stack."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..settings import Normalise, Output, Settings
from .acquisition import between_slices
from .geometry import Grid, RigidTransform
from .metrics import noise_sigma
from .registration import Isotropic, agreement, isotropic, register
from .stack import ImageError, Mask, Stack, read_image, write_image

LOGGER = logging.getLogger(__name__)
FINEST = 2.0  # mm: voxel of the images that are registered; poses are refined afterwards
CROP_MARGIN = 15.0  # mm kept around the foreground of a stack
N4_SPACING = 60.0  # mm between control points of the bias field
N4_ITERATIONS = (50, 50)  # coarse, fine


@dataclass(frozen=True)
class Prepared:
    """Stacks ready for training.

    Attributes
    ----------
    stacks
        Cropped around the foreground, bias-corrected where asked; intensities scaled so that a
        percentile of the foreground is 1.
    poses
        Scanner space of each stack to reference space; the reference's is the identity.
    reference
        Index of the reference stack.
    scale
        Scaled intensity times this is the reference stack's own intensity.
    held_out
        Per stack (I, J, K): foreground voxels that are never trained on.
    metrics
        ``ncc_before``, ``ncc_after``: mean over pairs; ``ncc_pairs``; ``snr`` and ``noise``
        per stack; ``masked``: where each mask comes from.
    """

    stacks: tuple[Stack, ...]
    poses: tuple[RigidTransform, ...]
    reference: int
    scale: float
    held_out: tuple[Mask, ...]
    metrics: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write images and ``prepared.json`` (last, so that it marks a complete folder)."""
        folder = Path(folder)
        images = folder / "stacks"
        images.mkdir(parents=True, exist_ok=True)
        rows = []
        for stack, pose, held_out in zip(self.stacks, self.poses, self.held_out, strict=True):
            write_image(images / f"{stack.label}.nii.gz", stack.data, stack.grid)
            write_image(images / f"{stack.label}_mask.nii.gz", stack.mask, stack.grid)
            write_image(images / f"{stack.label}_heldout.nii.gz", held_out, stack.grid)
            rows.append(
                {
                    "label": stack.label,
                    "slice_axis": stack.slice_axis,
                    "slice_thickness": stack.slice_thickness,
                    "slice_times": stack.slice_times,
                    "affine": stack.grid.affine.tolist(),
                    "pose": pose.matrix.tolist(),
                }
            )
        record = {
            "stacks": rows,
            "reference": self.stacks[self.reference].label,
            "scale": self.scale,
            "metrics": self.metrics,
        }
        write_json(folder / "prepared.json", record)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Prepared:
        """Read what :meth:`save` wrote."""
        folder = Path(folder)
        record = json.loads((folder / "prepared.json").read_text())
        stacks, held_out = [], []
        for row in record["stacks"]:
            images = folder / "stacks"
            data, _ = read_image(images / f"{row['label']}.nii.gz")
            grid = Grid(data.shape, row["affine"])  # NIfTI keeps it in single precision
            mask, _ = read_image(images / f"{row['label']}_mask.nii.gz")
            held, _ = read_image(images / f"{row['label']}_heldout.nii.gz")
            stacks.append(
                Stack(
                    row["label"],
                    data,
                    grid,
                    row["slice_axis"],
                    row["slice_thickness"],
                    mask > 0.5,
                    None if row["slice_times"] is None else tuple(row["slice_times"]),
                )
            )
            held_out.append(held > 0.5)
        labels = [stack.label for stack in stacks]
        return cls(
            tuple(stacks),
            tuple(RigidTransform(row["pose"]) for row in record["stacks"]),
            labels.index(record["reference"]),
            float(record["scale"]),
            tuple(held_out),
            record["metrics"],
        )


def write_json(path: Path, record: Any) -> None:
    """Write JSON whole or not at all; refuses NaN."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def head_mask(stack: Stack) -> Mask:
    """Foreground of a stack, scalp and dim tissue included, with a margin of 5 mm.

    The lower threshold of two successive Otsu splits (air, dim tissue, bright tissue), but at
    least five robust standard deviations above the air; then the largest component after
    closing by 8 mm, with the holes of each slice filled.
    """
    sizes = stack.grid.voxel_size
    smooth = ndimage.gaussian_filter(stack.data, np.minimum(1.0 / sizes, 2.0))
    upper = _otsu(smooth)
    low = smooth[smooth <= upper]
    centre = np.median(low)
    floor = centre + 5 * 1.4826 * np.median(np.abs(low - centre))
    mask = smooth > min(upper, max(_otsu(low), floor))
    if not mask.any():
        raise ImageError(f"{stack.label}: no foreground was found; is the image empty?")
    mask = _closed(mask, sizes, 8.0)
    labels, _ = ndimage.label(mask)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    mask = labels == np.argmax(counts)
    for k in range(mask.shape[stack.slice_axis]):
        where: list[slice | int] = [slice(None)] * 3
        where[stack.slice_axis] = k
        mask[tuple(where)] = ndimage.binary_fill_holes(mask[tuple(where)])
    return ndimage.distance_transform_edt(~mask, sampling=sizes) <= 5.0


def cropped(stack: Stack, margin: float) -> Stack:
    """The stack around its foreground, with ``margin`` mm on each side where it has them."""
    where = np.argwhere(stack.mask)
    steps = np.ceil(margin / stack.grid.voxel_size).astype(int)
    low = np.maximum(where.min(axis=0) - steps, 0)
    high = np.minimum(where.max(axis=0) + steps + 1, stack.grid.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    affine = np.array(stack.grid.affine)
    affine[:3, 3] = stack.grid.to_world(low)
    times = stack.slice_times
    return replace(
        stack,
        data=stack.data[box],
        mask=stack.mask[box],
        grid=Grid(high - low, affine),
        slice_times=None if times is None else times[box[stack.slice_axis]],
    )


def prepared_slices(acquired: Stack, prepared: Stack) -> dict[str, int]:
    """Where the slices of a prepared stack lie: ``first`` of the ``acquired``, ``count``."""
    axis = acquired.slice_axis
    place = acquired.grid.to_index(prepared.grid.to_world(np.zeros(3)))
    return {
        "first": round(float(place[axis])),
        "count": prepared.grid.shape[axis],
        "acquired": acquired.grid.shape[axis],
    }


def _closed(mask: Mask, sizes: NDArray, radius: float) -> Mask:
    grown = ndimage.distance_transform_edt(~mask, sampling=sizes) <= radius
    if grown.all():
        return np.asarray(grown)
    # beyond the edge of the image counts as inside: a head that is cut stays whole at the cut
    return ndimage.distance_transform_edt(grown, sampling=sizes) > radius


def _otsu(values: NDArray) -> float:
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[1:] + edges[:-1]) / 2
    low = np.cumsum(counts)
    high = counts.sum() - low
    mean_low = np.cumsum(counts * centres) / np.maximum(low, 1)
    mean_high = ((counts * centres).sum() - np.cumsum(counts * centres)) / np.maximum(high, 1)
    return float(centres[np.argmax(low * high * (mean_low - mean_high) ** 2)])


def correct_bias(stack: Stack, *, threads: int) -> Stack:
    """N4 (Tustison et al. 2010) through SimpleITK, estimated on about 4 mm voxels.

    Two levels, of which the finer has a control point every :data:`N4_SPACING` mm: a mesh that
    is laid by the number of its points is as fine as lesions where the field of view is small.
    """
    import SimpleITK as sitk

    sizes = stack.grid.voxel_size
    image = sitk.GetImageFromArray(np.ascontiguousarray(stack.data.T))
    image.SetSpacing([float(v) for v in sizes])
    mask = sitk.GetImageFromArray(np.ascontiguousarray(stack.mask.T.astype(np.uint8)))
    mask.SetSpacing(image.GetSpacing())
    factors = [max(1, round(4.0 / float(v))) for v in sizes]
    small, small_mask = sitk.Shrink(image, factors), sitk.Shrink(mask, factors)
    if int(sitk.GetArrayViewFromImage(small_mask).sum()) < 200:
        return stack
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(threads)
    corrector.SetMaximumNumberOfIterations(N4_ITERATIONS)
    corrector.SetConvergenceThreshold(1e-6)
    coarse = N4_SPACING * 2 ** (len(N4_ITERATIONS) - 1)
    spans = np.maximum(1, np.rint(stack.grid.shape * sizes / coarse)).astype(int)
    corrector.SetNumberOfControlPoints([int(n) + 3 for n in spans])  # cubic splines
    small = sitk.Clamp(small, lowerBound=1e-6)
    corrector.Execute(small, small_mask)
    field = sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)).T
    centred = field - field[stack.mask].mean()  # the mean intensity stays
    return stack.with_data(stack.data * np.exp(-np.clip(centred, -2.0, 2.0)))


def noise_level(stack: Stack) -> float:
    """Standard deviation of the noise within slices, in the eroded foreground.

    Smooth structure does not count, texture does, so this is an upper estimate
    (:func:`.metrics.noise_sigma`).
    """
    inner = ndimage.binary_erosion(stack.mask, iterations=2)
    mask = inner if inner.any() else stack.mask
    return noise_sigma(stack.data, mask, slice_axis=stack.slice_axis)


def prepare(stacks: Sequence[Stack], settings: Settings, *, threads: int = 1) -> Prepared:
    """Masks, N4, intensity scale, registration to the reference stack, held-out voxels.

    A stack whose mask is all ones gets a head mask; empty slices between others leave it.

    Raises
    ------
    ImageError
        A stack without foreground, or constant.
    """
    options, random = settings.normalise, np.random.default_rng(settings.run.random_seed)
    ready, scales, masked = [], [], {}
    for stack in stacks:
        given = not stack.mask.all()
        masked[stack.label] = "given" if given else "otsu"
        stack, scale = _condition(stack, given, options, threads)
        ready.append(stack)
        scales.append(scale)
    noise = {s.label: noise_level(s) for s in ready}
    snr = {
        s.label: float(s.data[s.mask].mean()) / noise[s.label] if noise[s.label] > 0 else None
        for s in ready
    }
    reference = _choose_reference(ready, snr, options.reference, random)
    voxel = max(FINEST, min(min(s.in_plane) for s in ready) * 1.5)
    images = [isotropic(s.filled(), voxel) for s in ready]
    poses = [RigidTransform()] * len(ready)
    if options.registration:
        poses = [
            RigidTransform()
            if index == reference
            else register(
                images[reference],
                image,
                levels=options.registration_levels,
                starts=options.registration_starts,
                threads=threads,
            )
            for index, image in enumerate(images)
        ]
    metrics = {**_pairs(ready, images, poses), "snr": snr, "noise": noise, "masked": masked}
    held_out = tuple(
        _held_out(s, options.held_out, between_slices(s, settings.acquisition), random)
        for s in ready
    )
    return Prepared(tuple(ready), tuple(poses), reference, scales[reference], held_out, metrics)


def _held_out(stack: Stack, share: float, hole: float, random: np.random.Generator) -> Mask:
    """(I, J, K) a ``share`` of the foreground, drawn by chance: single voxels; where slices leave
    gaps, squares within slices as wide as the ``hole`` (mm) between them, since a voxel among its
    neighbours says nothing of what lies far from any.
    """
    sides = [1, 1, 1]
    for axis in (a for a in range(3) if a != stack.slice_axis):
        sides[axis] = 2 * int(max(hole / float(stack.grid.voxel_size[axis]) - 1, 0) / 2) + 1
    middles = random.random(stack.grid.shape) < share / np.prod(sides)
    return np.asarray(ndimage.maximum_filter(middles, size=sides) & stack.mask)


def _condition(stack: Stack, given: bool, options: Normalise, threads: int) -> tuple[Stack, float]:
    """Mask, bias and scale of one stack."""
    if float(np.ptp(stack.data)) == 0.0:
        raise ImageError(f"{stack.label}: all voxels have one value; expected an image of a head")
    if not given:
        stack = stack.with_data(stack.data, head_mask(stack.filled()))
    stack = cropped(stack, CROP_MARGIN)
    stack = stack.with_data(stack.data, stack.mask & ~stack.empty)
    if not stack.mask.any():
        raise ImageError(f"{stack.label}: every slice with foreground is empty")
    if options.n4:
        stack = correct_bias(stack, threads=threads)
    scale = float(np.percentile(stack.data[stack.mask], options.intensity_percentile))
    if not scale > 0:
        raise ImageError(
            f"{stack.label}: percentile {options.intensity_percentile:g} of the foreground is "
            f"{scale:g}; expected a positive intensity"
        )
    return stack.with_data(stack.data / scale), scale


def _choose_reference(
    stacks: list[Stack], snr: dict[str, float | None], rule: str, random: np.random.Generator
) -> int:
    if rule == "random":
        return int(random.integers(len(stacks)))
    volume = [s.mask.sum() * np.prod(s.grid.voxel_size) * (snr[s.label] or 1.0) for s in stacks]
    return int(np.argmax(volume))


def _pairs(
    stacks: list[Stack], images: list[Isotropic], poses: list[RigidTransform]
) -> dict[str, Any]:
    rows = []
    for a in range(len(stacks)):
        for b in range(a + 1, len(stacks)):
            motion = poses[a].inverse() @ poses[b]
            rows.append(
                {
                    "a": stacks[a].label,
                    "b": stacks[b].label,
                    "before": agreement(images[a], images[b], RigidTransform()),
                    "after": agreement(images[a], images[b], motion),
                }
            )
    return {
        "ncc_pairs": rows,
        "ncc_before": float(np.mean([r["before"] for r in rows])),
        "ncc_after": float(np.mean([r["after"] for r in rows])),
    }


def output_grid(prepared: Prepared, output: Output) -> Grid:
    """The isotropic grid of the result: axes along the reference stack, all stacks' heads inside.

    Its voxel is ``output_resolution`` or the finest in-plane voxel; its box holds every
    foreground voxel of every registered stack and ``margin`` mm more.
    """
    reference = prepared.stacks[prepared.reference]
    voxel = output.output_resolution or min(min(s.in_plane) for s in prepared.stacks)
    affine = np.eye(4)
    affine[:3, :3] = reference.grid.directions * voxel
    frame = Grid((1, 1, 1), affine)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
        index = frame.to_index(pose.apply(stack.grid.to_world(np.argwhere(stack.mask))))
        low, high = np.minimum(low, index.min(axis=0)), np.maximum(high, index.max(axis=0))
    edge = output.margin / voxel
    first, last = np.floor(low - edge), np.ceil(high + edge)
    affine[:3, 3] = frame.to_world(first)
    return Grid((last - first + 1).astype(int), affine)
