# SPDX-License-Identifier: Apache-2.0
"""Grids and rigid motions against closed forms, SimpleITK and nitransforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from irem_bids.reconstruction.geometry import (
    GeometryError,
    Grid,
    RigidTransform,
    plane,
    through_plane_axis,
)


def test_world_and_index_are_inverse() -> None:
    turn = RigidTransform.from_vector([0.2, -0.1, 0.3, 5, 6, 7])
    grid = Grid((4, 5, 6), turn.matrix @ np.diag([1.0, 2.0, 3.0, 1.0]))
    points = np.random.default_rng(0).normal(size=(7, 3))
    assert np.allclose(grid.to_index(grid.to_world(points)), points)
    assert np.allclose(grid.voxel_size, [1, 2, 3])
    assert np.allclose(grid.to_world([0, 0, 0]), [5, 6, 7])


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        ((4, 5), np.eye(4), "three positive sizes"),
        ((4, 0, 5), np.eye(4), "three positive sizes"),
        ((4, 5, 6), np.eye(3), "is \\(4, 4\\)"),
        ((4, 5, 6), np.full((4, 4), np.nan), "not finite"),
        ((4, 5, 6), np.zeros((4, 4)), "singular"),
        ((4, 5, 6), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
    ],
)
def test_bad_grids_are_refused(shape: object, affine: object, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        Grid(shape, affine)


def test_resampled_grid_keeps_the_outer_box() -> None:
    grid = Grid((10, 12, 5), np.diag([1.0, 1.0, 4.0, 1.0]))
    fine = grid.resampled(0.5)
    assert fine.shape == (20, 24, 40)
    assert np.allclose(np.sort(fine.corners(), axis=0), np.sort(grid.corners(), axis=0))


def test_rotation_vector_agrees_with_scipy() -> None:
    from scipy.spatial.transform import Rotation

    vector = np.array([0.3, -0.5, 0.7, 1.0, 2.0, 3.0])
    motion = RigidTransform.from_vector(vector, centre=(10, 20, 30))
    assert np.allclose(motion.matrix[:3, :3], Rotation.from_rotvec(vector[:3]).as_matrix())
    assert np.allclose(motion.apply([10, 20, 30]), [11, 22, 33])
    assert np.allclose(motion.to_vector(centre=(10, 20, 30)), vector)


def test_a_matrix_that_shears_is_no_rigid_motion() -> None:
    matrix = np.eye(4)
    matrix[0, 1] = 0.1
    with pytest.raises(GeometryError, match="not a rotation"):
        RigidTransform(matrix)


def test_itk_text_moves_points_as_simpleitk_reads_it(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    motion = RigidTransform.from_vector([0.1, 0.2, -0.3, 4, -5, 6], centre=(7, 8, 9))
    path = tmp_path / "motion.txt"
    path.write_text(motion.to_itk_text())
    transform = sitk.ReadTransform(str(path))
    point = np.array([11.0, -12.0, 13.0])
    flip = np.array([-1, -1, 1])
    assert np.allclose(
        flip * transform.TransformPoint((flip * point).tolist()), motion.apply(point)
    )
    assert RigidTransform.from_itk_text(path.read_text()) == motion


@pytest.mark.parametrize(("axis", "name"), [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_plane_comes_from_the_normal(axis: int, name: str) -> None:
    sizes = np.ones(3)
    sizes[axis] = 4
    tilt = RigidTransform.from_vector([0.2, 0.2, 0.2, 0, 0, 0])
    grid = Grid((9, 9, 9), tilt.matrix @ np.diag([*sizes, 1]))
    assert through_plane_axis(grid) == axis
    assert plane(grid, axis) == name


def test_middle_of_a_mask_is_the_mean_of_its_voxels() -> None:
    random = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3] = random.normal(size=(3, 4))
    mask = random.random((7, 5, 6)) > 0.7
    grid = Grid(mask.shape, affine)
    expected = grid.to_world(np.argwhere(mask).mean(axis=0))
    assert np.allclose(grid.middle_of(mask), expected, atol=1e-12)
    assert np.allclose(grid.middle_of(mask & False), grid.centre)
