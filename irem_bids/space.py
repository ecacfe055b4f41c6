# SPDX-License-Identifier: Apache-2.0
"""Is there room for the result, and what to say where there was none.  Standard library only."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .exitcodes import ExitCode, UserError
from .settings import Settings

if TYPE_CHECKING:
    from .groups import Group

#: Bytes per voxel of the result, and once: what was measured, rounded down.
OUTPUT_BYTES, OUTPUT_BASE = 1.0, 250_000
WORK_BYTES, WORK_BASE = 10.0, 200_000
MODEL_BYTES, STACK_BYTES = 4.0, 1.5
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: A mount that is lost says one of the later ones: NFS, FUSE, and a server that is gone.
_STORAGE = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN,
            errno.EREMOTEIO, errno.EHOSTDOWN)  # fmt: skip
_WORDS = ("no space left on device", "disk quota exceeded", "disk is full", "read-only file system",
          "input/output error", "stale file handle", "transport endpoint is not connected",
          "remote i/o error", "host is down", "file too large")  # fmt: skip


def is_storage(error: BaseException | str) -> bool:
    """Whether an error, or what it came from, is of the disk: full, read-only, lost."""
    text = str(error).lower()
    if any(words in text for words in _WORDS):
        return True
    if isinstance(error, str):
        return False
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_storage(cause)


def needed(group: Group, settings: Settings) -> tuple[float, float]:
    """Bytes that a group needs at least in the output and in the work folder."""
    finest = settings.output.output_resolution or min(min(s.in_plane) for s in group.stacks)
    box = max(math.prod(s.shape) * math.prod(s.in_plane) * s.spacing for s in group.stacks)
    voxels, methods = box / finest**3, len(settings.output.method)
    model = MODEL_BYTES if settings.output.model_out else 0.0
    registered = len(group.stacks) if settings.output.save_registered else 0
    output = voxels * (methods * (OUTPUT_BYTES + model) + registered * OUTPUT_BYTES)
    work = voxels * methods * WORK_BYTES
    work += STACK_BYTES * sum(math.prod(stack.shape) for stack in group.stacks)
    return output + OUTPUT_BASE, work + WORK_BASE


def check_space(
    groups: Sequence[Group], settings: Settings, output_dir: Path, work_dir: Path
) -> str | None:
    """A warning where not all groups have room; folders must exist.

    Raises
    ------
    UserError
        Not even one group has (73).
    """
    if not groups:
        return None
    rows = [needed(group, settings) for group in groups]
    for folder, first, every in _places(rows, output_dir, work_dir):
        free = free_bytes(folder)
        if free < first:
            raise UserError(
                f"{folder}: too little space: {size(free)} free, about {size(first)} needed for "
                "one group; make room, or choose another folder",
                ExitCode.CANNOT_CREATE,
            )
        if free < every:
            return f"{folder}: {size(free)} free, about {size(every)} needed for all groups"
    return None


def _places(
    rows: list[tuple[float, float]], output_dir: Path, work_dir: Path
) -> list[tuple[Path, float, float]]:
    """``(folder, bytes for the smallest group, bytes for all)``, one per file system."""
    totals = [sum(row[k] for row in rows) for k in (0, 1)]
    if os.stat(output_dir).st_dev == os.stat(work_dir).st_dev:
        return [(output_dir, min(map(sum, rows)), sum(totals))]
    return [
        (output_dir, min(row[0] for row in rows), totals[0]),
        (work_dir, min(row[1] for row in rows), totals[1]),
    ]


def told(groups: Iterable[Group], settings: Settings, output_dir: Path, work_dir: Path) -> str:
    """Free and needed space, for the message of a run that the disk has stopped."""
    rows = [needed(group, settings) for group in groups]
    places = [(f, free_bytes(f), every) for f, _, every in _places(rows, output_dir, work_dir)]
    parts = [
        f"{folder} has {size(free)} free, about {size(every)} are needed"
        for folder, free, every in places
    ]
    if all(free >= every for _, free, every in places):
        parts.append("a quota, or a limit on the size of files, may be smaller than that")
    return "; ".join([*parts, "make room; the same command goes on from here"])


def free_bytes(folder: Path) -> float:
    """Bytes that this user may still write below an existing folder; 0 if it is lost."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0.0
    return float(found.f_bavail * found.f_frsize)


def size(count: float) -> str:
    """Bytes as text.

    >>> size(0), size(12_345_678), size(3.2e9)
    ('0.00 MB', '12.3 MB', '3.2 GB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
