# SPDX-License-Identifier: Apache-2.0
"""Between slices that leave gaps: against dense algebra and against total variation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from irem_bids.reconstruction import gaps, optimise
from irem_bids.reconstruction.gaps import (
    POWER,
    SLOWEST,
    _most_likely,
    _power,
    _torus,
    leave_gaps,
    share_of,
)
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.masks import output_mask
from irem_bids.reconstruction.metrics import head_mask
from irem_bids.reconstruction.optimise import Fit, fit
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.sample import evaluate
from irem_bids.reconstruction.simulate import simulate
from irem_bids.reconstruction.solution import Job, State, build_system
from irem_bids.reconstruction.uncertainty import standard_deviation
from irem_bids.settings import Settings
from tests.phantom import head

SETTINGS = Settings.from_dict(
    {
        "normalise": {"registration": False},
        "acquisition": {"profile": "none"},
        "irem": {"steps": 20},
    }
)


def variance(shape: tuple[int, ...], slowest: float) -> NDArray[np.float64]:
    """Of the waves of an image with the spectrum |2 pi k|^-3, at all frequencies."""
    sides = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    k = np.sqrt(sum(side**2 for side in sides) + slowest**2)
    return np.asarray((2 * np.pi * k) ** -POWER)


def scale_free(shape: tuple[int, int, int], c: float) -> NDArray[np.float32]:
    """An image with the power c |2 pi k|^-3."""
    white = np.random.default_rng(5).standard_normal(shape)
    waves = np.fft.fftn(white) * np.sqrt(c * variance(shape, 1e-4))
    waves[0, 0, 0] = 0
    return np.fft.ifftn(waves).real.astype(np.float32)


def planes(volume: NDArray[np.float32], grid: Grid, every: float) -> Prepared:
    """Three stacks of planes that are ``every`` mm apart."""
    protocol = Protocol(thickness=every, profile="decimate", margin=0.0)
    return prepare([s.stack for s in simulate(volume, grid, protocol)], SETTINGS)


def test_most_likely_image_against_dense_algebra() -> None:
    volume, grid = head((12, 14, 11), 4.0)
    prepared = planes(volume, grid, 16.0)
    job = Job(prepared, output_grid(prepared, SETTINGS.output), SETTINGS, "cpu", None, None)
    system = build_system(job, job.grid, State.registered(prepared))
    assert leave_gaps(system)
    shape = system.grid.shape
    start = torch.full(shape, 0.5)
    found = _most_likely(system, start, 0.02, 400)
    # x = m + C A^T (A C A^T + W^-1)^-1 (y - A m), with C of the padded torus
    matrix = []
    for voxel in range(system.domain.numel()):
        unit = torch.zeros(system.domain.numel())
        unit[voxel] = 1
        matrix.append(torch.cat([m.forward(unit.reshape(shape)) for m in system.models]))
    a = torch.stack(matrix, 1).double().numpy()
    wide = _torus(shape)
    kernel = np.fft.ifftn(variance(wide, SLOWEST) / 0.02).real
    index = np.indices(shape).reshape(3, -1)
    apart = (index[:, :, None] - index[:, None, :]) % np.array(wide)[:, None, None]
    c = kernel[tuple(apart)]
    weights = torch.cat(system.weights()).double().numpy()
    values = torch.cat([m.values for m in system.models]).double().numpy()
    mean = np.full(a.shape[1], 0.5)
    inner = a @ c @ a.T + np.diag(1 / weights)
    expected = mean + c @ a.T @ np.linalg.solve(inner, values - a @ mean)
    inside = system.domain.numpy().ravel() > 0
    assert np.allclose(found.numpy().ravel()[inside], expected[inside], atol=2e-3)
    assert (found.numpy().ravel()[~inside] == 0.5).all()


def test_forty_iterations_do_most_of_it(
    smooth: tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit],
) -> None:
    # waves scaled by all of the data's weight leave 0.39 of the way, by the penalty alone 0.78
    _, prepared, result = smooth
    job = Job(prepared, result.grid, SETTINGS, "cpu", None, None)
    edges = optimise._linear_or_saved(job)
    system = build_system(job, job.grid, edges.state)
    mask = torch.from_numpy(output_mask(prepared, job.grid))
    end, now = (_most_likely(system, edges.volume, 1e-3, n) for n in (800, 40))
    left, way = (float((v - end)[mask].square().mean().sqrt()) for v in (now, edges.volume))
    assert left < 0.34 * way


def test_power_of_an_image_is_measured() -> None:
    image = torch.from_numpy(scale_free((72, 72, 72), 0.4))
    assert _power(image, 8.0) == pytest.approx(0.4, rel=0.25)
    assert _power(image, 100.0) == 0.0  # no wave is that long here


def score(result: Fit, truth: tuple[NDArray[np.float32], Grid]) -> float:
    """Root mean square error in the head, scaled intensity."""
    volume, grid = truth
    index = np.argwhere(head_mask(volume))
    found = evaluate(result.field, grid.to_world(index))
    return float(np.sqrt(np.mean((found - volume[tuple(index.T)] / result.scale) ** 2)))


@pytest.fixture(scope="module")
def smooth() -> tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit]:
    """A head whose edges are soft, its planes four voxels apart, and what comes of them."""
    truth = head((48, 56, 48), 3.0)
    prepared = planes(*truth, 12.0)
    return truth, prepared, fit("irem", prepared, output_grid(prepared, SETTINGS.output), SETTINGS)


def test_the_image_of_a_spectrum_is_nearer(
    smooth: tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth, prepared, result = smooth
    monkeypatch.setattr(optimise, "leave_gaps", lambda system: False)
    other = fit("irem", prepared, result.grid, SETTINGS)
    assert score(result, truth) < 0.95 * score(other, truth)


def test_its_standard_deviation_is_that_of_its_errors(
    smooth: tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit],
) -> None:
    truth, prepared, result = smooth
    mask = output_mask(prepared, result.grid)
    sd = standard_deviation(prepared, result, result.image(), result.grid, mask, SETTINGS)
    assert 0.5 < float(np.sqrt(np.mean(sd[mask] ** 2))) / score(result, truth) < 2


def test_without_a_network_it_is_both_images_by_their_shares(
    smooth: tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit],
) -> None:
    _, prepared, with_network = smooth
    alone = SETTINGS.updated({"irem": {"steps": 0}})
    result = fit("irem", prepared, with_network.grid, alone)
    share = result.info["spectrum_share"]
    assert 0.5 < share == with_network.info["spectrum_share"] <= 1
    job = Job(prepared, result.grid, alone, "cpu", None, None)
    edges = optimise._linear_or_saved(job)
    spectrum = gaps.joined(job, edges.state, edges.volume)
    both = ((1 - share) * edges.volume + share * spectrum).numpy()
    head = output_mask(prepared, result.grid)
    inner, air = (
        ndimage.binary_erosion(head, iterations=5),
        ~ndimage.binary_dilation(head, iterations=5),
    )
    assert inner.any() and air.any()
    assert np.allclose(result.image()[inner], both[inner], atol=1e-4)
    assert np.allclose(result.image()[air], edges.volume.numpy()[air], atol=1e-4)
    errors = result.info["rehearsed_error"]
    assert errors["both"] <= max(errors["edges"], errors["spectrum"])


def test_share_of_two_images_is_the_root_of_that_of_least_squares() -> None:
    one, other = np.random.default_rng(3).standard_normal((2, 100))
    least = np.linalg.lstsq((one - other)[:, None], one, rcond=None)[0][0]
    edges, spectrum = torch.from_numpy(one), torch.from_numpy(other)
    assert share_of(edges, spectrum) == pytest.approx(least ** (1 / 3))
    assert share_of(edges, 2 * edges) == 0
    assert share_of(2 * edges, edges) == 1
    assert share_of(edges, edges) == 0


def test_plateaus_stay_plateaus() -> None:
    blocks = np.random.default_rng(2).uniform(1, 2, (6, 6, 6))
    volume = np.pad(np.kron(blocks, np.ones((8, 8, 8))), 2).astype(np.float32)
    prepared = planes(volume, Grid(volume.shape, np.eye(4)), 4.0)
    result = fit("irem", prepared, output_grid(prepared, SETTINGS.output), SETTINGS)
    assert result.info["spectrum_share"] == 0


def test_slices_that_meet_have_no_gaps() -> None:
    thick = SETTINGS.updated({"acquisition": {"profile": "box"}})
    protocol = Protocol(thickness=9.0, profile="box")
    meeting = prepare([s.stack for s in simulate(*head((24, 28, 24), 3.0), protocol)], thick)
    job = Job(meeting, output_grid(meeting, thick.output), thick, "cpu", None, None)
    system = build_system(job, job.grid, State.registered(meeting))
    assert not leave_gaps(system)
    for wide, protocol in (
        (False, Protocol(thickness=6.0, gap=3.0, profile="box")),
        (True, Protocol(thickness=6.0, gap=6.0, profile="box")),
    ):
        apart = prepare([s.stack for s in simulate(*head((24, 28, 24), 3.0), protocol)], thick)
        job = Job(apart, output_grid(apart, thick.output), thick, "cpu", None, None)
        system = build_system(job, job.grid, State.registered(apart))
        assert [model.gap for model in system.models] == [0.0] * 3
        assert leave_gaps(system) == wide


@pytest.mark.gpu
def test_gpu_and_cpu_join_alike(
    smooth: tuple[tuple[NDArray[np.float32], Grid], Prepared, Fit], cuda: str
) -> None:
    _, prepared, result = smooth
    images = []
    for device in ("cpu", cuda):
        job = Job(prepared, result.grid, SETTINGS, device, None, None)
        state = State.registered(prepared)
        start = torch.full(result.grid.shape, 0.5, device=device)
        images.append(gaps.joined(job, state, start).cpu().numpy())
    assert np.allclose(*images, atol=2e-3)
