# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, as clusters send it before they kill: save, leave with 75, go on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irem_bids import stop

from .test_end_to_end import QUICK, make_dataset
from .test_kill import IMAGE, content, saved_steps

#: Far more than the app takes for itself; machines that run tests may be loaded.
SOON = 40.0
REPOSITORY = Path(__file__).resolve().parents[2]


def start(folder: Path, output: str, *words: str, steps: int = 400) -> subprocess.Popen:
    """Start the app; a training of 100,000 steps saves itself often, a shorter one never."""
    text = QUICK.replace("steps = 20", f"steps = {steps}")
    text = text.replace("nprocs = 1\n", "")
    seconds = 100000.0 if steps < 100_000 else 0.2
    (folder / "slow.toml").write_text(text + f"checkpoint_seconds = {seconds}\n")
    command = [
        sys.executable, "-m", "irem_bids", str(folder / "bids"), str(folder / output),
        "participant", "--config-file", str(folder / "slow.toml"), "--method", "irem",
        "--work-dir", str(folder / f"work-{output}"), *words,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
        text=True,
    )


def wait_for_training(process: subprocess.Popen, work: Path) -> None:
    """Until a state is saved: the linear solution, which training comes after."""
    until = time.monotonic() + 300
    while not list((work / "checkpoints").glob("*/*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)


def members(group: int) -> list[int]:
    """Processes of a process group that are not dead."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(place.name)) == group:
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(place.name)] if state != "Z" else []
        except (OSError, ValueError):
            continue
    return found


def test_one_process_saves_and_goes_on_to_the_same_image(tmp_path: Path) -> None:
    make_dataset(tmp_path / "bids")
    words = ("--nprocs", "1")
    whole = start(tmp_path, "whole", *words)
    text, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, text

    work = tmp_path / "work-killed"
    first = start(tmp_path, "killed", *words)
    wait_for_training(first, work)
    began = time.monotonic()
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=SOON)
    assert first.returncode == 75, text
    took = time.monotonic() - began
    assert text.count("irem-bids: error: ") == 1
    assert "terminated (SIGTERM)" in text
    assert "Traceback" not in text
    if took < stop.GRACE:  # else a loaded machine did not come to it
        assert saved_steps(work, "irem") > 0  # though no checkpoint was due
    assert not (tmp_path / "killed" / IMAGE.format("irem")).exists()

    second = start(tmp_path, "killed", *words)
    text, _ = second.communicate(timeout=600)
    assert second.returncode == 0, text
    image = IMAGE.format("irem")
    assert content(tmp_path / "killed" / image) == content(tmp_path / "whole" / image)


@pytest.mark.parametrize("everybody", [False, True])
def test_workers_save_and_end(tmp_path: Path, everybody: bool) -> None:
    make_dataset(tmp_path / "bids", ("01", "02"))
    words = ("--nprocs", "2", "--omp-nthreads", "1")
    process = start(tmp_path, "out", *words, steps=100_000)
    wait_for_training(process, tmp_path / "work-out")
    until = time.monotonic() + 300
    while saved_steps(tmp_path / "work-out", "irem") == 0 and time.monotonic() < until:
        time.sleep(0.1)
    if everybody:  # scancel
        os.killpg(process.pid, signal.SIGTERM)
    else:  # kill, or a batch script that hands it on
        process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=SOON)
    assert process.returncode == 75, text
    assert saved_steps(tmp_path / "work-out", "irem") > 0
    until = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert members(process.pid) == []


def test_workers_do_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "bids", ("01", "02"))
    words = ("--nprocs", "2", "--omp-nthreads", "1")
    process = start(tmp_path, "out", *words, steps=100_000)
    wait_for_training(process, tmp_path / "work-out")
    assert len(members(process.pid)) > 2
    process.kill()  # this process alone
    process.communicate(timeout=SOON)
    until = time.monotonic() + SOON
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert members(process.pid) == []


def test_a_checkpoint_is_due_after_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    state = stop._State()
    monkeypatch.setattr(stop, "_STATE", state)
    seconds = stop.Seconds(60.0)
    due = [elapsed >= seconds for elapsed in (10.0, 60.0)]
    assert due == [False, True]
    stop.check()
    state.training = True
    stop._handle(signal.SIGTERM, None)
    stop.check()  # this step goes on to its checkpoint
    elapsed = 10.0
    assert elapsed >= seconds
    with pytest.raises(stop.Terminated):
        stop.check()
    monkeypatch.setattr(stop, "_STATE", stop._State())
    with pytest.raises(stop.Terminated):
        stop._handle(signal.SIGTERM, None)
