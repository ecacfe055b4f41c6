# SPDX-License-Identifier: Apache-2.0
"""Names, sidecars and atomic writing of derivatives, judged by the real validator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from irem_bids import dataset, derivatives, paths
from irem_bids.atomic import publish, write_json, write_text
from irem_bids.bids import Group
from irem_bids.products import Result
from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.settings import Settings
from irem_bids.tables import table_text

from . import report_material


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """A group with two methods whose steps have run."""
    inp = report_material.make_input(tmp_path / "work")
    prepared = report_material.prepared()
    step = {
        "seconds": {"normalise": 1.5},
        "reference": "axial1",
        "poses": {
            stack.label: pose.matrix.tolist()
            for stack, pose in zip(prepared.stacks, prepared.poses, strict=True)
        },
        "metrics": prepared.metrics,
    }
    write_json(tmp_path / "work" / "prepared" / "step.json", step)
    fit = json.loads((inp.methods["irem"] / "fit.json").read_text())
    moved = RigidTransform.from_vector([0, 0, 0, 0.5, 0, 0])
    fit["poses"]["coronal1"] = (moved @ RigidTransform(fit["poses"]["coronal1"])).matrix.tolist()
    fit["info"] |= {"network": "reconciled", "spectrum_share": 0.61803}
    write_json(inp.methods["irem"] / "fit.json", fit)
    return Result(
        inp.group,
        tmp_path / "work" / "prepared",
        dict(inp.methods),
        inp.settings,
        {"irem": "a" * 64, "bspline": "b" * 64},
        {"versions": {"irem-bids": "0.1.0"}, "run": "test"},
    )


def validate(folder: Path) -> list[str]:
    """Errors that the real validator reports."""
    tool = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [str(tool), str(folder), "--json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_names_of_all_files(result: Result, tmp_path: Path) -> None:
    settings = result.settings.updated({"output": {"save_registered": True, "model_out": True}})
    model = result.methods["irem"] / "model.safetensors"
    model.write_bytes(b"field")
    shutil.copy(result.methods["irem"] / "volume.nii.gz", result.methods["irem"] / "std.nii.gz")
    derivatives.save(replace(result, settings=settings), tmp_path / "out")
    anat = "sub-01/anat/sub-01_"
    assert names(tmp_path / "out") == sorted(
        f"{anat}{name}"
        for name in (
            "acq-axial1_desc-registered_T1w.json",
            "acq-axial1_desc-registered_T1w.nii.gz",
            "acq-coronal1_desc-registered_T1w.json",
            "acq-coronal1_desc-registered_T1w.nii.gz",
            "acq-sagittal1_desc-registered_T1w.json",
            "acq-sagittal1_desc-registered_T1w.nii.gz",
            "desc-bspline_T1w.json",
            "desc-bspline_T1w.nii.gz",
            "desc-bspline_qc.json",
            "desc-bspline_qc.tsv",
            "desc-head_mask.json",
            "desc-head_mask.nii.gz",
            "desc-irem_T1w.json",
            "desc-irem_T1w.nii.gz",
            "desc-irem_model.safetensors",
            "desc-irem_qc.json",
            "desc-irem_qc.tsv",
            "desc-irem_std.json",
            "desc-irem_std.nii.gz",
            "from-coronal1_to-axial1_mode-image_desc-irem_xfm.txt",
            "from-coronal1_to-axial1_mode-image_xfm.txt",
            "from-sagittal1_to-axial1_mode-image_desc-irem_xfm.txt",
            "from-sagittal1_to-axial1_mode-image_xfm.txt",
        )
    )


def test_validator_reports_no_error(result: Result, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = result.settings.updated({"output": {"save_registered": True, "model_out": True}})
    (result.methods["irem"] / "model.safetensors").write_bytes(b"field")
    shutil.copy(result.methods["irem"] / "volume.nii.gz", result.methods["irem"] / "std.nii.gz")
    links = {"raw": tmp_path.as_uri(), "masks": tmp_path.as_uri()}
    dataset.write_dataset_files(out, links)
    for group in (
        result.group,
        replace(result.group, session="1", suffix="T2w", entities={"ce": "gd", "echo": "1"}),
        masked(replace(result.group, session="2", suffix="FLAIR", entities={"part": "mag"})),
    ):
        derivatives.save(replace(result, group=group, settings=settings), out)
    for name in ("sub-01.html", "group_T1w.tsv", "group_T1w.json", "logs/a.toml"):
        write_text(out / name, "{}\n")
    write_text(out / "sub-01/figures/sub-01_desc-training_T1w.svg", "<svg/>")
    assert validate(out) == []
    assert (out / "sub-01/ses-2/anat").is_dir()


def test_validator_is_heard(result: Result, tmp_path: Path) -> None:
    """The check above can fail: without its sidecar an image is an error."""
    out = tmp_path / "out"
    dataset.write_dataset_files(out, {"raw": tmp_path.as_uri()})
    derivatives.save(result, out)
    (out / paths.sidecar_path(result.group, "irem")).unlink()
    assert any("SIDECAR" in issue or "JSON" in issue for issue in validate(out))


def masked(group: Group) -> Group:
    stacks = tuple(
        replace(s, mask=s.path, mask_uri=f"bids:masks:{s.label}.nii.gz") for s in group.stacks
    )
    return replace(group, stacks=stacks)


def masks_used(result: Result, *labels: str) -> None:
    path = result.prepared / "step.json"
    step = json.loads(path.read_text())
    step["metrics"]["masked"] |= dict.fromkeys(labels, "given")
    write_json(path, step)


def test_sidecar_says_what_was_used(result: Result, tmp_path: Path) -> None:
    derivatives.save(result, tmp_path)
    sidecar = json.loads((tmp_path / paths.sidecar_path(result.group, "irem")).read_text())
    assert sidecar["SkullStripped"] is False
    assert sidecar["Sources"] == [stack.uri for stack in result.group.stacks]
    assert sidecar["VoxelSize"] == [1.5, 1.5, 1.5]
    assert sidecar["Stacks"][1]["SliceThickness"] == 5.0
    assert sidecar["Stacks"][1]["SliceSpacing"] == 6.0
    assert sidecar["Stacks"][1]["SliceThicknessSource"] == "sidecar"
    assert sidecar["ReferenceStack"] == "axial1"
    assert sidecar["Seconds"] == {"normalise": 1.5, "optimise": 10.0, "reconstruct": 2.5}
    assert sidecar["Metrics"]["held_out_psnr"] == 30.0
    assert sidecar["RandomSeed"] == 2021
    assert sidecar["Network"] == "reconciled"
    assert sidecar["SpectrumShare"] == 0.618
    assert sidecar["Versions"] == {"irem-bids": "0.1.0"}
    assert sidecar["IremBids"]["Settings"]["irem"]["steps"] == Settings().irem.steps
    assert "device" not in json.dumps(sidecar["IremBids"]["Settings"])
    assert paths.completed_key(tmp_path, result.group, "irem") == "a" * 64
    assert paths.completed_key(tmp_path, result.group, "srr") is None


def test_brain_masks_make_a_brain_mask(result: Result, tmp_path: Path) -> None:
    """An image that is zero outside given masks is skull-stripped; its mask says brain."""
    group = masked(replace(result.group, suffix="T2w"))
    masks_used(result, "axial1", "coronal1", "sagittal1")
    volume = nib.load(result.methods["irem"] / "volume.nii.gz")
    mask = nib.load(result.methods["irem"] / "mask.nii.gz").get_fdata() > 0
    nib.save(
        nib.Nifti1Image(volume.get_fdata(dtype=np.float32) * mask, volume.affine),
        result.methods["irem"] / "volume.nii.gz",
    )
    derivatives.save(replace(result, group=group), tmp_path)
    sidecar = json.loads((tmp_path / "sub-01/anat/sub-01_desc-irem_T2w.json").read_text())
    assert sidecar["SkullStripped"] is True
    assert sidecar["Sources"][-1] == "bids:masks:sagittal1.nii.gz"
    about = json.loads((tmp_path / "sub-01/anat/sub-01_space-T2w_desc-brain_mask.json").read_text())
    assert about["Type"] == "Brain"
    assert about["SpatialReference"] == "bids::sub-01/anat/sub-01_desc-irem_T2w.nii.gz"


def test_masks_of_some_stacks_make_no_brain_mask(result: Result, tmp_path: Path) -> None:
    """One that was given but not used, since it covers all, is no source."""
    masks_used(result, "coronal1")
    derivatives.save(replace(result, group=masked(result.group)), tmp_path)
    anat = tmp_path / "sub-01/anat"
    assert not list(anat.glob("*desc-brain*"))
    about = json.loads((anat / "sub-01_desc-head_mask.json").read_text())
    assert about["Type"] == "ROI"
    assert about["Sources"][3:] == ["bids:masks:coronal1.nii.gz"]
    image = json.loads((anat / "sub-01_desc-irem_T1w.json").read_text())
    assert image["Sources"][3:] == ["bids:masks:coronal1.nii.gz"]
    assert image["SkullStripped"] is False


def test_slices_of_the_sidecar_are_those_acquired(result: Result, tmp_path: Path) -> None:
    """Null where preparation cut a slice off."""
    path, step = result.methods["irem"] / "fit.json", result.prepared / "step.json"
    of_slices = {"slice_weights": [1.0, 0.2], "slice_gains": [0.98765, 1.01]}
    rows = {key: {"axial1": values} for key, values in of_slices.items()}
    write_json(path, {**json.loads(path.read_text()), **rows})
    places = {"axial1": {"first": 1, "count": 2, "acquired": 4}}
    write_json(step, {**json.loads(step.read_text()), "slices": places})
    derivatives.save(result, tmp_path)
    sidecar = json.loads((tmp_path / paths.sidecar_path(result.group, "irem")).read_text())
    assert sidecar["SliceWeights"] == {"axial1": [None, 1.0, 0.2, None]}
    assert sidecar["SliceGains"] == {"axial1": [None, 0.9877, 1.01, None]}


def test_rounding_makes_no_transform(result: Result, tmp_path: Path) -> None:
    path = result.methods["irem"] / "fit.json"
    fit = json.loads(path.read_text())
    first = json.loads((result.prepared / "step.json").read_text())["poses"]
    fit["poses"] = {label: (np.array(pose) + 1e-15).tolist() for label, pose in first.items()}
    write_json(path, fit)
    derivatives.save(result, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*xfm.txt")) == [
        "sub-01_from-coronal1_to-axial1_mode-image_xfm.txt",
        "sub-01_from-sagittal1_to-axial1_mode-image_xfm.txt",
    ]


def test_nothing_of_an_older_result_lies_beside_a_new_one(result: Result, tmp_path: Path) -> None:
    std = result.methods["irem"] / "std.nii.gz"
    shutil.copy(result.methods["irem"] / "volume.nii.gz", std)
    with_masks = replace(result, group=masked(result.group))
    masks_used(result, "axial1", "coronal1", "sagittal1")
    derivatives.save(with_masks, tmp_path)
    old = {"desc-irem_std.nii.gz", "desc-irem_std.json", "desc-brain_mask.nii.gz"}
    old.add("from-coronal1_to-axial1_mode-image_desc-irem_xfm.txt")
    anat = tmp_path / "sub-01/anat"
    assert all((anat / f"sub-01_{name}").exists() for name in old)
    std.unlink()
    fit = json.loads((result.methods["irem"] / "fit.json").read_text())
    write_json(result.methods["irem"] / "fit.json", {**fit, "poses": {}})
    write_json(
        result.prepared / "step.json",
        json.loads((result.prepared / "step.json").read_text().replace("given", "otsu")),
    )
    derivatives.save(replace(result, keys={"irem": "c" * 64, "bspline": "d" * 64}), tmp_path)
    assert not any((anat / f"sub-01_{name}").exists() for name in old)
    assert (anat / "sub-01_desc-head_mask.nii.gz").exists()
    assert (anat / "sub-01_from-coronal1_to-axial1_mode-image_xfm.txt").exists()
    assert (anat / "sub-01_desc-bspline_T1w.json").exists()


def test_a_work_folder_within_the_output_is_ignored(result: Result, tmp_path: Path) -> None:
    out = tmp_path / "out"
    links = {"raw": tmp_path.as_uri()}
    dataset.write_dataset_files(out, links, tmp_path / "work")
    derivatives.save(result, out)
    write_text(out / "work/reports/sub-01_T1w.json", "{}\n")
    assert validate(out) != []
    dataset.write_dataset_files(out, links, out / "work")
    assert validate(out) == []


def test_transforms_map_reference_points_to_stack_points(result: Result, tmp_path: Path) -> None:
    import SimpleITK as sitk

    derivatives.save(result, tmp_path)
    name = "sub-01/anat/sub-01_from-coronal1_to-axial1_mode-image_xfm.txt"
    transform = sitk.ReadTransform(str(tmp_path / name))
    pose = report_material.prepared().poses[1]
    point = np.array([3.0, -8.0, 5.0])  # RAS+, scanner space of the coronal stack
    there = pose.apply(point) * [-1, -1, 1]
    assert np.allclose(np.array(transform.TransformPoint(there)) * [-1, -1, 1], point, atol=1e-9)
    refined = (tmp_path / name.replace("image_", "image_desc-irem_")).read_text()
    moved = RigidTransform.from_itk_text(refined).inverse() @ pose.inverse()
    assert np.allclose(moved.matrix[:3, 3], [0.5, 0, 0], atol=1e-9)


def test_image_keeps_grid_and_intensities(result: Result, tmp_path: Path) -> None:
    derivatives.save(result, tmp_path)
    before = nib.load(result.methods["irem"] / "volume.nii.gz")
    after = nib.load(tmp_path / paths.image_path(result.group, "irem"))
    assert np.array_equal(before.get_fdata(), after.get_fdata())
    assert np.array_equal(before.affine, after.affine)
    assert after.header["qform_code"] == after.header["sform_code"] == 1


def test_outputs_share_no_inode_with_the_work_folder(result: Result, tmp_path: Path) -> None:
    written = derivatives.save(result, tmp_path / "out")
    assert written
    assert all(path.stat().st_nlink == 1 for path in written)


def test_failed_save_leaves_nothing(result: Result, tmp_path: Path) -> None:
    (result.methods["bspline"] / "volume.nii.gz").unlink()
    with pytest.raises(FileNotFoundError):
        derivatives.save(result, tmp_path / "out")
    assert names(tmp_path / "out") == []
    assert list((tmp_path / "out").iterdir()) == []


def test_publish_replaces_whole_files(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "deep" / "b"
    source.write_text("new")
    os.link(source, tmp_path / "other")
    publish(source, target)
    assert target.read_text() == "new"
    assert not source.exists()
    assert target.stat().st_nlink == 1


def test_write_text_leaves_equal_files_alone(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "one")
    os.utime(path, (1, 1))
    write_text(path, "one")
    assert path.stat().st_mtime == 1
    write_text(path, "two")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_dataset_files_merge(tmp_path: Path) -> None:
    (tmp_path / ".bidsignore").write_text("mine\n")
    dataset.write_dataset_files(tmp_path, {"raw": "file:///a"})
    dataset.write_dataset_files(tmp_path, {"masks": "file:///b"})
    description = json.loads((tmp_path / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"raw": "file:///a", "masks": "file:///b"}
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "irem-bids"
    lines = (tmp_path / ".bidsignore").read_text().splitlines()
    assert lines[0] == "mine"
    assert len(lines) == len(set(lines)) == 1 + len(dataset.IGNORED)


def test_names_without_a_pattern_are_refused() -> None:
    group = Group("01", None, "T1w", {}, ())
    with pytest.raises(ValueError, match="no name"):
        paths.relative_path(group, suffix="bold", extension=".nii.gz")


def test_table_cells() -> None:
    rows = [{"a": 1.23456789, "b": "x\ty"}, {"a": float("nan"), "c": None}]
    assert table_text(rows) == "a\tb\tc\n1.23457\tx y\tn/a\nn/a\tn/a\tn/a\n"


def test_older_result_is_disowned_before_it_is_replaced(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while publishing over an older result: neither key says that it is finished."""
    derivatives.save(result, tmp_path)
    newer = replace(result, keys={"irem": "c" * 64, "bspline": "d" * 64})

    def killed(source: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(derivatives, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        derivatives.save(newer, tmp_path)
    monkeypatch.undo()
    assert paths.completed_key(tmp_path, result.group, "irem") is None
    written = derivatives.save(newer, tmp_path)
    assert paths.completed_key(tmp_path, result.group, "irem") == "c" * 64
    assert {path.name for path in written[-2:]} == {
        "sub-01_desc-irem_T1w.json",
        "sub-01_desc-bspline_T1w.json",
    }
