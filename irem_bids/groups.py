# SPDX-License-Identifier: Apache-2.0
"""Groups of stacks as plain data, and as text for a dry run; standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .names import join_entities


@dataclass(frozen=True)
class StackFile:
    """One acquired stack on disk; sizes in mm, shape in voxels.

    ``label`` is unique in the group (``axial1``); ``thickness_source`` is
    'sidecar', 'spacing' or 'setting'; URIs are BIDS URIs; ``slice_times`` in
    seconds along the array's axis, where the sidecar has a sound ``SliceTiming``.
    """

    path: str
    label: str
    plane: str
    shape: tuple[int, int, int]
    in_plane: tuple[float, float]
    spacing: float
    slice_thickness: float
    thickness_source: str
    mask: str | None
    uri: str
    mask_uri: str | None = None
    slice_times: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Excluded:
    """An image that is not used, and why; ``damaged`` if it should have been usable."""

    path: str
    reason: str
    damaged: bool = dataclasses.field(default=False, compare=False)


@dataclass(frozen=True)
class Group:
    """The stacks of one subject, session and contrast (labels without prefix)."""

    subject: str
    session: str | None
    suffix: str
    entities: dict[str, str]
    stacks: tuple[StackFile, ...]
    excluded: tuple[Excluded, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique name: ``sub-01_ses-1_ce-gd_T1w``."""
        return _group_name(self.subject, self.session, self.suffix, self.entities)

    @property
    def planes(self) -> tuple[str, ...]:
        """The orientations there are, sorted."""
        return tuple(sorted({stack.plane for stack in self.stacks}))

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries and lists, safe for JSON."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Group:
        """The inverse of :meth:`to_dict`."""
        stacks = tuple(StackFile(**{k: _frozen(v) for k, v in s.items()}) for s in value["stacks"])
        excluded = tuple(Excluded(**e) for e in value["excluded"])
        return cls(
            value["subject"],
            value["session"],
            value["suffix"],
            dict(value["entities"]),
            stacks,
            excluded,
            tuple(value["warnings"]),
        )


@dataclass(frozen=True)
class Rejected:
    """A would-be group that cannot be reconstructed, or was not asked for."""

    name: str
    reason: str
    excluded: tuple[Excluded, ...] = ()

    @property
    def damage(self) -> str:
        """What was wrong with damaged images that it lacks; empty if none is damaged."""
        damaged = [e for e in self.excluded if e.damaged]
        return "; ".join(f"{Path(e.path).name}: {e.reason}" for e in damaged)


@dataclass(frozen=True)
class Discovery:
    """Everything found.

    ``excluded`` holds what cannot be used, ``not_asked`` usable groups that the
    choice of contrasts leaves out; ``notes`` concern the whole dataset.
    """

    groups: tuple[Group, ...]
    excluded: tuple[Rejected, ...] = ()
    not_asked: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()


def describe(discovery: Discovery, estimates: Mapping[str, object] | None = None) -> str:
    """The groups, and each image that is left out with its reason, as text.

    ``estimates`` are by the groups' names.
    """
    lines: list[str] = []
    for group in discovery.groups:
        lines.append(f"{group.name}: {len(group.stacks)} stacks, {', '.join(group.planes)}")
        for s in group.stacks:
            size = "×".join(str(n) for n in s.shape)
            mask = f", mask {Path(s.mask).name}" if s.mask else ""
            lines.append(
                f"  {s.label}: {Path(s.path).name}, {size} voxels, {s.in_plane[0]:.4g} × "
                f"{s.in_plane[1]:.4g} mm in plane, slices {s.slice_thickness:.4g} mm thick "
                f"({s.thickness_source}) every {s.spacing:.4g} mm{mask}"
            )
        if estimates is not None:
            lines.append(f"  estimate: {estimates[group.name]}")
        lines += [f"  warning: {text}" for text in group.warnings]
        lines += _left_out(group.excluded)
    for title, rejected in (
        ("cannot be used", discovery.excluded),
        ("not asked for", discovery.not_asked),
    ):
        for item in rejected:
            lines.append(f"{item.name}: {title}: {item.reason}")
            lines += _left_out(item.excluded)
    lines += [f"note: {text}" for text in discovery.notes]
    count = len(discovery.groups)
    lines.append(f"{count} group{'' if count == 1 else 's'} to reconstruct")
    return "\n".join(lines) + "\n"


def _left_out(excluded: tuple[Excluded, ...]) -> list[str]:
    return [f"  left out: {Path(e.path).name}: {e.reason}" for e in excluded]


def _group_name(subject: str, session: str | None, suffix: str, entities: dict[str, str]) -> str:
    every = {"sub": subject, **({"ses": session} if session is not None else {}), **entities}
    return f"{join_entities(every)}_{suffix}"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
