# SPDX-License-Identifier: Apache-2.0
"""Stacks in one space to a continuous field (paper 2.2), by any of the methods."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import Settings
from .acquisition import Receiver, predict
from .baselines import bspline, without
from .checkpoint import load_state, save_state
from .consistency import reconciled
from .fields import Field, GridField, ResidualField, load_model, save_model
from .gaps import blended, joined, leave_gaps, share_of
from .geometry import Grid, RigidTransform, mean_pose
from .linear import System, restored
from .metrics import MAD_TO_SIGMA
from .prepare import Prepared, write_json
from .registration import ncc
from .rehearsal import Example, rehearse
from .repeatable import repeatable, small_matrices
from .sample import evaluate, sample
from .solution import BAD, Job, Linear, Prediction, Progress, State, build_system, solve_linear
from .stack import Stack
from .training import Training

RESIDUAL_SCALE = 0.1  # scaled intensity: of what the network adds
PER_STACK = ("slice_poses", "slice_weights", "widths")


@dataclass
class Fit:
    """A trained field with the poses and gains that belong to it.

    ``poses``: label of a stack to its pose (scanner space to reference space);
    ``receivers``: label to gain and bias, the reference's gain is 1; ``slice_poses``: label to
    (K, 4, 4), where slices moved one by one; ``slice_weights``: label to (K,); ``widths``: of
    the profile over the assumed one; slices are those of the prepared stack.  ``history``: the
    curves ``step``/``loss`` and ``held_out_step``/``held_out`` (mean squared errors); ``info``:
    seconds, device, strength of the penalty and the like.
    """

    method: str
    field: Field
    grid: Grid
    scale: float
    poses: dict[str, RigidTransform]
    receivers: dict[str, Receiver]
    history: dict[str, list[float]]
    info: dict[str, Any]
    slice_poses: dict[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    slice_weights: dict[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    widths: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def gains(self) -> dict[str, float]:
        """Label of a stack to its gain."""
        return {label: receiver.gain for label, receiver in self.receivers.items()}

    def record(self) -> dict[str, Any]:
        """Everything but the field, JSON-safe."""
        return {
            "method": self.method,
            "poses": {label: pose.matrix.tolist() for label, pose in self.poses.items()},
            "gains": self.gains,
            "bias": {label: receiver.bias.tolist() for label, receiver in self.receivers.items()},
            "slice_gains": {
                label: receiver.slices.tolist()
                for label, receiver in self.receivers.items()
                if receiver.slices is not None
            },
            "history": self.history,
            "info": self.info,
            "slice_poses": {label: poses.tolist() for label, poses in self.slice_poses.items()},
            "slice_weights": {label: w.tolist() for label, w in self.slice_weights.items()},
            "widths": dict(self.widths),
            "slice_motion": {
                label: self.slice_motion(label).tolist() for label in self.slice_poses
            },
            "slice_pivot": self.grid.centre.tolist(),
        }

    def slice_motion(self, label: str) -> NDArray[np.float64]:
        """(K, 6) motion of each slice beyond its stack's pose, about the middle of the result:
        rotation vectors (rad, RAS+ axes), then translations (mm)."""
        back = self.poses[label].inverse()
        return np.stack(
            [
                (RigidTransform(pose) @ back).to_vector(self.grid.centre)
                for pose in self.slice_poses[label]
            ]
        )

    def image(self) -> NDArray[np.float32]:
        """The field on the grid that it was made for, scaled intensity."""
        return sample(self.field, self.grid)

    def predict(
        self, stack: Stack, settings: Settings, image: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The stack as this fit predicts it: (I, J, K) scaled intensity, 0 outside its mask.

        ``image``: :meth:`image`, made here if not given.  ``bspline`` predicts point samples of
        its image; ``irem2021`` of its network.
        """
        pose = self.poses[stack.label]
        receiver = self.receivers[stack.label].image(stack.grid, pose, self.grid.centre)
        slices = self.receivers[stack.label].slices
        receiver = receiver if slices is None else receiver * stack.by_slice(slices)
        if self.method == "irem2021":
            out = np.zeros(stack.grid.shape, dtype=np.float32)
            points = pose.apply(stack.grid.to_world(np.argwhere(stack.mask)))
            out[stack.mask] = evaluate(self.field, points)
            return out * receiver
        acquisition = settings.acquisition
        if self.method == "bspline":
            acquisition = replace(acquisition, profile="none")
        values = self.image() if image is None else image
        poses = self.slice_poses.get(stack.label, pose)
        width = self.widths.get(stack.label, 1.0)
        return predict(values, self.grid, stack, poses, acquisition, width=width) * receiver

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and, last, ``fit.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.safetensors"
        save_model(path, self.field, self.grid, self.scale, self.record())
        write_json(folder / "fit.json", self.record())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Fit:
        """Read what :meth:`save` wrote."""
        folder = Path(folder)
        model = load_model(folder / "model.safetensors")
        record = json.loads((folder / "fit.json").read_text())
        each = {label: np.array(gains) for label, gains in record.get("slice_gains", {}).items()}
        return cls(
            record["method"],
            model.field,
            model.grid,
            model.scale,
            {label: RigidTransform(m) for label, m in record["poses"].items()},
            {
                label: Receiver(gain, np.array(record["bias"][label]), each.get(label))
                for label, gain in record["gains"].items()
            },
            record["history"],
            record["info"],
            {label: np.array(poses) for label, poses in record["slice_poses"].items()},
            {label: np.array(w) for label, w in record["slice_weights"].items()},
            dict(record["widths"]),
        )


def fit(
    method: str,
    prepared: Prepared,
    grid: Grid,
    settings: Settings,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit one method's field to the stacks.

    Parameters
    ----------
    method
        One of ``irem``, ``irem2021``, ``srr``, ``bspline``.
    grid
        Of the result; the linear solutions live on it.
    checkpoint
        Folder for the state of an unfinished training; found again, it goes on from there,
        on the CPU with the same result to the bit.
    """
    methods: dict[str, Callable[[Job], Fit]] = {
        "irem": _fit_irem,
        "irem2021": _fit_irem2021,
        "srr": _fit_srr,
        "bspline": _fit_bspline,
    }
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(methods)}")
    torch.manual_seed(settings.run.random_seed)
    started = time.monotonic()
    with repeatable(settings.run.deterministic), small_matrices():
        result = methods[method](Job(prepared, grid, settings, device, checkpoint, progress))
    result.info |= {"device": device, "seconds": round(time.monotonic() - started, 3)}
    result.field = result.field.to("cpu").eval()
    return result


def _result(job: Job, method: str, field: Field, **found: Any) -> Fit:
    labels = [stack.label for stack in job.prepared.stacks]
    poses = found.get("poses", job.prepared.poses)
    receivers = found.get("receivers", [Receiver()] * len(labels))
    return Fit(
        method,
        field,
        job.grid,
        job.prepared.scale,
        dict(zip(labels, poses, strict=True)),
        dict(zip(labels, receivers, strict=True)),
        found.get("history", {}),
        found.get("info", {}),
        *(dict(zip(labels, found[k], strict=True)) if k in found else {} for k in PER_STACK),
    )


def _grid_field(grid: Grid, volume: Tensor) -> GridField:
    return GridField(grid.shape, grid.affine.tolist(), volume.cpu())


def _fit_bspline(job: Job) -> Fit:
    pairs = zip(job.prepared.stacks, job.prepared.held_out, strict=True)
    volume = bspline([without(s, held).filled() for s, held in pairs], job.prepared.poses, job.grid)
    return _result(job, "bspline", _grid_field(job.grid, torch.from_numpy(volume)))


def _fit_srr(job: Job) -> Fit:
    linear = solve_linear(job, refined=False, progress=job.part(0, 1, "srr"))
    found = {"receivers": linear.state.receivers, "info": linear.info}
    return _result(job, "srr", _grid_field(job.grid, linear.volume), **found)


# ------------------------------------------------------------------------------ irem
def _fit_irem(job: Job) -> Fit:
    linear = _linear_or_saved(job)
    options = job.settings.irem
    field = ResidualField(
        job.grid.shape,
        job.grid.affine.tolist(),
        hidden=options.hidden,
        layers=options.layers,
        scale=RESIDUAL_SCALE,
        generator=torch.Generator().manual_seed(job.settings.run.random_seed),
    )
    system = build_system(job, job.grid, linear.state)
    example = _rehearsed(job, linear, system)
    field.base.volume.copy_(linear.volume)
    training = Training(
        field,
        example,
        _held_out(job, linear),
        lambda guess: reconciled(system, guess),
        job.settings,
        job.device,
    )
    path = None if job.checkpoint is None else job.checkpoint / "training.safetensors"
    training.run(path, job.settings.run.checkpoint_seconds, job.part(0.5, 1.0, "training"))
    info = linear.info | {"steps": training.steps, "parameters": _count(field)}
    info |= {"network": _use_of(training), "doubts": training.doubts}
    found = {"receivers": linear.state.receivers, "history": training.history, "info": info}
    rows = zip(job.prepared.stacks, linear.state.slice_weights, strict=True)
    weights = [np.where(np.isin(np.arange(len(w)), s.empty_slices), 0.0, w) for s, w in rows]
    found |= {"slice_weights": weights, "widths": linear.state.widths}
    if linear.info.get("motion") == "slice":
        found["slice_poses"] = linear.state.poses
    return _result(job, "irem", field, poses=_stack_poses(job, linear.state), **found)


def _rehearsed(job: Job, linear: Linear, system: System) -> Example | None:
    """What the network learns from; where slices leave gaps, they are bridged before."""
    noise = _noise(system, linear.volume)
    if not np.isfinite(noise).all():
        raise FloatingPointError("the stacks hold numbers that are not finite")
    others = [joined] if leave_gaps(system) else []
    if not others and not job.settings.irem.steps:
        return None
    examples = rehearse(job, linear, noise, others)
    if len(examples) < 2:
        return examples[0] if examples else None
    edges, spectrum = examples
    share = share_of(edges.missed, spectrum.missed)
    both = edges.blended(spectrum, share)
    linear.volume = blended(job, linear.state, linear.volume, share)
    errors = {"edges": edges.error, "spectrum": spectrum.error, "both": both.error}
    linear.info |= {"spectrum_share": share, "rehearsed_error": errors}
    return both


def _use_of(training: Training) -> str:
    if not training.field.trained:
        return "not used"
    return "reconciled" if training.best_reconciled else "as it stands"


def _stack_poses(job: Job, state: State) -> list[RigidTransform]:
    """One pose a stack: where slices moved one by one, their mean."""
    poses = []
    for stack, each in zip(job.prepared.stacks, state.poses, strict=True):
        others = tuple(a for a in range(3) if a != stack.slice_axis)
        centre = stack.grid.middle_of(stack.mask)
        poses.append(mean_pose(each, centre, stack.mask.sum(axis=others)))
    return poses


def _count(field: Field) -> int:
    return sum(p.numel() for p in field.parameters())


def _linear_or_saved(job: Job) -> Linear:
    """The linear solution with its acquisition, from the checkpoint where there is one."""
    path = None if job.checkpoint is None else job.checkpoint / "linear.safetensors"
    found = load_state(path) if path else None
    if found is not None:
        tensors, record = found
        volume = tensors["volume"].to(job.device)
        return Linear(volume, State.restored(record["state"]), dict(record["info"]))
    refined = job.settings.irem.refine_poses and job.settings.normalise.registration
    progress = job.part(0.0, 0.5, "linear")
    linear = solve_linear(job, refined=refined, progress=progress, image=restored)
    if not bool(torch.isfinite(linear.volume).all()):
        raise FloatingPointError("the linear solution is not finite; try --no-refine-poses")
    if path is not None:
        record = {"state": linear.state.record(), "info": linear.info}
        save_state(path, {"volume": linear.volume}, record)
    return linear


def _noise(system: System, volume: Tensor) -> list[float]:
    """Per stack the standard deviation of an acquired voxel's residual, outliers aside."""
    rows = zip(system.models, system.residuals(volume), strict=True)
    each = [(model.counts.sqrt() * r).abs() for model, r in rows]
    return [float(r.median()) * MAD_TO_SIGMA if len(r) else 0.0 for r in each]


def _held_out(job: Job, linear: Linear) -> Callable[[Tensor], float] | None:
    """Mean squared error of the held-out voxels, as a function of the volume (X, Y, Z)."""
    chosen = Prediction(job, job.grid, linear.state, list(job.prepared.held_out))
    if not sum(len(m.values) for m in chosen.models):
        return None
    return lambda volume: chosen.error(volume, linear.state.slice_weights)


# -------------------------------------------------------------------------- irem2021
def _fit_irem2021(job: Job) -> Fit:
    from .paper2021 import fit_paper

    options, prepared = job.settings.irem2021, job.prepared
    uses = job.uses
    if options.background:
        pairs = zip(prepared.stacks, prepared.held_out, strict=True)
        uses = [~held & ~stack.empty for stack, held in pairs]
    points, values = _voxels(prepared, uses)
    doubts: list[str] = []
    field, history = fit_paper(
        points,
        values,
        options,
        seed=job.settings.run.random_seed,
        device=job.device,
        checkpoint=job.checkpoint,
        progress=job.part(0, 1, "irem2021"),
        held_out=_voxels(prepared, list(prepared.held_out)),
        checkpoint_seconds=job.settings.run.checkpoint_seconds,
        doubts=doubts,
    )
    info = {"parameters": _count(field), "doubts": doubts}
    return _result(job, "irem2021", field, history=history, info=info)


def _voxels(prepared: Prepared, uses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 3) in reference space, mm, and scaled intensities (N,)."""
    rows = list(zip(prepared.stacks, prepared.poses, uses, strict=True))
    points = [pose.apply(s.grid.to_world(np.argwhere(use))) for s, pose, use in rows]
    return np.concatenate(points), np.concatenate([s.data[use] for s, _, use in rows])


# --------------------------------------------------------------------------- quality
def quality(
    prepared: Prepared,
    result: Fit,
    settings: Settings,
    image: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Metrics that need no truth; ``image`` is :meth:`Fit.image`, made here if not given.

    ``held_out_psnr`` (dB, peak 1 = the percentile of the foreground that intensities are
    scaled to) and ``held_out_ncc``: prediction of the voxels that were never trained on, each
    counted as its slice was in the fit (``ncc``: those of slices that count half at least).
    ``self_consistency``: per stack the NCC between acquired and predicted foreground;
    ``residual``: per stack the root mean square residual, scaled intensity.
    ``rotation_deg``, ``translation_mm``: per stack, of its pose about the head's centre.
    """
    acquired, predicted, counted = [], [], []
    consistency, residual, turn, shift = {}, {}, {}, {}
    centre = _centre(prepared)
    if image is None and result.method != "irem2021":
        image = result.image()
    for stack, held in zip(prepared.stacks, prepared.held_out, strict=True):
        seen = result.predict(stack, settings, image)
        acquired.append(stack.data[held])
        predicted.append(seen[held])
        counted.append(stack.by_slice(result.slice_weights.get(stack.label, 1.0))[held])
        consistency[stack.label] = ncc(stack.data[stack.mask], seen[stack.mask])
        error = (stack.data - seen)[stack.mask].astype(np.float64)
        residual[stack.label] = float(np.sqrt(np.mean(error**2)))
        vector = result.poses[stack.label].to_vector(centre)
        turn[stack.label] = float(np.rad2deg(np.linalg.norm(vector[:3])))
        shift[stack.label] = float(np.linalg.norm(vector[3:]))
    a, b, w = (np.concatenate(each) for each in (acquired, predicted, counted))
    total = float(w.sum())
    mean_square = float(w @ (a.astype(np.float64) - b) ** 2) / total if total > 0 else 0.0
    whole = w >= BAD
    return {
        "held_out_psnr": float(-10 * np.log10(mean_square)) if mean_square > 0 else None,
        "held_out_ncc": ncc(a[whole], b[whole]) if whole.any() else None,
        "held_out_voxels": len(a),
        "self_consistency": consistency,
        "residual": residual,
        "rotation_deg": turn,
        "translation_mm": shift,
        "gain": dict(result.gains),
    }


def _centre(prepared: Prepared) -> np.ndarray:
    stack = prepared.stacks[prepared.reference]
    return stack.grid.middle_of(stack.mask)
