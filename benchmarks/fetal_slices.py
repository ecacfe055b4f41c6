# SPDX-License-Identifier: Apache-2.0
"""Real stacks with slice motion: whole slices are held out and predicted, method by method.

No truth is known, so every N-th slice of each stack is kept from the fit.  Its NCC with what an
image predicts is told twice: where the method itself places the slice, and after six numbers of
a rigid registration of that slice alone to the finished image, the same for every method.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import cpu_seconds, machine
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.optimize import least_squares

from irem_bids.bids import discover
from irem_bids.reconstruction.acquisition import StackModel
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.masks import output_mask
from irem_bids.reconstruction.metrics import ncc
from irem_bids.reconstruction.optimise import Fit, fit
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.solution import MASK_MARGIN
from irem_bids.reconstruction.stack import Stack, read_stack
from irem_bids.settings import Settings

METHODS = ("bspline", "srr", "irem-stack", "irem-slice")
PAIRS = (("irem-slice", "srr"), ("irem-slice", "irem-stack"), ("irem-stack", "srr"))
FEWEST = 500  # voxels of the mask in a slice that is scored
LIMITS = np.array([np.deg2rad(20.0)] * 3 + [15.0] * 3)  # of a slice's motion, rad and mm
OFF = (np.deg2rad(6.0), 4.0)  # starting points beside the places that the methods give
TRIED = 3  # starting points that are followed, the best of all by NCC
LEVER = 30.0  # mm at which a rotation weighs as much as a shift
RESAMPLES = 10_000


def load(folder: Path) -> tuple[list[Stack], Settings]:
    """The one group of a BIDS dataset with its manual masks, read as the app does."""
    masks = str(folder / "derivatives" / "manual_masks")
    settings = Settings.from_dict({"selection": {"derivatives": [masks]}})
    (group,) = discover(folder, settings).groups
    stacks = [
        read_stack(
            one.path,
            label=one.label,
            slice_thickness=one.slice_thickness,
            mask_path=one.mask,
            slice_times=one.slice_times,
        )
        for one in group.stacks
    ]
    return stacks, settings


def chosen(stack: Stack, number: int, every: int, seed: int) -> NDArray[np.bool_]:
    """(K,) every ``every``-th slice that holds any of the mask; ``number``: of the stack.

    ``every`` seeds that follow each other hold out each slice once.
    """
    others = tuple(a for a in range(3) if a != stack.slice_axis)
    turn = (np.arange(stack.grid.shape[stack.slice_axis]) + number + seed) % every == 0
    return np.asarray(turn & stack.mask.any(axis=others))


def kept(prepared: Prepared, every: int, seed: int) -> Prepared:
    """The stacks without the chosen slices.

    These are in no mask (the app's margin of 4 mm is put into the masks first, so that it does
    not grow back over them), nor among the app's own held-out voxels, which choose the kind of
    motion and whether the network is used.  Their intensities, which ``bspline`` sees all the
    same, are the mean of the two neighbours'.
    """
    stacks, held = [], []
    for number, (stack, drawn) in enumerate(zip(prepared.stacks, prepared.held_out, strict=True)):
        away = distance_transform_edt(~stack.mask, sampling=stack.grid.voxel_size)
        mask, data = away <= MASK_MARGIN, stack.data.copy()
        test = chosen(stack, number, every, seed)
        by_slice, last = np.moveaxis(data, stack.slice_axis, 0), len(test) - 1
        for k in np.flatnonzero(test):
            by_slice[k] = (by_slice[abs(k - 1)] + by_slice[min(k + 1, 2 * last - k - 1)]) / 2
        np.moveaxis(mask, stack.slice_axis, 0)[test] = False
        stacks.append(stack.with_data(data, mask))
        held.append(drawn & mask)
    masked = {stack.label: "given, with its margin" for stack in stacks}
    metrics = {**prepared.metrics, "masked": masked}
    return replace(prepared, stacks=tuple(stacks), held_out=tuple(held), metrics=metrics)


def fits(prepared: Prepared, grid: Grid, settings: Settings) -> tuple[dict[str, Fit], str]:
    """A fit for each of ``METHODS``, and the motion that ``auto`` chose.

    ``auto`` is, to the bit, what it chose, which is not computed again.
    """
    found = {name: fit(name, prepared, grid, settings) for name in ("bspline", "srr")}
    auto = fit("irem", prepared, grid, settings)
    motion = str(auto.info["motion"])
    found[f"irem-{motion}"] = auto
    (other,) = {"stack", "slice"} - {motion}
    asked = settings.updated({"irem": {"motion": other}})
    found[f"irem-{other}"] = fit("irem", prepared, grid, asked)
    return {name: found[name] for name in METHODS}, motion


# ------------------------------------------------------------------ one slice and an image
def cut(stack: Stack, k: int) -> Stack:
    """Slice ``k`` as a stack of its own."""
    box: list[slice] = [slice(None)] * 3
    box[stack.slice_axis] = slice(k, k + 1)
    part, first = tuple(box), np.zeros(3)
    first[stack.slice_axis] = k
    affine = np.array(stack.grid.affine)
    affine[:3, 3] = stack.grid.to_world(first)
    mask = stack.mask[part]
    grid = Grid(mask.shape, affine)
    return replace(stack, data=stack.data[part], mask=mask, grid=grid, slice_times=None)


def left_jacobian(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) the small rotation that follows a rotation vector (rad), by the vector's change."""
    x, y, z = vector
    angle = max(float(np.linalg.norm(vector)), 1e-6)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    first, second = (1 - np.cos(angle)) / angle**2, (angle - np.sin(angle)) / angle**3
    return np.asarray(np.eye(3) + first * cross + second * cross @ cross)


def unit(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """(N,) with mean 0 and length 1, and the length it had."""
    centred = values - values.mean()
    size = max(float(np.linalg.norm(centred)), 1e-9)
    return centred / size, size


class View:
    """One slice as a method's image predicts it, as a function of the slice's motion.

    A motion (6,), rad and mm, is about the slice's middle and follows ``base``, the pose that
    registration gave the stack.
    """

    def __init__(self, one: Stack, found: Fit, image: Any, base: RigidTransform, settings: Any):
        acquisition = settings.acquisition
        if found.method == "bspline":  # as Fit.predict does
            acquisition = replace(acquisition, profile="none")
        self.model = StackModel(one, one.mask, found.grid, acquisition)
        self.width = found.widths.get(one.label, 1.0)
        receiver = found.receivers[one.label]
        where = receiver.image(one.grid, found.poses[one.label], found.grid.centre)
        self.factor = where[tuple(self.model.index.T.astype(np.intp))].astype(np.float64)
        self.image, self.base = image, base
        self.middle = base.apply(one.grid.middle_of(one.mask))
        self.acquired, _ = unit(self.model.values.numpy().astype(np.float64))

    def _predicted(self, motion: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        pose = RigidTransform.from_vector(motion, self.middle) @ self.base
        self.model.set_poses(pose, self.width)
        return unit(self.factor * self.model.forward(self.image).numpy())

    def ncc(self, motion: NDArray[np.float64]) -> float:
        """Of the slice as acquired and as predicted, in its mask."""
        return float(self.acquired @ self._predicted(motion)[0])

    def residual(self, motion: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) whose sum of squares is 2 - 2 NCC."""
        return np.asarray(self._predicted(motion)[0] - self.acquired)

    def jacobian(self, motion: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 6) of :meth:`residual`."""
        predicted, size = self._predicted(motion)
        columns = self.model.derivatives(self.image)[:, :6].numpy().astype(np.float64)
        columns *= self.factor[:, None]
        columns[:, :3] = columns[:, :3] @ left_jacobian(motion[:3])
        columns -= columns.mean(axis=0)
        return np.asarray((columns - np.outer(predicted, predicted @ columns)) / size)

    def registered(self, starts: Sequence[NDArray[np.float64]]) -> tuple[float, NDArray]:
        """The largest NCC and its motion (6,), from the best of the starting points."""
        ranked = sorted(starts, key=self.ncc, reverse=True)[:TRIED]
        scale = np.repeat([1 / LEVER, 1.0], 3)
        ends = [
            least_squares(
                self.residual, start, self.jacobian, bounds=(-LIMITS, LIMITS), x_scale=scale,
                ftol=1e-5, xtol=1e-5, max_nfev=30,
            ).x
            for start in ranked
        ]  # fmt: skip
        best = max([*ends, ranked[0]], key=self.ncc)
        return self.ncc(best), best


def starting_points(places: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Motions (6,): the ``places`` and beside each two along every one of the six numbers."""
    beside = [np.zeros(6)]
    for axis, sign in itertools.product(range(6), (1, -1)):
        beside.append(np.eye(6)[axis] * sign * OFF[axis // 3])
    inside = 0.999 * LIMITS
    return [np.clip(place + step, -inside, inside) for place in places for step in beside]


def size_of(motion: NDArray[np.float64]) -> float:
    """mm, of a motion (6,): shift and rotation at ``LEVER``, root of the sum of squares."""
    weighed = motion * np.repeat([LEVER, 1.0], 3)
    return float(np.linalg.norm(weighed))


# ----------------------------------------------------------------------------- a fold
def score_fold(
    prepared: Prepared, found: dict[str, Fit], settings: Settings, every: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each held-out slice: by method NCC at its own pose, and registered."""
    import torch

    images = {name: one.image() for name, one in found.items()}
    tensors = {name: torch.from_numpy(image) for name, image in images.items()}
    rows = []
    for number, (stack, base) in enumerate(zip(prepared.stacks, prepared.poses, strict=True)):
        seen = {n: one.predict(stack, settings, images[n]) for n, one in found.items()}
        for k in np.flatnonzero(chosen(stack, number, every, seed)):
            one = cut(stack, int(k))
            voxels = int(one.mask.sum())
            if voxels < FEWEST:
                continue
            row: dict[str, Any] = {"stack": stack.label, "slice": int(k), "voxels": voxels}
            where = np.moveaxis(stack.mask, stack.slice_axis, 0)[k]
            acquired, *guesses = (
                np.moveaxis(a, stack.slice_axis, 0)[k][where] for a in (stack.data, *seen.values())
            )
            row["own_pose"] = dict(zip(found, (ncc(acquired, g) for g in guesses), strict=True))
            views = {n: View(one, fit_, tensors[n], base, settings) for n, fit_ in found.items()}
            own = {n: own_motion(fit_, one, int(k), views[n]) for n, fit_ in found.items()}
            starts = starting_points(list(own.values())[1:])  # those of bspline and srr are one
            ends = {name: view.registered(starts) for name, view in views.items()}
            row["registered"] = {name: end[0] for name, end in ends.items()}
            row["own_pose_mm"] = {name: size_of(motion) for name, motion in own.items()}
            row["registered_mm"] = {name: size_of(end[1]) for name, end in ends.items()}
            row["apart_mm"] = {name: size_of(ends[name][1] - own[name]) for name in ends}
            rows.append(row)
    return rows


def own_motion(found: Fit, one: Stack, k: int, view: View) -> NDArray[np.float64]:
    """(6,) rad and mm: where a fit places slice ``k``, as a motion of ``view``."""
    poses = found.slice_poses.get(one.label)
    pose = found.poses[one.label] if poses is None else RigidTransform(poses[k])
    return (pose @ view.base.inverse()).to_vector(view.middle)


# ---------------------------------------------------------------------------- summary
def paired(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, Any]:
    """``a`` - ``b`` (N,): mean with its 95 % interval, slices drawn with replacement; median."""
    difference = a - b
    draws = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return {
        "mean": float(difference.mean()),
        "interval": [float(low), float(high)],
        "median": float(np.median(difference)),
        "better": float(np.mean(difference > 0)),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each score: mean and median by method, by stack, and the paired differences."""
    out: dict[str, Any] = {"slices": len(rows)}
    labels = sorted({row["stack"] for row in rows})
    for score in ("own_pose", "registered"):
        values = {name: np.array([row[score][name] for row in rows]) for name in METHODS}
        part: dict[str, Any] = {
            name: {
                "mean": float(each.mean()),
                "median": float(np.median(each)),
                "tenth": float(np.quantile(each, 0.1)),
                "by_stack": {
                    label: float(np.mean([r[score][name] for r in rows if r["stack"] == label]))
                    for label in labels
                },
            }
            for name, each in values.items()
        }
        part |= {f"{a} less {b}": paired(values[a], values[b]) for a, b in PAIRS}
        out[score] = part
    out["mm"] = {
        name: {
            key: float(np.median([row[key][name] for row in rows]))
            for key in ("own_pose_mm", "registered_mm", "apart_mm")
        }
        for name in METHODS
    }
    return out


def rounded(value: Any) -> Any:
    """The same with numbers of four decimals."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


# ----------------------------------------------------------------------------- figure
def figure(path: Path, images: dict[str, NDArray[np.float32]], mask: NDArray[np.bool_]) -> None:
    """The three planes (rows) of each method (columns) through the middle of the brain.

    ``images``: (X, Y, Z) isotropic, one grid, one grey window.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    where = np.argwhere(mask)
    low, high, middle = where.min(0), where.max(0) + 1, np.rint(where.mean(0)).astype(int)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    size, middle = high - low, middle - low
    planes = ((2, 0, 1), (1, 0, 2), (0, 1, 2))  # normal, across, up
    top = float(np.quantile(images["irem-slice"][mask], 0.995))
    wide, tall = max(size[p[1]] for p in planes), [int(size[p[2]]) for p in planes]
    width = 2.6
    chart, axes = pyplot.subplots(
        3, len(images), figsize=(width * len(images), width * sum(tall) / wide + 0.3),
        height_ratios=tall, layout="constrained",
    )  # fmt: skip
    for column, (name, volume) in enumerate(images.items()):
        shown = np.where(mask, volume, 0)[box]
        for row, (normal, *_) in enumerate(planes):
            panel = axes[row, column]
            plane = np.take(shown, middle[normal], axis=normal).T
            panel.imshow(plane, "gray", origin="lower", vmin=0, vmax=top, interpolation="bicubic")
            panel.axis("off")
        axes[0, column].set_title(name)
    chart.savefig(path, dpi=100)


def pictures(path: Path, prepared: Prepared, grid: Grid, settings: Settings) -> str:
    """The figure of fits on all the data; returns the motion that ``auto`` chose."""
    found, motion = fits(prepared, grid, settings)
    figure(path, {name: one.image() for name, one in found.items()}, output_mask(prepared, grid))
    return motion


def main() -> None:
    """Every seed's fold, the summary over all, and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="BIDS folder with derivatives/manual_masks")
    parser.add_argument("result", type=Path, help="JSON to write")
    parser.add_argument("--figure", type=Path, help="PNG of the three planes by method")
    parser.add_argument("--every", type=int, default=6, help="one slice in so many is held out")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="folds, and seeds; default: each slice held out once"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch  # after irem_bids, which says how idle threads wait

    torch.set_num_threads(options.threads)
    began, where = time.monotonic(), machine()
    stacks, settings = load(options.data)
    prepared = prepare(stacks, settings, threads=options.threads)
    grid = output_grid(prepared, settings.output)
    record: dict[str, Any] = {**where, "every": options.every, "fewest_voxels": FEWEST}
    record |= {"ncc_of_stacks": {k: prepared.metrics[k] for k in ("ncc_before", "ncc_after")}}
    rows, record["auto"], record["rows"] = [], {}, []
    for seed in options.seeds or range(options.every):
        own = settings.updated({"run": {"random_seed": settings.run.random_seed + seed}})
        found, record["auto"][str(seed)] = fits(kept(prepared, options.every, seed), grid, own)
        fold = score_fold(prepared, found, own, options.every, seed)
        rows += [{"seed": seed, **row} for row in fold]
        record["summary"] = rounded(summary(rows))
        record["seconds"] = round(time.monotonic() - began, 1)
        record["cpu_seconds"] = cpu_seconds()
        record["rows"] = rounded(rows)
        options.result.write_text(json.dumps(record, indent=1) + "\n")
        print(seed, json.dumps(rounded(summary(fold))), flush=True)
    if options.figure:
        record["auto"]["all"] = pictures(options.figure, prepared, grid, settings)
    record["seconds"], record["cpu_seconds"] = round(time.monotonic() - began, 1), cpu_seconds()
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record["rows"] = record.pop("rows")  # last
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
