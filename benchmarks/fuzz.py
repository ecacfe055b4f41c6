# SPDX-License-Identifier: Apache-2.0
"""Bad datasets and mutated NIfTI headers through discovery and loading.

    python benchmarks/fuzz.py RESULT.json --datasets 5000 --headers 20000

Each case is made from its own seed.  It must end within five seconds in a result, in a
reason or in one message with an exit code; the dataset must be as it was, and nothing may
be written anywhere else.  Seeds of cases that fail are kept in the result.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from machine import machine

from irem_bids.bids import describe, discover
from irem_bids.checks import check_dataset
from irem_bids.exitcodes import UserError
from irem_bids.images import read_header
from irem_bids.reconstruction.geometry import GeometryError
from irem_bids.reconstruction.stack import ImageError, read_image, read_stack
from irem_bids.settings import Settings
from tests import corpus

SECONDS = 5.0
HEADER_BYTES = 352
CHANGES = ("w", "a", "x", "+")


class Hang(BaseException):
    """A case took too long."""


class Written(Exception):
    """Something was to be written outside the folder of the case."""


def _alarm(*_: object) -> None:
    raise Hang


class Guard:
    """Python's own audit events: a file opened for writing, made, renamed or removed."""

    EVENTS = (
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod",
        "os.truncate", "subprocess.Popen", "os.system", "socket.connect",
    )  # fmt: skip

    def __init__(self) -> None:
        self.on = False
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise :class:`Written` at the end if anything was to be changed."""
        self.found, self.on = [], True
        try:
            yield
        finally:
            self.on = False
        if self.found:
            raise Written("; ".join(self.found[:5]))

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            name, mode, flags = arguments
            writes = any(c in (mode or "") for c in CHANGES)
            writes |= bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and str(name) not in ("/dev/null", os.devnull):
                self.found.append(f"open {name}")
        elif event in self.EVENTS:
            self.found.append(f"{event} {arguments[:2]}")


@contextmanager
def limited() -> Iterator[None]:
    """Raise :class:`Hang` after :data:`SECONDS`."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---------------------------------------------------------------------- mutated headers
def mutate(seed: int) -> bytes:
    """A small stack whose first 352 bytes were changed; packed for odd seeds."""
    rng = random.Random(seed)
    plane = rng.choice(list(corpus.AXES))
    content = bytearray(corpus.IMAGES[rng.choice(("whole", "slope 0", "big-endian"))].make(plane))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(HEADER_BYTES)
        kind = rng.randrange(4)
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            content[place] ^= 1 << rng.randrange(8)
        else:
            place -= place % 4
            word = rng.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f",
                 b"\0\0\x80\x7f", b"\0\0\0\x80", rng.randbytes(4))
            )  # fmt: skip
            content[place : place + 4] = word
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    whole = bytes(content)
    return gzip.compress(whole, 1, mtime=0) if seed % 2 else whole


def make_header(seed: int, folder: Path) -> Path:
    """Write one mutated image."""
    path = folder / ("a.nii.gz" if seed % 2 else "a.nii")
    path.write_bytes(mutate(seed))
    return path


def run_header(path: Path, folder: Path) -> str:
    """Read one image as discovery and loading do; returns what came of it."""
    try:
        header = read_header(path, 1.5)
        read_stack(path, label="a", slice_thickness=header.spacing)
        return "used"
    except (ImageError, GeometryError) as error:
        if not str(error):
            raise
    try:
        read_image(path)  # the other way in has to say something sensible as well
    except (ImageError, GeometryError):
        return "refused"
    return "refused as a stack, an image all the same"


# ------------------------------------------------------------------------- bad datasets
def make_dataset(seed: int, folder: Path) -> Settings:
    """A dataset of what the corpus has, drawn by the seed, in any order."""
    rng, root = random.Random(seed), folder / "bids"
    corpus.write_description(root)
    subjects = rng.sample(["01", "2", "A", "01b"], rng.choice((1, 1, 2)))
    jobs: list[Callable[[], Any]] = []
    for subject in subjects:
        for label in rng.sample(["ax", "cor", "sag", "x1", "loc", "iso"], rng.randrange(6)):
            path = corpus.image_path(root, label, subject)
            jobs.append(lambda path=path: _draw_image(rng, path))
    if "01" in subjects:
        (root / "sub-01" / "anat").mkdir(parents=True, exist_ok=True)
        for _ in range(rng.randrange(3)):
            text = rng.choice(list(corpus.SIDECARS.values()))[0]
            label = rng.choice(["ax", "cor", "sag", "x1"])
            jobs.append(lambda label=label, text=text: corpus.write_sidecar(root, label, text))
    rng.shuffle(jobs)
    for job in jobs:
        job()
    settings: dict[str, Any] = {"run": {"nprocs": 1}, "selection": {}}
    if "01" in subjects and rng.random() < 0.15:
        _draw_tree(rng, root)
    if rng.random() < 0.05:
        text = rng.choice(["{", "[]", "5", "\x00", '{"Name": 1}', "[" * 50000])
        (root / "dataset_description.json").write_text(text)
    if rng.random() < 0.2:
        settings["selection"]["derivatives"] = [str(_draw_masks(rng, root))]
    if rng.random() < 0.1:
        labels = rng.choice([["01"], ["../.."], ["*"], ["sub-"], ["\0"], ["01", "A"]])
        settings["selection"]["participant_label"] = labels
    return Settings.from_dict(settings)


def _draw_image(rng: random.Random, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.4:
        names = [name for name in corpus.IMAGES if name != "bomb" or rng.random() < 0.1]
        corpus.write_image_case(
            path, rng.choice(list(corpus.AXES)), corpus.IMAGES[rng.choice(names)]
        )
    elif rng.random() < 0.5:
        path.write_bytes(mutate(rng.randrange(10**6) * 2 + 1))
    else:
        corpus.write_image_case(path, rng.choice(list(corpus.AXES)), corpus.IMAGES["whole"])


def _draw_tree(rng: random.Random, root: Path) -> None:
    name = rng.choice(list(corpus.TREES))
    anat = root / "sub-01" / "anat"
    try:
        if name == "many files":
            corpus.many_files(root, 500)
        elif name != "case twins" or (anat / "sub-01_acq-ax_T1w.nii.gz").exists():
            corpus.TREES[name](root)
    except FileExistsError:
        return


def _draw_masks(rng: random.Random, root: Path) -> Path:
    folder = root.parent / "masks"
    label = rng.choice(list(corpus.LABELS))
    _, grid = corpus.small_stack(rng.choice(list(corpus.AXES)))
    values = rng.choice(list(corpus.MASKS.values()))[0]()
    corpus.write_mask(folder, label, values, grid)
    return folder


def run_dataset(settings: Settings, folder: Path) -> str:
    """Discovery of one bad dataset and loading of what it found."""
    try:
        check_dataset(folder / "bids")
        found = discover(folder / "bids", settings)
        describe(found)
        for group in found.groups:
            for stack in group.stacks:
                read_stack(stack.path, label=stack.label, mask_path=stack.mask)
    except UserError as error:
        return f"exit code {int(error.code)}"
    return "usable" if found.groups else "exit code 65"


# ----------------------------------------------------------------------------- campaign
def state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all below ``folder``."""
    rows = []
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            info = os.lstat(os.path.join(place, name))
            rows.append((os.path.join(place, name), info.st_size, info.st_mtime_ns))
    return sorted(rows)


def campaign(
    make: Callable[[int, Path], Any], run: Callable[[Any, Path], str], seeds: range
) -> dict[str, Any]:
    """Make and run the case of every seed."""
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    guard, slowest, began, memory = Guard(), (0.0, -1), time.monotonic(), 0
    for count, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as name:
            made = make(seed, Path(name))
            before, start = state(Path(name)), time.monotonic()
            try:
                with limited(), guard.watching():
                    outcome = run(made, Path(name))
                if state(Path(name)) != before:
                    raise Written("the dataset is not as it was")
            except (Exception, Hang) as error:
                fault = "hang" if isinstance(error, Hang) else traceback.format_exc()
                failures.append({"seed": seed, "fault": fault})
                outcome = "FAILED"
            outcomes[outcome] += 1
            slowest = max(slowest, (time.monotonic() - start, seed))
        if count == 50:  # what imports and caches take is not the cases'
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cases": len(seeds),
        "first_seed": seeds.start,
        "outcomes": dict(sorted(outcomes.items())),
        "failures": failures,
        "slowest_seconds": round(slowest[0], 3),
        "slowest_seed": slowest[1],
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_mb": round(most / 1e3, 1),
        "memory_grown_mb": round((most - memory) / 1e3, 1) if memory else None,
    }


def main() -> int:
    """Run both campaigns; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--datasets", type=int, default=5000)
    parser.add_argument("--headers", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    arguments = parser.parse_args()
    first = arguments.first
    record = {
        **machine(),
        "headers": campaign(make_header, run_header, range(first, first + arguments.headers)),
        "datasets": campaign(make_dataset, run_dataset, range(first, first + arguments.datasets)),
    }
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    failures = [*record["headers"]["failures"], *record["datasets"]["failures"]]
    print(json.dumps({**record, "failures": failures[:10]}, indent=1))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
