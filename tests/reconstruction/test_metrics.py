# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-image and closed forms; the gauge against known motions."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from irem_bids.reconstruction import gauge, metrics
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.spline import Spline
from tests.phantom import head


@pytest.fixture(scope="module")
def volume():
    return head()


@pytest.fixture(scope="module")
def noisy(volume):
    return volume[0] + np.random.default_rng(0).normal(0, 20, volume[0].shape).astype(np.float32)


def test_psnr_is_that_of_scikit_image(volume, noisy):
    truth = volume[0]
    expected = peak_signal_noise_ratio(truth, noisy, data_range=truth.max() - truth.min())
    assert metrics.psnr(noisy, truth, peak="range") == pytest.approx(expected, abs=1e-4)


def test_psnr_counts_the_mask_only_and_takes_its_peak_there(volume, noisy):
    truth, mask = volume[0], volume[0] > 100
    spoiled = np.where(mask, noisy, 1e6)
    error = np.mean((noisy[mask].astype(float) - truth[mask]) ** 2)
    peak = np.percentile(truth[mask], 99.9)
    assert metrics.psnr(spoiled, truth, mask) == pytest.approx(10 * np.log10(peak**2 / error))
    assert metrics.psnr(truth, truth, mask) == np.inf
    assert metrics.psnr(noisy, truth, mask, peak=1.0) < 0
    with pytest.raises(metrics.MetricError, match=r"expected 'p99\.9'"):
        metrics.psnr(noisy, truth, peak="best")


def test_ssim_is_that_of_scikit_image(volume, noisy):
    truth, peak = volume[0], metrics.peak_value(volume[0])
    expected = structural_similarity(
        noisy,
        truth,
        data_range=peak,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert np.abs(metrics.ssim_map(noisy, truth, peak) - expected).max() < 1e-3
    mask = np.zeros(truth.shape, dtype=bool)
    mask[10:25, 12:30, 8:25] = True
    whole = metrics.ssim_map(noisy, truth, metrics.peak_value(truth, mask))[mask].mean()
    assert metrics.ssim(noisy, truth, mask) == pytest.approx(whole, abs=1e-6)
    assert metrics.ssim(truth, truth) == pytest.approx(1.0)


def test_ncc_ignores_gain_and_offset(volume, noisy):
    truth = volume[0]
    assert metrics.ncc(3 * truth + 7, truth) == pytest.approx(1.0)
    assert metrics.ncc(-truth, truth) == pytest.approx(-1.0)
    assert metrics.ncc(np.ones_like(truth), truth) == 0.0
    assert metrics.ncc(noisy, truth) == pytest.approx(
        np.corrcoef(noisy.ravel(), truth.ravel())[0, 1], abs=1e-6
    )


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_noise_is_found_in_a_smooth_image(slice_axis):
    x, y, z = np.meshgrid(*[np.linspace(0, 1, n) for n in (50, 50, 30)], indexing="ij")
    smooth = 500 + 200 * np.sin(3 * x + y) * np.cos(2 * z)
    image = smooth + np.random.default_rng(1).normal(0, 10, smooth.shape)
    assert metrics.noise_sigma(image, slice_axis=slice_axis) == pytest.approx(10, rel=0.02)
    assert metrics.snr(image, slice_axis=slice_axis) == pytest.approx(smooth.mean() / 10, rel=0.03)
    assert metrics.snr(np.full((5, 5, 5), 3.0)) == np.inf


def test_snr_of_two_repeats_and_what_physics_promises():
    rng = np.random.default_rng(2)
    first, second = (400 + rng.normal(0, 8, (30, 30, 30)) for _ in range(2))
    assert metrics.snr_of_repeats(first, second) == pytest.approx(50, rel=0.02)
    assert metrics.expected_snr_ratio((1, 1, 4), (1, 1, 1), 10.0, 40.0) == 2.0


def test_masks_and_shapes_are_checked(volume):
    truth = volume[0]
    with pytest.raises(metrics.MetricError, match="one shape"):
        metrics.psnr(truth[1:], truth)
    with pytest.raises(metrics.MetricError, match="empty"):
        metrics.ncc(truth, truth, np.zeros(truth.shape, dtype=bool))
    with pytest.raises(metrics.MetricError, match="no head"):
        metrics.head_mask(np.zeros((4, 4, 4)))


def test_head_mask_is_the_head_without_holes(volume):
    truth = volume[0].copy()
    truth[0, 0, 0] = truth.max()  # a bright speck elsewhere
    mask = metrics.head_mask(truth)
    assert not mask[0, 0, 0]
    assert mask[truth.shape[0] // 2, truth.shape[1] // 2, truth.shape[2] // 2]
    assert mask.mean() == pytest.approx((volume[0] > 40).mean(), abs=0.03)


def test_spline_goes_through_the_voxels_and_is_zero_outside(volume):
    truth, grid = volume
    spline = Spline(truth, grid)
    indices = np.argwhere(truth > 0)[::7]
    assert np.allclose(
        spline.at(grid.to_world(indices), threads=2), truth[tuple(indices.T)], atol=1e-2
    )
    assert np.all(spline.at(grid.to_world([[-60.0, 3, 3], [3, 300, 3]])) == 0)
    assert spline.at(np.zeros((0, 3))).shape == (0,)


def test_gauge_takes_motion_gain_and_offset_out(volume):
    truth, grid = volume
    motion = RigidTransform.from_vector([0.05, -0.04, 0.06, 2.5, -3.0, 1.5], grid.centre)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = grid.corners().min(axis=0) - 8
    recon_grid = Grid((64, 70, 60), affine)
    points = recon_grid.to_world(np.moveaxis(np.indices(recon_grid.shape), 0, -1))
    # the reconstruction shows at T(x) what the truth has at x
    moved = 2.0 * Spline(truth, grid).at(motion.inverse().apply(points)) + 30
    found = gauge.gauge(moved, recon_grid, truth, grid, threads=2)
    foreground = grid.to_world(np.argwhere(truth > 40))
    error = np.linalg.norm(found.transform.apply(foreground) - motion.apply(foreground), axis=1)
    assert error.max() < 0.02
    assert found.scale == pytest.approx(0.5, rel=2e-3)
    assert found.offset == pytest.approx(-15, abs=1.0)
    assert found.coverage == 1.0
    mask = metrics.head_mask(truth)
    assert metrics.psnr(found.volume, truth, mask) > 38
    assert (
        metrics.psnr(
            Spline(moved, recon_grid).at(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))),
            truth,
            mask,
        )
        < 15
    )


def test_gauge_leaves_a_perfect_image_alone(volume):
    truth, grid = volume
    found = gauge.gauge(truth, grid, truth, grid)
    assert np.allclose(found.transform.matrix, np.eye(4), atol=1e-6)
    near = gauge.near_mask(metrics.head_mask(truth))
    assert np.allclose(found.volume[near], truth[near], atol=0.05)


def test_gauge_says_what_is_wrong(volume):
    truth, grid = volume
    with pytest.raises(metrics.MetricError, match="constant"):
        gauge.gauge(np.ones_like(truth), grid, truth, grid)
    away = Grid(grid.shape, RigidTransform.from_vector([0, 0, 0, 500, 0, 0]).matrix @ grid.affine)
    with pytest.raises(metrics.MetricError, match="overlap"):
        gauge.gauge(truth, away, truth, grid)
    with pytest.raises(metrics.MetricError, match="expected some voxels"):
        gauge.gauge(truth, grid, truth, grid, np.zeros(truth.shape, dtype=bool))


def test_target_registration_error_removes_the_common_motion():
    rng = np.random.default_rng(3)
    points = rng.uniform(-60, 60, (500, 3))
    true = [
        RigidTransform.from_vector(rng.normal(0, 0.05, 6) * [1, 1, 1, 40, 40, 40]) for _ in range(3)
    ]
    common = RigidTransform.from_vector([0.1, 0.2, -0.1, 5, 6, 7])
    errors = gauge.target_registration_error([common @ t for t in true], true, points)
    assert max(errors) < 1e-9
    shift = RigidTransform.from_vector([0, 0, 0, 0.3, 0, 0])
    moved = [common @ true[0], common @ true[1], common @ shift @ true[2]]
    errors = gauge.target_registration_error(moved, true, points)
    assert errors == pytest.approx([0.1, 0.1, 0.2], abs=0.01)
    with pytest.raises(metrics.MetricError, match="2 estimated and 3 true"):
        gauge.target_registration_error(true[:2], true, points)
