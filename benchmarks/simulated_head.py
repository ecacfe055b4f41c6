# SPDX-License-Identifier: Apache-2.0
"""The whole app on stacks simulated from a sharp head, each method scored against the truth."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from irem_bids import __version__, cli
from irem_bids.reconstruction.evaluation import evaluate, pose_errors
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import head_mask
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import simulate
from irem_bids.reconstruction.simulated_dataset import Scan, read_truth, write_dataset
from irem_bids.reconstruction.stack import read_image
from irem_bids.tools import estimated_poses

PROTOCOL = Protocol(thickness=4.0, motion_degrees=4.0, motion_mm=4.0, gain=0.08, snr=40.0)


def truth_volume(path: Path, crop: float | None) -> tuple[np.ndarray, Grid]:
    """The truth without negative overshoots, or its middle ``crop`` mm in each direction."""
    volume, grid = read_image(path)
    volume = np.clip(volume, 0, None)
    if crop is None:
        return volume, grid
    shape = np.array(volume.shape)
    size = np.minimum(np.rint(crop / grid.voxel_size).astype(int), shape)
    low = (shape - size) // 2
    box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
    affine = np.array(grid.affine)
    affine[:3, 3] = grid.to_world(low)
    return volume[box], Grid(size, affine)


def coordinate_range(path: Path, crop: float | None) -> float:
    """Of irem2021 on a crop of the truth: its share of the whole head.

    Over [-1, 1] the Fourier features would be finer, in mm, than they are on a head.
    """
    if crop is None:
        return 1.0
    volume, grid = truth_volume(path, None)
    head = np.argwhere(head_mask(volume))
    return min(1.0, crop / float((np.ptp(head, axis=0) * grid.voxel_size).max()))


def machine() -> dict[str, object]:
    """Where and at which commit this runs."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "version": __version__,
        "processor": platform.processor() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def main() -> None:
    """Simulate, reconstruct, score, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--methods", nargs="+", default=["irem", "srr", "bspline"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep dataset and output here")
    parser.add_argument("--app", default="", help="further options of irem-bids, one string")
    arguments = parser.parse_args()
    where = machine()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    truth = truth_volume(arguments.truth, arguments.crop)
    protocol = Protocol(**{**vars(PROTOCOL), "seed": arguments.seed})
    dataset, out = folder / "dataset", folder / "derivatives"
    if not dataset.exists():
        write_dataset(dataset, simulate(*truth, protocol, threads=2), truth, protocol)
    started, cpu = time.monotonic(), time.process_time()
    command = [str(dataset), str(out), "participant", "-w", str(folder / "work"), "--force"]
    command += ["--method", *arguments.methods, *arguments.app.split()]
    code = cli.main(command)
    if code:
        sys.exit(f"irem-bids ended with {code}")
    seconds = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}
    known = read_truth(dataset)
    mask = head_mask(known.volume)
    scores = {}
    for method in arguments.methods:
        path = out / Scan().folder / f"sub-01_desc-{method}_T1w.nii.gz"
        errors = pose_errors(estimated_poses(out, path, known), known.poses, mask, known.grid)
        found = evaluate(read_image(path), (known.volume, known.grid), mask, threads=2)
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        scores[method] = {
            **found.to_dict(),
            "target_registration_error_mm": errors,
            "seconds": sidecar.get("Seconds"),
        }
        print(f"{method:9s} PSNR {found.psnr:.2f} dB  SSIM {found.ssim:.4f}  poses {errors} mm")
    record = {
        "command": ["python", "benchmarks/simulated_head.py", arguments.truth.name]
        + [a for a in sys.argv[3:] if "/" not in a and a != "--folder"],
        "protocol": vars(protocol),
        "machine": where,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "scores": scores,
    }
    arguments.result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
