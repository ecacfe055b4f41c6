# SPDX-License-Identifier: Apache-2.0
"""A disk that fills, at several fill levels, and the rerun when there is room.

    python benchmarks/disk_full.py RESULT.json --levels 20

Needs the right to mount a small tmpfs; ends with 77 where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from tests.integration import cohorts

SIZE = 8 * 2**20
NUMBERS = re.compile(r"[\d.]+ [MG]B free, about [\d.]+ [MG]B (are )?needed")


class NoMount(Exception):
    """This process may not mount."""


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A tmpfs of :data:`SIZE` bytes."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise NoMount
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def free(place: Path) -> int:
    """Free bytes."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def fill(place: Path, left: int) -> Path:
    """Fill the disk but for ``left`` bytes."""
    path = place / "filler"
    with path.open("wb") as file:
        file.write(bytes(max(0, free(place) - left)))
    return path


def run_until_full(words: list[str], folder: Path, disk: Path, most: int) -> tuple[int, str]:
    """A run whose disk somebody else fills when it has written ``most`` bytes."""
    before = free(disk)
    process = cohorts.start(words, folder)
    while process.poll() is None and before - free(disk) < most:
        time.sleep(0.005)
    with contextlib.suppress(OSError):
        fill(disk, 0)
    text, _ = process.communicate()
    return process.returncode, text


def level(
    folder: Path, left: int, most: int | None, method: str, expected: dict[str, str]
) -> dict[str, Any]:
    """One run with ``left`` bytes, or with none when it has written ``most``; and one with room."""
    faults = []
    with small_disk(folder / "disk") as disk:
        filler = disk / "filler"
        if most is None:
            fill(disk, left)
        words = cohorts.command(folder, "disk/out", method=method)
        words[words.index("--work-dir") + 1] = str(disk / "work")
        if most is None:
            code, log = cohorts.run(words, folder)
        else:
            code, log = run_until_full(words, folder, disk, most)
        said = [line for line in log.splitlines() if NUMBERS.search(line)]
        if code not in (0, 73, 74):
            faults.append(f"code {code}: {log[-3000:]}")
        if code and not said:
            faults.append(f"code {code} without the needed and the free space: {log[-3000:]}")
        if "Traceback" in log:
            faults.append(f"a traceback: {log[-3000:]}")
        filler.unlink(missing_ok=True)
        again, log = cohorts.run(words, folder)
        if again or cohorts.images(disk / "out") != expected:
            faults.append(f"the rerun ended with {again}: {log[-3000:]}")
        else:
            cohorts.check_top_level(disk / "out")
        start = {"free": left} if most is None else {"filled_after_bytes": most}
        return {
            **start,
            "code": code,
            "said": [line.replace(str(folder), "") for line in said[-1:]],
            "rerun": again,
            "faults": faults,
        }


def campaign(folder: Path, levels: int, subjects: int, method: str) -> dict[str, Any]:
    """Every level from nothing to nearly enough."""
    cohorts.tiny_cohort(folder / "bids", subjects)
    with small_disk(folder / "disk") as disk:
        before = free(disk)
        words = cohorts.command(folder, "disk/out", method=method)
        words[words.index("--work-dir") + 1] = str(disk / "work")
        code, log = cohorts.run(words, folder)
        if code:
            raise RuntimeError(log)
        used, expected = before - free(disk), cohorts.images(disk / "out")
    half, began = levels // 2, time.monotonic()
    rows = []
    for k in range(half):  # too little from the start
        rows.append(level(folder, round(used * k / half), None, method, expected))
    for k in range(levels - half):  # enough, until somebody else takes it
        most = round(used * (0.02 + 0.9 * k / (levels - half)))
        rows.append(level(folder, SIZE, most, method, expected))
    return {
        "subjects": subjects, "method": method, "bytes_used": used, "levels": rows,
        "codes": [row["code"] for row in rows], "seconds": round(time.monotonic() - began, 1),
        "faults": [text for row in rows for text in row["faults"]],
    }  # fmt: skip


def main() -> int:
    """1 if anything was wrong, 77 where nothing can be mounted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--levels", type=int, default=20)
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--method", default="bspline")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        try:
            found = campaign(Path(name), arguments.levels, arguments.subjects, arguments.method)
        except NoMount:
            print("nothing can be mounted here")
            return 77
    record = {**machine(), **found}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return int(bool(record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
