# SPDX-License-Identifier: Apache-2.0
"""Killed at random moments and started again until done: the same images, never half a file.

    python benchmarks/kill_cohort.py RESULT.json --kills 100 --subjects 5

SIGKILL goes to the run alone or to all its processes.  A run that ends before its kill is
compared with an undisturbed one, and a new output is begun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from tests.integration import cohorts
from tests.integration.test_kill import fault_of, visible


class Watcher(threading.Thread):
    """Reads every visible file of an output as it appears."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.wrong, self.seen = folder, [], set()  # type: ignore[var-annotated]
        self.ended = threading.Event()

    def run(self) -> None:
        """Until :attr:`ended`."""
        while not self.ended.is_set():
            for path in visible(self.folder):
                self.look(path)
            time.sleep(0.02)

    def look(self, path: Path) -> None:
        """Read a file that was not seen before."""
        try:
            stat = path.stat()
            key = (path, stat.st_ino, stat.st_mtime_ns)
            if not path.is_file() or key in self.seen:
                return
            fault = fault_of(path)
        except FileNotFoundError:
            return
        self.seen.add(key)
        if fault:
            self.wrong.append(f"{path.name}: {fault}")


def campaign(folder: Path, kills: int, subjects: int, seed: int, method: str) -> dict[str, Any]:
    """All kills; what was wrong is listed."""
    rng = random.Random(seed)
    cohorts.tiny_cohort(folder / "bids", subjects)
    words = ("--nprocs", "2", "--omp-nthreads", "1")
    began = time.monotonic()
    code, log = cohorts.run(cohorts.command(folder, "whole", *words, method=method), folder)
    if code:
        raise RuntimeError(log)
    duration = time.monotonic() - began
    expected = cohorts.images(folder / "whole")
    faults: list[str] = []
    done, rounds, looked = 0, 0, 0
    while done < kills:
        rounds += 1
        watcher = Watcher(folder / "out")
        watcher.start()
        for last in range(kills * 10):
            moment = rng.uniform(0, duration) if done < kills else None
            ended = one_run(folder, words, method, moment, rng)
            if ended is None:
                done += 1
                print(f"kill {done} of {kills}, after {moment:.1f} s", file=sys.stderr, flush=True)
                continue
            if ended[0]:
                faults.append(f"round {rounds}, start {last}: code {ended[0]}: {ended[1][-2000:]}")
            break
        watcher.ended.set()
        watcher.join()
        looked += len(watcher.seen)
        faults += watcher.wrong
        if cohorts.images(folder / "out") != expected:
            faults.append(f"round {rounds}: the images are not those of the undisturbed run")
        cohorts.check_top_level(folder / "out", killed=True)
        for name in ("out", "work-out"):
            shutil.rmtree(folder / name)
    return {
        "kills": done, "subjects": subjects, "method": method, "rounds": rounds, "seed": seed,
        "images": len(expected), "files_watched": looked,
        "seconds_undisturbed": round(duration, 1), "seconds": round(time.monotonic() - began, 1),
        "faults": faults,
    }  # fmt: skip


def one_run(
    folder: Path, words: tuple[str, ...], method: str, moment: float | None, rng: random.Random
) -> tuple[int, str] | None:
    """Code and log of a run that ended by itself; None if it was killed after ``moment`` s."""
    process = cohorts.start(cohorts.command(folder, "out", *words, method=method), folder)
    until = None if moment is None else time.monotonic() + moment
    while process.poll() is None and (until is None or time.monotonic() < until):
        time.sleep(0.02)
    if process.poll() is None:
        if rng.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    text, _ = process.communicate()  # its workers hold the pipe until they have ended, too
    if process.returncode == -signal.SIGKILL:
        return None
    return process.returncode, text


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--subjects", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="srr")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = campaign(
            Path(name), arguments.kills, arguments.subjects, arguments.seed, arguments.method
        )
    record = {**machine(), **found}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return int(bool(record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
