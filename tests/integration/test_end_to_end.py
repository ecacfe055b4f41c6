# SPDX-License-Identifier: Apache-2.0
"""The whole app on a tiny dataset through its command line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from irem_bids.settings import Settings

from ..stacks import write_description, write_stack

METHODS = ("irem", "srr", "bspline")
QUICK = """
[normalise]
registration_levels = 2
registration_starts = 1
[srr]
srr_iterations = 6
srr_reweightings = 2
[irem]
pose_rounds = 1
hidden = 8
layers = 3
steps = 20
batch_size = 2
[irem2021]
epochs_2021 = 1
width = 8
fourier_features = 16
[output]
output_resolution = 3.0
[run]
nprocs = 1
mem = "4G"
device = "cpu"
"""


def make_dataset(root: Path, subjects: tuple[str, ...] = ("01",), suffix: str = "T1w") -> Path:
    write_description(root)
    for subject in subjects:
        for label, plane in (("ax", "axial"), ("cor", "coronal"), ("sag", "sagittal")):
            write_stack(
                root / f"sub-{subject}" / "anat" / f"sub-{subject}_acq-{label}_{suffix}.nii.gz",
                plane,
                sidecar={"SliceThickness": 5.0},
            )
    return root


def app(folder: Path, *arguments: str, methods: tuple[str, ...] = METHODS) -> str:
    """Run the app on ``folder/bids`` and return its log; the exit code must be 0."""
    code, log = app_code(folder, *arguments, methods=methods)
    assert code == 0, log
    return log


def app_code(folder: Path, *arguments: str, methods: tuple[str, ...]) -> tuple[int, str]:
    config = folder / "quick.toml"
    config.write_text(QUICK)
    command = [
        sys.executable, "-m", "irem_bids", str(folder / "bids"), str(folder / "out"),
        "participant", "--config-file", str(config), "--method", *methods, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder / "nohome")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the app has run once."""
    folder = tmp_path_factory.mktemp("run")
    make_dataset(folder / "bids")
    log = app(folder, "--model-out", "--save-registered")
    (folder / "log.txt").write_text(log)
    return folder


def anat(folder: Path) -> Path:
    return folder / "out" / "sub-01" / "anat"


@pytest.mark.parametrize("method", METHODS)
def test_images_are_isotropic_and_finite(ran: Path, method: str) -> None:
    image = nib.load(anat(ran) / f"sub-01_desc-{method}_T1w.nii.gz")
    data = image.get_fdata()
    assert np.allclose(nib.affines.voxel_sizes(image.affine), 3.0, atol=1e-4)
    assert np.isfinite(data).all()
    mask = nib.load(anat(ran) / "sub-01_desc-head_mask.nii.gz")
    assert mask.shape == image.shape
    inside = mask.get_fdata() > 0
    assert 0.1 < inside.mean() < 0.9
    assert data[inside].mean() > 5 * abs(data[~inside].mean())
    # the phantom's intensities, which the reference stack has, reach about 850
    assert 200 < np.percentile(data[inside], 90) < 900


def test_images_match_the_phantom(ran: Path) -> None:
    from scipy.ndimage import map_coordinates

    from irem_bids.reconstruction.geometry import Grid

    from ..phantom import head

    truth, grid = head()
    for method in METHODS:
        image = nib.load(anat(ran) / f"sub-01_desc-{method}_T1w.nii.gz")
        indices = np.moveaxis(np.indices(image.shape), 0, -1)
        points = Grid(image.shape, image.affine).to_world(indices)
        expected = map_coordinates(truth, np.moveaxis(grid.to_index(points), -1, 0), order=1)
        assert np.corrcoef(expected.ravel(), image.get_fdata().ravel())[0, 1] > 0.93, method


def test_sidecars(ran: Path) -> None:
    for method in METHODS:
        sidecar = json.loads((anat(ran) / f"sub-01_desc-{method}_T1w.json").read_text())
        assert len(sidecar["Sources"]) == 3
        assert all(uri.startswith("bids:raw:sub-01/anat/") for uri in sidecar["Sources"])
        assert sidecar["Device"] == "cpu"
        assert sidecar["Seconds"]["optimise"] >= 0
        assert {stack["SliceThickness"] for stack in sidecar["Stacks"]} == {5.0}
        assert {stack["SliceThicknessSource"] for stack in sidecar["Stacks"]} == {"sidecar"}
        assert np.isfinite(sidecar["Metrics"]["held_out_psnr"])
        table = anat(ran) / f"sub-01_desc-{method}_qc.tsv"
        row = next(csv.DictReader(table.open(), delimiter="\t"))
        assert row["method"] == method


def test_page_figures_and_logs(ran: Path) -> None:
    out = ran / "out"
    page = (out / "sub-01.html").read_text()
    assert all(method in page for method in METHODS)
    assert list((out / "sub-01" / "figures").glob("*.png"))
    (saved,) = (out / "logs").glob("*_settings.toml")
    settings = Settings.from_dict(tomllib.loads(saved.read_text()))
    assert settings.output.method == METHODS
    assert settings.irem.hidden == 8
    assert "@wu2021irem" in (out / "logs" / "CITATION.md").read_text()
    assert not (ran / "nohome").exists()  # nothing was written into HOME


def test_validator_reports_no_error(ran: Path) -> None:
    tool = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [str(tool), str(ran / "out"), "--json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] == []


def test_model_is_saved_without_pickle(ran: Path) -> None:
    from safetensors import safe_open

    with safe_open(anat(ran) / "sub-01_desc-irem_model.safetensors", "pt") as model:
        assert list(model.keys())


def test_second_run_does_nothing_and_force_repeats(ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(ran, folder)
    images = sorted((folder / "out").glob("sub-01/anat/*_T1w.nii.gz"))
    before = {path.name: path.stat().st_mtime_ns for path in images}
    log = app(folder, "--model-out", "--save-registered")
    assert "skipped" in log
    assert {path.name: path.stat().st_mtime_ns for path in images} == before
    contents = {path.name: gzip.decompress(path.read_bytes()) for path in images}
    log = app(folder, "--force", methods=("srr",))
    assert "done" in log
    forced = folder / "out" / "sub-01" / "anat" / "sub-01_desc-srr_T1w.nii.gz"
    assert forced.stat().st_mtime_ns > before[forced.name]
    assert gzip.decompress(forced.read_bytes()) == contents[forced.name]


def test_reports_only_and_group_level(ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(ran, folder)
    page = folder / "out" / "sub-01.html"
    page.unlink()
    app(folder, "--reports-only", "--work-dir", str(ran / "irem-bids-work"))
    assert page.stat().st_size > 1000
    done = subprocess.run(
        [sys.executable, "-m", "irem_bids", str(folder / "bids"), str(folder / "out"), "group"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "out" / "group_T1w.tsv").open(), delimiter="\t"))
    assert [row["method"] for row in rows] == sorted(METHODS)


@pytest.mark.parametrize("processors", [1, 2])
def test_groups_are_finished_before_others_begin(tmp_path: Path, processors: int) -> None:
    """A long cohort shows results early, and a run that is stopped leaves whole ones."""
    make_dataset(tmp_path / "bids", ("01", "02", "03", "04"))
    log = app(
        tmp_path, "--nprocs", str(processors), "--omp-nthreads", "1", methods=("bspline",)
    )  # fmt: skip
    begun = [log.index(f"sub-0{n}_T1w: normalise") for n in (1, 2, 3, 4)]
    saved = [log.index(f"sub-0{n}_T1w: save") for n in (1, 2, 3, 4)]
    assert begun == sorted(begun)
    # two at a time: a third may begin while the first two wait for a poll between their steps
    assert min(saved) < begun[1 if processors == 1 else 3]


def test_one_failing_subject_stops_no_other(tmp_path: Path) -> None:
    """A subject whose intensities are negative fails; two processes do the others."""
    make_dataset(tmp_path / "bids", ("01", "02", "03"))
    for path in (tmp_path / "bids" / "sub-02" / "anat").glob("*.nii.gz"):
        image = nib.load(path)
        data = -1.0 - image.get_fdata(dtype=np.float32)
        nib.save(nib.Nifti1Image(data, image.affine), path)
    code, log = app_code(tmp_path, "--nprocs", "2", "--omp-nthreads", "1", methods=("bspline",))
    assert code == 1, log
    (table,) = (tmp_path / "out" / "logs").glob("*_groups.tsv")
    rows = {r["group"]: r for r in csv.DictReader(table.open(), delimiter="\t")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "sub-01_T1w": "done", "sub-02_T1w": "failed", "sub-03_T1w": "done",
    }  # fmt: skip
    assert rows["sub-02_T1w"]["cause"].startswith("normalise:")
    assert len(list((tmp_path / "out" / "logs").glob("*_crash-*.txt"))) == 1
    page = (tmp_path / "out" / "sub-02.html").read_text()
    assert "normalise" in page
    assert not (tmp_path / "out" / "sub-02" / "anat").exists()
    assert (tmp_path / "out" / "sub-03" / "anat" / "sub-03_desc-bspline_T1w.nii.gz").is_file()
