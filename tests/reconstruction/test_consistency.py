# SPDX-License-Identifier: Apache-2.0
"""A guess reconciled with the stacks, against dense algebra; what is left of its error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_opening

from irem_bids.reconstruction import consistency
from irem_bids.reconstruction.consistency import GUESS, density, reconciled, unseen
from irem_bids.reconstruction.fields import ResidualField
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.linear import System
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.simulate import Protocol, simulate
from irem_bids.reconstruction.solution import Job, State, build_system
from irem_bids.reconstruction.training import Training
from irem_bids.settings import Settings
from tests.phantom import head

SETTINGS = Settings.from_dict({"normalise": {"registration": False}})


def made(shape: tuple[int, int, int], voxel: float, thickness: float) -> tuple[Job, System]:
    stacks = simulate(*head(shape, voxel), Protocol(thickness=thickness, snr=40, seed=3))
    prepared = prepare([s.stack for s in stacks], SETTINGS)
    job = Job(prepared, output_grid(prepared, SETTINGS.output), SETTINGS, "cpu", None, None)
    return job, build_system(job, job.grid, State.registered(prepared))


def test_reconciled_against_dense_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    _, system = made((12, 14, 11), 4.0, 12.0)
    monkeypatch.setattr(consistency, "ITERATIONS", 200)
    random = torch.Generator().manual_seed(1)
    guess = torch.rand(system.grid.shape, generator=random) * system.domain
    inside = system.domain.flatten() > 0
    columns = []  # of A, by one volume each
    for voxel in inside.nonzero()[:, 0]:
        unit = torch.zeros(system.domain.numel())
        unit[voxel] = 1
        volume = unit.reshape(system.grid.shape)
        columns.append(torch.cat([m.forward(volume) for m in system.models]))
    matrix = torch.stack(columns, 1).double().numpy()
    weights = torch.cat(system.weights()).double().numpy()
    values = torch.cat([m.values for m in system.models]).double().numpy()
    strength = GUESS * sum(density(system))
    start = guess.flatten()[inside].double().numpy()
    normal = matrix.T @ (weights[:, None] * matrix) + strength * np.eye(len(start))
    expected = np.linalg.solve(normal, matrix.T @ (weights * values) + strength * start)
    found = reconciled(system, guess).flatten()
    assert np.allclose(found[inside].numpy(), expected, atol=2e-4)
    assert not found[~inside].any()


def test_what_is_left_of_an_error_is_what_unseen_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves that all stacks suppress stay, waves that one passes go, in the middle of a volume."""
    _, system = made((36, 36, 36), 2.0, 8.0)
    monkeypatch.setattr(consistency, "ITERATIONS", 60)
    shape = system.grid.shape
    share = unseen(system, shape)
    assert share.shape == (*shape[:2], shape[2] // 2 + 1)
    truth = torch.zeros(shape)
    for model in system.models:  # data of an empty head
        model.values = model.forward(truth)
    middle = tuple(slice(n // 2 - 6, n // 2 + 6) for n in shape)
    index = np.indices(shape)
    for turns in ((4, 0, 0), (0, 0, 6), (8, 8, 8), (9, 9, 0), (6, 7, 8)):
        phase = sum(2 * np.pi * t / n * i for t, n, i in zip(turns, shape, index, strict=True))
        wave = torch.from_numpy(np.cos(phase).astype(np.float32)) * system.domain
        left = reconciled(system, wave)[middle]
        ratio = float((left * wave[middle]).sum() / (wave[middle] ** 2).sum())
        assert ratio == pytest.approx(float(share[turns]), abs=0.12), turns


def test_density_counts_acquired_voxels() -> None:
    _, system = made((24, 24, 24), 2.0, 8.0)
    # three stacks of voxels of 2 x 2 x 8 mm for a volume of 2 mm
    assert density(system) == pytest.approx([c / 4 for c in system.confidence])
    halved = dataclasses.replace(system, slice_weights=[w / 2 for w in system.slice_weights])
    assert sum(density(halved)) == pytest.approx(sum(density(system)) / 2)


def test_gaps_between_thin_slices_are_filled() -> None:
    """Every fourth plane, as point samples: what lies between them is part of the image."""
    volume, grid = head((40, 44, 36), 2.0)
    protocol = Protocol(thickness=8.0, profile="decimate", margin=0.0)
    options = SETTINGS.updated({"acquisition": {"profile": "none"}})
    prepared = prepare([s.stack for s in simulate(volume, grid, protocol)], options)
    target = output_grid(prepared, options.output)
    job = Job(prepared, target, options, "cpu", None, None)
    system = build_system(job, target, State.registered(prepared))
    assert all(model.gap > 0 for model in system.models)
    image = fit("srr", prepared, target, options).image()
    centre = np.rint(target.to_index(grid.centre)).astype(int)
    block = tuple(slice(c - 6, c + 6) for c in centre)
    assert (image[block] > 0).all()
    # linear interpolation beside a lone plane has nothing to be sharpened by
    assert not any(model.sharpness.any() for model in system.models)


def test_gaps_are_filled_up_to_the_faces_of_the_field_of_view() -> None:
    """Where the head goes on beyond it; a closing by a ball between slices is open there."""
    volume, grid = head((40, 44, 36), 2.0)
    middle = (slice(12, 28), slice(14, 30), slice(10, 26))
    affine = np.array(grid.affine)
    affine[:3, 3] = grid.to_world(np.array([12, 14, 10]))
    volume, grid = np.ascontiguousarray(volume[middle]), Grid((16, 16, 16), affine)
    protocol = Protocol(thickness=8.0, profile="decimate", margin=0.0)
    options = SETTINGS.updated({"acquisition": {"profile": "none"}})
    stacks = [s.stack for s in simulate(volume, grid, protocol)]
    assert all(s.mask.all() for s in stacks)
    prepared = prepare(stacks, options)
    prepared = dataclasses.replace(
        prepared,
        stacks=tuple(s.with_data(s.data, np.ones_like(s.mask)) for s in prepared.stacks),
    )
    target = output_grid(prepared, options.output)
    job = Job(prepared, target, options, "cpu", None, None)
    system = build_system(job, target, State.registered(prepared))
    inside = grid.to_index(target.to_world(np.argwhere(np.ones(target.shape, bool))))
    within = ((inside >= 0) & (inside <= np.array(grid.shape) - 1)).all(axis=1)
    assert within.sum() > 3000
    assert (system.domain.reshape(-1)[torch.from_numpy(within)] > 0).all()


def test_held_out_holes_are_as_wide_as_the_gaps_between_slices() -> None:
    volume, grid = head((40, 44, 36), 2.0)
    shares = {}
    for profile, side in (("none", 3), ("box", 1)):
        protocol = Protocol(thickness=8.0, profile="decimate" if side > 1 else "box", margin=0.0)
        options = SETTINGS.updated({"acquisition": {"profile": profile}})
        prepared = prepare([s.stack for s in simulate(volume, grid, protocol)], options)
        for stack, held in zip(prepared.stacks, prepared.held_out, strict=True):
            shape = [1 if a == stack.slice_axis else side for a in range(3)]
            opened = binary_opening(held | ~stack.mask, np.ones(shape))
            assert np.array_equal(opened & stack.mask, held)
            shares[profile] = held.sum() / stack.mask.sum()
    assert shares["none"] == pytest.approx(options.normalise.held_out, rel=0.6)
    assert shares["box"] == pytest.approx(options.normalise.held_out, rel=0.2)


def test_slices_that_meet_leave_no_gap() -> None:
    _, system = made((24, 24, 24), 2.0, 8.0)
    assert max(model.gap for model in system.models) == 0
    assert isinstance(system.grid, Grid)


@pytest.mark.parametrize(
    ("wanted", "reconciles"), [("base", None), ("said", False), ("reconciled", True)]
)
def test_held_out_voxels_choose_what_is_used(
    wanted: str, reconciles: bool | None, tmp_path: Path
) -> None:
    """The image that the held-out voxels like best, the reconciled one first."""

    def trained() -> ResidualField:
        affine = np.eye(4).tolist()
        field = ResidualField((6, 7, 8), affine, hidden=2, layers=2, scale=0.1)
        field.base.volume += 1
        return field

    def reconcile(volume: torch.Tensor) -> torch.Tensor:
        return volume - 0.25

    images = {"base": torch.ones(6, 7, 8)}
    field = trained()
    torch.nn.init.ones_(field.network[-1].bias)
    images["said"] = field.settle(None).clone()
    images["reconciled"] = field.settle(reconcile).clone()
    assert len({float(v.mean()) for v in images.values()}) == 3

    def held_out(volume: torch.Tensor) -> float:
        return float(((volume - images[wanted]) ** 2).mean())

    training = Training(trained(), None, held_out, reconcile, SETTINGS, "cpu")
    training.judge()
    torch.nn.init.ones_(training.field.network[-1].bias)
    training.judge()
    assert training.history["held_out"][0] == held_out(images["base"])
    path = tmp_path / "training.safetensors"
    training.save(path)
    training.run(None, 60, None)
    assert torch.equal(training.field.corrected(), images[wanted])
    assert training.field.trained == (wanted != "base")
    if reconciles is not None:
        assert training.best_reconciled == reconciles
    resumed = Training(trained(), None, held_out, reconcile, SETTINGS, "cpu")
    resumed.run(path, 60, None)
    assert torch.equal(resumed.field.corrected(), images[wanted])
