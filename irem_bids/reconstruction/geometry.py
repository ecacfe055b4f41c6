# SPDX-License-Identifier: Apache-2.0
"""Grids and rigid transforms.  World coordinates are RAS+ in mm, float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
PLANES = ("sagittal", "coronal", "axial")  # the plane whose normal is nearest to R, A, S


class GeometryError(ValueError):
    """An affine, matrix or shape that does not describe a grid or a rigid motion."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxel centres.

    Parameters
    ----------
    shape
        Number of voxels along the three axes.
    affine
        (4, 4), voxel indices to world coordinates of the voxel's centre, RAS+ mm.

    Raises
    ------
    GeometryError
        Wrong shape, not finite, singular.
    """

    shape: tuple[int, int, int]
    affine: FloatArray

    def __init__(self, shape: ArrayLike, affine: ArrayLike) -> None:
        sizes = tuple(int(n) for n in np.asarray(shape).ravel())
        matrix = np.array(affine, dtype=np.float64)
        if len(sizes) != 3 or min(sizes) < 1:
            raise GeometryError(f"a grid has three positive sizes, got {sizes}")
        if matrix.shape != (4, 4):
            raise GeometryError(f"an affine is (4, 4), got {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise GeometryError(f"the affine is not finite: {matrix.tolist()}")
        zooms = np.linalg.norm(matrix[:3, :3], axis=0)
        if min(zooms) <= 0 or abs(np.linalg.det(matrix[:3, :3])) < 1e-6 * np.prod(zooms):
            raise GeometryError(f"the affine is singular: {matrix[:3, :3].tolist()}")
        matrix.setflags(write=False)
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "affine", matrix)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and self.shape == other.shape
            and np.allclose(self.affine, other.affine, atol=1e-4)
        )

    @property
    def voxel_size(self) -> FloatArray:
        """(3,) voxel sizes in mm along the grid's axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def directions(self) -> FloatArray:
        """(3, 3) unit vectors of the grid's axes in its columns, RAS+."""
        return self.affine[:3, :3] / self.voxel_size

    @property
    def centre(self) -> FloatArray:
        """(3,) world position of the middle of the grid, mm."""
        return self.to_world((np.array(self.shape) - 1) / 2.0)

    def to_world(self, indices: ArrayLike) -> FloatArray:
        """Voxel indices (..., 3) to world coordinates (..., 3), mm."""
        return np.asarray(indices, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, points: ArrayLike) -> FloatArray:
        """World coordinates (..., 3), mm, to fractional voxel indices (..., 3)."""
        offset = np.asarray(points, dtype=np.float64) - self.affine[:3, 3]
        return offset @ np.linalg.inv(self.affine[:3, :3]).T

    def middle_of(self, mask: NDArray[np.bool_]) -> FloatArray:
        """(3,) mean position of the voxels of a mask, mm; the grid's centre if it is empty."""
        return self.to_world(mean_index(mask))

    def corners(self) -> FloatArray:
        """(8, 3) outer corners of the corner voxels (not their centres), world mm."""
        low, high = np.full(3, -0.5), np.array(self.shape) - 0.5
        picks = np.array(np.meshgrid(*[[0, 1]] * 3, indexing="ij")).reshape(3, -1).T
        return self.to_world(np.where(picks, high, low))

    def resampled(self, voxel_size: float) -> Grid:
        """The isotropic grid of ``voxel_size`` mm with the same axes and the same outer box."""
        extent = np.array(self.shape) * self.voxel_size
        shape = np.maximum(1, np.ceil(extent / voxel_size - 1e-6)).astype(int)
        affine = np.eye(4)
        affine[:3, :3] = self.directions * voxel_size
        affine[:3, 3] = self.centre - affine[:3, :3] @ ((shape - 1) / 2.0)
        return Grid(shape, affine)


@dataclass(frozen=True)
class RigidTransform:
    """A rigid motion of points: ``p -> rotation @ p + translation``, RAS+ mm.

    The *pose* of a stack is the transform from the stack's scanner coordinates
    into reference space: where the tissue that a voxel saw lies in the result.
    ``a @ b`` applies ``b`` first.

    >>> turn = RigidTransform.from_vector([0, 0, np.pi / 2, 10, 0, 0])
    >>> np.round(turn.apply([1.0, 0.0, 0.0]), 6).tolist()
    [10.0, 1.0, 0.0]
    >>> np.allclose((turn @ turn.inverse()).matrix, np.eye(4))
    True
    """

    matrix: FloatArray

    def __init__(self, matrix: ArrayLike | None = None) -> None:
        value = np.eye(4) if matrix is None else np.array(matrix, dtype=np.float64)
        if value.shape != (4, 4):
            raise GeometryError(f"a rigid transform is (4, 4), got {value.shape}")
        rotation = value[:3, :3]
        if (
            not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
            or np.linalg.det(rotation) < 0
        ):
            raise GeometryError(f"not a rotation: {rotation.tolist()}")
        value.setflags(write=False)
        object.__setattr__(self, "matrix", value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RigidTransform) and np.allclose(
            self.matrix, other.matrix, atol=1e-9
        )

    @classmethod
    def from_vector(cls, vector: ArrayLike, centre: ArrayLike = (0.0, 0.0, 0.0)) -> RigidTransform:
        """From (6,): rotation vector (rad, RAS+ axes) about ``centre``, then translation (mm)."""
        values, pivot = np.asarray(vector, dtype=np.float64), np.asarray(centre, dtype=np.float64)
        angle = np.linalg.norm(values[:3])
        rotation = np.eye(3)
        if angle > 0:
            x, y, z = values[:3] / angle
            cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            rotation = rotation + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = pivot - rotation @ pivot + values[3:]
        return cls(matrix)

    def to_vector(self, centre: ArrayLike = (0.0, 0.0, 0.0)) -> FloatArray:
        """(6,) rotation vector (rad) about ``centre``, then translation (mm), as from_vector."""
        from scipy.spatial.transform import Rotation

        pivot = np.asarray(centre, dtype=np.float64)
        rotation = self.matrix[:3, :3]
        translation = self.matrix[:3, 3] - pivot + rotation @ pivot
        return np.concatenate([Rotation.from_matrix(rotation).as_rotvec(), translation])

    def apply(self, points: ArrayLike) -> FloatArray:
        """Move points (..., 3), RAS+ mm."""
        return np.asarray(points, dtype=np.float64) @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def inverse(self) -> RigidTransform:
        """The motion back."""
        return RigidTransform(np.linalg.inv(self.matrix))

    def __matmul__(self, other: RigidTransform) -> RigidTransform:
        return RigidTransform(self.matrix @ other.matrix)

    def to_itk_text(self) -> str:
        """The transform as an ITK (Insight) text file, LPS mm.

        An ITK file that resamples image X into space Y maps points of Y to
        points of X: write ``pose.inverse()`` into ``from-X_to-Y``.
        """
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        lps = flip @ self.matrix @ flip
        numbers = " ".join(f"{v:.17g}" for v in [*lps[:3, :3].ravel(), *lps[:3, 3]])
        return (
            "#Insight Transform File V1.0\n#Transform 0\n"
            "Transform: AffineTransform_double_3_3\n"
            f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
        )

    @classmethod
    def from_itk_text(cls, text: str) -> RigidTransform:
        """Read what :meth:`to_itk_text` writes (an affine about any centre)."""
        lines: dict[str, Any] = dict(
            line.split(": ", 1) for line in text.splitlines() if ": " in line
        )
        values = np.array([float(v) for v in lines["Parameters"].split()])
        pivot = np.array([float(v) for v in lines["FixedParameters"].split()[:3]])
        lps = np.eye(4)
        lps[:3, :3] = values[:9].reshape(3, 3)
        lps[:3, 3] = values[9:] + pivot - lps[:3, :3] @ pivot
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        return cls(flip @ lps @ flip)


def mean_pose(poses: ArrayLike, centre: ArrayLike, weights: ArrayLike) -> RigidTransform:
    """The mean of rigid motions (K, 4, 4), e.g. of the slices of a stack.

    The chordal mean of the rotations (Moakher 2002) and the mean of where ``centre`` (3,), mm
    before the motion, goes.  ``weights``: (K,), not negative, not all 0.

    >>> turn = [RigidTransform.from_vector([0, 0, a, 2, 0, 0]).matrix for a in (0.1, -0.1)]
    >>> mean_pose(turn, [0, 0, 0], [1, 1]) == RigidTransform.from_vector([0, 0, 0, 2, 0, 0])
    True
    """
    matrices, pivot = np.asarray(poses, np.float64), np.asarray(centre, np.float64)
    share = np.asarray(weights, np.float64) / np.sum(weights)
    mean = np.einsum("k,kab->ab", share, matrices)
    u, _, v = np.linalg.svd(mean[:3, :3])
    matrix = np.eye(4)
    matrix[:3, :3] = u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v
    matrix[:3, 3] = mean[:3, :3] @ pivot + mean[:3, 3] - matrix[:3, :3] @ pivot
    return RigidTransform(matrix)


def mean_index(mask: NDArray[np.bool_]) -> FloatArray:
    """(3,) mean index of the voxels of a mask; the middle of the array if it is empty."""
    middle = (np.array(mask.shape) - 1) / 2.0
    for axis in range(3):
        counts = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
        if counts.any():
            middle[axis] = counts @ np.arange(len(counts)) / counts.sum()
    return middle


def through_plane_axis(grid: Grid) -> int:
    """Index of the axis with the largest voxel size (the last of equals)."""
    sizes = np.round(grid.voxel_size, 3)
    return int(2 - np.argmax(sizes[::-1]))


def plane(grid: Grid, axis: int) -> str:
    """'axial', 'coronal' or 'sagittal': the plane nearest to the slices' normal."""
    return PLANES[int(np.argmax(np.abs(grid.directions[:, axis])))]
