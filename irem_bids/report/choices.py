# SPDX-License-Identifier: Apache-2.0
"""What `irem` left to the data, what they chose, and the errors it was chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .material import Material, MethodResult
from .wording import number, table

ASKED = {
    "motion": "Slices move one by one",
    "width": "Width of the slice profiles",
    "spectrum_share": "Gaps between slices",
    "network": "Network",
}
#: What was chosen, in words; anything else stands as it is.
WORDS = {
    ("motion", "stack"): "no, each stack as a whole",
    ("motion", "slice"): "yes",
    ("width", "stated"): "as stated",
    ("width", "learned"): "learned",
}
ERRORS = {
    "motion": "held_out_by_motion",
    "width": "held_out_by_width",
    "spectrum_share": "rehearsed_error",
}
MEANING = (
    "What the data chose",
    "Mean squared errors, scaled intensity: of the held-out voxels, for gaps of a block of the "
    "head that was turned and scanned again. Slices are taken to move one by one only where that "
    "lowers the error by 15 %, a width to be other than stated where it lowers it by 1 %. "
    "The network is used where the smaller error is with it; gaps are bridged by a share of both "
    "images, which follows from their errors. The errors of motion and width are those at twice "
    "the voxel of the result.",
)


def table_of(material: Material) -> dict[str, Any]:
    """One row per method and choice; no row for what was settled by the settings."""
    settings = material.inp.settings
    settled = {"motion"} if settings.irem.motion != "auto" else set()
    return table(
        (("Method", ""), ("Question", ""), ("Chosen", ""), ("Error with each", "")),
        (
            (result.name, ASKED[name], _worded(name, chosen), _listed(errors))
            for result in material.methods.values()
            for name, chosen, errors in _choices(result)
            if name not in settled
        ),
    )


def _choices(result: MethodResult) -> list[tuple[str, Any, Mapping[str, float]]]:
    """(what, chosen, error of each) where there was more than one to choose from."""
    found = []
    for name in ASKED:
        errors = result.info.get(ERRORS.get(name, ""), {})
        if name == "network":
            judged = result.history.get("held_out") or [0.0]
            errors = {"without": judged[0], "with": judged[-1]} if len(judged) > 1 else {}
        if name in result.info and isinstance(errors, Mapping) and len(errors) > 1:
            found.append((name, result.info[name], errors))
    return found


def _worded(name: str, chosen: Any) -> str:
    if name == "spectrum_share":
        return f"bridged {100 * chosen:.0f} % by the spectrum, else by edges (total variation)"
    return WORDS.get((name, chosen), str(chosen))


def _listed(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value, '.3g')}" for name, value in sorted(errors.items()))
