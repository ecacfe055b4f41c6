# SPDX-License-Identifier: Apache-2.0
"""Which images of a dataset are considered: pybids, indexed no further than needed."""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .exitcodes import ExitCode, UserError
from .names import (
    IMAGE_EXTENSIONS,
    LONG_NAMES,
    BidsName,
    natural_key,
    parse_name,
    strip_prefix,
)
from .settings import MODALITIES, Selection

#: Paths that pybids need not look at: all but NIfTI images in anat folders of subjects.
_IGNORED = (
    r"^/(?!sub-)",
    r"^/sub-[^/]+(/ses-[^/]+)?/(?!ses-|anat(/|$))",
    r"/anat/.*(?<!\.nii)(?<!\.nii\.gz)$",
)


@dataclass(frozen=True)
class ImageFile:
    """An image that may be a stack; ``problem`` says why it already is not."""

    path: Path
    uri: str
    subject: str
    name: BidsName
    problem: str | None = None


def select_subjects(root: Path, selection: Selection) -> list[str]:
    """Labels of the participants to process, without 'sub-'.

    Raises
    ------
    UserError
        A label (of a participant or a session) that the dataset does not have (18).
    """
    there = sorted(
        (entry.name[4:] for entry in os.scandir(root) if _is_folder_of(entry, "sub-")),
        key=natural_key,
    )
    if not there:
        raise UserError(f"{root}: there is no sub-* folder", ExitCode.NOTHING_SELECTED)
    wanted = [strip_prefix(label, "sub-") for label in selection.participant_label]
    _check_labels("participant", "sub-", wanted, there)
    chosen = [label for label in there if label in wanted] if wanted else there
    sessions = _session_labels(selection)
    if sessions:
        known = sorted({name for label in chosen for name in _sessions_of(root, label)})
        _check_labels("session", "ses-", sessions, known)
    return chosen


def list_images(root: Path, subjects: list[str], selection: Selection) -> list[ImageFile]:
    """Images of the contrasts in ``anat`` folders that pass the filters.

    Raises
    ------
    UserError
        Nothing matches (18), or the filter file cannot be used (64, 66).
    """
    filters = _read_filters(selection.bids_filter_file)
    layout = _index(root, subjects, selection)
    filters = _translate(filters, set(layout.get_entities()), selection.bids_filter_file)
    suffixes = list(selection.modalities or MODALITIES)
    base = {"suffix": suffixes, "extension": list(IMAGE_EXTENSIONS), "datatype": "anat"}
    indexed = layout.get(**base, return_type="filename")
    try:
        found = layout.get(**{**base, **filters}, return_type="filename") if filters else indexed
    except ValueError:  # an entity that no file of this dataset has
        found = []
    if any(root not in Path(path).parents for path in indexed):
        raise UserError(
            f"--bids-database-dir {selection.bids_database_dir}: is of another dataset than "
            f"{root}; give an empty folder or none",
            ExitCode.USAGE,
        )
    images = [_image(root, Path(path)) for path in found]
    if not filters and not selection.skip_bids_validation:
        images += _not_valid(root, subjects, set(indexed), suffixes)
    sessions = _session_labels(selection)
    images = [
        image
        for image in images
        if image.subject in set(subjects)
        and image.name.suffix in suffixes
        and (not sessions or image.name.entities.get("ses") in sessions)
    ]
    if not images:
        raise UserError(
            f"{root}: no {', '.join(suffixes)} image in anat/ matches"
            + _restrictions(selection)
            + "; nothing to do",
            ExitCode.NOTHING_SELECTED,
        )
    return sorted(images, key=lambda image: natural_key(str(image.path)))


def _is_folder_of(entry: os.DirEntry, prefix: str) -> bool:
    return entry.name.startswith(prefix) and entry.is_dir()


def _sessions_of(root: Path, subject: str) -> list[str]:
    return [e.name[4:] for e in os.scandir(root / f"sub-{subject}") if _is_folder_of(e, "ses-")]


def _session_labels(selection: Selection) -> list[str]:
    return [strip_prefix(label, "ses-") for label in selection.session_label]


def _check_labels(what: str, prefix: str, wanted: list[str], there: list[str]) -> None:
    missing = [label for label in wanted if label not in there]
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], there, n=3) or there[:5]
    hint = ", ".join(prefix + label for label in near) or "none"
    raise UserError(
        f"no such {what}: {', '.join(prefix + label for label in missing)}; the dataset has "
        f"{len(there)} {what}{'' if len(there) == 1 else 's'}, among them {hint}",
        ExitCode.NOTHING_SELECTED,
    )


def _restrictions(selection: Selection) -> str:
    used = [
        f"--{name.replace('_', '-')}"
        for name in ("participant_label", "session_label", "modalities", "bids_filter_file")
        if getattr(selection, name)
    ]
    return f" {' and '.join(used)}" if used else ""


def _index(root: Path, subjects: list[str], selection: Selection) -> Any:
    """A layout without metadata; a database on disk always holds every subject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pybids' dependencies; not the user's to mend
        from bids import BIDSLayout, BIDSLayoutIndexer

        ignore = [re.compile(pattern) for pattern in _IGNORED]
        database = selection.bids_database_dir
        if selection.participant_label and database is None:
            labels = "|".join(re.escape(label) for label in subjects)
            ignore.append(re.compile(rf"^/sub-(?!(?:{labels})(?:/|$))"))
        indexer = BIDSLayoutIndexer(
            validate=not selection.skip_bids_validation, index_metadata=False, ignore=ignore
        )
        try:
            return BIDSLayout(root, validate=False, indexer=indexer, database_path=database)
        except Exception as error:  # pybids and sqlalchemy raise many kinds
            where = f"--bids-database-dir {database}" if database else str(root)
            raise UserError(
                f"{where}: pybids cannot index the dataset ({type(error).__name__}: {error})",
                ExitCode.CANNOT_CREATE if database else ExitCode.NOT_BIDS,
            ) from error


def _image(root: Path, path: Path, problem: str | None = None) -> ImageFile:
    name = parse_name(path.name)
    relative = path.relative_to(root)
    return ImageFile(path, f"bids:raw:{relative.as_posix()}", relative.parts[0][4:], name, problem)


def _not_valid(
    root: Path, subjects: list[str], indexed: set[str], suffixes: list[str]
) -> list[ImageFile]:
    """Images of the contrasts that pybids passed over, because their names are not valid BIDS."""
    problem = "not a valid BIDS name (--skip-bids-validation uses it all the same)"
    images = []
    for subject in subjects:
        folder = root / f"sub-{subject}"
        for anat in (folder / "anat", *folder.glob("ses-*/anat")):
            for name in sorted(os.listdir(anat)) if anat.is_dir() else ():
                parsed = parse_name(name)
                if parsed.suffix not in suffixes or parsed.extension not in IMAGE_EXTENSIONS:
                    continue
                if str(anat / name) not in indexed:
                    images.append(_image(root, anat / name, problem))
    return images


def _read_filters(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--bids-filter-file {path}: cannot be read ({error.strerror})", ExitCode.NO_INPUT
        ) from error
    except ValueError as error:
        raise UserError(
            f"--bids-filter-file {path}: is not valid JSON ({error})", ExitCode.USAGE
        ) from error
    filters = content.get("stack") if isinstance(content, dict) else None
    if not isinstance(filters, dict):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"--bids-filter-file {path}: holds {found or 'nothing'}; expected the key 'stack' "
            'with filters, such as {"stack": {"acquisition": ["axial", "coronal"]}}',
            ExitCode.USAGE,
        )
    return filters


def _translate(filters: dict[str, Any], known: set[str], path: str | None) -> dict[str, Any]:
    """Filters as pybids wants them: long names, '*' for any value, null for none."""
    if not filters:
        return {}
    from bids.layout import Query

    special = {"*": Query.ANY, None: Query.NONE}
    result: dict[str, Any] = {}
    for key, value in filters.items():
        name = LONG_NAMES.get(key, key)
        if name not in known | {"regex_search"}:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(
                f"--bids-filter-file {path}: unknown entity {key!r}; {hint}", ExitCode.USAGE
            )
        values = value if isinstance(value, list) else [value]
        values = [special.get(v, v) if isinstance(v, (str, type(None))) else v for v in values]
        result[name] = values if isinstance(value, list) else values[0]
    return result
