# SPDX-License-Identifier: Apache-2.0
"""Keys that tell whether a result is still the one that would be computed.

A key is a hash of the content of the inputs, of the settings that can change an
image and of the version.  It names checkpoints, travels through the nodes and is
kept in the sidecar of each reconstruction.  Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from . import __version__
from .settings import SECTIONS, Settings

METHOD_SECTIONS = {
    "irem": ("acquisition", "srr", "irem"),
    "irem2021": ("acquisition", "irem2021"),
    "srr": ("acquisition", "srr"),
    "bspline": ("acquisition",),
}
IMAGE_SETTINGS = ("output_resolution", "margin", "uncertainty")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def section(settings: Settings, name: str) -> dict[str, Any]:
    """One section as a dictionary, without the options that cannot change a result."""
    free = {f.name for f in dataclasses.fields(SECTIONS[name]) if f.metadata["nohash"]}
    return {key: value for key, value in settings.to_dict()[name].items() if key not in free}


def normalise_settings(settings: Settings) -> dict[str, dict[str, Any]]:
    """The sections that the normalised stacks depend on."""
    return {
        "normalise": section(settings, "normalise"),
        "acquisition": section(settings, "acquisition"),
        "run": section(settings, "run"),
    }


def method_settings(settings: Settings, method: str) -> dict[str, dict[str, Any]]:
    """The sections that one method's image depends on."""
    output = section(settings, "output")
    tables = {name: section(settings, name) for name in METHOD_SECTIONS[method]}
    tables["output"] = {name: output[name] for name in IMAGE_SETTINGS}
    tables["normalise"] = section(settings, "normalise")
    tables["run"] = section(settings, "run")
    return tables


def inputs_key(group: dict[str, Any], settings: dict[str, Any]) -> str:
    """Key of a group's normalised stacks; reads every input file.

    ``group`` is :meth:`Group.to_dict`, ``settings`` is :func:`normalise_settings`.
    Paths do not enter, so data that moved are the same data.
    """
    stacks = []
    for stack in group["stacks"]:
        described = {key: value for key, value in stack.items() if key not in ("path", "mask")}
        described["content"] = file_digest(stack["path"])
        described["mask"] = file_digest(stack["mask"]) if stack["mask"] else None
        stacks.append(described)
    return digest([stacks, _by_content(settings), __version__])


def method_key(inputs: str, method: str, settings: dict[str, Any]) -> str:
    """Key of one method's result; ``settings`` is :func:`method_settings`."""
    return digest([inputs, method, _by_content(settings), __version__])


def _by_content(settings: dict[str, Any]) -> dict[str, Any]:
    """The sections with the content of a measured profile instead of its path."""
    acquisition = dict(settings["acquisition"])
    if acquisition["profile_file"] is not None:
        acquisition["profile_file"] = file_digest(acquisition["profile_file"])
    return {**settings, "acquisition": acquisition}
