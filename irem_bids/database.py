# SPDX-License-Identifier: Apache-2.0
"""Memory of what was read of a dataset's files, for ``--bids-database-dir``.

A file is read again when its size or the time of its last change differs.  Tasks may
share the folder: the file in it appears whole, and what two tasks write at once is
at worst read again later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import write_text
from .exitcodes import ExitCode, UserError

FILE_NAME = "irem-bids-files.json"
VERSION = 1


class Database:
    """Values read from files, kept between runs if there is a folder for them.

    Raises
    ------
    UserError
        The folder's memory is of another dataset (64).
    """

    def __init__(self, root: Path, folder: str | Path | None = None) -> None:
        self._root = root
        self._path = Path(folder) / FILE_NAME if folder else None
        self._entries: dict[str, list[Any]] = self._load() if self._path else {}
        self._changed = False

    def recall(self, path: Path, kind: str, read: Callable[[], Any]) -> Any:
        """What ``read()`` returned for this file as it is now; errors are not kept.

        ``kind`` tells several values of one file apart; values are of JSON's types.
        """
        if self._path is None:
            return read()
        try:
            status = os.stat(path)
        except OSError:
            return read()
        key = f"{kind}:{os.path.relpath(path, self._root)}"
        entry = self._entries.get(key)
        if entry is not None and entry[:2] == [status.st_size, status.st_mtime_ns]:
            return entry[2]
        value = read()
        self._entries[key] = [status.st_size, status.st_mtime_ns, value]
        self._changed = True
        return value

    def save(self) -> None:
        """Write what is new.

        Raises
        ------
        UserError
            The folder cannot be written (73).
        """
        if self._path is None or not self._changed:
            return
        content = {"version": VERSION, "dataset": str(self._root), "files": self._entries}
        try:
            write_text(self._path, json.dumps(content, separators=(",", ":")))
        except OSError as error:
            raise UserError(
                f"--bids-database-dir {self._path.parent}: cannot be written "
                f"({error.strerror}); choose another folder or none",
                ExitCode.CANNOT_CREATE,
            ) from error
        self._changed = False

    def _load(self) -> dict[str, list[Any]]:
        assert self._path is not None
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                return {}
            dataset, files = content["dataset"], dict(content["files"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or none of ours
            return {}
        if dataset != str(self._root):
            raise UserError(
                f"--bids-database-dir {self._path.parent}: is of another dataset than "
                f"{self._root} ({dataset}); give an empty folder or none",
                ExitCode.USAGE,
            )
        return files
