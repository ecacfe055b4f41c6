# SPDX-License-Identifier: Apache-2.0
"""The flow: normalise, optimise, reconstruct, report, save; one chain per group."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.interfaces.utility import Merge
from nipype.pipeline.engine import Node, Workflow

from . import completion
from .cost import BASE_GB, memory_gb
from .interfaces import Normalise, Optimise, Reconstruct, Report, Save
from .resources import Resources
from .settings import Settings

if TYPE_CHECKING:
    from .groups import Group

COHORT_NAME = "irem_bids_wf"


@dataclass(frozen=True)
class Place:
    """Where a run works and with what.

    Attributes
    ----------
    output_dir, work_dir
        Absolute folders.
    own
        Folder below ``work_dir`` of what is known by its name only: each output has one, for
        ``sub-01`` is in many a dataset.
    resources
        Limits of the run.
    provenance
        What the run says of itself in sidecars and reports.
    """

    output_dir: Path
    work_dir: Path
    own: Path
    resources: Resources
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, one per key."""
        return self.work_dir / "checkpoints"

    @property
    def reports(self) -> Path:
        """Folder of what reports are made from."""
        return self.own / "reports"

    def group_folder(self, group: Group) -> Path:
        """Folder of a group's nodes."""
        return self.own / COHORT_NAME / workflow_name(group)


def workflow_name(group: Group) -> str:
    """``sub-01_ses-1_T1w`` as ``sub_01_ses_1_T1w_wf``."""
    return re.sub(r"\W", "_", group.name) + "_wf"


def init_cohort_wf(*, groups: Iterable[Group], settings: Settings, place: Place) -> Workflow:
    """All groups side by side, as resources allow.

    Inputs and outputs: none; each group's chain knows its files and where to save.
    """
    cohort_wf = Workflow(name=COHORT_NAME, base_dir=str(place.own))
    cohort_wf.add_nodes(
        [init_group_wf(group=group, settings=settings, place=place) for group in groups]
    )
    return cohort_wf


def init_group_wf(*, group: Group, settings: Settings, place: Place) -> Workflow:
    """One group: its stacks to reconstructions, one per method.

    Inputs
    ------
    none; the group is a constant of the graph

    Outputs
    -------
    none; ``save`` writes into the output folder
    """
    group_wf = Workflow(name=workflow_name(group), base_dir=str(place.own))
    methods = list(settings.output.method)
    described = group.to_dict()
    threads = place.resources.threads
    result = {
        "label": group.name,
        "group": described,
        "settings": settings.to_dict(),
        "methods": methods,
        "provenance": place.provenance,
        "output_dir": str(place.output_dir),
    }

    normalise = Node(
        Normalise(
            label=group.name,
            group=described,
            settings=completion.normalise_settings(settings),
            threads=threads,
        ),
        name="normalise",
        n_procs=threads,
        mem_gb=memory_gb(group, settings, place.resources),
    )
    folders = Node(Merge(len(methods)), name="folders", run_without_submitting=True)
    keys = Node(Merge(len(methods)), name="keys", run_without_submitting=True)
    base_gb = min(BASE_GB, place.resources.memory_gb)
    report = Node(Report(reports=str(place.reports), **result), name="report", mem_gb=base_gb)
    save = Node(Save(**result), name="save", mem_gb=base_gb)

    for number, method in enumerate(methods, start=1):
        optimise, reconstruct = init_method_nodes(
            method=method, group=group, settings=settings, place=place
        )
        group_wf.connect([
            (normalise, optimise, [("prepared", "prepared"), ("key", "prepared_key")]),
            (normalise, reconstruct, [("prepared", "prepared")]),
            (optimise, reconstruct, [("model", "model"), ("key", "model_key")]),
            (reconstruct, folders, [("folder", f"in{number}")]),
            (reconstruct, keys, [("key", f"in{number}")]),
        ])  # fmt: skip

    group_wf.connect([
        (normalise, report, [("prepared", "prepared")]),
        (folders, report, [("out", "folders")]),
        (keys, report, [("out", "keys")]),
        (normalise, save, [("prepared", "prepared")]),
        (folders, save, [("out", "folders")]),
        (keys, save, [("out", "keys")]),
        (report, save, [("page", "page")]),
    ])  # fmt: skip
    return group_wf


def init_method_nodes(
    *, method: str, group: Group, settings: Settings, place: Place
) -> tuple[Node, Node]:
    """Optimise and reconstruct of one method; a GPU node takes one slot and one processor."""
    resources = place.resources
    common = {
        "label": group.name,
        "settings": completion.method_settings(settings, method),
        "checkpoints": str(place.checkpoints),
        "devices": list(resources.claims),
        "use_gpu": resources.gpu,
        "threads": resources.threads,
    }
    needs = {
        "n_procs": 1 if resources.gpu else resources.threads,
        "mem_gb": memory_gb(group, settings, resources),
    }
    training = {"checkpoint_seconds": settings.run.checkpoint_seconds, "afresh": settings.run.force}
    optimise = Node(
        Optimise(method=method, **training, **common), name=f"optimise_{method}", **needs
    )
    reconstruct = Node(Reconstruct(**common), name=f"reconstruct_{method}", **needs)
    return optimise, reconstruct
