# SPDX-License-Identifier: Apache-2.0
"""Runs of the app on tiny cohorts, for tests and campaigns of faults."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from .. import corpus
from ..stacks import write_description
from .test_end_to_end import QUICK

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE_VOXELS = 24
#: As little as the app can be asked for; registration of noise-free phantoms is not the point.
TINY = QUICK.replace("[normalise]\n", "[normalise]\nregistration = false\n").replace(
    "output_resolution = 3.0", "output_resolution = 5.0"
)


def tiny_subject(root: Path, subject: str, seed: int = 0) -> None:
    """Three orthogonal stacks of a ball with landmarks, 20 mm across a few voxels."""
    for label, plane in corpus.LABELS.items():
        data, grid = corpus.ball(plane, seed)
        path = corpus.image_path(root, label, subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(corpus.nifti_bytes(data, grid.affine), 1, mtime=0))


def tiny_cohort(root: Path, count: int) -> Path:
    """``count`` subjects, each another."""
    write_description(root)
    for number in range(count):
        tiny_subject(root, f"{number:03d}", number)
    return root


def command(folder: Path, out: str, *words: str, method: str = "bspline") -> list[str]:
    """The command line for ``folder/bids``; the work folder is beside the output."""
    config = folder / "tiny.toml"
    if not config.exists():
        config.write_text(TINY)
    return [
        sys.executable, "-m", "irem_bids", str(folder / "bids"), str(folder / out),
        "participant", "--config-file", str(config), "--method", method,
        "--work-dir", str(folder / f"work-{out}"), *words,
    ]  # fmt: skip


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """Start the app in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        text=True,
        cwd=cwd,
    )


def run(arguments: list[str], cwd: Path) -> tuple[int, str]:
    """Exit code and log."""
    process = start(arguments, cwd)
    text, _ = process.communicate(timeout=3600)
    return process.returncode, text


def images(out: Path) -> dict[str, str]:
    """Hash of the unpacked content of every image."""
    return {
        str(path.relative_to(out)): hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        for path in sorted(out.rglob("sub-*/**/*.nii.gz"))
    }


def tables(out: Path) -> list[dict[str, str]]:
    """Rows of every run's table of groups."""
    rows = []
    for path in sorted((out / "logs").glob("*_groups.tsv")):
        head, *lines = path.read_text().splitlines()
        rows += [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    return rows


def check_top_level(out: Path, *, killed: bool = False) -> None:
    """Every file at the top is whole and says what it should; nothing is left behind."""
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["GeneratedBy"][0]["Name"] == "irem-bids"
    assert "*_xfm.txt" in (out / ".bidsignore").read_text().splitlines()
    assert (out / "README.md").read_text().startswith("# irem-bids")
    for page in out.glob("sub-*.html"):
        assert "</html>" in page.read_text()[-200:], page
    hidden = [str(p.relative_to(out)) for p in out.rglob(".*") if p.name != ".bidsignore"]
    if killed:  # what was being written; later runs remove it
        hidden = [h for h in hidden if not re.search(r"(^|/)(\.\d+\.[^/]+|\.irem-bids-\w{32})$", h)]
    assert hidden == []
