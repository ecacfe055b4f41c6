# SPDX-License-Identifier: Apache-2.0
"""The same command in several processes at once, on one output and one work folder.

python benchmarks/many_processes.py RESULT.json --processes 8 --subjects 6
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from tests.integration import cohorts


def campaign(folder: Path, processes: int, subjects: int, method: str) -> dict[str, Any]:
    """Run them; every subject is done by one, and every file is whole."""
    cohorts.tiny_cohort(folder / "bids", subjects)
    arguments, began = cohorts.command(folder, "out", "--nprocs", "1", method=method), time.time()
    runs = [cohorts.start(arguments, folder) for _ in range(processes)]
    logs = [run.communicate()[0] for run in runs]
    faults = [f"code {run.returncode}: {log}" for run, log in zip(runs, logs, strict=True)
              if run.returncode]  # fmt: skip
    done = collections.Counter(
        row["group"] for row in cohorts.tables(folder / "out") if row["status"] == "done"
    )
    names = [f"sub-{number:03d}" for number in range(subjects)]
    if done != collections.Counter(f"{name}_T1w" for name in names):
        faults.append(f"done: {dict(done)}")
    for name in names:
        image = f"{name}/anat/{name}_desc-{method}_T1w.nii.gz"
        if image not in cohorts.images(folder / "out"):
            faults.append(f"{image} is lost")
    cohorts.check_top_level(folder / "out")
    return {
        "processes": processes, "subjects": subjects, "method": method,
        "tables": len(list((folder / "out" / "logs").glob("*_groups.tsv"))),
        "seconds": round(time.time() - began, 1), "faults": faults,
    }  # fmt: skip


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--method", default="bspline")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = campaign(Path(name), arguments.processes, arguments.subjects, arguments.method)
    record = {**machine(), **found}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return int(bool(record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
