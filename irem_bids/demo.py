# SPDX-License-Identifier: Apache-2.0
"""``python -m irem_bids.demo OUT``: the app on a simulated subject whose truth is known.

Three stacks of 4 mm slices are simulated from the MNI152 template that nilearn carries,
with hidden motion between them, different gains and noise.  The app reconstructs them with
``irem``, ``srr`` and ``bspline``; all three are scored against the template.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import cli
from .exitcodes import ExitCode
from .reconstruction.evaluation import Scores, evaluate, pose_errors
from .reconstruction.geometry import Grid
from .reconstruction.metrics import head_mask
from .reconstruction.protocol import Protocol
from .reconstruction.simulate import simulate
from .reconstruction.simulated_dataset import Scan, read_truth, write_dataset
from .reconstruction.stack import read_image
from .tools import estimated_poses

if TYPE_CHECKING:
    from .reconstruction.stack import FloatImage

PROTOCOL = Protocol(
    thickness=4.0, motion_degrees=4.0, motion_mm=4.0, gain=0.08, snr=40.0, margin=2.0, seed=2021
)
METHODS = ("irem", "srr", "bspline")
OVER_BSPLINE, UNDER_SRR = 3.0, 0.1  # dB: irem is at least so far above, and no further below
UNIT = 1000.0  # the template is 0 to 1
AIR = 8  # voxels kept around the brain


def template(stride: int = 1) -> tuple[FloatImage, Grid]:
    """The T1 template, 1 mm, cut to the brain and some air; nothing is downloaded.

    ``stride`` averages that many voxels along each axis, for a quicker demo.
    """
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    volume = np.asarray(image.get_fdata(dtype=np.float32)) * np.float32(UNIT)
    found = np.argwhere(volume > 0)
    low = np.maximum(found.min(axis=0) - AIR, 0)
    shape = (np.minimum(found.max(axis=0) + 1 + AIR, volume.shape) - low) // stride
    high = low + shape * stride
    cut = volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    blocks = cut.reshape(shape[0], stride, shape[1], stride, shape[2], stride)
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ (low + (stride - 1) / 2)
    affine[:3, :3] *= stride
    return blocks.mean(axis=(1, 3, 5)), Grid(shape, affine)


def make_dataset(folder: Path, stride: int, threads: int) -> None:
    """Simulate the stacks into ``folder``, unless they are there."""
    if (folder / "dataset_description.json").exists():
        return
    truth, protocol = template(stride), replace(PROTOCOL, thickness=PROTOCOL.thickness * stride)
    write_dataset(folder, simulate(*truth, protocol, threads=threads), truth, protocol)


def score(dataset: Path, out: Path, threads: int) -> dict[str, tuple[Scores, float]]:
    """Scores and mean target registration error (mm) of each method."""
    known = read_truth(dataset)
    results = {}
    for method in METHODS:
        path = out / Scan().folder / f"sub-01_desc-{method}_T1w.nii.gz"
        mask = head_mask(known.volume)
        scores = evaluate(read_image(path), (known.volume, known.grid), mask, threads=threads)
        errors = pose_errors(estimated_poses(out, path, known), known.poses, mask, known.grid)
        results[method] = (scores, float(np.mean(list(errors.values()))))
    return results


def table(results: dict[str, tuple[Scores, float]]) -> str:
    """The scores as text."""
    lines = ["method    PSNR (dB)   SSIM     PSNR as it stands   poses (mm)"]
    for method, (scores, error) in results.items():
        lines.append(
            f"{method:<10}{scores.psnr:8.2f}   {scores.ssim:.4f}   {scores.psnr_raw:17.2f}"
            f"   {error:10.4f}"
        )
    lines.append(
        "PSNR and SSIM after the rigid motion, scale and offset that fit best, in the brain; "
        "poses: mean target registration error."
    )
    return "\n".join(lines)


def verdict(results: dict[str, tuple[Scores, float]]) -> list[str]:
    """What is not as good as it has to be; empty if all is well."""
    psnr = {method: scores.psnr for method, (scores, _) in results.items()}
    wrong = []
    if not psnr["irem"] >= psnr["bspline"] + OVER_BSPLINE:
        wrong.append(
            f"irem is {psnr['irem'] - psnr['bspline']:.2f} dB above bspline; "
            f"expected at least {OVER_BSPLINE:g}"
        )
    if not psnr["irem"] >= psnr["srr"] - UNDER_SRR:
        wrong.append(
            f"irem is {psnr['srr'] - psnr['irem']:.2f} dB below srr; "
            f"expected no more than {UNDER_SRR:g}"
        )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the app works and ``irem`` is as good as it has to be."""
    parser = argparse.ArgumentParser(
        prog="irem_bids.demo", description=(__doc__ or "").split("\n")[2]
    )
    parser.add_argument("out", type=Path, help="folder for the dataset and the results")
    parser.add_argument(
        "--stride", type=int, default=1, help="N: voxels of N mm and slices of 4 N mm"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    folder = arguments.out.resolve()
    dataset, out = folder / "dataset", folder / "derivatives"
    print(f"Simulating three stacks of 4 mm slices in {dataset}", flush=True)
    make_dataset(dataset, arguments.stride, arguments.threads)
    command = [str(dataset), str(out), "participant", "--method", *METHODS]
    command += ["--output-resolution", str(float(arguments.stride)), "--force"]
    command += ["--work-dir", str(folder / "work")]
    print("irem-bids", *command, flush=True)
    code = cli.main(command)
    if code != ExitCode.SUCCESS:
        print(f"irem-bids ended with {code}", file=sys.stderr)
        return code
    results = score(dataset, out, arguments.threads)
    print(f"\n{table(results)}\n")
    print(f"Report: {out / 'sub-01.html'}")
    print(f"{time.monotonic() - start:.0f} s in all")
    wrong = verdict(results)
    for text in wrong:
        print(f"NOT AS EXPECTED: {text}", file=sys.stderr)
    return int(ExitCode.FAILURE if wrong else ExitCode.SUCCESS)


if __name__ == "__main__":
    sys.exit(main())
