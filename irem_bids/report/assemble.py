# SPDX-License-Identifier: Apache-2.0
"""Assembly of the page by nireports, with our template and no network."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from . import viewer
from .figures import make_figures
from .material import Material, ReportInput, load
from .policy import header
from .sections import TEMPLATES, Page
from .studio import Studio
from .wording import plain


def build_report(
    inputs: Sequence[ReportInput], out_dir: Path, subject: str, session: str | None = None
) -> Path:
    """Build the page of a subject's session: ``OUT/sub-X[_ses-Y].html``.

    Parameters
    ----------
    inputs
        One entry per group of stacks; a failed one may hold nothing but errors.
    out_dir
        The derivatives folder; figures go to ``sub-X/figures`` in it.
    subject, session
        Labels, with or without ``sub-`` and ``ses-``.

    Returns
    -------
    Path
        The page.  It appears whole or not at all.
    """
    out_dir = Path(out_dir)
    subject = subject.removeprefix("sub-")
    name = f"sub-{subject}"
    if session:
        name += f"_ses-{session.removeprefix('ses-')}"
    materials = [load(inp) for inp in inputs]
    with tempfile.TemporaryDirectory(prefix="irem-bids-") as scratch:
        fragments = Path(scratch) / "sub-report" / "figures"
        fragments.mkdir(parents=True)
        for count, material in enumerate(materials, start=1):
            _fragments(material, out_dir, f"sub-{subject}", fragments, (count, len(materials)))
        return _assemble(Path(scratch), out_dir, name)


def _fragments(
    material: Material, out_dir: Path, subject: str, folder: Path, place: tuple[int, int]
) -> None:
    studio = Studio(material, out_dir / subject / "figures")
    figures = make_figures(material.inp, studio.folder, material)
    volumes = studio.try_to("viewer", partial(viewer.build, studio))
    count, total = place
    page = Page(material, figures, out_dir, viewer=volumes, alone=total == 1, number_in_page=count)
    page.write(folder)


def _assemble(scratch: Path, out_dir: Path, name: str) -> Path:
    from nireports.assembler.report import Report

    final = out_dir / f"{name}.html"
    temporary = out_dir / f".{os.getpid()}.{name}.html"
    report = Report(
        out_dir,
        None,
        bootstrap_file=TEMPLATES.parent / "report.yml",
        out_filename=temporary.absolute(),
        reportlets_dir=scratch,
        plugins=[],
        # a JSON string is a YAML string, whatever the path holds
        metadata={"template_path": json.dumps(str(TEMPLATES / "report.html"))},
    )
    report.title = plain(name.replace("_", " "))
    script = (TEMPLATES / "viewer.js").read_text(encoding="utf-8")
    report.header = [header(script)]
    report.footer = [f"<script>{script}</script>"]
    try:
        report.generate_report()
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return final
