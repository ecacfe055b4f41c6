# SPDX-License-Identifier: Apache-2.0
"""Files of the output dataset as a whole: description, ignore list, read-me.

Several processes may share one output, so each file is written whole and only if it
would change.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from . import __version__
from .atomic import write_json, write_text
from .claims import alone
from .exitcodes import ExitCode, UserError

IGNORED = (
    "*_std.nii.gz", "*_std.json", "*_xfm.txt", "*_qc.json", "*_qc.tsv", "*_model.safetensors",
    "*.html", "figures", "logs", "group_*", ".irem-bids-*",
)  # fmt: skip
README = """# irem-bids derivatives

Isotropic MR images reconstructed from stacks of thick slices.

- `sub-*.html`: one report per participant and session; open it first
- `*_desc-<method>_T1w.nii.gz` (or T2w, PDw, FLAIR): the reconstruction; its sidecar has the
  stacks, thicknesses, settings, versions and metrics
- `*_desc-<method>_std.nii.gz`: standard deviation of each voxel of the reconstruction
- `*_desc-brain_mask.nii.gz`, `*_desc-head_mask.nii.gz`: foreground on the same grid; brain if
  masks were given, else head
- `*_from-<stack>_to-<reference>_mode-image_xfm.txt`: ITK transform that resamples the stack into
  the space of the reference stack (it maps points of the reference to points of the stack);
  with `desc-<method>`: as refined by that method
- `*_desc-<method>_qc.json`, `.tsv`: metrics
- `*_desc-<method>_model.safetensors`: the trained field, for `irem-bids-sample`
- `group_<contrast>.html`: page over all participants; `.tsv`, `.json`: its table and columns
- `logs/`: settings of each run, methods text with citations, table of groups, crash texts
"""


def write_dataset_files(
    output_dir: Path, links: dict[str, str], work_dir: Path | None = None
) -> None:
    """Write dataset_description.json, .bidsignore and README.md.

    ``links`` are the ``DatasetLinks`` of this run; those of earlier runs are kept.  A
    ``work_dir`` within the output is ignored by validators, too.

    Raises
    ------
    UserError
        The folder cannot be written (73).
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with alone(output_dir, "dataset"):  # what other runs add is read before it is written
            _write_description(output_dir / "dataset_description.json", links)
            ignored = list(IGNORED)
            if work_dir is not None and output_dir in work_dir.parents:
                ignored.append(work_dir.relative_to(output_dir).as_posix())
            _write_ignore(output_dir / ".bidsignore", ignored)
            if not (output_dir / "README.md").exists():
                write_text(output_dir / "README.md", README)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # told with how much is free and needed
        raise UserError(
            f"cannot write to the output folder {output_dir}: {error.strerror or error}; "
            "choose another one or mend its permissions",
            ExitCode.CANNOT_CREATE,
        ) from error


def _write_description(path: Path, links: dict[str, str]) -> None:
    old: dict[str, Any] = {}
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            old = {}
    generator: dict[str, Any] = {"Name": "irem-bids", "Version": __version__}
    container = os.environ.get("IREM_BIDS_CONTAINER")
    if container:
        kind, _, tag = container.partition(":")
        generator["Container"] = {"Type": kind, "Tag": tag}
    merged = {
        "Name": "irem-bids: isotropic reconstructions from stacks of thick slices",
        "BIDSVersion": "1.11.0",
        "DatasetType": "derivative",
        "GeneratedBy": [generator],
        "HowToAcknowledge": "See logs/CITATION.md.",
        "DatasetLinks": {**old.get("DatasetLinks", {}), **links},
    }
    write_json(path, {**old, **merged})


def _write_ignore(path: Path, ignored: list[str]) -> None:
    lines = path.read_text().splitlines() if path.is_file() else []
    missing = [line for line in ignored if line not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing]) + "\n")
