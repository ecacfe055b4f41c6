# SPDX-License-Identifier: Apache-2.0
"""Checks that name causes: each finds its defect in a small record, and nothing in a sound one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.reconstruction.prepare import Prepared
from irem_bids.reconstruction.stack import write_image
from irem_bids.report import ReportInput, defects, slices, summary
from irem_bids.report import material as report_material
from irem_bids.report.finding import listed

from .report_material import SCALE, make_input, prepared


def causes(inp: ReportInput) -> dict[str, str]:
    return {f.cause: f.text for f in summary.check(report_material.load(inp)) if f.look}


def edit_fit(inp: ReportInput, method: str = "irem", **changes: object) -> None:
    path = inp.methods[method] / "fit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_stack(ready: Prepared, place: int, data: np.ndarray) -> Prepared:
    stacks = list(ready.stacks)
    stacks[place] = stacks[place].with_data(data)
    return replace(ready, stacks=tuple(stacks))


def raw_files(inp: ReportInput, ready: Prepared, folder: Path, factor: dict[str, float]):
    """The input with files as acquired, each stack ``factor`` times as bright."""
    folder.mkdir()
    files = []
    for file, stack in zip(inp.group.stacks, ready.stacks, strict=True):
        path = folder / Path(file.path).name
        write_image(path, stack.data * SCALE * factor.get(stack.label, 1.0), stack.grid)
        files.append(replace(file, path=str(path)))
    return replace(inp, group=replace(inp.group, stacks=tuple(files)))


def test_a_sound_group_has_no_cause(tmp_path):
    ready = prepared()
    inp = raw_files(make_input(tmp_path / "w", ready), ready, tmp_path / "raw", {"axial1": 1.2})
    assert causes(inp) == {}
    assert set(report_material.load(inp).scales) == {"axial1", "coronal1", "sagittal1"}


def test_dropped_slice_is_named(tmp_path):
    ready = prepared()
    data = ready.stacks[1].data.copy()
    data[:, 5] *= 0.2
    found = causes(make_input(tmp_path / "w", with_stack(ready, 1, data)))
    assert set(found) == {"slice"}
    assert "coronal1: slice 5 (signal dropped to 2" in found["slice"]


def test_a_bad_slice_is_not_taken_for_a_misregistration(tmp_path):
    ready = prepared()
    data = ready.stacks[1].data.copy()
    data[:, 5] *= 0.2
    pairs = [dict(p) for p in ready.metrics["ncc_pairs"]]
    for pair, after in zip(pairs, (0.78, 0.93, 0.75), strict=True):
        pair.update(before=0.6, after=after)
    ready = replace(ready, metrics={**ready.metrics, "ncc_pairs": pairs})
    assert set(causes(make_input(tmp_path / "w", with_stack(ready, 1, data)))) == {"slice"}


def test_torn_slice_is_named(tmp_path):
    ready = prepared()
    data = ready.stacks[0].data.copy()
    data[:, :, 4] = np.roll(data[:, :, 4], 7, axis=0)
    found = causes(make_input(tmp_path / "w", with_stack(ready, 0, data)))
    assert set(found) == {"slice"}
    assert "axial1: slice 4 (torn or moved" in found["slice"]


def test_low_weight_of_a_slice_is_named(tmp_path):
    inp = make_input(tmp_path / "w")
    weights = {label: [1.0] * 10 for label in ("axial1", "coronal1", "sagittal1")}
    weights["sagittal1"][5] = 0.1
    edit_fit(inp, slice_weights=weights)
    found = causes(inp)
    assert set(found) == {"slice"}
    assert "sagittal1: slice 5 (weighted down to 0.10" in found["slice"]


@pytest.mark.parametrize("rubbish", ["many", [1, 2], {"axial1": "x", "coronal1": [None]}])
def test_records_of_another_kind_do_no_harm(tmp_path, rubbish):
    inp = make_input(tmp_path / "w")
    edit_fit(inp, slice_weights=rubbish, profile_width=rubbish)
    material = report_material.load(inp)
    summary.check(material)
    assert material.problems == []


def test_misregistered_stack_is_named_by_its_partners(tmp_path):
    ready = prepared()
    pairs = [dict(p) for p in ready.metrics["ncc_pairs"]]
    for pair, after in zip(pairs, (0.78, 0.93, 0.75), strict=True):
        pair.update(before=0.6, after=after)
    inp = make_input(tmp_path / "w", replace(ready, metrics={**ready.metrics, "ncc_pairs": pairs}))
    found = causes(inp)
    assert set(found) == {"misregistered"}
    assert "coronal1 agrees with its partners less (NCC 0.77)" in found["misregistered"]


def test_misregistered_stack_is_named_by_the_method(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready)
    shift = RigidTransform.from_vector([0, 0, 0, 0, 8.0, 0])
    poses = {s.label: p.matrix.tolist() for s, p in zip(ready.stacks, ready.poses, strict=True)}
    poses["sagittal1"] = (shift @ ready.poses[2]).matrix.tolist()
    edit_fit(inp, poses=poses)
    assert "irem moved sagittal1 on by 8.0 mm" in causes(inp)["misregistered"]
    moved = {
        label: (shift @ RigidTransform(np.array(m))).matrix.tolist() for label, m in poses.items()
    }
    edit_fit(inp, poses={**moved, "sagittal1": (shift @ ready.poses[2]).matrix.tolist()})
    assert "misregistered" not in causes(inp), "all stacks moved together is no fault"


def test_gain_is_named(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready)
    doubled = raw_files(inp, ready, tmp_path / "raw", {"coronal1": 2.0})
    found = causes(doubled)
    assert set(found) == {"gain"}
    assert "coronal1 (2.00 times as bright as the others, as acquired)" in found["gain"]
    assert "axial1" not in found["gain"]
    edit_fit(inp, gains={"axial1": 1.0, "coronal1": 1.0, "sagittal1": 0.5})
    assert "sagittal1 (0.50 by irem)" in causes(inp)["gain"]


def test_swapped_labels_are_named(tmp_path):
    inp = make_input(tmp_path / "w")
    axial, coronal, sagittal = inp.group.stacks
    swapped = (
        replace(axial, path=coronal.path.replace("coronal1", "cor")),
        replace(coronal, path=axial.path.replace("axial1", "TRA")),
        sagittal,
    )
    found = causes(replace(inp, group=replace(inp.group, stacks=swapped)))
    assert set(found) == {"label"}
    assert "sub-01_acq-cor_T1w.nii.gz says coronal but its affine is axial" in found["label"]


@pytest.mark.parametrize(
    ("name", "plane"),
    [
        ("sub-01_acq-axi_T1w.nii.gz", "axial"),
        ("sub-01_acq-COR_run-2_T1w.nii.gz", "coronal"),
        ("sub-01_ses-1_acq-sagittal2_T2w.nii.gz", "sagittal"),
        ("sub-01_acq-hasteTra_T2w.nii.gz", "axial"),
        ("sub-01_acq-iso_T1w.nii.gz", None),
        ("sub-01_acq-cortex_T1w.nii.gz", None),
        ("sub-01_acq-axialCor_T1w.nii.gz", None),
        ("sub-01_T1w.nii.gz", None),
        ("sub-sag_T1w.nii.gz", None),
    ],
)
def test_plane_in_a_name(name, plane):
    assert defects.plane_in_name(name) == plane


def test_wrong_thickness_is_named(tmp_path):
    inp = make_input(tmp_path / "w")
    first, *others = inp.group.stacks
    thin = replace(first, slice_thickness=2.5)
    found = causes(replace(inp, group=replace(inp.group, stacks=(thin, *others))))
    assert set(found) == {"thickness"}
    assert "axial1 (2.5 mm thick, 6 mm apart)" in found["thickness"]
    edit_fit(inp, profile_width={"coronal1": 9.0, "axial1": 5.2})
    assert "coronal1 (9 mm instead of 5 mm)" in causes(inp)["thickness"]


def test_a_cut_head_is_named_with_its_side(tmp_path):
    ready = prepared()
    stacks = list(ready.stacks)
    mask = stacks[0].mask.copy()
    data = stacks[0].data.copy()
    mask[:6], data[:6] = mask[20], data[20]
    stacks[0] = replace(stacks[0], mask=mask, data=data)
    found = causes(make_input(tmp_path / "w", replace(ready, stacks=tuple(stacks))))
    assert "axial1 (left)" in found["field of view"]
    below = np.zeros_like(mask)
    below[5:35, 5:35, :8] = True
    low = replace(ready.stacks[0], mask=below, data=below.astype(np.float32))
    assert list(defects.cut_faces(low)) == ["inferior"]
    metrics = {**ready.metrics, "masked": {"axial1": "otsu"}}
    neck = replace(ready, stacks=(low, *ready.stacks[1:]), metrics=metrics)
    material = report_material.Material(make_input(tmp_path / "v"), neck)
    assert not defects.field_of_view(material)[0].look, "a neck is always cut"
    metrics["masked"]["axial1"] = "given"
    assert defects.field_of_view(material)[0].look


def test_a_check_that_breaks_is_told(tmp_path):
    inp = make_input(tmp_path / "w")
    material = report_material.load(inp)
    assert material.prepared is not None
    material.prepared.metrics["ncc_pairs"] = [{"a": "axial1"}]
    findings = summary.check(material)
    assert any(f.cause == "report" and f.look for f in findings)
    assert any("misregistration" in text for text in material.problems)


def test_running_median_and_lists():
    values = np.array([1.0, np.nan, 1.0, 9.0, 1.0])
    assert slices.running_median(values, 3).tolist() == [1.0, 1.0, 5.0, 1.0, 5.0]
    assert np.isnan(slices.running_median(np.full(3, np.nan))).all()
    assert listed(["a"]) == "a"


def test_a_warning_is_not_told_twice(tmp_path):
    """What a check names is not repeated by discovery or by a step; all else stays."""
    inp = make_input(tmp_path / "w", names=("bspline", "irem"))
    first, second, third = inp.group.stacks
    stacks = (replace(first, slice_thickness=2.0), second, third)
    names = [Path(stack.path).name for stack in stacks]
    warnings = (
        f"{names[0]}: slices 2 mm thick (sidecar) every 6 mm (header) leave a gap of 4 mm",
        f"{names[1]}: slices 4 mm thick (sidecar) every 6 mm (header) leave a gap of 2 mm",
        f"{names[2]}: its mask is on another grid.",
    )
    inp = replace(inp, group=replace(inp.group, stacks=stacks, warnings=warnings))
    doubts = ["voxels that were not used are predicted worse (9 dB)", "something else"]
    (inp.methods["irem"] / "step.json").write_text(json.dumps({"doubts": doubts}))
    found = [f for f in summary.check(report_material.load(inp)) if f.look]
    assert {f.cause for f in found} == {"thickness", "discovery", "doubt", "held-out"}
    texts = [f.text for f in found if f.cause in ("discovery", "doubt")]
    assert texts == [f"{warnings[1]}.", warnings[2], "irem: something else."]
