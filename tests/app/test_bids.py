# SPDX-License-Identifier: Apache-2.0
"""Discovery: which images become which groups, and why the others do not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from irem_bids.bids import Group, dataset_links, describe, discover
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.images import read_header, slice_thickness, slice_times
from irem_bids.names import Sidecars, natural_key, parse_name
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.stack import ImageError, read_image, write_image
from irem_bids.settings import Settings
from tests.stacks import stack_data, stack_grid, write_description, write_stack

PLANES = ("axial", "coronal", "sagittal")


def settings(**selection) -> Settings:
    return Settings().updated({"selection": selection})


def anat(root: Path, subject: str = "01", session: str | None = None) -> Path:
    folder = root / f"sub-{subject}"
    return folder / f"ses-{session}" / "anat" if session else folder / "anat"


def reasons(group) -> dict[str, str]:
    return {Path(e.path).name: e.reason for e in group.excluded}


def add_planes(root: Path, stem: str, suffix: str = "T1w", planes=PLANES, **kwargs) -> None:
    """One stack per plane, told apart by their run."""
    subject = stem.split("_")[0][4:]
    for number, plane in enumerate(planes, 1):
        write_stack(anat(root, subject) / f"{stem}_run-{number}_{suffix}.nii.gz", plane, **kwargs)


# --- real images ---------------------------------------------------------------------------


def test_real_fetal_stacks(shared_data):
    root = shared_data / "fetal-real"
    masks = str(root / "derivatives" / "manual_masks")
    (group,) = discover(root, settings(derivatives=[masks])).groups
    assert group.name == "sub-01_T2w"
    assert [s.label for s in group.stacks] == [
        "axial1", "axial2", "coronal1", "coronal2", "sagittal1", "sagittal2",
    ]  # fmt: skip
    for number, stack in enumerate(group.stacks, 1):
        assert Path(stack.path).name == f"sub-01_run-{number}_T2w.nii.gz"
        assert stack.uri == f"bids:raw:sub-01/anat/sub-01_run-{number}_T2w.nii.gz"
        assert Path(stack.mask).name == f"sub-01_run-{number}_T2w_desc-brain_mask.nii.gz"
        assert stack.mask_uri.startswith("bids:masks:sub-01/anat/sub-01_run-")
        assert stack.thickness_source == "sidecar"
        assert stack.slice_thickness == 3.0
        assert stack.spacing == pytest.approx(3.3, abs=1e-3)
        assert stack.in_plane == pytest.approx((1.125, 1.125), abs=1e-3)
        assert stack.shape == (320, 320, 22)
    assert group.excluded == group.warnings == ()


def test_simulated_fetal_stacks_of_a_session(shared_data):
    root = shared_data / "fetal-simulated"
    (group,) = discover(root, settings(derivatives=[str(root / "derivatives" / "masks")])).groups
    assert (group.name, group.session) == ("sub-simu001_ses-01_T2w", "01")
    assert [s.plane for s in group.stacks] == ["axial", "sagittal", "coronal"]
    assert all(s.thickness_source == "spacing" for s in group.stacks)
    assert [Path(s.mask).name for s in group.stacks] == [
        f"sub-simu001_ses-01_run-{n}_mask.nii.gz" for n in (1, 2, 3)
    ]


def test_an_adult_with_one_orientation(shared_data):
    found = discover(shared_data / "adult-single-orientation", Settings())
    assert found.groups == ()
    assert [r.name for r in found.excluded] == ["sub-12_ses-1_T1w", "sub-12_ses-1_FLAIR"]
    assert all("one orientation only (1 axial stack)" in r.reason for r in found.excluded)


@pytest.mark.parametrize("angles", ["0_0_0", "5_15_30"])
@pytest.mark.parametrize(
    ("word", "plane"), [("cor", "coronal"), ("sag", "sagittal"), ("trans", "axial")]
)
def test_planes_of_real_obliques(shared_data, tmp_path, word, plane, angles):
    (path,) = (shared_data / "oblique-slices").glob(f"T1W_{word}_{angles}_*.nii.gz")
    with pytest.raises(ImageError, match=r"a single slice \(560, 560, 1\)"):
        read_header(path, 1.5)
    slice_, grid = read_image(path)
    stacked = np.repeat(slice_[::8, ::8], 6, axis=2)
    coarse = np.array(grid.affine) @ np.diag([8, 8, 1, 1])
    thick = write_image(tmp_path / "thick.nii.gz", stacked, Grid(stacked.shape, coarse))
    assert read_header(thick, 1.2).plane == plane


# --- groups --------------------------------------------------------------------------------


def test_a_tiny_dataset(tiny_dataset):
    found = discover(tiny_dataset, Settings())
    (group,) = found.groups
    assert group.planes == PLANES
    assert [(s.label, s.slice_thickness, s.thickness_source) for s in group.stacks] == [
        ("axial1", 5.0, "sidecar"), ("coronal1", 5.0, "sidecar"), ("sagittal1", 5.0, "sidecar"),
    ]  # fmt: skip
    assert all(s.spacing == pytest.approx(6) and s.mask is None for s in group.stacks)
    assert (found.excluded, found.not_asked, found.notes) == ((), (), ())
    assert Group.from_dict(json.loads(json.dumps(group.to_dict()))) == group


def test_labels_do_not_decide_the_orientation(tmp_path, make_stack):
    root = write_description(tmp_path)
    for name, plane in (("acq-COR", "axial"), ("acq-ax", "sagittal"), ("run-1", "coronal")):
        make_stack(f"sub-01/anat/sub-01_{name}_T1w.nii.gz", plane, oblique=20)
    (group,) = discover(root, Settings()).groups
    planes = {Path(s.path).name.split("_")[1]: s.plane for s in group.stacks}
    assert planes == {"acq-COR": "axial", "acq-ax": "sagittal", "run-1": "coronal"}


def test_repeats_are_numbered_in_the_order_of_names(tmp_path):
    root = write_description(tmp_path)
    for run in (1, 2, 10):
        write_stack(anat(root) / f"sub-01_run-{run}_T2w.nii.gz", "axial")
    write_stack(anat(root) / "sub-01_run-3_T2w.nii.gz", "coronal")
    (group,) = discover(root, Settings()).groups
    assert [(s.label, Path(s.path).name) for s in group.stacks] == [
        ("axial1", "sub-01_run-1_T2w.nii.gz"),
        ("axial2", "sub-01_run-2_T2w.nii.gz"),
        ("coronal1", "sub-01_run-3_T2w.nii.gz"),
        ("axial3", "sub-01_run-10_T2w.nii.gz"),
    ]
    assert group.warnings == ("two orientations only (axial, coronal); three give a better image",)


def test_contrast_agent_part_and_echo_are_kept_apart(tmp_path):
    root = write_description(tmp_path)
    for stem in ("sub-01", "sub-01_ce-gd"):
        add_planes(root, stem)
    for number, plane in enumerate(PLANES, 1):
        for entity in ("echo-1", "echo-2", "part-mag"):
            write_stack(anat(root) / f"sub-01_run-{number}_{entity}_T1w.nii.gz", plane)
    names = {g.name for g in discover(root, Settings()).groups}
    assert names == {
        "sub-01_T1w", "sub-01_ce-gd_T1w", "sub-01_part-mag_T1w", "sub-01_echo-1_T1w",
        "sub-01_echo-2_T1w",
    }  # fmt: skip


def test_t1w_first_and_the_others_where_there_is_none(tmp_path):
    root = write_description(tmp_path)
    add_planes(root, "sub-01")
    add_planes(root, "sub-01", "T2w")
    add_planes(root, "sub-02", "FLAIR")
    add_planes(root, "sub-02", "T1w", planes=["axial"])
    found = discover(root, Settings())
    assert [g.name for g in found.groups] == ["sub-01_T1w", "sub-02_FLAIR"]
    assert [r.name for r in found.not_asked] == ["sub-01_T2w"]
    assert [r.name for r in found.excluded] == ["sub-02_T1w"]
    chosen = discover(root, settings(modalities=["T2w"]))
    assert [g.name for g in chosen.groups] == ["sub-01_T2w"]
    assert [(r.name, r.reason) for r in chosen.excluded] == [("sub-02", "no image of T2w in anat/")]


def test_sessions_are_apart_and_can_be_chosen(tmp_path):
    root = write_description(tmp_path)
    for session in ("1", "2"):
        for number, plane in enumerate(PLANES, 1):
            name = f"sub-01_ses-{session}_run-{number}_T1w.nii.gz"
            write_stack(anat(root, "01", session) / name, plane)
    assert [g.session for g in discover(root, Settings()).groups] == ["1", "2"]
    for label in ("2", "ses-2"):
        (group,) = discover(root, settings(session_label=[label])).groups
        assert group.name == "sub-01_ses-2_T1w"
    with pytest.raises(UserError, match="no such session: ses-3") as caught:
        discover(root, settings(session_label=["3"]))
    assert caught.value.code is ExitCode.NOTHING_SELECTED


# --- what is left out ----------------------------------------------------------------------


def test_each_image_left_out_has_its_reason(tiny_dataset):
    folder = anat(tiny_dataset)
    write_stack(folder / "sub-01_acq-iso_T1w.nii.gz", in_plane=4, spacing=4)
    write_stack(folder / "sub-01_rec-irem_T1w.nii.gz")
    write_stack(folder / "sub-01_part-phase_T1w.nii.gz")
    write_stack(folder / "sub-01_acq-localizer_T1w.nii.gz")
    write_stack(folder / "sub-01_run-8_T1w.nii.gz", sidecar={"SeriesDescription": "AAHead_Scout"})
    write_stack(folder / "sub-01_run-9_T1w.nii.gz", spacing=30)
    grid = stack_grid("axial")
    data = stack_data(grid)
    one = Grid((*grid.shape[:2], 1), grid.affine)
    write_image(folder / "sub-01_acq-one_T1w.nii.gz", data[..., :1], one)
    write_image(folder / "sub-01_acq-flat_T1w.nii.gz", np.zeros(grid.shape), grid)
    write_image(folder / "sub-01_acq-4d_T1w.nii.gz", np.stack([data, data], -1), grid)
    write_stack(folder / "sub-01_T1w_copy_T1w.nii.gz")
    (group,) = discover(tiny_dataset, Settings()).groups
    assert group.name == "sub-01_T1w"
    found = reasons(group)
    expected = {
        "sub-01_acq-iso_T1w.nii.gz": "near-isotropic, 4 × 4 × 4 mm",
        "sub-01_rec-irem_T1w.nii.gz": "rec-irem: the result of a reconstruction",
        "sub-01_part-phase_T1w.nii.gz": "part-phase: not a magnitude image",
        "sub-01_acq-localizer_T1w.nii.gz": "acq-localizer: a localiser",
        "sub-01_run-8_T1w.nii.gz": "SeriesDescription is 'AAHead_Scout': a localiser",
        "sub-01_run-9_T1w.nii.gz": "has 3 slices; a stack has 4 or more",
        "sub-01_acq-one_T1w.nii.gz": "a single slice (27, 30, 1)",
        "sub-01_acq-flat_T1w.nii.gz": "every voxel is 0",
        "sub-01_acq-4d_T1w.nii.gz": "has 4 dimensions (27, 30, 12, 2); expected 3",
        "sub-01_T1w_copy_T1w.nii.gz": "not a valid BIDS name",
    }
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name]
    text = describe(discover(tiny_dataset, Settings()))
    assert all(f"left out: {name}: " in text for name in expected)


def test_without_validation_odd_names_are_used(tiny_dataset):
    write_stack(anat(tiny_dataset) / "sub-01_desc-odd_T1w.nii.gz")
    (group,) = discover(tiny_dataset, settings(skip_bids_validation=True)).groups
    assert "sub-01_desc-odd_T1w.nii.gz" in {Path(s.path).name for s in group.stacks}


def test_a_large_dry_run_reads_headers_only(tiny_dataset, monkeypatch):
    monkeypatch.setattr("irem_bids.bids.MAX_DRY_READS", 2)
    grid = stack_grid("axial")
    path = anat(tiny_dataset) / "sub-01_acq-flat_T1w.nii.gz"
    write_image(path, np.zeros(grid.shape), grid)
    found = discover(tiny_dataset, Settings(), dry_run=True)
    assert len(found.groups[0].stacks) == 4
    assert "voxels were not read" in found.notes[0]
    assert len(discover(tiny_dataset, Settings()).groups[0].stacks) == 3


def test_several_gzip_members_are_not_a_truncated_file(make_stack):
    import gzip

    path = make_stack("a.nii.gz")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]))
    assert read_header(path, 1.5).plane == "axial"


def test_an_uncompressed_image_is_measured_too(make_stack, tmp_path):
    path = make_stack("a.nii")
    assert read_header(path, 1.5).spacing == pytest.approx(6)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ImageError, match="truncated"):
        read_header(path, 1.5)


# --- filters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "labels"),
    [
        ({"acquisition": ["ax", "cor"]}, ["axial1", "coronal1"]),
        ({"acq": ["ax", "sag"]}, ["axial1", "sagittal1"]),
        ({"acquisition": "*"}, ["axial1", "coronal1", "sagittal1"]),
        ({"acquisition": "a[xg]|cor", "regex_search": True}, ["axial1", "coronal1", "sagittal1"]),
        ({"run": None}, ["axial1", "coronal1", "sagittal1"]),
    ],
)
def test_filter_file(tiny_dataset, tmp_path, filters, labels):
    path = tmp_path / "filters.json"
    path.write_text(json.dumps({"stack": filters}))
    (group,) = discover(tiny_dataset, settings(bids_filter_file=str(path))).groups
    assert [s.label for s in group.stacks] == labels


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ('{"stack": {"run": 7}}', "matches --bids-filter-file", ExitCode.NOTHING_SELECTED),
        ('{"stack": {"acquisiton": "ax"}}', "did you mean 'acquisition'", ExitCode.USAGE),
        ('{"t1w": {}}', "expected the key 'stack'", ExitCode.USAGE),
        ("[1]", "expected the key 'stack'", ExitCode.USAGE),
        ("{", "not valid JSON", ExitCode.USAGE),
        (None, "cannot be read", ExitCode.NO_INPUT),
    ],
)
def test_filter_files_that_do_not_work(tiny_dataset, tmp_path, text, words, code):
    path = tmp_path / "filters.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        discover(tiny_dataset, settings(bids_filter_file=str(path)))
    assert caught.value.code is code


def test_participants_with_and_without_prefix(tiny_dataset):
    add_planes(tiny_dataset, "sub-02")
    add_planes(tiny_dataset, "sub-021")
    for label in ("02", "sub-02"):
        found = discover(tiny_dataset, settings(participant_label=[label]))
        assert [g.subject for g in found.groups] == ["02"]


def test_a_database_serves_other_participants_later(tiny_dataset, tmp_path):
    add_planes(tiny_dataset, "sub-02")
    database = str(tmp_path / "database")
    for label in ("01", "02"):
        chosen = settings(participant_label=[label], bids_database_dir=database)
        assert [g.subject for g in discover(tiny_dataset, chosen).groups] == [label]
    other = write_description(tmp_path / "other")
    add_planes(other, "sub-01")
    with pytest.raises(UserError, match="is of another dataset") as caught:
        discover(other, settings(bids_database_dir=database))
    assert caught.value.code is ExitCode.USAGE


def test_a_participant_without_images_is_named(tiny_dataset):
    (tiny_dataset / "sub-03").mkdir()
    (rejected,) = discover(tiny_dataset, Settings()).excluded
    assert rejected.name == "sub-03"


def test_a_thousand_participants_are_indexed_fast(tmp_path):
    root = write_description(tmp_path / "big")
    for number in range(1000):
        for folder, names in (
            ("anat", ["acq-ax_T1w", "acq-cor_T1w", "acq-sag_T1w"]),
            ("func", ["task-rest_bold", "task-n_bold"]),
        ):
            place = root / f"sub-{number:04d}" / folder
            place.mkdir(parents=True)
            for name in names:
                (place / f"sub-{number:04d}_{name}.nii.gz").touch()
                (place / f"sub-{number:04d}_{name}.json").touch()
    start = time.process_time()
    found = discover(root, Settings())
    assert time.process_time() - start < 20
    assert len(found.excluded) == 1000
    assert all(len(r.excluded) == 3 for r in found.excluded)


# --- sidecars ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "setting", "expected"),
    [
        (5, None, (5.0, "sidecar")),
        (7.5, None, (7.5, "sidecar")),
        (10, None, (6.0, "spacing")),
        (0, None, (6.0, "spacing")),
        (0.005, None, (6.0, "spacing")),
        (5000, None, (6.0, "spacing")),
        ("5.0", None, (6.0, "spacing")),
        ([5, 5], None, (6.0, "spacing")),
        (True, None, (6.0, "spacing")),
        (float("nan"), None, (6.0, "spacing")),
        (5, 4.0, (4.0, "setting")),
        (None, 4.0, (4.0, "setting")),
    ],
)
def test_slice_thickness(value, setting, expected):
    thickness, source, doubt = slice_thickness({"SliceThickness": value}, 6.0, setting)
    assert (thickness, source) == expected
    implausible = source == "spacing"
    assert (doubt is not None) == implausible


@pytest.mark.parametrize(
    ("times", "direction", "expected"),
    [
        ([0.0, 1.5, 0.5], "k", (0.0, 1.5, 0.5)),
        ([0.0, 1.5, 0.5], "k-", (0.5, 1.5, 0.0)),
        ([0, 1, 2], None, (0.0, 1.0, 2.0)),
        ([0.0, 1.5], "k", None),
        ([0.0, 1.5, 0.5], "i", None),
        ([0.0, "1", 0.5], "k", None),
        ([0.0, float("inf"), 0.5], "k", None),
        (3, "k", None),
    ],
)
def test_slice_times(times, direction, expected):
    metadata = {"SliceTiming": times}
    if direction:
        metadata["SliceEncodingDirection"] = direction
    found, doubt = slice_times(metadata, 3, 2)
    assert found == expected
    assert (doubt is None) == (expected is not None)
    assert slice_times({}, 3, 2) == slice_times({"SliceTiming": []}, 3, 2) == (None, None)


def test_slice_times_come_with_the_group(tiny_dataset):
    path = anat(tiny_dataset) / "sub-01_acq-ax_T1w.json"
    count = read_image(path.with_suffix(".nii.gz"))[0].shape[2]
    path.write_text(json.dumps({"SliceTiming": list(range(count))}))
    group = discover(tiny_dataset, Settings()).groups[0]
    assert Group.from_dict(json.loads(json.dumps(group.to_dict()))) == group
    times = {s.label: s.slice_times for s in group.stacks}
    assert times == {
        "axial1": tuple(float(k) for k in range(count)), "coronal1": None, "sagittal1": None
    }  # fmt: skip


def test_an_implausible_thickness_is_a_warning_of_the_group(tiny_dataset):
    (anat(tiny_dataset) / "sub-01_acq-ax_T1w.json").write_text('{"SliceThickness": 5000}')
    (anat(tiny_dataset) / "sub-01_acq-cor_T1w.json").write_text("{not json")
    (group,) = discover(tiny_dataset, Settings()).groups
    assert [s.thickness_source for s in group.stacks] == ["spacing", "spacing", "sidecar"]
    assert "'5000' in the sidecar is not plausible" in group.warnings[0]
    assert "sub-01_acq-cor_T1w.json is not valid JSON" in group.warnings[1]


def test_sidecars_are_inherited(tmp_path):
    folder = tmp_path / "sub-01" / "ses-1" / "anat"
    folder.mkdir(parents=True)
    (tmp_path / "T1w.json").write_text('{"a": 0, "b": 0, "c": 0}')
    (tmp_path / "acq-cor_T1w.json").write_text('{"a": 9}')
    (tmp_path / "sub-01" / "sub-01_T1w.json").write_text('{"b": 1, "c": 1}')
    (folder / "sub-01_ses-1_acq-ax_T1w.json").write_text('{"c": 2}')
    (folder / "sub-01_ses-1_acq-ax_T2w.json").write_text('{"c": 3}')
    image = folder / "sub-01_ses-1_acq-ax_T1w.nii.gz"
    assert Sidecars(tmp_path).metadata(image) == ({"a": 0, "b": 1, "c": 2}, [])


# --- masks ---------------------------------------------------------------------------------


def mask_of(path: Path, target: Path, grid: Grid | None = None) -> Path:
    """A mask of the bright voxels of the stack at ``path``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data, own = read_image(path)
    return write_image(target, data > 50, grid or own)


def test_masks_match_by_entities(tiny_dataset, tmp_path):
    masks = tmp_path / "masks"
    folder = masks / "sub-01" / "anat"
    stacks = anat(tiny_dataset)
    mask_of(stacks / "sub-01_acq-ax_T1w.nii.gz", folder / "sub-01_acq-ax_desc-brain_mask.nii.gz")
    mask_of(stacks / "sub-01_acq-cor_T1w.nii.gz", folder / "sub-01_acq-cor_T2w_mask.nii.gz")
    for name in (
        "sub-01_desc-brain_mask", "sub-01_acq-sag_run-2_mask", "sub-01_acq-sag_desc-lesion_mask",
        "sub-01_acq-sag_space-MNI152_desc-brain_mask",
    ):  # fmt: skip
        mask_of(stacks / "sub-01_acq-sag_T1w.nii.gz", folder / f"{name}.nii.gz")
    (group,) = discover(tiny_dataset, settings(derivatives=[str(masks)])).groups
    assert [s.mask and Path(s.mask).name for s in group.stacks] == [
        "sub-01_acq-ax_desc-brain_mask.nii.gz", None, None,
    ]  # fmt: skip
    assert group.stacks[0].mask_uri == (
        "bids:masks:sub-01/anat/sub-01_acq-ax_desc-brain_mask.nii.gz"
    )


def test_runs_match_whatever_their_zeros_and_contrasts_when_named(tmp_path):
    root = write_description(tmp_path / "bids")
    for suffix in ("T1w", "T2w"):
        add_planes(root, "sub-01", suffix)
    masks = tmp_path / "masks" / "sub-01"
    stack = anat(root) / "sub-01_run-1_T2w.nii.gz"
    mask_of(stack, masks / "sub-01_run-01_mask.nii.gz")
    mask_of(stack, masks / "sub-01_run-01_T2w_desc-brain_mask.nii.gz")
    other = stack_grid("sagittal", oblique=3)
    mask_of(anat(root) / "sub-01_run-3_T2w.nii.gz", masks / "sub-01_run-3_mask.nii.gz", other)
    chosen = settings(derivatives=[str(tmp_path / "masks")], modalities=["T1w", "T2w"])
    found = {
        f"{g.suffix} {s.label}": Path(s.mask).name
        for g in discover(root, chosen).groups
        for s in g.stacks
        if s.mask
    }
    # the mask of run 3 names no contrast and lies on neither's grid: it may be of either
    assert found == {
        "T1w axial1": "sub-01_run-01_mask.nii.gz",
        "T2w axial1": "sub-01_run-01_T2w_desc-brain_mask.nii.gz",
    }


def test_links_of_several_mask_datasets(tiny_dataset, tmp_path):
    names = ("first", "second")
    for name, plane in zip(names, ("ax", "cor"), strict=True):
        stack = anat(tiny_dataset) / f"sub-01_acq-{plane}_T1w.nii.gz"
        mask_of(stack, tmp_path / name / "sub-01" / f"sub-01_acq-{plane}_mask.nii.gz")
    chosen = settings(derivatives=[str(tmp_path / name) for name in names])
    (group,) = discover(tiny_dataset, chosen).groups
    assert [s.mask_uri and s.mask_uri.split("/")[0] for s in group.stacks] == [
        "bids:masks:sub-01", "bids:masks2:sub-01", None,
    ]  # fmt: skip
    links = dataset_links(tiny_dataset, chosen)
    assert list(links) == ["raw", "masks", "masks2"]
    assert links["masks2"] == (tmp_path / "second").as_uri()


def test_masks_that_match_nothing_are_noted(tiny_dataset, tmp_path):
    (tmp_path / "masks" / "sub-02").mkdir(parents=True)
    found = discover(tiny_dataset, settings(derivatives=[str(tmp_path / "masks")]))
    assert "no mask in it matches" in found.notes[0]


@pytest.mark.parametrize("make", [True, False])
def test_a_derivatives_folder_that_is_none(tiny_dataset, tmp_path, make):
    folder = tmp_path / "masks"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match="--derivatives") as caught:
        discover(tiny_dataset, settings(derivatives=[str(folder)]))
    assert caught.value.code is ExitCode.NO_INPUT


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entities", "suffix", "words"),
    [
        ("sub-01_T1w.nii.gz", {"sub": "01"}, "T1w", ()),
        ("T1w.json", {}, "T1w", ()),
        ("sub-01_acq-a.nii", {"sub": "01", "acq": "a"}, "", ()),
        ("sub-01_T2w_desc-brain_mask.nii.gz", {"sub": "01", "desc": "brain"}, "mask", ("T2w",)),
    ],
)
def test_parse_name(name, entities, suffix, words):
    parsed = parse_name(name)
    assert (parsed.entities, parsed.suffix, parsed.words) == (entities, suffix, words)


def test_natural_order():
    names = ["run-10", "run-2", "run-1", "a"]
    assert sorted(names, key=natural_key) == ["a", "run-1", "run-2", "run-10"]


def test_a_copied_group_is_the_same(tiny_dataset, tmp_path):
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    first, second = (discover(root, Settings()).groups[0] for root in (tiny_dataset, copy))
    assert [s.uri for s in first.stacks] == [s.uri for s in second.stacks]
    assert first.name == second.name
