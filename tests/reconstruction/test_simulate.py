# SPDX-License-Identifier: Apache-2.0
"""The simulator against closed forms, and its draws replayed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import erf

from irem_bids.reconstruction import simulate as sim
from irem_bids.reconstruction.geometry import Grid, RigidTransform, plane, through_plane_axis
from irem_bids.reconstruction.metrics import head_mask
from tests.phantom import head

WIDTH = 3.0  # mm, standard deviation of the blob
HEIGHT = 700.0


def blob_truth(shape=(44, 46, 48)):
    """A Gaussian blob off the centre; (volume, grid, centre in mm)."""
    affine = np.eye(4)
    affine[:3, 3] = (-20, -25, -18)
    grid = Grid(shape, affine)
    centre = grid.centre + np.array([1.3, -2.1, 0.7])
    points = grid.to_world(np.moveaxis(np.indices(shape), 0, -1))
    volume = HEIGHT * np.exp(-0.5 * np.sum((points - centre) ** 2, axis=-1) / WIDTH**2)
    return volume.astype(np.float32), grid, centre


def offsets_from_blob(one: sim.SimulatedStack, centre: np.ndarray) -> np.ndarray:
    """(I, J, K, 3) mm from where the blob is in scanner space, along the stack's axes."""
    grid = one.stack.grid
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    return (points - one.pose.inverse().apply(centre)) @ grid.directions


@pytest.mark.parametrize("orientation", ["axial", "coronal", "sagittal"])
def test_gaussian_blob_through_a_gaussian_profile(orientation):
    truth, grid, centre = blob_truth()
    protocol = sim.Protocol(
        orientations=(orientation,),
        thickness=5.0,
        gap=0.5,
        motion_degrees=6,
        motion_mm=3,
        obliqueness=10,
        seed=4,
    )
    one = sim.simulate(truth, grid, protocol)[0]
    sigma = 5.0 * sim.FWHM_TO_SIGMA
    wide = np.hypot(WIDTH, sigma)
    d = offsets_from_blob(one, centre)
    in_plane = np.exp(-0.5 * (d[..., 0] ** 2 + d[..., 1] ** 2) / WIDTH**2)
    expected = HEIGHT * WIDTH / wide * in_plane * np.exp(-0.5 * d[..., 2] ** 2 / wide**2)
    assert np.abs(one.stack.data - expected).max() < 2e-3 * HEIGHT
    assert one.stack.data.max() > 0.5 * HEIGHT


def test_gaussian_blob_through_a_box_and_large_pixels():
    truth, grid, centre = blob_truth()
    protocol = sim.Protocol(
        orientations=("coronal",),
        thickness=4.0,
        in_plane=2.0,
        profile="box",
        width_factor=1.25,
        motion_degrees=5,
        motion_mm=2,
        seed=5,
    )
    one = sim.simulate(truth, grid, protocol)[0]
    expected = np.full(one.stack.data.shape, HEIGHT)
    d = offsets_from_blob(one, centre)
    for axis, width in enumerate((2.0, 2.0, 5.0)):
        high = erf((d[..., axis] + width / 2) / (np.sqrt(2) * WIDTH))
        low = erf((d[..., axis] - width / 2) / (np.sqrt(2) * WIDTH))
        expected *= (high - low) * WIDTH * np.sqrt(np.pi / 2) / width
    assert np.abs(one.stack.data - expected).max() < 2e-3 * HEIGHT


@pytest.mark.parametrize("profile", sim.PROFILES)
def test_a_symmetric_profile_keeps_a_ramp(profile):
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    grid = Grid((60, 60, 60), affine)
    slope = np.array([1.0, -2.0, 3.0])
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    truth = 500 + points @ slope
    protocol = sim.Protocol(profile=profile, thickness=4.0, motion_degrees=4, motion_mm=2, seed=2)
    for one in sim.simulate(truth, grid, protocol):
        stack = one.stack
        seen = one.pose.apply(stack.grid.to_world(np.moveaxis(np.indices(stack.data.shape), 0, -1)))
        inner = ((seen > 15) & (seen < 44)).all(axis=-1)
        assert inner.sum() > 1000
        assert np.abs(stack.data - (500 + seen @ slope))[inner].max() < 0.05


def test_slices_without_gaps_conserve_the_signal():
    truth, grid = head()
    total = float(truth.sum(dtype=np.float64)) * np.prod(grid.voxel_size)
    protocol = sim.Protocol(profile="box", thickness=6.0, in_plane=2.0, margin=12.0)
    for one in sim.simulate(truth, grid, protocol):
        voxel = np.prod(one.stack.grid.voxel_size)
        assert float(one.stack.data.sum(dtype=np.float64)) * voxel == pytest.approx(total, rel=2e-3)


def test_decimation_takes_the_truths_voxels():
    truth, grid = head((40, 44, 36))
    protocol = sim.Protocol(orientations=("axial",), thickness=6.0, profile="decimate", margin=0.0)
    data = sim.simulate(truth, grid, protocol)[0].stack.data
    assert np.allclose(data, truth[:, :, 1::3], atol=0.01)


def test_headers_say_what_the_protocol_says():
    truth, grid = head()
    orientations = ("axial", "sagittal", "axial", "coronal")
    protocol = sim.Protocol(
        orientations=orientations, thickness=4.0, gap=0.8, in_plane=2.0, obliqueness=12, seed=9
    )
    stacks = [one.stack for one in sim.simulate(truth, grid, protocol)]
    assert [s.label for s in stacks] == ["axial1", "sagittal1", "axial2", "coronal1"]
    for stack, orientation in zip(stacks, orientations, strict=True):
        assert through_plane_axis(stack.grid) == stack.slice_axis == 2
        assert plane(stack.grid, 2) == orientation
        assert stack.spacing == pytest.approx(4.8)
        assert stack.slice_thickness == 4.0
        assert stack.mask.all()
    angle = np.rad2deg(np.arccos(np.abs(stacks[1].normal[0])))
    assert 0 < angle <= 12


def test_draws_pass_through_json_and_replay_the_same_stacks():
    truth, grid = head()
    protocol = sim.Protocol(
        thickness=6.0,
        in_plane=2.0,
        motion_degrees=4,
        motion_mm=4,
        slice_degrees=0.7,
        slice_mm=0.7,
        gain=0.08,
        bias=0.1,
        snr=40,
        damaged=0.05,
        seed=3,
    )
    draws = sim.draw(protocol, truth, grid)
    again = [sim.StackDraw.from_dict(json.loads(json.dumps(d.to_dict()))) for d in draws]
    assert tuple(again) == draws
    first = sim.acquire(truth, grid, protocol, draws)
    second = sim.acquire(truth, grid, protocol, again, threads=2)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.stack.data, b.stack.data)
    assert sim.draw(replace(protocol, seed=4), truth, grid) != draws


def test_motion_stays_in_its_bounds_and_is_not_in_the_header():
    truth, grid = head()
    still = sim.Protocol(orientations=("axial",) * 12, thickness=8.0)
    moving = replace(still, motion_degrees=4.0, motion_mm=3.0)
    angles, shifts = [], []
    for a, b in zip(sim.draw(still, truth, grid), sim.draw(moving, truth, grid), strict=True):
        assert a.affine == b.affine
        assert np.allclose(a.pose, np.eye(4))
        vector = RigidTransform(b.pose).to_vector(b.centre)
        angles.append(np.rad2deg(np.linalg.norm(vector[:3])))
        shifts.append(np.linalg.norm(vector[3:]))
    assert 2.0 < max(angles) <= 4.0
    assert 1.5 < max(shifts) <= 3.0
    assert len(set(angles)) == 12


def test_slices_walk_in_interleaved_order_within_the_bound():
    truth, grid = head((40, 44, 80))
    protocol = sim.Protocol(
        orientations=("axial",), thickness=2.0, slice_degrees=0.7, slice_mm=0.7, slice_bound=2.0
    )
    one = sim.draw(protocol, truth, grid)[0]
    vectors = np.array(one.slice_vectors)
    vectors[:, :3] = np.rad2deg(vectors[:, :3])
    assert np.abs(vectors).max() <= 2.0
    assert one.order[:3] == (0, 2, 4)
    assert sorted(one.order) == list(range(one.shape[2]))
    in_order = np.diff(vectors[list(one.order)], axis=0)
    neighbours = np.diff(vectors, axis=0)
    assert 0.5 < in_order.std() < 0.75
    assert neighbours.std() > 1.3 * in_order.std()
    moved = one.slice_pose(5).apply([1.0, 2.0, 3.0])
    expected = RigidTransform.from_vector(one.slice_vectors[5], one.centre).apply([1.0, 2.0, 3.0])
    assert np.allclose(moved, expected)


def test_a_moved_slice_shows_the_moved_tissue():
    truth, grid = head()
    protocol = sim.Protocol(orientations=("axial",), thickness=6.0)
    still = sim.draw(protocol, truth, grid)[0]
    vectors = np.zeros((still.shape[2], 6))
    vectors[6, 3] = 4.0  # two voxels to the right
    moved = replace(still, slice_vectors=tuple(map(tuple, vectors.tolist())))
    a, b = (sim.acquire(truth, grid, protocol, [d])[0].stack.data for d in (still, moved))
    assert np.array_equal(a[:, :, :6], b[:, :, :6])
    assert np.allclose(b[:-2, :, 6], a[2:, :, 6], atol=0.05)


def test_noise_is_rician_of_the_stated_snr():
    truth, grid = head()
    mask = head_mask(truth)
    protocol = sim.Protocol(orientations=("axial",), thickness=4.0, snr=20, gain=0.2, seed=1)
    one = sim.simulate(truth, grid, protocol)[0]
    clean = sim.acquire(truth, grid, protocol, [replace(one.draw, sigma=0.0)])[0].stack.data
    sigma, gain = float(truth[mask].mean()) / 20, one.draw.gain
    assert one.draw.sigma == pytest.approx(sigma)
    assert 0.8 <= gain <= 1.2
    assert gain != 1.0
    air = clean == 0
    assert one.stack.data[air].mean() == pytest.approx(gain * sigma * np.sqrt(np.pi / 2), rel=0.02)
    bright = clean > 10 * sigma * gain
    assert np.std((one.stack.data - clean)[bright]) == pytest.approx(gain * sigma, rel=0.03)


def test_bias_is_smooth_and_bounded():
    truth, grid = head()
    protocol = sim.Protocol(thickness=6.0, bias=0.2, seed=8)
    for one in sim.draw(protocol, truth, grid):
        field = sim.bias_field(one, 0.2)
        assert field.min() == pytest.approx(0.8, abs=1e-3)
        assert field.max() == pytest.approx(1.2, abs=1e-3)
        assert max(np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)) < 0.06


def test_damaged_slices_are_those_drawn():
    truth, grid = head((40, 44, 60))
    protocol = sim.Protocol(orientations=("axial",), thickness=2.0, damaged=0.1, seed=2)
    one = sim.draw(protocol, truth, grid)[0]
    assert len(one.damage) == round(0.1 * one.shape[2])
    assert {bad.kind for bad in one.damage} == {"dropped", "torn"}
    whole = sim.acquire(truth, grid, protocol, [replace(one, damage=())])[0].stack.data
    bad = sim.acquire(truth, grid, protocol, [one])[0].stack.data
    changed = np.flatnonzero(np.abs(whole - bad).max(axis=(0, 1)) > 0)
    assert changed.tolist() == [d.slice for d in one.damage]
    dropped = next(d for d in one.damage if d.kind == "dropped")
    assert np.allclose(
        bad[:, :, dropped.slice], dropped.factor * whole[:, :, dropped.slice], atol=1e-3
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"orientations": ("axial", "frontal")}, "frontal"),
        ({"orientations": ()}, "orientations"),
        ({"profile": "sinc"}, "'sinc'; expected one of"),
        ({"thickness": 0.0}, "thickness is 0.0; expected above 0"),
        ({"snr": -1.0}, "snr is -1.0"),
        ({"gain": 1.5}, "gain is 1.5"),
    ],
)
def test_impossible_protocols_are_refused(values, message):
    with pytest.raises(sim.SimulationError, match=message):
        sim.Protocol(**values)


def test_an_empty_truth_is_refused():
    _truth, grid = head()
    protocol = sim.Protocol()
    with pytest.raises(sim.SimulationError, match="zero everywhere"):
        sim.acquire(np.zeros(grid.shape), grid, protocol, [])
