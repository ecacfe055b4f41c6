# SPDX-License-Identifier: Apache-2.0
"""The development cases D1 to D5: simulated stacks, each method scored against the truth.

SRR gets the weight of its penalty from the truth, irem does not.  One JSON for each case.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from lesions import choose, lesion_contrast, paint
from scipy.ndimage import map_coordinates
from simulated_head import machine, truth_volume

from irem_bids.reconstruction.acquisition import bias_positions
from irem_bids.reconstruction.evaluation import evaluate, pose_errors
from irem_bids.reconstruction.gauge import Gauge, common_motion, gauge
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.masks import output_mask
from irem_bids.reconstruction.metrics import head_mask, noise_sigma
from irem_bids.reconstruction.optimise import Fit, fit, quality
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare, prepared_slices
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import SimulatedStack, bias_field, simulate
from irem_bids.reconstruction.uncertainty import standard_deviation
from irem_bids.settings import WITH_DEVIATION, Settings

MOTION = {"motion_degrees": 4.0, "motion_mm": 4.0, "gain": 0.08}
HEAD = 100  # voxels of the head that a slice shows at least, to have a pose
STRENGTHS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)  # of SRR's penalty, over the automatic one
T1W, T1W_COARSE = "studyforrest_res-1mm_T1w.nii.gz", "studyforrest_res-1p5mm_T1w.nii.gz"
FLAIR = "flair_mni1mm.nii.gz"


@dataclass(frozen=True)
class Case:
    """A truth, what the scanner does to it, and the settings that belong to it."""

    truth: str
    protocol: Protocol
    settings: dict[str, Any] = field(default_factory=dict)
    lesions: bool = False


CASES = {
    "D1": Case(T1W, Protocol(thickness=4.0, bias=0.05, snr=40.0, **MOTION)),
    "D2": Case(T1W, Protocol(thickness=4.0, profile="box", snr=40.0), {"profile": "box"}),
    "D2-noise-free": Case(T1W, Protocol(thickness=4.0, profile="box"), {"profile": "box"}),
    "D3": Case(
        T1W,
        Protocol(
            thickness=4.0, bias=0.2, snr=30.0, slice_degrees=0.7, slice_mm=0.7, width_factor=1.25,
            damaged=0.03, **MOTION,
        ),
    ),
    "D3-nothing-wrong": Case(T1W, Protocol(thickness=4.0, snr=30.0, **MOTION)),
    "D4": Case(FLAIR, Protocol(thickness=5.0, snr=40.0, **MOTION), lesions=True),
    "D5": Case(T1W_COARSE, Protocol(thickness=6.0, snr=60.0, **MOTION)),
}  # fmt: skip


def settings_of(case: Case, extra: Sequence[str]) -> Settings:
    """No N4: the simulated bias is a quadratic, which the receivers know."""
    settings = Settings.from_dict({"acquisition": case.settings})
    for word in extra:
        name, value = word.split("=")
        section, key = name.split(".")
        settings = settings.updated({section: {key: json.loads(value)}})
    return settings


def plant(volume: np.ndarray, grid: Grid, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Spheres of 3, 4 and 6 mm, 30 % brighter or darker, where the head is even."""
    wanted = [(diameter, sign) for diameter in (3.0, 4.0, 6.0) for sign in (1, -1) * 8]
    lesions = choose(volume, grid, seed, wanted)
    return paint(volume, grid, lesions), lesions


def slice_errors(
    prepared: Prepared, found: Fit, simulated: list[SimulatedStack], head: tuple[np.ndarray, Grid]
) -> dict[str, Any]:
    """Distance (mm) of a slice's foreground from where it belongs, one common motion removed.

    Of the slices that show ``HEAD`` voxels or more of the ``head`` (mask, grid of the truth):
    one that lies in the air has no pose that an image could tell.  ``damaged``: of those whose
    image was dropped or torn, which are among the others, too; ``with_air``: of every slice.
    """
    moved, target, which = [], [], []
    shown, bad = [], []
    number = 0
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        first = prepared_slices(one.stack, stack)["first"]
        poses = found.slice_poses.get(stack.label)
        broken = {d.slice for d in one.draw.damage}
        voxels = np.argwhere(stack.mask)
        for k in np.unique(voxels[:, stack.slice_axis]):
            points = stack.grid.to_world(voxels[voxels[:, stack.slice_axis] == k][::7])
            pose = RigidTransform(poses[k]) if poses is not None else found.poses[stack.label]
            moved.append(pose.apply(points))
            target.append(one.draw.slice_pose(first + int(k)).apply(points))
            inside = map_coordinates(
                head[0].astype(np.uint8), head[1].to_index(target[-1]).T, order=0
            )
            shown.append(7 * int(inside.sum()))
            bad.append(first + int(k) in broken)
            which += [number] * len(points)
            number += 1
    a, b = np.concatenate(moved), np.concatenate(target)
    away = np.linalg.norm(common_motion(a, b).apply(a) - b, axis=1)
    every = np.bincount(which, away) / np.bincount(which)
    shows, torn = np.array(shown) >= HEAD, np.array(bad)
    each = every[shows]
    middle, high = np.quantile(each, [0.5, 0.95])
    return {
        "mean": float(each.mean()),
        "median": float(middle),
        "p95": float(high),
        "slices": len(each),
        "damaged": float(every[shows & torn].mean()) if (shows & torn).any() else None,
        "with_air": float(every.mean()),
    }


def damage_weights(prepared: Prepared, found: Fit, simulated: list[SimulatedStack]) -> dict:
    """Weights of damaged slices, and of the others."""
    bad, sound = [], []
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        first = prepared_slices(one.stack, stack)["first"]
        broken = {d.slice for d in one.draw.damage}
        for k, weight in enumerate(found.slice_weights.get(stack.label, [])):
            (bad if first + k in broken else sound).append(float(weight))
    return {
        "damaged": sorted(round(w, 4) for w in bad),
        "largest_damaged": max(bad, default=None),
        "smallest_sound": min(sound, default=None),
        "sound_below_0.8": sum(w < 0.8 for w in sound),
        "sound": len(sound),
    }


def gain_errors(
    prepared: Prepared,
    found: Fit,
    simulated: list[SimulatedStack],
    bias: float,
    points: np.ndarray,
) -> dict[str, list[float]]:
    """Relative error of each stack's receiver against the reference's, at the same tissue.

    ``points`` (N, 3) of the truth's space, mm.  ``mean`` is the error of the gain, ``rms`` what
    the bias adds about it.
    """
    ratios = []
    for stack, one in zip(prepared.stacks, simulated, strict=True):
        scanned = one.pose.inverse().apply(points)
        whole = one.draw.gain * bias_field(one.draw, bias)
        true = map_coordinates(whole, one.stack.grid.to_index(scanned).T, order=1, mode="nearest")
        at = np.rint(one.stack.grid.to_index(stack.grid.to_world(np.argwhere(stack.mask))))
        raw = one.stack.data[tuple(at.astype(int).T)]
        divided = np.median(raw / np.maximum(stack.data[stack.mask], 1e-6))
        moved = bias_positions(found.poses[stack.label].apply(scanned), found.grid.centre)
        ratios.append(found.receivers[stack.label].factors(moved).numpy() * divided / true)
    errors = [ratio / ratios[prepared.reference] - 1 for ratio in ratios]
    return {
        "mean": [float(e.mean()) for e in errors],
        "rms": [float(e.std()) for e in errors],
    }


def calibration(
    deviation: np.ndarray,
    grid: Grid,
    fitted: Gauge,
    truth: np.ndarray,
    where: Grid,
    mask: np.ndarray,
) -> dict[str, Any]:
    """The error against the standard deviation: 20 bins of equal size, intervals of 95 %.

    The truth is an image with noise of its own, which no deviation holds: ``truth_noise`` is its
    standard deviation, ``within_95_of_both`` counts with it.  ``unmapped``: share of the truth's
    head that lies outside the result's mask (deviation 0).
    """
    points = grid.to_index(fitted.transform.apply(where.to_world(np.argwhere(mask))))
    expected = fitted.scale * map_coordinates(deviation, points.T, order=1, mode="constant")
    error = (fitted.volume - truth)[mask].astype(np.float64)
    inside = expected > 0
    error, expected = error[inside], expected[inside].astype(np.float64)
    edges = np.quantile(expected, np.linspace(0, 1, 21))
    bins = np.clip(np.searchsorted(edges, expected) - 1, 0, 19)
    predicted, seen = (
        np.array([np.sqrt(np.mean(v[bins == i] ** 2)) for i in range(20)])
        for v in (expected, error)
    )
    noise = float(noise_sigma(truth, mask))
    both = np.sqrt(expected**2 + noise**2)
    return {
        "within_95": float(np.mean(np.abs(error) < 1.96 * expected)),
        "within_95_of_both": float(np.mean(np.abs(error) < 1.96 * both)),
        "truth_noise": noise,
        "correlation_of_bins": float(np.corrcoef(predicted, seen)[0, 1]),
        "rms_expected": float(np.sqrt(np.mean(expected**2))),
        "rms_error": float(np.sqrt(np.mean(error**2))),
        "bins_expected": [float(f"{v:.4g}") for v in predicted],
        "bins_error": [float(f"{v:.4g}") for v in seen],
        "unmapped": float(1 - inside.mean()),
    }


class Bench:
    """One case and seed: simulated, prepared, and ready for methods."""

    def __init__(self, name: str, seed: int, data: Path, options: argparse.Namespace) -> None:
        case = CASES[name]
        self.clean, self.grid = truth_volume(data / (options.truth or case.truth), options.crop)
        self.volume, self.lesions = self.clean, []
        if case.lesions:
            self.volume, self.lesions = plant(self.clean, self.grid, seed)
        changes = json.loads(options.protocol)
        self.protocol = replace(case.protocol, seed=seed, **changes)
        self.simulated = simulate(self.volume, self.grid, self.protocol, threads=2)
        self.settings = settings_of(case, options.set)
        started, cpu = time.monotonic(), time.process_time()
        self.prepared = prepare([s.stack for s in self.simulated], self.settings, threads=2)
        self.seconds = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}
        self.target = output_grid(self.prepared, self.settings.output)
        self.mask = head_mask(self.volume)
        self.calibrated = options.calibration

    def run(self, method: str, settings: Settings) -> dict[str, Any]:
        """Fit and score a method."""
        started, cpu = time.monotonic(), time.process_time()
        found = fit(method, self.prepared, self.target, settings)
        seconds = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}
        image = found.image()
        scores = evaluate((image, found.grid), (self.volume, self.grid), self.mask, threads=2)
        true = {s.draw.label: s.pose for s in self.simulated}
        measured = quality(self.prepared, found, settings)
        out: dict[str, Any] = {
            "psnr": scores.psnr,
            "ssim": scores.ssim,
            "held_out_psnr": measured["held_out_psnr"],
            "penalty": found.info.get("penalty"),
            "motion": found.info.get("motion"),
            "held_out_by_motion": found.info.get("held_out_by_motion"),
            "held_out_by_width": found.info.get("held_out_by_width"),
            "seconds": seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if not found.slice_poses:
            errors = pose_errors(found.poses, true, self.mask, self.grid)
            out["target_registration_error_mm"] = errors
        if self.protocol.slice_mm or found.slice_poses:
            truth = (self.mask, self.grid)
            out["slice_error_mm"] = slice_errors(self.prepared, found, self.simulated, truth)
        if found.slice_weights:
            out["weights"] = damage_weights(self.prepared, found, self.simulated)
            out["widths"] = found.widths
            points = self.grid.to_world(np.argwhere(self.mask)[::97])
            out["gain_errors"] = gain_errors(
                self.prepared, found, self.simulated, self.protocol.bias, points
            )
        fitted = None
        if self.calibrated and method in WITH_DEVIATION:
            fitted = gauge(image, found.grid, self.volume, self.grid, self.mask, threads=2)
            started, cpu = time.monotonic(), time.process_time()
            head = output_mask(self.prepared, found.grid)
            deviation = standard_deviation(self.prepared, found, image, found.grid, head, settings)
            seconds["uncertainty_wall"] = time.monotonic() - started
            seconds["uncertainty_cpu"] = time.process_time() - cpu
            out["calibration"] = calibration(
                deviation, found.grid, fitted, self.volume, self.grid, self.mask
            )
        if self.lesions:
            fitted = fitted or gauge(
                image, found.grid, self.volume, self.grid, self.mask, threads=2
            )
            changes = (fitted.volume - self.clean, self.volume - self.clean)
            out["contrast"] = lesion_contrast(*changes, self.lesions, self.grid)
        return out


def best_srr(bench: Bench, strengths: Sequence[float]) -> dict[str, Any]:
    """SRR at the strength that the truth likes best; every strength's PSNR beside it."""
    automatic = bench.run("srr", bench.settings)
    weight = automatic["penalty"]["weight"]
    table = {1.0: automatic}
    for strength in strengths:
        if strength != 1.0:
            settings = bench.settings.updated({"srr": {"srr_lambda": weight * strength}})
            table[strength] = bench.run("srr", settings)
    best = max(table, key=lambda s: table[s]["psnr"])
    return {
        **table[best],
        "strength": best,
        "psnr_by_strength": {f"{s:g}": table[s]["psnr"] for s in sorted(table)},
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of a case, its truth and its seeds."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("data", type=Path, help="folder with the truths")
    out.add_argument("result", type=Path, help="JSON to write")
    out.add_argument("--case", choices=CASES, required=True)
    out.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    out.add_argument("--strengths", type=float, nargs="*", default=list(STRENGTHS))
    out.add_argument("--truth", help="another truth of the folder")
    out.add_argument("--crop", type=float, help="middle of the truth, mm")
    out.add_argument("--protocol", default="{}", help="changes of the protocol, JSON")
    out.add_argument("--set", nargs="*", default=[], help="section.option=JSON")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument(
        "--calibration", action="store_true", help="standard deviations against the errors"
    )
    return out


def header(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the record of a case says before its seeds."""
    return {
        "command": ["python", f"benchmarks/{script}", "DATA", "RESULT", *sys.argv[3:]],
        "machine": machine(),
        "case": options.case,
        "seeds": {},
    }


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--methods", nargs="+", default=["bspline", "srr", "irem"])
    options = given.parse_args()
    import torch  # after irem_bids, which says how idle threads wait

    torch.set_num_threads(options.threads)
    record = header("development_cases.py", options)
    for seed in options.seeds:
        bench = Bench(options.case, seed, options.data, options)
        row: dict[str, Any] = {"protocol": vars(bench.protocol), "prepare_seconds": bench.seconds}
        for method in options.methods:
            if method == "srr" and options.strengths:
                row[method] = best_srr(bench, options.strengths)
            else:
                row[method] = bench.run(method, bench.settings)
            brief = {k: v for k, v in row[method].items() if k not in ("penalty",)}
            print(options.case, seed, method, json.dumps(brief), flush=True)
        record["seeds"][str(seed)] = row
        options.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
