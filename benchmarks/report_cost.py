# SPDX-License-Identifier: Apache-2.0
"""Time and size of a subject's report, from a head at full resolution.

``python benchmarks/report_cost.py TRUTH.nii.gz RESULT.json [--methods srr bspline] [--work DIR]``

Stacks of 4 mm slices are simulated from the truth and reconstructed by the app; the report is
then made again alone, in a process of its own, and timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

from irem_bids import cli
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.simulate import simulate
from irem_bids.reconstruction.simulated_dataset import write_dataset
from irem_bids.reconstruction.stack import read_image

PROTOCOL = Protocol(thickness=4.0, motion_degrees=4.0, motion_mm=4.0, gain=0.08, snr=40.0, seed=1)
AGAIN = """
import sys, time
from pathlib import Path
from irem_bids import pages
from irem_bids.groups import Group
record = pages.recall(Path(sys.argv[1]), Path(sys.argv[2]))
begin = time.monotonic()
pages.write_page(record.group, Path(sys.argv[1]).parent, Path(sys.argv[2]))
print(time.monotonic() - begin, time.process_time())
"""


def megabytes(path: Path) -> float:
    """Size of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return round(sum(p.stat().st_size for p in files) / 1e6, 2)


def measure(root: Path, truth: Path, methods: list[str]) -> dict[str, object]:
    """Simulate, reconstruct, make the report again; returns what it cost."""
    volume, grid = read_image(truth)
    dataset, out, work = root / "dataset", root / "out", root / "work"
    if not dataset.exists():
        stacks = simulate(volume, grid, PROTOCOL, threads=2)
        write_dataset(dataset, stacks, (volume, grid), PROTOCOL)
    command = [str(dataset), str(out), "participant", "--work-dir", str(work)]
    code = cli.main([*command, "--method", *methods])
    if code:
        raise SystemExit(f"irem-bids ended with {code}")
    (record,) = work.glob("*/reports/*.json")
    begin = time.monotonic()
    text = subprocess.check_output([sys.executable, "-c", AGAIN, str(record), str(out)], text=True)
    whole = time.monotonic() - begin
    page, figures = megabytes(out / "sub-01.html"), megabytes(out / "sub-01" / "figures")
    return {
        "voxels": list(volume.shape),
        "seconds": round(float(text.split()[0]), 1),
        "cpu_seconds_with_start": round(float(text.split()[1]), 1),
        "seconds_with_start": round(whole, 1),
        "page_megabytes": page,
        "figures_megabytes": figures,
        "megabytes": round(page + figures, 2),
    }


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--methods", nargs="+", default=["srr", "bspline"])
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.work or Path(scratch)).resolve()
        found = measure(root, arguments.truth, arguments.methods)
    record = {
        **machine(),
        **found,
    }
    arguments.result.write_text(json.dumps(record, indent=2) + "\n")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
