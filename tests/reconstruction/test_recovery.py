# SPDX-License-Identifier: Apache-2.0
"""Memory that ends, truly, and losses that are not finite, truly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from irem_bids.reconstruction import recovery
from irem_bids.reconstruction.optimise import Fit, fit
from irem_bids.reconstruction.paper2021 import fit_paper
from irem_bids.reconstruction.prepare import Prepared, output_grid, prepare
from irem_bids.reconstruction.recovery import Pieces, out_of_memory
from irem_bids.reconstruction.simulate import Protocol, simulate
from irem_bids.settings import Irem2021, Settings
from tests.phantom import head

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = Settings.from_dict(
    {
        "normalise": {"registration": False},
        "irem": {"steps": 40, "batch_size": 4, "refine_poses": False},
        "srr": {"srr_iterations": 4, "srr_reweightings": 1},
        "output": {"output_resolution": 4.0},
    }
)
PAPER = Irem2021(epochs_2021=1, batch_size_2021=3000, learning_rate_2021=1e-3)


def prepared_phantom() -> Prepared:
    stacks = simulate(*head((40, 44, 36), 2.0), Protocol(thickness=6.0, snr=60, seed=3, margin=6.0))
    return prepare([s.stack for s in stacks], SETTINGS)


def samples(count: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(1).uniform(-50, 50, (count, 3))
    return points, (np.sin(points / 9.0).sum(1) / 6 + 0.5).astype(np.float32)


def fitted(prepared: Prepared, learning_rate: float = 2e-3, **irem: Any) -> Fit:
    settings = replace(SETTINGS, irem=replace(SETTINGS.irem, learning_rate=learning_rate, **irem))
    return fit("irem", prepared, output_grid(prepared, settings.output), settings)


# ------------------------------------------------------------------------------ memory
LIMITED = """
import json, logging, resource, sys
import numpy as np, torch
from irem_bids.reconstruction.paper2021 import fit_paper
from irem_bids.reconstruction.prepare import output_grid
from irem_bids.reconstruction.sample import sample
from tests.reconstruction.test_recovery import PAPER, SETTINGS, fitted, prepared_phantom, samples

logging.basicConfig(format="%(message)s")
torch.set_num_threads(1)
stacks = prepared_phantom()
grid = output_grid(stacks, SETTINGS.output)

def everything():
    one, doubts = fitted(stacks, batch_size=16), []
    _, history = fit_paper(*samples(), PAPER, seed=0, doubts=doubts)
    return {"irem": one.history, "irem doubts": one.info["doubts"],
            "irem2021": history, "irem2021 doubts": doubts,
            "image": sample(one.field, grid.resampled(0.7), chunk=2**22).ravel()[::997].tolist()}

found = [everything()]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found.append(everything())
print(json.dumps(found))
"""


def test_memory_that_ends_halves_the_batch_and_the_result_stays() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "60"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    whole, limited = json.loads(done.stdout)
    for what in ("training: ", "sampling the field: "):
        assert f"{what}out of memory with" in done.stderr, done.stderr
    assert whole["irem doubts"] == whole["irem2021 doubts"] == []
    assert "training: memory ended" in limited["irem doubts"][0]
    assert "training: memory ended" in limited["irem2021 doubts"][0]
    for curve in ("loss", "held_out"):
        np.testing.assert_allclose(limited["irem"][curve], whole["irem"][curve], rtol=1e-3)
    # pieces are normalised by themselves: near, not equal
    np.testing.assert_allclose(limited["irem2021"]["loss"], whole["irem2021"]["loss"], rtol=0.1)
    np.testing.assert_allclose(limited["image"], whole["image"], atol=5e-3)  # of 1


def test_memory_that_ends_for_good_is_told() -> None:
    def greedy(most: int) -> torch.Tensor:
        return torch.empty(2**55)  # more than any machine has

    with pytest.raises(MemoryError, match=r"greed: out of memory with 50 points .* give more"):
        Pieces("greed").run(100, greedy)


def test_other_errors_are_no_matter_of_memory() -> None:
    pieces = Pieces("sum")
    with pytest.raises(RuntimeError, match="size of tensor"):
        pieces.run(100, lambda most: torch.ones(3) + torch.ones(most))
    assert pieces.count == 1
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("out of memory"))


@pytest.mark.gpu
def test_memory_of_a_gpu_that_ends(cuda: str) -> None:
    prepared = prepared_phantom()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(120 * 2**20 / total)
        settings = replace(SETTINGS, irem=replace(SETTINGS.irem, batch_size=200))
        grid = output_grid(prepared, settings.output)
        limited = fit("irem", prepared, grid, settings, device=cuda)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "training: memory ended" in limited.info["doubts"][0]


# ------------------------------------------------------------------- losses not finite
@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepared_phantom()


def test_a_diverging_field_steps_back_and_goes_on(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = fitted(prepared, 3e5, batch_size=2)
    assert "back to the last good state" in caplog.text
    (doubt,) = result.info["doubts"]
    assert "the training diverged and stepped back" in doubt
    assert torch.isfinite(torch.from_numpy(result.image())).all()
    assert np.isfinite(result.history["loss"]).all()
    steps = result.history["step"]
    assert steps == sorted(set(steps))  # what was stepped back over is not in the curve
    assert steps[-1] == result.info["steps"]


def test_a_field_that_diverges_at_any_rate_fails_with_the_cause(prepared: Prepared) -> None:
    with pytest.raises(FloatingPointError, match="the training diverges: the loss is nan"):
        fitted(prepared, 1e36, batch_size=2)


def test_stacks_that_are_not_finite_fail_before_training(prepared: Prepared) -> None:
    first = prepared.stacks[0]
    data = first.data.copy()
    data[tuple(np.argwhere(first.mask)[5])] = np.nan
    broken = replace(prepared, stacks=(first.with_data(data, first.mask), *prepared.stacks[1:]))
    with pytest.raises(FloatingPointError, match="not finite"):
        fitted(broken)


def test_without_held_out_voxels_training_counts(prepared: Prepared) -> None:
    none = replace(prepared, held_out=tuple(np.zeros_like(h) for h in prepared.held_out))
    result = fitted(none)
    assert any(p.abs().sum() > 0 for p in result.field.network[-1].parameters())  # type: ignore[union-attr, index]


def test_a_diverging_network_steps_back_then_fails(caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(PAPER, batch_size_2021=500, epochs_2021=2, width=16, fourier_features=16)
    doubts: list[str] = []
    bad = replace(settings, learning_rate_2021=1e37)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FloatingPointError, match=r"at epoch 1, also at 0\.001 of the learning"),
    ):
        fit_paper(*samples(1500), bad, seed=0, doubts=doubts)
    assert caplog.text.count("back to the last good state") == recovery.RETREATS


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    settings = replace(PAPER, batch_size_2021=500, epochs_2021=2, width=16, fourier_features=16)
    bad = replace(settings, learning_rate_2021=1e37)
    with pytest.raises(FloatingPointError):
        fit_paper(*samples(1500), bad, seed=0, checkpoint=tmp_path, checkpoint_seconds=0.0)
    for path in tmp_path.iterdir():
        state = load_file(path)
        assert all(torch.isfinite(v).all() for k, v in state.items() if k.startswith("network."))


def test_records_are_json(prepared: Prepared) -> None:
    assert json.dumps(fitted(prepared).record(), allow_nan=False)
