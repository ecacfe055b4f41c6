# SPDX-License-Identifier: Apache-2.0
"""CPU seconds per evaluation with its gradient, against plain PyTorch in the same run.

One evaluation is the image's value at one point of a slice profile and what that point gives
to the gradient.  Ours: an iteration of the solver (look-up, adjoint, penalty and the vectors of
conjugate gradients), over the points of all profiles.  Plain: `grid_sample`, autograd and
`torch.optim.Adam`, on the same volume and points, 80,000 points a step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as irem_bids does, if it comes first
import torch
from machine import machine
from simulated_head import PROTOCOL, truth_volume

from irem_bids.reconstruction import solution
from irem_bids.reconstruction.linear import System, solve
from irem_bids.reconstruction.operator_torch import DeviceRows
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.simulate import simulate
from irem_bids.settings import Settings

POINTS = 80_000  # a step of the plain loops
STEPS = 12


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def taps(system: System) -> int:
    """Points that one look-up of all stacks visits."""
    return sum(len(m.values) * len(m.rows.weights) for m in system.models)


def linear_cost(system: System, prior: Any, start: torch.Tensor) -> float:
    """CPU seconds per evaluation of the solver's iterations."""
    counts = (5, 25)
    solve(system, start, prior, iterations=1, reweightings=1)  # compiles
    spent = [
        seconds(lambda n=n: solve(system, start, prior, iterations=n, reweightings=1))
        for n in counts
    ]
    return (spent[1] - spent[0]) / (counts[1] - counts[0]) / taps(system)


def plain_volume_cost(system: System, start: torch.Tensor) -> float:
    """The same unknowns and points by grid_sample, autograd and Adam."""
    volume = torch.nn.Parameter(start.clone()[None, None])
    adam = torch.optim.Adam([volume], lr=1e-3)
    model = system.models[0]
    rows, random = DeviceRows(model.rows, torch.device("cpu")), np.random.default_rng(0)
    count = POINTS // len(rows.weights)
    last = torch.tensor(start.shape) - 1

    def step() -> None:
        picked = torch.from_numpy(random.integers(0, len(model.values), count))
        k = rows.slices[picked]
        index = rows.index[picked].float()
        centre = torch.einsum("nab,nb->na", rows.maps[k][:, :, :3], index) + rows.maps[k][:, :, 3]
        points = (centre[:, None] + rows.steps[k]) * 2 / last - 1
        where = points.flip(-1).reshape(1, -1, 1, 1, 3)
        values = torch.nn.functional.grid_sample(volume, where, align_corners=True)
        loss = ((model.values[picked] - values.reshape(count, -1) @ rows.weights) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    step()
    return seconds(lambda: [step() for _ in range(STEPS)]) / STEPS / (count * len(rows.weights))


def main() -> None:
    """Simulate, solve, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings()
    truth = truth_volume(options.truth, options.crop)
    stacks = [s.stack for s in simulate(*truth, PROTOCOL, threads=2)]
    prepared = prepare(stacks, settings, threads=2)
    grid = output_grid(prepared, settings.output)
    job = solution.Job(prepared, grid, settings, "cpu", None, None)
    linear = solution.solve_linear(job, refined=False, progress=lambda *_: None)
    system = solution.build_system(job, grid, linear.state)
    prior = solution.penalty_strength(prepared, settings, float(grid.voxel_size[0]), denoised=False)
    cost = {
        "linear": linear_cost(system, prior, linear.volume),
        "plain_volume": plain_volume_cost(system, linear.volume),
    }
    record = {
        **machine(),
        "command": f"python benchmarks/evaluation_cost.py TRUTH RESULT --crop {options.crop}",
        "truth": options.truth.name,
        "threads": options.threads,
        "result_voxels": int(np.prod(grid.shape)),
        "points_of_all_profiles": taps(system),
        "cpu_ns_per_evaluation": {k: round(v * 1e9, 1) for k, v in cost.items()},
        "plain_over_ours": round(cost["plain_volume"] / cost["linear"], 2),
    }
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
