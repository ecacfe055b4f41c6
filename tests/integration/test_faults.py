# SPDX-License-Identifier: Apache-2.0
"""Short runs of the campaigns of faults in ``benchmarks/``; each of those has the full size."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from irem_bids import claims, cohort, completion
from irem_bids.atomic import write_text
from irem_bids.bids import discover
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.interfaces import Normalise
from irem_bids.reconstruction.stack import read_image, write_image
from irem_bids.settings import Settings
from irem_bids.space import check_space, is_storage, needed

from ..app.test_cohort import SETTINGS, finish
from . import cohorts


def campaign(folder: Path, name: str, *words: str) -> dict[str, Any]:
    """Run a campaign; its record, in which nothing may be wrong."""
    script = cohorts.REPOSITORY / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "result.json"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    record = json.loads((folder / "result.json").read_text())
    assert record["faults"] == []
    return record


def test_broken_subjects_are_named_and_stop_no_other(tmp_path: Path) -> None:
    record = campaign(tmp_path, "broken_cohort", "--subjects", "14", "--broken", "12")
    assert (record["results"], record["causes_named"], record["exit_code"]) == (2, 12, 1)


def test_several_processes_share_one_output(tmp_path: Path) -> None:
    record = campaign(tmp_path, "many_processes", "--processes", "3", "--subjects", "2")
    assert record["tables"] == 3


def test_killed_and_started_again_until_done(tmp_path: Path) -> None:
    record = campaign(tmp_path, "kill_cohort", "--kills", "2", "--subjects", "1")
    assert (record["kills"], record["images"]) == (2, 3)  # two methods, one deviation
    assert record["files_watched"] > 10


def test_a_disk_that_is_full_and_one_that_fills(tmp_path: Path) -> None:
    record = campaign(tmp_path, "disk_full", "--levels", "2", "--subjects", "1")
    assert record["codes"][0] == 73
    assert set(record["codes"]) <= {0, 73, 74}
    assert all(row["rerun"] == 0 for row in record["levels"])


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs on a new folder; the test is skipped where nothing can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_mount_is_73(tiny_dataset: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "readonly", "ro,size=1m") as out:
        words = [
            str(tiny_dataset),
            str(out / "o"),
            "participant",
            "--work-dir",
            str(tmp_path / "w"),
        ]
        code, log = cohorts.run([sys.executable, "-m", "irem_bids", *words], tmp_path)
        inside, text = cohorts.run([sys.executable, "-m", "irem_bids", *words[:1], str(out),
                                    *words[2:]], tmp_path)  # fmt: skip
    for found, said in ((code, log), (inside, text)):
        assert found == 73, said
        assert said.count("irem-bids: error: ") == 1
        assert "Traceback" not in said


def test_a_limit_of_the_size_of_files_is_74_as_a_quota_is(tmp_path: Path) -> None:
    cohorts.tiny_cohort(tmp_path / "bids", 1)
    # coverage would fail to write its own file, which is larger
    script = "unset COVERAGE_PROCESS_START COVERAGE_PROCESS_CONFIG; "
    script += f'ulimit -f {20_000 // 512}; exec "$@"'
    code, log = cohorts.run(["sh", "-c", script, "sh", *cohorts.command(tmp_path, "out")], tmp_path)
    assert code == 74, log
    assert "File too large" in log
    assert "a quota, or a limit on the size of files, may be smaller" in log
    assert "Traceback" not in log


def test_a_mount_that_is_lost_under_a_run_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "mounted", "size=1m") as out:
        run = cohort.open_run(tmp_path, out, SETTINGS)
        write_text(run.settings_file, "[run]\n")
        cohort.check_output(run)
    with pytest.raises(UserError, match="was a mount lost") as caught:
        cohort.check_output(run)
    assert caught.value.code is ExitCode.IO_ERROR


def test_another_version_computes_anew(tmp_path: Path) -> None:
    cohorts.tiny_cohort(tmp_path / "bids", 1)
    words = cohorts.command(tmp_path, "out")
    code, log = cohorts.run(words, tmp_path)
    assert code == 0, log
    sidecar = tmp_path / "out/sub-000/anat/sub-000_desc-bspline_T1w.json"
    first = json.loads(sidecar.read_text())["IremBids"]
    other = (
        "import sys, irem_bids; irem_bids.__version__ = '999.0'; from irem_bids.cli import main; "
        "sys.exit(main())"
    )
    words[1:3] = ["-c", other]
    code, log = cohorts.run(words, tmp_path)
    assert code == 0, log
    second = json.loads(sidecar.read_text())["IremBids"]
    assert second["Version"] == "999.0"
    assert second["Key"] != first["Key"]
    assert "normalise" in log
    code, log = cohorts.run(words, tmp_path)
    assert code == 0, log
    assert "1 skipped" in log


def test_another_version_s_result_is_not_finished(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    finish(tmp_path / "out", group, SETTINGS)
    assert cohort.is_finished(group, tmp_path / "out", SETTINGS)
    monkeypatch.setattr(completion, "__version__", "999.0")
    assert not cohort.is_finished(group, tmp_path / "out", SETTINGS)


def test_a_dataset_that_was_moved_is_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    finish(tmp_path / "out", group, SETTINGS)
    elsewhere = tiny_dataset.rename(tmp_path / "elsewhere")
    (moved,) = discover(elsewhere, SETTINGS).groups
    assert moved.stacks[0].path != group.stacks[0].path
    assert cohort.is_finished(moved, tmp_path / "out", SETTINGS)


def test_steps_know_data_by_their_content(tiny_dataset: Path, tmp_path: Path) -> None:
    def key(root: Path) -> str:
        (group,) = discover(root, SETTINGS).groups
        settings = completion.normalise_settings(SETTINGS)
        step = Normalise(label=group.name, group=group.to_dict(), settings=settings)
        return str(step.inputs.get_hashval(hash_method="content")[1])

    before = key(tiny_dataset)
    moved = tiny_dataset.rename(tmp_path / "elsewhere")
    assert key(moved) == before  # finished steps of the work folder serve
    path = moved / "sub-01" / "anat" / "sub-01_acq-ax_T1w.nii.gz"
    data, grid = read_image(path)
    write_image(path, 2 * data, grid)  # another scan in the place of this one
    assert key(moved) != before


def test_claims_end_with_their_process(tmp_path: Path) -> None:
    with claims.Claims((tmp_path,)) as mine, claims.Claims((tmp_path,)) as theirs:
        assert mine.take("sub-01_T1w")
        assert not theirs.take("sub-01_T1w")
        assert theirs.take("sub-02_T1w")
        mine.release("sub-01_T1w")
        assert theirs.take("sub-01_T1w")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".irem-bids-sub-01_T1w.lock").touch()  # of a process that was killed
    with claims.Claims((tmp_path,)) as mine:
        assert mine.take("sub-01_T1w")


def test_leftovers_are_removed_when_they_are_old(tmp_path: Path) -> None:
    nobody = 2**22 + 17  # beyond the largest number of a process
    old, young = tmp_path / "sub-01" / f".{nobody}.a.json", tmp_path / f".{nobody}.b.html"
    kept, probe = tmp_path / ".bidsignore", tmp_path / f".irem-bids-{'0' * 32}"
    old.parent.mkdir()
    for path in (old, young, kept, probe):
        path.touch()
        os.utime(path, (1, 1))
    os.utime(young)
    claims.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([".bidsignore", young.name,
                                                                  "sub-01"])  # fmt: skip


def test_a_clock_that_was_set_costs_no_file_of_a_living_run(tmp_path: Path) -> None:
    living = tmp_path / f".{os.getpid()}.being-written.json"
    ahead = tmp_path / f".{2**22 + 17}.written-before-the-clock-went-back.json"
    for path, moment in ((living, 1.0), (ahead, time.time() + 1e6)):
        path.touch()
        os.utime(path, (moment, moment))
    claims.sweep(tmp_path)
    assert living.exists() and ahead.exists()


def test_space_is_asked_for_before_the_run(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = discover(tiny_dataset, SETTINGS).groups
    need = sum(needed(group, SETTINGS))
    assert 1e5 < need < 1e8
    finer = Settings.from_dict({"output": {"output_resolution": 0.5, "method": ["srr", "irem"]}})
    assert sum(needed(group, finer)) > 10 * need
    monkeypatch.setattr("irem_bids.space.free_bytes", lambda folder: need + 1)
    assert check_space([group], SETTINGS, tmp_path, tmp_path) is None
    warning = check_space([group, group], SETTINGS, tmp_path, tmp_path)
    assert warning is not None and "needed for all groups" in warning
    monkeypatch.setattr("irem_bids.space.free_bytes", lambda folder: need - 1)
    with pytest.raises(UserError, match=r"too little space: .* free, about .* needed") as caught:
        check_space([group], SETTINGS, tmp_path, tmp_path)
    assert caught.value.code is ExitCode.CANNOT_CREATE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(116, "Stale file handle"), True),
        (OSError(107, "Transport endpoint is not connected"), True),
        (OSError(27, "File too large"), True),
        (OSError(2, "No such file or directory"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (KeyError("x"), False),
    ],
)
def test_errors_of_the_disk(error: Exception, expected: bool) -> None:
    assert is_storage(error) is expected
