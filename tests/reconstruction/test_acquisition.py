# SPDX-License-Identifier: Apache-2.0
"""The forward model against brute force, closed forms and its plain twin."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from irem_bids.reconstruction import operator_torch
from irem_bids.reconstruction.acquisition import (
    FWHM,
    ProfileError,
    StackModel,
    predict,
    profile_quadrature,
    quadrature,
    read_profile,
    sinc_profile,
)
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.sharpening import add_sharpened, sharpened
from irem_bids.reconstruction.solution import binned
from irem_bids.reconstruction.stack import Stack
from irem_bids.settings import Acquisition

POSE = RigidTransform.from_vector([0.1, 0.05, -0.2, 0.5, -0.7, 0.3])


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


def cube(size: int, voxel: float = 1.0) -> Grid:
    """About the origin."""
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = -(size - 1) / 2 * voxel
    return Grid((size, size, size), affine)


def blob(points: np.ndarray, width: float = 5.0) -> np.ndarray:
    """A Gaussian about (1, 2, 3) mm."""
    return np.exp(-0.5 * ((points - [1, 2, 3]) ** 2).sum(-1) / width**2)


def blob_volume(grid: Grid, width: float = 5.0) -> torch.Tensor:
    """The blob on a grid."""
    points = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    return torch.from_numpy(blob(points, width).astype(np.float32).reshape(grid.shape))


def slice_poses(count: int, seed: int = 0) -> np.ndarray:
    """(K, 4, 4) each slice somewhere else."""
    random = np.random.default_rng(seed)
    return np.stack(
        [
            RigidTransform.from_vector([*random.normal(0, 0.03, 3), *random.normal(0, 1, 3)]).matrix
            for _ in range(count)
        ]
    )


@pytest.mark.parametrize("kind", ["gaussian", "box", "sinc", "none"])
@pytest.mark.parametrize("thickness", [0.5, 2.0, 3.0, 4.4])
def test_weights_are_a_symmetric_mean(kind: str, thickness: float) -> None:
    rule = profile_quadrature(kind, thickness, 1.0)
    assert rule.weights.sum() == pytest.approx(1)
    assert rule.offsets @ rule.weights == pytest.approx(0, abs=1e-12)
    assert (rule.weights >= (-0.05 if kind == "sinc" else 0)).all()


@pytest.mark.parametrize("thickness", [3.0, 4.0, 5.0, 6.0])
def test_width_of_the_gaussian_rule(thickness: float) -> None:
    rule = profile_quadrature("gaussian", thickness, 1.0)
    sigma = math.sqrt((rule.offsets**2) @ rule.weights)
    # cut at 3 standard deviations the true profile, too, is 1 % narrower
    assert sigma == pytest.approx(thickness / FWHM, rel=0.02)


@pytest.mark.parametrize("thickness", [1.0, 2.5, 3.0, 4.0, 7.7])
def test_box_rule_has_the_variance_of_the_box(thickness: float) -> None:
    rule = profile_quadrature("box", thickness, 1.0)
    assert (rule.offsets**2) @ rule.weights == pytest.approx(thickness**2 / 12)


def test_sinc_profile_has_unit_width_and_a_flat_top() -> None:
    half = sinc_profile(np.array([0.0, 0.5, -0.5]))
    assert half[0] == pytest.approx(1, abs=1e-3)
    assert half[1:] == pytest.approx([0.5, 0.5], abs=0.02)
    assert np.abs(sinc_profile(np.linspace(1.2, 2, 9))).max() < 0.01


def test_a_measured_gaussian_is_the_named_one(tmp_path: Path) -> None:
    z = np.linspace(-3, 3, 321) * 4.0 / FWHM
    path = tmp_path / "profile.txt"
    np.savetxt(path, np.stack([z, 7 * np.exp(-0.5 * (z * FWHM / 4.0) ** 2)], axis=1))
    measured = quadrature(Acquisition(profile_file=str(path)), 99.0, 0.5)
    named = profile_quadrature("gaussian", 4.0, 0.5)
    for power in (2, 4):
        moments = [(q.offsets**power) @ q.weights for q in (measured, named)]
        assert moments[0] == pytest.approx(moments[1], rel=0.05)


@pytest.mark.parametrize("text", ["1 2 3\n4 5 6\n7 8 9\n", "a b\n", "0 1\n", "0 0\n1 0\n2 0\n"])
def test_a_file_that_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.txt"
    path.write_text(text)
    with pytest.raises(ProfileError, match="expected"):
        read_profile(path)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_adjoint_is_exact(axis: int) -> None:
    stack, grid = blob_stack(axis), cube(28)
    model = StackModel(stack, stack.mask, grid, Acquisition())
    model.set_poses(slice_poses(model.slices))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(*grid.shape, generator=random)
    y = torch.randn(len(model.values), generator=random)
    left = torch.dot(model.forward(x).double(), y.double())
    right = torch.sum(x.double() * model.adjoint(y).double())
    assert float(left) == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_compiled_loops_equal_their_plain_twins(axis: int) -> None:
    """On a grid that is oblique, anisotropic in its axes' order and smaller than the stack."""
    stack = blob_stack(axis)
    turn = RigidTransform.from_vector([0.2, -0.3, 0.1, 1, -2, 0.5]).matrix
    grid = Grid((19, 22, 17), turn @ cube(19, 1.3).affine @ np.diag([-1, 1, 1, 1.0]))
    model = StackModel(stack, stack.mask, grid, Acquisition())
    model.set_poses(slice_poses(model.slices), width=1.2)
    rows = operator_torch.DeviceRows(model.rows, torch.device("cpu"))
    volume = torch.randn(*grid.shape, generator=torch.Generator().manual_seed(1))
    values = torch.randn(len(model.values), generator=torch.Generator().manual_seed(2))
    sharp = sharpened(volume, model.sharpness)
    assert torch.allclose(model.forward(volume), operator_torch.forward(sharp, rows), atol=1e-4)
    there = sharpened(operator_torch.adjoint(values, rows, grid.shape), model.sharpness)
    assert torch.allclose(model.adjoint(values), there, atol=1e-4)
    pivot = grid.to_index(model.pivot)
    expected = operator_torch.derivatives(sharp, rows, grid.affine, pivot)
    expected[:, 6] /= 1.2
    assert torch.allclose(model.derivatives(volume), expected, atol=2e-3, rtol=1e-3)


def test_sharpening_equals_its_plain_form_and_is_its_own_adjoint() -> None:
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 9, 7, 8, generator=random)
    each = np.array([0.08, 0.0, 0.05], np.float32)
    expected = x.clone()
    for axis in (0, 2):
        padded = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, x.shape[axis] - 1, 1)], axis)
        expected -= float(each[axis]) * padded.diff(dim=axis).diff(dim=axis)
    found = sharpened(x, each)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float((found * y).sum()) == pytest.approx(
        float((x * sharpened(y, each)).sum()), rel=1e-4
    )
    added = torch.ones_like(x)
    add_sharpened(torch.stack([x - y, y]), each, added)
    assert torch.allclose(added - 1, expected, atol=1e-5)


def test_a_turned_stack_is_predicted_without_the_blur_of_linear_interpolation() -> None:
    """A wave of six voxels; a grid along the stack needs no sharpening, a turned one does."""
    stack, grid = blob_stack(spacing=2.0, thickness=2.0), cube(45)
    points = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    wave = np.cos(2 * np.pi * points[:, 0] / 6.0).reshape(grid.shape).astype(np.float32)
    pose = RigidTransform.from_vector([0.05, 0.31, 0.52, 0.3, 0.2, 0.1])
    model = StackModel(stack, stack.mask, grid, Acquisition(profile="none"))
    assert not model.sharpness.any()
    model.set_poses(pose)
    assert np.allclose(model.sharpness, 1 / 12, atol=0.01)
    moved = pose.apply(stack.grid.to_world(model.index))
    expected = np.cos(2 * np.pi * moved[:, 0] / 6.0)
    sharp = model.forward(torch.from_numpy(wave)).numpy()
    model.sharpness = np.zeros(3, np.float32)
    blurred = model.forward(torch.from_numpy(wave)).numpy()
    assert float(blurred @ expected / (expected @ expected)) < 0.93
    assert float(sharp @ expected / (expected @ expected)) == pytest.approx(1, abs=0.02)
    assert np.std(sharp - expected) < 0.6 * np.std(blurred - expected)
    apart = StackModel(blob_stack(), blob_stack().mask, grid, Acquisition(profile="none"))
    apart.set_poses(pose)
    assert apart.gap == pytest.approx(2.0)
    assert not apart.sharpness.any()  # nobody sees the voxels that it would take from


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_loops_of_a_gpu_are_those_of_the_cpu(
    device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: the way that a GPU's model takes, on the CPU's tensors."""
    if device != "cpu":
        request.getfixturevalue("cuda")
    stack, grid = blob_stack(), cube(28)
    here, there = (StackModel(stack, stack.mask, grid, Acquisition(), d) for d in ("cpu", device))
    volume = torch.randn(*grid.shape, generator=torch.Generator().manual_seed(1))
    values = torch.randn(len(here.values), generator=torch.Generator().manual_seed(2))
    for seed, width in ((1, 1.0), (2, 1.3)):
        for model in (here, there):
            model.set_poses(slice_poses(7, seed), width)
        expected = here.forward(volume), here.adjoint(values), here.derivatives(volume)
        with monkeypatch.context() as patch:
            patch.setattr(StackModel, "compiled", False)
            image, rows = volume.to(device), values.to(device)
            found = there.forward(image), there.adjoint(rows), there.derivatives(image)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("kind", "bound"), [("gaussian", 0.012), ("box", 0.012)])
def test_forward_model_against_dense_integral(kind: str, bound: float) -> None:
    """Brute force: 401 points through each slice of the continuous blob."""
    stack, grid = blob_stack(), cube(40)
    found = predict(blob_volume(grid).numpy(), grid, stack, POSE, Acquisition(profile=kind))
    offsets = np.linspace(-8, 8, 401)
    density = (
        np.exp(-0.5 * (offsets * FWHM / 4.0) ** 2) if kind == "gaussian" else np.abs(offsets) <= 2.0
    ).astype(float)
    density /= density.sum()
    centres = stack.grid.to_world(np.argwhere(stack.mask))
    expected = sum(
        w * blob(POSE.apply(centres + z * stack.normal))
        for z, w in zip(offsets, density, strict=True)
    )
    assert np.abs(found[stack.mask] - expected).max() < bound


def test_gaussian_through_gaussian_is_a_gaussian() -> None:
    """Closed form: variances add along the normal; the width scales the profile."""
    stack, grid = blob_stack(axis=0), cube(80, 0.5)
    found = predict(
        blob_volume(grid).numpy(), grid, stack, RigidTransform(), Acquisition(), width=1.5
    )
    points = stack.grid.to_world(np.argwhere(stack.mask)) - [1, 2, 3]
    wide = 25 + (1.5 * 4.0 / FWHM) ** 2
    expected = math.sqrt(25 / wide) * np.exp(
        -0.5 * points[:, 0] ** 2 / wide - 0.5 * (points[:, 1:] ** 2).sum(1) / 25
    )
    assert np.abs(found.ravel() - expected).max() < 0.01


def test_each_slice_has_its_own_pose() -> None:
    stack, grid = blob_stack(axis=1), cube(60)
    poses = slice_poses(7)
    found = predict(blob_volume(grid).numpy(), grid, stack, poses, Acquisition(profile="none"))
    voxels = np.argwhere(stack.mask)
    moved = np.einsum(
        "nab,nb->na", poses[voxels[:, 1], :3, :3], stack.grid.to_world(voxels)
    ) + poses[voxels[:, 1], :3, 3]  # fmt: skip
    assert np.abs(found[stack.mask] - blob(moved)).max() < 0.012


def test_derivatives_against_differences() -> None:
    stack, grid = blob_stack(), cube(40)
    volume = blob_volume(grid, 9.0)
    model = StackModel(stack, stack.mask, grid, Acquisition())
    model.set_poses(POSE, width=1.1)
    derivative, pivot = model.derivatives(volume), model.pivot
    for column in range(7):
        size = 0.02 if column < 3 else 0.25 if column < 6 else 0.05
        change = []
        for sign in (1, -1):
            if column < 6:
                vector = np.zeros(6)
                vector[column] = sign * size
                model.set_poses(RigidTransform.from_vector(vector, pivot) @ POSE, 1.1)
            else:
                model.set_poses(POSE, 1.1 + sign * size)
            change.append(model.forward(volume))
        expected = (change[0] - change[1]) / (2 * size)
        slope = float((derivative[:, column] * expected).sum() / (expected**2).sum())
        assert slope == pytest.approx(1, abs=0.02)
        assert float((derivative[:, column] - expected).norm() / expected.norm()) < 0.12


def test_in_plane_voxels_twice_as_large_are_averaged() -> None:
    affine = np.diag([2.0, 2.0, 6.0, 1.0])
    shape = (4, 4, 3)
    data, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    stack = Stack("s", data, Grid(shape, affine), 2, 6.0, mask)
    grid = cube(40)
    x = torch.from_numpy(grid.to_world(np.indices(grid.shape).reshape(3, -1).T)[:, 0] ** 2)
    found = predict(
        x.reshape(grid.shape).float().numpy(), grid, stack, RigidTransform(), Acquisition()
    )
    centres = stack.grid.to_world(np.argwhere(mask))[:, 0]
    # points at +-0.5 mm of each voxel, where the trilinear square is up to 0.25 too large
    assert np.allclose(found.ravel() - centres**2, 0.25, atol=0.26)


def test_binned_voxels_are_means_at_the_middle_of_theirs() -> None:
    random = np.random.default_rng(0)
    stack = blob_stack()
    points = stack.grid.to_world(np.indices(stack.grid.shape).reshape(3, -1).T)
    stack = stack.with_data((points @ [1.0, 2.0, 3.0]).reshape(stack.grid.shape))
    use = random.random(stack.grid.shape) < 0.9
    small, where, counts = binned(stack, use, 2.0)
    assert small.grid.shape == (13, 13, 7)
    assert counts.sum() == use.sum()
    full = counts == 4
    expected = small.grid.to_world(np.argwhere(full)) @ [1.0, 2.0, 3.0]
    assert np.allclose(small.data[full], expected, atol=1e-4)
    assert np.array_equal(where, counts > 0)
