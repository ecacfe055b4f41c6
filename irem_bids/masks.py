# SPDX-License-Identifier: Apache-2.0
"""Brain masks of the stacks in derivative datasets, matched by the entities in their names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .exitcodes import ExitCode, UserError
from .names import IMAGE_EXTENSIONS, BidsName, parse_name, same_value
from .settings import MODALITIES

#: Entities that describe the mask, not the image it belongs to.
_OF_MASK = {"desc", "label", "space", "res", "den", "seg", "mod"}
_NATIVE_SPACES = {None, "orig", "native", "individual", "scanner", "acq"}


@dataclass(frozen=True)
class MaskFile:
    """A mask image; ``contrast`` is None where its name does not tell."""

    path: str
    uri: str
    entities: dict[str, str]
    contrast: str | None
    dataset: int


def link_name(number: int) -> str:
    """Name in ``DatasetLinks`` of the derivative dataset given as ``number``-th, from 0."""
    return "masks" if number == 0 else f"masks{number + 1}"


def find_masks(folders: tuple[str, ...], subjects: list[str]) -> dict[str, list[MaskFile]]:
    """Masks per subject label in derivative datasets.

    Raises
    ------
    UserError
        A folder is missing or has no ``sub-*`` folder in it.
    """
    found: dict[str, list[MaskFile]] = {}
    for number, folder in enumerate(folders):
        root = Path(folder)
        if not root.is_dir():
            raise UserError(
                f"--derivatives {folder}: there is no such folder; expected the path of a "
                "derivative dataset, without a name before it",
                ExitCode.NO_INPUT,
            )
        if not any(name.startswith("sub-") for name in os.listdir(root)):
            raise UserError(
                f"--derivatives {folder}: no sub-* folder in it; expected a derivative dataset "
                "such as derivatives/masks",
                ExitCode.NO_INPUT,
            )
        for subject in subjects:
            masks = _masks_below(root, subject, number)
            found.setdefault(subject, []).extend(masks)
    return found


def match_masks(masks: list[MaskFile], image: BidsName) -> list[MaskFile]:
    """The masks whose entities are those of ``image``, best first.

    Earlier datasets come first, then masks that name the image's contrast.
    """
    fitting = [
        mask
        for mask in masks
        if mask.contrast in (None, image.suffix)
        and all(
            same_value(mask.entities.get(key), image.entities.get(key))
            for key in mask.entities.keys() | image.entities.keys()
        )
    ]
    return sorted(fitting, key=lambda mask: (mask.dataset, mask.contrast is None, mask.path))


def _masks_below(root: Path, subject: str, number: int) -> list[MaskFile]:
    masks = []
    for folder, _, names in os.walk(root / f"sub-{subject}"):
        for name in sorted(names):
            parsed = parse_name(name)
            if parsed.suffix != "mask" or parsed.extension not in IMAGE_EXTENSIONS:
                continue
            if not _is_brain(parsed):
                continue
            path = Path(folder) / name
            named = [word for word in (*parsed.words, parsed.entities.get("mod")) if word]
            masks.append(
                MaskFile(
                    str(path),
                    f"bids:{link_name(number)}:{path.relative_to(root).as_posix()}",
                    {k: v for k, v in parsed.entities.items() if k not in _OF_MASK},
                    next((word for word in named if word in MODALITIES), None),
                    number,
                )
            )
    return masks


def _is_brain(name: BidsName) -> bool:
    """Whether a mask is of the brain, in the image's own space."""
    return (
        name.entities.get("desc", "brain").lower() in ("brain", "head")
        and name.entities.get("label", "brain").lower() in ("brain", "head")
        and name.entities.get("space") in _NATIVE_SPACES
    )
