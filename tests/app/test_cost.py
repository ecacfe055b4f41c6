# SPDX-License-Identifier: Apache-2.0
"""The estimates of a dry run grow with what is asked for and respect what there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from irem_bids import cli, cost
from irem_bids.resources import Resources
from irem_bids.settings import Settings

from . import report_material

CPU = Resources(4, 2, 8.0, ("cpu",))
GPU = Resources(4, 3, 8.0, ("cuda:0",), ("GPU-a",))


def settings(*methods: str, **output: float) -> Settings:
    return Settings.from_dict({"output": {"method": list(methods), **output}})


def test_more_work_costs_more() -> None:
    group = report_material.group()
    plain = cost.estimate(group, settings("srr"), CPU)
    assert plain.seconds > 0 and plain.memory_gb > cost.BASE_GB and plain.gpu_gb == 0
    fine = cost.estimate(group, settings("srr", output_resolution=0.5), CPU)
    coarse = cost.estimate(group, settings("srr", output_resolution=2.0), CPU)
    assert fine.seconds > coarse.seconds and fine.memory_gb > coarse.memory_gb
    both = cost.estimate(group, settings("srr", "irem"), CPU)
    assert both.seconds > plain.seconds and both.memory_gb == plain.memory_gb
    network = cost.estimate(group, settings("irem2021"), CPU)
    assert network.seconds > both.seconds
    corrected = settings("srr").updated({"normalise": {"n4": True}})
    assert cost.estimate(group, corrected, CPU).seconds > plain.seconds
    more = replace(group, stacks=group.stacks + group.stacks)
    assert cost.estimate(more, settings("srr"), CPU).seconds > plain.seconds
    assert cost.estimate(group, settings("srr"), GPU).gpu_gb > cost.GPU_BASE_GB


def test_srr_costs_what_was_measured() -> None:
    """Within a factor of two of the largest head of benchmarks/results/scaling.json."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    row = json.loads((results / "scaling.json").read_text())["rows"][-1]
    once, each = cost.METHODS["srr"]
    found = once + each * row["result_voxels"] / 1e6
    assert row["cpu_s"] / 2 < found < row["cpu_s"] * 2


def test_a_head_of_one_millimetre_is_no_matter_of_hours_nor_of_much_memory() -> None:
    group = report_material.group()
    stack = replace(group.stacks[0], shape=(256, 256, 48), in_plane=(1.0, 1.0), spacing=4.0)
    head = replace(group, stacks=(stack,) * 3)
    found = cost.estimate(head, settings("irem", "srr", "bspline", output_resolution=1.0), CPU)
    assert 120 < found.seconds < 600
    assert 2.0 < found.memory_gb < 4.0


@pytest.mark.parametrize(
    ("limits", "costs", "width"),
    [
        (CPU, [cost.Cost(10, 1, 0)] * 6, 2),
        (CPU, [cost.Cost(10, 5, 0)] * 6, 1),
        (CPU, [cost.Cost(10, 50, 0)] * 6, 1),
        (CPU, [cost.Cost(10, 1, 0)], 1),
        (replace(GPU, devices=("cuda:0", "cuda:1")), [cost.Cost(10, 1, 2)] * 6, 2),
    ],
)
def test_groups_at_a_time(limits: Resources, costs: list[cost.Cost], width: int) -> None:
    assert cost.side_by_side(costs, limits) == width
    text = cost.summary(costs, limits)
    assert f"{width} at a time" in text
    assert f"in all: {round(10 * len(costs) / width)} s" in text.replace("1:00 min", "60 s")
    assert ("warning" in text) == (costs[0].memory_gb > limits.memory_gb)
    assert ("of a GPU" in text) == bool(costs[0].gpu_gb)


def test_nothing_costs_nothing() -> None:
    assert cost.summary([], CPU) == ""


def test_a_dry_run_shows_the_estimates(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = str(tmp_path / "out"), str(tmp_path / "work")
    flags = ["--dry-run", "--device", "cpu", "-w", work, "--nprocs", "3", "--omp-nthreads", "1"]
    assert cli.main([str(tiny_dataset), out, "participant", *flags]) == 0
    text = capsys.readouterr().out
    assert "  estimate: " in text
    assert "estimate in all: " in text and "with 3 processors, 1 at a time" in text
    assert not Path(out).exists() and not Path(work).exists()
