# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any


def publish(source: Path, target: Path) -> Path:
    """Move a finished file to ``target`` on the same file system, whole or not at all.

    A hard link to a file elsewhere is copied first, so that outputs share nothing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_nlink > 1:
        copy = source.with_name(source.name + ".copy")
        shutil.copyfile(source, copy)
        os.replace(copy, source)
    os.chmod(source, 0o666 & ~_umask())
    with source.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(source, target)
    return target


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; leaves it alone if it says the same."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, default=str) + "\n")
