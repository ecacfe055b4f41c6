# SPDX-License-Identifier: Apache-2.0
"""From stacks to volumes on a small phantom whose truth and poses are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from irem_bids.reconstruction import fields
from irem_bids.reconstruction.baselines import bspline, resample_stack, without
from irem_bids.reconstruction.fields import GridField, ModelError, ResidualField, load_model
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.metrics import psnr
from irem_bids.reconstruction.optimise import Fit, fit, quality
from irem_bids.reconstruction.prepare import (
    Prepared,
    correct_bias,
    cropped,
    head_mask,
    output_grid,
    prepare,
)
from irem_bids.reconstruction.sample import evaluate, sample
from irem_bids.reconstruction.simulate import Protocol, SimulatedStack, bias_field, simulate
from irem_bids.reconstruction.solver_torch import huber_weights, penalty_gradient
from irem_bids.reconstruction.stack import ImageError, Stack
from irem_bids.settings import Settings
from tests.phantom import head

SETTINGS = Settings.from_dict(
    {
        "irem": {"steps": 40, "batch_size": 2, "hidden": 8},
        "irem2021": {"epochs_2021": 3, "batch_size_2021": 2500},
        "run": {"checkpoint_seconds": 0.0},
    }
)


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, Grid]:
    return head((40, 44, 36), 2.0)


@pytest.fixture(scope="module")
def stacks(truth: tuple[np.ndarray, Grid]) -> tuple[SimulatedStack, ...]:
    protocol = Protocol(
        thickness=6.0, motion_degrees=4, motion_mm=3, gain=0.08, snr=60, seed=3, margin=6.0
    )
    return simulate(*truth, protocol)


@pytest.fixture(scope="module")
def prepared(stacks: tuple[SimulatedStack, ...]) -> Prepared:
    return prepare([s.stack for s in stacks], SETTINGS)


@pytest.fixture(scope="module")
def fits(prepared: Prepared) -> dict[str, Fit]:
    grid = output_grid(prepared, SETTINGS.output)
    return {m: fit(m, prepared, grid, SETTINGS) for m in ("bspline", "srr", "irem")}


def true_error(
    stacks: tuple[SimulatedStack, ...], prepared: Prepared, poses: list[RigidTransform]
) -> list[float]:
    """Per stack, mean distance (mm) of points of the head from where they belong."""
    reference = prepared.stacks[prepared.reference]
    points = reference.grid.to_world(np.argwhere(reference.mask))[::29]
    into_truth = stacks[prepared.reference].pose
    return [
        float(
            np.linalg.norm(
                pose.apply(s.pose.inverse().apply(into_truth.apply(points))) - points, axis=1
            ).mean()
        )
        for s, pose in zip(stacks, poses, strict=True)
    ]


def truth_on(grid: Grid, truth: tuple[np.ndarray, Grid], pose: RigidTransform) -> np.ndarray:
    """The head on ``grid`` at the true pose of the reference."""
    image = Stack("t", truth[0], truth[1], 2, 2.0, truth[0] > 0)
    return resample_stack(image, pose.inverse(), grid)[0]


def score(
    volume: np.ndarray, grid: Grid, truth: tuple[np.ndarray, Grid], pose: RigidTransform
) -> float:
    """PSNR on ``grid`` at the true pose of the reference, after a gain."""
    expected = truth_on(grid, truth, pose)
    inside = expected > 20
    gain = (volume[inside] @ expected[inside]) / (volume[inside] @ volume[inside])
    return psnr(gain * volume, expected, inside)


def test_registration_recovers_the_hidden_motion(
    stacks: tuple[SimulatedStack, ...], prepared: Prepared
) -> None:
    before = true_error(stacks, prepared, [RigidTransform()] * 3)
    after = true_error(stacks, prepared, list(prepared.poses))
    assert max(before) > 1.0
    assert max(after) < 0.3
    assert prepared.metrics["ncc_after"] > prepared.metrics["ncc_before"]
    assert prepared.poses[prepared.reference] == RigidTransform()


def test_refinement_brings_poses_and_gains_nearer(
    stacks: tuple[SimulatedStack, ...], prepared: Prepared, fits: dict[str, Fit]
) -> None:
    registered = true_error(stacks, prepared, list(prepared.poses))
    refined = true_error(stacks, prepared, list(fits["irem"].poses.values()))
    assert np.mean(refined) < np.mean(registered)
    assert max(refined) < 0.06
    # what the scanner multiplied by, over what scaling already divided by
    gains = np.array(
        [
            s.draw.gain * p.data.max() / s.stack.data.max()
            for s, p in zip(stacks, prepared.stacks, strict=True)
        ]
    )
    gains /= gains[prepared.reference]
    assert np.allclose(list(fits["irem"].gains.values()), gains, atol=1e-3)


def test_methods_rank_as_they_should(
    truth: tuple[np.ndarray, Grid],
    stacks: tuple[SimulatedStack, ...],
    prepared: Prepared,
    fits: dict[str, Fit],
) -> None:
    grid, pose = output_grid(prepared, SETTINGS.output), stacks[prepared.reference].pose
    found = {m: score(sample(f.field, grid), grid, truth, pose) for m, f in fits.items()}
    assert found["srr"] > found["bspline"] + 2
    assert found["irem"] > found["srr"] - 0.1


@pytest.mark.parametrize("method", ["srr", "irem"])
def test_air_that_only_the_tails_of_slices_see_stays_dark(
    method: str,
    truth: tuple[np.ndarray, Grid],
    stacks: tuple[SimulatedStack, ...],
    fits: dict[str, Fit],
) -> None:
    found = fits[method]
    grid, volume = found.grid, found.image()
    (reference,) = (s for s in stacks if found.poses[s.stack.label] == RigidTransform())
    head_there = truth_on(grid, truth, reference.pose)
    bright = np.quantile(volume[head_there > 20], 0.9)
    away = distance_transform_edt(head_there < 1, sampling=grid.voxel_size)
    beyond = (away > 6) & (away <= 12)
    assert beyond.sum() > 1000
    assert np.sqrt(np.mean(volume[beyond] ** 2)) < 0.01 * bright
    assert np.abs(volume[beyond]).max() < 0.1 * bright


def test_held_out_voxels_are_predicted(prepared: Prepared, fits: dict[str, Fit]) -> None:
    sharp, blurred = (quality(prepared, fits[m], SETTINGS) for m in ("irem", "bspline"))
    assert sharp["held_out_voxels"] == sum(int(h.sum()) for h in prepared.held_out)
    assert sharp["held_out_psnr"] > blurred["held_out_psnr"]
    assert 0.9 < sharp["held_out_ncc"] <= 1
    assert set(sharp["self_consistency"]) == {"axial1", "coronal1", "sagittal1"}


@pytest.mark.parametrize("method", ["srr", "bspline"])
def test_held_out_voxels_are_never_trained_on(method: str, prepared: Prepared) -> None:
    """Changing them changes nothing."""
    grid = output_grid(prepared, SETTINGS.output)
    poisoned = replace(
        prepared,
        stacks=tuple(
            s.with_data(np.where(h, 9.0, s.data))
            for s, h in zip(prepared.stacks, prepared.held_out, strict=True)
        ),
    )
    a, b = (fit(method, p, grid, SETTINGS).field for p in (prepared, poisoned))
    assert torch.equal(a.volume, b.volume)


def test_strength_follows_the_noise(prepared: Prepared, fits: dict[str, Fit]) -> None:
    noise = np.mean(list(prepared.metrics["noise"].values()))
    assert fits["srr"].info["penalty"]["weight"] == pytest.approx(0.08 * noise)
    assert fits["irem"].info["penalty"] == fits["srr"].info["penalty"]


def test_output_grid_covers_every_head(prepared: Prepared) -> None:
    grid = output_grid(prepared, SETTINGS.output)
    assert np.allclose(grid.voxel_size, grid.voxel_size[0])
    for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
        index = grid.to_index(pose.apply(stack.grid.to_world(np.argwhere(stack.mask))))
        assert index.min() >= 0
        assert (index <= np.array(grid.shape) - 1).all()


def test_prepared_survives_saving(prepared: Prepared, tmp_path: Path) -> None:
    again = Prepared.load(prepared.save(tmp_path))
    assert again.scale == prepared.scale
    assert again.metrics == prepared.metrics
    for a, b in zip(prepared.stacks, again.stacks, strict=True):
        assert a.grid == b.grid
        assert np.array_equal(a.data, b.data)
        assert np.array_equal(a.mask, b.mask)
    for a, b in zip(prepared.held_out, again.held_out, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("method", ["bspline", "srr", "irem", "irem2021"])
def test_fit_survives_saving(
    method: str, prepared: Prepared, fits: dict[str, Fit], tmp_path: Path
) -> None:
    grid = output_grid(prepared, SETTINGS.output)
    result = fits.get(method) or fit(method, prepared, grid, SETTINGS)
    again = Fit.load(result.save(tmp_path))
    small = grid.resampled(8.0)
    assert np.array_equal(sample(result.field, small), sample(again.field, small))
    assert again.poses == result.poses
    assert again.gains == result.gains
    assert again.history == result.history
    model = load_model(tmp_path / "model.safetensors")
    assert model.grid == grid
    assert model.scale == prepared.scale


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a model of irem-bids"):
        load_model(path)
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "absent")


def test_bias_of_the_stacks_is_found(truth: tuple[np.ndarray, Grid]) -> None:
    """Relative to their geometric mean, which nothing can tell from the head."""
    protocol = Protocol(thickness=6.0, bias=0.15, snr=200, seed=5, margin=6.0)
    stacks = simulate(*truth, protocol)
    made = prepare([s.stack for s in stacks], SETTINGS)
    grid = output_grid(made, SETTINGS.output)
    found = fit("irem", made, grid, SETTINGS.updated({"irem": {"steps": 0}}))
    true, seen = [], []
    for simulated, stack in zip(stacks, made.stacks, strict=True):
        # what preparation left of each stack, against what an ideal scanner saw
        whole = bias_field(simulated.draw, protocol.bias)
        index = np.rint(simulated.stack.grid.to_index(stack.grid.to_world(np.argwhere(stack.mask))))
        true.append(whole[tuple(index.astype(int).T)])
        image = found.receivers[stack.label].image(
            stack.grid, found.poses[stack.label], found.grid.centre
        )
        seen.append(image[stack.mask])
    first, second = made.reference, (made.reference + 1) % 3
    points = [s.grid.to_world(np.argwhere(s.mask)) for s in made.stacks]
    tree = cKDTree(points[first])
    distance, near = tree.query(points[second])
    close = distance < 1.5
    expected = np.log(true[second][close] / true[first][near[close]])
    estimate = np.log(seen[second][close] / seen[first][near[close]])
    error = (estimate - estimate.mean()) - (expected - expected.mean())
    assert expected.std() > 0.03
    assert error.std() < 0.25 * expected.std()


def test_n4_takes_the_bias_and_leaves_what_is_large(truth: tuple[np.ndarray, Grid]) -> None:
    """Of two scans that differ in their bias, and of two in a sphere of a quarter of the head."""
    volume, grid = truth
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), axis=-1)
    place = grid.to_world(index) - grid.centre
    inside = np.linalg.norm(place - np.array([8.0, -6.0, 0.0]), axis=-1) < 9.0
    bias = np.exp(0.004 * place[..., 0] - 0.003 * place[..., 2] - 4e-5 * place[..., 1] ** 2)
    sound = Stack("axial1", volume, grid, 2, 2.0, volume > 20)
    plain = correct_bias(sound, threads=1)

    def change(data: np.ndarray) -> np.ndarray:
        """The logarithm of what N4 multiplies, beyond what it does to the sound scan."""
        done = correct_bias(sound.with_data(data.astype(np.float32)), threads=1).data
        factors = (done / np.maximum(data, 1), plain.data / np.maximum(volume, 1))
        found = np.log(factors[0][sound.mask]) - np.log(factors[1][sound.mask])
        return np.asarray(found - found.mean())

    expected = -np.log(bias[sound.mask])
    expected -= expected.mean()
    assert np.std(change(volume * bias) - expected) < 0.3 * np.std(expected)
    lesion = change(np.where(inside, 1.3 * volume, volume))[inside[sound.mask]]
    assert np.abs(lesion).mean() < 0.01 * np.log(1.3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["srr", "irem", "irem2021"])
def test_gpu_and_cpu_agree(method: str, cuda: str, prepared: Prepared) -> None:
    grid = output_grid(prepared, SETTINGS.output)
    there = fit(method, prepared, grid, SETTINGS, device=cuda)
    here = fit(method, prepared, grid, SETTINGS)
    a, b = sample(there.field, grid, device=cuda), sample(here.field, grid)
    assert psnr(a, b, b > 0.1) > (45 if method != "irem2021" else 25)
    for label, pose in here.poses.items():
        assert np.allclose(there.poses[label].matrix, pose.matrix, atol=1e-2)


class _Stop(Exception):
    """The process dies here."""


@pytest.mark.parametrize("method", ["irem", "irem2021"])
def test_an_interrupted_training_ends_with_the_same_numbers(
    method: str, prepared: Prepared, tmp_path: Path
) -> None:
    grid = output_grid(prepared, SETTINGS.output)
    whole = fit(method, prepared, grid, SETTINGS)

    def stop(fraction: float, message: str) -> None:
        if fraction > 0.7:
            raise _Stop(message)

    with pytest.raises(_Stop):
        fit(method, prepared, grid, SETTINGS, checkpoint=tmp_path, progress=stop)
    assert list(tmp_path.glob("*.safetensors"))
    resumed = fit(method, prepared, grid, SETTINGS, checkpoint=tmp_path)
    for name, tensor in whole.field.state_dict().items():
        assert torch.equal(tensor, resumed.field.state_dict()[name]), name
    assert resumed.history == whole.history


def test_untrained_field_is_its_volume_and_gradients_reach_every_layer() -> None:
    volume = torch.rand(12, 11, 10, generator=torch.Generator().manual_seed(0))
    volume[:4] = 0
    field = ResidualField((12, 11, 10), np.eye(4).tolist(), hidden=8, layers=3, scale=0.1)
    field.base.volume.copy_(volume)
    points = torch.rand(500, 3) * 9
    assert torch.equal(field(points), field.base(points))
    torch.nn.init.ones_(field.network[-1].weight)
    field.missing(torch.rand(2, 9, 9, 9)).sum().backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in field.network)
    field.forget()
    learned = field.learned()
    assert float(learned[4:].abs().sum()) > 0
    assert not learned[:4].any()  # air stays air
    corners = torch.tensor([[5.0, 3.0, 2.0], [11.0, 10.0, 9.0]])
    expected = [float((volume + learned)[5, 3, 2]), float((volume + learned)[11, 10, 9])]
    assert field(corners).tolist() == pytest.approx(expected, abs=1e-5)


def test_learned_residual_does_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    field = ResidualField((23, 9, 10), np.eye(4).tolist(), hidden=8, layers=4, scale=0.1)
    volume = torch.rand(23, 9, 10, generator=torch.Generator().manual_seed(1))
    volume[:6], volume[12:15, 4:], volume[:, :2], volume[:, :, 8:] = 0, 0, 0, 0  # boxes differ
    field.base.volume.copy_(volume)
    torch.nn.init.normal_(field.network[-1].weight)
    whole = field.learned()
    assert bool(whole.any())
    monkeypatch.setattr(fields, "SLAB", 5)
    assert torch.allclose(field.learned(), whole, atol=1e-6)


def test_own_grid_is_sampled_without_interpolation() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-7.0, 3.0, 1.0]
    volume = torch.rand(9, 8, 7, generator=torch.Generator().manual_seed(1))
    field = ResidualField((9, 8, 7), affine.tolist(), hidden=8, layers=3, scale=0.1)
    field.base.volume.copy_(volume)
    torch.nn.init.normal_(field.network[-1].weight)
    grid = Grid((9, 8, 7), affine)
    by_points = evaluate(field, grid.to_world(np.indices((9, 8, 7)).reshape(3, -1).T))
    assert np.allclose(sample(field, grid).ravel(), by_points, atol=1e-5)
    assert not np.array_equal(sample(field, grid), volume.numpy())
    plain = GridField((9, 8, 7), affine.tolist(), volume)
    assert np.array_equal(sample(plain, grid), volume.numpy())


def test_grid_field_is_trilinear_in_the_world() -> None:
    from scipy.ndimage import map_coordinates

    random = np.random.default_rng(0)
    volume = random.normal(size=(6, 7, 8)).astype(np.float32)
    affine = RigidTransform.from_vector([0.3, 0.1, -0.2, 5, 6, 7]).matrix @ np.diag([2, 2, 2, 1.0])
    field = GridField((6, 7, 8), affine.tolist(), torch.from_numpy(volume))
    index = random.uniform(0, 1, (40, 3)) * [5, 6, 7]
    points = Grid((6, 7, 8), affine).to_world(index)
    found = field(torch.from_numpy(points).float()).numpy()
    assert np.allclose(found, map_coordinates(volume, index.T, order=1), atol=1e-4)


def test_penalty_gradient_against_autograd() -> None:
    volume = torch.rand(5, 6, 7, dtype=torch.float64, requires_grad=True)
    width = 0.3
    total = torch.full((5, 6, 7), width**2, dtype=torch.float64)
    for axis in range(3):
        step = volume.diff(dim=axis)
        pad = [0, 0] * (2 - axis) + [0, 1]
        total = total + torch.nn.functional.pad(step**2, pad)
    total.sqrt().sum().backward()
    found = penalty_gradient(volume.detach(), huber_weights(volume.detach(), width))
    assert torch.allclose(found, volume.grad)


def test_bspline_of_one_stack_gives_back_its_voxels() -> None:
    data = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
    stack = Stack("s", data, Grid((6, 6, 6), np.eye(4)), 2, 1.0, np.ones((6, 6, 6), bool))
    assert np.allclose(bspline([stack], [RigidTransform()], stack.grid), data, atol=1e-4)


def test_held_out_voxels_become_the_mean_of_their_neighbours() -> None:
    data = np.random.default_rng(0).random((5, 5, 3)).astype(np.float32)
    stack = Stack("s", data, Grid((5, 5, 3), np.eye(4)), 2, 1.0, np.ones((5, 5, 3), bool))
    held = np.zeros((5, 5, 3), bool)
    held[2, 2, 1] = held[2, 3, 1] = True
    filled = without(stack, held).data
    around = [data[i, j, 1] for i in (1, 2, 3) for j in (1, 2, 3) if not held[i, j, 1]]
    assert filled[2, 2, 1] == pytest.approx(np.mean(around))
    assert np.array_equal(filled[~held], data[~held])


def test_a_hole_is_filled_from_its_rim() -> None:
    data = np.full((9, 9, 2), 3.0, np.float32)
    stack = Stack("s", data, Grid((9, 9, 2), np.eye(4)), 2, 1.0, np.ones((9, 9, 2), bool))
    held = np.zeros((9, 9, 2), bool)
    held[1:8, 1:8, 0] = held[:, :, 1] = True
    filled = without(stack.with_data(np.where(held, 99, data)), held).data
    assert np.allclose(filled[:, :, 0], 3.0)
    assert np.array_equal(filled[:, :, 1], np.zeros((9, 9)))  # nothing there tells anything


def test_head_mask_holds_dim_tissue_and_leaves_air(truth: tuple[np.ndarray, Grid]) -> None:
    data = truth[0] + np.abs(np.random.default_rng(0).normal(0, 3, truth[0].shape)).astype(
        np.float32
    )
    mask = head_mask(Stack("s", data, truth[1], 2, 2.0, np.ones(data.shape, bool)))
    assert mask[truth[0] > 30].mean() > 0.999
    assert mask.mean() < 0.8


def test_cropping_keeps_every_voxel_in_its_place(prepared: Prepared) -> None:
    stack = prepared.stacks[0]
    mask = np.zeros(stack.grid.shape, bool)
    mask[4:9, 6:9, 2:4] = True
    times = tuple(float(k) for k in range(stack.grid.shape[stack.slice_axis]))
    small = cropped(replace(stack, mask=mask, slice_times=times), 0.5)
    assert small.grid.shape == (7, 5, 4)
    assert small.slice_times is not None
    assert len(small.slice_times) == small.grid.shape[stack.slice_axis]
    assert np.array_equal(small.data[small.mask], stack.data[mask])
    places = (s.grid.to_world(np.argwhere(m)) for s, m in ((small, small.mask), (stack, mask)))
    assert np.allclose(*places)


def test_empty_slices_are_left_out(
    stacks: tuple[SimulatedStack, ...], prepared: Prepared, fits: dict[str, Fit]
) -> None:
    """Slices that a scanner dropped are neither data, nor registered, nor a reason for trust."""
    holes = []
    for one in stacks:
        data = one.stack.data.copy()
        data[:, :, [5, 8]] = 0.0
        holes.append(one.stack.with_data(data))
    made = prepare(holes, SETTINGS)
    for stack, one in zip(made.stacks, stacks, strict=True):
        first = int(one.stack.grid.to_index(stack.grid.to_world(np.zeros(3)))[2].round())
        empty = {5 - first, 8 - first}
        assert set(stack.empty_slices) == empty
        assert not stack.mask[:, :, sorted(empty)].any()
        assert made.metrics["noise"][stack.label] == pytest.approx(
            prepared.metrics["noise"][stack.label], rel=0.25
        )
    grid = output_grid(made, SETTINGS.output)
    image = fit("srr", made, grid, SETTINGS).image()
    usual = fits["srr"].image()
    assert image.min() > usual.min() - 0.5  # -12 before
    assert image.max() < 2 * usual.max()  # 15 before; nobody sees where empty slices cross
    weights = fit("irem", made, grid, SETTINGS.updated({"irem": {"steps": 0}})).slice_weights
    for stack in made.stacks:
        assert set(np.flatnonzero(weights[stack.label] < 0.5)) == set(stack.empty_slices)
    for pose, one in zip(made.poses, stacks, strict=True):
        reference = stacks[made.reference].pose
        away = (reference @ pose @ one.pose.inverse()).to_vector(grid.centre)
        assert np.linalg.norm(away[3:]) < 1.5  # mm; up to 25 before


def test_filled_slices_lie_between_their_neighbours() -> None:
    data = np.random.default_rng(0).random((4, 7, 5)).astype(np.float32)
    data[:, [0, 2, 3, 6]] = 0.0
    stack = Stack("s", data, Grid(data.shape, np.eye(4)), 1, 1.0, np.ones(data.shape, bool))
    assert stack.empty_slices == [2, 3]
    assert np.array_equal(np.flatnonzero(stack.empty.all((0, 2))), [2, 3])
    filled = stack.filled().data
    assert np.allclose(filled[:, 2], (2 * data[:, 1] + data[:, 4]) / 3)
    assert np.allclose(filled[:, 3], (data[:, 1] + 2 * data[:, 4]) / 3)
    assert np.array_equal(np.delete(filled, [2, 3], axis=1), np.delete(data, [2, 3], axis=1))


def test_slices_that_were_rejected_do_not_count_in_the_prediction(
    prepared: Prepared, fits: dict[str, Fit]
) -> None:
    usual = quality(prepared, fits["irem"], SETTINGS)
    stack = prepared.stacks[0]
    data = stack.data.copy()
    data[:, :, 6] *= 0.1
    torn = replace(prepared, stacks=(stack.with_data(data), *prepared.stacks[1:]))
    every = quality(torn, fits["irem"], SETTINGS)
    weights = dict(fits["irem"].slice_weights)
    weights[stack.label] = np.where(np.arange(data.shape[2]) == 6, 0.0, weights[stack.label])
    known = quality(torn, replace(fits["irem"], slice_weights=weights), SETTINGS)
    assert every["held_out_psnr"] < usual["held_out_psnr"] - 3
    assert known["held_out_psnr"] == pytest.approx(usual["held_out_psnr"], abs=0.5)
    assert known["held_out_ncc"] > 0.98 > every["held_out_ncc"]


def test_little_overlap_shades_nothing() -> None:
    """A stack beside a fifth of another, noisy, no bias in either: nothing to extrapolate."""
    volume, grid = head((54, 60, 50), 3.0)
    protocol = Protocol(
        orientations=("axial", "sagittal"), thickness=9.0, snr=8, seed=3, margin=9.0
    )
    whole, other = (one.stack for one in simulate(volume, grid, protocol))
    count = other.data.shape[2]
    part = slice(int(0.2 * count), int(np.ceil(0.4 * count)))
    affine = np.array(other.grid.affine)
    affine[:3, 3] = other.grid.to_world(np.array([0, 0, part.start]))
    data, mask = other.data[:, :, part], other.mask[:, :, part]
    slab = replace(other, data=data, mask=mask, grid=Grid(data.shape, affine))
    settings = SETTINGS.updated({"irem": {"steps": 0, "motion": "stack"}})
    settings = settings.updated({"acquisition": {"profile_width": "stated"}})
    made = prepare([whole, slab], settings)
    found = fit("irem", made, output_grid(made, settings.output), settings)
    assert max(np.abs(r.bias).max() for r in found.receivers.values()) < 0.2  # 0.44 before
    true = truth_on(found.grid, (volume, grid), RigidTransform())
    inside = true > 150
    ratio = (found.image() / np.maximum(true, 1))[inside]
    right = found.grid.to_world(np.argwhere(inside))[:, 0]
    cuts = np.quantile(right, [0, 0.2, 0.4, 0.6, 0.8])
    fifth = np.searchsorted(cuts, right, side="right") - 1
    shading = np.array([np.median(ratio[fifth == k]) for k in range(5)]) / np.median(ratio)
    assert np.abs(shading - 1).max() < 0.04  # 0.14 before


def test_images_without_a_head_are_refused() -> None:
    grid, mask = Grid((8, 8, 8), np.eye(4)), np.ones((8, 8, 8), bool)
    flat = Stack("flat", np.full((8, 8, 8), 3.0, np.float32), grid, 2, 1.0, mask)
    with pytest.raises(ImageError, match="flat: all voxels have one value"):
        prepare([flat, flat], SETTINGS)


def test_unknown_method_names_the_known_ones(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match="expected one of irem, irem2021, srr, bspline"):
        fit("magic", prepared, prepared.stacks[0].grid, SETTINGS)
