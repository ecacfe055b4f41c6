# SPDX-License-Identifier: Apache-2.0
"""Each command for containers and clusters is run by a stage or a test, or said not to be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Start of a command, the file that runs it, and how it stands there; or what the list of
#: things that were not run calls it.
SHOWN = {
    "docker build -t irem-bids .": (".ci/container", "docker build "),
    "docker run --rm --gpus all": (".ci/container", 'docker run "${confined[@]}"'),
    "docker save irem-bids": (".ci/apptainer", "docker save "),
    "apptainer build irem-bids.sif docker-archive:": (".ci/apptainer", "docker-archive:image.tar"),
    "apptainer build irem-bids.sif singularity.def": (
        ".ci/apptainer",
        "../def.sif singularity.def",
    ),
    "apptainer run --nv": (".ci/apptainer", "apptainer run --cleanenv --containall"),
    'SBATCH_ARRAY="': (".ci/slurm", 'docs/hpc/submit "$data" "$out"'),
    'IREM_BIDS="apptainer run': ("not run", "`submit` with a container"),
    "irem-bids /data /out participant -w /out-work --use-plugin": (".ci/slurm", "--use-plugin"),
    "irem-bids /data /out participant --dry-run --bids": (
        "benchmarks/discovery.py",
        '"participant", "--dry-run"',
    ),
    "qsub -J": ("not run", "PBS and SGE"),
    "qsub -t": ("not run", "PBS and SGE"),
    "label=$(sed": ("not run", "PBS and SGE"),
    'irem-bids /data /out participant --participant-label "$label"': ("not run", "PBS and SGE"),
}


def commands(page: str) -> list[str]:
    """Lines of the shell blocks of a page, each with its continuations."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def test_every_command_is_run_or_said_not_to_be() -> None:
    hpc = (ROOT / "docs/hpc.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("Docker:\n") : readme.index("## Inputs")]
    not_run = " ".join(hpc[hpc.index("\nNot run:") :].split())
    used = set()
    for command in commands(hpc) + commands(section):
        starts = [start for start in SHOWN if command.startswith(start)]
        assert starts, f"nothing says where this is run: {command}"
        used.update(starts)
        where, words = SHOWN[starts[0]]
        text = not_run if where == "not run" else (ROOT / where).read_text(encoding="utf-8")
        assert words in text, f"{where} does not have {words!r}"
    assert used == set(SHOWN)


def test_what_has_no_gpu_is_said() -> None:
    hpc = (ROOT / "docs/hpc.md").read_text(encoding="utf-8")
    for flag in ("--gpus all", "--nv", "--gres=gpu:1"):
        assert f"`{flag}`" in hpc[hpc.index("\nNot run:") :]


def test_no_workflow_names_a_registry() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0")
        assert not re.search(r"https?://|\b(ghcr|quay|docker|pypi)\.(io|org|com)\b", text)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{data}"], 64, "usage: submit BIDS_DIR OUTPUT_DIR"),
        (["{data}", "{out}"], 65, "no participant (sub-*)"),
    ],
)
def test_submit_says_what_it_lacks(tmp_path, arguments, code, words) -> None:
    """Without participants: a table that names none."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "participants.tsv").write_text("participant_id\nn/a\n")
    given = [a.format(data=data, out=tmp_path / "out") for a in arguments]
    submit = ["bash", str(ROOT / "docs" / "hpc" / "submit"), *given]
    done = subprocess.run(submit, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr
