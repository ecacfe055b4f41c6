# SPDX-License-Identifier: Apache-2.0
"""Does somebody have to look at this group, and why: checks with stated limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from . import defects, plots
from .finding import Finding, listed
from .material import Material, step_record

__all__ = ["Finding", "check", "verdict"]

FAR_MM = 10.0
FAR_DEGREES = 10.0
LOW_NCC = 0.5
NCC_DROP = 0.01
PSNR_DROP = 0.1  # dB
#: A cause that is named here, and the words of discovery or of a step for the same.
TOLD = {
    "orientations": "orientation",
    "label": "its header says",
    "thickness": "mm thick (sidecar)",
    "held-out": "are predicted worse",
}


def check(material: Material) -> list[Finding]:
    """All checks that the material allows, failures first.

    A check that fails on what it was given is itself a finding: the page must be built.
    """
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("orientations", partial(_orientations, material)),
        ("labels", partial(defects.labels, material.inp.group)),
        ("slice thickness", partial(defects.thickness, material)),
        ("warnings", partial(_warnings, material)),
        ("doubts", partial(_doubts, material)),
        ("field of view", partial(defects.field_of_view, material)),
        ("agreement", partial(_agreement, material)),
        ("movement", partial(_motion, material)),
        ("misregistration", partial(defects.misregistered, material)),
        ("slices", partial(defects.slices, material)),
        ("held-out voxels", partial(_held_out, material)),
        ("gains", partial(defects.gains, material)),
    )
    found: list[Finding] = []
    for name, run in checks:
        try:
            found += run()
        except Exception as error:
            material.problem(f"the check of {name} could not be made", error)
    return [*_failed(material), *_without_repeats(material, found)]


def _without_repeats(material: Material, found: list[Finding]) -> list[Finding]:
    """The findings less the warnings that another finding repeats about the same thing."""
    labels = {Path(stack.path).name: stack.label for stack in material.inp.group.stacks}

    def repeated(warning: Finding) -> bool:
        name = warning.text.split(": ")[0]
        if name not in (*labels, *material.methods):
            name = ""  # about all of them
        names = (name, labels.get(name, name))
        return warning.cause in ("discovery", "doubt") and any(
            TOLD[other.cause] in warning.text.lower() and any(n in other.text for n in names)
            for other in found
            if other.look and other.cause in TOLD
        )

    return [finding for finding in found if not repeated(finding)]


def _doubts(material: Material) -> list[Finding]:
    """What the steps themselves found doubtful, each with its method."""
    texts = {
        _sentence(text): "registration"
        for text in step_record(material.inp.prepared).get("doubts") or ()
    }
    for result in material.methods.values():
        for text in step_record(result.folder).get("doubts") or ():
            texts.setdefault(f"{result.name}: {_sentence(text)}", "reconstruction")
    return [Finding("Plausibility", True, text, link, "doubt") for text, link in texts.items()]


def _sentence(text: object) -> str:
    """A text that ends with a full stop."""
    return f"{str(text).rstrip('.')}."


def _failed(material: Material) -> list[Finding]:
    errors = material.inp.errors
    found = []
    if errors:
        steps = listed([str(e.get("step", "an unnamed step")) for e in errors])
        found.append(Finding("Completed", True, f"The run failed in {steps}.", "errors", "failed"))
    missing = [
        name
        for name in material.inp.methods
        if name not in material.methods or material.methods[name].volume is None
    ]
    if missing:
        found.append(
            Finding(
                "Completed", True, f"No image was left by {listed(missing)}.", "errors", "failed"
            )
        )
    if material.problems:
        found.append(
            Finding(
                "Report",
                True,
                f"{len(material.problems)} part(s) of this report could not be made; they are "
                "listed with the errors.",
                "errors",
                "report",
            )
        )
    return found or [Finding("Completed", False, "Every step ended without an error.")]


def _orientations(material: Material) -> list[Finding]:
    planes = sorted({stack.plane for stack in material.inp.group.stacks})
    text = (
        f"Only {len(planes)} orientation(s): {listed(planes) if planes else 'none'}. "
        "Detail along the missing direction rests on few measurements."
        if len(planes) < 3
        else "Stacks in all three orientations."
    )
    return [Finding("Orientations", len(planes) < 3, text, "inputs", "orientations")]


def _warnings(material: Material) -> list[Finding]:
    """What discovery warned of."""
    warnings = material.inp.group.warnings
    return [Finding("Discovery", True, _sentence(w), "inputs", "discovery") for w in warnings]


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
            "misregistered",
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
                f"Agreement fell for {listed(worse)}.",
                "registration",
                "misregistered",
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
                "misregistered",
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
            f"Registration moved {listed(far)}: a large movement, or a failure. Compare the "
            "pictures before and after."
            if far
            else f"No stack was moved by more than {FAR_MM:g} mm or {FAR_DEGREES:g}°.",
            "registration",
            "misregistered",
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
            f"(bspline, {floor:.1f} dB): {listed(worse)}."
            if worse
            else "No method predicts unseen voxels worse than plain interpolation, by more than "
            f"{PSNR_DROP:g} dB (bspline, {floor:.1f} dB).",
            "metrics",
            "held-out",
        )
    ]


def verdict(findings: list[Finding]) -> str:
    """One sentence for the top of the page."""
    count = sum(finding.look for finding in findings)
    if count == 0:
        return "Nothing here asks for a look: every check below passed."
    return f"Needs a look: {count} of {len(findings)} checks found something."
