# SPDX-License-Identifier: Apache-2.0
"""The fragments of HTML that nireports puts together, one per section and group.

Values reach the page only through Jinja templates with autoescaping; a fragment is pure
ASCII (other letters are character references), because nireports reads it in the locale's
encoding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from . import methods, summary, tables, uncertainty
from .latex import latex
from .material import Material
from .studio import Figure
from .viewer import LONGEST, Viewer
from .wording import number, plain, table

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Jinja with autoescaping, our templates, and no silent undefined names."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(TEMPLATES)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


class Page:
    """The fragments of one group, with figures linked relative to ``root``."""

    def __init__(
        self,
        material: Material,
        figures: Sequence[Figure],
        root: Path,
        *,
        viewer: Viewer | None = None,
        alone: bool,
        number_in_page: int,
    ) -> None:
        self.material = material
        self.viewer = viewer
        self.root = root
        self.number = number_in_page
        self.all = [(figure, self._figure(figure)) for figure in figures]
        group = material.inp.group
        self.group = {"name": plain(group.name), "show_name": not alone}
        self.window = (
            "black and white are the 0.5th and 99.5th percentiles of the foreground of all stacks "
            "(black is zero where that is near)"
        )

    def _figure(self, figure: Figure) -> dict[str, Any]:
        relative = os.path.relpath(figure.path, self.root)
        shown: dict[str, Any] = {
            "url": quote(os.fsencode(relative)),
            "width": 0,
            "height": 0,
            **{
                k: plain(getattr(figure, k))
                for k in ("alt", "caption", "stack", "method", "plane", "state")
            },
        }
        if figure.path.suffix == ".png":
            with Image.open(figure.path) as image:
                shown["width"], shown["height"] = image.size
        return shown

    def select(self, section: str, **wanted: str) -> list[dict[str, Any]]:
        """Figures of a section whose attributes are as ``wanted``."""
        return [
            shown
            for figure, shown in self.all
            if figure.section == section and all(getattr(figure, k) == v for k, v in wanted.items())
        ]

    def write(self, folder: Path) -> list[Path]:
        """Write one fragment per section into ``folder``."""
        templates = environment()
        written = []
        for section, context in self.contexts().items():
            html = templates.get_template(f"{section}.html").render(group=self.group, **context)
            path = folder / f"sub-report_run-{self.number}_desc-{section}_T1w.html"
            path.write_bytes(html.encode("ascii", "xmlcharrefreplace"))
            written.append(path)
        return written

    def contexts(self) -> dict[str, dict[str, Any]]:
        """What the template of each section gets."""
        return {
            "summary": self.summary(),
            "inputs": self.inputs(),
            "registration": self.registration(),
            "reconstruction": self.reconstruction(),
            "training": self.training(),
            "metrics": tables.metrics(self.material),
            "settings": self.settings(),
            "provenance": tables.provenance(self.material),
            "methods": self.methods(),
            "errors": self.errors(),
        }

    def summary(self) -> dict[str, Any]:
        """Verdict, reasons, and what was used."""
        findings = summary.check(self.material)
        group, inp = self.material.inp.group, self.material.inp
        facts = [("Stacks", f"{len(group.stacks)} used; images left out: {len(group.excluded)}")]
        planes = [s.plane for s in group.stacks]
        counts = [f"{planes.count(p)} {p}" for p in ("axial", "coronal", "sagittal") if p in planes]
        if counts:
            facts.append(("Orientations", ", ".join(counts)))
        if self.material.reference is not None:
            facts.append(("Reference stack", self.material.reference.label))
        facts.append(("Methods", ", ".join(inp.methods) or "none"))
        first = next((m for m in self.material.methods.values() if m.grid is not None), None)
        if first is not None and first.grid is not None:
            size = " × ".join(str(n) for n in first.grid.shape)
            facts.append(("Result", f"{size} voxels of {first.grid.voxel_size[0]:.3g} mm"))
        return {
            "verdict": summary.verdict(findings),
            "look": [f for f in findings if f.look],
            "fine": [f for f in findings if not f.look],
            "facts": [(name, plain(value)) for name, value in facts],
        }

    def inputs(self) -> dict[str, Any]:
        """Stacks and excluded images."""
        group = self.material.inp.group
        masked: dict[str, str] = {}
        if self.material.prepared is not None:
            masked = self.material.prepared.metrics.get("masked", {})
        words = {"given": "given", "otsu": "threshold"}
        stacks = table(
            (
                ("Stack", ""),
                ("Plane", ""),
                ("Voxels", "number"),
                ("In plane", "number"),
                ("Spacing", "number"),
                ("Thickness", "number"),
                ("Thickness from", ""),
                ("Mask", ""),
                ("File", "path"),
            ),
            (
                (
                    s.label,
                    s.plane,
                    " × ".join(str(n) for n in s.shape),
                    " × ".join(f"{v:.4g}" for v in s.in_plane),
                    f"{s.spacing:.4g}",
                    f"{s.slice_thickness:.4g}",
                    s.thickness_source,
                    words.get(masked.get(s.label, ""), "given" if s.mask else "threshold"),
                    s.uri,
                )
                for s in group.stacks
            ),
        )
        excluded = table(
            (("Image", "path"), ("Reason", "wide")),
            ((Path(e.path).name, e.reason) for e in group.excluded),
        )
        return {
            "stacks": stacks,
            "excluded": excluded,
            "figures": self.select("inputs"),
            "window": self.window,
        }

    def registration(self) -> dict[str, Any]:
        """Agreement, poses, and the pictures before and after."""
        prepared = self.material.prepared
        metrics = {} if prepared is None else prepared.metrics
        pairs = list(metrics.get("ncc_pairs", ()))
        reference = next(iter(self.select("registration", state="reference")), None)
        comparisons = []
        for count, after in enumerate(self.select("registration", state="after")):
            before = next(iter(self.select("registration", state="before", stack=after["stack"])))
            both = {after["stack"], reference["stack"] if reference else ""}
            pair = next((p for p in pairs if {p["a"], p["b"]} == both), None)
            comparisons.append(
                {
                    "id": f"{self.number}-{count}",
                    "stack": after["stack"],
                    "before": before,
                    "after": after,
                    "ncc": pair and {k: number(pair[k], ".3f") for k in ("before", "after")},
                }
            )
        return {
            "summary": self._agreement(metrics),
            "pairs": table(
                (("Stacks", ""), ("Before", "number"), ("After", "number"), ("Change", "number")),
                (
                    (
                        f"{p['a']} – {p['b']}",
                        number(p["before"], ".3f"),
                        number(p["after"], ".3f"),
                        number(p["after"] - p["before"], "+.3f"),
                    )
                    for p in pairs
                ),
            ),
            "poses": tables.poses(self.material),
            "plots": self.select("poses"),
            "reference": reference,
            "comparisons": comparisons if reference else [],
        }

    def _agreement(self, metrics: Mapping[str, Any]) -> str:
        if self.material.prepared is None or metrics.get("ncc_after") is None:
            return ""
        return (
            f"Mean NCC over all pairs: {number(metrics.get('ncc_before'), '.3f')} before and "
            f"{number(metrics['ncc_after'], '.3f')} after registration."
        )

    def reconstruction(self) -> dict[str, Any]:
        """Stacks and methods at one position, and sections through each result."""
        found = [
            (p, self.select("reconstruction", plane=p)) for p in ("axial", "coronal", "sagittal")
        ]
        return {
            "planes": [(plane, figures) for plane, figures in found if figures],
            "viewer": self.viewer and {**vars(self.viewer), "longest": LONGEST},
            "number": self.number,
            "mosaics": self.select("mosaic"),
            "uncertainty": {
                "maps": self.select("uncertainty"),
                "top": number(uncertainty.top(self.material)),
                "stops": uncertainty.STOPS,
                "within": uncertainty.WITHIN,
            },
        }

    def training(self) -> dict[str, Any]:
        """Curves, and predicted slices."""
        by_method = [(m, self.select("residual", method=m)) for m in self.material.methods]
        return {
            "curves": self.select("training"),
            "slices": self.select("slices"),
            "motion": self.select("motion"),
            "residuals": [(plain(m), figures) for m, figures in by_method if figures],
        }

    def settings(self) -> dict[str, Any]:
        """The settings as TOML."""
        from ..config import settings_to_toml

        return {"toml": plain(settings_to_toml(self.material.inp.settings))}

    def methods(self) -> dict[str, Any]:
        """Methods text and its bibliography."""
        inp, prepared = self.material.inp, self.material.prepared
        text = methods.methods_text(
            inp.settings,
            groups=[inp.group],
            methods=[name for name, r in self.material.methods.items() if r.volume is not None],
            versions=inp.provenance.get("versions") or {},
            metrics=None if prepared is None else prepared.metrics,
        )
        return {
            "paragraphs": [p for p in methods.readable(text).split("\n\n") if p.strip()],
            "markdown": text,
            "latex": latex(text),
            "bibtex": methods.bibliography(text),
        }

    def errors(self) -> dict[str, Any]:
        """What failed, with its crash text."""
        return {
            "errors": [
                {key: plain(error.get(key) or "") for key in ("step", "message", "traceback")}
                for error in self.material.inp.errors
            ],
            "problems": [plain(text) for text in self.material.problems],
        }
