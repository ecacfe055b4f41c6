# SPDX-License-Identifier: Apache-2.0
"""Planted lesions and a planted asymmetry: what is recovered, and does anything else appear?

    python benchmarks/lesions.py RESULT.json --truth flair_mni1mm.nii.gz --crop 90

Every lesion is in the truth of one, two or all three of the stacks.  Each stack is simulated
without and with them, with the same motion and the same noise, and once more without them with
other noise.  The change of the reconstruction is compared with the change of the truth; where no
lesion is near, it is compared with the noise of the reconstruction.  ``--retrain``: and with what
another random start alone changes, for a method whose training ends elsewhere each time.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine
from simulated_head import coordinate_range, truth_volume

from irem_bids.reconstruction.draws import draw
from irem_bids.reconstruction.gauge import gauge, resample_near
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import head_mask
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import acquire
from irem_bids.settings import Settings

#: The motion, gain and bias of the development case D1, with slices of 5 mm.
PROTOCOL = Protocol(
    thickness=5.0, motion_degrees=4.0, motion_mm=4.0, gain=0.08, bias=0.05, snr=40.0
)
DIAMETERS = (2.0, 3.0, 4.0, 6.0, 8.0)  # mm
CHANGE = 0.3  # of the intensity, brighter or darker
SUPPORTS = (3, 2, 1)  # numbers of stacks that see a lesion
ASYMMETRY = {"diameter": 14.0, "change": 0.15, "side": 24.0}  # mm, share, mm from the middle
FAR = 7.0  # mm from a lesion's edge: beyond the slice profile that saw it
RIM = 8  # voxels of the head's edge that are left out: fields of view end there
BLOB = 3.0  # mm, full width at half maximum of what is looked for


# ------------------------------------------------------------------ shared with other campaigns
def choose(
    volume: np.ndarray, grid: Grid, seed: int, wanted: Sequence[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Places for lesions of ``wanted`` (diameter, sign), where the head is even, 14 mm apart."""
    random = np.random.default_rng(seed + 100)
    smooth = ndimage.gaussian_filter(volume, 2.0)
    square = ndimage.gaussian_filter(volume**2, 2.0)
    uneven = np.sqrt(np.maximum(square - smooth**2, 0)) / (smooth + 1)
    inner = ndimage.binary_erosion(head_mask(volume), iterations=12)
    inner &= uneven < np.quantile(uneven[inner], 0.35)
    where, chosen = np.argwhere(inner), []  # type: ignore[var-annotated]
    for diameter, sign in wanted:
        for _ in range(100_000):
            centre = grid.to_world(where[random.integers(len(where))])
            if all(np.linalg.norm(centre - p["centre"]) > 14 for p in chosen):
                break
        else:
            raise RuntimeError(f"no room for {len(wanted)} lesions; give a larger crop")
        chosen.append({"centre": centre.tolist(), "diameter": diameter, "sign": sign})
    return chosen


def paint(volume: np.ndarray, grid: Grid, lesions: Sequence[dict[str, Any]]) -> np.ndarray:
    """The volume with spheres that are brighter or darker, with an edge of a voxel."""
    out = volume.copy()
    for one in lesions:
        box, away = around(grid, one["centre"], one["diameter"] / 2 + 1)
        inside = np.clip(one["diameter"] / 2 - away + 0.5, 0, 1)
        out[box] *= (1 + one.get("change", CHANGE) * one["sign"] * inside).astype(np.float32)
    return out


def around(
    grid: Grid, centre: Sequence[float], reach: float
) -> tuple[tuple[slice, ...], np.ndarray]:
    """The box of voxels within ``reach`` mm of a point, and their distance from it, mm."""
    place, steps = grid.to_index(np.array(centre)), reach / grid.voxel_size
    low = np.maximum(np.floor(place - steps), 0).astype(int)
    high = np.minimum(np.ceil(place + steps) + 1, grid.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    index = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)),
                                 indexing="ij"), axis=-1)  # fmt: skip
    return box, np.asarray(np.linalg.norm(grid.to_world(index) - np.array(centre), axis=-1))


def lesion_contrast(
    change: np.ndarray,
    true: np.ndarray,
    lesions: Sequence[dict[str, Any]],
    grid: Grid,
    key: Callable[[dict[str, Any]], str] = lambda one: f"{one['diameter']:g} mm",
) -> dict[str, float]:
    """By ``key``, the slope of recovered against true change in the spots (through 0).

    The change is taken against the surroundings, a shell of 2 to 4 mm about each.
    """
    rows: dict[str, list[tuple[float, float]]] = {}
    for one in lesions:
        radius = one["diameter"] / 2
        box, away = around(grid, one["centre"], radius + 4)
        core, shell = away <= radius, (away > radius + 2) & (away <= radius + 4)
        seen = change[box][core].mean() - change[box][shell].mean()
        rows.setdefault(key(one), []).append((float(true[box][core].mean()), float(seen)))
    return {
        name: float(np.dot(*np.array(row).T) / np.dot(np.array(row)[:, 0], np.array(row)[:, 0]))
        for name, row in rows.items()
    }


# ---------------------------------------------------------------------------- the battery
@dataclass(frozen=True)
class Planted:
    """What is in the truth: ``stacks`` of a lesion are those that see it."""

    lesions: list[dict[str, Any]]
    clean: np.ndarray
    grid: Grid

    def truth(self, stack: int | None = None) -> np.ndarray:
        """The truth as one stack sees it, or with everything."""
        seen = [one for one in self.lesions if stack is None or stack in one["stacks"]]
        return paint(self.clean, self.grid, seen)


@dataclass(frozen=True)
class Seen:
    """Reconstructions on the truth's grid, in its space and unit: (X, Y, Z) each."""

    planted: Planted
    without: np.ndarray
    within: np.ndarray
    other_noise: np.ndarray
    head: np.ndarray
    retrained: np.ndarray | None = None

    @property
    def change(self) -> np.ndarray:
        """What the lesions did to the reconstruction."""
        return self.within - self.without

    @property
    def noise(self) -> np.ndarray:
        """An image of the reconstruction's noise."""
        return np.asarray((self.other_noise - self.without) / np.sqrt(2))


class Bench:
    """One place of the lesions and one motion: stacks to reconstructions, method by method."""

    def __init__(self, planted: Planted, seed: int, settings: Settings) -> None:
        self.planted, self.settings = planted, settings
        self.draws = draw(replace(PROTOCOL, seed=seed), planted.clean, planted.grid)
        self.mask = head_mask(planted.clean)
        self.kept: dict[tuple[str, str], tuple[np.ndarray, Grid]] = {}
        self.seconds: dict[str, float] = {}

    def stacks(self, what: str) -> list[Any]:
        """Simulated ``without`` lesions, ``within``, or without and with ``other_noise``."""
        found = []
        for number, one in enumerate(self.draws):
            planted = self.planted
            truth = planted.truth(number) if what.startswith("within") else planted.clean
            if what == "other_noise":
                one = replace(one, noise_seed=one.noise_seed + 1)
            found += acquire(truth, planted.grid, PROTOCOL, [one])
        return [each.stack for each in found]

    def reconstruct(self, what: str, methods: Sequence[str]) -> None:
        """Prepare once, and fit every method; what is kept is in the reference stack's unit.

        ``retrained``: the stacks without lesions, fitted from another random start.
        """
        prepared = prepare(self.stacks(what), self.settings)
        grid = output_grid(prepared, self.settings.output)
        seed = self.settings.run.random_seed + (what == "retrained")
        settings = self.settings.updated({"run": {"random_seed": seed}})
        for method in methods:
            began = time.process_time()
            image = fit(method, prepared, grid, settings).image() * np.float32(prepared.scale)
            self.kept[method, what] = (image, grid)
            self.seconds[f"{method} {what}"] = round(time.process_time() - began, 1)
            print(f"{what} {method}: {self.seconds[f'{method} {what}']} s", file=sys.stderr)

    def seen(self, method: str, within: str = "within") -> Seen:
        """All in the truth's space and unit, by the gauge of the reconstruction without lesions."""
        clean, grid = self.planted.clean, self.planted.grid
        found = gauge(*self.kept[method, "without"], clean, grid, self.mask)
        images = {}
        for what in ("without", within, "other_noise", "retrained"):
            if (method, what) in self.kept:
                image, own = self.kept[method, what]
                moved, _ = resample_near(image, own, grid, self.mask, found.transform, 1)
                images[what] = moved * np.float32(found.scale) + np.float32(found.offset)
        return Seen(
            self.planted,
            images["without"],
            images[within],
            images["other_noise"],
            self.mask,
            images.get("retrained"),
        )


# ------------------------------------------------------------------------------- the scores
def contrast(seen: Seen) -> dict[str, Any]:
    """Recovered contrast by the number of stacks and diameter: all, bright ones, dark ones."""
    planted = seen.planted
    true = planted.truth() - planted.clean
    table: dict[str, Any] = {}
    for name, signs in (("all", (1, -1)), ("bright", (1,)), ("dark", (-1,))):
        for count in sorted({len(one["stacks"]) for one in planted.lesions}, reverse=True):
            chosen = [
                one
                for one in planted.lesions
                if one["sign"] in signs and len(one["stacks"]) == count
            ]
            found = lesion_contrast(seen.change, true, chosen, planted.grid)
            table.setdefault(f"{count} of 3 stacks", {})[name] = found
    return table


def false_structures(seen: Seen) -> dict[str, Any]:
    """The change where no lesion is near, against the noise there.

    A structure is a blob of the change, smoothed by 3 mm, beyond everything that smoothed noise
    does in the same place; beyond retraining, if another random start does not make it either.
    """
    painted = np.zeros(seen.head.shape, dtype=bool)
    for one in seen.planted.lesions:
        box, away = around(seen.planted.grid, one["centre"], one["diameter"] / 2 + 0.5)
        painted[box] |= away <= one["diameter"] / 2 + 0.5
    far = ndimage.distance_transform_edt(~painted, sampling=seen.planted.grid.voxel_size) > FAR
    far &= ndimage.binary_erosion(seen.head, iterations=RIM)
    sigma = BLOB / 2.355 / seen.planted.grid.voxel_size
    change, noise = (ndimage.gaussian_filter(v, sigma) for v in (seen.change, seen.noise))
    limit = float(np.abs(noise[far]).max())
    _, count = ndimage.label((np.abs(change) > limit) & far)
    brightness = float(seen.planted.clean[seen.head].mean())
    found = {
        "voxels": int(far.sum()),
        "rms_change_over_noise": float(np.std(seen.change[far]) / np.std(seen.noise[far])),
        "largest_change_over_largest_noise": float(np.abs(change[far]).max() / limit),
        "largest_change_over_mean_intensity": float(np.abs(change[far]).max() / brightness),
        "noise_over_mean_intensity": float(np.std(seen.noise[far]) / brightness),
        "false_structures": int(count),
    }
    if seen.retrained is not None:
        again = np.abs(ndimage.gaussian_filter(seen.retrained - seen.without, sigma))
        _, count = ndimage.label((np.abs(change) > max(limit, again[far].max())) & far)
        found |= {
            "largest_retraining_over_largest_noise": float(again[far].max() / limit),
            "false_structures_beyond_retraining": int(count),
        }
    return found


def asymmetry(seen: Seen) -> dict[str, float]:
    """Share of the planted asymmetry that is recovered, and what appears on the other side.

    Both over the true change; the second should be nothing.
    """
    (one,) = seen.planted.lesions
    true = seen.planted.truth() - seen.planted.clean
    x, y, z = one["centre"]
    radius = one["diameter"] / 2

    def mean(image: np.ndarray, centre: Sequence[float]) -> float:
        box, away = around(seen.planted.grid, centre, radius)
        return float(image[box][away <= radius].mean())

    size = mean(true, (x, y, z))
    return {
        "recovered": mean(seen.change, (x, y, z)) / size,
        "on_the_other_side": mean(seen.change, (-x, y, z)) / size,
        "noise_on_the_other_side": abs(mean(seen.noise, (-x, y, z)) / size),
    }


# ------------------------------------------------------------------------------ the campaign
def planted_lesions(
    clean: np.ndarray, grid: Grid, seed: int, diameters: Sequence[float], supports: Sequence[int]
) -> Planted:
    """One lesion of each diameter and sign for each number of stacks."""
    random = np.random.default_rng(seed)
    wanted = [(d, sign) for d in diameters for sign in (1, -1) for _ in supports]
    lesions = choose(clean, grid, seed, wanted)
    for number, one in enumerate(lesions):
        count = supports[number % len(supports)]
        one["stacks"] = sorted(random.choice(3, count, replace=False).tolist())
    return Planted(lesions, clean, grid)


def planted_asymmetry(clean: np.ndarray, grid: Grid, count: int, sign: int) -> Planted:
    """Something large and faint on the right side, which ``count`` stacks see."""
    middle = grid.centre
    one = {
        "centre": [ASYMMETRY["side"] * sign, float(middle[1]), float(middle[2])],
        "diameter": ASYMMETRY["diameter"],
        "change": ASYMMETRY["change"],
        "sign": sign,
        "stacks": list(range(count)),
    }
    return Planted([one], clean, grid)


def one_seed(
    planted: Planted,
    seed: int,
    settings: Settings,
    methods: Sequence[str],
    *,
    asymmetries: bool,
    retrain: bool,
) -> dict[str, Any]:
    """Everything of one seed, by method."""
    clean, grid = planted.clean, planted.grid
    bench = Bench(planted, seed, settings)
    for what in ("without", "within", "other_noise", *(["retrained"] if retrain else [])):
        bench.reconstruct(what, methods)
    rows: dict[str, Any] = {}
    for method in methods:
        seen = bench.seen(method)
        rows[method] = {"contrast": contrast(seen), "false_structures": false_structures(seen)}
    if asymmetries:
        for count in SUPPORTS:
            bench.planted = planted_asymmetry(clean, grid, count, 1 if count != 2 else -1)
            bench.reconstruct(f"within {count}", methods)
            for method in methods:
                found = asymmetry(bench.seen(method, f"within {count}"))
                rows[method].setdefault("asymmetry", {})[f"{count} of 3 stacks"] = found
    return {"methods": rows, "cpu_seconds": bench.seconds}


def _mean(tables: list[Any]) -> Any:
    """Mean of numbers in like tables, entry by entry."""
    if isinstance(tables[0], dict):
        return {name: _mean([table[name] for table in tables]) for name in tables[0]}
    return round(float(np.mean(tables)), 3)


def summary(seeds: dict[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """Means over the seeds, and false structures in all."""
    out: dict[str, Any] = {}
    for method in methods:
        rows = [seed["methods"][method] for seed in seeds.values()]
        false = [row["false_structures"] for row in rows]
        out[method] = {"contrast": _mean([row["contrast"] for row in rows])}
        for name in false[0]:
            if name.startswith("false_structures"):
                out[method][name] = sum(one[name] for one in false)
            elif name.endswith("over_largest_noise"):
                out[method][name] = round(max(one[name] for one in false), 3)
        if "asymmetry" in rows[0]:
            out[method]["asymmetry"] = rows[0]["asymmetry"]
    return out


def figure(path: Path, table: dict[str, Any]) -> None:
    """Recovered contrast against diameter, one panel for each number of stacks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = list(next(iter(table.values()))["contrast"])
    chart, axes = pyplot.subplots(
        1, len(panels), figsize=(3 * len(panels), 3), sharey=True, layout="constrained"
    )
    for panel, name in zip(np.atleast_1d(axes), panels, strict=True):
        for method, row in table.items():
            found = row["contrast"][name]["all"]
            sizes = [float(size.split()[0]) for size in found]
            panel.plot(sizes, list(found.values()), marker="o", label=method)
        panel.axhline(int(name[0]) / 3, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=f"seen by {name}", xlabel="diameter (mm)", ylim=(0, 1.15))
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("recovered contrast")
    first.legend(frameon=False)
    chart.savefig(path, dpi=110)


def main() -> int:
    """1 if anything appeared where nothing was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--crop", type=float, default=90.0, help="middle of the truth, mm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--methods", nargs="+", default=["irem", "srr", "bspline"])
    parser.add_argument("--diameters", type=float, nargs="+", default=list(DIAMETERS), help="mm")
    parser.add_argument(
        "--supports", type=int, nargs="+", default=list(SUPPORTS), help="stacks that see a lesion"
    )
    parser.add_argument("--no-asymmetry", action="store_true")
    parser.add_argument("--epochs", type=int, help="of irem2021")
    parser.add_argument("--retrain", action="store_true", help="compare with another random start")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    # The same stack is the reference of every reconstruction, so that they lie in one space.
    options: dict[str, Any] = {
        "normalise": {"reference": "random"},
        "irem2021": {"coordinate_range": coordinate_range(arguments.truth, arguments.crop)},
    }
    if arguments.epochs is not None:
        options["irem2021"]["epochs_2021"] = arguments.epochs
    settings = Settings.from_dict(options)
    clean, grid = truth_volume(arguments.truth, arguments.crop)
    clean = clean.astype(np.float32)
    where = machine()
    words = [a.name if isinstance(a, Path) else str(a) for a in map(Path, sys.argv[1:])]
    where["command"] = " ".join(["python", "benchmarks/lesions.py", *words])
    began, seeds = time.monotonic(), {}  # type: ignore[var-annotated]
    for number, seed in enumerate(arguments.seeds):
        planted = planted_lesions(clean, grid, seed, arguments.diameters, arguments.supports)
        seeds[str(seed)] = one_seed(
            planted,
            seed,
            settings,
            arguments.methods,
            asymmetries=number == 0 and not arguments.no_asymmetry,
            retrain=arguments.retrain,
        )
        record = {
            **where,
            "protocol": vars(PROTOCOL),
            "crop_mm": arguments.crop,
            "summary": summary(seeds, arguments.methods),
            "seeds": seeds,
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        arguments.result.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["summary"], indent=1), flush=True)
    if arguments.figure:
        figure(arguments.figure, record["summary"])
    return int(any(row["false_structures"] for row in record["summary"].values()))


if __name__ == "__main__":
    sys.exit(main())
