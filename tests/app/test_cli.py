# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from irem_bids import __version__, cli, log
from irem_bids.checks import WORK_FOLDER, choose_work_dir
from irem_bids.exitcodes import ExitCode, UserError

HEAVY = ("torch", "numpy", "nibabel", "nipype", "bids", "scipy", "SimpleITK", "niworkflows")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_are_instant(flag):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "irem_bids", flag], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (__version__ if flag == "--version" else "--output-resolution") in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(flag):
    code = (
        "import sys\nfrom irem_bids.cli import main\n"
        f"try:\n    main([{flag!r}])\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(' '.join(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_dry_run_prints_groups_and_writes_nothing(tiny_dataset, tmp_path, capsys):
    scan = tiny_dataset / "sub-01" / "anat" / "sub-01_rec-x_T1w.nii.gz"
    scan.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    code = cli.main([str(tiny_dataset), str(tmp_path / "out"), "participant", "--dry-run"])
    shown = capsys.readouterr().out
    assert code == 0
    assert "sub-01_T1w: 3 stacks, axial, coronal, sagittal" in shown
    assert f"left out: {scan.name}: rec-x: the result of a reconstruction" in shown
    assert "1 group to reconstruct" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_does_not_make_a_database(tiny_dataset, tmp_path):
    database = tmp_path / "database"
    words = [str(tiny_dataset), str(tmp_path / "out"), "participant", "--dry-run"]
    assert cli.main([*words, "--bids-database-dir", str(database)]) == 0
    assert not database.exists()


def test_dry_run_answers_with_the_code_of_the_run(tiny_dataset, tmp_path, capsys):
    for path in (tiny_dataset / "sub-01" / "anat").glob("*sag*"):
        path.unlink()
    for path in (tiny_dataset / "sub-01" / "anat").glob("*cor*"):
        path.unlink()
    words = [str(tiny_dataset), str(tmp_path / "out"), "participant"]
    assert cli.main([*words, "--dry-run"]) == cli.main(words) == ExitCode.BAD_DATA
    assert capsys.readouterr().out.endswith("0 groups to reconstruct\n")
    assert not (tmp_path / "out").exists()


def test_the_work_folder_is_beside_the_output(tmp_path, monkeypatch):
    dataset = tmp_path / "bids"
    dataset.mkdir()
    assert choose_work_dir(dataset, tmp_path / "out", None) == tmp_path / WORK_FOLDER
    assert choose_work_dir(dataset, tmp_path / "out", str(tmp_path / "w")) == tmp_path / "w"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    inside = dataset / "derivatives" / "irem"
    assert choose_work_dir(dataset, inside, None) == elsewhere / WORK_FOLDER
    monkeypatch.chdir(dataset)
    with pytest.raises(UserError, match="--work-dir") as caught:
        choose_work_dir(dataset, inside, None)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 75, "out of memory"),
        (OSError(28, "No space left on device", "/x/y"), 74, "/x/y: No space left"),
        (OSError(2, "No such file", "z"), 1, "a defect of irem-bids"),
        (ZeroDivisionError("odd"), 1, "a defect of irem-bids"),
    ],
)
def test_other_endings(error, code, words, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == code
    assert words in capsys.readouterr().err


def test_progress_is_lines_where_nobody_watches(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 40.0, 41.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    log.configure()
    with log.Progress("training") as progress:
        for fraction in (0.01, 0.5, 0.6):
            progress(fraction, "step")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO training  50 %, 40 s left (step)")


def test_progress_is_a_bar_on_a_terminal():
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, log.Progress("training", terminal) as progress:
        progress(1.0)
    shown = os.read(master, 1000).decode()
    os.close(master)
    assert "[" + "#" * log.BAR_WIDTH + "] training 100 %" in shown


def test_verbosity(capsys):
    log.configure(0).debug("quiet")
    log.configure(1).debug("loud")
    assert "loud" in (shown := capsys.readouterr().err)
    assert "quiet" not in shown


def test_both_levels_in_one_call(tiny_dataset, tmp_path, monkeypatch):
    from irem_bids import cohort

    from .group_material import write_cohort

    def participants(discovery, bids_dir, output_dir, settings, *, reports_only):
        write_cohort(output_dir, 2)
        return ExitCode.FAILURE

    monkeypatch.setattr(cohort, "run_cohort", participants)
    words = [str(tiny_dataset), str(tmp_path / "out"), "participant", "group"]
    assert cli.main(words) == ExitCode.FAILURE, "the participants' failure is still told"
    page = (tmp_path / "out" / "group_T1w.html").read_text()
    assert "2 participants, 2 results" in page
    assert '<a href="sub-1.html">' in page or "sub-1.html" in page
    assert (tmp_path / "out" / "group_T1w.tsv").read_text().count("\n") == 3


def test_boilerplate_only_writes_the_methods_text(tiny_dataset, tmp_path):
    words = [str(tiny_dataset), str(tmp_path / "out"), "participant", "--boilerplate-only"]
    assert cli.main([*words, "--method", "srr"]) == 0
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert written == ["logs/CITATION.bib", "logs/CITATION.md", "logs/CITATION.tex"]
    text = (tmp_path / "out" / "logs" / "CITATION.md").read_text()
    assert "super-resolution" in text
    assert "network of IREM" not in text
