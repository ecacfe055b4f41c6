# SPDX-License-Identifier: Apache-2.0
"""The paper's simulation: a sharp head, three stacks that are k times thicker, and the scores.

No noise and no motion, as in the paper; the paper does not say whether slices were averages or
every k-th plane, so that both are made.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine
from simulated_head import coordinate_range, truth_volume

from irem_bids.reconstruction.evaluation import evaluate
from irem_bids.reconstruction.gauge import gauge
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import head_mask
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import simulate
from irem_bids.settings import Settings

DATA_SETS = {
    "A": "studyforrest_res-1mm_T1w.nii.gz",  # T1w; the paper's is 7 T, 0.8 mm
    "B": "flair_mni1mm.nii.gz",
}
#: How a slice is made, and the profile that says so.
DOWNSAMPLING = {"averaging": ("box", "box"), "decimation": ("decimate", "none")}
EPOCHS, DECAY = 1500, 3  # default epochs; the rate is halved after each third, as in 1,500


def epochs(count: int) -> dict[str, Any]:
    """Settings of irem2021 for so many epochs, with the paper's two halvings of the rate."""
    return {"irem2021": {"epochs_2021": count, "decay_every": max(1, -(-count // DECAY))}}


def record(paper: str, crop: float | None, count: int) -> dict[str, Any]:
    """The head of a result: where it was made, what the paper found, crop in mm, epochs."""
    return {**machine(), "paper": paper, "crop_mm": crop, "epochs_2021": count, "rows": []}


@dataclass(frozen=True)
class Made:
    """A truth and the stacks of it, ready for the methods."""

    volume: np.ndarray
    grid: Grid
    prepared: Prepared
    settings: Settings

    def score(
        self, method: str, options: dict[str, Any], device: str = "cpu"
    ) -> tuple[dict[str, Any], np.ndarray]:
        """PSNR (dB) and SSIM in the head after the gauge, and the volume on the truth's grid."""
        settings = self.settings.updated(options)
        target = output_grid(self.prepared, settings.output)
        started, begun = time.process_time(), time.monotonic()
        image = fit(method, self.prepared, target, settings, device=device).image()
        spent = {"cpu_s": round(time.process_time() - started, 1)}
        if device != "cpu":
            spent |= {"device": device, "seconds": round(time.monotonic() - begun, 1)}
        mask = head_mask(self.volume)
        scores = evaluate((image, target), (self.volume, self.grid), mask)
        moved = gauge(image, target, self.volume, self.grid, mask).volume
        return {"psnr": scores.psnr, "ssim": scores.ssim, **spent}, moved


def make(
    truth: Path, crop: float | None, k: int, downsampling: str, told: str | None = None
) -> Made:
    """Three orthogonal stacks of slices k voxels thick; poses are those of the headers.

    ``told``: the slice profile that the methods are told; the true one if not given.
    """
    volume, grid = truth_volume(truth, crop)
    profile, true = DOWNSAMPLING[downsampling]
    protocol = Protocol(thickness=k * float(grid.voxel_size.min()), profile=profile, margin=0.0)
    settings = Settings.from_dict(
        {
            "normalise": {"registration": False},
            "acquisition": {"profile": told or true},
            "irem2021": {"coordinate_range": coordinate_range(truth, crop)},
        }
    )
    stacks = [one.stack for one in simulate(volume, grid, protocol, threads=2)]
    return Made(volume, grid, prepare(stacks, settings, threads=2), settings)
