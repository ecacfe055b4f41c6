# SPDX-License-Identifier: Apache-2.0
"""Tables of the page: poses, metrics, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import choices, cohort, plots
from .material import Material, method_seconds, step_record
from .predicted import widths
from .wording import METRICS, number, plain, table

#: What a step noted of its cost, and its heading.
COSTS = {
    "seconds": "Seconds",
    "memory_gb": "Memory, peak (GB)",
    "gpu_memory_gb": "GPU memory, peak (GB)",
}

#: What a method has found of each stack.
PER_STACK = ("self_consistency", "residual", "gain", "profile_width")


def poses(material: Material) -> dict[str, Any]:
    """Shift and turn of each stack, by each estimate."""
    prepared = material.prepared
    columns = (
        ("Stack", ""),
        ("Estimated by", ""),
        ("Shift (mm)", "number"),
        ("R-L", "number"),
        ("A-P", "number"),
        ("S-I", "number"),
        ("Turn (°)", "number"),
        ("about R-L", "number"),
        ("about A-P", "number"),
        ("about S-I", "number"),
    )
    stacks = () if prepared is None else prepared.stacks
    sets = {
        name: plots.pose_table(stacks, poses, prepared.reference)
        for name, poses in material.pose_sets().items()
        if prepared is not None
    }
    rows = (
        (
            stack.label,
            name,
            number(np.linalg.norm(shifts[place]), ".2f"),
            *(number(v, "+.2f") for v in shifts[place]),
            number(np.linalg.norm(turns[place]), ".2f"),
            *(number(v, "+.2f") for v in turns[place]),
        )
        for place, stack in enumerate(stacks)
        for name, (turns, shifts) in sets.items()
    )
    return table(columns, rows)


def metrics(material: Material) -> dict[str, Any]:
    """Metrics of methods and stacks, with what they mean."""
    results = material.methods
    metrics = {} if material.prepared is None else material.prepared.metrics
    shared = set(metrics) | {"ncc_pairs"}
    names = list(
        dict.fromkeys(
            key
            for r in results.values()
            for key, value in r.quality.items()
            if isinstance(value, (int, float)) and key not in shared
        )
    )
    used = [n for n in names if n in METRICS]
    methods_table = table(
        (
            ("Method", ""),
            *((METRICS[n][0] if n in METRICS else n, "number") for n in names),
            ("Seconds", "number"),
        ),
        (
            (
                r.name,
                *(number(r.quality.get(n), METRICS.get(n, ("", ".4g", ""))[1]) for n in names),
                number(method_seconds(r), ".1f"),
            )
            for r in results.values()
            if r.quality or r.info
        ),
    )
    stacks, per_stack = _per_stack(material, metrics)
    chosen = choices.table_of(material)
    definitions = [(METRICS[n][0], METRICS[n][2]) for n in dict.fromkeys([*used, *per_stack])]
    return {
        "methods": methods_table,
        "choices": chosen,
        "cohort": cohort.among_others(material),
        "stacks": stacks,
        "definitions": definitions + ([choices.MEANING] if chosen["rows"] else []),
    }


def _per_stack(material: Material, metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One row per stack and method; and which metrics it has."""
    by_stack = [n for n in ("snr", "noise") if metrics.get(n)]
    values: dict[tuple[str, str], dict[str, Any]] = {}
    stacks = () if material.prepared is None else material.prepared.stacks
    stated = {stack.label: stack.slice_thickness for stack in stacks}
    for result in material.methods.values():
        found = {**result.quality, "gain": result.gains if result.name == "irem" else None}
        if (width := widths(result, stated)) != stated:
            found["profile_width"] = width
        for name in PER_STACK:
            of_labels = found.get(name)
            for label, value in (of_labels if isinstance(of_labels, Mapping) else {}).items():
                values.setdefault((label, result.name), {})[name] = value
    labels = list(dict.fromkeys([*(metrics.get("snr") or {}), *(k for k, _ in values)]))
    order = [(label, name) for label in labels for name in material.methods]
    pairs = [key for key in order if key in values]
    by_method = [n for n in PER_STACK if any(n in row for row in values.values())]
    head = [("Stack", ""), *((METRICS[n][0], "number") for n in by_stack)]
    if pairs:
        head += [("Method", ""), *((METRICS[n][0], "number") for n in by_method)]
    rows = (
        (
            label,
            *(number(metrics[n].get(label), METRICS[n][1]) for n in by_stack),
            *([method] if pairs else []),
            *(number(values[label, method].get(n), METRICS[n][1]) for n in by_method),
        )
        for label, method in pairs or [(label, "") for label in labels]
    )
    return table(head, rows), [*by_stack, *by_method]


def provenance(material: Material) -> dict[str, Any]:
    """Versions, device, cost of each step and what else the run says of itself."""
    known = dict(material.inp.provenance)
    versions = dict(known.pop("versions", {}) or {})
    devices = [known.pop("device")] if known.get("device") else []
    costs: dict[str, dict[str, float]] = {key: dict(known.pop(key, {}) or {}) for key in COSTS}
    for folder, name in [
        (material.inp.prepared, ""),
        *((r.folder, r.name) for r in material.methods.values()),
    ]:
        step = step_record(folder)
        devices += [step["device"]] if step.get("device") else []
        for key, values in costs.items():
            for what, value in (step.get(key) or {}).items():
                values.setdefault(f"{what} {name}".strip(), value)
    facts = [("Device", ", ".join(dict.fromkeys(plain(d) for d in devices)))] if devices else []
    facts += [
        (plain(name).replace("_", " ").capitalize(), plain(value))
        for name, value in known.items()
        if value not in (None, "", [], {})
    ]
    used = {key: values for key, values in costs.items() if values}
    steps = dict.fromkeys(step for values in used.values() for step in values)
    return {
        "facts": facts,
        "costs": table(
            (("Step", ""), *((COSTS[key], "number") for key in used)),
            (
                (step, *(number(values.get(step), ".1f") for values in used.values()))
                for step in steps
            ),
        ),
        "versions": table((("Package", ""), ("Version", "")), versions.items()),
    }
