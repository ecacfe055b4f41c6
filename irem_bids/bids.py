# SPDX-License-Identifier: Apache-2.0
"""A BIDS dataset as groups of stacks.

A group is one subject, session and contrast; its stacks are what one
reconstruction is made from.  Nothing of a layout leaves this module: groups
are plain data that can be pickled and written as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .database import Database
from .doubts import label_doubts, mask_doubts, thickness_doubts
from .groups import Discovery, Excluded, Group, Rejected, StackFile, describe
from .images import (
    SIDECAR_FIELDS,
    NotAStack,
    check_voxels,
    read_header,
    reason_by_name,
    reason_by_sidecar,
    slice_thickness,
    slice_times,
)
from .layout import ImageFile, each, list_images, select_subjects
from .masks import MaskFile, find_masks, link_name, match_masks
from .names import Sidecars, natural_key
from .reconstruction.geometry import GeometryError, Grid
from .reconstruction.stack import ImageError, read_image, read_mask
from .resources import available_cpus
from .settings import MODALITIES, Acquisition, Settings

__all__ = [
    "Discovery",
    "Excluded",
    "Group",
    "Rejected",
    "StackFile",
    "dataset_links",
    "describe",
    "discover",
]

#: Entities whose values are reconstructed apart.
KEPT_APART = ("ce", "trc", "echo", "flip", "inv", "mt", "part")
#: A dry run of a larger dataset looks at headers and lengths only, and says so.
MAX_DRY_READS = 300
MOST_READERS = 8  # threads that read images

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class _Candidate:
    """An image after inspection: a stack (its label not yet final) or the reason why not."""

    image: ImageFile
    stack: StackFile | None = None
    reason: str | None = None
    warnings: tuple[str, ...] = ()
    damaged: bool = False


@dataclass(frozen=True)
class _Inspection:
    """What the inspection of every image needs."""

    isotropic_ratio: float
    acquisition: Acquisition
    sidecars: Sidecars
    database: Database
    masks: dict[str, list[MaskFile]]
    shared_names: frozenset[tuple]
    read_voxels: bool


def discover(
    bids_dir: str | Path,
    settings: Settings,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Discovery:
    """Find the groups of a dataset.

    Every candidate is read to its last voxel, so that a damaged image is left
    out here with its reason and the rest of its group goes on.  A dry run of
    more than :data:`MAX_DRY_READS` images looks at headers and file lengths only.

    Raises
    ------
    UserError
        An unknown participant or session, or nothing matches (18); a folder of
        ``--derivatives`` is missing (66); a bad filter file (64).
    """
    root = Path(bids_dir).resolve()
    database = Database(root, settings.selection.bids_database_dir)
    subjects = select_subjects(root, settings.selection)
    images = list_images(root, subjects, settings.selection)
    masks = find_masks(settings.selection.derivatives, subjects)
    read_voxels = not dry_run or len(images) <= MAX_DRY_READS
    notes = []
    if not read_voxels:
        notes.append(
            f"{len(images)} images: headers and file lengths were checked, voxels were not read "
            "(a run reads them)"
        )
    inspection = _Inspection(
        settings.selection.isotropic_ratio,
        settings.acquisition,
        Sidecars(root, database, SIDECAR_FIELDS),
        database,
        masks,
        _shared_names(images),
        read_voxels,
    )
    candidates = _inspect_all(images, inspection, settings.run.nprocs, progress)
    database.save()
    for number, folder in enumerate(settings.selection.derivatives):
        prefix = f"bids:{link_name(number)}:"
        if not any(((c.stack and c.stack.mask_uri) or "").startswith(prefix) for c in candidates):
            notes.append(f"--derivatives {folder}: no mask in it matches an image by its entities")
    return _group(candidates, subjects, settings.selection.modalities, tuple(notes))


def dataset_links(bids_dir: str | Path, settings: Settings) -> dict[str, str]:
    """``DatasetLinks`` for the URIs in groups: 'raw', 'masks', 'masks2' ... to file URIs."""
    links = {"raw": Path(bids_dir).resolve().as_uri()}
    for number, folder in enumerate(settings.selection.derivatives):
        links[link_name(number)] = Path(folder).resolve().as_uri()
    return links


def _shared_names(images: list[ImageFile]) -> frozenset[tuple]:
    """Entity sets that several contrasts have: a mask that names none is ambiguous there."""
    seen: dict[tuple, set[str]] = {}
    for image in images:
        key = tuple(sorted(image.name.entities.items()))
        seen.setdefault(key, set()).add(image.name.suffix)
    return frozenset(key for key, suffixes in seen.items() if len(suffixes) > 1)


def _inspect_all(
    images: list[ImageFile],
    inspection: _Inspection,
    nprocs: int | None,
    progress: Progress | None,
) -> list[_Candidate]:
    workers = min(nprocs or available_cpus(), MOST_READERS)
    candidates = []
    jobs = each(
        lambda image: _inspect(image, inspection),
        images,
        workers,
        lets_others_run=inspection.read_voxels,
    )
    for number, candidate in enumerate(jobs, 1):
        candidates.append(candidate)
        if progress is not None:
            progress(number / len(images), f"image {number} of {len(images)}")
    return candidates


def _inspect(image: ImageFile, inspection: _Inspection) -> _Candidate:
    """Judge one image; what is not usable comes back with its reason."""
    reason = image.problem or reason_by_name(image.name.entities)
    if reason:
        return _Candidate(image, reason=reason)
    metadata, problems = inspection.sidecars.metadata(image.path)
    reason = reason_by_sidecar(metadata)
    if reason:
        return _Candidate(image, reason=reason)
    try:
        header = read_header(image.path, inspection.isotropic_ratio, inspection.database)
        if inspection.read_voxels:
            inspection.database.recall(image.path, "voxels", lambda: check_voxels(image.path))
        mask = _mask_of(image, header.grid, inspection)
        about_mask = mask_doubts(mask.path, header.grid) if mask and inspection.read_voxels else []
    except (ImageError, GeometryError, OSError) as error:
        reason = str(error).removeprefix(f"{image.path.name}: ")
        return _Candidate(image, reason=reason, damaged=not isinstance(error, NotAStack))
    thickness, source, doubt = slice_thickness(
        metadata, header.spacing, inspection.acquisition.slice_thickness
    )
    times, untimely = slice_times(metadata, header.grid.shape[header.slice_axis], header.slice_axis)
    stack = StackFile(
        path=str(image.path),
        label="",
        plane=header.plane,
        shape=header.grid.shape,
        in_plane=header.in_plane,
        spacing=header.spacing,
        slice_thickness=thickness,
        thickness_source=source,
        mask=mask.path if mask else None,
        uri=image.uri,
        mask_uri=mask.uri if mask else None,
        slice_times=times,
    )
    doubts = [
        *problems,
        *([doubt] if doubt else thickness_doubts(thickness, header.spacing, source)),
        *([untimely] if untimely else []),
        *label_doubts(image.name.entities, header.plane),
        *header.doubts,
        *about_mask,
    ]
    return _Candidate(image, stack, warnings=tuple(f"{image.path.name}: {d}" for d in doubts))


def _mask_of(image: ImageFile, grid: Grid, inspection: _Inspection) -> MaskFile | None:
    """The mask of an image; one that names no contrast must share the grid if that is ambiguous."""
    key = tuple(sorted(image.name.entities.items()))
    for mask in match_masks(inspection.masks.get(image.subject, []), image.name):
        ambiguous = mask.contrast is None and key in inspection.shared_names
        if ambiguous and read_image(mask.path)[1] != grid:
            continue
        if inspection.read_voxels:
            try:
                read_mask(mask.path, grid)
            except (ImageError, GeometryError) as error:
                raise ImageError(f"its mask is refused: {error}") from error
        return mask
    return None


def _group(
    candidates: list[_Candidate],
    subjects: list[str],
    modalities: tuple[str, ...],
    notes: tuple[str, ...],
) -> Discovery:
    groups, rejected = _form_groups(candidates)
    chosen, not_asked = _choose_contrasts(groups, modalities)
    seen = {candidate.image.subject for candidate in candidates}
    wanted = ", ".join(modalities or MODALITIES)
    rejected += [
        Rejected(f"sub-{s}", f"no image of {wanted} in anat/") for s in subjects if s not in seen
    ]
    return Discovery(tuple(chosen), tuple(rejected), tuple(not_asked), notes)


def _form_groups(candidates: list[_Candidate]) -> tuple[list[Group], list[Rejected]]:
    """Candidates by subject, session, suffix and the entities kept apart."""
    members: dict[tuple, list[_Candidate]] = {}
    for candidate in candidates:
        members.setdefault(_key(candidate), []).append(candidate)
    _adopt_orphans(members)
    groups, rejected = [], []
    for (subject, session, suffix, entities), found in sorted(members.items(), key=_key_order):
        found = sorted(found, key=lambda c: natural_key(c.image.path.name))
        group = Group(
            subject,
            session,
            suffix,
            dict(entities),
            _labelled([c.stack for c in found if c.stack is not None]),
            tuple(
                Excluded(str(c.image.path), c.reason, c.damaged)
                for c in found
                if c.reason is not None
            ),
            tuple(text for c in found for text in c.warnings),
        )
        if len(group.planes) >= 3:
            groups.append(group)
        elif len(group.planes) == 2:
            text = f"two orientations only ({', '.join(group.planes)}); three give a better image"
            groups.append(replace(group, warnings=(*group.warnings, text)))
        else:
            rejected.append(Rejected(group.name, _why_not(group), group.excluded))
    return groups, rejected


def _key(candidate: _Candidate) -> tuple[str, str | None, str, tuple[tuple[str, str], ...]]:
    entities = candidate.image.name.entities
    kept = tuple((key, entities[key]) for key in KEPT_APART if key in entities)
    return candidate.image.subject, entities.get("ses"), candidate.image.name.suffix, kept


def _key_order(item: tuple[tuple, list[_Candidate]]) -> tuple:
    (subject, session, suffix, entities), _ = item
    rank = MODALITIES.index(suffix) if suffix in MODALITIES else len(MODALITIES)
    return natural_key(subject), natural_key(session or ""), rank, entities


def _adopt_orphans(members: dict[tuple, list[_Candidate]]) -> None:
    """Show images without a stack beside them (part-phase) with their nearest group."""
    for key in list(members):
        if any(c.stack for c in members[key]):
            continue
        homes = [k for k in members if k[:3] == key[:3] and any(c.stack for c in members[k])]
        if homes:
            members[min(homes, key=lambda k: len(set(k[3]) ^ set(key[3])))] += members.pop(key)


def _labelled(stacks: list[StackFile]) -> tuple[StackFile, ...]:
    counts: dict[str, int] = {}
    labelled = []
    for stack in stacks:
        counts[stack.plane] = counts.get(stack.plane, 0) + 1
        labelled.append(replace(stack, label=f"{stack.plane}{counts[stack.plane]}"))
    return tuple(labelled)


def _why_not(group: Group) -> str:
    if not group.stacks:
        return "no usable stack; expected stacks of two or more orientations"
    count = len(group.stacks)
    return (
        f"one orientation only ({count} {group.planes[0]} stack{'' if count == 1 else 's'}); "
        "expected two or more orientations"
    )


def _choose_contrasts(
    groups: list[Group], modalities: tuple[str, ...]
) -> tuple[list[Group], list[Rejected]]:
    """The contrasts asked for; by default T1w where a session has any, else all."""
    if modalities:
        return [g for g in groups if g.suffix in modalities], []
    with_t1w = {(g.subject, g.session) for g in groups if g.suffix == "T1w"}
    chosen, not_asked = [], []
    for group in groups:
        if group.suffix == "T1w" or (group.subject, group.session) not in with_t1w:
            chosen.append(group)
        else:
            reason = f"there is T1w; add --modalities {group.suffix} to reconstruct it"
            not_asked.append(Rejected(group.name, reason, group.excluded))
    return chosen, not_asked
