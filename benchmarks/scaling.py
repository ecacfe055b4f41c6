# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of the solution over the foreground's voxels, from 64^3 to 240^3.

A head is resampled to so many voxels of 1 mm along its longest side, three stacks of 4 mm, turned
by some degrees as real ones are, are simulated from it, and the image is solved for (registration
off: the poses are true).  The loops are compiled before the first measurement.  One thread by
default: work is what is counted, and a second thread adds the time that threads take to wake each
other, some 0.2 ms a loop.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
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
#: Turned: stacks whose voxels fall on the result's take another, shorter way at some sizes.
PROTOCOL = Protocol(thickness=4.0, snr=40.0, obliqueness=5.0, seed=11)
SETTINGS = Settings.from_dict({"normalise": {"registration": False}})


def resized(truth: Path, size: int) -> tuple[np.ndarray, Grid]:
    """The head with ``size`` voxels along its longest side, each called 1 mm."""
    volume, _ = truth_volume(truth, None)
    small = np.clip(zoom(volume, size / max(volume.shape), order=1), 0, None)
    affine = np.eye(4)
    affine[:3, 3] = -(np.array(small.shape) - 1) / 2
    return small.astype(np.float32), Grid(small.shape, affine)


class Case:
    """The head at one size, ready to be solved for; keeps the least seconds."""

    def __init__(self, truth: Path, size: int, method: str) -> None:
        self.size, self.method = size, method
        volume, grid = resized(truth, size)
        stacks = [s.stack for s in simulate(volume, grid, PROTOCOL, threads=2)]
        self.prepared = prepare(stacks, SETTINGS, threads=2)
        self.target = output_grid(self.prepared, SETTINGS.output)
        masks = [s.mask.sum() * np.prod(s.grid.voxel_size) for s in self.prepared.stacks]
        self.foreground = int(np.mean(masks))
        self.times: list[tuple[float, float]] = []
        self.memory = 0

    def run(self) -> None:
        """Once more."""
        wall, cpu = time.monotonic(), time.process_time()
        fit(self.method, self.prepared, self.target, SETTINGS)
        self.times.append((time.process_time() - cpu, time.monotonic() - wall))
        self.memory = self.memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def row(self) -> dict[str, Any]:
        """Voxels, the least seconds, and seconds per million voxels, least and of each run."""
        cpu, wall = min(self.times)
        each = [round(cpu / self.foreground * 1e6, 3) for cpu, _ in self.times]
        return {
            "size": self.size,
            "result_voxels": int(np.prod(self.target.shape)),
            "foreground_voxels": self.foreground,
            "cpu_s": round(cpu, 3),
            "wall_s": round(wall, 3),
            "cpu_s_per_million_foreground": min(each),
            "of_each_round": each,
            "peak_memory_mb": self.memory,
        }


def main() -> None:
    """Measure every size; the spread is that of the seconds per voxel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--method", default="srr")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch  # after irem_bids, which says how idle threads wait

    torch.set_num_threads(options.threads)
    Case(options.truth, min(options.sizes), options.method).run()  # compiles
    cases = []
    for size in options.sizes:
        cases.append(Case(options.truth, size, options.method))
        cases[-1].run()
    for _ in range(1, options.repeats):  # in turn: what else the machine does is shared
        for case in cases:
            case.run()
    rows = [case.row() for case in cases]
    for row in rows:
        print(row)
    each = np.array([row["cpu_s_per_million_foreground"] for row in rows])
    where = machine()
    where["command"] = " ".join(
        ["python benchmarks/scaling.py TRUTH RESULT --method", options.method]
        + ["--threads", str(options.threads), "--sizes"]
        + [str(size) for size in options.sizes]
    )
    record = {
        **where,
        "truth": options.truth.name,
        "threads": options.threads,
        "rows": rows,
        "last_over_first": round(float(each[-1] / each[0]), 3),
        "largest_over_smallest": round(float(each.max() / each.min()), 3),
        "farthest_from_mean": round(float(np.abs(each / each.mean() - 1).max()), 3),
    }
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    spread = ("last_over_first", "largest_over_smallest", "farthest_from_mean")
    print({name: record[name] for name in spread})


if __name__ == "__main__":
    main()
