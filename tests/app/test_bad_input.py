# SPDX-License-Identifier: Apache-2.0
"""What the app says of each bad input, run as a user runs it: code, one message, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.stack import read_image, write_image
from tests.stacks import stack_grid, write_description, write_stack

REPOSITORY = Path(__file__).resolve().parents[2]
Damage = Callable[[Path], None]


def run_app(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "irem_bids", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def refused(code: int, *words: object, cwd: Path | None = None) -> str:
    """Run; check the exit code and that stderr holds one error and no traceback; return it."""
    done = run_app(*words, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("irem-bids: error: ") == 1
    assert done.stderr.startswith("irem-bids: error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_no_arguments():
    assert "required: bids_dir, output_dir" in refused(64)


def test_no_such_folder(tmp_path):
    message = refused(66, tmp_path / "nowhere", tmp_path / "out", "participant")
    assert "nowhere: there is no such folder" in message


def test_not_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    message = refused(66, path, tmp_path / "out", "participant")
    assert "is a file; expected the folder of a BIDS dataset" in message


def test_no_dataset_description(tiny_dataset, tmp_path):
    (tiny_dataset / "dataset_description.json").unlink()
    message = refused(16, tiny_dataset, tmp_path / "out", "participant")
    assert "has no dataset_description.json" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no 'Name' and no 'BIDSVersion'"),
        ('{"Name": "x"}', "has no 'BIDSVersion'"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_broken_dataset_description(tiny_dataset, tmp_path, text, words):
    (tiny_dataset / "dataset_description.json").write_text(text, encoding="latin-1")
    assert words in refused(16, tiny_dataset, tmp_path / "out", "participant")


def test_unknown_level(tiny_dataset, tmp_path):
    message = refused(17, tiny_dataset, tmp_path / "out", "session")
    assert "unknown analysis level 'session'; expected participant or group" in message


@pytest.mark.parametrize("labels", [["99"], ["01", "sub-99"]])
def test_unknown_participant(tiny_dataset, tmp_path, labels):
    words = [tiny_dataset, tmp_path / "out", "participant", "--participant-label", *labels]
    message = refused(18, *words)
    assert (
        "no such participant: sub-99; the dataset has 1 participant, among them sub-01" in message
    )


def test_filters_that_match_nothing(tiny_dataset, tmp_path):
    path = tmp_path / "filters.json"
    path.write_text(json.dumps({"stack": {"acquisition": "none"}}))
    words = [tiny_dataset, tmp_path / "out", "participant"]
    message = refused(18, *words, "--bids-filter-file", path)
    assert "no T1w, T2w, PDw, FLAIR image in anat/ matches --bids-filter-file" in message
    message = refused(18, *words, "--modalities", "FLAIR")
    assert "no FLAIR image in anat/ matches --modalities" in message


def test_a_dataset_without_participants(tmp_path):
    root = write_description(tmp_path / "empty")
    assert "there is no sub-* folder" in refused(18, root, tmp_path / "out", "participant")


def test_one_orientation_only(shared_data, tmp_path):
    message = refused(65, shared_data / "adult-single-orientation", tmp_path / "out", "participant")
    assert "no group of images can be reconstructed" in message
    for suffix in ("T1w", "FLAIR"):
        assert f"sub-12_ses-1_{suffix}: one orientation only (1 axial stack)" in message
    assert not (tmp_path / "out").exists()


def test_only_isotropic_images(tmp_path):
    root = write_description(tmp_path / "bids")
    for run in (1, 2):
        path = root / "sub-01" / "anat" / f"sub-01_run-{run}_T1w.nii.gz"
        write_stack(path, "axial", in_plane=4, spacing=4)
    message = refused(65, root, tmp_path / "out", "participant")
    assert message.count("near-isotropic, 4 × 4 × 4 mm: not a stack of thick slices") == 2


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def not_nifti(path: Path) -> None:
    path.write_text("no image at all")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


def with_nan(path: Path) -> None:
    data, grid = read_image(path)
    data[3, 4, 5] = np.nan
    write_image(path, data, grid)


def with_affine(affine: np.ndarray, code: int = 1) -> Damage:
    def damage(path: Path) -> None:
        import nibabel as nib

        data, grid = read_image(path)
        image = nib.Nifti1Image(data, grid.affine)
        image.header["sform_code"], image.header["qform_code"] = code, 0
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            image.header[name] = affine[row]
        nib.save(image, path)
        raw = nib.load(path)
        header = raw.header.copy()
        header["sform_code"], header["qform_code"] = code, 0
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name] = affine[row]
        with path.with_suffix(".tmp").open("wb") as file:
            header.write_to(file)
            file.write(b"\0" * 4 + data.tobytes(order="F"))
        import gzip

        path.write_bytes(gzip.compress(path.with_suffix(".tmp").read_bytes()))
        path.with_suffix(".tmp").unlink()

    return damage


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../.git/annex/objects/XX/YY/SHA256E-s1.nii.gz")


DAMAGES = {
    "truncated": (truncate, "truncated"),
    "truncated header": (truncate_header, "truncated"),
    "zero bytes": (zero_bytes, "the file is empty (0 bytes)"),
    "not NIfTI": (not_nifti, "cannot be read as NIfTI"),
    "damaged": (flip_a_byte, "the file is damaged ("),
    "NaN": (with_nan, "1 voxels are NaN or infinite; expected finite intensities"),
    "zero affine": (with_affine(np.zeros((3, 4))), "the affine is singular: [[0.0, 0.0, 0.0]"),
    "NaN affine": (with_affine(np.full((3, 4), np.nan)), "the affine is not finite"),
    "no orientation": (with_affine(np.eye(4)[:3], 0), "qform and sform codes are 0"),
    "wrong units": (with_affine(1e-3 * np.eye(4)[:3]), "are not plausible"),
    "dangling link": (dangling_link, "link to nowhere; get its content first (datalad get "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_images_leave_no_group(tiny_dataset, tmp_path, kind):
    damage, words = DAMAGES[kind]
    images = sorted((tiny_dataset / "sub-01" / "anat").glob("*.nii.gz"))
    for path in images[:2]:
        damage(path)
    message = refused(65, tiny_dataset, tmp_path / "out", "participant")
    assert "sub-01_T1w: one orientation only (1 sagittal stack)" in message
    for path in images[:2]:
        (line,) = [line for line in message.splitlines() if line.strip().startswith(path.name)]
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_rest_of_the_group_goes_on(tiny_dataset, tmp_path, kind):
    damage, words = DAMAGES[kind]
    path = tiny_dataset / "sub-01" / "anat" / "sub-01_acq-cor_T1w.nii.gz"
    damage(path)
    done = run_app(tiny_dataset, tmp_path / "out", "participant", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "sub-01_T1w: 2 stacks, axial, sagittal" in done.stdout
    assert f"left out: {path.name}: " in done.stdout
    assert words in done.stdout
    assert "warning: two orientations only (axial, sagittal)" in done.stdout


def test_a_mask_on_another_grid_that_covers_the_image_is_resampled(tiny_dataset, tmp_path):
    masks = tmp_path / "masks" / "sub-01" / "anat"
    masks.mkdir(parents=True)
    grid = stack_grid("coronal", spacing=3)
    write_image(masks / "sub-01_acq-ax_desc-brain_mask.nii.gz", np.ones(grid.shape, bool), grid)
    done = run_app(
        tiny_dataset, tmp_path / "o", "participant", "--dry-run", "-d", tmp_path / "masks"
    )
    assert done.returncode == 0, done.stderr
    assert "mask sub-01_acq-ax_desc-brain_mask.nii.gz" in done.stdout


def test_a_mask_beside_the_image_is_refused_with_both_grids(tiny_dataset, tmp_path):
    masks = tmp_path / "masks" / "sub-01" / "anat"
    masks.mkdir(parents=True)
    for label, plane in (("ax", "axial"), ("cor", "coronal")):
        own = stack_grid(plane)
        affine = np.array(own.affine)
        affine[:3, 3] += 500.0
        path = masks / f"sub-01_acq-{label}_desc-brain_mask.nii.gz"
        write_image(path, np.ones((5, 6, 7), bool), Grid((5, 6, 7), affine))
    message = refused(
        65, tiny_dataset, tmp_path / "out", "participant", "--derivatives", tmp_path / "masks"
    )
    for label, plane in (("ax", "axial"), ("cor", "coronal")):
        line = next(x for x in message.splitlines() if x.strip().startswith(f"sub-01_acq-{label}_"))
        grid = stack_grid(plane)
        assert "its mask is refused" in line
        assert "mask grid (5, 6, 7)" in line
        assert f"image grid {grid.shape} {grid.affine.round(3).tolist()}" in line


@pytest.mark.parametrize("inside", ["", "out", "sub-01/out", "derivatives"])
def test_output_inside_the_dataset(tiny_dataset, inside):
    before = sorted(tiny_dataset.rglob("*"))
    message = refused(64, tiny_dataset, tiny_dataset / inside, "participant")
    assert "the output folder is inside the dataset" in message
    assert str(tiny_dataset / "derivatives" / "irem-bids") in message
    assert sorted(tiny_dataset.rglob("*")) == before


def test_output_below_derivatives_is_welcome(tiny_dataset):
    inside = tiny_dataset / "derivatives" / "irem"
    done = run_app(tiny_dataset, inside, "participant", "--dry-run", cwd=tiny_dataset.parent)
    assert done.returncode == 0, done.stderr
    assert not inside.exists()


def test_work_folder_inside_the_dataset(tiny_dataset, tmp_path):
    message = refused(
        64, tiny_dataset, tmp_path / "out", "participant", "-w", tiny_dataset / "work"
    )
    assert "the work folder is inside the dataset" in message
    assert not (tiny_dataset / "work").exists()


def test_output_that_cannot_be_created(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("x")
    message = refused(73, tiny_dataset, tmp_path / "file" / "out", "participant")
    assert "cannot be created or written" in message
    assert "is not a folder" in message


def test_output_that_cannot_be_written(tiny_dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    where = Path("/proc/irem-bids") if os.access(out, os.W_OK) else out  # root may write all
    done = run_app(tiny_dataset, where, "participant", "--work-dir", tmp_path / "work")
    assert done.returncode == 73, done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"irem-bids: error: {where}: the output folder cannot be created")
    assert "Traceback" not in done.stderr


def test_a_gpu_where_there_is_none(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for device in ("cuda", "cuda:3"):
        message = refused(75, tiny_dataset, tmp_path / "out", "participant", "--device", device)
        assert f"--device is '{device}'" in message
        assert "--gpus all" in message
        assert "--nv" in message


def test_an_unknown_device(tiny_dataset, tmp_path):
    message = refused(64, tiny_dataset, tmp_path / "out", "participant", "--device", "gpu")
    assert "expected auto, cpu, cuda or cuda:N" in message


def test_a_memory_size_that_is_none(tiny_dataset, tmp_path):
    message = refused(64, tiny_dataset, tmp_path / "out", "participant", "--mem", "lots")
    assert "--mem is 'lots'" in message


def test_a_memory_size_in_megabytes(tiny_dataset, tmp_path):
    """A bare number is GB, and not MB as for fMRIPrep."""
    for more in ([], ["--dry-run"]):
        given = ("participant", "--mem", "160000", *more)
        message = refused(64, tiny_dataset, tmp_path / "out", *given)
        assert "--mem is 160000, that is 160000 GB" in message
        assert "did you mean 160000M?" in message


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[output]\nmetod = ['srr']\n", 64, "'metod'; did you mean 'method'?"),
        ("[outputs]\n", 64, "unknown section: 'outputs'; did you mean 'output'?"),
        ("[irem]\nlayers = 'many'\n", 64, "[irem] layers is 'many' (str); expected int"),
        ("[irem\n", 64, "is not valid TOML"),
        ("\xff", 64, "is not UTF-8 text"),
        (None, 66, "cannot be read (No such file or directory)"),
    ],
)
def test_config_files_that_do_not_work(tiny_dataset, tmp_path, text, code, words):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    message = refused(code, tiny_dataset, tmp_path / "out", "participant", "--config-file", path)
    assert words in message
    assert str(path) in message


def test_a_misspelt_option(tiny_dataset, tmp_path):
    message = refused(64, tiny_dataset, tmp_path / "out", "participant", "--outptu-resolution", 1)
    assert "did you mean --output-resolution?" in message


def test_group_level_without_results(tiny_dataset, tmp_path):
    message = refused(66, tiny_dataset, tmp_path / "out", "group")
    assert "run the participant level first" in message
    message = refused(64, tiny_dataset, tmp_path / "out", "group", "--dry-run")
    assert "--dry-run is for the participant level" in message


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 66, "there is no such file; expected a text file of two columns"),
        ("1 2 3\n4 5 6\n7 8 9\n", 64, "shape (3, 3); expected two columns"),
        ("a b\n", 64, "no slice profile"),
    ],
)
def test_measured_profile_that_is_none(tmp_path, text, code, words):
    """Told before any work, with the path as it stands from the current folder."""
    write_description(tmp_path)
    if text is not None:
        (tmp_path / "profile.txt").write_text(text)
    asked = ("participant", "--profile-file", "profile.txt")
    message = refused(code, tmp_path, tmp_path.parent / "out", *asked, cwd=tmp_path)
    assert words in message
    assert str(tmp_path / "profile.txt") in message
