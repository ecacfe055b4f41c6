# SPDX-License-Identifier: Apache-2.0
"""Does somebody have to look at this group, and why: checks with stated limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import plots
from .material import Material, step_record

FAR_MM = 10.0
FAR_DEGREES = 10.0
LOW_NCC = 0.5
NCC_DROP = 0.01
GAIN_RANGE = (0.8, 1.25)
PSNR_DROP = 0.1  # dB


@dataclass(frozen=True)
class Finding:
    """One check: ``look`` is true where a person should look; ``text`` says why in words."""

    name: str
    look: bool
    text: str
    link: str = ""  # section of the page with the evidence


def check(material: Material) -> list[Finding]:
    """All checks that the material allows, failures first."""
    findings = [*_failed(material), *_inputs(material)]
    if material.prepared is not None:
        findings += [*_agreement(material), *_motion(material)]
    findings += [*_held_out(material), *_gains(material), *_doubts(material)]
    return findings


def _doubts(material: Material) -> list[Finding]:
    """What the steps themselves found doubtful, each with its method."""
    named = [("", material.inp.prepared), *((r.name, r.folder) for r in material.methods.values())]
    texts = [
        f"{name}: {text}" if name else str(text)
        for name, folder in named
        for text in step_record(folder).get("doubts") or ()
    ]
    return [Finding("Plausibility", True, text, "registration") for text in dict.fromkeys(texts)]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _failed(material: Material) -> list[Finding]:
    errors = material.inp.errors
    found = []
    if errors:
        steps = _list([str(e.get("step", "an unnamed step")) for e in errors])
        found.append(Finding("Completed", True, f"The run failed in {steps}.", "errors"))
    missing = [
        name
        for name in material.inp.methods
        if name not in material.methods or material.methods[name].volume is None
    ]
    if missing:
        found.append(
            Finding("Completed", True, f"No image was left by {_list(missing)}.", "errors")
        )
    if material.problems:
        found.append(
            Finding(
                "Report",
                True,
                f"{len(material.problems)} part(s) of this report could not be made; they are "
                "listed with the errors.",
                "errors",
            )
        )
    return found or [Finding("Completed", False, "Every step ended without an error.")]


def _inputs(material: Material) -> list[Finding]:
    group = material.inp.group
    planes = sorted({stack.plane for stack in group.stacks})
    found = [
        Finding(
            "Orientations",
            len(planes) < 3,
            f"Only {len(planes)} orientation(s): {_list(planes) if planes else 'none'}. "
            "Detail along the missing direction rests on few measurements."
            if len(planes) < 3
            else "Stacks in all three orientations.",
            "inputs",
        )
    ]
    guessed = [s.label for s in group.stacks if s.thickness_source == "spacing"]
    found.append(
        Finding(
            "Slice thickness",
            bool(guessed),
            f"The slice thickness of {_list(guessed)} was taken from the slice spacing, because "
            "the sidecar has none that is plausible. With a gap between slices the result is "
            "blurred wrongly."
            if guessed
            else "Known for every stack.",
            "inputs",
        )
    )
    said = [f.name for f in found if f.look]
    others = [
        text
        for text in group.warnings
        if not ("Orientations" in said and "orientation" in text.lower())
        and not ("Slice thickness" in said and "thickness" in text.lower())
    ]
    return found + [Finding("Discovery", True, text, "inputs") for text in others]


def _agreement(material: Material) -> list[Finding]:
    prepared = material.prepared
    metrics = {} if prepared is None else prepared.metrics
    before, after = metrics.get("ncc_before"), metrics.get("ncc_after")
    if before is None or after is None or not np.isfinite([before, after]).all():
        return []
    found = [
        Finding(
            "Registration gain",
            after < before - NCC_DROP,
            f"The stacks agree less after registration (mean NCC {after:.3f}) than before "
            f"({before:.3f})."
            if after < before - NCC_DROP
            else f"Mean NCC between stacks went from {before:.3f} to {after:.3f}.",
            "registration",
        )
    ]
    worse = [
        f"{p['a']} with {p['b']} ({p['before']:.3f} to {p['after']:.3f})"
        for p in metrics.get("ncc_pairs", ())
        if p["after"] < p["before"] - NCC_DROP
    ]
    if worse and not found[0].look:
        found.append(
            Finding(
                "Registration of pairs",
                True,
                f"Agreement fell for {_list(worse)}.",
                "registration",
            )
        )
    if after < LOW_NCC:
        found.append(
            Finding(
                "Agreement",
                True,
                f"The stacks agree poorly even after registration (mean NCC {after:.3f}, less than "
                f"{LOW_NCC:g}).",
                "registration",
            )
        )
    return found


def _motion(material: Material) -> list[Finding]:
    prepared = material.prepared
    if prepared is None:
        return []
    turns, shifts = plots.pose_table(prepared.stacks, prepared.poses, prepared.reference)
    far = [
        f"{stack.label} by {np.linalg.norm(shift):.1f} mm and {np.linalg.norm(turn):.1f}°"
        for stack, turn, shift in zip(prepared.stacks, turns, shifts, strict=True)
        if np.linalg.norm(shift) > FAR_MM or np.linalg.norm(turn) > FAR_DEGREES
    ]
    return [
        Finding(
            "Movement between stacks",
            bool(far),
            f"Registration moved {_list(far)}: a large movement, or a failure. Compare the "
            "pictures before and after."
            if far
            else f"No stack was moved by more than {FAR_MM:g} mm or {FAR_DEGREES:g}°.",
            "registration",
        )
    ]


def _held_out(material: Material) -> list[Finding]:
    values = {
        name: result.quality.get("held_out_psnr") for name, result in material.methods.items()
    }
    known = {k: float(v) for k, v in values.items() if v is not None and np.isfinite(v)}
    if "bspline" not in known or len(known) < 2:
        return []
    floor = known["bspline"]
    worse = [
        f"{name} ({value:.1f} dB)"
        for name, value in known.items()
        if name != "bspline" and value < floor - PSNR_DROP
    ]
    return [
        Finding(
            "Held-out voxels",
            bool(worse),
            "Voxels that were never trained on are predicted worse than by plain interpolation "
            f"(bspline, {floor:.1f} dB): {_list(worse)}."
            if worse
            else "Every method predicts unseen voxels at least as well as plain interpolation "
            f"(bspline, {floor:.1f} dB).",
            "metrics",
        )
    ]


def _gains(material: Material) -> list[Finding]:
    fitted = {n: r.gains for n, r in material.methods.items() if r.gains}
    if not fitted:
        return []
    low, high = GAIN_RANGE
    off = [
        f"{label} ({gain:.2f} by {name})"
        for name, gains in fitted.items()
        for label, gain in gains.items()
        if not low <= gain <= high
    ]
    return [
        Finding(
            "Gain of stacks",
            bool(off),
            f"The intensity of {_list(off)} differs from the others by more than a normal scan "
            "does: was the contrast or the receiver changed?"
            if off
            else f"All within {low:g} to {high:g}.",
            "metrics",
        )
    ]


def verdict(findings: list[Finding]) -> str:
    """One sentence for the top of the page."""
    count = sum(finding.look for finding in findings)
    if count == 0:
        return "Nothing here asks for a look: every check below passed."
    return f"Needs a look: {count} of {len(findings)} checks found something."
