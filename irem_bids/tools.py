# SPDX-License-Identifier: Apache-2.0
"""The small programs: irem-bids-simulate, irem-bids-evaluate, irem-bids-sample.

Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .exitcodes import ExitCode, UserError
from .reconstruction.protocol import Protocol, SimulationError

if TYPE_CHECKING:
    from .reconstruction.evaluation import Scores
    from .reconstruction.geometry import RigidTransform
    from .reconstruction.simulated_dataset import KnownTruth, Scan


class ToolParser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError` with code 64."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        if "required" in message:
            message += " (options that take several values go behind them)"
        raise UserError(f"{message}; see {self.prog} --help", ExitCode.USAGE)


def _parser(prog: str, description: str) -> ToolParser:
    parser = ToolParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads; default: the processors available"
    )
    return parser


def _run(prog: str, work: Callable[[], None]) -> int:
    """Run a program and turn what the user can mend into one message and an exit code."""
    try:
        work()
    except UserError as error:
        message, code = error.message, error.code
    except SimulationError as error:
        message, code = str(error), ExitCode.USAGE
    except FileNotFoundError as error:
        message, code = _said(error), ExitCode.NO_INPUT
    except (FileExistsError, PermissionError, NotADirectoryError) as error:
        message, code = _said(error), ExitCode.CANNOT_CREATE
    except OSError as error:
        message, code = _said(error), ExitCode.IO_ERROR
    except MemoryError:
        message, code = "out of memory; a coarser --resolution needs less", ExitCode.TEMPORARY
    except ValueError as error:
        if not type(error).__module__.startswith("irem_bids."):
            raise
        message, code = str(error), ExitCode.BAD_DATA
    else:
        return int(ExitCode.SUCCESS)
    sys.stderr.write(f"{prog}: error: {message}\n")
    return int(code)


def _said(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _threads(given: int | None) -> int:
    return max(1, given or len(os.sched_getaffinity(0)))


def _existing(path: str) -> Path:
    found = Path(path)
    if not found.is_file():
        link = " (a link to nowhere; try 'datalad get')" if found.is_symlink() else ""
        raise UserError(f"{path}: there is no such file{link}", ExitCode.NO_INPUT)
    return found


# --- irem-bids-simulate -----------------------------------------------------------------

SIMULATE = "irem-bids-simulate"
SHORT_FLAGS = {"thickness": "--slice-thickness"}


def _simulate_parser() -> ToolParser:
    parser = _parser(
        SIMULATE,
        "Stacks of thick slices from a high-resolution image, as a BIDS dataset; the truth and "
        "the true poses go into its derivatives/truth.",
    )
    parser.add_argument("truth", help="high-resolution NIfTI image with a dark background")
    parser.add_argument("bids_dir", help="folder of the dataset; another subject may be there")
    parser.add_argument("--subject", default="01", metavar="LABEL", help="default: 01")
    parser.add_argument("--session", metavar="LABEL", help="default: no session")
    parser.add_argument(
        "--suffix", default="T1w", choices=("T1w", "T2w", "PDw", "FLAIR"), help="default: T1w"
    )
    group = parser.add_argument_group("protocol")
    hints = typing.get_type_hints(Protocol)
    for field in dataclasses.fields(Protocol):
        _add_protocol_option(group, field, hints[field.name])
    return parser


def _add_protocol_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any
) -> None:
    flag = SHORT_FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
    notes = [f"unit: {field.metadata['unit']}"] if field.metadata["unit"] else []
    default: Any = field.default
    is_tuple = isinstance(default, tuple)
    if default is not None:
        notes.append(f"default: {' '.join(default) if is_tuple else default}")
    text = field.metadata["help"] + (f" [{'; '.join(notes)}]" if notes else "")
    keywords: dict[str, Any] = {
        "dest": f"protocol.{field.name}",
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    if field.metadata["choices"]:
        keywords["choices"] = field.metadata["choices"]
    else:
        keywords["type"] = int if hint is int else float
        keywords["metavar"] = "N" if hint is int else "X"
    if is_tuple:
        keywords["nargs"] = "+"
    group.add_argument(flag, **keywords)


def simulate_main(argv: Sequence[str] | None = None) -> int:
    """``irem-bids-simulate``: returns the exit code."""
    return _run(SIMULATE, lambda: _simulate(_simulate_parser().parse_args(argv)))


def _simulate(arguments: argparse.Namespace) -> None:
    given: dict[str, Any] = {
        name.removeprefix("protocol."): tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name.startswith("protocol.")
    }
    protocol = Protocol(**given)
    for name in ("subject", "session"):
        label = getattr(arguments, name)
        if label is not None and not re.fullmatch(r"[0-9A-Za-z]+", label):
            raise UserError(
                f"--{name} is {label!r}; expected letters and digits, without 'sub-' or 'ses-'",
                ExitCode.USAGE,
            )
    path = _existing(arguments.truth)
    from .reconstruction.simulate import simulate
    from .reconstruction.simulated_dataset import Scan, write_dataset
    from .reconstruction.stack import read_image

    truth = read_image(path)
    stacks = simulate(*truth, protocol, threads=_threads(arguments.threads))
    scan = Scan(arguments.subject, arguments.session, arguments.suffix)
    beside = write_dataset(arguments.bids_dir, stacks, truth, protocol, scan)
    for one in stacks:
        shape = " x ".join(str(n) for n in one.stack.data.shape)
        sys.stdout.write(f"{one.stack.label}: {shape}, slices {protocol.spacing:g} mm apart\n")
    sys.stdout.write(f"stacks: {Path(arguments.bids_dir) / scan.folder}\ntruth: {beside}\n")


# --- irem-bids-evaluate -----------------------------------------------------------------

EVALUATE = "irem-bids-evaluate"


def _evaluate_parser() -> ToolParser:
    parser = _parser(
        EVALUATE,
        "PSNR, SSIM and NCC of a reconstruction against a truth, raw and after the rigid motion, "
        "scale and offset that fit best; with --dataset also the errors of the poses.",
    )
    parser.add_argument("reconstruction", help="NIfTI image to score")
    parser.add_argument("truth", nargs="?", help="NIfTI image; may be left out with --dataset")
    parser.add_argument("--mask", metavar="FILE", help="default: the head in the truth")
    parser.add_argument(
        "--dataset", metavar="BIDS_DIR", help="dataset of irem-bids-simulate: its truth and poses"
    )
    parser.add_argument(
        "--derivatives", metavar="DIR", help="output of irem-bids with the estimated poses"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """``irem-bids-evaluate``: returns the exit code."""
    return _run(EVALUATE, lambda: _evaluate(_evaluate_parser().parse_args(argv)))


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.truth is None and arguments.dataset is None:
        raise UserError("give a truth, or --dataset", ExitCode.USAGE)
    if (arguments.derivatives is None) != (arguments.dataset is None) and arguments.derivatives:
        raise UserError("--derivatives needs --dataset, which has the true poses", ExitCode.USAGE)
    path = _existing(arguments.reconstruction)
    paths = [_existing(p) for p in (arguments.truth, arguments.mask) if p is not None]
    from .reconstruction.evaluation import evaluate, pose_errors
    from .reconstruction.simulated_dataset import read_truth
    from .reconstruction.stack import read_image, read_mask

    known = read_truth(arguments.dataset, scan_of(path)) if arguments.dataset else None
    truth = read_image(paths[0]) if arguments.truth else (known.volume, known.grid)  # type: ignore[union-attr]
    mask = known.mask if known is not None and arguments.truth is None else None
    if arguments.mask:
        mask = read_mask(arguments.mask, truth[1])
    scores = evaluate(read_image(path), truth, mask, threads=_threads(arguments.threads))
    errors = {}
    if known is not None and arguments.derivatives:
        poses = estimated_poses(Path(arguments.derivatives), path, known)
        errors = pose_errors(poses, known.poses, known.mask, known.grid)
    if arguments.json:
        record = {**scores.to_dict(), "tre": errors} if errors else scores.to_dict()
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        sys.stdout.write(_scores_text(scores, errors))


def _scores_text(scores: Scores, errors: dict[str, float]) -> str:
    turn = " ".join(f"{v:.3f}" for v in scores.rotation)
    shift = " ".join(f"{v:.3f}" for v in scores.translation)
    lines = [
        "after the gauge",
        f"  PSNR {scores.psnr:.2f} dB (peak {scores.peak:g})",
        f"  SSIM {scores.ssim:.4f}",
        f"  NCC  {scores.ncc:.4f}",
        "as it stands",
        f"  PSNR {scores.psnr_raw:.2f} dB",
        f"  SSIM {scores.ssim_raw:.4f}",
        "gauge, truth to reconstruction",
        f"  rotation {turn} degrees, translation {shift} mm",
        f"  scale {scores.scale:.5g}, offset {scores.offset:.5g}, coverage {scores.coverage:.1%}",
    ]
    if errors:
        mean = sum(errors.values()) / len(errors)
        lines.append(f"target registration error of the poses: mean {mean:.4f} mm")
        lines += [f"  {label}: {error:.4f} mm" for label, error in errors.items()]
    return "\n".join(lines) + "\n"


def scan_of(path: Path) -> Scan:
    """Subject, session and suffix from the name of an output of irem-bids."""
    from .reconstruction.simulated_dataset import Scan

    entities = dict(part.split("-", 1) for part in path.name.split("_") if "-" in part)
    if "sub" not in entities:
        raise UserError(
            f"{path.name}: has no 'sub-'; with --dataset the reconstruction keeps its BIDS name",
            ExitCode.USAGE,
        )
    suffix = path.name.split("_")[-1].split(".")[0]
    return Scan(entities["sub"], entities.get("ses"), suffix)


def estimated_poses(
    derivatives: Path, reconstruction: Path, known: KnownTruth
) -> dict[str, RigidTransform]:
    """Poses of the stacks from the transforms that irem-bids wrote.

    A method's own transforms (``desc-<method>``) go before those of the registration; the
    reference stack has none, its pose is the identity.
    """
    from .reconstruction.geometry import RigidTransform

    scan = scan_of(reconstruction)
    contrast = [] if scan.suffix == "T1w" else [scan.suffix]
    method = re.search(r"_desc-([0-9A-Za-z]+)", reconstruction.name)
    poses, folder = {}, derivatives / scan.folder
    for label in known.poses:
        stem = f"{scan.prefix}*_from-{label}_to-*_mode-image"
        own = sorted(folder.glob(f"{stem}_desc-{method[1]}_xfm.txt")) if method else []
        both = own + sorted(folder.glob(f"{stem}_xfm.txt"))
        files = [f for f in both if re.findall("_mod-([0-9A-Za-z]+)", f.name) == contrast]
        if files:
            text = files[0].read_text(encoding="utf-8")
            poses[label] = RigidTransform.from_itk_text(text).inverse()
    absent = [label for label in known.poses if label not in poses]
    if len(absent) > 1:
        raise UserError(
            f"{folder}: no transforms (from-..._xfm.txt) of {', '.join(absent)}; expected those "
            "of all stacks but the reference",
            ExitCode.NO_INPUT,
        )
    return {label: poses.get(label, RigidTransform()) for label in known.poses}


# --- irem-bids-sample -------------------------------------------------------------------

SAMPLE = "irem-bids-sample"


def _sample_parser() -> ToolParser:
    parser = _parser(SAMPLE, "Sample a trained field (--model-out of irem-bids) on another grid.")
    parser.add_argument("model", help="file written by irem-bids --model-out (.safetensors)")
    parser.add_argument("out", help="NIfTI image to write (.nii or .nii.gz)")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--resolution", type=float, metavar="MM", help="default: as reconstructed")
    grid.add_argument("--like", metavar="FILE", help="NIfTI image whose grid is taken")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto; default: cpu")
    return parser


def sample_main(argv: Sequence[str] | None = None) -> int:
    """``irem-bids-sample``: returns the exit code."""
    return _run(SAMPLE, lambda: _sample(_sample_parser().parse_args(argv)))


def _sample(arguments: argparse.Namespace) -> None:
    path, out = _existing(arguments.model), Path(arguments.out)
    if not out.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{out.name}: expected a name in .nii or .nii.gz", ExitCode.USAGE)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: there is no such folder", ExitCode.CANNOT_CREATE)
    resolution = arguments.resolution
    if resolution is not None and not 0.05 <= resolution <= 20:
        raise UserError(f"--resolution is {resolution}; expected 0.05 to 20 mm", ExitCode.USAGE)
    like = _existing(arguments.like) if arguments.like else None
    from .resources import choose_devices

    device = choose_devices(arguments.device)[0]
    import torch

    from .reconstruction.fields import load_model
    from .reconstruction.sample import sample
    from .reconstruction.stack import read_image, write_image

    torch.set_num_threads(_threads(arguments.threads))
    model = load_model(path)
    grid = model.grid if resolution is None else model.grid.resampled(resolution)
    if like is not None:
        grid = read_image(like)[1]
    volume = sample(model.field, grid, device=device)
    write_image(out, volume * model.scale, grid)
    shape = " x ".join(str(n) for n in grid.shape)
    sys.stdout.write(f"{out}: {shape} voxels\n")
