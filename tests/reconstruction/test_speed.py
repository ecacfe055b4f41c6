# SPDX-License-Identifier: Apache-2.0
"""Fast paths against their plain twins, and a guard of their cost.

Cost is guarded by counted work and by ratios within one run, not by seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from irem_bids.reconstruction import operator_cpu, operator_torch, solver_cpu, solver_torch
from irem_bids.reconstruction.acquisition import (
    Receiver,
    StackModel,
)
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.lattice import Lattice
from irem_bids.reconstruction.linear import Prior, System, solve
from irem_bids.reconstruction.sharpening import sharpened
from irem_bids.reconstruction.stack import Stack
from irem_bids.settings import Acquisition
from tests.stacks import centred

REPOSITORY = Path(__file__).resolve().parents[2]
TILTED = RigidTransform.from_vector([0.1, 0.05, -0.2, 0.5, -0.7, 0.3])
TURNED = RigidTransform.from_vector([0.5, -0.7, 0.6, 1.0, 0.0, 2.0])


def ball_stack(axis: int, in_plane: float = 1.0, spacing: float = 4.0, size: float = 48) -> Stack:
    """Noise within a ball; slices along ``axis``; its top is beyond a small volume's edge."""
    sizes = [in_plane] * 3
    sizes[axis] = spacing
    grid = centred(tuple(int(size / s) for s in sizes), tuple(sizes))
    points = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    mask = (np.linalg.norm(points, axis=1) < 0.48 * size).reshape(grid.shape)
    data = np.random.default_rng(axis).random(grid.shape).astype(np.float32)
    return Stack(f"s{axis}", data, grid, axis, spacing, mask)


def model_of(stack: Stack, grid: Grid, pose: RigidTransform = TILTED) -> StackModel:
    model = StackModel(stack, stack.mask, grid, Acquisition())
    model.set_poses(pose)
    return model


def system_of(size: int = 48) -> System:
    """Three stacks about a cube."""
    grid = centred((size, size, size), (1.0, 1.0, 1.0))
    models = [model_of(ball_stack(axis, size=size), grid) for axis in range(3)]
    seen = sum(m.adjoint(torch.ones_like(m.values)) for m in models)
    ones = [np.ones(m.slices) for m in models]
    return System(models, [Receiver()] * 3, [1.0] * 3, ones, (seen > 1e-3).float(), 0)


def random_volume(grid: Grid) -> torch.Tensor:
    return torch.randn(*grid.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pose", [TILTED, TURNED], ids=["tilted", "turned"])
@pytest.mark.parametrize(("in_plane", "spacing"), [(1.0, 4.0), (2.2, 3.3)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lattice_equals_the_plain_model(
    axis: int, in_plane: float, spacing: float, pose: RigidTransform
) -> None:
    """Also where the volume ends within the stack, and where voxels are averaged in plane."""
    stack, grid = ball_stack(axis, in_plane, spacing), centred((45, 30, 41), (1.0, 1.0, 1.0))
    model = model_of(stack, grid, TILTED)
    lattice = model.as_lattice()
    assert isinstance(lattice, Lattice)
    model.set_poses(pose)  # the lattice follows
    rows = operator_torch.DeviceRows(model.rows, torch.device("cpu"))
    volume, values = random_volume(grid), torch.randn(len(model.values))
    predicted = operator_torch.forward(sharpened(volume, model.sharpness), rows)
    assert torch.allclose(model.forward(volume), predicted, atol=1e-4)
    expected = sharpened(operator_torch.adjoint(values, rows, grid.shape), model.sharpness)
    assert torch.allclose(model.adjoint(values), expected, atol=1e-4)


def test_lattice_gives_the_same_bits_on_any_number_of_threads() -> None:
    stack, grid = ball_stack(0), centred((45, 30, 41), (1.0, 1.0, 1.0))
    lattice = model_of(stack, grid).as_lattice()
    assert lattice is not None
    values = np.ones(int(stack.mask.sum()), np.float32)
    found = []
    for threads in (1, 2):
        out = np.zeros((operator_cpu.BLOCKS, *grid.shape), np.float32)
        lattice.adjoint(values, out, threads)
        found.append((lattice.forward(random_volume(grid).numpy(), threads), out))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_slices_that_move_and_learned_widths_leave_the_lattice() -> None:
    model = model_of(ball_stack(2), centred((45, 30, 41), (1.0, 1.0, 1.0)))
    poses = model.poses.copy()
    assert model.as_lattice() is not None
    model.set_poses(TILTED, width=1.1)
    assert model.as_lattice() is None
    poses[3, 0, 3] += 1.0
    model.set_poses(poses, width=1.0)
    assert model.as_lattice() is None


def test_factors_equal_their_formula() -> None:
    voxels = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    receiver = Receiver(1.3, np.linspace(-0.2, 0.3, 9))
    terms = Receiver.terms(voxels)
    expected = 1.3 * torch.exp(terms @ torch.from_numpy(receiver.bias).float())
    assert torch.allclose(receiver.factors(voxels), expected, rtol=1e-5)


def test_vector_work_equals_its_plain_twin() -> None:
    random = torch.Generator().manual_seed(3)
    shape = (9, 8, 11)
    domain = (torch.rand(shape, generator=random) > 0.3).float()
    domain[0], domain[:, 3] = 0, 0  # lines without a voxel
    names = ("volume", "direction", "residual")
    first = {n: torch.randn(shape, generator=random) for n in names}
    first["direction"] *= domain
    first["diagonal"] = torch.rand(shape, generator=random).masked_fill(domain == 0, 1e30)
    first["parts"] = torch.randn((2, *shape), generator=random)
    first["edges"], first["inverse"] = torch.empty(shape), torch.zeros(shape)
    found = []
    for kernels in (solver_cpu, solver_torch):
        t = {k: v.clone() for k, v in first.items()}
        where = kernels.spans(domain)
        penalty = (0.3, 0.05)
        kernels.reweight(t["volume"], t["diagonal"], where, penalty, t["edges"], t["inverse"])
        curvature = kernels.normal(t["direction"], t["edges"], t["parts"], where)
        image = (t["parts"][0] * domain).clone()
        moved = (t["volume"], t["direction"], t["residual"], t["parts"][0], t["inverse"])
        product = kernels.descend(*moved, where, (0.7, 0.4))
        left = (t["parts"] * domain).clone()
        kernels.turn(t["direction"], t["residual"], t["inverse"], where, 0.6)
        kept = [t[k] * domain for k in (*names, "edges", "inverse")]
        found.append((curvature, product, image, left, *kept))
    for here, there in zip(*found, strict=True):
        assert torch.allclose(torch.as_tensor(here), torch.as_tensor(there), rtol=1e-4, atol=1e-5)
    assert found[0][3].abs().max() == 0


def test_solver_minimises_the_cost_and_keeps_the_air() -> None:
    system = system_of(24)
    prior = Prior(0.02, 0.05)
    start = torch.zeros(system.grid.shape)
    volume = solve(system, start, prior, iterations=200, reweightings=20)
    gradient = solver_torch.penalty_gradient(
        volume, prior.weight * solver_torch.huber_weights(volume, prior.width)
    )
    data = torch.zeros_like(volume)
    for model, rest in zip(system.models, system.residuals(volume), strict=True):
        data += model.adjoint(rest)
    inside = system.domain > 0
    assert (gradient - data)[inside].norm() < 0.01 * data[inside].norm()
    assert volume[~inside].abs().max() < 1e-20


# -------------------------------------------------------------------------------- cost
def test_an_iteration_costs_one_look_up_and_one_adjoint_a_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system, calls = system_of(32), {"forward": 0, "add_adjoint": 0}

    def counted(name: str) -> Callable[..., object]:
        method = getattr(StackModel, name)

        def run(self: StackModel, *given: object) -> object:
            calls[name] += 1
            return method(self, *given)

        return run

    for name in calls:
        monkeypatch.setattr(StackModel, name, counted(name))
    start = torch.zeros(system.grid.shape)
    solve(system, start, Prior(0.01, 0.05), iterations=12, reweightings=4)
    # the start's residual, then one of each an iteration; reweighting is free
    assert calls == {"forward": 3 * 13, "add_adjoint": 3 * 13}
    solve(system, start, Prior(0.01, 0.05), iterations=12, reweightings=4)
    assert calls == {"forward": 3 * 26, "add_adjoint": 3 * 26}


def test_lattice_looks_up_a_third_of_the_taps() -> None:
    for model in system_of(48).models:
        lattice = model.as_lattice()
        assert lattice is not None
        assert lattice.points < 0.5 * len(model.values) * len(model.rows.weights)


def test_memory_of_a_stack_and_of_the_solver_per_voxel() -> None:
    """Bytes that stay while a volume is solved for: 16 numbers a voxel of the result's box."""
    system = system_of(64)
    solve(system, torch.zeros(system.grid.shape), Prior(0.01, 0.05), iterations=1, reweightings=1)
    held = sum(lattice.nbytes for m in system.models if (lattice := m.as_lattice()))
    assert held < 3 * 10 * system.domain.numel()
    rows = sum(m.index.nbytes + m.voxels.nbytes + m.values.nbytes for m in system.models)
    assert rows < 30 * sum(len(m.values) for m in system.models)


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least of three calls after one that compiles."""
    work()
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_a_turned_stack_costs_little_more_than_one_on_the_grid() -> None:
    """Lines across those of a volume that no cache holds: 1.1 times where it is read ahead
    (:func:`.lattice._read_ahead`), about twice where it is not."""
    size = 200
    model = model_of(ball_stack(2, size=size), centred((size,) * 3, (1.0, 1.0, 1.0)))
    volume = random_volume(model.grid).numpy()
    times = []
    for degrees in (0.0, 5.0):
        turn = np.radians([degrees, degrees, 0.0])
        model.set_poses(RigidTransform.from_vector([*turn, 0.3, 0.2, 0.4]))
        lattice = model.as_lattice()
        assert lattice is not None
        times.append(cpu_seconds(lambda at=lattice: at.forward(volume, 1)))  # type: ignore[misc]
    assert times[1] < 1.5 * times[0]


def test_compiled_loops_are_many_times_faster_than_plain_ones() -> None:
    system = system_of(64)
    model, volume = system.models[0], random_volume(system.grid)
    rows = operator_torch.DeviceRows(model.rows, torch.device("cpu"))
    fast = cpu_seconds(lambda: model.adjoint(model.forward(volume)))
    plain = cpu_seconds(
        lambda: operator_torch.adjoint(operator_torch.forward(volume, rows), rows, volume.shape)
    )
    assert plain > 5 * fast


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_of_openmp_sleep_unless_told_otherwise(
    given: str | None, expected: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    environment |= {"OMP_DISPLAY_ENV": "TRUE", "PYTHONPATH": str(REPOSITORY)}
    code = "import irem_bids.reconstruction.linear"  # which loads torch, and that OpenMP
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
