# SPDX-License-Identifier: Apache-2.0
"""What disagrees with an image and does not rule it out: one rule each, and a warning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .reconstruction.geometry import Grid
from .reconstruction.stack import read_image

#: Labels that name an orientation; the first letters tell which.
_ORIENTATION = re.compile(
    r"^(ax|axi|axial|tra|trans|transverse|transversal|cor|coronal|sag|sagittal)\d*$", re.IGNORECASE
)
_PLANES = {"a": "axial", "t": "axial", "c": "coronal", "s": "sagittal"}
#: A sidecar's thickness over the spacing beyond which a gap or an overlap is told.
THICKNESS_TOLD = (0.7, 1.1)


def label_doubts(entities: Mapping[str, str], plane: str) -> list[str]:
    """The orientation in the name against that of the header, which counts."""
    label = entities.get("acq", "")
    if not _ORIENTATION.match(label) or _PLANES[label[0].lower()] == plane:
        return []
    return [f"is named acq-{label} and its header says {plane}: the header was believed"]


def thickness_doubts(thickness: float, spacing: float, source: str) -> list[str]:
    """A believed sidecar whose slices leave a wide gap or overlap."""
    low, high = (factor * spacing for factor in THICKNESS_TOLD)
    if source != "sidecar" or low <= thickness <= high:
        return []
    what = "a gap of" if thickness < spacing else "an overlap of"
    return [
        f"slices {thickness:g} mm thick (sidecar) every {spacing:g} mm (header) leave {what} "
        f"{abs(spacing - thickness):.3g} mm: both were believed"
    ]


def mask_doubts(path: str | Path, grid: Grid) -> list[str]:
    """A mask (readable) that is no plain choice of voxels of ``grid``."""
    name = Path(path).name
    values, own = read_image(path)
    found = []
    if own != grid:
        found.append(f"its mask {name} is on another grid: the nearest voxels were taken")
    if np.count_nonzero(values == values.min()) + np.count_nonzero(values == values.max()) < (
        values.size
    ):
        found.append(f"its mask {name} has more than two values: those above 0.5 were taken")
    if (values > 0.5).all():
        found.append(f"its mask {name} holds every voxel: the head was found without it")
    return found
