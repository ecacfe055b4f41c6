# SPDX-License-Identifier: Apache-2.0
"""The forward model against brute force and a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from irem_bids.reconstruction.acquisition import (
    FWHM,
    Nodes,
    StackModel,
    interpolation_matrix,
    predict,
    profile_nodes,
    profile_quadrature,
)
from irem_bids.reconstruction.fields import GridField
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.stack import Stack
from irem_bids.settings import Acquisition


def blob_stack(axis: int = 2, spacing: float = 4.0, thickness: float = 4.0) -> Stack:
    """An empty stack of 24 mm about the origin, slices along ``axis``."""
    sizes = np.ones(3)
    sizes[axis] = spacing
    shape = [25, 25, 25]
    shape[axis] = 7
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * sizes
    data = np.zeros(shape, np.float32)
    return Stack("s", data, Grid(shape, affine), axis, thickness, np.ones(shape, bool))


def blob(points: np.ndarray, width: float = 5.0) -> np.ndarray:
    """A Gaussian about (1, 2, 3) mm."""
    return np.exp(-0.5 * ((points - [1, 2, 3]) ** 2).sum(-1) / width**2)


@pytest.mark.parametrize("kind", ["gaussian", "box", "none"])
@pytest.mark.parametrize("thickness", [0.5, 2.0, 3.0, 4.4])
def test_weights_are_a_symmetric_mean(kind: str, thickness: float) -> None:
    rule = profile_quadrature(kind, thickness, 1.0)
    assert rule.weights.sum() == pytest.approx(1)
    assert (rule.weights >= 0).all()
    assert rule.offsets @ rule.weights == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("thickness", [3.0, 4.0, 5.0, 6.0])
def test_width_of_the_gaussian_rule(thickness: float) -> None:
    rule = profile_quadrature("gaussian", thickness, 1.0)
    sigma = math.sqrt((rule.offsets**2) @ rule.weights)
    # cut at 3 standard deviations the true profile, too, is 1 % narrower
    assert sigma == pytest.approx(thickness / FWHM, rel=0.08)


@pytest.mark.parametrize("thickness", [1.0, 2.5, 3.0, 4.0, 7.7])
def test_box_rule_has_the_variance_of_the_box(thickness: float) -> None:
    rule = profile_quadrature("box", thickness, 1.0)
    assert (rule.offsets**2) @ rule.weights == pytest.approx(thickness**2 / 12)


@pytest.mark.parametrize("kind", ["gaussian", "box"])
def test_batch_nodes_have_the_width_of_the_dense_rule(kind: str) -> None:
    dense = profile_quadrature(kind, 4.0, 0.01)
    few = profile_nodes(kind, 4.0, 7)
    second = [(q.offsets**2) @ q.weights for q in (dense, few)]
    assert second[1] == pytest.approx(second[0], rel=0.05)


def test_interpolation_matrix_equals_scipy() -> None:
    from scipy.ndimage import map_coordinates

    random = np.random.default_rng(1)
    volume = random.normal(size=(5, 6, 7)).astype(np.float32)
    index = random.uniform(0, 1, (50, 3)) * [4, 5, 6]
    expected = map_coordinates(volume, index.T, order=1)
    found = interpolation_matrix(index, volume.shape) @ volume.ravel()
    assert np.allclose(found, expected, atol=1e-5)
    outside = interpolation_matrix(np.array([[-2.0, 0, 0], [0, 0, 9]]), volume.shape)
    assert abs(outside).sum() == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_adjoint_is_exact(axis: int) -> None:
    stack = blob_stack(axis)
    affine = np.eye(4)
    affine[:3, 3] = -13.5
    grid = Grid((28, 28, 28), affine)
    model = StackModel(stack, stack.mask, grid, "gaussian")
    model.set_pose(RigidTransform.from_vector([0.1, -0.2, 0.05, 1, 2, -1]))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(28**3, generator=random)
    y = torch.randn(int(stack.mask.sum()), generator=random)
    left = torch.dot(model.forward(x).double(), y.double())
    right = torch.dot(x.double(), model.adjoint(y).double())
    assert float(left) == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize(("kind", "bound"), [("gaussian", 0.012), ("box", 0.012)])
def test_forward_model_against_dense_integral(kind: str, bound: float) -> None:
    """Brute force: 401 points through each slice of the continuous blob."""
    stack = blob_stack()
    affine = np.eye(4)
    affine[:3, 3] = -19.5
    grid = Grid((40, 40, 40), affine)
    pose = RigidTransform.from_vector([0.1, 0.05, -0.2, 0.5, -0.7, 0.3])
    model = StackModel(stack, stack.mask, grid, kind)
    model.set_pose(pose)
    volume = blob(grid.to_world(np.indices(grid.shape).reshape(3, -1).T)).astype(np.float32)
    found = model.forward(torch.from_numpy(volume)).numpy()

    offsets = np.linspace(-8, 8, 401)
    density = (
        np.exp(-0.5 * (offsets * FWHM / 4.0) ** 2) if kind == "gaussian" else np.abs(offsets) <= 2.0
    ).astype(float)
    density /= density.sum()
    centres = stack.grid.to_world(np.argwhere(stack.mask))
    expected = sum(
        w * blob(pose.apply(centres + z * stack.normal))
        for z, w in zip(offsets, density, strict=True)
    )
    assert np.abs(found - expected).max() < bound


def test_gaussian_through_gaussian_is_a_gaussian() -> None:
    """Closed form: variances add along the normal."""
    stack = blob_stack(axis=0)
    affine = np.eye(4) * 0.5
    affine[3, 3] = 1
    affine[:3, 3] = -19.75
    grid = Grid((80, 80, 80), affine)
    volume = blob(grid.to_world(np.indices(grid.shape).reshape(3, -1).T)).astype(np.float32)
    field = GridField(
        grid.shape, grid.affine.tolist(), torch.from_numpy(volume).reshape(80, 80, 80)
    )
    found = predict(field, stack, RigidTransform(), 2.0, Acquisition(profile="gaussian"))
    points = stack.grid.to_world(np.argwhere(stack.mask)) - [1, 2, 3]
    wide = 25 + (4.0 / FWHM) ** 2
    expected = math.sqrt(25 / wide) * np.exp(
        -0.5 * points[:, 0] ** 2 / wide - 0.5 * (points[:, 1:] ** 2).sum(1) / 25
    )
    assert np.abs(found.ravel() - 2 * expected).max() < 0.02


def test_derivatives_by_pose_against_differences() -> None:
    stack = blob_stack()
    affine = np.eye(4)
    affine[:3, 3] = -19.5
    grid = Grid((40, 40, 40), affine)
    volume = torch.from_numpy(
        blob(grid.to_world(np.indices(grid.shape).reshape(3, -1).T), 9.0).astype(np.float32)
    )
    pose = RigidTransform.from_vector([0.05, 0.1, -0.1, 0.2, 0.4, -0.3])
    model = StackModel(stack, stack.mask, grid, "gaussian")
    model.set_pose(pose)
    derivative, pivot = model.pose_derivatives(volume), model.pivot
    for column in range(6):
        size = 0.02 if column < 3 else 0.25
        change = []
        for sign in (1, -1):
            vector = np.zeros(6)
            vector[column] = sign * size
            model.set_pose(RigidTransform.from_vector(vector, pivot) @ pose)
            change.append(model.forward(volume))
        expected = (change[0] - change[1]) / (2 * size)
        slope = float((derivative[:, column] * expected).sum() / (expected**2).sum())
        error = float((derivative[:, column] - expected).norm() / expected.norm())
        assert slope == pytest.approx(1, abs=0.02)
        assert error < 0.1  # the model's own slope jumps from voxel to voxel, ours is smoothed


def test_in_plane_voxels_twice_as_large_are_averaged() -> None:
    affine = np.diag([2.0, 2.0, 6.0, 1.0])
    stack = Stack(
        "s",
        np.zeros((4, 4, 3), np.float32),
        Grid((4, 4, 3), affine),
        2,
        6.0,
        np.ones((4, 4, 3), bool),
    )
    nodes = Nodes(stack, stack.mask, "box", 1.0)
    centre = nodes.weights @ nodes.points
    assert np.allclose(centre, stack.grid.to_world(np.argwhere(stack.mask)), atol=1e-5)
    spread = nodes.weights @ nodes.points**2 - centre**2
    assert np.allclose(spread[:, :2], 0.25, atol=1e-4)  # points at +-0.5 mm
