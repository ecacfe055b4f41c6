# SPDX-License-Identifier: Apache-2.0
"""The figures of a group, from its working folder to PNG and SVG files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..reconstruction.geometry import Grid, RigidTransform
from ..reconstruction.stack import Stack
from . import plots, residuals, uncertainty, views
from .material import Material, MethodResult, ReportInput, load
from .studio import Figure, Studio, around_head, head_limits, middle_index, zoomed

TILE = 340  # pixels, about, of the longer side of a picture
SLICES = 12  # slices of a stack that are shown


def make_figures(
    inp: ReportInput, figures_dir: Path, material: Material | None = None
) -> list[Figure]:
    """Draw all figures of a group into ``figures_dir``.

    What cannot be drawn becomes an entry of ``material.problems``.
    """
    material = load(inp) if material is None else material
    figures_dir = Path(figures_dir)
    figures_dir.mkdir(parents=True, exist_ok=True)
    studio = Studio(material, figures_dir)
    figures: list[Figure] = []
    if material.prepared is not None:
        for stack in material.prepared.stacks:
            figures += studio.attempt(f"stack {stack.label}", partial(stack_slices, studio, stack))
        figures += studio.attempt("registration", partial(registration, studio))
        figures += studio.attempt("reconstruction", partial(reconstruction, studio))
        figures += studio.attempt("poses", partial(poses, studio))
        for result in material.methods.values():
            name = result.name
            for what, draw in (
                ("residual", residuals.residuals),
                ("slice motion", residuals.motion_plots),
                ("uncertainty", uncertainty.maps),
            ):
                figures += studio.attempt(f"{what} of {name}", partial(draw, studio, result))
        figures += studio.attempt("slices", partial(residuals.slice_plots, studio))
    for result in material.methods.values():
        figures += studio.attempt(f"mosaic of {result.name}", partial(mosaic, studio, result))
        figures += studio.attempt(f"training of {result.name}", partial(training, studio, result))
    return figures


def stack_slices(studio: Studio, stack: Stack) -> list[Figure]:
    """Slices of a stack in its own plane, voxel by voxel."""
    full = views.canonical(stack.data, stack.grid)
    limits = head_limits(views.canonical(stack.mask, stack.grid).data, full.grid)
    part = views.crop(full, limits)
    normal = full.file_axis.index(stack.slice_axis)
    plane = next(p for p, axis in views.NORMAL.items() if axis == normal)
    rows, columns = views.pixel_size(part.grid, plane)
    shape = views.picture(part.data, plane, 0).shape
    mm = min(rows, columns) / max(1, round(220 / max(shape)))
    tiles = []
    head = views.box(views.canonical(stack.mask, stack.grid).data, (0.0, 0.0, 0.0))[normal]
    start = limits[normal][0]
    for index in views.spread((head[0] - start, head[1] - start), SLICES):
        grey = views.grey(views.picture(part.data, plane, index), studio.levels)
        number = part.file_index(normal, index)
        tiles.append(zoomed(grey, part.grid, plane, mm, f"{number}"))
    path = studio.path(f"stack{stack.label}")
    views.save_png(views.montage(tiles, min(4, len(tiles))), path)
    return [
        Figure(
            path,
            "inputs",
            alt=f"{len(tiles)} of {stack.data.shape[stack.slice_axis]} slices of stack "
            f"{stack.label} in its own {stack.plane} plane",
            caption="number: index of the slice in the stack as cropped, from 0",
            stack=stack.label,
        )
    ]


def _compare_grid(stack: Stack) -> tuple[Grid, dict[str, int]]:
    """Isotropic RAS+ grid around the head of ``stack`` and the index of the middle per plane."""
    full = views.canonical(stack.mask, stack.grid)
    part = views.crop(full, head_limits(full.data, full.grid))
    extent = np.array(part.grid.shape) * part.grid.voxel_size
    grid = part.grid.resampled(max(float(part.grid.voxel_size.min()), float(extent.max()) / 200))
    centre = part.grid.middle_of(part.data)
    return grid, middle_index(grid, centre)


def registration(studio: Studio) -> list[Figure]:
    """The reference and every other stack on one grid, as the headers say and as registered."""
    prepared = studio.material.prepared
    if prepared is None or len(prepared.stacks) < 2:
        return []
    reference = prepared.stacks[prepared.reference]
    grid, middle = _compare_grid(reference)
    mm = float(grid.voxel_size[0]) / max(1, round(TILE / max(grid.shape)))

    def strip(stack: Stack, pose: RigidTransform, what: str, state: str) -> Figure:
        tiles = []
        for plane in views.PLANES:
            points = views.slice_points(grid, plane, middle[plane])
            values = views.sample_stack(stack, pose, points, order=1)
            tiles.append(zoomed(views.grey(values, studio.levels), grid, plane, mm))
        path = views.save_png(views.montage(tiles, 3), studio.path(what))
        place = {
            "reference": "the reference stack",
            "before": "where its header places it",
            "after": "after registration to the reference",
        }[state]
        return Figure(
            path,
            "registration",
            stack=stack.label,
            state=state,
            alt=f"stack {stack.label}, {place}: axial, coronal and sagittal sections",
        )

    figures = [strip(reference, RigidTransform(), f"reg{reference.label}", "reference")]
    for number, (stack, pose) in enumerate(zip(prepared.stacks, prepared.poses, strict=True)):
        if number != prepared.reference:
            figures.append(strip(stack, RigidTransform(), f"reg{stack.label}before", "before"))
            figures.append(strip(stack, pose, f"reg{stack.label}after", "after"))
    return figures


def _with_volume(material: Material) -> list[MethodResult]:
    return [m for m in material.methods.values() if m.volume is not None and m.grid is not None]


def reconstruction(studio: Studio) -> list[Figure]:
    """One picture per plane of every stack and every method, all at one position."""
    prepared, done = studio.material.prepared, _with_volume(studio.material)
    if prepared is None or not done:
        return []
    first = done[0]
    part, middle = around_head(first, first.volume)
    mm = float(part.grid.voxel_size.min()) / max(1, round(TILE / max(part.grid.shape)))
    figures = []

    def section(plane: str, values: views.Picture, of: str, **kind: str) -> None:
        image = zoomed(views.grey(values, studio.levels), part.grid, plane, mm)
        (name,) = kind.values()
        path = views.save_png(image, studio.path(f"recon{plane}{name}"))
        alt = f"{plane} section of {of} {name}"
        figures.append(Figure(path, "reconstruction", plane=plane, alt=alt, **kind))

    for plane in views.PLANES:
        points = views.slice_points(part.grid, plane, middle[plane])
        for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
            moved = first.poses.get(stack.label, pose)
            values = views.sample_stack(stack, moved, points, order=0)
            section(plane, values, f"the {stack.plane} stack", stack=stack.label)
        for result in done:
            values = _section(result, points) / prepared.scale
            section(plane, values, "the reconstruction by", method=result.name)
    return figures


def _section(result: MethodResult, points: NDArray[np.float64]) -> views.Picture:
    """Voxels of a result at points of reference space (nearest; all methods share a grid)."""
    if result.volume is None or result.grid is None:
        raise ValueError(f"{result.name} left no volume")
    shell = Stack(
        result.name, result.volume, result.grid, 2, 1.0, np.ones(result.volume.shape, dtype=bool)
    )
    return views.sample_stack(shell, RigidTransform(), points, order=0)


def mosaic(studio: Studio, result: MethodResult) -> list[Figure]:
    """Six sections of a result in each of the three planes."""
    if result.volume is None:
        return []
    part, _ = around_head(result, result.volume)
    prepared = studio.material.prepared
    scale = 1.0 if prepared is None else prepared.scale
    levels = studio.levels
    if prepared is None and result.mask is not None:
        levels = views.window(result.volume[result.mask])
    mm = float(part.grid.voxel_size.min()) / max(1, round(240 / max(part.grid.shape)))
    tiles = []
    for plane in views.PLANES:
        size = part.data.shape[views.NORMAL[plane]]
        places = views.spread((int(0.1 * size), max(int(0.9 * size), 1)), 6)
        for index in (places + places[-1:] * 6)[:6]:
            grey = views.grey(views.picture(part.data, plane, index) / scale, levels)
            tiles.append(zoomed(grey, part.grid, plane, mm))
    path = views.save_png(views.montage(tiles, 6), studio.path(f"mosaic{result.name}"))
    return [
        Figure(
            path,
            "mosaic",
            method=result.name,
            alt=f"reconstruction by {result.name}: six axial, coronal and sagittal sections",
        )
    ]


def training(studio: Studio, result: MethodResult) -> list[Figure]:
    """Loss and held-out error of one method."""
    path = plots.training(result.history, studio.path(f"training{result.name}", "svg"))
    if path is None:
        return []
    loss = [float(v) for v in result.history.get("loss", ())]
    words = f" from {loss[0]:.3g} to {loss[-1]:.3g}" if loss else ""
    return [
        Figure(
            path,
            "training",
            method=result.name,
            alt=f"training loss of {result.name}{words} over {len(loss)} recorded steps, "
            "and the error of the held-out voxels",
        )
    ]


def poses(studio: Studio) -> list[Figure]:
    """Rotation and shift of each stack, as registered and as each method refined it."""
    prepared = studio.material.prepared
    if prepared is None:
        return []
    labels = [stack.label for stack in prepared.stacks]
    sets = {
        name: plots.pose_table(prepared.stacks, found, prepared.reference)
        for name, found in studio.material.pose_sets().items()
    }
    figures = []
    for number, (name, unit) in enumerate((("rotation", "degrees"), ("translation", "mm"))):
        path = plots.pose_components(
            labels,
            {k: v[number] for k, v in sets.items()},
            f"{name} ({unit})",
            studio.path(f"pose{name}", "svg"),
        )
        figures.append(
            Figure(
                path,
                "poses",
                alt=f"{name} of each stack along three axes in {unit}, as in the table",
                caption="hollow: registration; filled: " + ", ".join(list(sets)[1:])
                if len(sets) > 1
                else "as registered",
            )
        )
    return figures
