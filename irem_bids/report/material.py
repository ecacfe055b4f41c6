# SPDX-License-Identifier: Apache-2.0
"""What a report is made from: the group's working folder, read leniently.

A report is also wanted when something failed, so a part that is absent or
unreadable becomes an entry of :attr:`Material.problems`, never an exception.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..reconstruction.geometry import Grid, RigidTransform
from ..reconstruction.stack import FloatImage, Mask, Stack, read_image
from ..settings import Settings

if TYPE_CHECKING:
    from ..reconstruction.prepare import Prepared
    from .slices import SliceFit

LOG = logging.getLogger(__name__)


class StackFileLike(Protocol):
    """The part of ``bids.StackFile`` that a report shows."""

    @property
    def path(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def plane(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def in_plane(self) -> tuple[float, float]: ...
    @property
    def spacing(self) -> float: ...
    @property
    def slice_thickness(self) -> float: ...
    @property
    def thickness_source(self) -> str: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def uri(self) -> str: ...


class ExcludedLike(Protocol):
    """An image that was left out, and why."""

    @property
    def path(self) -> str: ...
    @property
    def reason(self) -> str: ...


class GroupLike(Protocol):
    """The part of ``bids.Group`` that a report shows."""

    @property
    def subject(self) -> str: ...
    @property
    def session(self) -> str | None: ...
    @property
    def suffix(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def stacks(self) -> Sequence[StackFileLike]: ...
    @property
    def excluded(self) -> Sequence[ExcludedLike]: ...
    @property
    def warnings(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class ReportInput:
    """One group of stacks, where its results lie, and how they were made.

    Attributes
    ----------
    group
        The group, as discovery made it.
    prepared
        Folder of ``Prepared.save``; ``None`` where that step never ended.
    methods
        Folder of each method: ``volume.nii.gz``, ``whole.nii.gz``, ``mask.nii.gz``, ``std.nii.gz``,
        ``fit.json``, ``model.safetensors``, ``quality.json``; any of them may be missing.
    settings
        The settings of the run.
    provenance
        ``versions`` {name: version}, ``device``, ``seconds`` {step: s},
        ``command_line`` and whatever else is worth a row.
    errors
        One dictionary per failure: ``step``, ``message``, ``traceback``.
    out_dir
        The derivatives folder.
    """

    group: GroupLike
    prepared: Path | None
    methods: Mapping[str, Path]
    settings: Settings
    provenance: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[Mapping[str, str]] = ()
    out_dir: Path | None = None


@dataclass(frozen=True)
class MethodResult:
    """What one method left in its folder.

    ``volume`` is in the units of the reference stack, ``std`` (its standard deviation) too, and
    ``whole``: the volume before masks cut it, which is what predicts the stacks;
    ``poses`` map each stack's scanner coordinates into reference space (RAS+ mm).
    """

    name: str
    folder: Path
    volume: FloatImage | None = None
    grid: Grid | None = None
    mask: Mask | None = None
    std: FloatImage | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    whole: FloatImage | None = None
    poses: dict[str, RigidTransform] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)  # all of fit.json


@dataclass
class Material:
    """Everything that could be read of one group."""

    inp: ReportInput
    prepared: Prepared | None = None
    methods: dict[str, MethodResult] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def reference(self) -> Stack | None:
        """The stack whose scanner coordinates are reference space."""
        return None if self.prepared is None else self.prepared.stacks[self.prepared.reference]

    def pose_sets(self) -> dict[str, list[RigidTransform]]:
        """Poses in the stacks' order: 'registration', then the methods that changed them."""
        if self.prepared is None:
            return {}
        registered = list(self.prepared.poses)
        sets = {"registration": registered}
        labels = [stack.label for stack in self.prepared.stacks]
        for result in self.methods.values():
            if all(label in result.poses for label in labels):
                poses = [result.poses[label] for label in labels]
                if poses != registered:
                    sets[result.name] = poses
        return sets

    @cached_property
    def scales(self) -> dict[str, float]:
        """Intensity of each stack as acquired over its scaled one; {} where files are gone.

        The stacks were scaled alike when they were prepared, so this alone tells a gain.
        """
        if self.prepared is None:
            return {}
        paths = {s.label: s.path for s in self.inp.group.stacks}
        stacks = self.prepared.stacks
        if not all(s.label in paths and Path(paths[s.label]).is_file() for s in stacks):
            return {}
        try:
            return {s.label: raw_scale(s, paths[s.label]) for s in stacks}
        except Exception as error:  # the file may have changed since
            LOG.debug("the stacks as acquired cannot be compared: %s", error)
            return {}

    @cached_property
    def slice_fits(self) -> dict[str, SliceFit]:
        """How each slice of each stack agrees with the result (:mod:`.slices`)."""
        from .slices import fit_slices

        return fit_slices(self)

    def problem(self, what: str, error: BaseException) -> None:
        """Remember that ``what`` could not be shown."""
        text = f"{what}: {type(error).__name__}: {error}"
        LOG.warning("report of %s: %s", self.inp.group.name, text)
        self.problems.append(text)


def load(inp: ReportInput) -> Material:
    """Read the working folder of a group; what fails is listed in ``problems``."""
    material = Material(inp)
    if inp.prepared is not None and (Path(inp.prepared) / "prepared.json").exists():
        try:
            from ..reconstruction.prepare import Prepared

            material.prepared = Prepared.load(Path(inp.prepared))
        except Exception as error:  # whatever is wrong with it, the page must be built
            material.problem("the prepared stacks cannot be read", error)
    for name, folder in inp.methods.items():
        try:
            material.methods[name] = _method(name, Path(folder))
        except Exception as error:
            material.problem(f"the result of {name} cannot be read", error)
            continue
        try:
            material.methods[name] = replace(material.methods[name], std=_std(Path(folder)))
        except Exception as error:
            material.problem(f"the uncertainty of {name} cannot be read", error)
    return material


def _method(name: str, folder: Path) -> MethodResult:
    volume, whole, grid, mask = None, None, None, None
    if (folder / "volume.nii.gz").exists():
        volume, grid = read_image(folder / "volume.nii.gz")
        mask, whole = volume != 0, volume
        if (folder / "whole.nii.gz").exists():
            whole, _ = read_image(folder / "whole.nii.gz")
        if (folder / "mask.nii.gz").exists():
            mask = read_image(folder / "mask.nii.gz")[0] > 0.5
    fit = _json(folder / "fit.json")
    return MethodResult(
        name=name,
        folder=folder,
        volume=volume,
        whole=whole,
        grid=grid,
        mask=mask,
        quality=_json(folder / "quality.json"),
        poses={k: RigidTransform(np.array(v)) for k, v in fit.get("poses", {}).items()},
        gains={k: float(v) for k, v in fit.get("gains", {}).items()},
        history=fit.get("history", {}),
        info=fit.get("info", {}),
        fit=fit,
    )


def _std(folder: Path) -> FloatImage | None:
    """``std.nii.gz`` of a method's folder, where it left one on the grid of its volume."""
    if not (folder / "std.nii.gz").exists():
        return None
    values, grid = read_image(folder / "std.nii.gz")
    _, expected = read_image(folder / "volume.nii.gz")
    if grid.shape != expected.shape or not np.allclose(grid.affine, expected.affine, atol=1e-3):
        raise ValueError(f"std.nii.gz is {grid.shape}, the volume {expected.shape}")
    return values


def raw_scale(stack: Stack, path: str) -> float:
    """Median ratio of the image at ``path`` to the prepared ``stack`` in its foreground."""
    raw, grid = read_image(path)
    where = np.argwhere(stack.mask & (stack.data > 0.1))
    where = where[:: max(1, len(where) // 5000)]
    index = np.round(grid.to_index(stack.grid.to_world(where))).astype(int)
    return float(np.median(raw[tuple(index.T)] / stack.data[tuple(where.T)]))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def step_record(folder: Path | None) -> dict[str, Any]:
    """What the workflow noted beside a result: ``device`` and ``seconds`` {step: s}."""
    return {} if folder is None else _json(Path(folder) / "step.json")


def method_seconds(result: MethodResult) -> float | None:
    """Seconds that a method took in all, where that was noted."""
    times = step_record(result.folder).get("seconds")
    if times:
        return float(sum(times.values()))
    value = result.info.get("seconds")
    return float(value) if isinstance(value, (int, float)) else None
