# SPDX-License-Identifier: Apache-2.0
"""Stacks in one space to a continuous field (paper 2.2), by any of the methods."""

from __future__ import annotations

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
from .fields import Field, GridField, ResidualField, load_model, save_model
from .geometry import Grid, RigidTransform
from .prepare import Prepared, write_json
from .registration import ncc
from .solution import Job, Linear, Prediction, build_system, solve_linear
from .stack import Stack
from .training import Progress, Samples, Training, quadratures

POINT_SAMPLED = ("bspline", "irem2021")


@dataclass
class Fit:
    """A trained field with the poses and gains that belong to it.

    ``poses``: label of a stack to its pose (scanner space to reference space);
    ``receivers``: label to gain and bias, the reference's gain is 1; ``history``: the curves
    ``step``/``loss`` and ``held_out_step``/``held_out`` (mean squared errors); ``info``:
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
            "history": self.history,
            "info": self.info,
        }

    def predict(self, stack: Stack, settings: Settings) -> NDArray[np.float32]:
        """The stack as this fit predicts it: (I, J, K) scaled intensity, 0 outside its mask.

        Methods that fit point samples predict point samples.
        """
        acquisition = settings.acquisition
        if self.method in POINT_SAMPLED:
            acquisition = replace(acquisition, profile="none")
        pose = self.poses[stack.label]
        receiver = self.receivers[stack.label].image(stack.grid, pose, self.grid.centre)
        return predict(self.field, stack, pose, receiver, acquisition)

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
        return cls(
            record["method"],
            model.field,
            model.grid,
            model.scale,
            {label: RigidTransform(m) for label, m in record["poses"].items()},
            {k: Receiver(g, np.array(record["bias"][k])) for k, g in record["gains"].items()},
            record["history"],
            record["info"],
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
    )


def _grid_field(grid: Grid, volume: Tensor) -> GridField:
    return GridField(grid.shape, grid.affine.tolist(), volume.cpu())


def _fit_bspline(job: Job) -> Fit:
    pairs = zip(job.prepared.stacks, job.prepared.held_out, strict=True)
    volume = bspline([without(s, held) for s, held in pairs], job.prepared.poses, job.grid)
    return _result(job, "bspline", _grid_field(job.grid, torch.from_numpy(volume)))


def _fit_srr(job: Job) -> Fit:
    linear = solve_linear(job, refined=False, progress=job.part(0, 1, "srr"))
    return _result(job, "srr", _grid_field(job.grid, linear.volume), info=linear.info)


# ------------------------------------------------------------------------------ irem
def _fit_irem(job: Job) -> Fit:
    linear = _linear_or_saved(job)
    train = _samples(job, linear, job.uses)
    held = _samples(job, linear, list(job.prepared.held_out))
    options = job.settings.irem
    field = ResidualField(
        job.grid.shape,
        job.grid.affine.tolist(),
        levels=options.levels,
        features=options.features,
        finest=options.finest * float(job.grid.voxel_size[0]),
        hidden=options.hidden,
        layers=options.layers,
        scale=float(train.targets.double().std()) or 1e-3,
        generator=torch.Generator().manual_seed(job.settings.run.random_seed),
    )
    field.base.volume.copy_(linear.volume)
    training = Training(
        field,
        train,
        held,
        quadratures(list(job.prepared.stacks), job.settings),
        job.settings,
        job.device,
    )
    path = None if job.checkpoint is None else job.checkpoint / "training.safetensors"
    training.run(path, job.settings.run.checkpoint_seconds, job.part(0.5, 1.0, "training"))
    info = linear.info | {"steps": training.steps, "parameters": _count(field)}
    return _result(
        job,
        "irem",
        field,
        poses=linear.system.poses,
        receivers=linear.system.receivers,
        history=training.history,
        info=info,
    )


def _count(field: Field) -> int:
    return sum(p.numel() for p in field.parameters())


def _linear_or_saved(job: Job) -> Linear:
    """The linear solution with refined poses, from the checkpoint where there is one."""
    path = None if job.checkpoint is None else job.checkpoint / "linear.safetensors"
    found = load_state(path) if path else None
    if found is None:
        refined = job.settings.irem.refine_poses and job.settings.normalise.registration
        linear = solve_linear(job, refined=refined, progress=job.part(0.0, 0.5, "linear"))
        if path is not None:
            record = {
                "poses": [p.matrix.tolist() for p in linear.system.poses],
                "gains": [r.gain for r in linear.system.receivers],
                "bias": [r.bias.tolist() for r in linear.system.receivers],
                "info": linear.info,
            }
            save_state(path, {"volume": linear.volume}, record)
        return linear
    tensors, record = found
    poses = [RigidTransform(m) for m in record["poses"]]
    receivers = [
        Receiver(gain, np.array(bias))
        for gain, bias in zip(record["gains"], record["bias"], strict=True)
    ]
    system = build_system(job, job.grid, poses, receivers)
    return Linear(tensors["volume"].to(job.device), system, dict(record["info"]))


def _samples(job: Job, linear: Linear, uses: list[np.ndarray]) -> Samples:
    """Voxels with the residual of the linear solution as their target."""
    chosen = Prediction(job, linear.system, uses)
    return Samples(
        list(job.prepared.stacks),
        uses,
        linear.system.poses,
        chosen.residuals(linear.volume),
        chosen.factors,
        job.device,
    )


# -------------------------------------------------------------------------- irem2021
def _fit_irem2021(job: Job) -> Fit:
    from .paper2021 import fit_paper

    options, prepared = job.settings.irem2021, job.prepared
    uses = job.uses
    if options.background:
        uses = [~held for held in prepared.held_out]
    points, values = _voxels(prepared, uses)
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
    )
    return _result(job, "irem2021", field, history=history, info={"parameters": _count(field)})


def _voxels(prepared: Prepared, uses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 3) in reference space, mm, and scaled intensities (N,)."""
    rows = list(zip(prepared.stacks, prepared.poses, uses, strict=True))
    points = [pose.apply(s.grid.to_world(np.argwhere(use))) for s, pose, use in rows]
    return np.concatenate(points), np.concatenate([s.data[use] for s, _, use in rows])


# --------------------------------------------------------------------------- quality
def quality(prepared: Prepared, result: Fit, settings: Settings) -> dict[str, Any]:
    """Metrics that need no truth.

    ``held_out_psnr`` (dB, peak 1 = the percentile of the foreground that intensities are
    scaled to) and ``held_out_ncc``: prediction of the voxels that were never trained on.
    ``self_consistency``: per stack the NCC between acquired and predicted foreground;
    ``residual``: per stack the root mean square residual, scaled intensity.
    ``rotation_deg``, ``translation_mm``: per stack, of its pose about the head's centre.
    """
    acquired, predicted = [], []
    consistency, residual, turn, shift = {}, {}, {}, {}
    centre = _centre(prepared)
    for stack, held in zip(prepared.stacks, prepared.held_out, strict=True):
        image = result.predict(stack, settings)
        acquired.append(stack.data[held])
        predicted.append(image[held])
        consistency[stack.label] = ncc(stack.data[stack.mask], image[stack.mask])
        error = (stack.data - image)[stack.mask].astype(np.float64)
        residual[stack.label] = float(np.sqrt(np.mean(error**2)))
        vector = result.poses[stack.label].to_vector(centre)
        turn[stack.label] = float(np.rad2deg(np.linalg.norm(vector[:3])))
        shift[stack.label] = float(np.linalg.norm(vector[3:]))
    a, b = np.concatenate(acquired), np.concatenate(predicted)
    mean_square = float(np.mean((a.astype(np.float64) - b) ** 2)) if len(a) else 0.0
    return {
        "held_out_psnr": float(-10 * np.log10(mean_square)) if mean_square > 0 else None,
        "held_out_ncc": ncc(a, b) if len(a) else None,
        "held_out_voxels": len(a),
        "self_consistency": consistency,
        "residual": residual,
        "rotation_deg": turn,
        "translation_mm": shift,
        "gain": dict(result.gains),
    }


def _centre(prepared: Prepared) -> np.ndarray:
    stack = prepared.stacks[prepared.reference]
    return stack.grid.to_world(np.argwhere(stack.mask).mean(axis=0))
