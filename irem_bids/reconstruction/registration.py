# SPDX-License-Identifier: Apache-2.0
"""Rigid registration of thick stacks with SimpleITK (paper 2.1).

A thick slice is blurred along its normal and sharp within.  Two stacks of different
orientation are therefore blurred in plane as their profile blurs through plane, and brought
to isotropic grids: only then do both show the head at the same resolution.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter

from .acquisition import FWHM
from .baselines import resample_stack
from .geometry import Grid, RigidTransform
from .stack import Stack

LOGGER = logging.getLogger(__name__)
POOR_AGREEMENT = 0.6  # NCC under which further starting poses are tried
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS+ to LPS


@dataclass(frozen=True)
class Isotropic:
    """A stack at one resolution in all directions: data and mask (X, Y, Z) on a grid."""

    data: NDArray[np.float32]
    mask: NDArray[np.bool_]
    grid: Grid


def isotropic(stack: Stack, voxel: float) -> Isotropic:
    """Blur in plane to the slice thickness and resample to voxels of about ``voxel`` mm."""
    sizes = stack.grid.voxel_size
    sigma = np.where(np.arange(3) == stack.slice_axis, 0.0, stack.slice_thickness / FWHM / sizes)
    smooth = gaussian_filter(stack.data, sigma)
    grid = stack.grid.resampled(voxel)
    values, _ = resample_stack(stack.with_data(smooth), RigidTransform(), grid)
    index = stack.grid.to_index(grid.to_world(np.indices(grid.shape).reshape(3, -1).T))
    nearest = np.clip(np.rint(index).astype(int), 0, np.array(stack.grid.shape) - 1)
    mask = stack.mask[tuple(nearest.T)].reshape(grid.shape)
    return Isotropic(values, mask, grid)


def ncc(a: NDArray, b: NDArray) -> float:
    """Normalised cross-correlation (Pearson) of two arrays; 0 where one is constant."""
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if x.size < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def agreement(fixed: Isotropic, moving: Isotropic, motion: RigidTransform) -> float:
    """NCC of two images inside both masks; ``motion`` maps moving's space to fixed's.

    0 when fewer than 5 % of the smaller mask overlap.
    """
    points = fixed.grid.to_world(np.argwhere(fixed.mask))
    index = moving.grid.to_index(motion.inverse().apply(points))
    nearest = np.rint(index).astype(int)
    ok = np.asarray(((nearest >= 0) & (nearest < moving.grid.shape)).all(axis=1))
    ok[ok] &= moving.mask[tuple(nearest[ok].T)]
    if ok.sum() < 0.05 * min(fixed.mask.sum(), moving.mask.sum()):
        return 0.0
    from scipy.ndimage import map_coordinates

    values = map_coordinates(moving.data, index[ok].T, order=1, mode="nearest")
    return ncc(fixed.data[fixed.mask][ok], values)


def _to_sitk(data: NDArray, grid: Grid) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = FLIP @ grid.affine
    image.SetSpacing([float(v) for v in grid.voxel_size])
    image.SetOrigin([float(v) for v in lps[:3, 3]])
    image.SetDirection([float(v) for v in (lps[:3, :3] / grid.voxel_size).ravel()])
    return image


def _optimise(
    fixed: Isotropic,
    moving: Isotropic,
    start: RigidTransform,
    factors: tuple[int, ...],
    threads: int,
) -> RigidTransform:
    """One multi-resolution SimpleITK registration; poses map moving's space to fixed's."""
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(threads)
    method.SetMetricAsCorrelation()
    method.SetMetricSamplingStrategy(method.NONE)
    grow = max(1, round(6.0 / float(fixed.grid.voxel_size[0])))
    method.SetMetricFixedMask(
        _to_sitk(binary_dilation(fixed.mask, iterations=grow).astype(np.uint8), fixed.grid)
    )
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-4, numberOfIterations=100, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    voxel = float(fixed.grid.voxel_size[0])
    method.SetShrinkFactorsPerLevel(list(factors))
    method.SetSmoothingSigmasPerLevel([0.5 * f * voxel if f > 1 else 0.0 for f in factors])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()

    initial = sitk.Euler3DTransform()
    centre = fixed.grid.middle_of(fixed.mask)
    initial.SetCenter([float(v) for v in FLIP[:3, :3] @ centre])
    # ITK maps points of the fixed image to the moving image: the inverse of the pose
    inverse = FLIP @ start.inverse().matrix @ FLIP
    initial.SetMatrix([float(v) for v in inverse[:3, :3].ravel()], 1e-6)
    pivot = FLIP[:3, :3] @ centre
    initial.SetTranslation([float(v) for v in inverse[:3, :3] @ pivot + inverse[:3, 3] - pivot])
    method.SetInitialTransform(initial, inPlace=True)
    method.Execute(_to_sitk(fixed.data, fixed.grid), _to_sitk(moving.data, moving.grid))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(initial.GetMatrix()).reshape(3, 3)
    pivot = np.array(initial.GetCenter())
    matrix[:3, 3] = np.array(initial.GetTranslation()) + pivot - matrix[:3, :3] @ pivot
    return RigidTransform(_orthonormal(FLIP @ matrix @ FLIP)).inverse()


def _orthonormal(matrix: NDArray) -> NDArray:
    out = np.array(matrix)
    u, _, v = np.linalg.svd(matrix[:3, :3])
    out[:3, :3] = u @ v
    return out


def starting_poses(fixed: Isotropic, moving: Isotropic, count: int) -> list[RigidTransform]:
    """Centres of mass together, then turned by +-20 and +-40 degrees about each axis."""
    goal = fixed.grid.middle_of(fixed.mask)
    centre = moving.grid.middle_of(moving.mask)
    shift = goal - centre
    turns = [np.zeros(3)] + [
        np.deg2rad(size) * sign * np.eye(3)[axis]
        for size, axis, sign in itertools.product((20, 40), range(3), (1, -1))
    ]
    return [RigidTransform.from_vector([*turn, *shift], centre) for turn in turns[: max(1, count)]]


def register(
    fixed: Isotropic, moving: Isotropic, *, levels: int, starts: int, threads: int
) -> RigidTransform:
    """The rigid motion from ``moving``'s space to ``fixed``'s.

    First from the headers; if the two then agree poorly (NCC below 0.6), from several other
    starts at the coarsest level, of which the best goes through all levels.  The result is
    never worse, by NCC in both masks, than the headers.
    """
    factors = tuple(2 ** (levels - 1 - i) for i in range(levels))
    candidates = [RigidTransform()]
    try:
        candidates.append(_optimise(fixed, moving, RigidTransform(), factors, threads))
    except RuntimeError as error:  # ITK: no overlap of the masks
        LOGGER.debug("registration from the headers failed: %s", error)
    best = max(candidates, key=lambda pose: agreement(fixed, moving, pose))
    if agreement(fixed, moving, best) >= POOR_AGREEMENT or starts <= 1:
        return best
    tried = [best]
    for start in starting_poses(fixed, moving, starts):
        try:
            tried.append(_optimise(fixed, moving, start, factors[:1], threads))
        except RuntimeError as error:
            LOGGER.debug("a start of the registration failed: %s", error)
    best = max(tried, key=lambda pose: agreement(fixed, moving, pose))
    try:
        tried.append(_optimise(fixed, moving, best, factors, threads))
    except RuntimeError as error:
        LOGGER.debug("the last registration failed: %s", error)
    return max(tried, key=lambda pose: agreement(fixed, moving, pose))
