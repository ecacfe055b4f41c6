# SPDX-License-Identifier: Apache-2.0
"""A stack as a result predicts it, from what the method's folder holds.

The volume is integrated through the slice profile at the pose of each slice; no network is
run, so that a whole head takes seconds and a report needs nothing but the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..reconstruction.acquisition import Receiver, quadrature
from ..reconstruction.geometry import RigidTransform
from ..reconstruction.stack import Stack
from ..settings import Acquisition
from .material import MethodResult

POINT_SAMPLED = ("bspline", "irem2021")  # methods that know no slice profile


def slice_values(result: MethodResult, key: str) -> dict[str, NDArray[np.float64]]:
    """A record per slice of ``fit.json`` as arrays; what is no array of numbers is left out."""
    record = result.fit.get(key)
    found = {}
    for label, values in record.items() if isinstance(record, Mapping) else ():
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            continue
        if array.size and np.isfinite(array).all():
            found[str(label)] = array
    return found


def widths(result: MethodResult, thickness: Mapping[str, float]) -> dict[str, float]:
    """Width of the slice profile as a method found it, mm; stacks that it left out are not in it.

    ``fit.json`` has it in mm (``profile_width``) or as a factor of the thickness (``widths``).
    """
    found = {}
    for key, in_mm in (("widths", False), ("profile_width", True)):
        record = result.fit.get(key)
        for label, value in record.items() if isinstance(record, Mapping) else ():
            if label in thickness and isinstance(value, (int, float)) and value > 0:
                found[str(label)] = float(value) if in_mm else float(value) * thickness[label]
    return found


def poses(result: MethodResult, stack: Stack, pose: RigidTransform) -> list[RigidTransform]:
    """Pose of each slice: as the method found it, else that of the stack."""
    count = stack.grid.shape[stack.slice_axis]
    matrices = slice_values(result, "slice_poses").get(stack.label)
    if matrices is not None and matrices.shape == (count, 4, 4):
        return [RigidTransform(matrix) for matrix in matrices]
    motion = slice_values(result, "slice_motion").get(stack.label)
    if motion is not None and motion.shape == (count, 6):
        pivot = np.asarray(result.fit.get("slice_pivot") or (0.0, 0.0, 0.0), dtype=np.float64)
        return [RigidTransform.from_vector(vector, pivot) @ pose for vector in motion]
    return [pose] * count


def receiver(result: MethodResult, stack: Stack, pose: RigidTransform) -> NDArray[np.float64]:
    """(I, J, K) factor of gain, bias and gains of slices that a method found for a stack."""
    gain = result.gains.get(stack.label, 1.0)
    bias = slice_values(result, "bias").get(stack.label)
    each = stack.by_slice(slice_gains(result, stack))
    if bias is None or result.grid is None:
        return gain * each
    return np.asarray(Receiver(gain, bias).image(stack.grid, pose, result.grid.centre) * each)


def slice_gains(result: MethodResult, stack: Stack) -> NDArray[np.float64]:
    """(K,) brightness of each slice beyond gain and bias of the stack; 1 where none was found."""
    count = stack.grid.shape[stack.slice_axis]
    found = slice_values(result, "slice_gains").get(stack.label)
    return found if found is not None and found.shape == (count,) else np.ones(count)


def voxels(
    stack: Stack,
    result: MethodResult,
    pose: RigidTransform,
    index: NDArray[np.int64],
    acquisition: Acquisition,
) -> NDArray[np.float64]:
    """(N,) prediction at voxels ``index`` (N, 3) of one slice, in the units of the result.

    ``acquisition`` says the slice profile; methods that know none see point samples.  The
    receiver is left to the caller.
    """
    if result.whole is None or result.grid is None:
        raise ValueError(f"{result.name} left no volume")
    slices = poses(result, stack, pose)
    moved = slices[int(index[0, stack.slice_axis])]
    thickness = {stack.label: stack.slice_thickness}
    width = widths(result, thickness).get(stack.label, stack.slice_thickness)
    if result.name in POINT_SAMPLED:
        acquisition = replace(acquisition, profile="none")
    step = float(result.grid.voxel_size[0])
    nodes = quadrature(acquisition, stack.slice_thickness, step)
    offsets = nodes.offsets * (width / stack.slice_thickness)
    centres = stack.grid.to_world(index)
    total = np.zeros(len(index))
    for offset, weight in zip(offsets, nodes.weights, strict=True):
        points = moved.apply(centres + offset * stack.normal)
        total += weight * ndimage.map_coordinates(
            result.whole,
            result.grid.to_index(points).T,
            order=1,
            mode="nearest",
            output=np.float64,
        )
    return total
