# SPDX-License-Identifier: Apache-2.0
"""The standard deviation of a result, against its error where the truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from irem_bids.reconstruction.gauge import gauge
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.isotropy import Slicing, lost_power, passed_power, slicings
from irem_bids.reconstruction.masks import output_mask
from irem_bids.reconstruction.optimise import Fit, fit
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.simulate import Protocol, simulate
from irem_bids.reconstruction.solution import Job
from irem_bids.reconstruction.uncertainty import standard_deviation
from irem_bids.settings import Settings
from tests.phantom import head

SETTINGS = Settings.from_dict({"normalise": {"registration": False}})
TRUTH, GRID = head((34, 38, 30), 2.5)


def made(protocol: Protocol, scale: float = 1.0) -> tuple[Prepared, Fit, Grid]:
    stacks = [s.stack for s in simulate(TRUTH * np.float32(scale), GRID, protocol)]
    prepared = prepare(stacks, SETTINGS)
    grid = output_grid(prepared, SETTINGS.output)
    return prepared, fit("srr", prepared, grid, SETTINGS), grid


@pytest.fixture(scope="module")
def found() -> tuple[Prepared, Fit, Grid]:
    return made(Protocol(thickness=7.5, snr=30, seed=4))


def deviation(prepared: Prepared, result: Fit, grid: Grid) -> np.ndarray:
    mask = output_mask(prepared, grid)
    return standard_deviation(prepared, result, result.image(), grid, mask, SETTINGS)


def test_error_is_as_large_as_the_deviation_says(found: tuple[Prepared, Fit, Grid]) -> None:
    prepared, result, grid = found
    expected, mask = deviation(*found), output_mask(prepared, grid)
    assert expected.shape == grid.shape
    assert np.isfinite(expected).all()
    assert not expected[~mask].any()
    fitted = gauge(result.image(), grid, TRUTH, GRID, TRUTH > 20)
    back = grid.to_index(fitted.transform.apply(GRID.to_world(np.argwhere(TRUTH > 20))))
    at = tuple(np.rint(back).astype(int).T)
    error = (fitted.volume - TRUTH)[TRUTH > 20] / fitted.scale
    sd = expected[at]
    inside = sd > 0
    error, sd = error[inside], sd[inside]
    assert 0.85 < np.mean(np.abs(error) < 1.96 * sd) < 0.999
    edges = np.quantile(sd, np.linspace(0, 1, 9))
    which = np.clip(np.searchsorted(edges, sd) - 1, 0, 7)
    rms = [np.sqrt(np.mean(v[which == i] ** 2)) for v in (sd, error) for i in range(8)]
    assert np.corrcoef(rms[:8], rms[8:])[0, 1] > 0.9


def test_it_is_larger_with_more_noise_and_the_same_each_time(
    found: tuple[Prepared, Fit, Grid],
) -> None:
    once, again = deviation(*found), deviation(*found)
    assert np.array_equal(once, again)
    noisy = deviation(*made(Protocol(thickness=7.5, snr=8, seed=4)))
    assert np.median(noisy[noisy > 0]) > 1.2 * np.median(once[once > 0])


def test_scale_of_the_intensities_does_not_matter(found: tuple[Prepared, Fit, Grid]) -> None:
    doubled = deviation(*made(Protocol(thickness=7.5, snr=30, seed=4), scale=2.0))
    assert np.allclose(doubled, deviation(*found), rtol=1e-2, atol=1e-4)


def test_where_no_stack_looks_nothing_is_claimed(found: tuple[Prepared, Fit, Grid]) -> None:
    prepared, result, grid = found
    blind = [replace(s, mask=s.mask & _left(s.grid)) for s in prepared.stacks]
    cut = replace(prepared, stacks=tuple(blind))
    image, mask = result.image(), output_mask(prepared, grid)
    sd = standard_deviation(cut, result, image, grid, mask, SETTINGS)
    right = mask & ~_left(grid, -8.0)
    assert np.allclose(sd[right], np.sqrt(np.mean(image[mask] ** 2)))
    assert np.median(sd[mask & _left(grid, 8.0)]) < 0.3 * sd[right].mean()


def test_power_that_a_profile_passes_is_its_transform(found: tuple[Prepared, Fit, Grid]) -> None:
    prepared, _, grid = found
    still = replace(prepared, poses=tuple(RigidTransform() for _ in prepared.poses))
    square = Grid(grid.shape, np.diag([2.5, 2.5, 2.5, 1.0]))
    power = passed_power(slicings(Job(still, square, SETTINGS, "cpu", None, None)), square.shape)
    waves = np.stack(np.meshgrid(*(np.abs(np.fft.fftfreq(n)) for n in grid.shape), indexing="ij"))[
        ..., : grid.shape[2] // 2 + 1
    ]
    nearest = waves.min(axis=0)  # the stack whose normal is most across the wave
    width = 7.5 / 2.5
    expected = np.exp(-2 * (np.pi * nearest * width) ** 2 / (4 * np.log(2)))
    stacks = {s.plane: np.abs(s.normal).max() for s in prepared.stacks}
    assert len(stacks) == 3
    assert min(stacks.values()) > 0.999
    held = nearest * 2 * width < 1  # longer waves than two slices
    assert np.allclose(power[held], expected[held], atol=0.02)
    assert not power[~held].any()


def test_lost_power_is_what_was_taken_from_isotropic_noise() -> None:
    random = np.random.default_rng(2)
    shape = (48, 40, 44)
    waves = np.meshgrid(np.fft.fftfreq(48), np.fft.fftfreq(40), np.fft.rfftfreq(44), indexing="ij")
    radius = np.sqrt(sum(k**2 for k in waves))
    whole = np.fft.rfftn(random.normal(size=shape)) * np.exp(-((radius / 0.2) ** 2))
    passed = np.where(np.min(np.abs(waves), axis=0) < 0.08, 1.0, 0.0).astype(np.float32)
    full, cut = (np.fft.irfftn(part, s=shape, axes=(0, 1, 2)) for part in (whole, whole * passed))
    taken = np.mean((full - cut) ** 2)
    assert lost_power(cut.astype(np.float32), passed) == pytest.approx(taken, rel=0.08)
    assert lost_power(full.astype(np.float32), passed) < 0.1 * taken


def test_lost_power_of_every_second_plane_is_the_error_of_the_most_likely_image() -> None:
    random = np.random.default_rng(5)
    shape = (48, 40, 46)
    waves = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    length = np.sqrt(sum(k**2 for k in waves))
    power = np.exp(-((length / 0.14) ** 2))
    twin = np.roll(power, 23, axis=2)  # of the wave that has the same samples
    image = np.fft.ifftn(np.fft.fftn(random.normal(size=shape)) * np.sqrt(power)).real
    planes = np.where(np.arange(46) % 2 == 0, 2 * image, 0)  # both waves of a pair have their sum
    likely = np.fft.ifftn(np.fft.fftn(planes) * power / (power + twin)).real.astype(np.float32)
    missed = np.mean((likely - image) ** 2)
    expected = np.mean(power * twin / (power + twin))  # closed form, half a pair's
    assert missed == pytest.approx(expected, rel=0.05)
    stacks = [Slicing(np.array([0.0, 0.0, 1.0]), 0.25, np.ones(201))]
    passed = passed_power(stacks, shape)
    assert lost_power(likely, passed, stacks) == pytest.approx(missed, rel=0.08)
    assert lost_power(likely, passed) < 0.6 * missed


def _left(grid: Grid, middle: float = 0.0) -> np.ndarray:
    """Voxels to the left (RAS x below ``-middle``)."""
    points = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    return (points[:, 0] < -middle).reshape(grid.shape)
