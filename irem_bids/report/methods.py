# SPDX-License-Identifier: Apache-2.0
"""Methods text and bibliography, made from the settings of what really ran."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import write_text
from ..settings import Settings
from .latex import document
from .material import GroupLike

PROFILES = {
    "gaussian": "a Gaussian slice profile whose full width at half maximum is the slice thickness",
    "box": "a box-shaped slice profile as wide as the slice is thick",
    "sinc": "the slice profile of a Hamming-windowed sinc pulse as wide as the slice is thick",
    "none": "no slice profile (each voxel is a point sample)",
}
METHOD_NAMES = {
    "irem": "a continuous field on a profile-aware linear solution (`irem`)",
    "irem2021": "the implicit network of Wu and colleagues (`irem2021`)",
    "srr": "profile-aware super-resolution with total variation (`srr`)",
    "bspline": "averaged cubic B-spline interpolation (`bspline`)",
}


def methods_text(
    settings: Settings,
    *,
    groups: Sequence[GroupLike] = (),
    methods: Sequence[str] | None = None,
    versions: Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Methods paragraphs in Markdown, with citations in Pandoc's notation.

    ``methods`` are those that gave an image (default: those asked for); ``metrics`` is
    ``Prepared.metrics``, from which the text knows what masks were used.
    """
    done = tuple(settings.output.method if methods is None else methods)
    found = dict(versions or {})
    parts = [
        _inputs(groups, settings, found),
        _normalise(settings, metrics or {}, found),
        *[_METHODS[name](settings) for name in done if name in _METHODS],
        _output(settings, done, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_version(name: str, versions: Mapping[str, Any], key: str | None = None) -> str:
    number = versions.get(key or name) or versions.get((key or name).lower())
    return f"{name} {number}" if number else name


def _inputs(groups: Sequence[GroupLike], settings: Settings, versions: Mapping[str, str]) -> str:
    version = versions.get("irem-bids", __version__)
    words = [
        f"Isotropic images were reconstructed with irem-bids {version} from stacks of thick slices"
    ]
    counts = []
    for group in groups:
        planes = [s.plane for s in group.stacks]
        listed = ", ".join(
            f"{planes.count(p)} {p}" for p in ("axial", "coronal", "sagittal") if p in planes
        )
        counts.append(f"{group.suffix}: {listed}")
    if counts:
        words.append(f" ({'; '.join(counts)})")
    words.append(
        ", found in a BIDS dataset; the orientation of a stack was "
        "decided from its affine and voxel sizes, and the slice thickness "
    )
    thickness = settings_source(groups, settings)
    words.append(f"{thickness}.")
    return "".join(words)


def settings_source(groups: Sequence[GroupLike], settings: Settings) -> str:
    """Where the slice thickness of the stacks came from, in words."""
    sources = {s.thickness_source for group in groups for s in group.stacks}
    if sources == {"setting"} or (not groups and settings.acquisition.slice_thickness):
        return "was given by the user"
    if sources == {"spacing"}:
        return "was taken to be the slice spacing"
    if sources == {"sidecar"}:
        return "was read from the sidecars"
    return "was read from the sidecar where plausible and taken to be the slice spacing otherwise"


def _normalise(settings: Settings, metrics: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    chosen = settings.normalise
    simpleitk = f"{_with_version('SimpleITK', versions)} [@lowekamp2013simpleitk]"
    masks = set(dict(metrics.get("masked", {})).values())
    if not masks and settings.selection.derivatives:
        masks = {"given", "otsu"}
    if masks == {"given"}:
        words = "The foreground of each stack was given by a mask"
    elif "given" in masks:
        words = "The foreground was given by a mask where there was one, else found by a threshold"
    else:
        words = "The foreground of each stack was found by a threshold"
    words += (
        " and its intensity non-uniformity was corrected with N4 [@tustison2010n4], as implemented "
        f"in {simpleitk}"
        if chosen.n4
        else "; no bias field correction was applied to single stacks"
    )
    words += (
        f". Intensities were scaled so that the {chosen.intensity_percentile:g}th percentile of "
        "the foreground is one. "
    )
    if chosen.registration:
        rule = (
            "chosen at random"
            if chosen.reference == "random"
            else ("the stack with the most foreground voxels weighted by signal-to-noise ratio")
        )
        words += (
            f"All stacks were registered rigidly to a reference stack ({rule}) in "
            f"{chosen.registration_levels} resolution levels"
            + ("." if chosen.n4 else f" with {simpleitk}.")
        )
    else:
        words += "The stacks were not registered: the positions in their headers were trusted."
    if chosen.held_out > 0:
        words += (
            f" {100 * chosen.held_out:g} % of the foreground voxels were never trained on and "
            "served to measure the quality of prediction."
        )
    return words


def _srr(settings: Settings) -> str:
    chosen = settings.srr
    weight = (
        "weight chosen by the noise of the stacks"
        if chosen.srr_lambda is None
        else f"weight {chosen.srr_lambda:g}"
    )
    return (
        "The method `srr` finds the image whose simulated slices, computed with "
        f"{_profile(settings)}, are nearest to the acquired ones in the "
        "least-squares sense under a total-variation penalty "
        f"({weight}, Huber width {chosen.srr_huber:g}; "
        f"{chosen.srr_iterations} conjugate-gradient iterations, {chosen.srr_reweightings} "
        "reweightings), in the tradition of slice-to-volume super-resolution "
        "[@gholipour2010robust; @ebner2020automated]."
    )


def _profile(settings: Settings) -> str:
    acquisition = settings.acquisition
    if acquisition.profile_file and acquisition.profile != "none":
        return "a measured slice profile"
    return PROFILES[acquisition.profile]


def _irem(settings: Settings) -> str:
    chosen = settings.irem
    refine = (
        f" Poses, one gain and a smooth bias per stack were refined together with the image, "
        f"coarse to fine{_motion(settings)}."
        if chosen.refine_poses and settings.normalise.registration
        else ""
    )
    return (
        "The method `irem` represents the head as a continuous function of position, following "
        "the idea of IREM [@wu2021irem]. Unlike there, a voxel is the weighted mean of the "
        f"function through the slice, by {_profile(settings)}, and the function stands on a "
        "profile-aware linear solution [@gholipour2010robust; @ebner2020automated], to which a "
        "Bregman iteration returns the contrast that its penalty takes [@osher2005iterative]. "
        "Where slices leave gaps, it is blended with the most likely image of a scale-free "
        "spectrum, by a share that depends on what either recovers of a block of the head, turned "
        "and scanned again." + refine + _network(settings)
    )


def _network(settings: Settings) -> str:
    chosen = settings.irem
    if not chosen.steps:
        return ""
    return (
        f" A convolutional network ({chosen.layers} layers of {chosen.hidden} channels, "
        f"{chosen.steps} training steps) adds what the solution misses. It was trained on the "
        "subject's own stacks only: the solution of a block of the head was turned, the scan was "
        "simulated from it and solved again, and the network learned the difference. What it said "
        "was reconciled with the stacks [@schwab2019deep], so that it adds only detail that they "
        "cannot see. That is used where it lowers the error of held-out voxels, else what it said "
        "as it stands, where that does, else nothing of it."
    )


def _motion(settings: Settings) -> str:
    chosen = settings.irem
    words = {
        "stack": "",
        "slice": ", with a gain and a pose for each slice (a random walk in the order of "
        "acquisition)",
        "auto": ", with a gain and a pose for each slice where that predicts held-out voxels "
        "better",
    }[chosen.motion]
    acquisition = settings.acquisition
    tried = acquisition.profile != "none" and not acquisition.profile_file
    words += {
        "stated": "",
        "learned": ", and the width of each stack's slice profile was estimated",
        "auto": ", and the width of each stack's slice profile was estimated where that predicts "
        "held-out voxels better"
        if tried
        else "",
    }[acquisition.profile_width]
    if chosen.robust:
        words += "; slices that did not fit were given less weight"
    return words


def _irem2021(settings: Settings) -> str:
    chosen = settings.irem2021
    return (
        "The method `irem2021` is the network of IREM [@wu2021irem]: Fourier features "
        f"[@tancik2020fourier] ({chosen.fourier_features}, standard deviation "
        f"{chosen.fourier_sigma:g}) and eighteen layers of {chosen.width} neurons with batch "
        "normalisation, ReLU and two skip connections, trained on point samples with Adam "
        f"(learning rate {chosen.learning_rate_2021:g}, halved every {chosen.decay_every} epochs; "
        f"{chosen.epochs_2021} epochs; batches of {chosen.batch_size_2021})."
    )


def _bspline(settings: Settings) -> str:
    return (
        "The method `bspline` up-samples each registered stack by cubic B-splines and averages "
        "the results."
    )


_METHODS = {"irem": _irem, "irem2021": _irem2021, "srr": _srr, "bspline": _bspline}


def _output(settings: Settings, done: Sequence[str], versions: Mapping[str, str]) -> str:
    if not done:
        return ""
    size = settings.output.output_resolution
    voxel = f"{size:g} mm" if size else "the finest in-plane voxel size of the stacks"
    names = [METHOD_NAMES.get(name, f"`{name}`") for name in done]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    torch = (
        f" Networks and solvers ran in {_with_version('PyTorch', versions, 'torch')} "
        f"[@paszke2019pytorch] and {_with_version('numba', versions)} [@lam2015numba]."
        if {"irem", "irem2021", "srr"} & set(done)
        else ""
    )
    return (
        f"Images were written at {voxel} for {listed}; random numbers had the seed "
        f"{settings.run.random_seed}.{torch} The steps were run by "
        f"{_with_version('nipype', versions)} [@gorgolewski2011nipype]; images were read and "
        f"written with {_with_version('nibabel', versions)} [@brett2024nibabel], and derivatives "
        f"and reports with {_with_version('pybids', versions)} [@yarkoni2019pybids], niworkflows "
        "and nireports [@esteban2023nireports]."
    )


def citation_keys(text: str) -> list[str]:
    """Keys cited in a methods text, in order of first appearance."""
    return list(dict.fromkeys(re.findall(r"@([a-z]+\d{4}[a-z0-9]*)", text)))


def readable(text: str) -> str:
    """The text with authors and years instead of keys, without marks of Markdown.

    >>> readable("as in `irem` [@wu2021irem; @tustison2010n4]")
    'as in irem (Wu et al. 2021; Tustison et al. 2010)'
    """
    names = {
        key: f"{author}{' et al.' if ' and ' in others else ''} {year}"
        for key, author, others, year in re.findall(
            r"^@\w+\{(\w+),\n  author = \{([^,]+),(.*?)\},\n.*?^  year = \{(\d+)\}",
            _references(),
            re.DOTALL | re.MULTILINE,
        )
    }

    def cite(match: re.Match[str]) -> str:
        return "(" + "; ".join(names[key] for key in citation_keys(match.group(0))) + ")"

    return re.sub(r"\[@[^\]]+\]", cite, text).replace("`", "")


def _references() -> str:
    return files(__package__).joinpath("references.bib").read_text(encoding="utf-8")


def bibliography(text: str | None = None) -> str:
    """BibTeX of everything that ``text`` cites (of all entries without a text)."""
    entries = {
        match.group(1): match.group(0)
        for match in re.finditer(r"^@\w+\{(\w+),\n.*?^\}$", _references(), re.DOTALL | re.MULTILINE)
    }
    keys = list(entries) if text is None else citation_keys(text)
    return "\n\n".join(entries[key] for key in keys) + "\n"


def write_citation(folder: Path, text: str) -> list[Path]:
    """Write ``CITATION.md``, ``.tex`` and ``.bib`` into ``folder`` (the log folder)."""
    contents = (
        ("CITATION.md", text),
        ("CITATION.tex", document(text)),
        ("CITATION.bib", bibliography(text)),
    )
    return [write_text(Path(folder) / name, content) for name, content in contents]
