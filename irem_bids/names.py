# SPDX-License-Identifier: Apache-2.0
"""BIDS file names taken apart, and sidecars by the inheritance principle.

Names are read by their own entities here, not through a layout, because masks
of real derivative datasets often have names that no validator accepts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .database import Database

#: Entities in the order of the BIDS specification (short keys).
ENTITY_ORDER = (
    "sub", "ses", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce", "trc", "stain", "rec",
    "dir", "run", "mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split",
    "recording", "chunk", "seg", "res", "den", "label", "desc",
)  # fmt: skip
#: Long names that pybids uses for them, where they differ.
LONG_NAMES = {
    "sub": "subject", "ses": "session", "acq": "acquisition", "ce": "ceagent", "trc": "tracer",
    "rec": "reconstruction", "dir": "direction", "mod": "modality", "nuc": "nucleus",
    "stain": "staining", "voi": "volume",
}  # fmt: skip
IMAGE_EXTENSIONS = (".nii.gz", ".nii")
MOST_SIDECAR_BYTES = 2**24


@dataclass(frozen=True)
class BidsName:
    """A file name as entities (short keys), suffix and extension.

    ``words`` are the parts without a dash before the last one: a name such as
    ``sub-01_T2w_desc-brain_mask.nii.gz`` has the word ``T2w``.
    """

    entities: dict[str, str]
    suffix: str
    extension: str
    words: tuple[str, ...] = field(default=())


def parse_name(name: str) -> BidsName:
    """Take a file name apart; never fails.

    >>> parse_name("sub-01_run-4_T2w_desc-brain_mask.nii.gz")
    BidsName(entities={'sub': '01', 'run': '4', 'desc': 'brain'}, suffix='mask', \
extension='.nii.gz', words=('T2w',))
    """
    stem, dot, extension = Path(name).name.partition(".")
    parts = stem.split("_")
    suffix = parts.pop() if "-" not in parts[-1] else ""
    entities: dict[str, str] = {}
    words: list[str] = []
    for part in parts:
        key, dash, value = part.partition("-")
        if dash:
            entities[key] = value
        else:
            words.append(part)
    return BidsName(entities, suffix, dot + extension, tuple(words))


def join_entities(entities: Mapping[str, str]) -> str:
    """Entities as a name, in BIDS order.

    >>> join_entities({"part": "mag", "sub": "01", "ce": "gd"})
    'sub-01_ce-gd_part-mag'
    """
    order = {key: number for number, key in enumerate(ENTITY_ORDER)}
    keys = sorted(entities, key=lambda key: (order.get(key, len(order)), key))
    return "_".join(f"{key}-{entities[key]}" for key in keys)


def strip_prefix(label: str, prefix: str) -> str:
    """'sub-01' or '01' to '01'."""
    return label.strip().removeprefix(prefix)


def natural_key(text: str) -> tuple:
    """Sort key under which run-2 comes before run-10."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text))


def same_value(first: str | None, second: str | None) -> bool:
    """Equal labels; numbers are equal whatever their zeros (run-1 and run-01)."""
    if first is None or second is None:
        return first is second
    if first.isdigit() and second.isdigit():
        return int(first) == int(second)
    return first == second


class Sidecars:
    """JSON metadata of images by the inheritance principle, folders read once.

    ``database`` remembers contents between runs; ``fields`` are all that is kept of them.
    """

    def __init__(
        self, root: Path, database: Database | None = None, fields: Sequence[str] | None = None
    ) -> None:
        self._root = root
        self._database = database or Database(root)
        self._fields = fields
        self._folders: dict[Path, list[tuple[BidsName, Path]]] = {}
        self._contents: dict[Path, dict[str, Any]] = {}
        self.errors: dict[Path, str] = {}

    def metadata(self, image: Path) -> tuple[dict[str, Any], list[str]]:
        """Merged metadata of an image and a message for each sidecar that is not valid JSON."""
        name = parse_name(image.name)
        merged: dict[str, Any] = {}
        problems: list[str] = []
        for folder in self._levels(image.parent):
            fitting = [
                (len(other.entities), path)
                for other, path in self._list(folder)
                if other.suffix == name.suffix and other.entities.items() <= name.entities.items()
            ]
            for _, path in sorted(fitting):
                merged.update(self._read(path))
                if path in self.errors:
                    problems.append(self.errors[path])
        return merged, problems

    def _levels(self, folder: Path) -> list[Path]:
        levels = [folder]
        while levels[-1] != self._root and self._root in levels[-1].parents:
            levels.append(levels[-1].parent)
        return levels[::-1]

    def _list(self, folder: Path) -> list[tuple[BidsName, Path]]:
        if folder not in self._folders:
            try:
                names = sorted(n for n in os.listdir(folder) if n.endswith(".json"))
            except OSError:
                names = []
            self._folders[folder] = [(parse_name(n), folder / n) for n in names]
        return self._folders[folder]

    def _read(self, path: Path) -> dict[str, Any]:
        if path not in self._contents:
            try:
                value = self._database.recall(path, "sidecar", lambda: self._parse(path))
            except FileNotFoundError:
                value, self.errors[path] = {}, f"{path.name} is missing (a link to nowhere)"
            except (OSError, ValueError, RecursionError) as error:
                value, self.errors[path] = {}, f"{path.name} is not valid JSON ({error})"
            self._contents[path] = value
        return self._contents[path]

    def _parse(self, path: Path) -> dict[str, Any]:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # a pipe would be waited for
        if path.stat().st_size > MOST_SIDECAR_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, expected an object")
        if self._fields is None:
            return value
        return {key: value[key] for key in self._fields if key in value}
