# SPDX-License-Identifier: Apache-2.0
"""Every case of the corpus of bad inputs: its reason, its warning, or a correct result."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from irem_bids.bids import Discovery, describe, discover
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.images import read_header
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.headers import HeaderError, check_header, undoubted
from irem_bids.reconstruction.stack import ImageError, read_image, read_stack
from irem_bids.settings import Settings

from .. import corpus
from ..stacks import write_stack

SETTINGS = Settings.from_dict({"run": {"nprocs": 1}})


def judged(found: Discovery, path: Path) -> tuple[str, str]:
    """Reason for which an image was left out ('' if used), and its warnings."""
    (group,) = found.groups
    reasons = {Path(e.path).name: e.reason for e in group.excluded}
    warnings = [w for w in group.warnings if w.startswith(path.name)]
    if path.name not in reasons:
        assert str(path) in {stack.path for stack in group.stacks}
    return reasons.get(path.name, ""), "\n".join(warnings)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Discovery]:
    """A dataset with every image of the corpus beside good ones, and what was found."""
    root = corpus.write_dataset(tmp_path_factory.mktemp("images") / "bids")
    for number, case in enumerate(corpus.IMAGES.values()):
        corpus.write_image_case(corpus.image_path(root, f"case{number}"), "coronal", case)
    return root, discover(root, SETTINGS)


@pytest.mark.parametrize("name", corpus.IMAGES)
def test_image(images: tuple[Path, Discovery], name: str) -> None:
    root, found = images
    case = corpus.IMAGES[name]
    path = corpus.image_path(root, f"case{list(corpus.IMAGES).index(name)}")
    reason, warnings = judged(found, path)
    assert (case.says in reason) if case.says else reason == ""
    assert (case.doubt in warnings) if case.doubt else warnings == ""
    if not case.says:
        good, grid = read_image(corpus.image_path(root, "cor"))
        data, own = read_image(path)
        if "sheared" not in name:
            assert own == grid  # whatever the unit, the order of bytes and the listed sizes
        np.testing.assert_allclose(data, good, atol=1)


def test_the_order_of_files_changes_nothing(tmp_path: Path) -> None:
    texts = []
    for number, order in enumerate((1, -1)):
        root = corpus.write_dataset(tmp_path / str(number) / "bids")
        for name in list(corpus.IMAGES)[::order]:
            place = list(corpus.IMAGES).index(name)
            path = corpus.image_path(root, f"case{place}")
            corpus.write_image_case(path, "coronal", corpus.IMAGES[name])
        texts.append(describe(discover(root, SETTINGS)))
    assert texts[0] == texts[1]
    assert texts[0].count("left out: ") == sum(bool(c.says) for c in corpus.IMAGES.values())


def test_memory_is_not_taken_on_a_header_s_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.write_image_case(tmp_path / "a.nii.gz", "axial", corpus.IMAGES["whole"])
    monkeypatch.setattr("irem_bids.reconstruction.headers.memory_bytes", lambda: 1000.0)
    with pytest.raises(ImageError, match=r"its 864 voxels need 1.38e-05 GB to be read"):
        read_image(path)
    with pytest.raises(ImageError, match=r"this process may use 1e-06 GB"):
        read_header(path, 1.5)
    monkeypatch.undo()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("huge dims", "dims that overflow", "bomb", "extension without end"):
        corpus.write_image_case(path, "axial", corpus.IMAGES[name])
        with contextlib.suppress(ImageError):
            read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_other_formats_are_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.mgz").write_bytes(b"x")
    assert check_header(tmp_path / "a.mgz") is None
    assert check_header(tmp_path / "none.nii") is None
    (tmp_path / "a.nii").write_bytes(b"x")
    with pytest.raises(HeaderError, match="no NIfTI header at its start"):
        check_header(tmp_path / "a.nii")


def test_sidecars(tmp_path: Path) -> None:
    root = corpus.write_dataset(tmp_path / "bids")
    for number, (text, _) in enumerate(corpus.SIDECARS.values()):
        label = f"case{number}"
        corpus.write_image_case(corpus.image_path(root, label), "coronal", corpus.IMAGES["whole"])
        corpus.write_sidecar(root, label, text)
    found = discover(root, SETTINGS)
    for number, (name, (_, words)) in enumerate(corpus.SIDECARS.items()):
        reason, warnings = judged(found, corpus.image_path(root, f"case{number}"))
        thickness = next(
            s.slice_thickness for s in found.groups[0].stacks if f"case{number}_" in s.path
        )
        assert reason == "", name
        assert (words in warnings) if words else warnings == "", name
        assert thickness == {"wide gap": 3.0, "overlap": 8.0}.get(name, 6.0), name


@pytest.mark.parametrize("name", corpus.TREES)
def test_trees(tmp_path: Path, name: str) -> None:
    root = corpus.write_dataset(tmp_path / "bids")
    corpus.TREES[name](root)
    found = discover(root, SETTINGS)
    (group,) = [g for g in found.groups if g.subject == "01" and g.session is None]
    assert {"axial1", "coronal1", "sagittal1"} <= {stack.label for stack in group.stacks}
    assert group.planes == ("axial", "coronal", "sagittal")
    if name == "no files":
        reasons = {Path(e.path).name: e.reason for e in group.excluded}
        assert reasons["sub-01_acq-pipe_T1w.nii.gz"] == "the file is empty (0 bytes)"
        assert "sub-01_acq-folder_T1w.nii.gz" in reasons
        assert any("acq-cor_T1w.json is not valid JSON" in w for w in group.warnings)
        assert any("acq-ax_T1w.json is not valid JSON" in w for w in group.warnings)
    if name == "case twins":
        assert len(group.stacks) == 4
    assert describe(found) == describe(discover(root, SETTINGS))


def test_masks(tmp_path: Path) -> None:
    for name, (values, says, doubt) in corpus.MASKS.items():
        root = corpus.write_dataset(tmp_path / name / "bids")
        _, grid = read_image(corpus.image_path(root, "cor"))
        corpus.write_mask(tmp_path / name / "masks", "cor", values(), grid)
        folder = str(tmp_path / name / "masks")
        settings = SETTINGS.updated({"selection": {"derivatives": [folder]}})
        reason, warnings = judged(discover(root, settings), corpus.image_path(root, "cor"))
        assert (says in reason) if says else reason == "", name
        assert (doubt in warnings) if doubt else warnings == "", name


def test_a_mask_on_another_grid_is_told(tmp_path: Path) -> None:
    root = corpus.write_dataset(tmp_path / "bids")
    _, grid = read_image(corpus.image_path(root, "cor"))
    affine = np.array(grid.affine) @ np.diag([0.5, 0.5, 0.5, 1])
    values = np.zeros((24, 24, 12), np.uint8)
    values[8:16, 8:16, 4:8] = 1
    corpus.write_mask(tmp_path / "masks", "cor", values, Grid(values.shape, affine))
    settings = SETTINGS.updated({"selection": {"derivatives": [str(tmp_path / "masks")]}})
    found = discover(root, settings)
    reason, warnings = judged(found, corpus.image_path(root, "cor"))
    assert reason == ""
    assert "is on another grid: the nearest voxels were taken" in warnings
    stack = next(s for s in found.groups[0].stacks if s.mask)
    mask = read_stack(stack.path, label="x", mask_path=stack.mask).mask
    assert mask.sum() == 4 * 4 * 2


@pytest.mark.parametrize(
    ("label", "plane", "warned"),
    [("ax", "coronal", True), ("COR2", "axial", True), ("tra", "axial", False),
     ("axflair", "coronal", False)],
)  # fmt: skip
def test_a_label_against_the_header(tmp_path: Path, label: str, plane: str, warned: bool) -> None:
    root = corpus.write_dataset(tmp_path / "bids")
    path = corpus.write_image_case(corpus.image_path(root, label), plane, corpus.IMAGES["whole"])
    if label == "ax":
        corpus.write_image_case(corpus.image_path(root, "extra"), "axial", corpus.IMAGES["whole"])
    found = discover(root, SETTINGS)
    _, warnings = judged(found, path)
    assert (f"its header says {plane}: the header was believed" in warnings) is warned
    assert next(s.plane for s in found.groups[0].stacks if s.path == str(path)) == plane


def test_labels_cannot_lead_out_of_the_dataset(tmp_path: Path) -> None:
    root = corpus.write_dataset(tmp_path / "bids")
    for label in ("../../x", "sub-..", "/etc"):
        settings = SETTINGS.updated({"selection": {"participant_label": [label]}})
        with pytest.raises(UserError, match="no such participant") as caught:
            discover(root, settings)
        assert caught.value.code is ExitCode.NOTHING_SELECTED
    filters = tmp_path / "filters.json"
    filters.write_text('{"stack": {"subject": "../01", "acquisition": "../../etc"}}')
    settings = SETTINGS.updated({"selection": {"bids_filter_file": str(filters)}})
    with pytest.raises(UserError):
        discover(root, settings)
    assert sorted(os.listdir(tmp_path)) == ["bids", "filters.json"]


@pytest.mark.parametrize("name", corpus.IMAGES)
def test_the_short_way_round_nibabel_has_no_doubts(name: str) -> None:
    case = corpus.IMAGES[name]
    block = case.make("coronal")[:352]
    certain = len(block) >= 348 and undoubted(block)
    if case.doubt or name in ("zero zooms", "singular", "NaN affine", "sheared"):
        assert not certain
    if name in ("whole", "slope 0", "4D of one", "constant"):
        assert certain


def test_the_short_way_takes_turned_stacks(tmp_path: Path) -> None:
    for oblique in (0, 20, 75):
        path = write_stack(tmp_path / "a.nii", "sagittal", oblique=oblique)
        assert undoubted(path.read_bytes()[:352])
