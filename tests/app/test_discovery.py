# SPDX-License-Identifier: Apache-2.0
"""The fast way through a dataset finds what the validator, pybids and nibabel find."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from irem_bids import images
from irem_bids.bids import discover
from irem_bids.database import FILE_NAME, Database
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.layout import each, list_images
from irem_bids.names import Sidecars
from irem_bids.reconstruction.headers import check_header
from irem_bids.settings import Selection, Settings
from tests.stacks import write_description, write_stack

NAMES = (
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-ax_run-1_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-ax_run-02_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-cor_run-10_T2w.nii",
    "sub-01/anat/sub-01_ce-gd_echo-1_part-mag_FLAIR.nii.gz",
    "sub-01/anat/sub-01_run-1_acq-ax_T1w.nii.gz",  # order
    "sub-01/anat/sub-01_desc-x_T1w.nii.gz",  # of derivatives
    "sub-01/anat/sub-02_T1w.nii.gz",  # another's
    "sub-01/anat/sub-01_acq-a-b_T1w.nii.gz",
    "sub-01/anat/sub-01_part-sum_T1w.nii.gz",
    "sub-01/anat/T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.mgz",
    "sub-02/ses-1/anat/sub-02_ses-1_acq-sag_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_acq-sag_T1w.nii.gz",  # no session
    "sub-02/ses-2/anat/sub-02_ses-02_acq-sag_T1w.nii.gz",
    "sub-02/ses-2/anat/sub-02_ses-2_run-3_T1w.nii.gz",
    "sub-02/ses-2/func/sub-02_ses-2_task-rest_bold.nii.gz",
    "sub-ü/anat/sub-ü_T1w.nii.gz",
)
FILTERS = (
    {"acquisition": "ax"},
    {"acquisition": ["ax", "sag"]},
    {"run": 2},
    {"run": "1"},
    {"run": [1, 10]},
    {"run": None},
    {"session": "2", "run": 3},
    {"ceagent": "gd"},
    {"part": "*"},
    {"extension": ".nii"},
    {"suffix": "T2w"},
    {"acquisition": "^a|s[ao]g", "regex_search": True},
    {"echo": "1", "reconstruction": None},
)


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A dataset of empty files."""
    root = write_description(tmp_path / "bids")
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, **selection: object) -> dict[str, str | None]:
    subjects = ["01", "02", "ü"]
    images_ = list_images(root, subjects, Selection(**selection))
    return {image.uri.removeprefix("bids:raw:"): image.problem for image in images_}


def test_names_are_judged_as_the_validator_does(named: Path) -> None:
    from bids_validator import BIDSValidator

    judged = found(named)
    expected = {n for n in NAMES if "/anat/" in n and not n.endswith("mgz")}
    assert set(judged) == expected
    valid = {name for name in expected if BIDSValidator().is_bids("/" + name)}
    assert {name for name, problem in judged.items() if problem is None} == valid
    assert 4 < len(valid) < len(expected)
    assert not any(found(named, skip_bids_validation=True).values())


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_select_what_pybids_selects(named: Path, tmp_path: Path, filters: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bids import BIDSLayout, BIDSLayoutIndexer
        from bids.layout import Query

        indexer = BIDSLayoutIndexer(validate=True, index_metadata=False)
        layout = BIDSLayout(named, validate=False, indexer=indexer)
    special = {"*": Query.ANY, None: Query.NONE}
    asked = {k: v if isinstance(v, list) else special.get(v, v) for k, v in filters.items()}
    base = {"suffix": ["T1w", "T2w", "FLAIR"], "extension": [".nii.gz", ".nii"], "datatype": "anat"}
    expected = layout.get(**{**base, **asked}, return_type="filename")
    path = tmp_path / "filters.json"
    path.write_text(json.dumps({"stack": filters}))
    assert set(found(named, bids_filter_file=str(path))) == {
        os.path.relpath(p, named) for p in expected
    }
    assert expected


def test_a_filter_that_is_no_expression_is_a_usage_error(named: Path, tmp_path: Path) -> None:
    path = tmp_path / "filters.json"
    path.write_text(json.dumps({"stack": {"acq": "(", "regex_search": True}}))
    with pytest.raises(UserError, match="is no regular expression") as caught:
        found(named, bids_filter_file=str(path))
    assert caught.value.code is ExitCode.USAGE


def forms(image: nib.Nifti1Image) -> dict[str, nib.Nifti1Image]:
    """The image as files that differ in what the short way reads."""
    other = {"plain": image, "big": None, "qform": None, "second": None}
    other["big"] = nib.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">"))
    other["qform"] = nib.Nifti1Image(image.get_fdata(dtype=np.float32), None)
    other["qform"].set_qform(image.affine, code=1)
    other["second"] = nib.Nifti2Image(image.dataobj, image.affine)
    return other


@pytest.mark.parametrize("form", ["plain", "big", "qform", "second"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_short_way_reads_what_nibabel_reads(
    make_stack: object, tmp_path: Path, form: str, ending: str
) -> None:
    image = nib.load(make_stack("a.nii.gz", oblique=12))
    path = tmp_path / f"form{ending}"
    nib.save(forms(image)[form], path)
    expected, short = images._any_header(path, check_header(path)), images._plain_header(path)
    assert (short is not None) == (form == "plain")
    if short is not None:
        assert short == expected
    assert images.read_header(path, 1.5).grid == images.read_header(path, 1.5).grid
    assert images.read_header(path, 1.5).spacing == pytest.approx(6, abs=1e-3)


@pytest.mark.parametrize("kept", [0, 100, 347, 348, 360])
def test_a_cut_file_has_one_clear_reason(make_stack: object, kept: int) -> None:
    path = make_stack("a.nii.gz")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:kept]) if kept else b"")
    with pytest.raises(images.ImageError, match=r"empty|truncated"):
        images.read_header(path, 1.5)


def test_the_database_is_believed_until_a_file_changes(tiny_dataset: Path, tmp_path: Path) -> None:
    chosen = Settings().updated({"selection": {"bids_database_dir": str(tmp_path / "db")}})
    first = discover(tiny_dataset, chosen)
    assert discover(tiny_dataset, Settings()) == first
    content = json.loads((tmp_path / "db" / FILE_NAME).read_text())
    assert sorted({key.split(":")[0] for key in content["files"]}) == [
        "header",
        "sidecar",
        "voxels",
    ]
    assert len(content["files"]) == 9
    stamp = (tmp_path / "db" / FILE_NAME).stat().st_mtime_ns
    calls: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("irem_bids.images._look", calls.append)
        patch.setattr("irem_bids.bids.check_voxels", calls.append)
        patch.setattr(Sidecars, "_parse", lambda self, path: calls.append(path))
        assert discover(tiny_dataset, chosen) == first
    assert calls == []
    assert (tmp_path / "db" / FILE_NAME).stat().st_mtime_ns == stamp
    folder = tiny_dataset / "sub-01" / "anat"
    (folder / "sub-01_acq-ax_T1w.json").write_text('{"SliceThickness": 4.0}')
    write_stack(folder / "sub-01_acq-cor_T1w.nii.gz", "coronal", in_plane=2.5)
    image = folder / "sub-01_acq-sag_T1w.nii.gz"
    image.write_bytes(image.read_bytes()[:-40])
    again = discover(tiny_dataset, chosen)
    assert again == discover(tiny_dataset, Settings())
    (group,) = again.groups
    assert group.stacks[0].slice_thickness == 4.0
    assert group.stacks[1].in_plane == pytest.approx((2.5, 2.5), abs=1e-3)
    assert len(group.excluded) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 0}', '{"version": 1, "files": 3}'])
def test_a_memory_that_is_damaged_is_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    file = tmp_path / "file"
    file.write_text("x")
    database = Database(tmp_path, tmp_path)
    assert database.recall(file, "kind", lambda: 7) == 7
    database.save()
    assert Database(tmp_path, tmp_path).recall(file, "kind", lambda: 8) == 7


def test_a_folder_that_cannot_be_written_is_73(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    database = Database(tmp_path, tmp_path / "file" / "db")
    database.recall(tmp_path / "file", "kind", lambda: 1)
    with pytest.raises(UserError, match="--bids-database-dir") as caught:
        database.save()
    assert caught.value.code is ExitCode.CANNOT_CREATE


def _computing() -> None:
    sum(range(20_000))


def _waiting() -> None:
    time.sleep(2e-3)


@pytest.mark.parametrize(
    ("does", "lets_others_run", "in_threads"),
    [(_computing, False, False), (_computing, True, True), (_waiting, False, True)],
)
def test_threads_only_where_they_help(
    does, lets_others_run: bool, in_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if does is _computing:  # the clock stops while the machine does something else
        monkeypatch.setattr("irem_bids.layout.time.monotonic", time.thread_time)

    def work(number: int) -> tuple[int, bool]:
        does()
        return number, threading.current_thread() is threading.main_thread()

    found = list(each(work, range(200), 2, lets_others_run=lets_others_run))
    assert [number for number, _ in found] == list(range(200))
    assert found[-1][1] is not in_threads
