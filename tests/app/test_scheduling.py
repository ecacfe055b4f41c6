# SPDX-License-Identifier: Apache-2.0
"""GPUs are claimed through locks, one training on each, and none is idle while work waits.

No device is needed: a lock is on a name.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from nipype.interfaces.base import TraitedSpec, traits
from nipype.pipeline.engine import Node, Workflow

from irem_bids import resources
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.interfaces import Step, StepInput
from irem_bids.plugin import SturdyMultiProc
from irem_bids.resources import Resources, claimed_device
from irem_bids.settings import Run

CLAIMS = ("cuda:0@GPU-one", "cuda:1@MIG-two/3")
SUBJECTS = 6


def wait_for_company(folder: Path, label: str) -> None:
    """The first training waits for the second, so that a slow machine shows two at once, too."""
    (folder / f"{label}.begun").touch()
    end = time.monotonic() + 60
    while len(list(folder.glob("*.begun"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)


class _TurnInput(StepInput):
    before = traits.Int(0, usedefault=True)
    use_gpu = traits.Bool(False, usedefault=True)
    locks = traits.Str()
    seconds = traits.Float(0.0, usedefault=True)


class _TurnOutput(TraitedSpec):
    done = traits.Int()


class Turn(Step):
    """Preparation, or a training that holds a device for a while and says when."""

    input_spec = _TurnInput
    output_spec = _TurnOutput

    def _work(self, folder: Path) -> None:
        if self.inputs.use_gpu and self.inputs.locks:
            with claimed_device(CLAIMS, Path(self.inputs.locks)) as device:
                start = time.time()
                wait_for_company(Path(self.inputs.locks), self.inputs.label)
                time.sleep(self.inputs.seconds)
                turn = {"device": device, "start": start, "end": time.time()}
            path = Path(self.inputs.locks) / f"{self.inputs.label}.json"
            path.write_text(json.dumps(turn))
        self._results["done"] = self.inputs.before + 1


def cohort(folder: Path, threads: int, **training: Any) -> Workflow:
    """SUBJECTS chains of a preparation of ``threads`` processors, a training, a report."""
    wf = Workflow(name="wf", base_dir=str(folder))
    for number in range(SUBJECTS):
        label = f"sub-{number}"
        prepare = Node(Turn(label=label), name=f"prepare{number}", n_procs=threads, mem_gb=0.1)
        train = Node(Turn(label=label, use_gpu=True, **training), name=f"train{number}", mem_gb=0.1)
        report = Node(Turn(label=label), name=f"report{number}", mem_gb=0.1)
        train.n_procs = report.n_procs = 1
        wf.connect([
            (prepare, train, [("done", "before")]),
            (train, report, [("done", "before")]),
        ])  # fmt: skip
    wf.config["execution"] = {
        "crashdump_dir": str(folder / "crash"),
        "poll_sleep_duration": "0.05",
        "remove_unnecessary_outputs": "false",
    }
    return wf


def arguments(processors: int) -> dict[str, Any]:
    return {
        "n_procs": processors,
        "memory_gb": 8,
        "n_gpu_procs": 2,
        "raise_insufficient": True,
        "mp_context": "forkserver",
    }


@pytest.fixture
def quiet() -> None:
    logging.getLogger("nipype.workflow").setLevel(logging.CRITICAL)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("quiet")
def test_two_gpus_and_six_subjects(tmp_path: Path) -> None:
    wf = cohort(tmp_path, 1, locks=str(tmp_path), seconds=0.2)
    wf.run(plugin=SturdyMultiProc(plugin_args=arguments(4)))
    turns = [json.loads((tmp_path / f"sub-{n}.json").read_text()) for n in range(SUBJECTS)]
    order = sorted(turns, key=lambda turn: turn["start"])
    assert {turn["device"] for turn in turns} == {"cuda:0", "cuda:1"}
    for device in ("cuda:0", "cuda:1"):
        mine = [turn for turn in order if turn["device"] == device]
        assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(mine))
    at_once = [sum(t["start"] <= o["start"] < t["end"] for t in turns) for o in order]
    assert max(at_once) == 2  # side by side, and never three


class Clockwork(SturdyMultiProc):
    """The same scheduler with a clock of its own: steps end when their time has come."""

    def __init__(self, durations: dict[str, float], **keywords: Any) -> None:
        super().__init__(**keywords)
        self.durations, self.now = durations, 0.0
        self.ends: dict[int, tuple[float, dict]] = {}
        self.record: list[tuple[float, str]] = []
        self.idle: list[str] = []

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        self.record.append((self.now, node.name))
        result = {"result": node.run(), "traceback": None, "taskid": self._taskid}
        kind = node.name.rstrip("0123456789")
        self.ends[self._taskid] = (self.now + self.durations[kind], result)
        return self._taskid

    def _get_result(self, taskid: int) -> dict | None:
        end, result = self.ends[taskid]
        return result if end <= self.now else None

    def _clear_task(self, taskid: int) -> None:
        del self.ends[taskid]

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        super()._send_procs_to_workers(updatehash=updatehash, graph=graph)
        running = [self.procs[job] for _, job in self.pending_tasks]
        on_gpu = sum(node.is_gpu_node() for node in running)
        ready = (~self.proc_done) & (self.depidx.sum(axis=0) == 0).__array__()
        waiting = [self.procs[j].name for j in ready.nonzero()[1] if self.procs[j].is_gpu_node()]
        assert on_gpu <= 2
        if on_gpu < 2 and waiting:
            self.idle += waiting
        self.now = min((end for end, _ in self.ends.values() if end > self.now), default=self.now)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("processors", "threads"), [(4, 2), (4, 1), (3, 1), (8, 3), (5, 4)])
def test_no_gpu_is_idle_while_work_waits(tmp_path: Path, processors: int, threads: int) -> None:
    durations = {"prepare": 3.0, "train": 10.0, "report": 2.0}
    plugin = Clockwork(durations, plugin_args=arguments(processors))
    cohort(tmp_path, threads).run(plugin=plugin)
    assert sum(name.startswith("train") for _, name in plugin.record) == SUBJECTS
    if processors - threads >= 2:  # one processor for each GPU beside a preparation
        assert plugin.idle == []
        # The first preparation, three trainings on one of the GPUs, one report, and no more
        # than the time in which the second GPU waits for its first work.
        assert plugin.now <= 3 + 3 * 10 + 2 + 3
    begun = [name for _, name in plugin.record]
    last_prepared = max(i for i, name in enumerate(begun) if name.startswith("prepare"))
    first_trained = min(i for i, name in enumerate(begun) if name.startswith("train"))
    assert first_trained < last_prepared  # the next subjects are prepared meanwhile


def _hold(folder: str, ready: Any) -> None:
    with claimed_device(CLAIMS[:1], Path(folder)):
        ready.set()
        time.sleep(600)


@pytest.mark.timeout(120)
def test_a_killed_process_gives_its_gpu_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready), daemon=True)
    process.start()
    assert ready.wait(60)
    with claimed_device(CLAIMS, tmp_path) as device:
        assert device == "cuda:1"  # the other one is taken
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with claimed_device(CLAIMS[:1], tmp_path) as device:
        assert device == "cuda:0"
    assert len(list(tmp_path.glob("*-gpu-GPU-one.lock"))) == 1
    assert len(list(tmp_path.glob("*-gpu-MIG-two_3.lock"))) == 1


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, "1,0"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a", "SLURM_JOB_GPUS": "0,1"}, "MIG-a"),
        ({"SLURM_JOB_GPUS": "2"}, "2"),
        ({"SLURM_JOB_GPUS": "2,3", "SLURM_STEP_GPUS": "3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, variables: dict, visible: str) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resources.visible_gpus() == visible


@pytest.mark.parametrize(
    ("device", "most", "chosen"),
    [
        ("auto", None, ("cuda:0", "cuda:1", "cuda:2")),
        ("auto", 2, ("cuda:0", "cuda:1")),
        ("cuda", 1, ("cuda:0",)),
        ("cuda:2", 1, ("cuda:2",)),
        ("auto", 0, ("cpu",)),
        ("cpu", 2, ("cpu",)),
    ],
)
def test_number_of_gpus(device: str, most: int | None, chosen: tuple[str, ...]) -> None:
    assert resources.choose_devices(device, lambda: 3, most) == chosen


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(UserError, match="--gpus is 4, and torch sees 3") as caught:
        resources.choose_devices("auto", lambda: 3, 4)
    assert caught.value.code is ExitCode.TEMPORARY


def test_limits_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "gpu_names", lambda: ("GPU-a", "GPU-b"))
    limits = resources.resolve(Run(nprocs=6, mem="8G"))
    assert limits == Resources(6, 4, 8.0, ("cuda:0", "cuda:1"), ("GPU-a", "GPU-b"))
    assert limits.claims == ("cuda:0@GPU-a", "cuda:1@GPU-b")
    second = resources.resolve(Run(nprocs=1, mem="8G", device="cuda:1"))
    assert (second.threads, second.claims) == (1, ("cuda:1@GPU-b",))
    assert resources.resolve(Run(nprocs=6, mem="8G", gpus=0)).claims == ("cpu",)


def test_libraries_are_told_their_threads_before_numpy_is_there(tmp_path: Path) -> None:
    code = (
        "import os, sys; from irem_bids import cli; cli.main(sys.argv[1:]);"
        "print('numpy' in sys.modules, os.environ['OMP_NUM_THREADS'])"
    )
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    arguments_ = [str(tmp_path), str(tmp_path.parent / "out"), "participant", "--nprocs", "3"]
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "COV_CORE_SOURCE")}
    command = [sys.executable, "-c", code, *arguments_, "--device", "bad"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.split() == ["False", "3"]
    assert "--device is 'bad'" in done.stderr
