# SPDX-License-Identifier: Apache-2.0
"""Groups are claimed before they are worked on, so that runs side by side share no group.

A claim is a lock of the operating system on a hidden file, in the output and in the work
folder; it ends with the process, however that ends.  Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

PREFIX = ".irem-bids-"
STALE = 600.0  # s after which a hidden file that a run writes is one that it has left
#: What a run writes before it is renamed, and what it tries a folder with.
_LEFTOVER = re.compile(r"\.(\d+)\..+|\.irem-bids-[0-9a-f]{32}")


class Claims:
    """What this process works on; use as a context manager.

    ``folders`` must exist; every process takes them in the same order.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = sorted(set(folders))
        self._held: dict[str, list[IO[str]]] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a group; False where another process has it.

        Raises
        ------
        OSError
            The lock cannot be made (no space, no permission).
        """
        files: list[IO[str]] = []
        for folder in self._folders:
            file = _lock(folder / f"{PREFIX}{name}.lock", wait=False)
            if file is None:
                _unlock(files)
                return False
            files.append(file)
        self._held[name] = files
        return True

    def sweep(self, name: str) -> None:
        """Remove what a run that was killed left of a group that is held."""
        for folder in self._folders if name in self._held else ():
            shutil.rmtree(folder / f"{PREFIX}{name}", ignore_errors=True)

    def release(self, name: str) -> None:
        """Let others have the group."""
        _unlock(self._held.pop(name, []))


def sweep(folder: Path) -> None:
    """Remove hidden files that runs which were killed have left, long ago.

    A file's age is counted on the clock of its file system, which may be a server's; a clock
    that was set says a wrong age, so that what a living process here writes stays in any case.
    """
    before = _clock_of(folder) - STALE
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            found = _LEFTOVER.fullmatch(name)
            with contextlib.suppress(OSError):
                if found and not _lives(found[1]) and path.stat().st_mtime < before:
                    path.unlink()


def _clock_of(folder: Path) -> float:
    """The time that the file system gives a file that is written now."""
    probe = folder / f"{PREFIX}{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _lives(process: str | None) -> bool:
    """Whether there is a process of this number."""
    return process is not None and Path("/proc", process).exists()


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process is within the same name."""
    file = _lock(folder / f"{PREFIX}{name}.lock", wait=True)
    try:
        yield
    finally:
        _unlock([file] if file else [])


def _lock(path: Path, *, wait: bool) -> IO[str] | None:
    """The locked file; None where another process has it.

    A file that was removed between opening and locking is not the one that others see.
    """
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _same(file, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        file.close()


def _same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(files: list[IO[str]]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        file.close()
