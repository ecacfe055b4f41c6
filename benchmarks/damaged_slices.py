# SPDX-License-Identifier: Apache-2.0
"""Phantoms whose slices move and of which some were dropped or torn: what is noticed, what is lost.

Every phantom has two damaged slices a stack.  Written for each: the mean distance of the slices'
voxels from where they belong, one common motion removed, and the slices that count otherwise than
they should: damaged ones with a weight of 0.3 or more, sound ones of 0.8 or less.  Needs no data.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from irem_bids.reconstruction.optimise import fit, quality
from irem_bids.reconstruction.prepare import output_grid, prepare, prepared_slices
from irem_bids.reconstruction.simulate import simulate
from tests.phantom import head
from tests.reconstruction.test_motion import PROTOCOL, SETTINGS, mean_error

SHOWN = 20  # voxels of the foreground from which a slice shows anything


def phantom(seed: int) -> dict[str, Any]:
    """One phantom, reconstructed and compared with what was simulated."""
    simulated = simulate(*head((64, 70, 60), 1.5), replace(PROTOCOL, seed=seed, damaged=0.08))
    prepared = prepare([one.stack for one in simulated], SETTINGS)
    found = fit("irem", prepared, output_grid(prepared, SETTINGS.output), SETTINGS)
    damaged, missed, lost = 0, [], []
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        first = prepared_slices(one.stack, stack)["first"]
        broken = {d.slice - first for d in one.draw.damage}
        voxels = np.moveaxis(stack.mask, stack.slice_axis, 0).sum(axis=(1, 2))
        damaged += sum(voxels[k] >= SHOWN for k in broken if 0 <= k < len(voxels))
        for k, weight in enumerate(found.slice_weights[stack.label]):
            row = {"stack": stack.label, "slice": k, "weight": round(float(weight), 4),
                   "voxels": int(voxels[k])}  # fmt: skip
            if k in broken and weight >= 0.3 and voxels[k] >= SHOWN:
                missed.append(row)
            if k not in broken and weight <= 0.8:
                lost.append(row)
    return {
        "motion": found.info["motion"],
        "error_mm": mean_error(prepared, simulated, found),
        "held_out_psnr": quality(prepared, found, SETTINGS)["held_out_psnr"],
        "damaged": int(damaged),
        "missed": missed,
        "lost": lost,
    }


def main() -> None:
    """All phantoms, and their sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, default=[10, 28], help="first, and beyond")
    arguments = parser.parse_args()
    where, seeds = machine(), {}
    for seed in range(*arguments.seeds):
        seeds[seed] = phantom(seed)
        print(seed, seeds[seed], flush=True)
    every = list(seeds.values())
    total = {
        "error_mm": float(np.mean([one["error_mm"] for one in every])),
        "damaged": sum(one["damaged"] for one in every),
        "missed": sum(len(one["missed"]) for one in every),
        "lost": sum(len(one["lost"]) for one in every),
    }
    record = {"machine": where, "total": total, "seeds": seeds}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(total)


if __name__ == "__main__":
    main()
