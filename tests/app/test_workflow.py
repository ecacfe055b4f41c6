# SPDX-License-Identifier: Apache-2.0
"""The graph builds without images, and its nodes ask for what they may have."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nipype.interfaces.base import TraitedSpec, traits
from nipype.pipeline.engine import Node, Workflow

from irem_bids import completion
from irem_bids.interfaces import Step, StepInput, failure_code
from irem_bids.plugin import SturdyMultiProc
from irem_bids.reconstruction.stack import ImageError
from irem_bids.resources import Meter, Resources
from irem_bids.settings import Settings
from irem_bids.workflow import Place, init_cohort_wf, init_group_wf, memory_gb, workflow_name

from . import report_material

CPU = Resources(nprocs=4, threads=2, memory_gb=6.0, devices=("cpu",))
GPUS = Resources(nprocs=4, threads=2, memory_gb=6.0, devices=("cuda:0", "cuda:1"))


def place(tmp_path: Path, resources: Resources = CPU) -> Place:
    return Place(
        tmp_path / "out", tmp_path / "work", tmp_path / "work/own", resources, {"run": "test"}
    )


def settings(*methods: str) -> Settings:
    return Settings.from_dict({"output": {"method": list(methods)}})


def edges(graph: Workflow) -> set[tuple[str, str]]:
    return {(a.name, b.name) for a, b in graph._graph.edges()}


def test_group_chain_is_the_figure(tmp_path: Path) -> None:
    wf = init_group_wf(
        group=report_material.group(), settings=settings("irem", "srr"), place=place(tmp_path)
    )
    assert wf.name == "sub_01_T1w_wf"
    assert edges(wf) == {
        ("normalise", "optimise_irem"),
        ("normalise", "optimise_srr"),
        ("normalise", "reconstruct_irem"),
        ("normalise", "reconstruct_srr"),
        ("optimise_irem", "reconstruct_irem"),
        ("optimise_srr", "reconstruct_srr"),
        ("reconstruct_irem", "folders"),
        ("reconstruct_srr", "folders"),
        ("reconstruct_irem", "keys"),
        ("reconstruct_srr", "keys"),
        ("normalise", "report"),
        ("folders", "report"),
        ("keys", "report"),
        ("report", "save"),
        ("normalise", "save"),
        ("folders", "save"),
        ("keys", "save"),
    }
    assert list(tmp_path.iterdir()) == []  # nothing was touched


def test_settings_reach_their_nodes_whole(tmp_path: Path) -> None:
    chosen = settings("irem").updated({"irem": {"hidden": 12}, "normalise": {"n4": True}})
    wf = init_group_wf(group=report_material.group(), settings=chosen, place=place(tmp_path))
    normalise, optimise = wf.get_node("normalise"), wf.get_node("optimise_irem")
    assert normalise.inputs.settings["normalise"]["n4"] is True
    assert optimise.inputs.settings["irem"]["hidden"] == 12
    assert set(optimise.inputs.settings["run"]) == {"random_seed", "deterministic"}
    assert Settings.from_dict(optimise.inputs.settings).irem == chosen.irem
    assert wf.get_node("save").inputs.settings == chosen.to_dict()


def test_cohort_has_a_chain_per_group(tmp_path: Path) -> None:
    first = report_material.group()
    other = replace(first, suffix="T2w", entities={"ce": "a"})
    groups = [first, replace(first, session="2"), other]
    wf = init_cohort_wf(groups=groups, settings=settings("bspline"), place=place(tmp_path))
    names = {name.split(".")[0] for name in wf.list_node_names()}
    assert names == {workflow_name(group) for group in groups}
    assert len(names) == 3


@pytest.mark.parametrize("resources", [CPU, GPUS])
def test_gpu_nodes_take_one_slot_each(tmp_path: Path, resources: Resources) -> None:
    wf = init_group_wf(
        group=report_material.group(), settings=settings("irem"), place=place(tmp_path, resources)
    )
    for name in ("optimise_irem", "reconstruct_irem"):
        node = wf.get_node(name)
        assert bool(node.is_gpu_node()) is resources.gpu
        assert node.n_procs == (1 if resources.gpu else 2)
    assert not wf.get_node("normalise").is_gpu_node()
    assert not wf.get_node("save").is_gpu_node()


def test_device_threads_and_checkpoints_do_not_rerun_a_node(tmp_path: Path) -> None:
    hashes = []
    for resources, folder in ((CPU, "a"), (replace(GPUS, threads=1), "b")):
        where = replace(place(tmp_path, resources), work_dir=tmp_path / folder)
        wf = init_group_wf(group=report_material.group(), settings=settings("irem"), place=where)
        node = wf.get_node("optimise_irem")
        node.inputs.prepared, node.inputs.prepared_key = str(tmp_path), "key"
        hashes.append(node.inputs.get_hashval(hash_method="content")[1])
    assert hashes[0] == hashes[1]
    node.inputs.prepared_key = "other"
    assert node.inputs.get_hashval(hash_method="content")[1] != hashes[0]


def test_keys_follow_content_settings_and_nothing_else(tmp_path: Path) -> None:
    first = report_material.group()
    files = []
    for number, stack in enumerate(first.stacks):
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(b"image %d" % number)
        files.append(replace(stack, path=str(path)))
    group = replace(first, stacks=tuple(files)).to_dict()
    sections = completion.normalise_settings(Settings())
    key = completion.inputs_key(group, sections)
    moved = tmp_path / "moved.nii.gz"
    moved.write_bytes(b"image 0")
    group["stacks"][0]["path"] = str(moved)
    assert completion.inputs_key(group, sections) == key
    moved.write_bytes(b"image X")
    assert completion.inputs_key(group, sections) != key

    def method_key(tables: dict) -> str:
        chosen = Settings.from_dict(tables)
        return completion.method_key(key, "srr", completion.method_settings(chosen, "srr"))

    plain = method_key({})
    assert method_key({"run": {"device": "cuda", "nprocs": 3, "force": True}}) == plain
    assert method_key({"output": {"method": ["srr", "irem"], "model_out": True}}) == plain
    assert method_key({"irem": {"hidden": 8}}) == plain
    assert method_key({"srr": {"srr_lambda": 0.5}}) != plain
    assert method_key({"run": {"random_seed": 1}}) != plain
    assert method_key({"output": {"output_resolution": 2.0}}) != plain
    profile = tmp_path / "profile.txt"
    measured = {"acquisition": {"profile_file": str(profile)}}
    keys = []
    for text in ("-1 0\n0 1\n1 0\n", "-2 0\n0 1\n2 0\n"):
        profile.write_text(text)
        chosen = completion.normalise_settings(Settings.from_dict(measured))
        keys += [method_key(measured), completion.inputs_key(group, chosen)]
    assert len(set(keys)) == 4


def test_memory_grows_with_the_result_and_ends_at_the_limit() -> None:
    group = report_material.group()
    coarse = Settings.from_dict({"output": {"output_resolution": 3.0}})
    fine = Settings.from_dict({"output": {"output_resolution": 0.5}})
    assert memory_gb(group, coarse, CPU) < memory_gb(group, fine, CPU) <= CPU.memory_gb
    assert memory_gb(group, fine, replace(CPU, memory_gb=0.5)) == 0.5


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImageError("bad"), 65),
        (MemoryError(), 75),
        (RuntimeError("CUDA out of memory. Tried to"), 75),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 75),
        (OSError(12, "Cannot allocate memory"), 75),
        (FloatingPointError("the training diverges"), 1),
        (OSError(28, "No space left on device"), 74),
        (KeyError("x"), 1),
    ],
)
def test_failure_codes(error: Exception, code: int) -> None:
    assert failure_code(error) == code


class _DeathInput(StepInput):
    kill = traits.Bool(mandatory=True)


class _DeathOutput(TraitedSpec):
    pid = traits.Int()


class Death(Step):
    """Ends its own process as the kernel does when memory ends, or says who it is."""

    input_spec = _DeathInput
    output_spec = _DeathOutput

    def _work(self, folder: Path) -> None:
        if self.inputs.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "alive.txt").write_text("yes")
        self._results["pid"] = os.getpid()


@pytest.mark.timeout(120)
def test_killed_worker_fails_its_step_and_others_go_on(tmp_path: Path) -> None:
    logging.getLogger("nipype.workflow").setLevel(logging.CRITICAL)
    wf = Workflow(name="wf", base_dir=str(tmp_path))
    first, second = Node(Death(kill=True), name="first"), Node(Death(kill=False), name="second")
    after = Node(Death(kill=False), name="after")
    wf.add_nodes([first, second])
    wf.connect([(second, after, [(("pid", _false), "kill")])])
    for node in (first, second, after):
        node.n_procs = 1
    wf.config["execution"] = {
        "crashdump_dir": str(tmp_path / "crash"),
        "crashfile_format": "txt",
        "stop_on_first_crash": "false",
        "remove_unnecessary_outputs": "false",
        "poll_sleep_duration": "0.1",
    }
    arguments = {"n_procs": 1, "memory_gb": 4, "n_gpu_procs": 0, "mp_context": "forkserver"}
    with pytest.raises(RuntimeError, match="killed"):
        wf.run(plugin=SturdyMultiProc(plugin_args=arguments))
    assert (tmp_path / "wf" / "second" / "alive.txt").is_file()
    assert (tmp_path / "wf" / "after" / "alive.txt").is_file()
    assert len(list((tmp_path / "crash").glob("crash-*first*.txt"))) == 1


def _false(_: int) -> bool:
    return False


def test_meter_tells_the_peak_of_its_own_step() -> None:
    first = Meter()
    array = np.ones(60_000_000)  # 0.48 GB
    del array
    before = first.read("big")
    assert before["seconds"]["big"] >= 0
    assert before["memory_gb"]["big"] > 0.48
    after = Meter().read("small")
    assert after["memory_gb"]["small"] < before["memory_gb"]["big"] - 0.4
