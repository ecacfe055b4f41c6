# SPDX-License-Identifier: Apache-2.0
"""Which images of a dataset are considered.

Only the ``anat`` folders of the chosen subjects are listed.  Names are judged by the
validator of BIDS; filters mean what they mean to pybids, whose index of a whole dataset
would take many times as long.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .exitcodes import ExitCode, UserError
from .names import (
    ENTITY_ORDER,
    IMAGE_EXTENSIONS,
    LONG_NAMES,
    BidsName,
    natural_key,
    parse_name,
    strip_prefix,
)
from .settings import MODALITIES, Selection

#: Entities that a filter may name, long names as pybids has them.
_KNOWN = (*(LONG_NAMES.get(key, key) for key in ENTITY_ORDER), "datatype", "suffix", "extension")
_LABEL = re.compile(r"[0-9a-zA-Z+]+")
_NOT_VALID = "not a valid BIDS name (--skip-bids-validation uses it all the same)"
_LISTERS = 8  # threads that list folders
T = TypeVar("T")
R = TypeVar("R")


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
    filters = _check_filters(_read_filters(selection.bids_filter_file), selection.bids_filter_file)
    suffixes = list(selection.modalities or MODALITIES)
    images = []
    for subject, session, path in _anat_files(root, subjects):
        name = parse_name(path.name)
        if name.suffix not in suffixes or name.extension not in IMAGE_EXTENSIONS:
            continue
        valid = selection.skip_bids_validation or _is_valid(subject, session, path.name)
        if filters and not (valid and _passes(name, filters)):
            continue
        uri = f"bids:raw:{path.relative_to(root).as_posix()}"
        images.append(ImageFile(path, uri, subject, name, None if valid else _NOT_VALID))
    sessions = _session_labels(selection)
    images = [
        image for image in images if not sessions or image.name.entities.get("ses") in sessions
    ]
    if not images:
        raise UserError(
            f"{root}: no {', '.join(suffixes)} image in anat/ matches"
            + _restrictions(selection)
            + "; nothing to do",
            ExitCode.NOTHING_SELECTED,
        )
    return sorted(images, key=lambda image: natural_key(image.uri))


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
    hint = f", among them {', '.join(prefix + label for label in near)}" if near else ""
    raise UserError(
        f"no such {what}: {', '.join(prefix + label for label in missing)}; the dataset has "
        f"{len(there) or 'no'} {what}{'' if len(there) == 1 else 's'}{hint}",
        ExitCode.NOTHING_SELECTED,
    )


def _restrictions(selection: Selection) -> str:
    used = [
        f"--{name.replace('_', '-')}"
        for name in ("participant_label", "session_label", "modalities", "bids_filter_file")
        if getattr(selection, name)
    ]
    return f" {' and '.join(used)}" if used else ""


def _anat_files(root: Path, subjects: list[str]) -> Iterable[tuple[str, str | None, Path]]:
    """``(subject, session or None, path)`` of everything in ``anat`` folders."""

    def of_subject(subject: str) -> list[tuple[str, str | None, Path]]:
        folder = root / f"sub-{subject}"
        there = {entry.name for entry in os.scandir(folder)}
        anats: list[tuple[str | None, Path]] = [(None, folder / "anat")] if "anat" in there else []
        anats += [(n[4:], folder / n / "anat") for n in sorted(there) if n.startswith("ses-")]
        return [(subject, ses, anat / name) for ses, anat in anats for name in _names_in(anat)]

    for files in each(of_subject, subjects, _LISTERS):
        yield from files


def each(
    work: Callable[[T], R], items: Sequence[T], workers: int, *, lets_others_run: bool = False
) -> Iterator[R]:
    """``work`` of every item, in order; by threads from when a batch waits more than it computes.

    Threads that compute in Python only stop each other: they help where files are waited for, as
    on a network disk, and where work ``lets_others_run``, as decompression does.  Items go in
    batches, since to hand a job over costs as much as a small job.

    >>> list(each(abs, range(-3, 3), 2))
    [3, 2, 1, 0, 1, 2]
    """
    size = max(1, min(32, len(items) // (8 * workers)))
    batches = (items[first : first + size] for first in range(0, len(items), size))

    def of_batch(batch: Sequence[T]) -> list[R]:
        return [work(item) for item in batch]

    while not lets_others_run and (batch := next(batches, None)) is not None:
        start, computing = time.monotonic(), time.thread_time()
        done = of_batch(batch)
        computing = time.thread_time() - computing
        lets_others_run = time.monotonic() - start > 2 * computing
        yield from done
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for done in pool.map(of_batch, batches):
            yield from done


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_valid(subject: str, session: str | None, name: str) -> bool:
    """Whether the validator of BIDS accepts the name in its folder.

    It is asked once for each ending, since labels of subjects and sessions are all alike.
    """
    start = f"sub-{subject}_" if session is None else f"sub-{subject}_ses-{session}_"
    labels = [subject] if session is None else [subject, session]
    if not name.startswith(start) or not all(_LABEL.fullmatch(label) for label in labels):
        return False
    return _is_valid_ending(name[len(start) :], session is not None)


@functools.cache
def _is_valid_ending(ending: str, with_session: bool) -> bool:
    from bids_validator import BIDSValidator

    start = "/sub-01/ses-1/anat/sub-01_ses-1_" if with_session else "/sub-01/anat/sub-01_"
    return bool(BIDSValidator().is_bids(start + ending))


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


def _check_filters(filters: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Filters under long names, each known."""
    result: dict[str, Any] = {}
    for key, value in filters.items():
        name = LONG_NAMES.get(key, key)
        if name not in (*_KNOWN, "regex_search"):
            near = difflib.get_close_matches(name, sorted(_KNOWN), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_KNOWN))}"
            raise UserError(
                f"--bids-filter-file {path}: unknown entity {key!r}; {hint}", ExitCode.USAGE
            )
        result[name] = value
    regex = result.get("regex_search")
    for name, value in result.items() if regex else ():
        for item in value if isinstance(value, list) else [value]:
            try:
                re.compile(str(item) if item != "*" else "")
            except re.error as error:
                raise UserError(
                    f"--bids-filter-file {path}: {name!r}: {item!r} is no regular expression "
                    f"({error})",
                    ExitCode.USAGE,
                ) from error
    return result


def _passes(name: BidsName, filters: dict[str, Any]) -> bool:
    """Whether an image has a value of each filter: '*' is any, null is none."""
    values = {LONG_NAMES.get(key, key): value for key, value in name.entities.items()}
    values |= {"datatype": "anat", "suffix": name.suffix, "extension": name.extension}
    regex = bool(filters.get("regex_search"))
    for key, wanted in filters.items():
        if key == "regex_search" or wanted == []:
            continue
        choices = wanted if isinstance(wanted, list) else [wanted]
        if key == "extension":
            choices = [
                "." + c.lstrip(".") if isinstance(c, str) and c != "*" else c for c in choices
            ]
        if not any(_matches(key, values.get(key), choice, regex) for choice in choices):
            return False
    return True


def _matches(key: str, value: str | None, choice: Any, regex: bool) -> bool:
    if choice is None:
        return value is None
    if value is None or choice == "*":
        return value is not None
    if regex:
        return re.search(str(choice), value) is not None
    number = isinstance(choice, int) or key == "run"  # an index, whatever its zeros
    if number and value.isdigit() and str(choice).isdigit():
        return int(value) == int(choice)
    return value == str(choice)
