# SPDX-License-Identifier: Apache-2.0
"""Planted defects: does the summary of each report name the right cause, and only there?

``python benchmarks/planted_defects.py RESULT.json [--subjects 20] [--seed N]``

A cohort of heads is simulated from the MNI152 template that nilearn carries, each one warped in
its own way, with hidden motion, gains and noise.  Five subjects have one defect each: a stack
that registration left 8 mm away, a dropped slice, a gain of 2, file names whose orientation
labels are swapped, a wrong slice thickness in the sidecar.  The whole app runs on them; the
summaries are then read as the report words them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import cpu_seconds, machine
from scipy import ndimage

from irem_bids import cli, pages
from irem_bids.demo import template
from irem_bids.reconstruction.draws import Damage, StackDraw, draw
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import acquire
from irem_bids.reconstruction.simulated_dataset import Scan, write_dataset
from irem_bids.report import material, summary

CAUSES = {
    "misregistered": "misregistered",
    "slice": "slice",
    "gain": "gain",
    "labels": "label",
    "thickness": "thickness",
}
SHIFT_MM = 8.0
STRIDE = 2  # voxels of the truth, mm


def head(random: np.random.Generator) -> tuple[np.ndarray, Grid]:
    """The template, warped smoothly by a few millimetres and scaled by a few per cent."""
    volume, grid = template(STRIDE)
    sizes = 1 + random.uniform(-0.05, 0.05, size=3)
    centre = (np.array(volume.shape)[:, None, None, None] - 1) / 2
    index = np.indices(volume.shape) - centre
    index = index / sizes[:, None, None, None] + centre
    warp = np.stack(
        [ndimage.gaussian_filter(random.standard_normal(volume.shape), 10) for _ in range(3)]
    )
    index += 1.2 * warp / warp.std()
    return ndimage.map_coordinates(volume, index, order=1, mode="nearest"), grid


def plant(defect: str | None, draws: tuple[StackDraw, ...]) -> tuple[StackDraw, ...]:
    """The draws of a subject with the part of its defect that the scanner makes."""
    rows = list(draws)
    victim = 1
    if defect == "misregistered":
        for number, one in enumerate(rows):
            shift = SHIFT_MM / np.sqrt(3) * np.ones(3) * (number == victim)
            pose = RigidTransform.from_vector([0, 0, 0, *shift])
            rows[number] = dataclasses.replace(one, pose=tuple(map(tuple, pose.matrix.tolist())))
    elif defect == "slice":
        middle = int(rows[victim].shape[2] * 0.45)
        damage = (Damage(middle, "dropped", 0.15),)
        rows[victim] = dataclasses.replace(rows[victim], damage=damage)
    elif defect == "gain":
        rows[victim] = dataclasses.replace(rows[victim], gain=2 * rows[victim].gain)
    return tuple(rows)


def spoil(defect: str | None, anat: Path, subject: str) -> None:
    """The part of a defect that a person or a converter makes."""
    if defect == "labels":
        for extension in (".nii.gz", ".json"):
            stem = f"sub-{subject}_acq-{{}}_T1w{extension}"
            first, second = (anat / stem.format(p) for p in ("axial", "coronal"))
            first.rename(anat / "aside")
            second.rename(first)
            (anat / "aside").rename(second)
    elif defect == "thickness":
        path = anat / f"sub-{subject}_acq-sagittal_T1w.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "SliceThickness": record["SliceThickness"] / 2}))


def make_subject(dataset: Path, subject: str, defect: str | None, seed: int) -> None:
    """Simulate one subject into the dataset."""
    random = np.random.default_rng(seed)
    truth, grid = head(random)
    protocol = Protocol(
        thickness=3.0 * STRIDE,
        motion_degrees=4.0,
        motion_mm=4.0,
        gain=0.08,
        snr=35.0,
        margin=4.0,
        seed=seed,
    )
    stacks = acquire(truth, grid, protocol, plant(defect, draw(protocol, truth, grid)))
    write_dataset(dataset, stacks, (truth, grid), protocol, Scan(subject))
    spoil(defect, dataset / f"sub-{subject}" / "anat", subject)


def run(dataset: Path, out: Path, subjects: list[str], *more: str) -> None:
    """The app on some subjects."""
    command = [str(dataset), str(out), "participant", "--participant-label", *subjects]
    command += ["--work-dir", str(out.parent / "work"), *more]
    command.append("--no-uncertainty")  # no check looks at it
    code = cli.main(command)
    if code:
        raise SystemExit(f"irem-bids ended with {code}")


def causes(out: Path) -> dict[str, dict[str, str]]:
    """Per subject what asks for a look: cause to words."""
    found = {}
    for path in sorted((out.parent / "work").glob("*/reports/*.json")):
        inp = pages.recall(path, out)
        findings = summary.check(material.load(inp))
        found[inp.group.subject] = {f.cause: f.text for f in findings if f.look}
    return found


def main() -> int:
    """Simulate, run, compare, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", nargs="+", default=["irem", "bspline"])
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.work or Path(scratch)).resolve()
        names = [f"{n:02d}" for n in range(1, arguments.subjects + 1)]
        planted = dict(zip(names, CAUSES, strict=False))
        for number, name in enumerate(names):
            if not (root / "dataset" / f"sub-{name}").exists():
                seed = 1000 * arguments.seed + number
                make_subject(root / "dataset", name, planted.get(name), seed)
        trusted = [n for n in names if planted.get(n) == "misregistered"]
        others = [n for n in names if n not in trusted]
        options = ("--method", *arguments.method)
        run(root / "dataset", root / "out", trusted, *options, "--no-registration")
        if others:
            run(root / "dataset", root / "out", others, *options)
        found = causes(root / "out")
    rows = []
    for name in names:
        defect, named = planted.get(name), found.get(name, {})
        right = CAUSES[defect] in named if defect else not named
        rows.append({"subject": name, "planted": defect, "named": named, "right": right})
        print(f"sub-{name}  {defect or 'clean':<14} {'right' if right else 'WRONG'}  {named}")
    record = {
        **machine(),
        "methods": arguments.method,
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": cpu_seconds(),
        "named": sum(r["right"] for r in rows if r["planted"]),
        "planted": len(planted),
        "clean_flagged": sum(not r["right"] for r in rows if not r["planted"]),
        "clean": len(rows) - len(planted),
        "subjects": rows,
    }
    arguments.result.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(r["right"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
