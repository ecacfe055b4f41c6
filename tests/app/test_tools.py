# SPDX-License-Identifier: Apache-2.0
"""The small programs: what they write and print, and what they say to mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from irem_bids import tools
from irem_bids.exitcodes import ExitCode
from irem_bids.reconstruction.fields import load_model, save_model
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.paper2021 import PaperNetwork
from irem_bids.reconstruction.simulated_dataset import Scan, read_truth
from irem_bids.reconstruction.spline import Spline
from irem_bids.reconstruction.stack import read_image, write_image
from tests.phantom import head


@pytest.fixture(scope="module")
def truth_file(tmp_path_factory):
    return write_image(tmp_path_factory.mktemp("truth") / "head.nii.gz", *head())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, truth_file):
    """A dataset of three small stacks with hidden motion, made by the program."""
    root = tmp_path_factory.mktemp("simulated") / "bids"
    arguments = [
        truth_file,
        root,
        "--slice-thickness",
        6,
        "--gap",
        0.6,
        "--in-plane",
        3,
        "--motion-degrees",
        3,
        "--motion-mm",
        3,
        "--gain",
        0.08,
        "--snr",
        40,
        "--seed",
        5,
        "--threads",
        1,
    ]
    assert tools.simulate_main([str(a) for a in arguments]) == 0
    return root


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, simulated):
    """A perfect reconstruction in the space of the coronal stack, with its transforms."""
    known = read_truth(simulated)
    back = known.poses["coronal1"]  # the result's space is that of the coronal scanner
    folder = tmp_path_factory.mktemp("out") / "sub-01" / "anat"
    folder.mkdir(parents=True)
    points = known.grid.to_world(np.moveaxis(np.indices(known.grid.shape), 0, -1))
    volume = 0.5 * Spline(known.volume, known.grid).at(back.apply(points))
    image = write_image(folder / "sub-01_desc-irem_T1w.nii.gz", volume, known.grid)
    shift = RigidTransform.from_vector([0, 0, 0, 0.6, 0, 0])
    for label in ("axial1", "sagittal1"):
        pose = back.inverse() @ known.poses[label]
        name = f"sub-01_from-{label}_to-coronal1_mode-image"
        (folder / f"{name}_desc-irem_xfm.txt").write_text(pose.inverse().to_itk_text())
        (folder / f"{name}_xfm.txt").write_text((shift @ pose).inverse().to_itk_text())
    return image


def test_simulate_writes_what_was_asked_for(simulated, capsys):
    known = read_truth(simulated)
    assert known.protocol.thickness == 6.0
    assert known.protocol.gain == 0.08
    assert [one.label for one in known.draws] == ["axial1", "coronal1", "sagittal1"]
    data, grid = read_image(simulated / "sub-01" / "anat" / "sub-01_acq-coronal_T1w.nii.gz")
    assert grid.voxel_size == pytest.approx([3, 3, 6.6])
    assert data.max() > 300


def test_simulate_adds_a_subject_and_refuses_to_overwrite(simulated, truth_file, capsys):
    more = [str(truth_file), str(simulated), "--slice-thickness", "12", "--in-plane", "4"]
    arguments = [*more, "--subject", "kid2", "--session", "a", "--suffix", "FLAIR"]
    assert tools.simulate_main([*arguments, "--orientations", "axial", "sagittal"]) == 0
    said = capsys.readouterr().out
    assert "sagittal1" in said
    assert "derivatives/truth" in said
    names = {p.name for p in (simulated / "sub-kid2" / "ses-a" / "anat").iterdir()}
    assert "sub-kid2_ses-a_acq-axial_FLAIR.nii.gz" in names
    assert tools.simulate_main(more) == ExitCode.CANNOT_CREATE
    assert "already" in capsys.readouterr().err


def test_contrasts_of_a_session_keep_their_truths_apart(
    simulated, outputs, truth_file, tmp_path, capsys
):
    two = tmp_path / "two"
    shutil.copytree(simulated, two)
    first = read_truth(two, Scan("01"))
    more = [str(truth_file), str(two), "--slice-thickness", "12", "--in-plane", "4"]
    moved = ["--motion-mm", "5", "--motion-degrees", "5", "--seed", "9"]
    assert tools.simulate_main([*more, "--suffix", "FLAIR", *moved]) == 0
    capsys.readouterr()
    again, flair = read_truth(two, Scan("01")), read_truth(two, Scan("01", None, "FLAIR"))
    for label, pose in first.poses.items():
        assert np.array_equal(again.poses[label].matrix, pose.matrix)
    assert not np.allclose(flair.poses["axial1"].matrix, first.poses["axial1"].matrix)
    # the transforms of one contrast are not those of the other
    folder = tmp_path / "out" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    for path in outputs.parent.glob("*_xfm.txt"):
        shutil.copy(path, folder)
    for label in ("axial1", "sagittal1"):
        pose = flair.poses["coronal1"].inverse() @ flair.poses[label]
        name = f"sub-01_mod-FLAIR_from-{label}_to-coronal1_mode-image_desc-irem_xfm.txt"
        (folder / name).write_text(pose.inverse().to_itk_text())
    image = folder / "sub-01_desc-irem_FLAIR.nii.gz"
    found = tools.estimated_poses(tmp_path / "out", image, flair)
    for label in ("axial1", "sagittal1"):
        expected = flair.poses["coronal1"].inverse() @ flair.poses[label]
        assert np.allclose(found[label].matrix, expected.matrix, atol=1e-6)


def test_evaluate_takes_the_gauge_out(simulated, outputs, capsys):
    arguments = [str(outputs), "--dataset", str(simulated), "--json", "--threads", "1"]
    assert tools.evaluate_main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["psnr"] > 40 > 20 > scores["psnr_raw"]
    assert scores["ssim"] > 0.99 > scores["ssim_raw"]
    assert scores["scale"] == pytest.approx(2.0, rel=5e-3)
    assert scores["coverage"] > 0.95
    known = read_truth(simulated)
    found = np.linalg.norm(scores["rotation"])
    vector = known.poses["coronal1"].to_vector()
    assert found == pytest.approx(np.rad2deg(np.linalg.norm(vector[:3])), abs=0.05)
    assert "tre" not in scores


def test_evaluate_reads_the_methods_own_poses(simulated, outputs, tmp_path, capsys):
    derivatives = outputs.parents[2]
    common = ["--dataset", str(simulated), "--derivatives", str(derivatives)]
    assert tools.evaluate_main([str(outputs), *common, "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["tre"]
    assert max(own.values()) < 1e-6
    other = outputs.with_name("sub-01_desc-srr_T1w.nii.gz")
    other.write_bytes(outputs.read_bytes())
    assert tools.evaluate_main([str(other), *common]) == 0
    text = capsys.readouterr().out
    assert "PSNR" in text
    assert "coronal1: 0.4" in text  # 0.6 mm of two stacks against the third, mean removed
    assert "axial1: 0.2" in text


def test_evaluate_with_images_and_a_mask(truth_file, tmp_path, capsys):
    volume, grid = head()
    noisy = volume + np.random.default_rng(0).normal(0, 10, volume.shape)
    image = write_image(tmp_path / "noisy.nii.gz", noisy, grid)
    mask = write_image(tmp_path / "mask.nii.gz", volume > 200, grid)
    arguments = [str(image), str(truth_file), "--mask", str(mask), "--json"]
    assert tools.evaluate_main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    peak = np.percentile(volume[volume > 200], 99.9)
    assert scores["psnr_raw"] == pytest.approx(20 * np.log10(peak / 10), abs=0.2)
    assert scores["psnr"] == pytest.approx(scores["psnr_raw"], abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{truth}"], ExitCode.USAGE, "required: bids_dir"),
        (["{tmp}/none.nii.gz", "{tmp}/d"], ExitCode.NO_INPUT, "no such file"),
        (["{bad}", "{tmp}/d"], ExitCode.BAD_DATA, "cannot be read as NIfTI"),
        (["{truth}", "{tmp}"], ExitCode.CANNOT_CREATE, "not empty"),
        (["{truth}", "{tmp}/d", "--gain", "2"], ExitCode.USAGE, "gain is 2.0"),
        (["{truth}", "{tmp}/d", "--profile", "sinc"], ExitCode.USAGE, "sinc"),
        (["{truth}", "{tmp}/d", "--subject", "sub-01"], ExitCode.USAGE, "without 'sub-'"),
        (["{truth}", "{bad}/d"], ExitCode.CANNOT_CREATE, "bad.nii.gz"),
    ],
)
def test_mistakes_with_simulate(arguments, code, message, truth_file, tmp_path, capsys):
    check_mistake(tools.simulate_main, arguments, code, message, (truth_file, tmp_path, capsys))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{even}", "{even}"], ExitCode.BAD_DATA, "no structure in the mask"),
        (["{truth}"], ExitCode.USAGE, "give a truth"),
        (["{truth}", "{truth}", "--derivatives", "{tmp}"], ExitCode.USAGE, "needs --dataset"),
        (["{truth}", "{tmp}/x.nii"], ExitCode.NO_INPUT, "no such file"),
        (["{truth}", "{bad}"], ExitCode.BAD_DATA, "cannot be read"),
        (["{truth}", "--dataset", "{tmp}"], ExitCode.USAGE, "has no 'sub-'"),
        (["{flat}", "{truth}"], ExitCode.BAD_DATA, "constant"),
    ],
)
def test_mistakes_with_evaluate(arguments, code, message, truth_file, tmp_path, capsys):
    check_mistake(tools.evaluate_main, arguments, code, message, (truth_file, tmp_path, capsys))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/m.safetensors", "{tmp}/o.nii"], ExitCode.NO_INPUT, "no such file"),
        (["{truth}", "{tmp}/o.mgz"], ExitCode.USAGE, "expected a name in .nii"),
        (["{truth}", "{tmp}/no/o.nii"], ExitCode.CANNOT_CREATE, "no such folder"),
        (["{truth}", "{tmp}/o.nii", "--resolution", "0"], ExitCode.USAGE, "expected 0.05 to 20"),
        (["{truth}", "{tmp}/o.nii", "--device", "tpu"], ExitCode.USAGE, "expected auto, cpu"),
    ],
)
def test_mistakes_with_sample(arguments, code, message, truth_file, tmp_path, capsys):
    check_mistake(tools.sample_main, arguments, code, message, (truth_file, tmp_path, capsys))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained field as the app writes it; (file, its grid)."""
    network = PaperNetwork((0.0, 0.0, 0.0), 30.0, {"width": 16, "fourier_features": 8})
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-20, -24, -16)
    grid = Grid((11, 13, 9), affine)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return save_model(path, network, grid, 250.0, {}), grid


def test_sample_on_a_finer_grid(model, tmp_path, capsys):
    path, grid = model
    out = tmp_path / "fine.nii.gz"
    assert tools.sample_main([str(path), str(out), "--resolution", "2"]) == 0
    assert "22 x 26 x 18 voxels" in capsys.readouterr().out
    data, fine = read_image(out)
    assert fine.voxel_size == pytest.approx(2)
    assert fine.centre == pytest.approx(grid.centre)
    points = torch.tensor(fine.to_world([[3, 4, 5], [20, 1, 9]]), dtype=torch.float32)
    with torch.no_grad():
        expected = 250 * load_model(path).field.eval()(points)
    assert data[[3, 20], [4, 1], [5, 9]] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-3)
    assert data.std() > 0


def test_sample_on_the_grid_of_an_image_or_its_own(model, truth_file, tmp_path, capsys):
    path, grid = model
    own, like = tmp_path / "own.nii", tmp_path / "like.nii.gz"
    assert tools.sample_main([str(path), str(own)]) == 0
    assert read_image(own)[1] == grid
    assert tools.sample_main([str(path), str(like), "--like", str(truth_file)]) == 0
    assert read_image(like)[1] == head()[1]
    assert tools.sample_main([str(truth_file), str(own)]) == ExitCode.BAD_DATA
    assert "irem-bids-sample: error" in capsys.readouterr().err


def check_mistake(program, arguments, code, message, places):
    """The program ends with ``code`` and one message."""
    truth_file, tmp_path, capsys = places
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"")
    flat = write_image(tmp_path / "flat.nii.gz", np.ones((40, 44, 36)), head()[1])
    away = np.indices((40, 44, 36)) - np.array([20, 22, 18]).reshape(3, 1, 1, 1)
    ball = 100.0 * (np.linalg.norm(away, axis=0) < 12)
    even = write_image(tmp_path / "even.nii.gz", ball, head()[1])
    names = {"truth": truth_file, "tmp": tmp_path, "bad": bad, "flat": flat, "even": even}
    assert program([a.format(**names) for a in arguments]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_dataset_without_this_scan_is_no_input(simulated, outputs, tmp_path, capsys):
    moved = tmp_path / "sub-77_desc-irem_T1w.nii.gz"
    moved.write_bytes(outputs.read_bytes())
    assert tools.evaluate_main([str(moved), "--dataset", str(simulated)]) == ExitCode.NO_INPUT
    assert "lacks this scan" in capsys.readouterr().err
    arguments = ["--dataset", str(simulated), "--derivatives", str(tmp_path)]
    assert tools.evaluate_main([str(outputs), *arguments]) == ExitCode.NO_INPUT
    assert "no transforms" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["simulate_main", "evaluate_main", "sample_main"])
def test_help_is_instant_and_loads_nothing_heavy(program):
    code = (
        "import sys, irem_bids.tools as t\n"
        f"try:\n    t.{program}(['--help'])\n"
        "finally:\n    heavy = {'torch', 'numpy', 'scipy', 'nipype'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: irem-bids-" in done.stdout
    assert "heavy: []" in done.stdout
