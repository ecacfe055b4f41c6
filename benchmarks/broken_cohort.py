# SPDX-License-Identifier: Apache-2.0
"""A cohort in which every tenth subject is broken in another way.

    python benchmarks/broken_cohort.py RESULT.json --subjects 200 --broken 20

Every whole subject gets its image, every broken one its own cause, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from tests import corpus
from tests.integration import cohorts

#: Ways to break an image that leave nothing to use.
WAYS = (
    "truncated", "NaN", "singular", "wrong magic", "all zero", "huge dims", "no orientation",
    "constant", "header cut", "infinite", "bomb", "sheared", "zero zooms", "NaN affine",
    "negative dims", "unknown type", "extension without end", "empty archive", "no archive",
    "millimetres in metres", "dims that overflow", "beyond single", "no dims",
)  # fmt: skip


def make(root: Path, subjects: int, broken: int) -> dict[str, str]:
    """Write the cohort; returns the label of each broken subject and its way."""
    cohorts.tiny_cohort(root, subjects)
    ways = {}
    for number in range(broken):
        subject = f"{number * (subjects // broken) + 1:03d}"
        ways[subject] = WAYS[number]
        for label in ("ax", "sag"):
            corpus.write_image_case(
                corpus.image_path(root, label, subject),
                corpus.LABELS[label],
                corpus.IMAGES[WAYS[number]],
            )
    return ways


def campaign(folder: Path, subjects: int, broken: int, method: str) -> dict[str, Any]:
    """Run the cohort once and compare."""
    ways, began = make(folder / "bids", subjects, broken), time.monotonic()
    code, log = cohorts.run(cohorts.command(folder, "out", method=method), folder)
    faults = [] if code == 1 else [f"exit code {code}: {log[-3000:]}"]
    faults += ["a traceback"] if "Traceback" in log else []
    rows = {row["group"]: row for row in cohorts.tables(folder / "out")}
    results = causes = 0
    for number in range(subjects):
        subject = f"{number:03d}"
        row = rows.get(f"sub-{subject}_T1w", {"status": "missing", "cause": ""})
        image = folder / "out" / f"sub-{subject}/anat/sub-{subject}_desc-{method}_T1w.nii.gz"
        if subject not in ways:
            good = row["status"] == "done" and image.is_file()
            results += good
        else:
            words = " ".join(corpus.IMAGES[ways[subject]].says.split())
            good = row["status"] == "failed" and row["cause"].count(words) == 2
            good = good and row["code"] == "65" and not image.exists()
            causes += good
        if not good:
            faults.append(f"sub-{subject} ({ways.get(subject, 'whole')}): {row}")
    cohorts.check_top_level(folder / "out")
    return {
        "subjects": subjects, "broken": broken, "method": method, "exit_code": code,
        "results": results, "causes_named": causes, "ways": list(ways.values()),
        "seconds": round(time.monotonic() - began, 1), "faults": faults,
    }  # fmt: skip


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--method", default="bspline")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = campaign(Path(name), arguments.subjects, arguments.broken, arguments.method)
    record = {**machine(), **found}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return int(bool(record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
