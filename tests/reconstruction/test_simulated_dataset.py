# SPDX-License-Identifier: Apache-2.0
"""A simulated dataset is valid BIDS and says all that is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.reconstruction.simulate import Protocol, acquire, simulate
from irem_bids.reconstruction.simulated_dataset import Scan, read_truth, write_dataset
from irem_bids.reconstruction.stack import read_stack
from tests.phantom import head

PROTOCOL = Protocol(
    orientations=("axial", "coronal", "coronal"),
    thickness=6.0,
    gap=0.6,
    in_plane=3.0,
    motion_degrees=3,
    motion_mm=2,
    snr=40,
    gain=0.05,
    seed=6,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("simulated") / "bids"
    truth = head()
    for scan in (Scan(), Scan("02", "1", "T2w")):
        write_dataset(root, simulate(*truth, PROTOCOL), truth, PROTOCOL, scan)
    return root


def validator_errors(folder: Path) -> list:
    program = Path(sys.executable).parent / "bids-validator-deno"
    done = subprocess.run(
        [program, folder, "--format", "json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [issue for issue in issues if issue["severity"] == "error"]


def test_the_raw_dataset_and_the_truth_are_valid(dataset):
    assert validator_errors(dataset) == []
    assert validator_errors(dataset / "derivatives" / "truth") == []


def test_files_and_sidecars_say_what_was_scanned(dataset):
    anat = dataset / "sub-01" / "anat"
    images = sorted(p.name for p in anat.glob("*.nii.gz"))
    assert images == [
        "sub-01_acq-axial_T1w.nii.gz",
        "sub-01_acq-coronal_run-1_T1w.nii.gz",
        "sub-01_acq-coronal_run-2_T1w.nii.gz",
    ]
    sidecar = json.loads((anat / "sub-01_acq-axial_T1w.json").read_text())
    assert sidecar["SliceThickness"] == 6.0
    assert sidecar["SpacingBetweenSlices"] == 6.6
    assert "MagneticFieldStrength" not in sidecar
    stack = read_stack(anat / images[1], label="coronal1")
    assert stack.plane == "coronal"
    assert stack.spacing == pytest.approx(6.6)
    assert (dataset / "participants.tsv").read_text() == "participant_id\nsub-01\nsub-02\n"
    assert len(list((dataset / "sub-02" / "ses-1" / "anat").glob("*_T2w.nii.gz"))) == 3


def test_the_truth_replays_the_stacks(dataset):
    known = read_truth(dataset, Scan("02", "1", "T2w"))
    assert known.protocol == PROTOCOL
    assert np.array_equal(known.volume, head()[0])
    assert 0.1 < known.mask.mean() < 0.6
    again = acquire(known.volume, known.grid, known.protocol, known.draws)
    path = dataset / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_acq-axial_T2w.nii.gz"
    assert np.allclose(read_stack(path, label="a").data, again[0].stack.data, atol=1e-2)


def test_transforms_are_read_by_sitk_and_map_truth_to_scanner(dataset):
    import SimpleITK as sitk

    pose = read_truth(dataset).poses["coronal2"]
    folder = dataset / "derivatives" / "truth" / "sub-01" / "anat"
    path = folder / "sub-01_from-coronal2_to-truth_mode-image_xfm.txt"
    transform = sitk.ReadTransform(str(path))
    point = np.array([10.0, -20.0, 30.0])
    moved = np.array(transform.TransformPoint((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
    assert np.allclose(moved, pose.inverse().apply(point), atol=1e-6)
    assert RigidTransform.from_itk_text(path.read_text()) == pose.inverse()
    assert not np.allclose(pose.matrix, np.eye(4))


def test_nothing_is_overwritten(dataset, tmp_path):
    truth = head()
    with pytest.raises(FileExistsError, match="already"):
        write_dataset(dataset, [], truth, PROTOCOL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_dataset(tmp_path, [], truth, PROTOCOL)
    with pytest.raises(FileNotFoundError, match="irem-bids-simulate"):
        read_truth(tmp_path)
