# SPDX-License-Identifier: Apache-2.0
"""Names of the derivatives.

They come from path patterns that pybids and niworkflows' ``DerivativesDataSink`` share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .groups import Group

LONG_NAMES = {
    "task": "task",
    "acq": "acquisition",
    "ce": "ceagent",
    "trc": "tracer",
    "rec": "reconstruction",
    "run": "run",
    "echo": "echo",
    "flip": "flip",
    "inv": "inv",
    "mt": "mt",
    "part": "part",
}
_START = "sub-{subject}[/ses-{session}]/{datatype<anat>|anat}/sub-{subject}[_ses-{session}]"
_SHARED = (
    "[_task-{task}][_acq-{acquisition}][_ce-{ceagent}][_trc-{tracer}][_rec-{reconstruction}]"
    "[_run-{run}][_mod-{modality}][_echo-{echo}][_flip-{flip}][_inv-{inv}][_mt-{mt}][_part-{part}]"
)
PATTERNS = [
    _START + _SHARED + "[_space-{space}][_desc-{desc}]_{suffix<T1w|T2w|PDw|FLAIR|mask>}"
    "{extension<.nii.gz|.json>|.nii.gz}",
    _START + _SHARED + "_from-{from}_to-{to}_mode-{mode<image|points>|image}[_desc-{desc}]"
    "_{suffix<xfm>|xfm}{extension<.txt>|.txt}",
    _START + _SHARED + "[_desc-{desc}]_{suffix<std>}{extension<.nii.gz|.json>|.nii.gz}",
    _START + _SHARED + "[_desc-{desc}]_{suffix<qc>}{extension<.json|.tsv>|.json}",
    _START + _SHARED + "[_desc-{desc}]_{suffix<model>}{extension<.safetensors>|.safetensors}",
]


def base_entities(group: Group) -> dict[str, str]:
    """Long-named entities that every file of a group has."""
    entities = {"subject": group.subject, "datatype": "anat"}
    if group.session:
        entities["session"] = group.session
    for short, value in group.entities.items():
        entities[LONG_NAMES[short]] = str(value)
    return entities


def contrast_entity(group: Group, suffix: str) -> dict[str, str]:
    """The entity that keeps contrasts apart in files whose suffix does not name it.

    T1w has none.  Another contrast's masks carry ``space-<contrast>`` (the grid of that
    reconstruction), which BIDS knows; files outside BIDS carry ``mod-<contrast>``.
    """
    if group.suffix == "T1w" or suffix == group.suffix:
        return {}
    return {"space" if suffix == "mask" else "modality": group.suffix}


def relative_path(group: Group, **entities: str) -> str:
    """Path of a derivative below the output folder; ``entities`` have long names.

    Raises
    ------
    ValueError
        No pattern fits the entities.
    """
    from bids.layout.writing import build_path

    named = {**base_entities(group), **contrast_entity(group, entities["suffix"]), **entities}
    path = build_path(named, PATTERNS)
    if not path:
        raise ValueError(f"no name of a derivative fits the entities {named}")
    return str(path)


def image_path(group: Group, method: str) -> str:
    """Path of a method's reconstruction below the output folder."""
    return relative_path(group, desc=method, suffix=group.suffix, extension=".nii.gz")


def registered_path(group: Group, label: str) -> str:
    """Path of a registered stack below the output folder."""
    return relative_path(
        group, acquisition=label, desc="registered", suffix=group.suffix, extension=".nii.gz"
    )


def sidecar_path(group: Group, method: str) -> str:
    """Path of the reconstruction's sidecar below the output folder."""
    return relative_path(group, desc=method, suffix=group.suffix, extension=".json")


def completed_key(output_dir: Path, group: Group, method: str) -> str | None:
    """The key in the sidecar of a finished reconstruction, or None."""
    try:
        sidecar = json.loads((output_dir / sidecar_path(group, method)).read_text())
        key = sidecar["IremBids"]["Key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if (output_dir / image_path(group, method)).is_file() else None


def page_path(group: Group, output_dir: Path) -> Path:
    """The HTML page of a group's participant and session."""
    session = f"_ses-{group.session}" if group.session else ""
    return output_dir / f"sub-{group.subject}{session}.html"
