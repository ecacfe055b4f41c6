# SPDX-License-Identifier: Apache-2.0
"""Predicted slices, and the figures of weights, motion of slices, and uncertainty."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.reconstruction.stack import read_image, write_image
from irem_bids.report import (
    build_report,
    make_figures,
    predicted,
    residuals,
    slices,
    uncertainty,
    viewer,
)
from irem_bids.report import material as report_material
from irem_bids.report.studio import Studio
from irem_bids.settings import Acquisition

from .report_material import SCALE, head, make_input, prepared, with_uncertainty


def edit_fit(folder, **changes):
    path = folder / "fit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_predicted_slice_is_near_the_acquired_one(tmp_path):
    ready = prepared()
    material = report_material.load(make_input(tmp_path / "w", ready, ("irem",)))
    result = material.methods["irem"]
    stack, pose = ready.stacks[1], ready.poses[1]
    guess = residuals.slice_prediction(stack, result, pose, 5, SCALE, Acquisition())
    inside = guess != 0
    assert set(np.argwhere(inside)[:, stack.slice_axis]) == {5}
    truth = stack.data[inside] * 0.96  # the method's gain of this stack
    assert np.corrcoef(guess[inside], truth)[0, 1] > 0.9  # a point sample, seen through a profile
    assert np.median(guess[inside] / np.maximum(truth, 0.1)) == pytest.approx(1.0, abs=0.05)


def test_motion_of_a_slice_is_followed(tmp_path):
    """A slice that saw moved tissue is predicted where the method says that it was."""
    ready = prepared()
    stack = ready.stacks[0]
    motion = RigidTransform.from_vector([0, 0, 0.1, 5.0, -3.0, 0.0], (1.0, 2.0, 3.0))
    where = np.argwhere(stack.mask[:, :, 4])
    index = np.insert(where, 2, 4, axis=1)
    seen = head(motion.apply(stack.grid.to_world(index)))
    inp = make_input(tmp_path / "w", ready, ("irem",))
    vectors = np.zeros((10, 6))
    vectors[4] = motion.to_vector((1.0, 2.0, 3.0))
    matrices = np.array([np.eye(4)] * 10)
    matrices[4] = motion.matrix

    points = Acquisition(profile="none")

    def error(**record) -> float:
        edit_fit(inp.methods["irem"], **record)
        result = report_material.load(inp).methods["irem"]
        guess = predicted.voxels(stack, result, RigidTransform(), index, points) / SCALE
        return float(np.abs(guess - seen).mean())

    still = error()
    by_vector = error(slice_motion={"axial1": vectors.tolist()}, slice_pivot=[1.0, 2.0, 3.0])
    by_matrix = error(slice_motion={}, slice_poses={"axial1": matrices.tolist()})
    assert by_vector < 0.35 * still
    assert by_matrix == pytest.approx(by_vector, abs=1e-6)


def test_predicted_voxels_are_seen_through_the_profile_of_the_settings(tmp_path):
    """Of a step, a box of 5 mm holds the share that lies beyond it."""
    ready = prepared()
    material = report_material.load(make_input(tmp_path / "w", ready, ("irem",)))
    stack, known = ready.stacks[0], material.methods["irem"]
    index = np.argwhere(stack.mask)
    index = index[index[:, 2] == 5]
    height = stack.grid.to_world(index)[0, 2]
    middle = int(known.grid.to_index(stack.grid.to_world(index))[0, 2]) + 1
    volume = np.zeros(known.grid.shape, dtype=np.float32)
    volume[:, :, middle:] = 1.0
    result = replace(known, whole=volume, fit={})
    edge = known.grid.to_world(np.array([0, 0, middle - 0.5]))[2]
    found = {
        kind: predicted.voxels(stack, result, RigidTransform(), index, Acquisition(profile=kind))
        for kind in ("box", "gaussian", "none")
    }
    beyond = np.clip((height - edge) / stack.slice_thickness + 0.5, 0, 1)
    assert 0.05 < beyond < 0.95
    assert found["box"] == pytest.approx(beyond, abs=0.06)
    assert abs(found["box"] - found["gaussian"]).max() > 0.01
    point = predicted.voxels(
        stack, replace(result, name="bspline"), RigidTransform(), index, Acquisition()
    )
    assert np.array_equal(point, found["none"])


def test_width_of_the_profile_in_both_notations(tmp_path):
    inp = make_input(tmp_path / "w", names=("irem",))
    thickness = {"axial1": 5.0, "coronal1": 5.0}
    edit_fit(inp.methods["irem"], widths={"axial1": 1.2, "coronal1": "x", "other": 3})
    result = report_material.load(inp).methods["irem"]
    assert predicted.widths(result, thickness) == {"axial1": 6.0}
    edit_fit(inp.methods["irem"], profile_width={"axial1": 7.0})
    result = report_material.load(inp).methods["irem"]
    assert predicted.widths(result, thickness) == {"axial1": 7.0}


def test_receiver_has_gain_and_bias(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready, ("irem",))
    result = report_material.load(inp).methods["irem"]
    plain = predicted.receiver(result, ready.stacks[1], ready.poses[1])
    assert np.all(plain == 0.96)
    count = ready.stacks[1].grid.shape[ready.stacks[1].slice_axis]
    edit_fit(inp.methods["irem"], slice_gains={"coronal1": np.linspace(0.9, 1.1, count).tolist()})
    result = report_material.load(inp).methods["irem"]
    by_slice = predicted.receiver(result, ready.stacks[1], ready.poses[1])
    by_slice = np.moveaxis(by_slice, ready.stacks[1].slice_axis, 0)
    assert np.allclose(by_slice[:, 3, 3], 0.96 * np.linspace(0.9, 1.1, count))
    other = predicted.receiver(result, ready.stacks[0], ready.poses[0])
    assert np.ptp(other) == 0


def test_a_slice_is_as_dark_as_it_was_acquired_whatever_gain_was_found(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready, ("irem",))
    stack, pose = ready.stacks[0], ready.poses[0]
    gains, k = np.ones(stack.grid.shape[stack.slice_axis]), stack.grid.shape[stack.slice_axis] // 2
    gains[k] = 0.6
    darker = stack.with_data(stack.data * stack.by_slice(gains))
    edit_fit(inp.methods["irem"], slice_gains={"axial1": gains.tolist()})
    result = report_material.load(inp).methods["irem"]
    plain = slices.fit_stack(stack, pose, replace(result, fit={}), SCALE, Acquisition())
    found = slices.fit_stack(darker, pose, result, SCALE, Acquisition())
    assert found.brightness[k] == pytest.approx(0.6 * plain.brightness[k], rel=0.05)
    assert found.residual[k] < 1.2 * plain.residual[k]
    assert "signal dropped to 6" in slices.bad_slices(found)[k]


def test_bias_that_was_found_is_no_bad_slice(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready, ("irem",))
    bias = [0.0, 1.5, 0.0, 0.0, -6.0, 0.0, 0.0, 0.0, 0.0]
    edit_fit(inp.methods["irem"], bias={"axial1": bias})
    result = report_material.load(inp).methods["irem"]
    stack, pose = ready.stacks[0], ready.poses[0]
    shaded = stack.with_data(stack.data * predicted.receiver(result, stack, pose))
    plain = slices.fit_stack(stack, pose, replace(result, fit={}), SCALE, Acquisition())
    known = slices.fit_stack(shaded, pose, result, SCALE, Acquisition())
    unknown = slices.fit_stack(shaded, pose, replace(result, fit={}), SCALE, Acquisition())
    assert np.nanmedian(known.residual) < 1.2 * np.nanmedian(plain.residual)
    assert np.nanmedian(unknown.residual) > 2 * np.nanmedian(plain.residual)


def test_what_masks_cut_off_still_predicts_the_stacks(tmp_path):
    ready = prepared()
    inp = make_input(tmp_path / "w", ready, ("irem",))
    folder = inp.methods["irem"]
    volume, grid = read_image(folder / "volume.nii.gz")
    write_image(folder / "whole.nii.gz", volume, grid)
    index = np.argwhere(ready.stacks[0].mask)
    index = index[index[:, 2] == 5]
    guesses = []
    for kept in (volume, 0 * volume):
        write_image(folder / "volume.nii.gz", kept, grid)
        result = report_material.load(inp).methods["irem"]
        guesses.append(
            predicted.voxels(ready.stacks[0], result, RigidTransform(), index, Acquisition())
        )
    assert np.array_equal(*guesses) and guesses[0].any()


def test_weights_motion_and_uncertainty_are_drawn(tmp_path):
    ready = prepared()
    data = ready.stacks[0].data.copy()
    data[:, :, 4] *= 0.2
    stacks = (ready.stacks[0].with_data(data), *ready.stacks[1:])
    inp = make_input(tmp_path / "w", replace(ready, stacks=stacks), ("irem",))
    folder = inp.methods["irem"]
    motion = np.zeros((10, 6))
    motion[3, 0], motion[6, 4] = np.deg2rad(2.0), 1.5
    weights = [1.0] * 4 + [0.05] + [1.0] * 5
    edit_fit(folder, slice_motion={"axial1": motion.tolist()}, slice_weights={"axial1": weights})
    material = report_material.load(inp)
    figures = {
        (f.section, f.stack): f for f in make_figures(inp, tmp_path / "f", material)
    }  # the last one of each
    assert material.problems == []
    slices = figures["slices", "axial1"]
    assert slices.alt == (
        "residual and weight by irem of each slice of stack axial1; marked: slice 4"
    )
    assert "none stands out" in figures["slices", "coronal1"].alt
    assert "weight by irem" in slices.path.read_text()
    moved = figures["motion", "axial1"]
    assert "up to 2.00 degrees and 1.50 mm" in moved.alt
    assert moved.path.stat().st_size > 2000
    html = build_report([inp], tmp_path, "01").read_text()
    for words in ("Motion of single slices", ">Slices<"):
        assert words in html
    assert ">Uncertainty<" not in html


def test_uncertainty_is_drawn_with_one_scale(tmp_path):
    inp = with_uncertainty(make_input(tmp_path / "w", names=("irem", "srr")), irem=20.0, srr=40.0)
    material = report_material.load(inp)
    assert material.problems == []
    most = uncertainty.top(material)
    assert 30 < most <= 40
    assert float(f"{most:.2g}") == most, "a round number for the legend"
    figures = {f.method: f for f in make_figures(inp, tmp_path / "f", material)
               if f.section == "uncertainty"}  # fmt: skip
    assert set(figures) == {"irem", "srr"}
    sheets = {}
    for name, figure in figures.items():
        assert "standard deviation" in figure.alt and "median in the head" in figure.caption
        sheet = np.asarray(Image.open(figure.path)).astype(int)
        above, below = sheet[: len(sheet) // 2], sheet[len(sheet) // 2 :]
        assert np.ptp(above, axis=2).max() == 0, "the image is grey"
        assert above.std() > 20
        sheets[name] = below[
            below.shape[0] // 2 - 20 : below.shape[0] // 2 - 14, : sheet.shape[1] // 3
        ]
    # right is at the left edge, and the array's first axis leads to the patient's left or right
    blue, yellow = (
        int(np.argmax(sheets["srr"].mean(axis=0) @ w)) for w in ([-1, -1, 1], [1, 1, -1])
    )
    assert blue != yellow
    assert sheets["srr"].sum() > 1.1 * sheets["irem"].sum(), "half the deviation is darker"


def test_uncertainty_joins_the_viewer_with_its_legend(tmp_path):
    inp = with_uncertainty(make_input(tmp_path / "w", names=("irem",)), irem=20.0)
    found = viewer.build(Studio(report_material.load(inp), tmp_path))
    assert found is not None
    assert [v.kind for v in found.volumes] == ["method", "std", "stack", "stack", "stack"]
    image, doubt = found.volumes[:2]
    assert doubt.name == "irem uncertainty" and doubt.ends[0] == 0
    assert image.ends[1] > 10 * doubt.ends[1] / 2, "in units of the image"
    html = build_report([inp], tmp_path, "01").read_text()
    assert html.count('class="scale"') == 2, "in the viewer and beside the maps"
    assert html.count('data-colours="#440154 ') == 1
    assert "in the intensity units of the image" in html and "1.96 standard deviations" in html


def test_wrong_map_of_uncertainty_is_told(tmp_path):
    inp = make_input(tmp_path / "w", names=("irem",))
    _, grid = read_image(inp.methods["irem"] / "volume.nii.gz")
    write_image(inp.methods["irem"] / "std.nii.gz", np.ones((3, 3, 3)), grid)
    material = report_material.load(inp)
    make_figures(inp, tmp_path / "f", material)
    assert ["uncertainty of irem" in text for text in material.problems] == [True]
