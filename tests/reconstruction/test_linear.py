# SPDX-License-Identifier: Apache-2.0
"""What the penalty takes from small things, and what is given back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from irem_bids.reconstruction import solver_torch
from irem_bids.reconstruction.acquisition import Receiver, StackModel
from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.reconstruction.linear import FIRM, Prior, System, restored, solve
from irem_bids.reconstruction.prepare import prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import simulate
from irem_bids.reconstruction.solution import BARE, STRENGTH, TEXTURE, penalty_strength
from irem_bids.reconstruction.stack import Stack
from irem_bids.settings import Acquisition, Settings
from tests.phantom import head
from tests.stacks import centred

SIZE, THICKNESS, NOISE = 36, 4.0, 0.02
PRIOR = Prior(0.0016, 0.003)
SPOTS = list(itertools.product((13, 22), repeat=3))


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    """An even block of 1 with 8 spots of 3 mm, 30 % brighter."""
    volume = torch.zeros(SIZE, SIZE, SIZE)
    volume[5:-5, 5:-5, 5:-5] = 1.0
    for a, b, c in SPOTS:
        volume[a - 1 : a + 2, b - 1 : b + 2, c - 1 : c + 2] = 1.3
    return volume


@pytest.fixture(scope="module")
def system(truth: torch.Tensor) -> System:
    """Three stacks of thick slices of it, with noise."""
    random, grid, models = np.random.default_rng(0), centred((SIZE,) * 3, (1.0,) * 3), []
    for axis in range(3):
        sizes = [1.0] * 3
        sizes[axis] = THICKNESS
        own = centred(tuple(int(SIZE / s) for s in sizes), tuple(sizes))
        noise = NOISE * random.standard_normal(own.shape, dtype=np.float32)
        everywhere = np.ones(own.shape, bool)
        stack = Stack(f"s{axis}", noise, own, axis, THICKNESS, everywhere)
        model = StackModel(stack, everywhere, grid, Acquisition())
        model.set_poses(RigidTransform())
        model.values += model.forward(truth)
        models.append(model)
    ones = [np.ones(m.slices) for m in models]
    return System(models, [Receiver()] * 3, [1.0] * 3, ones, torch.ones(grid.shape), 0)


def start(system: System) -> torch.Tensor:
    return solve(system, torch.zeros(system.grid.shape), PRIOR, iterations=30, reweightings=3)


def spot_and_rest(volume: torch.Tensor) -> tuple[float, float]:
    """Share of the spots' contrast, and the standard deviation of what is even."""
    spots = torch.zeros(volume.shape, dtype=torch.bool)
    near = spots.clone()
    for a, b, c in SPOTS:
        spots[a - 1 : a + 2, b - 1 : b + 2, c - 1 : c + 2] = True
        near[a - 3 : a + 4, b - 3 : b + 4, c - 3 : c + 4] = True
    even = torch.zeros_like(near)
    even[9:-9, 9:-9, 9:-9] = True
    even &= ~near
    base = float(volume[even].mean())
    return (float(volume[spots].mean()) - base) / 0.3, float(volume[even].std())


def test_spots_keep_more_contrast_at_the_same_noise(system: System) -> None:
    first = start(system)
    effort = {"iterations": 40, "reweightings": 4}
    table = {
        weight: spot_and_rest(
            solve(system, first, Prior(weight * PRIOR.weight, PRIOR.width), **effort)
        )
        for weight in (0.25, 0.5, 1.0, 2.0)
    }
    contrast, noise = spot_and_rest(restored(system, first, PRIOR, **effort))
    assert 1 - contrast < (1 - table[1.0][0]) / 2
    as_smooth = [share for share, spread in table.values() if spread <= noise]
    assert as_smooth
    assert contrast > max(as_smooth)


def test_restored_is_the_minimum_about_data_with_what_was_left(system: System) -> None:
    """The optimality of the second solution, with the penalty's gradient written out."""
    firm = Prior(FIRM * PRIOR.weight, PRIOR.width)
    many = {"iterations": 200, "reweightings": 20}
    zero = torch.zeros(system.grid.shape)
    volume = restored(system, zero, PRIOR, **many)
    shrunk = solve(system, zero, firm, iterations=80, reweightings=10)
    gradient = solver_torch.penalty_gradient(
        volume, firm.weight * solver_torch.huber_weights(volume, firm.width)
    )
    data = torch.zeros_like(volume)
    rests = zip(system.models, system.residuals(volume), system.residuals(shrunk), strict=True)
    for model, rest, left in rests:
        data += model.adjoint(rest + left)
    assert (gradient - data).norm() < 0.02 * gradient.norm()


def test_the_automatic_penalty_is_the_same_per_volume_on_any_grid() -> None:
    """Its sum over a smooth image, sampled at 1 and at 0.5 mm, by hand."""
    stacks = simulate(*head((40, 44, 36), 2.0), Protocol(thickness=6.0, snr=40, seed=3))
    settings = Settings.from_dict({"normalise": {"registration": False}})
    prepared = prepare([s.stack for s in stacks], settings)

    def total(voxel: float) -> float:
        prior = penalty_strength(prepared, settings, 2.0 * voxel, denoised=True)  # 2 mm in plane
        at = np.arange(0, 60, voxel)
        x, y, z = np.meshgrid(at, at, at, indexing="ij", sparse=True)
        image = np.sin(x / 9) * np.cos(y / 11) + np.sin(z / 13)
        square = sum(step**2 for step in np.gradient(image))
        return prior.weight * float(np.sqrt(square + prior.width**2).sum())

    assert total(0.5) == pytest.approx(total(1.0), rel=0.02)
    given = settings.updated({"srr": {"srr_lambda": 0.01, "srr_huber": 0.02}})
    assert penalty_strength(prepared, given, 1.0, denoised=False) == Prior(0.01, 0.02)


def test_noise_that_is_not_texture_is_met_by_more_than_its_share() -> None:
    """Four times the noise: the measured one, with texture, rises less; the penalty more, but not
    where a network follows."""
    settings = Settings.from_dict({"normalise": {"registration": False}})

    def at(snr: float) -> tuple[float, float, float]:
        stacks = simulate(*head((40, 44, 36), 2.0), Protocol(thickness=6.0, snr=snr, seed=3))
        prepared = prepare([s.stack for s in stacks], settings)
        noise = float(np.mean(list(prepared.metrics["noise"].values())))
        weights = [
            penalty_strength(prepared, settings, 2.0, denoised=d).weight for d in (False, True)
        ]
        return noise, *weights

    little, small, least = at(40.0)
    much, large, less = at(10.0)
    assert little < 0.024 < much < 4.1 * little
    assert small == least == pytest.approx(STRENGTH * little)
    assert large == pytest.approx(BARE * np.sqrt(much**2 - TEXTURE**2))
    assert large > 1.2 * less
    assert less == pytest.approx(STRENGTH * much)
