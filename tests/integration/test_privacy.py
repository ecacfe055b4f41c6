# SPDX-License-Identifier: Apache-2.0
"""One watched run on a dataset with names in its headers: what it writes, where, and to whom."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from .test_end_to_end import QUICK, make_dataset

SECRET = "Doe^Jane"
TRACED = (
    "network,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,"
    "symlink,symlinkat,truncate,rmdir"
)
OPENS = ("openat", "open", "creat")
CHANGES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE")
CALL = re.compile(r"^\d+\s+(\w+)\((.*)")
PLACE = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
DEVICES = ("/dev/null", "/dev/shm/", "/dev/tty", "/proc/self/", "/dev/pts/")


def identify(root: Path) -> None:
    """Put a name into every place of the headers and sidecars that could hold one."""
    for path in sorted(root.rglob("*.nii.gz")):
        image = nib.load(path)
        image.header["descrip"] = SECRET.encode()
        image.header["db_name"] = SECRET.encode()
        image.header["aux_file"] = SECRET.encode()
        image.header["intent_name"] = SECRET.encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
        nib.save(image, path)
        sidecar = Path(str(path).replace(".nii.gz", ".json"))
        sidecar.write_text(f'{{"SliceThickness": 5.0, "PatientName": "{SECRET}"}}')
    assert sum(SECRET in text(path) for path in root.rglob("*")) == 6


def text(path: Path) -> str:
    """The content of a file, unpacked."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("latin-1")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which the app has run under strace, and the trace."""
    folder = tmp_path_factory.mktemp("traced")
    if shutil.which("strace") is None:
        pytest.skip("there is no strace on this machine")
    identify(make_dataset(folder / "bids"))
    (folder / "quick.toml").write_text(QUICK)
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("COV", "PYTEST", "TEMPLATEFLOW", "NIPYPE", "MPL"))
    }
    environment |= {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "NUMBA_CACHE_DIR": str(folder / "tmp" / "numba"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    command = [
        "strace", "-f", "-y", "-qq", "-s", "4096", "-e", f"trace={TRACED}", "-e", "signal=none",
        "-o", str(folder / "trace.txt"), sys.executable, "-m", "irem_bids", str(folder / "bids"),
        str(folder / "out"), "participant", "--method", "bspline", "--config-file",
        str(folder / "quick.toml"), "--work-dir", str(folder / "work"), "--save-registered",
        "--model-out",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder / "cwd",
        umask=0o027,
    )
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("strace may not trace on this machine")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, (folder / "trace.txt").read_text(errors="replace").splitlines()


def written(lines: list[str]) -> set[str]:
    """Every path that was opened for writing, made, renamed or removed, where that worked."""
    found = set()
    for line in lines:
        match = CALL.match(line)
        if match is None or re.search(r"\) += -1 ", line):
            continue
        if match[1] in OPENS and match[1] != "creat" and not CHANGES.search(line):
            continue
        for base, name in PLACE.findall(match[2]):
            found.add(os.path.normpath(os.path.join(base or "?", name)))
    return found


def test_no_connection(traced: tuple[Path, list[str]]) -> None:
    _, lines = traced
    assert len(lines) > 100
    calls = re.compile(r"^\d+\s+(connect|sendto|sendmsg|bind|listen)\(")
    assert [line for line in lines if calls.match(line) and "AF_INET" in line] == []


def test_no_write_outside(traced: tuple[Path, list[str]]) -> None:
    folder, lines = traced
    paths = written(lines)
    inside = tuple(f"{folder}/{name}" for name in ("out", "work", "tmp"))
    own = (f"{folder}/bids", f"{folder}/home", f"{folder}/cwd")
    assert any(path.endswith("sub-01_desc-bspline_T1w.nii.gz") for path in paths)
    outside = [
        path
        for path in paths
        if not path.startswith(inside)
        and not path.startswith(DEVICES)
        and not re.match(r"/proc/\d+/", path)
        and (not path.startswith("/tmp/") or path.startswith(own))
    ]
    assert outside == []
    assert list((folder / "home").rglob("*")) == []
    assert list((folder / "cwd").rglob("*")) == []


def test_nobody_is_named_in_the_output(traced: tuple[Path, list[str]]) -> None:
    folder, _ = traced
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if SECRET in text(path)] == []
    for path in (folder / "out").rglob("*.nii.gz"):
        header = nib.load(path).header
        assert len(header.extensions) == 0
        for field in ("descrip", "db_name", "aux_file", "intent_name"):
            assert header[field].item() == b""


def test_permissions_follow_umask(traced: tuple[Path, list[str]]) -> None:
    folder, _ = traced
    for path in (folder / "out").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), f"{path} has {oct(mode)}"


def test_nothing_is_pickled() -> None:
    package = Path(__file__).resolve().parents[2] / "irem_bids"
    words = re.compile(r"import pickle|pickle\.loads?\(|torch\.load\(|allow_pickle=True|joblib")
    for path in sorted(package.rglob("*.py")):
        assert words.search(path.read_text()) is None, path
