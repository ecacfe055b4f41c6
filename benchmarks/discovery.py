# SPDX-License-Identifier: Apache-2.0
"""How long ``irem-bids --dry-run`` needs to find a cohort, and how much memory.

A skeleton of tiny stacks with sidecars of 64 fields, and of empty functional images, is
written; the app looks at it without a database, filling one, and with it.  The files are in
the page cache, so this is the app's own time; a network disk adds its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.stack import write_image

#: World axes (R, A, S) along the axes of the image.
PLANES = {"ax": (0, 1, 2), "cor": (0, 2, 1), "sag": (1, 2, 0)}


def one_stack(axes: tuple[int, int, int], folder: Path) -> bytes:
    """A file of 24 × 24 × 6 voxels of 2 × 2 × 8 mm."""
    shape, affine = (24, 24, 6), np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(axes)] * [2.0, 2.0, 8.0]
    values = np.random.default_rng(0).integers(1, 1000, shape).astype(np.float32)
    return write_image(folder / "stack.nii.gz", values, Grid(shape, affine)).read_bytes()


def write_skeleton(root: Path, subjects: int, sessions: int) -> int:
    """Write the dataset; returns the number of stacks.  ``sessions`` 0: no session folders."""
    stacks = {f"acq-{label}_T1w": one_stack(axes, root) for label, axes in PLANES.items()}
    files = {"anat": stacks, "func": {"task-rest_bold": b"", "task-rest_sbref": b""}}
    fields = {f"Field{number}": number * 1.5 for number in range(60)}
    sidecar = json.dumps({"SliceThickness": 7.0, "SeriesDescription": "t1", **fields})
    description = {"Name": "skeleton", "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    for number in range(subjects):
        for session in range(1, sessions + 1) if sessions else [0]:
            stem, folder = f"sub-{number:04d}", root / f"sub-{number:04d}"
            if session:
                stem, folder = f"{stem}_ses-{session}", folder / f"ses-{session}"
            for kind, images in files.items():
                (folder / kind).mkdir(parents=True)
                for name, content in images.items():
                    (folder / kind / f"{stem}_{name}.nii.gz").write_bytes(content)
                    (folder / kind / f"{stem}_{name}.json").write_text(sidecar)
    return subjects * max(sessions, 1) * len(stacks)


def measure(root: Path, *options: str) -> dict[str, Any]:
    """Run the app; seconds of the wall and the CPU, peak memory in MB, groups found."""
    command = [sys.executable, "-m", "irem_bids", str(root), str(root.parent / "out")]
    command += ["participant", "--dry-run", "-w", str(root.parent / "work"), *options]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the app ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - start, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "memory_mb": round(usage.ru_maxrss / 1000),
        "groups": sum(line.endswith("axial, coronal, sagittal") for line in text.splitlines()),
    }


def one_size(subjects: int, sessions: int) -> dict[str, Any]:
    """All measurements of one dataset."""
    with tempfile.TemporaryDirectory() as folder:
        root, database = Path(folder) / "data", Path(folder) / "database"
        root.mkdir()
        database.mkdir()
        stacks = write_skeleton(root, subjects, sessions)
        options = ["--bids-database-dir", str(database)]
        return {
            "subjects": subjects,
            "sessions": sessions,
            "stacks": stacks,
            "without_database": measure(root),
            "filling_database": measure(root, *options),
            "with_database": measure(root, *options),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument(
        "--size", nargs=2, type=int, action="append", metavar=("SUBJECTS", "SESSIONS")
    )
    arguments = parser.parse_args()
    commit = ["git", "rev-parse", "HEAD"]
    result = {
        "command": ["python", *sys.argv],
        "machine": {
            "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
        },
        "datasets": [one_size(*size) for size in arguments.size or [(1000, 0), (2000, 2)]],
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["datasets"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
