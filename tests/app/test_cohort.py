# SPDX-License-Identifier: Apache-2.0
"""Which groups need work, how a run ends, and the table over all participants."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from irem_bids import cohort, completion, engine, pages, paths, resources
from irem_bids.atomic import write_json, write_text
from irem_bids.bids import Discovery, discover
from irem_bids.cohort import Outcome
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.products import Result
from irem_bids.resources import Resources
from irem_bids.settings import Run, Settings
from irem_bids.tables import quality_row

from . import report_material

SETTINGS = Settings.from_dict({"output": {"method": ["srr"]}})


def finish(output: Path, group: object, settings: Settings) -> None:
    """Write what a finished group leaves, as far as the check looks."""
    inputs = completion.inputs_key(group.to_dict(), completion.normalise_settings(settings))
    for method in settings.output.method:
        key = completion.method_key(inputs, method, completion.method_settings(settings, method))
        image = output / paths.image_path(group, method)
        write_text(image, "image")
        write_json(output / paths.sidecar_path(group, method), {"IremBids": {"Key": key}})
    write_text(paths.page_path(group, output), "page")


def test_finished_group_is_recognised(tiny_dataset: Path, tmp_path: Path) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    assert not cohort.is_finished(group, tmp_path, SETTINGS)
    finish(tmp_path, group, SETTINGS)
    assert cohort.is_finished(group, tmp_path, SETTINGS)
    elsewhere = SETTINGS.updated({"run": {"device": "cpu", "nprocs": 1}})
    assert cohort.is_finished(group, tmp_path, elsewhere)


@pytest.mark.parametrize(
    "change",
    [
        {"srr": {"srr_lambda": 0.5}},
        {"normalise": {"n4": True}},
        {"run": {"random_seed": 7}},
        {"output": {"method": ["srr", "bspline"]}},
        {"output": {"model_out": True}},
        {"output": {"save_registered": True}},
    ],
)
def test_changed_settings_need_work(tiny_dataset: Path, tmp_path: Path, change: dict) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    finish(tmp_path, group, SETTINGS)
    assert not cohort.is_finished(group, tmp_path, SETTINGS.updated(change))


@pytest.mark.parametrize("lost", ["image", "sidecar", "page", "input"])
def test_lost_or_changed_files_need_work(tiny_dataset: Path, tmp_path: Path, lost: str) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    finish(tmp_path, group, SETTINGS)
    if lost == "input":
        path = Path(group.stacks[0].path)
        path.write_bytes(path.read_bytes() + b" ")
    else:
        kept = {
            "image": tmp_path / paths.image_path(group, "srr"),
            "sidecar": tmp_path / paths.sidecar_path(group, "srr"),
            "page": paths.page_path(group, tmp_path),
        }
        kept[lost].unlink()
    assert not cohort.is_finished(group, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([Outcome("a", "done"), Outcome("b", "skipped")], 0),
        ([Outcome("a", "failed", "x", 65), Outcome("b", "failed", "y", 65)], 65),
        ([Outcome("a", "failed", "x", 65), Outcome("b", "failed", "y", 75)], 1),
        ([Outcome("a", "failed", "x", 65), Outcome("b", "done")], 1),
    ],
)
def test_exit_code_and_table(tmp_path: Path, outcomes: list[Outcome], code: int) -> None:
    run = cohort.open_run(tmp_path, tmp_path / "out", SETTINGS)
    assert cohort.close_run(outcomes, run) == code
    (table,) = run.logs.glob("*_groups.tsv")
    rows = list(csv.DictReader(table.open(), delimiter="\t"))
    assert [row["status"] for row in rows] == [outcome.status for outcome in outcomes]
    assert (run.logs / "CITATION.md").stat().st_size > 200


def test_folder_that_cannot_be_made_is_73(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder") as caught:
        cohort.open_run(tmp_path, tmp_path / "file" / "out", SETTINGS)
    assert caught.value.code is ExitCode.CANNOT_CREATE
    inside = SETTINGS.updated({"run": {"work_dir": str(tmp_path / "file" / "work")}})
    with pytest.raises(UserError, match="--work-dir"):
        cohort.open_run(tmp_path, tmp_path / "out", inside)


def test_one_process_where_nothing_runs_side_by_side(tmp_path: Path) -> None:
    small = Resources(2, 2, 4.0, ("cpu",))
    large = Resources(16, 8, 64.0, ("cuda:0", "cuda:1"))
    assert engine.choose_plugin(5, SETTINGS, small) == ("Linear", {})
    assert engine.choose_plugin(1, SETTINGS, large) == ("Linear", {})
    name, arguments = engine.choose_plugin(5, SETTINGS, large)
    assert name == "MultiProc"
    assert arguments["n_gpu_procs"] == 2
    assert arguments["n_procs"] == 16
    assert arguments["mp_context"] == "forkserver"


def test_plugin_file(tmp_path: Path) -> None:
    path = tmp_path / "plugin.yml"
    path.write_text("plugin: SLURM\nplugin_args: {template: a.sh}\n")
    settings = SETTINGS.updated({"run": {"use_plugin": str(path)}})
    resources = Resources(2, 2, 4.0, ("cpu",))
    assert engine.choose_plugin(1, settings, resources) == ("SLURM", {"template": "a.sh"})
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="expected a line 'plugin: NAME'") as caught:
        engine.read_plugin(str(path))
    assert caught.value.code is ExitCode.USAGE
    path.write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        engine.read_plugin(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        engine.read_plugin(str(tmp_path / "none.yml"))


def test_reports_only_needs_the_work_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    discovery = discover(tiny_dataset, SETTINGS)
    code = cohort.run_cohort(discovery, tiny_dataset, tmp_path / "out", SETTINGS, reports_only=True)
    assert code == ExitCode.NO_INPUT
    (table,) = (tmp_path / "out" / "logs").glob("*_groups.tsv")
    assert "nothing of it in the work folder" in table.read_text()


def test_a_page_shows_nothing_of_another_dataset(tiny_dataset: Path, tmp_path: Path) -> None:
    """One work folder may have served many; in a container all have the same paths."""
    (group,) = discover(tiny_dataset, SETTINGS).groups
    out, reports = tmp_path / "out", tmp_path / "reports"
    finish(out, group, SETTINGS)
    key = paths.completed_key(out, group, "srr")

    def record(name: str, path: str, key: str | None, errors: tuple[str, ...] = ()) -> None:
        stacks = tuple(replace(stack, path=path or stack.path) for stack in group.stacks)
        result = Result(
            group=replace(group, entities={"ce": name}, stacks=stacks),
            prepared=tmp_path, methods={}, settings=SETTINGS, provenance={},
            keys={} if key is None else {"srr": key},
        )  # fmt: skip
        pages.remember(result, reports, [{"step": step} for step in errors])

    finish(out, replace(group, entities={"ce": "own"}), SETTINGS)
    own = paths.completed_key(out, replace(group, entities={"ce": "own"}), "srr")
    finish(out, replace(group, entities={"ce": "old"}), SETTINGS)
    record("own", "", own)
    record("old", "", "f" * 64)  # another run's, with other settings
    record("gone", str(tmp_path / "sub-01_T2w.nii.gz"), key)  # another dataset's
    record("new", "", "e" * 64)  # about to be saved
    record("failed", "", None, ("normalise",))
    found = {path.name for path in pages.records_of(group, reports, out)}
    assert found == {f"sub-01_ce-{name}_T1w.json" for name in ("own", "new", "failed")}


def test_an_output_has_its_own_work_folder_wherever_it_is(tmp_path: Path) -> None:
    first, second = (
        cohort.open_run(tmp_path, tmp_path / name, SETTINGS.updated(
            {"run": {"work_dir": str(tmp_path / "work")}})) for name in ("a", "b")
    )  # fmt: skip
    for run in (first, second):
        run.logs.mkdir(exist_ok=True)
    own = cohort.own_folder(first)
    assert own.parent == tmp_path / "work" and own == cohort.own_folder(first)
    assert own != cohort.own_folder(second)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert cohort.own_folder(replace(first, output_dir=tmp_path / "moved")) == own


def test_nothing_to_do_is_success(tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    discovery = discover(tiny_dataset, SETTINGS)
    finish(out, discovery.groups[0], SETTINGS)
    assert cohort.run_cohort(discovery, tiny_dataset, out, SETTINGS) == 0
    (table,) = (out / "logs").glob("*_groups.tsv")
    assert "skipped" in table.read_text()
    assert cohort.run_cohort(Discovery(()), tiny_dataset, out, SETTINGS) == 0


def quality(output: Path, subject: str, suffix: str, psnr: float) -> None:
    group = replace(report_material.group(), subject=subject, suffix=suffix)
    entities = {"suffix": "qc", "desc": "irem", "extension": ".json"}
    row = quality_row(group, "irem", {})
    metrics = {"held_out_psnr": psnr, "self_consistency": {"axial1": 0.9}, "curve": [1, 2]}
    write_json(
        output / paths.relative_path(group, **entities),
        {**row, "entities": {}, "metrics": metrics},
    )


def test_group_table(tmp_path: Path) -> None:
    quality(tmp_path, "01", "T1w", 30.25)
    quality(tmp_path, "02", "T1w", 31.5)
    quality(tmp_path, "02", "T2w", 29.0)
    write_text(tmp_path / "sub-03/anat/sub-03_desc-irem_qc.json", "{}")
    assert cohort.run_group(tmp_path, SETTINGS) == ExitCode.SUCCESS
    rows = list(csv.DictReader((tmp_path / "group_T1w.tsv").open(), delimiter="\t"))
    assert [(r["participant_id"], r["held_out_psnr"]) for r in rows] == [
        ("sub-01", "30.25"),
        ("sub-02", "31.5"),
    ]
    described = json.loads((tmp_path / "group_T1w.json").read_text())
    assert list(described) == list(rows[0])
    assert described["held_out_psnr"]["Units"] == "dB"
    assert "Units" not in described["participant_id"]
    assert described["self_consistency_axial1"]["Description"].endswith("axial1")
    assert (tmp_path / "group_T2w.tsv").read_text().count("\n") == 2
    assert "All participants, T1w" in (tmp_path / "group_T1w.html").read_text()


def test_group_level_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="participant") as caught:
        cohort.run_group(tmp_path, SETTINGS)
    assert caught.value.code is ExitCode.NO_INPUT


def test_devices() -> None:
    two = lambda: 2  # noqa: E731
    none = lambda: 0  # noqa: E731
    assert resources.choose_devices("auto", two) == ("cuda:0", "cuda:1")
    assert resources.choose_devices("cuda", two) == ("cuda:0", "cuda:1")
    assert resources.choose_devices("cuda:1", two) == ("cuda:1",)
    assert resources.choose_devices("auto", none) == ("cpu",)
    assert resources.choose_devices("cpu", two) == ("cpu",)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="--device cpu") as caught:
            resources.choose_devices(device, none)
        assert caught.value.code is ExitCode.TEMPORARY
    with pytest.raises(UserError, match="expected auto") as caught:
        resources.choose_devices("gpu", two)
    assert caught.value.code is ExitCode.USAGE


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resources.count_gpus() == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("16G", 16.0), ("16GB", 16.0), ("16000M", 16.0), ("8", 8.0), ("1GiB", 2**30 / 1e9)],
)
def test_memory_sizes(text: str, size: float) -> None:
    assert resources.parse_memory(text) == pytest.approx(size)


def test_memory_size_that_is_none() -> None:
    with pytest.raises(UserError, match="expected a size") as caught:
        resources.parse_memory("lots")
    assert caught.value.code is ExitCode.USAGE


def test_slurm_limits_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert resources.available_cpus() == 1
    assert resources.available_memory_gb() <= 512 * 2**20 / 1e9
    limits = resources.resolve(Run(device="cpu"))
    assert (limits.nprocs, limits.threads) == (1, 1)
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "256")
    assert resources.available_memory_gb() <= 256 * 2**20 / 1e9


def test_settings_of_a_run_win() -> None:
    limits = resources.resolve(Run(device="cpu", nprocs=12, omp_nthreads=3, mem="7GB"))
    assert limits == Resources(12, 3, 7.0, ("cpu",))
    assert resources.resolve(Run(device="cpu", nprocs=20)).threads == 8


def test_one_training_per_gpu(tmp_path: Path) -> None:
    devices = ("cuda:0", "cuda:1")
    with resources.claimed_device(devices, tmp_path) as first:
        with resources.claimed_device(devices, tmp_path) as second:
            assert {first, second} == set(devices)
        with resources.claimed_device(devices, tmp_path) as again:
            assert again == second
    cpu = ("cpu",)
    with (
        resources.claimed_device(cpu, tmp_path) as one,
        resources.claimed_device(cpu, tmp_path) as other,
    ):
        assert one == other == "cpu"
