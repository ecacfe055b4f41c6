# SPDX-License-Identifier: Apache-2.0
"""Is what the user gave usable?  Each refusal is one message and an exit code."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from .exitcodes import ExitCode, UserError
from .resources import asked_memory_gb, choose_devices
from .settings import Run

WORK_FOLDER = "irem-bids-work"


def check_dataset(bids_dir: Path, *, strict: bool = True) -> None:
    """Refuse what is no folder (66) or no BIDS dataset (16).

    ``strict`` asks for the required fields of ``dataset_description.json``, too.
    """
    if not bids_dir.exists():
        raise UserError(f"{bids_dir}: there is no such folder", ExitCode.NO_INPUT)
    if not bids_dir.is_dir():
        raise UserError(
            f"{bids_dir}: is a file; expected the folder of a BIDS dataset", ExitCode.NO_INPUT
        )
    path = bids_dir / "dataset_description.json"
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file", ExitCode.NOT_BIDS)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"{bids_dir}: has no dataset_description.json, so it is not a BIDS dataset; give the "
            "dataset's top folder, or write the file with its 'Name' and 'BIDSVersion'"
            + (" (it is a link to nowhere: datalad get it)" if path.is_symlink() else ""),
            ExitCode.NOT_BIDS,
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", ExitCode.NO_INPUT) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})", ExitCode.NOT_BIDS) from error
    fields = ("Name", "BIDSVersion")
    missing = [f for f in fields if not isinstance(content, dict) or f not in content]
    if missing and (strict or not isinstance(content, dict)):
        raise UserError(
            f"{path}: has no {' and no '.join(repr(f) for f in missing)}; BIDS requires it "
            "(--skip-bids-validation goes on without)",
            ExitCode.NOT_BIDS,
        )


def check_output(bids_dir: Path, output_dir: Path) -> None:
    """Refuse an output folder within the dataset (64) or one that cannot be written (73).

    Writes nothing: see :func:`create_output`.
    """
    dataset, output = bids_dir.resolve(), output_dir.resolve()
    if _inside(output, dataset) and not (
        _inside(output, dataset / "derivatives") and output != dataset / "derivatives"
    ):
        raise UserError(
            f"{output_dir}: the output folder is inside the dataset; choose another, "
            f"such as {dataset / 'derivatives' / 'irem-bids'}",
            ExitCode.USAGE,
        )
    _check_writable(output, "output folder")


def create_output(output_dir: Path) -> None:
    """Make the output folder and try to write in it (73 if that fails)."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise _cannot_create(output_dir, "output folder", error.strerror) from error


def choose_work_dir(bids_dir: Path, output_dir: Path, given: str | None) -> Path:
    """The work folder: as given, else beside the output folder, else in the current folder.

    Raises
    ------
    UserError
        It is inside the dataset (64) or cannot be written (73).
    """
    dataset = bids_dir.resolve()
    beside = [output_dir.resolve().parent / WORK_FOLDER, Path.cwd() / WORK_FOLDER]
    choices = [Path(given).resolve()] if given else beside
    for choice in choices:
        if not _inside(choice, dataset):
            _check_writable(choice, "work folder")
            return choice
    raise UserError(
        f"{choices[-1]}: the work folder is inside the dataset; choose one outside it "
        "with --work-dir",
        ExitCode.USAGE,
    )


def check_profile(path: str | None) -> None:
    """Refuse a measured slice profile that is missing (66) or no table of two columns (64)."""
    if path is None:
        return
    if not Path(path).is_file():
        raise UserError(
            f"--profile-file {path}: there is no such file; expected a text file of two columns, "
            "mm and response",
            ExitCode.NO_INPUT,
        )
    from .reconstruction.acquisition import ProfileError, read_profile

    try:
        read_profile(path)
    except ProfileError as error:
        raise UserError(f"--profile-file {error}", ExitCode.USAGE) from error


def check_resources(run: Run) -> None:
    """Refuse a memory size that is none or in another unit (64), a GPU that is not there (75)."""
    asked_memory_gb(run)
    if run.device == "auto" and not run.gpus:
        return
    try:
        choose_devices(run.device, most=run.gpus)
    except UserError as error:
        if error.code is not ExitCode.TEMPORARY:
            raise
        raise UserError(
            f"{error}; a container needs 'docker run --gpus all' or 'apptainer run --nv' "
            "to see one",
            error.code,
        ) from error


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _check_writable(folder: Path, what: str) -> None:
    """Whether ``folder``, or the nearest one above it that exists, can be written."""
    above = folder
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise _cannot_create(folder, what, f"{above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _cannot_create(folder, what, f"no permission to write in {above}")


def _cannot_create(folder: Path, what: str, why: str | None) -> UserError:
    return UserError(
        f"{folder}: the {what} cannot be created or written ({why}); choose another",
        ExitCode.CANNOT_CREATE,
    )
