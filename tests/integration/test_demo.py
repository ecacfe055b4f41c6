# SPDX-License-Identifier: Apache-2.0
"""The demo at a quarter of its resolution: the real app on three simulated stacks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from irem_bids import demo
from irem_bids.reconstruction.evaluation import Scores


def test_the_template_is_a_brain_in_air():
    volume, grid = demo.template(4)
    assert grid.voxel_size == pytest.approx(4)
    assert min(grid.shape) > 30
    assert 800 < volume.max() <= 1000
    assert volume[0].max() == volume[:, 0].max() == volume[:, :, -1].max() == 0
    fine, fine_grid = demo.template(2)
    centres = [
        g.to_world(np.argwhere(v > 100).mean(axis=0))
        for v, g in ((volume, grid), (fine, fine_grid))
    ]
    assert np.linalg.norm(centres[0] - centres[1]) < 1.5


def test_the_verdict_asks_for_the_margins():
    base = Scores(30, 0.9, 0.9, 20, 0.8, (0, 0, 0), (0, 0, 0), 1, 0, 1, 1000)
    good = {
        "irem": (replace(base, psnr=33.4), 0.1),
        "srr": (replace(base, psnr=33.45), 0.1),
        "bspline": (base, 0.1),
    }
    assert demo.verdict(good) == []
    assert "33.40" in demo.table(good)
    bad = good | {"irem": (replace(base, psnr=32.9), 0.1)}
    assert [text.split(";")[0] for text in demo.verdict(bad)] == [
        "irem is 2.90 dB above bspline",
        "irem is 0.55 dB below srr",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.main([str(folder), "--stride", "4", "--threads", "1"])


def test_the_demo_ends_well_and_shows_its_table(run):
    folder, code = run
    assert code == 0
    results = demo.score(folder / "dataset", folder / "derivatives", 1)
    assert set(results) == {"irem", "srr", "bspline"}
    assert results["irem"][0].psnr > results["bspline"][0].psnr + 3
    assert results["irem"][1] < 1.0
    assert (folder / "derivatives" / "sub-01.html").stat().st_size > 10_000


def test_the_sidecar_says_what_became_of_the_network(run):
    folder, _ = run
    sidecar = folder / "derivatives/sub-01/anat/sub-01_desc-irem_T1w.json"
    assert json.loads(sidecar.read_text())["Network"] in {"reconciled", "as it stands", "not used"}
