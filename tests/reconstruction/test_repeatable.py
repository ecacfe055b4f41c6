# SPDX-License-Identifier: Apache-2.0
"""The same bits on one machine; on another one, a difference that is bounded here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from irem_bids.reconstruction import fields
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.repeatable import repeatable, small_matrices
from irem_bids.reconstruction.simulate import Protocol, simulate
from irem_bids.settings import Settings
from tests.phantom import head

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = Settings.from_dict(
    {
        "normalise": {"registration_starts": 1},
        "irem": {"steps": 12, "batch_size": 2, "hidden": 8},
        "output": {"output_resolution": 4.0},
    }
)
#: Of the images of one dataset on two machines, in units of the head's brightest percentile:
#: root mean square and largest.  Measured: 1e-6 and 1.2e-5.
BOUND = (2e-5, 5e-4)
SAVE = "import sys; from tests.reconstruction.test_repeatable import *; save(sys.argv[1])"


def reconstructed(device: str = "cpu", *, deterministic: bool = False) -> dict[str, np.ndarray]:
    """Images of a phantom that moved, from the stacks on."""
    protocol = Protocol(thickness=6.0, motion_degrees=3, motion_mm=2, snr=60, seed=3, margin=6.0)
    stacks = [s.stack for s in simulate(*head((40, 44, 36), 2.0), protocol)]
    run = replace(SETTINGS.run, deterministic=deterministic)
    settings = replace(SETTINGS, run=run)
    prepared = prepare(stacks, settings, threads=torch.get_num_threads())
    grid = output_grid(prepared, settings.output)
    return {
        method: fit(method, prepared, grid, settings, device=device).image()
        for method in ("srr", "irem")
    }


def save(path: str) -> None:
    """Called on the other machine."""
    np.savez(path, **reconstructed())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def here() -> dict[str, np.ndarray]:
    return reconstructed()


def test_the_same_bits_again_and_with_the_flag(here: dict[str, np.ndarray]) -> None:
    again = reconstructed(deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    for method, image in here.items():
        assert image.std() > 0.1
        assert image.tobytes() == again[method].tobytes(), method


def test_another_machine_s_image_is_near(tmp_path: Path, here: dict[str, np.ndarray]) -> None:
    # another processor: no vector instructions of this one, another number of threads
    other = {"ATEN_CPU_CAPABILITY": "default", "NUMBA_CPU_NAME": "generic", "OMP_NUM_THREADS": "2",
             "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Prescott",
             "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path / "there.npz")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **other},
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "there.npz") as there:
        for method, image in here.items():
            assert there[method].shape == image.shape
            away = np.abs(there[method] - image)
            found = float(np.sqrt(np.mean(away**2))), float(away.max())
            assert found[0] < BOUND[0] and found[1] < BOUND[1], (method, found)


def test_look_up_corner_by_corner_is_the_same() -> None:
    random = torch.Generator().manual_seed(0)
    unit = 2.4 * torch.rand(500, 3, generator=random) - 1.2  # some outside
    table = torch.rand(1, 3, 5, 6, 7, generator=random, requires_grad=True)
    weights = torch.rand(500, 3, generator=random)
    found = []
    for look_up in (fields._look_up, fields.gathered_look_up):
        table.grad = None
        values = look_up(table, unit)
        (values * weights).sum().backward()
        assert table.grad is not None
        found.append((values.detach(), table.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu(cuda: str) -> None:
    first, second = (reconstructed(cuda, deterministic=True) for _ in range(2))
    for method, image in first.items():
        assert image.tobytes() == second[method].tobytes(), method


def test_the_flag_is_put_back() -> None:
    with repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fit_has_one_thread_of_blas() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def most() -> int:
        found = threadpoolctl.threadpool_info()
        return max(each["num_threads"] for each in found if each["user_api"] == "blas")

    before = most()
    with small_matrices():
        assert most() == 1
    assert most() == before
