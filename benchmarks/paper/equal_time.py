# SPDX-License-Identifier: Apache-2.0
"""Three thick stacks against one isotropic scan of the same total time: which is nearer the truth?

The protocol of the paper's data set C (slices of 2.8 mm against voxels of 0.7 mm, k = 4), in
simulation, where the truth is known.  By Scherrer et al. 2012 the signal-to-noise ratio grows with
the voxel's volume and the square root of the scan time: each stack, with k times the volume and a
third of the time, has k / sqrt(3) times that of the direct scan.  The direct scan is scored as it
is, and denoised by total variation with the weight that the truth likes best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from skimage.restoration import denoise_tv_chambolle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine
from simulated_head import truth_volume

from irem_bids.reconstruction.draws import draw
from irem_bids.reconstruction.evaluation import evaluate
from irem_bids.reconstruction.gauge import gauge
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import (
    expected_snr_ratio,
    head_mask,
    peak_value,
    psnr,
    snr_of_repeats,
    ssim,
)
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import acquire
from irem_bids.settings import Settings

K = 4  # thickness over in-plane voxel, as in the paper's data set C
SETTINGS = Settings.from_dict({"acquisition": {"profile": "box"}})
WEIGHTS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)  # of the direct scan's total variation, over its noise


class Bench:
    """A truth and what is measured on it at one level of noise."""

    def __init__(self, volume: np.ndarray, grid: Grid, seed: int) -> None:
        self.volume, self.grid, self.seed = volume, grid, seed
        # a slice that reaches over the truth's end mixes in nothing; two slices from it none does
        inside = (slice(2 * K, -2 * K),) * 3
        self.mask = np.zeros(volume.shape, bool)
        self.mask[inside] = head_mask(volume)[inside]
        self.mean = float(volume[self.mask].mean())

    def direct(self, snr: float) -> dict[str, Any]:
        """The isotropic scan, twice with Rician noise: as it is, and denoised."""
        random, sigma = np.random.default_rng(self.seed), self.mean / snr
        scans = [
            np.hypot(*(part + sigma * random.standard_normal(self.volume.shape)
                       for part in (self.volume, 0.0)))
            for _ in range(2)
        ]  # fmt: skip
        found = {"direct": self._score(scans)}
        denoised = [
            self._score([denoise_tv_chambolle(scan, weight * sigma) for scan in scans])
            | {"weight_over_noise": weight}
            for weight in WEIGHTS
        ]
        found["direct, denoised"] = max(denoised, key=lambda row: row["psnr"])
        return found

    def _score(self, images: list[np.ndarray]) -> dict[str, Any]:
        """PSNR and SSIM of the first after the scale and offset that fit best, SNR of both."""
        inside, peak = self.mask, peak_value(self.volume, self.mask)
        slope, offset = np.polyfit(images[0][inside], self.volume[inside], 1)
        image = slope * images[0] + offset
        return {
            "psnr": psnr(image, self.volume, inside, peak=peak),
            "ssim": ssim(image, self.volume, inside, peak=peak),
            "snr": snr_of_repeats(images[0], images[1], inside),
        }

    def stacks(self, snr: float, methods: list[str], settings: Settings) -> dict[str, Any]:
        """Each method on three stacks of the same total time, twice, in the truth's space."""
        voxel = float(self.grid.voxel_size.min())
        thick = (voxel, voxel, K * voxel)
        times = expected_snr_ratio(thick, (voxel,) * 3, 1 / 3, 1)
        protocol = Protocol(
            thickness=K * voxel, profile="box", snr=snr * times, margin=0.0, seed=self.seed
        )
        draws = draw(protocol, self.volume, self.grid)
        images: dict[str, list[np.ndarray]] = {method: [] for method in methods}
        found: dict[str, Any] = {}
        for repeat in range(2):
            again = [replace(one, noise_seed=one.noise_seed + repeat) for one in draws]
            made = acquire(self.volume, self.grid, protocol, again, threads=2)
            prepared = prepare([one.stack for one in made], settings, threads=2)
            target = output_grid(prepared, settings.output)
            for method in methods:
                started = time.process_time()
                image = fit(method, prepared, target, settings).image()
                if repeat == 0:
                    scores = evaluate((image, target), (self.volume, self.grid), self.mask)
                    seconds = round(time.process_time() - started, 1)
                    found[method] = {"psnr": scores.psnr, "ssim": scores.ssim, "cpu_s": seconds}
                truth = (self.volume, self.grid, self.mask)
                images[method].append(gauge(image, target, *truth, threads=2).volume)
        for method, pair in images.items():
            found[method]["snr"] = snr_of_repeats(*pair, self.mask)
            found[method]["stack_snr"] = protocol.snr
        return found


def main() -> None:
    """One row for each level of noise of the direct scan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--snr", type=float, nargs="+", default=[5.0, 10.0, 20.0, 40.0])
    parser.add_argument("--methods", nargs="+", default=["bspline", "srr", "irem"])
    parser.add_argument("--epochs", type=int, help="of irem2021")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings = SETTINGS
    if options.epochs is not None:
        settings = settings.updated({"irem2021": {"epochs_2021": options.epochs}})
    bench = Bench(*truth_volume(options.truth, options.crop), options.seed)
    record = {
        **machine(),
        "crop_mm": options.crop,
        "voxel_mm": bench.grid.voxel_size.tolist(),
        "k": K,
        "rows": {},
    }
    for snr in options.snr:
        row = bench.direct(snr) | bench.stacks(snr, options.methods, settings)
        record["rows"][f"{snr:g}"] = row
        for name, scores in row.items():
            print(f"SNR {snr:g} {name}: {scores}", flush=True)
        options.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
