# SPDX-License-Identifier: Apache-2.0
"""Simulated stacks as a BIDS dataset, their truth and true poses as a derivative beside it.

::

    BIDS_DIR/dataset_description.json, README.md, participants.tsv
    BIDS_DIR/sub-01/anat/sub-01_acq-axial[_run-1]_T1w.nii.gz|json
    BIDS_DIR/derivatives/truth/sub-01/anat/sub-01_desc-truth_T1w.nii.gz|json
                                           sub-01_desc-head_mask.nii.gz|json
                                           sub-01_from-axial1_to-truth_mode-image_xfm.txt
                                           sub-01_desc-truth_simulation.json
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .draws import StackDraw
from .geometry import Grid, RigidTransform
from .metrics import head_mask
from .protocol import Protocol
from .simulate import SimulatedStack
from .stack import read_image, write_image

BIDS_VERSION = "1.10.0"
NAME = "irem-bids-simulate"
IGNORED = ("*_xfm.txt", "*_simulation.json")


@dataclass(frozen=True)
class Scan:
    """Whose scan it is: labels without their prefixes, and the suffix of the contrast."""

    subject: str = "01"
    session: str | None = None
    suffix: str = "T1w"

    @property
    def folder(self) -> Path:
        """``sub-01[/ses-1]/anat``."""
        session = [f"ses-{self.session}"] if self.session else []
        return Path(f"sub-{self.subject}", *session, "anat")

    @property
    def prefix(self) -> str:
        """``sub-01[_ses-1]``."""
        return f"sub-{self.subject}" + (f"_ses-{self.session}" if self.session else "")

    @property
    def other_prefix(self) -> str:
        """The prefix of files whose suffix does not name the contrast, as irem-bids has it."""
        return self.prefix + ("" if self.suffix == "T1w" else f"_mod-{self.suffix}")

    @property
    def mask_prefix(self) -> str:
        """The prefix of the contrast's mask."""
        return self.prefix + ("" if self.suffix == "T1w" else f"_space-{self.suffix}")


@dataclass(frozen=True)
class KnownTruth:
    """What :func:`write_dataset` wrote about a scan."""

    volume: NDArray[np.float32]
    grid: Grid
    mask: NDArray[np.bool_]
    protocol: Protocol
    draws: tuple[StackDraw, ...]

    @property
    def poses(self) -> dict[str, RigidTransform]:
        """Scanner space of each stack (by its label) to the truth's space."""
        return {one.label: RigidTransform(one.pose) for one in self.draws}


def write_dataset(
    bids_dir: str | Path,
    stacks: Sequence[SimulatedStack],
    truth: tuple[NDArray, Grid],
    protocol: Protocol,
    scan: Scan | None = None,
) -> Path:
    """Write the stacks of one scan, with the truth and the poses beside them.

    ``bids_dir`` may hold other simulated scans already, then this one is added.  Returns
    the folder of the truth's dataset.

    Raises
    ------
    FileExistsError
        The scan is there already, or the folder holds something else.
    """
    scan, root = scan or Scan(), Path(bids_dir)
    volume, grid = truth
    beside = root / "derivatives" / "truth"
    if root.exists() and any(root.iterdir()) and not (beside / "dataset_description.json").exists():
        raise FileExistsError(f"{root} is not empty and not a simulated dataset: give a new folder")
    anat, truth_anat = root / scan.folder, beside / scan.folder
    name = f"{scan.prefix}_desc-truth_{scan.suffix}"
    if (truth_anat / f"{name}.nii.gz").exists():
        raise FileExistsError(f"{scan.prefix} {scan.suffix} is in {root} already")
    anat.mkdir(parents=True, exist_ok=True)
    truth_anat.mkdir(parents=True, exist_ok=True)
    _write_roots(root, beside, scan)
    files = {}
    for one in stacks:
        stem = _stem(scan, one, stacks)
        write_image(anat / f"{stem}.nii.gz", one.stack.data, one.stack.grid)
        _write_json(anat / f"{stem}.json", _sidecar(one, protocol))
        files[one.stack.label] = (scan.folder / f"{stem}.nii.gz").as_posix()
        xfm = truth_anat / f"{scan.other_prefix}_from-{one.stack.label}_to-truth_mode-image_xfm.txt"
        _write_text(xfm, one.pose.inverse().to_itk_text())
    write_image(truth_anat / f"{name}.nii.gz", volume, grid)
    _write_json(truth_anat / f"{name}.json", {"SkullStripped": False})
    mask = f"{scan.mask_prefix}_desc-head_mask"
    write_image(truth_anat / f"{mask}.nii.gz", head_mask(volume), grid)
    source = f"bids::{(scan.folder / name).as_posix()}.nii.gz"
    known = {"SpatialReference": source} if scan.mask_prefix != scan.prefix else {}
    _write_json(truth_anat / f"{mask}.json", {"Type": "ROI", "Sources": [source], **known})
    record = {
        "Description": "What the simulator did. 'pose' maps scanner to truth space, RAS+ mm.",
        "Protocol": dataclasses.asdict(protocol),
        "Stacks": [{"file": files[s.draw.label], **s.draw.to_dict()} for s in stacks],
    }
    _write_json(truth_anat / f"{scan.other_prefix}_desc-truth_simulation.json", record)
    return beside


def read_truth(bids_dir: str | Path, scan: Scan | None = None) -> KnownTruth:
    """Read back what :func:`write_dataset` wrote about a scan.

    Raises
    ------
    FileNotFoundError
        The folder holds no simulated scan of that name.
    """
    scan = scan or Scan()
    anat = Path(bids_dir) / "derivatives" / "truth" / scan.folder
    record_path = anat / f"{scan.other_prefix}_desc-truth_simulation.json"
    if not record_path.exists():
        raise FileNotFoundError(
            f"{record_path} is missing: {bids_dir} is no dataset of {NAME}, or lacks this scan"
        )
    record = json.loads(record_path.read_text(encoding="utf-8"))
    volume, grid = read_image(anat / f"{scan.prefix}_desc-truth_{scan.suffix}.nii.gz")
    mask, _ = read_image(anat / f"{scan.mask_prefix}_desc-head_mask.nii.gz")
    protocol = dict(record["Protocol"], orientations=tuple(record["Protocol"]["orientations"]))
    draws = [{k: v for k, v in one.items() if k != "file"} for one in record["Stacks"]]
    return KnownTruth(
        volume, grid, mask > 0.5, Protocol(**protocol), tuple(map(StackDraw.from_dict, draws))
    )


def _stem(scan: Scan, one: SimulatedStack, stacks: Sequence[SimulatedStack]) -> str:
    same = [s for s in stacks if s.draw.plane == one.draw.plane]
    run = f"_run-{same.index(one) + 1:0{len(str(len(same)))}d}" if len(same) > 1 else ""
    return f"{scan.prefix}_acq-{one.draw.plane}{run}_{scan.suffix}"


def _sidecar(one: SimulatedStack, protocol: Protocol) -> dict[str, Any]:
    return {
        "MRAcquisitionType": "2D",
        "SliceThickness": one.stack.slice_thickness,
        "SpacingBetweenSlices": protocol.spacing,
    }


def _write_roots(root: Path, beside: Path, scan: Scan) -> None:
    """The files at the top of both datasets; participants.tsv gets the subject."""
    generated = [{"Name": NAME, "Version": __version__}]
    _write_json(
        root / "dataset_description.json",
        {
            "Name": "Simulated stacks of thick slices",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "raw",
            "GeneratedBy": generated,
        },
    )
    _write_text(
        root / "README.md",
        "# Simulated stacks of thick slices\n\n"
        f"Made by {NAME} {__version__} from a high-resolution image. The image itself, the "
        "true poses and all that was drawn at random are in `derivatives/truth`.\n",
    )
    _write_json(
        beside / "dataset_description.json",
        {
            "Name": "Truth of the simulated stacks",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": generated,
            "DatasetLinks": {"raw": "../.."},
            "SourceDatasets": [{"URL": "../.."}],
        },
    )
    _write_text(beside / ".bidsignore", "".join(f"{pattern}\n" for pattern in IGNORED))
    _write_text(
        beside / "README.md",
        "# Truth of the simulated stacks\n\n"
        "`desc-truth` is the image that was scanned. `from-X_to-truth_mode-image_xfm.txt` "
        "(ITK) resamples the stack X into the space of the truth: it maps points of the truth "
        "to points of the scanner. `simulation.json` holds the protocol and the draws.\n",
    )
    table = root / "participants.tsv"
    known = table.read_text(encoding="utf-8").split()[1:] if table.exists() else []
    rows = sorted({*known, f"sub-{scan.subject}"})
    _write_text(table, "".join(f"{row}\n" for row in ["participant_id", *rows]))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
