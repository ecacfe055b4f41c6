# SPDX-License-Identifier: Apache-2.0
"""A GPU against its floors: seconds, rate of evaluations, bandwidth, agreement with the CPU.

``python benchmarks/gpu.py TRUTH.nii.gz RESULT.json [--native NATIVE.nii.gz] [--job]``

An evaluation of the image with its gradient (one point of a slice profile: look up eight voxels,
add to eight) moves at least 96 bytes; the floor is what the memory of an H200 allows, 4.3 TB/s.
``--device cpu --crop 40`` goes the same way on a machine without a GPU; nothing is then shown
but that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from simulated_head import PROTOCOL, truth_volume
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from irem_bids import cli
from irem_bids.reconstruction import linear, operator_cuda, operator_torch, solution
from irem_bids.reconstruction.evaluation import evaluate
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import head_mask
from irem_bids.reconstruction.operator_torch import DeviceRows
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.paper2021 import PaperNetwork, fit_paper
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.sample import sample
from irem_bids.reconstruction.simulate import simulate
from irem_bids.reconstruction.simulated_dataset import write_dataset
from irem_bids.settings import Settings

BYTES = 96.0  # of one evaluation with its gradient
FLOOR = 4.3e12 / BYTES  # evaluations a second on an H200
LIMITS = {
    "fit_s": 5.0,
    "sample_s": 0.5,
    "native_fit_s": 15.0,
    "job_s": 60.0,
    "share_of_floor": 0.3,
    "paper_speedup": 10.0,
    "irem_over_paper": 100.0,
    "agreement_db": 0.05,
}
AT_LEAST = ("share_of_floor", "paper_speedup", "irem_over_paper")
Truth = tuple[np.ndarray, Grid]
THREADS = os.cpu_count() or 1


def timed(device: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its seconds, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.monotonic()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.monotonic() - start


def prepared_of(truth: Truth, settings: Settings) -> Prepared:
    """Stacks of 4 mm with hidden motion, registered."""
    stacks = [s.stack for s in simulate(*truth, PROTOCOL, threads=THREADS)]
    return prepare(stacks, settings, threads=THREADS)


def score(image: np.ndarray, grid: Grid, truth: Truth) -> float:
    """PSNR in the head after a rigid and intensity gauge."""
    return evaluate((image, grid), truth, head_mask(truth[0]), threads=THREADS).psnr


def heads(
    prepared: Prepared, truth: Truth, settings: Settings, device: str, compare: bool
) -> dict[str, Any]:
    """irem on the device and, to ``compare``, on the CPU: seconds, memory, PSNR."""
    grid = output_grid(prepared, settings.output)
    fit("srr", prepared, grid, settings, device=device)  # starts the device, compiles
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    found, seconds = timed(device, lambda: fit("irem", prepared, grid, settings, device=device))
    image, sampling = timed(device, lambda: sample(found.field, grid, device=device))
    memory = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    out: dict[str, Any] = {
        "result_voxels": int(np.prod(grid.shape)),
        "fit_s": seconds,
        "sample_s": sampling,
        "gpu_memory_mb": memory // 2**20,
        "psnr": score(image, grid, truth),
    }
    if compare:
        out["psnr_cpu"] = score(fit("irem", prepared, grid, settings).image(), grid, truth)
        out["agreement_db"] = abs(out["psnr"] - out["psnr_cpu"])
    return out


def rate(prepared: Prepared, settings: Settings, device: str, steps: int) -> dict[str, float]:
    """Evaluations with gradient a second, in the solver's iterations."""
    grid = output_grid(prepared, settings.output)
    job = solution.Job(prepared, grid, settings, device, None, None)
    system = solution.build_system(job, grid, solution.State.registered(prepared))
    prior = solution.penalty_strength(prepared, settings, float(grid.voxel_size[0]), denoised=False)
    start = torch.zeros(grid.shape, device=device)
    linear.solve(system, start, prior, iterations=1, reweightings=1)
    _, seconds = timed(
        device, lambda: linear.solve(system, start, prior, iterations=steps, reweightings=1)
    )
    points = sum(len(m.values) * len(m.rows.weights) for m in system.models)
    each = steps * points / seconds
    return {
        "evaluations_per_s": each,
        "bandwidth_gb_s": each * BYTES / 1e9,
        "share_of_floor": each / FLOOR,
    }


def loops(prepared: Prepared, settings: Settings, device: str) -> list[dict[str, float]]:
    """Per stack: points, and ms of each of the forward model's loops, ours and plain PyTorch's."""
    grid = output_grid(prepared, settings.output)
    job = solution.Job(prepared, grid, settings, device, None, None)
    system = solution.build_system(job, grid, solution.State.registered(prepared))
    volume, out = torch.rand(grid.shape, device=device), []
    for model in system.models:
        rows, pivot = DeviceRows(model.rows, torch.device(device)), grid.to_index(model.pivot)
        each: dict[str, float] = {"points": len(model.values) * len(model.rows.weights)}
        for name, module in (("ours", operator_cuda), ("plain", operator_torch)):
            values = module.forward(volume, rows)
            work: dict[str, Callable[[], Tensor]] = {
                "forward": partial(module.forward, volume, rows),
                "adjoint": partial(module.adjoint, values, rows, grid.shape),
                "derivatives": partial(module.derivatives, volume, rows, grid.affine, pivot),
            }
            for loop, call in work.items():
                call()
                _, seconds = timed(device, lambda call=call: [call() for _ in range(5)])
                each[f"{loop}_{name}_ms"] = 200 * seconds
        out.append(each)
    return out


def straightforward(
    network: PaperNetwork, points: np.ndarray, values: np.ndarray, device: str
) -> None:
    """An epoch of the paper as one writes it down first: DataLoader, Adam, one loss a step."""
    pairs = TensorDataset(torch.from_numpy(points), torch.from_numpy(values))
    loader = DataLoader(pairs, batch_size=2500, shuffle=True, drop_last=True)
    adam = torch.optim.Adam(network.parameters(), lr=1e-4)
    for where, target in loader:
        loss = torch.nn.functional.mse_loss(network(where.to(device)), target.to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()


def paper(prepared: Prepared, device: str, epochs: int) -> dict[str, float]:
    """Seconds of an epoch of irem2021, and of the straightforward loop."""
    rows = list(zip(prepared.stacks, prepared.poses, strict=True))
    points = np.concatenate([p.apply(s.grid.to_world(np.argwhere(s.mask))) for s, p in rows])
    values = np.concatenate([s.data[s.mask] for s, _ in rows])
    options = Settings.from_dict({"irem2021": {"epochs_2021": epochs}}).irem2021
    _, ours = timed(device, lambda: fit_paper(points, values, options, seed=1, device=device))
    middle = points.mean(0)
    network = PaperNetwork(
        (float(middle[0]), float(middle[1]), float(middle[2])), float(np.ptp(points, 0).max()) / 2
    )
    network.to(device).train()
    given = (network, points.astype(np.float32), values.astype(np.float32), device)
    _, plain = timed(device, lambda: straightforward(*given))
    whole = Settings().irem2021.epochs_2021
    return {
        "epoch_s": ours / epochs,
        "straightforward_epoch_s": plain,
        "paper_speedup": plain / (ours / epochs),
        "whole_paper_s": whole * ours / epochs,
    }


def whole_job(truth: Truth, device: str) -> float:
    """Seconds of the app on the simulated dataset, with its report."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        simulated = simulate(*truth, PROTOCOL, threads=THREADS)
        write_dataset(root / "dataset", simulated, truth, PROTOCOL)
        command = [str(root / "dataset"), str(root / "out"), "participant"]
        command += ["--device", device, "-w", str(root / "work")]
        start = time.monotonic()
        if code := cli.main(command):
            raise SystemExit(f"irem-bids ended with {code}")
        return time.monotonic() - start


def verdicts(found: dict[str, float]) -> dict[str, str]:
    """Each floor of the issue: held or missed."""
    out = {}
    for name, limit in LIMITS.items():
        if name in found:
            held = found[name] >= limit if name in AT_LEAST else found[name] <= limit
            out[name] = f"{'held' if held else 'MISSED'}: {found[name]:.4g} against {limit:g}"
    return out


def main() -> None:
    """Everything, then the verdicts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path, help="the head of D1, 1 mm")
    parser.add_argument("result", type=Path)
    parser.add_argument("--native", type=Path, help="the native head, 0.7 mm")
    parser.add_argument("--job", action="store_true", help="the whole app, too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--epochs", type=int, default=2, help="of irem2021")
    parser.add_argument("--steps", type=int, default=50, help="of the solver")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device on this machine: the floors of a GPU cannot be shown here; "
            "'--device cpu --crop 40' only tries the script"
        )
    settings = Settings()
    truth = truth_volume(options.truth, options.crop)
    prepared = prepared_of(truth, settings)
    found: dict[str, Any] = heads(prepared, truth, settings, options.device, compare=True)
    found |= rate(prepared, settings, options.device, options.steps)
    found["loops"] = loops(prepared, settings, options.device)
    found |= paper(prepared, options.device, options.epochs)
    found["irem_over_paper"] = found["whole_paper_s"] / found["fit_s"]
    if options.native:
        whole = truth_volume(options.native, options.crop)
        stacks = prepared_of(whole, settings)
        native = heads(stacks, whole, settings, options.device, compare=False)
        found["native_fit_s"], found["native"] = native["fit_s"], native
    if options.job:
        found["job_s"] = whole_job(truth, options.device)
    gpu = options.device != "cpu"
    record = {
        **machine(),
        "command": f"python benchmarks/gpu.py TRUTH RESULT --crop {options.crop}",
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "found": found,
        "floors": verdicts(found) if gpu else "not shown: this is the CPU",
    }
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
