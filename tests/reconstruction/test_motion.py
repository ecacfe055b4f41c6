# SPDX-License-Identifier: Apache-2.0
"""Slices that moved one by one, bad slices and a wrong profile, on a phantom."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from irem_bids.reconstruction.gauge import common_motion
from irem_bids.reconstruction.geometry import Grid, RigidTransform, mean_pose
from irem_bids.reconstruction.linear import Metric, Prior, System
from irem_bids.reconstruction.optimise import Fit, fit, quality
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare, prepared_slices
from irem_bids.reconstruction.search import Search, reattach, seek
from irem_bids.reconstruction.simulate import Protocol, SimulatedStack, simulate
from irem_bids.reconstruction.solution import Job, State, build_system
from irem_bids.reconstruction.trajectory import GAUGE, MISFIT, Path, orders
from irem_bids.settings import Settings
from tests.phantom import head

SETTINGS = Settings.from_dict({"irem": {"steps": 0}})
PROTOCOL = Protocol(
    thickness=4.0, slice_degrees=0.7, slice_mm=0.7, damaged=0.04, gain=0.05, snr=60, seed=5,
    margin=6.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def simulated() -> list[SimulatedStack]:
    return simulate(*head((64, 70, 60), 1.5), PROTOCOL, threads=2)


@pytest.fixture(scope="module")
def prepared(simulated: list[SimulatedStack]) -> Prepared:
    return prepare([s.stack for s in simulated], SETTINGS, threads=2)


@pytest.fixture(scope="module")
def moving(prepared: Prepared) -> Fit:
    return fit("irem", prepared, output_grid(prepared, SETTINGS.output), SETTINGS)


def mean_error(prepared: Prepared, simulated: list[SimulatedStack], found: Fit) -> float:
    """Mean distance of the head's voxels from where they belong, mm, one motion removed."""
    moved, target = [], []
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        first = prepared_slices(one.stack, stack)["first"]
        voxels = np.argwhere(stack.mask)[::11]
        for k in np.unique(voxels[:, stack.slice_axis]):
            points = stack.grid.to_world(voxels[voxels[:, stack.slice_axis] == k])
            poses = found.slice_poses.get(stack.label)
            pose = found.poses[stack.label] if poses is None else RigidTransform(poses[k])
            moved.append(pose.apply(points))
            target.append(one.draw.slice_pose(first + int(k)).apply(points))
    a, b = np.concatenate(moved), np.concatenate(target)
    return float(np.linalg.norm(common_motion(a, b).apply(a) - b, axis=1).mean())


def test_auto_finds_that_slices_moved_and_where(
    prepared: Prepared, simulated: list[SimulatedStack], moving: Fit
) -> None:
    grid = output_grid(prepared, SETTINGS.output)
    still = fit("irem", prepared, grid, SETTINGS.updated({"irem": {"motion": "stack"}}))
    assert moving.info["motion"] == "slice"
    assert still.info["motion"] == "stack"
    assert not still.slice_poses
    before, after = (mean_error(prepared, simulated, f) for f in (still, moving))
    assert before > 1.0
    assert after < 0.5
    scores = [quality(prepared, f, SETTINGS)["held_out_psnr"] for f in (still, moving)]
    assert scores[1] > scores[0] + 3


def test_damaged_slices_count_little_and_no_other_is_lost(
    prepared: Prepared, simulated: list[SimulatedStack], moving: Fit
) -> None:
    bad, sound = [], []
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        first = prepared_slices(one.stack, stack)["first"]
        broken = {d.slice for d in one.draw.damage}
        for k, weight in enumerate(moving.slice_weights[stack.label]):
            (bad if k + first in broken else sound).append(weight)
    assert len(bad) >= 3
    assert max(bad) < 0.3
    assert min(sound) > 0.8


def found_system(prepared: Prepared, moving: Fit) -> tuple[System, list[Path]]:
    """The acquisition that was found, with interleaved paths."""
    labels = [stack.label for stack in prepared.stacks]
    state = State(
        [moving.slice_poses[label].copy() for label in labels],
        [moving.receivers[label] for label in labels],
        [moving.slice_weights[label].copy() for label in labels],
        [moving.widths[label] for label in labels],
    )
    job = Job(prepared, moving.grid, SETTINGS, "cpu", None, None)
    system = build_system(job, moving.grid, state)
    paths = []
    for each in system.models:
        # noise: variance of a residual, about that of the stacks' SNR
        order = orders(each.slices)["interleaved"]
        path = Path(np.zeros((each.slices, 6)), {"interleaved": order}, noise=1e-4)
        path.follow(each.poses, each.pivot)
        paths.append(path)
    return system, paths


def distance(found: np.ndarray, right: np.ndarray, pivot: np.ndarray) -> tuple[float, float]:
    """Of two poses: degrees, and mm at the pivot."""
    off = (RigidTransform(found) @ RigidTransform(right).inverse()).to_vector(pivot)
    return float(np.rad2deg(np.linalg.norm(off[:3]))), float(np.linalg.norm(off[3:]))


def test_a_lost_slice_of_the_reference_is_sought(prepared: Prepared, moving: Fit) -> None:
    """From 1 degree and 1 mm away, while the mean motion of the reference is not 0."""
    r = prepared.reference
    lost = int(np.argmax(prepared.stacks[r].mask.sum(axis=(0, 1))))
    assert prepared.stacks[r].slice_axis == 2
    system, paths = found_system(prepared, moving)
    model = system.models[r]
    right = model.poses[lost].copy()
    away = RigidTransform.from_vector(np.array([0.017, 0, 0, 0, 0, 1.0]), model.pivot)
    poses = model.poses.copy()
    poses[lost] = away.matrix @ right
    model.set_poses(poses)
    paths[r].follow(poses, model.pivot)
    system.slice_weights[r][lost] = 0.0
    paths[r].shares = np.full(model.slices, 1 / model.slices)
    assert np.abs(paths[r].motion.mean(axis=0)[3:]).max() > 0.01
    seek(system, torch.from_numpy(moving.image()), paths, 5)
    assert max(distance(model.poses[lost], right, model.pivot)) < 0.3


def test_a_slice_that_descent_leaves_astray_is_found_from_other_starts(
    prepared: Prepared, moving: Fit
) -> None:
    """Stripes 8 mm apart, the slice a stripe off: descent stays there, though it fits worse."""
    r = prepared.reference
    system, paths = found_system(prepared, moving)
    model, path = system.models[r], paths[r]
    lost = int(np.argmax(np.diff(model.starts)))
    x = moving.grid.to_world(np.indices(moving.grid.shape).reshape(3, -1).T)[:, 0]
    stripes = (1 + x / 200) * (2 + np.cos(2 * np.pi * x / 8))
    volume = torch.from_numpy(stripes.reshape(moving.grid.shape).astype(np.float32))
    rows = slice(int(model.starts[lost]), int(model.starts[lost + 1]))
    factor = system.receivers[r].factors(model.voxels)
    model.values[rows] = (factor * model.forward(volume))[rows]
    right = model.poses[lost].copy()
    away = RigidTransform.from_vector(np.array([0, 0, 0, 8.0, 0, 0]), model.pivot)
    poses = model.poses.copy()
    poses[lost] = away.matrix @ right
    path.step = (2.0, 2.0)
    model.set_poses(poses)
    path.follow(poses, model.pivot)
    system.slice_weights[r][lost] = 0.0

    def off(motion: np.ndarray) -> float:
        back = RigidTransform.from_vector(motion, model.pivot) @ path.base
        shift = (back @ RigidTransform(right).inverse()).to_vector(model.pivot)[3]
        return float(abs(shift))  # stripes tell of x alone

    distrusted = system.slice_weights[r] < 0.9
    alone = Search(system, r, volume, path, distrusted)
    alone.descend(alone.best, 8)
    assert off(alone.best[list(np.flatnonzero(distrusted)).index(lost)]) > 5.0
    seek(system, volume, paths, 8)
    assert off(path.motion[lost]) < 0.3


def dropped(prepared: Prepared, moving: Fit, s: int) -> tuple[System, list[Path], int, np.ndarray]:
    """The acquisition that was found, the s-th stack's slice of about half the voxels of its
    largest with a fifth of its brightness, which slice that is, and its pose (4, 4)."""
    system, paths = found_system(prepared, moving)
    model = system.models[s]
    rows = np.diff(model.starts)
    size = np.where(system.slice_weights[s] < 0.9, 0, rows)
    k = int(np.argmin(np.abs(size - rows.max() / 2)))
    model.values[int(model.starts[k]) : int(model.starts[k + 1])] *= 0.2
    return system, paths, k, model.poses[k].copy()


@pytest.mark.parametrize("s", [0, 1, 2])
def test_a_dropped_slice_is_found_by_its_structure(prepared: Prepared, moving: Fit, s: int) -> None:
    """As by what is left of its brightness; it went 2 to 4 mm to where the head is as dark."""
    system, paths, k, right = dropped(prepared, moving, s)
    system.slice_weights[s][k] = 0.0
    left = seek(system, torch.from_numpy(moving.image()), paths, 8)[s][1]
    turn, shift = distance(system.models[s].poses[k], right, system.models[s].pivot)
    assert shift < 0.3 and turn < 1.0
    assert left[k] == pytest.approx(0.2, abs=0.02)
    assert (left[system.slice_weights[s] >= 0.9] == 1).all()  # those that were not sought


def test_a_dropped_slice_that_went_to_the_dark_is_put_back(prepared: Prepared, moving: Fit) -> None:
    """And counts nothing, though it fits there."""
    system, paths, k, right = dropped(prepared, moving, 1)
    model, path = system.models[1], paths[1]
    outwards = float(np.sign(k - model.slices / 2)) * (model.poses[k][:3, :3] @ model.normal)
    poses = model.poses.copy()
    poses[k] = RigidTransform.from_vector(np.r_[0, 0, 0, 4 * outwards], model.pivot).matrix @ right
    model.set_poses(poses)
    path.follow(poses, model.pivot)
    assert system.slice_weights[1][k] > 0.9
    assert path.broken_off()[k]
    volume = torch.from_numpy(moving.image())
    assert reattach(system, volume, Prior(1e-3, 0.01), paths, rounds=8, iterations=5)
    assert system.slice_weights[1][k] == 0.0
    assert distance(model.poses[k], right, model.pivot)[1] < 0.5


@pytest.fixture(scope="module")
def uneven() -> tuple[Prepared, list[SimulatedStack], list[np.ndarray], Fit]:
    """Slices of 5 % (standard deviation) more or less brightness; none is damaged."""
    simulated = simulate(*head((64, 70, 60), 1.5), replace(PROTOCOL, damaged=0.0))
    random = np.random.default_rng(1)
    gains = [np.exp(0.05 * random.normal(size=s.stack.data.shape[2])) for s in simulated]
    stacks = [
        s.stack.with_data((s.stack.data * g).astype(np.float32))
        for s, g in zip(simulated, gains, strict=True)
    ]
    made = prepare(stacks, SETTINGS)
    rows = zip(made.stacks, simulated, gains, strict=True)
    seen = []
    for stack, one, each in rows:
        first = prepared_slices(one.stack, stack)["first"]
        seen.append(each[first : first + stack.grid.shape[stack.slice_axis]])
    return made, simulated, seen, fit("irem", made, output_grid(made, SETTINGS.output), SETTINGS)


def test_gains_of_slices_are_found(
    uneven: tuple[Prepared, list[SimulatedStack], list[np.ndarray], Fit],
) -> None:
    """Beyond what is smooth along the stack; without them the slices lay 0.37 mm off."""
    made, simulated, gains, found = uneven
    assert found.info["motion"] == "slice"
    told = 0
    for stack, true in zip(made.stacks, gains, strict=True):
        across = tuple(a for a in range(3) if a != stack.slice_axis)
        size = stack.mask.sum(axis=across)
        where = np.flatnonzero(size > 0.3 * size.max())
        seen = found.receivers[stack.label].slices
        assert seen is not None
        rough = [
            level - np.polyval(np.polyfit(where, level, 2), where)
            for level in (np.log(seen[where]), np.log(true[where]))
        ]
        assert np.std(rough[0] - rough[1]) <= np.std(rough[1])
        if np.std(rough[1]) > 0.03:  # one stack's happen to scatter too little to be told
            assert np.std(rough[0] - rough[1]) < 0.7 * np.std(rough[1])  # most at the ends
            assert np.median(np.abs(rough[0] - rough[1])) < 0.014
            told += 1
    assert told == 2
    assert mean_error(made, simulated, found) < 0.3


@pytest.mark.xfail(strict=True, reason="a scatter of 2 % is not told: one slice has 0.17")
def test_no_sound_slice_is_lost_where_slices_are_uneven(
    uneven: tuple[Prepared, list[SimulatedStack], list[np.ndarray], Fit],
) -> None:
    assert min(min(w) for w in uneven[3].slice_weights.values()) > 0.8


def test_gains_of_slices_are_part_of_what_is_predicted(
    uneven: tuple[Prepared, list[SimulatedStack], list[np.ndarray], Fit], tmp_path: FilePath
) -> None:
    """By the fit, by one that was saved, and by the solver's system; the state survives, too."""
    made, _, _, found = uneven
    labels = [stack.label for stack in made.stacks]
    state = State(
        [found.slice_poses[label] for label in labels],
        [found.receivers[label] for label in labels],
        [found.slice_weights[label] for label in labels],
        [found.widths[label] for label in labels],
    )
    state = State.restored(json.loads(json.dumps(state.record())))
    system = build_system(Job(made, found.grid, SETTINGS, "cpu", None, None), found.grid, state)
    residuals = system.residuals(torch.from_numpy(found.image()))
    again = Fit.load(found.save(tmp_path))
    for stack, model, residual in zip(made.stacks, system.models, residuals, strict=True):
        seen = again.predict(stack, SETTINGS)
        assert np.array_equal(seen, found.predict(stack, SETTINGS))
        index = tuple(model.index.T.astype(np.intp))
        expected = (model.values - residual).numpy()
        assert np.abs(seen[index] - expected).max() < 0.005  # gains: to 0.1 of about 0.5


def test_even_slices_get_next_to_no_gains(moving: Fit, prepared: Prepared) -> None:
    for stack in prepared.stacks:
        gains = moving.receivers[stack.label].slices
        assert gains is not None
        assert np.abs(np.log(gains)).max() < 0.03


def test_part_of_a_model_predicts_its_slices(prepared: Prepared, moving: Fit) -> None:
    system, _ = found_system(prepared, moving)
    volume = torch.from_numpy(moving.image())
    for model in system.models:
        chosen = np.zeros(model.slices, bool)
        chosen[[3, 4, model.slices // 2]] = True
        part, rows = model.only(chosen), chosen[model.slice_of_row]
        assert np.array_equal(np.diff(part.starts), np.diff(model.starts) * chosen)
        # the sharpening is that of the rows at hand: taken out
        model.sharpness, part.sharpness = np.zeros(3, np.float32), np.zeros(3, np.float32)
        whole = model.forward(volume).numpy()
        assert np.allclose(part.forward(volume).numpy(), whole[rows], atol=1e-6)
        assert np.array_equal(part.values.numpy(), model.values.numpy()[rows])
        assert np.array_equal(part.poses, model.poses)
        some = model.only(chosen, 7)
        assert np.array_equal(some.index, model.index[rows][::7])
        assert all(some.index[a:b, model._axis].tolist() == [k] * (b - a)
                   for k, (a, b) in enumerate(pairwise(some.starts)))  # fmt: skip


def test_some_rows_weigh_as_much_against_the_prior_as_all(prepared: Prepared, moving: Fit) -> None:
    """A slice that is 1.5 mm off: what its images cost, by every 5th row and by all."""
    r = prepared.reference
    system, paths = found_system(prepared, moving)
    model, volume = system.models[r], torch.from_numpy(moving.image())
    lost = np.zeros(model.slices, bool)
    lost[int(np.argmax(np.diff(model.starts)))] = True
    least = []
    for every in (1, 5):
        search = Search(system, r, volume, paths[r], lost, every)
        search.descend(search.mean + np.array([0, 0, 0, 1.5, 0, 0]), 0)
        least.append(float(search.least[0]))
    images = float(system.confidence[r] * (model.values[lost[model.slice_of_row]] ** 2).sum()) / 2
    assert 0.005 * images < least[0] < images
    assert least[1] == pytest.approx(least[0], rel=0.1)


@pytest.mark.parametrize("slipped", [True, False])
def test_a_piece_that_broke_off_is_put_back(prepared: Prepared, moving: Fit, slipped: bool) -> None:
    """Three slices in time that slipped by 5 degrees and 3 mm together; none that did not."""
    system, paths = found_system(prepared, moving)
    s = (prepared.reference + 1) % len(system.models)
    model = system.models[s]
    middle = int(np.argmax(np.diff(model.starts)))
    piece = middle + np.array([-2, 0, 2])
    right = model.poses.copy()
    if slipped:
        away = RigidTransform.from_vector(np.array([0.087, 0, 0, 0, 0, 3.0]), model.pivot)
        poses = right.copy()
        poses[piece] = away.matrix @ poses[piece]
        model.set_poses(poses)
        paths[s].follow(poses, model.pivot)
    assert bool(paths[s].broken_off()[piece].all()) == slipped
    weights = [w.copy() for w in system.slice_weights]
    volume = torch.from_numpy(moving.image())
    moved = reattach(system, volume, Prior(1e-3, 0.01), paths, rounds=8, iterations=5)
    off = [max(distance(model.poses[k], right[k], model.pivot)) for k in piece]
    assert max(off) < 0.5
    if slipped:
        assert moved
    for found, given in zip(system.slice_weights, weights, strict=True):
        assert (found >= given).all()


def test_a_short_piece_between_large_steps_is_broken_off() -> None:
    order = orders(40)["interleaved"]
    path = Path(np.zeros((40, 6)), {"interleaved": order}, noise=1.0, step=(0.5, 0.5))
    path.motion[order] = walked(np.arange(40), 0.3)
    assert not path.broken_off().any()
    path.motion[order[36:], 0] += np.deg2rad(4.0)
    assert np.array_equal(np.flatnonzero(path.broken_off()), np.sort(order[36:]))
    path.motion[order[20:36], 0] += np.deg2rad(4.0)  # half a scan is no piece: someone moved
    assert not path.broken_off().any()


def test_the_reference_holds_the_common_motion(prepared: Prepared, moving: Fit) -> None:
    vector = moving.poses[prepared.stacks[prepared.reference].label].to_vector(moving.grid.centre)
    assert np.rad2deg(np.linalg.norm(vector[:3])) < 0.3
    assert np.linalg.norm(vector[3:]) < 0.3


def test_motion_is_recorded_beyond_the_stacks_pose(prepared: Prepared, moving: Fit) -> None:
    record = moving.record()
    for stack in prepared.stacks:
        poses, rows = moving.slice_poses[stack.label], record["slice_motion"][stack.label]
        assert len(rows) == stack.grid.shape[stack.slice_axis]
        for pose, row in zip(poses, rows, strict=True):
            motion = RigidTransform.from_vector(row, record["slice_pivot"])
            assert np.allclose((motion @ moving.poses[stack.label]).matrix, pose, atol=1e-8)


def test_still_stacks_stay_stacks() -> None:
    stacks = simulate(*head((40, 44, 36), 2.0), Protocol(thickness=6.0, snr=60, seed=7, margin=6.0))
    made = prepare([s.stack for s in stacks], SETTINGS)
    found = fit("irem", made, output_grid(made, SETTINGS.output), SETTINGS)
    assert found.info["motion"] == "stack"
    assert min(min(w) for w in found.slice_weights.values()) > 0.8


def scanned(protocol: Protocol, **acquisition: str) -> tuple[Prepared, Settings]:
    """Stacks of the head that do not move, and the settings they were prepared with."""
    stacks = simulate(*head((64, 70, 60), 1.5), protocol, threads=2)
    options = SETTINGS.updated({"irem": {"motion": "stack"}, "acquisition": acquisition})
    return prepare([s.stack for s in stacks], options), options


def test_width_of_the_profile_is_learned_where_the_sidecar_is_wrong() -> None:
    made, options = scanned(Protocol(thickness=4.0, width_factor=1.25, snr=80, seed=2, margin=6.0))
    found = fit("irem", made, output_grid(made, options.output), options)
    assert found.info["width"] == "learned"
    assert np.allclose(list(found.widths.values()), 1.25, rtol=0.1)


def test_width_of_the_profile_stays_where_the_sidecar_is_right() -> None:
    """And nothing of the trial is left in the result."""
    made, options = scanned(Protocol(thickness=4.0, snr=80, seed=2, margin=6.0))
    grid = output_grid(made, options.output)
    found = fit("irem", made, grid, options)
    assert found.info["width"] == "stated"
    assert set(found.widths.values()) == {1.0}
    same = fit("irem", made, grid, options.updated({"acquisition": {"profile_width": "stated"}}))
    assert np.array_equal(found.image(), same.image())


def test_width_is_not_tried_where_no_stack_sees_anothers_profile() -> None:
    parallel = Protocol(thickness=4.0, orientations=("axial", "axial"), width_factor=1.25, seed=2)
    made, options = scanned(parallel)
    found = fit("irem", made, output_grid(made, options.output), options)
    assert found.info["width"] == "stated"
    assert "held_out_by_width" not in found.info


def test_precision_is_the_walks_inverse_covariance() -> None:
    """Against the covariance of a walk with an anchor, by brute force."""
    path = Path(np.zeros((5, 6)), {"given": np.array([0, 2, 4, 1, 3])}, noise=0.1, step=(0.4, 0.7))
    found = path.precision()
    assert np.allclose(found, found.T)
    random = np.random.default_rng(0)
    motion = random.normal(size=(5, 6))
    scale = np.repeat([np.deg2rad(1.0), 1.0], 3)
    steps = np.diff(motion[[0, 2, 4, 1, 3]] / scale, axis=0) / np.repeat([0.4, 0.7], 3)
    anchor = motion / scale / 5.0
    cost = 0.1 * MISFIT * ((steps**2).sum() + (anchor**2).sum())
    assert motion.ravel() @ found @ motion.ravel() == pytest.approx(cost)
    reference = replace(path, shares=np.full(5, 0.2))
    assert np.allclose(reference.precision(gauge=False), found)
    held = motion.ravel() @ reference.precision() @ motion.ravel()
    mean = motion.mean(axis=0) / scale / 5.0
    assert held == pytest.approx(cost + 0.1 * MISFIT * GAUGE * 5 * (mean**2).sum())


def walked(order: np.ndarray, size: float, seed: int = 3) -> np.ndarray:
    """(K, 6) a random walk in ``order``, of steps of ``size`` degrees and mm."""
    motion = np.empty((len(order), 6))
    steps = np.random.default_rng(seed).normal(0, size, (len(order), 6))
    motion[order] = np.cumsum(steps, axis=0)
    motion[:, :3] = np.deg2rad(motion[:, :3])
    return motion


def test_order_of_acquisition_is_told_from_the_data() -> None:
    """Also where the present path is that of another order, or still at rest."""
    scale = np.repeat([np.deg2rad(1.0), 1.0], 3)
    for name, order in orders(30).items():
        motion = walked(order, 0.7)
        blocks = np.repeat(np.diag(400.0 / scale**2)[None], 30, axis=0)  # 0.07 mm and degrees
        for present in (motion, np.zeros_like(motion)):
            path = Path(present.copy(), orders(30), noise=1.0)
            pull = np.einsum("kab,kb->ka", blocks, motion - present).ravel()
            path.choose(blocks, pull)
            assert path.order == name
        path.motion = motion
        path.adapt(1.0)
        assert path.step == pytest.approx((0.7, 0.7), rel=0.35)
    assert list(orders(4, np.array([0.0, 2.0, 1.0, 3.0]))["SliceTiming"]) == [0, 2, 1, 3]


def test_evidence_of_an_order_is_the_marginal_likelihood() -> None:
    """Against the density of the data with the motion integrated out, by brute force."""
    random = np.random.default_rng(5)
    found = {}
    candidates = {k: v for k, v in orders(6).items() if k in ("sequential", "interleaved")}
    for seed in range(12):
        size = (0.15, 0.5, 1.5)[seed % 3]
        motion = walked(candidates["interleaved"], size, seed)
        scale = np.repeat([np.deg2rad(1.0), 1.0], 3)
        seen = motion + scale * random.normal(0, 0.3, motion.shape)
        blocks = np.repeat(np.diag(1 / (0.3 * scale) ** 2)[None], 6, axis=0) * MISFIT
        path = Path(np.zeros((6, 6)), candidates, noise=1.0)
        path.choose(blocks, (blocks[0] @ seen.T).T.ravel())
        logs = {}
        for name in candidates:
            best = -np.inf
            for step in (0.15, 0.5, 1.5):
                prior = np.linalg.inv(path.precision(name, (step, step)) / MISFIT)
                whole = prior + np.diag(np.tile((0.3 * scale) ** 2, 6))
                sign, size_of = np.linalg.slogdet(whole)
                assert sign > 0
                misfit = seen.ravel() @ np.linalg.solve(whole, seen.ravel())
                best = max(best, -0.5 * (size_of + misfit))
            logs[name] = best
        found[seed] = path.order == max(logs, key=lambda name: logs[name])
    assert all(found.values())


def test_a_distrusted_slice_lies_between_its_neighbours_in_time() -> None:
    order = np.array([0, 2, 4, 1, 3, 5])
    motion = walked(order, 0.7)
    path = Path(motion.copy(), {"given": order}, noise=1.0, base=RigidTransform())
    distrusted = np.array([False, False, True, False, False, False])
    poses = path.bridged(distrusted, np.zeros(3))
    # the walk's mean between slices 0 and 1, pulled a little to rest
    prior = path.precision().reshape(6, 6, 6, 6)
    for c in range(6):
        own, others = prior[2, c, 2, c], prior[2, c, :, c].copy()
        others[2] = 0
        assert path.motion[2, c] == pytest.approx(-others @ motion[:, c] / own)
    assert np.allclose(path.motion[~distrusted], motion[~distrusted])
    # one whose neighbour in time is ignored lies where the walk is without that one's say
    ignored = np.array([False, False, False, False, True, False])
    _, variance = path.expected(distrusted | ignored)
    poses = path.bridged(distrusted, np.zeros(3), ignored)
    for c in range(6):
        missing = [2, 4]
        own = prior[np.ix_(missing, [c], missing, [c])][:, 0, :, 0]
        known = sum(prior[np.ix_(missing, [c], [k], [c])][:, 0, 0, 0] * motion[k, c]
                    for k in range(6) if k not in missing)  # fmt: skip
        assert path.motion[2, c] == pytest.approx(-np.linalg.solve(own, known)[0])
        assert variance[0, c] == pytest.approx(np.linalg.inv(own)[0, 0] * MISFIT)
    assert np.allclose(path.motion[~distrusted], motion[~distrusted])
    assert np.allclose(poses[2], RigidTransform.from_vector(path.motion[2], np.zeros(3)).matrix)


def test_metric_is_the_quadratic_form_it_says() -> None:
    metric = Metric(lambda r: 2 * r, offset=torch.tensor([1.0, -1.0]))
    assert metric.target(torch.tensor([1.0, 1.0])).tolist() == [3.0, 1.0]


def test_mean_pose_against_scipy() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(0, 0.2, (6, 6))
    poses = np.stack([RigidTransform.from_vector(v).matrix for v in vectors])
    weights = random.random(6)
    centre = np.array([3.0, -2.0, 5.0])
    found = mean_pose(poses, centre, weights)
    expected = Rotation.from_matrix(poses[:, :3, :3]).mean(weights)
    assert np.allclose(found.matrix[:3, :3], expected.as_matrix(), atol=1e-6)
    moved = poses[:, :3, :3] @ centre + poses[:, :3, 3]
    assert np.allclose(found.apply(centre), np.average(moved, axis=0, weights=weights))


def test_slices_of_a_cropped_stack_are_found(simulated: list[SimulatedStack]) -> None:
    stack = simulated[0].stack
    affine = np.array(stack.grid.affine)
    affine[:3, 3] = stack.grid.to_world([2, 1, 3])
    shape = (stack.grid.shape[0] - 4, stack.grid.shape[1] - 4, stack.grid.shape[2] - 5)
    small = stack.with_data(stack.data)
    object.__setattr__(small, "grid", Grid(shape, affine))
    found = prepared_slices(stack, small)
    assert found == {"first": 3, "count": shape[2], "acquired": stack.grid.shape[2]}
