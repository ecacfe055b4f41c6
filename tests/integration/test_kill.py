# SPDX-License-Identifier: Apache-2.0
"""Killed in the middle of training and started again: the same image, bit for bit."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest

from irem_bids.reconstruction.checkpoint import load_state

from .test_end_to_end import QUICK, make_dataset

STATES = {"irem": "training.safetensors", "irem2021": "irem2021.safetensors"}
IMAGE = "sub-01/anat/sub-01_desc-{}_T1w.nii.gz"


def start(folder: Path, output: str, method: str) -> subprocess.Popen:
    """Start the app in its own process group."""
    config = folder / "slow.toml"
    slow = QUICK.replace("steps = 20", "steps = 300")
    slow = slow.replace("epochs_2021 = 1\n", "epochs_2021 = 25\nbatch_size_2021 = 400\n")
    config.write_text(slow + "checkpoint_seconds = 0.2\n")  # in [run], the last table
    command = [
        sys.executable, "-m", "irem_bids", str(folder / "bids"), str(folder / output),
        "participant", "--config-file", str(config), "--method", method,
        "--work-dir", str(folder / f"work-{output}"),
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
    )


def watch(process: subprocess.Popen, output: Path, stop: Callable[[], bool]) -> list[str]:
    """Look at every visible file as it appears; returns what was wrong with any."""
    seen: set[tuple[Path, int]] = set()
    wrong = []
    while process.poll() is None and not stop():
        for path in visible(output):
            try:
                stat = path.stat()
                if not path.is_file() or (path, stat.st_ino) in seen:
                    continue
                fault = fault_of(path)
            except FileNotFoundError:
                continue
            seen.add((path, stat.st_ino))
            if fault:
                wrong.append(f"{path.name}: {fault}")
        time.sleep(0.01)
    return wrong


def visible(output: Path) -> list[Path]:
    """Files that no hidden name or folder holds; folders may vanish while this looks."""
    found = []
    for folder, inner, names in os.walk(output):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return found


ENDS = {".html": b"</html>", ".png": b"IEND\xaeB`\x82", ".svg": b"</svg>"}


def fault_of(path: Path) -> str | None:
    """What a reader of this file would stumble over."""
    data = path.read_bytes()
    if ENDS.get(path.suffix, b"") not in data[-200:]:
        return "has no end"
    try:
        if path.name.endswith(".nii.gz"):
            nib.Nifti1Image.from_bytes(gzip.decompress(data)).get_fdata()
        elif path.suffix == ".json":
            json.loads(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if data else "is empty"


def saved_steps(work: Path, method: str) -> int:
    """Steps of training in the checkpoint, 0 where there is none."""
    found = load_state(next((work / "checkpoints").glob(f"*/{STATES[method]}"), work / "none"))
    return 0 if found is None else int(found[1]["step" if method == "irem" else "steps"])


def history(work: Path, method: str) -> dict[str, list[float]]:
    """The curves of the training, with every digit."""
    steps = f"*/irem_bids_wf/sub_01_T1w_wf/optimise_{method}/model/fit.json"
    (fit,) = work.glob(steps)
    return json.loads(fit.read_text())["history"]


def finish(process: subprocess.Popen) -> None:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text


def content(path: Path) -> str:
    return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()


@pytest.mark.parametrize("method", ["irem", "irem2021"])
def test_killed_in_training_and_started_again(tmp_path: Path, method: str) -> None:
    make_dataset(tmp_path / "bids")
    whole = start(tmp_path, "whole", method)
    finish(whole)

    first = start(tmp_path, "killed", method)
    work, output = tmp_path / "work-killed", tmp_path / "killed"
    wrong = watch(first, output, lambda: saved_steps(work, method) > 0)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "it ended before it left a checkpoint"
    assert not (output / IMAGE.format(method)).exists()
    whole_history = history(tmp_path / "work-whole", method)
    assert 0 < saved_steps(work, method) < max(whole_history["step"])

    second = start(tmp_path, "killed", method)
    wrong += watch(second, output, lambda: False)
    finish(second)
    assert wrong == []
    assert content(output / IMAGE.format(method)) == content(
        tmp_path / "whole" / IMAGE.format(method)
    )
    assert history(work, method) == whole_history
    assert not [p for p in output.rglob(".irem-bids-*") if p.is_dir()]
    assert saved_steps(work, method) == 0  # nothing is left behind
