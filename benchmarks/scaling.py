# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of the solution over the foreground's voxels, from 64^3 to 240^3.

A head is resampled to so many voxels of 1 mm along its longest side, three stacks of 4 mm are
simulated from it, and the image is solved for (registration off: the poses are true).  The
loops are compiled before the first measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from scipy.ndimage import zoom
from simulated_head import truth_volume

from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import simulate
from irem_bids.settings import Settings

SIZES = (64, 96, 128, 160, 200, 240)
PROTOCOL = Protocol(thickness=4.0, snr=40.0, seed=11)


def resized(truth: Path, size: int) -> tuple[np.ndarray, Grid]:
    """The head with ``size`` voxels along its longest side, each called 1 mm."""
    volume, _ = truth_volume(truth, None)
    small = np.clip(zoom(volume, size / max(volume.shape), order=1), 0, None)
    affine = np.eye(4)
    affine[:3, 3] = -(np.array(small.shape) - 1) / 2
    return small.astype(np.float32), Grid(small.shape, affine)


def measure(truth: Path, size: int, method: str, repeats: int) -> dict[str, Any]:
    """Voxels, the least seconds of ``repeats`` and seconds per million voxels."""
    settings = Settings.from_dict({"normalise": {"n4": False, "registration": False}})
    volume, grid = resized(truth, size)
    stacks = [s.stack for s in simulate(volume, grid, PROTOCOL, threads=2)]
    prepared = prepare(stacks, settings, threads=2)
    target = output_grid(prepared, settings.output)
    foreground = np.mean([s.mask.sum() * np.prod(s.grid.voxel_size) for s in prepared.stacks])
    times = []
    for _ in range(repeats):
        wall, cpu = time.monotonic(), time.process_time()
        fit(method, prepared, target, settings)
        times.append((time.process_time() - cpu, time.monotonic() - wall))
    cpu, wall = min(times)
    return {
        "size": size,
        "result_voxels": int(np.prod(target.shape)),
        "foreground_voxels": int(foreground),
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "cpu_s_per_million_foreground": round(float(cpu / foreground * 1e6), 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Measure every size; the spread is that of the seconds per voxel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--method", default="srr")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(options.truth, min(options.sizes), options.method, 1)  # compiles
    rows = []
    for size in options.sizes:
        rows.append(measure(options.truth, size, options.method, options.repeats))
        print(rows[-1], flush=True)
    each = [row["cpu_s_per_million_foreground"] for row in rows]
    where = machine()
    where["command"] = " ".join(
        ["python benchmarks/scaling.py TRUTH RESULT --method", options.method, "--sizes"]
        + [str(size) for size in options.sizes]
    )
    record = {
        **where,
        "truth": options.truth.name,
        "threads": options.threads,
        "rows": rows,
        "last_over_first": round(each[-1] / each[0], 3),
        "largest_over_smallest": round(max(each) / min(each), 3),
    }
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print({k: record[k] for k in ("last_over_first", "largest_over_smallest")})


if __name__ == "__main__":
    main()
