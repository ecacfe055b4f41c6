# SPDX-License-Identifier: Apache-2.0
"""Left stays left: every orientation of the arrays, oblique heads, motion, and scale."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.sample import sample
from irem_bids.reconstruction.stack import read_stack, write_image
from irem_bids.settings import Settings
from tests.stacks import AXES

SETTINGS = Settings.from_dict(
    {
        "normalise": {"registration": False},
        "srr": {"srr_iterations": 12, "srr_reweightings": 2},
        "output": {"output_resolution": 6.0},
    }
)
#: World positions (mm, RAS) and brightness of what tells the sides apart.
LANDMARKS = (
    ((20, 0, 0), 500.0),
    ((0, 18, 4), 300.0),
    ((-6, -4, 20), 200.0),
    ((-16, -12, -8), 90.0),
)
CODES = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
)


def head(points: np.ndarray) -> np.ndarray:
    """Intensities (N,) of a ball of 80 mm with landmarks at world points (N, 3)."""
    values = 400.0 / (1 + np.exp((np.linalg.norm(points, axis=1) - 40.0) / 3.0))
    for centre, height in LANDMARKS:
        values += height * np.exp(-np.sum((points - np.array(centre)) ** 2, axis=1) / (2 * 9.0**2))
    return values


def write_stacks(
    folder: Path, motion: RigidTransform, codes: list[tuple], scale: float = 1.0
) -> list[Path]:
    """Three stacks of the moved head on moved grids, each array in its own orientation."""
    paths = []
    for (plane, axes), (order, flips) in zip(AXES.items(), codes, strict=True):
        shape, steps = (18, 18, 9), (6.0, 6.0, 12.0)
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, list(axes)] * steps
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2.0)
        points = Grid(shape, affine).to_world(np.indices(shape).reshape(3, -1).T)
        noise = np.random.default_rng(sorted(plane.encode())).normal(0, 2, shape)
        values = (head(points).reshape(shape) + noise).astype(np.float32)
        image = nib.Nifti1Image(values, motion.matrix @ affine)
        turned = image.as_reoriented(np.stack([order, flips], axis=1).astype(float))
        assert nib.aff2axcodes(turned.affine)
        path = folder / f"{plane}.nii"
        write_image(path, scale * np.asarray(turned.dataobj), Grid(turned.shape, turned.affine))
        paths.append(path)
    return paths


def reconstruct(paths: list[Path]) -> tuple[np.ndarray, Grid]:
    stacks = [read_stack(path, label=f"{path.stem}1") for path in paths]
    assert [stack.plane for stack in stacks] == list(AXES) or len(paths) == 3
    prepared = prepare(stacks, SETTINGS)
    grid = output_grid(prepared, SETTINGS.output)
    result = fit("srr", prepared, grid, SETTINGS)
    return sample(result.field, grid) * prepared.scale, grid


PROBES = np.array(
    [centre for centre, _ in LANDMARKS] + [(-20, 0, 0), (0, -18, 4), (0, 0, 0)], float
)


def at(volume: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    return map_coordinates(volume, grid.to_index(points).T, order=1, mode="nearest")


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the head, the result there, and at the probes."""
    plain = CODES[0]
    paths = write_stacks(tmp_path_factory.mktemp("reference"), RigidTransform(), [plain] * 3)
    volume, grid = reconstruct(paths)
    points = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    points = points[np.linalg.norm(points, axis=1) < 38]
    values = at(volume, grid, points)
    assert np.sqrt(np.mean((values - head(points)) ** 2)) < 40  # it is the head
    return points, values, at(volume, grid, PROBES)


def test_48_orientations_of_oblique_stacks(
    tmp_path: Path, reference: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    points, expected, probes = reference
    assert len(CODES) == 48
    worst = 0.0
    for number, code in enumerate(CODES):
        others = [CODES[(number * 7 + 5) % 48], CODES[(number * 11 + 17) % 48]]
        angle = np.deg2rad((0, 12, 25, 38)[number % 4])
        axis = np.array([[1, 1, 1], [0, 0, 1], [1, -1, 0]][number % 3], float)
        motion = RigidTransform.from_vector([*(angle * axis / np.linalg.norm(axis)), 0, 0, 0])
        volume, grid = reconstruct(write_stacks(tmp_path, motion, [code, *others]))
        found = at(volume, grid, motion.apply(points))
        worst = max(worst, float(np.sqrt(np.mean((found - expected) ** 2))))
        sides = at(volume, grid, motion.apply(PROBES))
        np.testing.assert_allclose(sides, probes, atol=30, err_msg=str(code))
        right, left = sides[0], sides[len(LANDMARKS)]
        assert right > left + 150, code
    assert worst < 15, worst  # of 900; sides exchanged make 100 and more


def test_a_motion_of_all_moves_the_result(
    tmp_path: Path, reference: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    points, expected, _ = reference
    turn = RigidTransform.from_vector([0.3, -0.2, 0.5, 0.0, 0.0, 0.0])
    for shift, limit in (((30.0, -18.0, 42.0), 15), ((31.0, -16.0, 44.0), 30)):
        # the second is no multiple of the voxel: another lattice, and interpolation between
        motion = turn @ RigidTransform.from_vector([0, 0, 0, *shift])
        volume, grid = reconstruct(write_stacks(tmp_path, motion, [CODES[0]] * 3))
        found = at(volume, grid, motion.apply(points))
        assert np.sqrt(np.mean((found - expected) ** 2)) < limit, shift


def test_doubled_intensities_double_the_result(
    tmp_path: Path, reference: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    points, expected, _ = reference
    volume, grid = reconstruct(write_stacks(tmp_path, RigidTransform(), [CODES[0]] * 3, scale=2.0))
    np.testing.assert_allclose(at(volume, grid, points), 2 * expected, rtol=1e-3, atol=0.5)
