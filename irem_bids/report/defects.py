# SPDX-License-Identifier: Apache-2.0
"""Checks that name the cause of a bad image; each gives :class:`Finding` entries.

The limits are constants here, so that a reader sees what 'off' means.  A check that lacks
what it needs says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reconstruction.stack import Stack
from .finding import Finding, listed
from .material import GroupLike, Material
from .predicted import slice_values, widths
from .slices import bad_slices

REFINED_MM = 2.5  # a method moved a stack so far from where registration had put it
PARTNER_NCC = 0.1  # NCC of a stack with its partners below that of the other pairs
GAIN_RANGE = (0.7, 1.4)  # refined gain of a stack, after all were scaled alike
BRIGHTNESS_RANGE = (0.625, 1.6)  # brightness of a stack as acquired over the median of the others
THICKNESS_RANGE = (0.6, 1.35)  # slice thickness over slice spacing
WIDTH_RANGE = (0.7, 1.4)  # width of the profile as found over the thickness as stated
CUT_FRACTION = 0.15  # of the head's largest section lies on the edge of the field of view
TISSUE = 0.2  # scaled intensity: brighter than air, whatever the noise
EXPLAINED_NCC = 0.3  # so much less agreement can come from a bad slice alone

_WORDS = {
    "axial": ("ax", "axi", "axial", "tra", "trans", "transverse", "transversal", "transaxial"),
    "coronal": ("cor", "coro", "coronal"),
    "sagittal": ("sag", "sagi", "sagittal"),
}


# ------------------------------------------------------------------------- file names
def plane_in_name(filename: str) -> str | None:
    """The plane that the ``acq`` label of a BIDS name claims; ``None`` if none or several.

    >>> plane_in_name("sub-01_acq-cor_T1w.nii.gz"), plane_in_name("sub-01_acq-TSEaxial_T2w.nii")
    ('coronal', 'axial')
    >>> plane_in_name("sub-01_acq-highres_T1w.nii.gz") is None
    True
    """
    match = re.search(r"_acq-([^_]+)", filename)
    if match is None:
        return None
    label = re.sub(r"[\d.]+", " ", match.group(1))
    words = {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)}
    words |= {w.lower() for w in label.split()}
    claimed = {
        plane
        for plane, names in _WORDS.items()
        if words & set(names) or any(w.endswith(names[-1]) or plane in w for w in words)
    }
    return claimed.pop() if len(claimed) == 1 else None


def labels(group: GroupLike) -> list[Finding]:
    """File names against the orientation that the affine tells."""
    wrong = []
    for stack in group.stacks:
        name = Path(stack.path).name
        claimed = plane_in_name(name)
        if claimed not in (None, stack.plane):
            wrong.append(f"{name} says {claimed} but its affine is {stack.plane}")
    text = (
        f"The label in the name contradicts the image: {listed(wrong)}. The affine was trusted; "
        "were labels swapped when the files were named?"
        if wrong
        else "No file name contradicts the orientation of its image."
    )
    return [Finding("Orientation labels", bool(wrong), text, "inputs", "label")]


# -------------------------------------------------------------------------- thickness
def thickness(material: Material) -> list[Finding]:
    """Slice thickness: from where, against the spacing, and against the profile as found."""
    group = material.inp.group
    reasons = []
    guessed = [s.label for s in group.stacks if s.thickness_source == "spacing"]
    if guessed:
        reasons.append(
            f"The slice thickness of {listed(guessed)} was taken from the slice spacing, because "
            "the sidecar has none that is plausible. With a gap between slices the result is "
            "blurred wrongly."
        )
    low, high = THICKNESS_RANGE
    odd = [
        f"{s.label} ({s.slice_thickness:g} mm thick, {s.spacing:g} mm apart)"
        for s in group.stacks
        if s.thickness_source != "spacing" and not low <= s.slice_thickness / s.spacing <= high
    ]
    if odd:
        reasons.append(
            f"The slice thickness contradicts the spacing of the slices: {listed(odd)}. Is the "
            "thickness in the sidecar wrong?"
        )
    stated = {s.label: s.slice_thickness for s in group.stacks}
    low, high = WIDTH_RANGE
    for result in material.methods.values():
        off = [
            f"{label} ({width:.2g} mm instead of {stated[label]:.2g} mm)"
            for label, width in widths(result, stated).items()
            if not low <= width / stated[label] <= high
        ]
        if off:
            reasons.append(
                f"The width of the slices as {result.name} found it contradicts the stated "
                f"thickness: {listed(off)}."
            )
    text = " ".join(reasons) or "Known for every stack, and in keeping with the slice spacing."
    return [Finding("Slice thickness", bool(reasons), text, "inputs", "thickness")]


# ----------------------------------------------------------------------- registration
def misregistered(material: Material) -> list[Finding]:
    """Stacks whose place disagrees with their partners or with what a method found."""
    prepared = material.prepared
    if prepared is None or len(prepared.stacks) < 2:
        return []
    spoilt = {label for label, fit in material.slice_fits.items() if bad_slices(fit)}
    pairs = prepared.metrics.get("ncc_pairs") or ()
    reasons = [*_lonely(pairs, spoilt), *_moved_on(material)]
    text = (
        f"A stack is not where it belongs: {listed(reasons)}. Compare the pictures after "
        "registration; structures must not jump."
        if reasons
        else "No stack agrees less with its partners, where registration put it, than they do "
        "with each other."
    )
    return [Finding("Misregistered stack", bool(reasons), text, "registration", "misregistered")]


def _lonely(pairs: Any, spoilt: AbstractSet[str]) -> list[str]:
    """Stacks that agree much less with their partners than the partners with each other.

    A bad slice lowers the agreement, too, so ``spoilt`` stacks need stronger evidence.
    """
    names = sorted({name for p in pairs for name in (p["a"], p["b"])})
    found = []
    for name in names:
        own = [p["after"] for p in pairs if name in (p["a"], p["b"])]
        others = [p["after"] for p in pairs if name not in (p["a"], p["b"])]
        limit = EXPLAINED_NCC if name in spoilt else PARTNER_NCC
        if others and np.median(own) < np.median(others) - limit:
            found.append(
                (
                    float(np.median(others) - np.median(own)),
                    f"{name} agrees with its partners less (NCC {np.median(own):.2f}) than they "
                    f"with each other ({np.median(others):.2f})",
                )
            )
    return [text for _, text in sorted(found, reverse=True)[:2]]


def _moved_on(material: Material) -> list[str]:
    """Stacks that a method moved far from where registration had put them."""
    prepared = material.prepared
    if prepared is None:
        return []
    found = []
    fixed = prepared.reference
    for result in material.methods.values():
        if not all(stack.label in result.poses for stack in prepared.stacks):
            continue
        back = prepared.poses[fixed] @ result.poses[prepared.stacks[fixed].label].inverse()
        for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
            points = _points(stack)
            moved = (back @ result.poses[stack.label]).apply(points) - pose.apply(points)
            distance = float(np.linalg.norm(moved, axis=1).mean())
            if distance > REFINED_MM:
                found.append(f"{result.name} moved {stack.label} on by {distance:.1f} mm")
    return found


def _points(stack: Stack) -> NDArray[np.float64]:
    """At most 500 points of the foreground, scanner mm."""
    where = np.argwhere(stack.mask)
    return stack.grid.to_world(where[:: max(1, len(where) // 500)])


# ----------------------------------------------------------------------------- slices
def slices(material: Material) -> list[Finding]:
    """Slices that disagree with the result: dropped, torn, moved, or weighted down."""
    fits = material.slice_fits
    if not fits:
        return []
    reasons = []
    for label, fit in fits.items():
        bad = bad_slices(fit, _weights(material, label))
        words = [f"slice {k} ({why})" for k, why in sorted(bad.items())]
        if words:
            reasons.append(f"{label}: {listed(words, most=4)}")
    text = (
        f"Slices that disagree with the rest: {'; '.join(reasons)}. Each counts "
        "with the weight that the method gave it, which may be next to none; slices are counted "
        "from 0 in the stack as cropped."
        if reasons
        else "Every slice agrees with the result about as well as its neighbours do."
    )
    return [Finding("Slices", bool(reasons), text, "training", "slice")]


def _weights(material: Material, label: str) -> NDArray[np.float64] | None:
    """Least weight per slice over the methods that noted any."""
    rows = [
        slice_values(result, "slice_weights").get(label) for result in material.methods.values()
    ]
    known = [row for row in rows if row is not None]
    if not known or len({row.shape for row in known}) > 1:
        return None
    return np.min(known, axis=0)


# ------------------------------------------------------------------------------- gain
def gains(material: Material) -> list[Finding]:
    """Brightness of the stacks as acquired, and gains that a method found beyond that."""
    low, high = GAIN_RANGE
    fitted = {n: r.gains for n, r in material.methods.items() if r.gains}
    off = [
        f"{label} ({gain:.2f} by {name})"
        for name, values in fitted.items()
        for label, gain in values.items()
        if not low <= gain <= high
    ]
    scales = material.scales
    least, most = BRIGHTNESS_RANGE
    for label, scale in scales.items():
        others = [value for other, value in scales.items() if other != label]
        if others and scale > 0 and np.median(others) > 0:
            ratio = scale / float(np.median(others))
            if not least <= ratio <= most and _extreme(ratio, scales):
                off.append(f"{label} ({ratio:.2f} times as bright as the others, as acquired)")
    if not fitted and not scales:
        return []
    text = (
        f"The intensity of {listed(off)} differs from the others by more than a normal scan "
        "does: was the gain, the contrast or the receiver changed? Intensities were scaled alike "
        "before the reconstruction."
        if off
        else f"No stack is less than {least:g} or more than {most:g} times as bright as the others"
        + (f", and refined gains lie within {low:g} to {high:g}." if fitted else ".")
    )
    return [Finding("Gain of stacks", bool(off), text, "metrics", "gain")]


def _extreme(ratio: float, scales: Mapping[str, float]) -> bool:
    """Whether a ratio is the one that stands out: with three stacks one odd one moves all."""
    values = np.log([v for v in scales.values() if v > 0])
    return abs(np.log(ratio)) >= 0.99 * float(
        max(abs(v - np.median(np.delete(values, i))) for i, v in enumerate(values))
    )


# ---------------------------------------------------------------------- field of view
def field_of_view(material: Material) -> list[Finding]:
    """Stacks whose foreground ends at the edge of the image; the neck may be cut."""
    prepared = material.prepared
    if prepared is None:
        return []
    masked = prepared.metrics.get("masked", {})
    cut = []
    for stack in prepared.stacks:
        faces = cut_faces(stack)
        if masked.get(stack.label) != "given":
            faces.pop("inferior", None)
        if faces:
            cut.append(f"{stack.label} ({listed(sorted(faces))})")
    text = (
        f"The head is cut by the field of view of {listed(cut)}: what lies outside rests on "
        "the other stacks."
        if cut
        else "The head lies within the field of view of every stack (but for the neck)."
    )
    return [Finding("Field of view", bool(cut), text, "inputs", "field of view")]


def cut_faces(stack: Stack) -> dict[str, float]:
    """Side of the patient to the fraction of the largest section that lies on that edge."""
    sides = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    found = {}
    bright = stack.mask & (stack.data > TISSUE)  # the mask itself reaches into the air
    for axis in range(3):
        planes = np.moveaxis(bright, axis, 0)
        areas = planes.reshape(len(planes), -1).sum(axis=1)
        direction = stack.grid.directions[:, axis]
        world = int(np.argmax(np.abs(direction)))
        for index, upward in ((0, False), (-1, True)):
            fraction = float(areas[index] / max(1, areas.max()))
            if fraction > CUT_FRACTION:
                found[sides[world][int((direction[world] > 0) == upward)]] = fraction
    return found
