# SPDX-License-Identifier: Apache-2.0
"""A tiny group with results, as the workflow leaves it, for tests of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from irem_bids.bids import Excluded, Group, StackFile
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.optimise import fit, quality
from irem_bids.reconstruction.prepare import Prepared, output_grid
from irem_bids.reconstruction.sample import sample
from irem_bids.reconstruction.stack import Stack, read_image, write_image
from irem_bids.report import ReportInput
from irem_bids.settings import Settings

PLANES = {"axial1": 2, "coronal1": 1, "sagittal1": 0}
SCALE = 250.0


def head(points: np.ndarray) -> np.ndarray:
    """A lopsided phantom, brighter towards the patient's right; (..., 3) mm to intensity."""
    x, y, z = np.moveaxis(points, -1, 0)
    inside = (x / 22) ** 2 + (y / 26) ** 2 + (z / 20) ** 2 < 1
    texture = 0.6 + 0.25 * np.sin(x / 4) * np.cos(y / 5) + 0.005 * x
    eye = (x - 9) ** 2 + (y - 16) ** 2 + z**2 < 16
    return (inside * texture + 0.4 * eye).astype(np.float32)


def stack(label: str, pose: RigidTransform) -> Stack:
    """A stack of 6 mm slices with 1.5 mm pixels through the phantom moved by ``pose``."""
    axis = PLANES[label]
    sizes = np.full(3, 1.5)
    sizes[axis] = 6.0
    shape = np.round(60 / sizes).astype(int)
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * sizes
    grid = Grid(shape, affine)
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    data = head(pose.apply(points))
    return Stack(label, data, grid, axis, 5.0, data > 0.05)


def group(**changes: object) -> Group:
    """Three stacks, one image left out."""
    stacks = tuple(
        StackFile(
            path=f"sub-01/anat/sub-01_acq-{label}_T1w.nii.gz",
            label=label,
            plane=label.rstrip("1"),
            shape=(40, 40, 10),
            in_plane=(1.5, 1.5),
            spacing=6.0,
            slice_thickness=5.0,
            thickness_source="sidecar",
            mask=None,
            uri=f"bids:raw:sub-01/anat/sub-01_acq-{label}_T1w.nii.gz",
        )
        for label in PLANES
    )
    excluded = (Excluded("sub-01/anat/sub-01_acq-iso_T1w.nii.gz", "near-isotropic voxels"),)
    return replace(Group("01", None, "T1w", {}, stacks, excluded, ()), **changes)


def prepared(far: float = 1.0) -> Prepared:
    """The stacks at their true poses; ``far`` multiplies the movement."""
    moves = [
        RigidTransform(),
        RigidTransform.from_vector([0.05 * far, 0, 0.03 * far, 2 * far, -1, 1]),
        RigidTransform.from_vector([0, 0.04 * far, 0, 0, 3 * far, -1]),
    ]
    stacks = tuple(stack(label, pose) for label, pose in zip(PLANES, moves, strict=True))
    pairs = [
        {"a": "axial1", "b": "coronal1", "before": 0.70, "after": 0.93},
        {"a": "axial1", "b": "sagittal1", "before": 0.66, "after": 0.94},
        {"a": "coronal1", "b": "sagittal1", "before": 0.61, "after": 0.92},
    ]
    metrics = {
        "ncc_pairs": pairs,
        "ncc_before": 0.657,
        "ncc_after": 0.93,
        "snr": dict.fromkeys(PLANES, 31.0),
        "noise": dict.fromkeys(PLANES, 0.02),
        "masked": dict.fromkeys(PLANES, "otsu"),
    }
    held_out = tuple(np.zeros(s.grid.shape, dtype=bool) for s in stacks)
    return Prepared(stacks, tuple(moves), 0, SCALE, held_out, metrics)


def method(folder: Path, ready: Prepared, settings: Settings, psnr: float) -> Path:
    """A method's folder as the reconstruct step leaves it, without a model."""
    folder.mkdir(parents=True)
    grid = output_grid(ready, settings.output)
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    volume = head(points) * SCALE
    write_image(folder / "volume.nii.gz", volume, grid)
    write_image(folder / "mask.nii.gz", volume > 0.05 * SCALE, grid)
    labels = [s.label for s in ready.stacks]
    steps = list(range(0, 300, 10))
    fit = {
        "method": folder.name,
        "poses": {
            label: pose.matrix.tolist() for label, pose in zip(labels, ready.poses, strict=True)
        },
        "gains": {"axial1": 1.0, "coronal1": 0.96, "sagittal1": 1.04},
        "history": {
            "step": steps,
            "loss": [0.1 / (1 + s) for s in steps],
            "held_out_step": steps[::5],
            "held_out": [0.12 / (1 + s) for s in steps[::5]],
        },
        "info": {"seconds": 12.5, "device": "cpu"},
    }
    (folder / "fit.json").write_text(json.dumps(fit))
    quality = {
        "held_out_psnr": psnr,
        "held_out_ncc": 0.97,
        "snr_result": 40.0,
        "self_consistency": dict.fromkeys(labels, 0.98),
        **ready.metrics,
    }
    (folder / "quality.json").write_text(json.dumps(quality))
    step = {
        "device": "cpu",
        "seconds": {"optimise": 10.0, "reconstruct": 2.5},
        "memory_gb": {"optimise": 1.23, "reconstruct": 0.98},
    }
    (folder / "step.json").write_text(json.dumps(step))
    return folder


def fitted_input(work: Path, names: tuple[str, ...]) -> ReportInput:
    """A group whose methods really ran, briefly."""
    ready = prepared()
    random = np.random.default_rng(3)
    held_out = tuple((random.random(s.grid.shape) < 0.05) & s.mask for s in ready.stacks)
    ready = replace(ready, held_out=held_out)
    settings = Settings.from_dict(
        {
            "output": {"output_resolution": 2.0, "method": list(names)},
            "srr": {"srr_iterations": 6},
            "irem": {"pose_rounds": 1, "steps": 5, "hidden": 8},
        }
    )
    ready.save(work / "prepared")
    grid = output_grid(ready, settings.output)
    for name in names:
        found = fit(name, ready, grid, settings)
        found.save(work / name)
        values = sample(found.field, grid) * ready.scale
        write_image(work / name / "volume.nii.gz", values, grid)
        write_image(work / name / "mask.nii.gz", values > 0.05 * ready.scale, grid)
        measured = quality(ready, found, settings)
        (work / name / "quality.json").write_text(json.dumps(measured))
    folders = {name: work / name for name in names}
    return ReportInput(group(), work / "prepared", folders, settings, {"device": "cpu"})


def make_input(
    work: Path, ready: Prepared | None = None, names: tuple[str, ...] = ("irem", "bspline")
) -> ReportInput:
    """A whole group below ``work``."""
    ready = prepared() if ready is None else ready
    settings = Settings.from_dict({"output": {"method": list(names), "output_resolution": 1.5}})
    ready.save(work / "prepared")
    folders = {
        name: method(work / name, ready, settings, 30.0 - number)
        for number, name in enumerate(names)
    }
    provenance = {
        "versions": {"irem-bids": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "seconds": {"normalise": 3.2},
        "command_line": ["irem-bids", "in", "out", "participant"],
    }
    return ReportInput(group(), work / "prepared", folders, settings, provenance)


def with_uncertainty(inp: ReportInput, **levels: float) -> ReportInput:
    """The methods named leave a map that rises along the first axis up to ``levels``."""
    for name, level in levels.items():
        volume, grid = read_image(inp.methods[name] / "volume.nii.gz")
        ramp = np.linspace(0, level, volume.shape[0])[:, None, None]
        write_image(inp.methods[name] / "std.nii.gz", np.broadcast_to(ramp, volume.shape), grid)
    return inp
