# SPDX-License-Identifier: Apache-2.0
"""Training of the default field: what the linear solution leaves unexplained.

The loss of a batch of acquired voxels, at the poses and gains that were refined with the
linear solution,

    mean (r - g sum_q w_q R(p_q))^2 + beta mean sqrt((dF_q / dz)^2 + width^2)

with r the residual of the linear solution, R the learned residual, p_q the profile's points
in reference space and dF_q differences of the whole field between neighbouring points.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..settings import Settings
from .acquisition import Quadrature, StackModel, training_quadrature
from .checkpoint import load_state, save_state
from .field_cpu import Gradient
from .fields import ResidualField
from .recovery import Pieces, Retreat, finite
from .stack import Stack

Progress = Callable[[float, str], None]
LOG_EVERY = 20  # steps
CHECKS = 8  # evaluations of the held-out voxels in all
HELD_OUT = 65536  # voxels of them at a time


class Samples:
    """Acquired voxels of all stacks, on the device: positions, targets, normals.

    Attributes
    ----------
    centres
        (N, 3) voxel centres in reference space, mm.
    targets
        (N,) residuals of the linear solution, scaled intensity.
    stack
        (N,) index of the stack.
    factors
        (N,) gain times bias.
    normals
        (N, 3) the slices' normal in reference space, times the width of the profile over the
        assumed one.
    """

    def __init__(
        self, models: list[StackModel], residuals: list[Tensor], factors: list[Tensor], device: str
    ) -> None:
        centres, normals, number = [], [], []
        for index, model in enumerate(models):
            points = model.voxels * np.float32(100.0) + model.grid.centre.astype(np.float32)
            centres.append(torch.from_numpy(points))
            along = model.poses[model.slice_of_row][:, :3, :3] @ model.normal * model.width
            normals.append(torch.from_numpy(along.astype(np.float32)))
            number.append(torch.full((len(points),), index))
        self.centres = torch.cat(centres).to(device)
        self.normals = torch.cat(normals).to(device)
        self.stack = torch.cat(number).to(device)
        self.targets = torch.cat(residuals).to(device)
        self.factors = torch.cat(factors).to(device)

    def __len__(self) -> int:
        return len(self.targets)


class Training:
    """Adam on batches of voxels; its whole state can be saved and taken up again.

    Where memory ends, a batch is computed in pieces, whose gradients sum to the same.  Where
    the loss is not finite, it steps back to the last state that was checked, at a lower rate.
    """

    def __init__(
        self,
        field: ResidualField,
        samples: Samples,
        held_out: Samples,
        quadratures: list[Quadrature],
        settings: Settings,
        device: str,
    ) -> None:
        self.field = field.to(device)
        self.samples, self.held_out, self.device = samples, held_out, device
        self.options = settings.irem
        self.offsets = _stacked([q.offsets for q in quadratures], device)
        self.weights = _stacked([q.weights for q in quadratures], device)
        self.steps_mm = torch.full((len(quadratures),), 1e-3, device=device)
        if self.offsets.shape[1] > 1:
            self.steps_mm = (self.offsets[:, 1] - self.offsets[:, 0]).clamp_min(1e-3)
        self.optimiser = torch.optim.Adam(
            [p for p in field.parameters() if p.requires_grad],
            lr=self.options.learning_rate,
            betas=(0.9, 0.99),
            eps=1e-15,
            fused=True,
        )
        on_cpu = self.samples.targets.device.type == "cpu"
        self.written = Gradient(self) if on_cpu else None
        self.random = torch.Generator().manual_seed(settings.run.random_seed)
        self.width = settings.srr.srr_huber
        self.batches = max(1, -(-len(samples) // self.options.batch_size))
        self.steps = round(self.options.epochs * self.batches)
        self.step = 0
        self.history: dict[str, list[float]] = {
            "step": [],
            "loss": [],
            "held_out_step": [],
            "held_out": [],
        }
        self.best = float("inf")
        self.best_state: dict[str, Tensor] = {}
        self.order = torch.empty(0, dtype=torch.int64)
        self.pieces, self.retreat = Pieces("training"), Retreat()
        self.evaluation = Pieces("held-out voxels")
        self.good: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @property
    def doubts(self) -> list[str]:
        """What the report should say of it."""
        return self.pieces.doubts + self.retreat.doubts

    def run(self, path: Path | None, seconds: float, progress: Progress | None) -> None:
        """All steps that are left; a checkpoint at ``path`` every ``seconds``."""
        if path is not None:
            self.resume(path)
        if self.step == 0:
            self.check()
        if self.good is None:  # resumed
            self.good = self.state()
        last = time.monotonic()
        check_every = max(1, self.steps // CHECKS)
        while self.step < self.steps:
            self.advance()
            due = self.step % check_every == 0 or self.step == self.steps
            if due and self.history["held_out_step"][-1] != self.step:
                self.check()
            if progress:
                progress(self.step / self.steps, f"step {self.step} of {self.steps}")
            if path is not None and time.monotonic() - last >= seconds:
                self.save(path)
                last = time.monotonic()
        self.field.load_state_dict(self.best_state | self._base)

    def advance(self) -> None:
        """One step of Adam; the learning rate falls to a tenth along a cosine."""
        place = self.step % self.batches
        if place == 0:
            self.order = torch.randperm(len(self.samples), generator=self.random)
        size = self.options.batch_size
        batch = self.order[place * size : (place + 1) * size].to(self.device)
        share = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * self.step / max(self.steps, 1)))
        rate = self.options.learning_rate * self.retreat.rate * float(share)
        self.optimiser.param_groups[0]["lr"] = rate
        loss = self.pieces.run(len(batch), lambda most: self.gradient(batch, most))
        self.optimiser.step()
        self.step += 1
        if self.step % LOG_EVERY == 0 or self.step == self.steps:
            value = float(loss)
            if not np.isfinite(value):
                self.step_back(value)
                return
            self.history["step"].append(self.step)
            self.history["loss"].append(value)

    def gradient(self, batch: Tensor, most: int) -> Tensor:
        """The gradient of a batch's loss, ``most`` voxels at a time, and the loss."""
        if self.written is not None:
            return self.written(batch, most)
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in batch.split(most):
            loss = self.loss(self.samples, part) * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
        return total

    def step_back(self, value: float) -> None:
        """Take up the last good state, with a lower learning rate."""
        self.retreat.step_back(value, f"step {self.step}")
        tensors, record = self.good or self.state()
        self.restore(tensors, record | {"retreat": self.retreat.record()})

    def points(self, samples: Samples, batch: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The profiles' points (B Q, 3), mm, and (B, Q)."""
        along = self.offsets[samples.stack[batch]][:, :, None] * samples.normals[batch][:, None, :]
        points = samples.centres[batch][:, None, :] + along
        return points.reshape(-1, 3), (len(batch), self.offsets.shape[1])

    def predict(self, samples: Samples, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted residual (B,), learned residual (B, Q) and the points (B Q, 3)."""
        points, shape = self.points(samples, batch)
        values = self.field.residual(points).reshape(shape)
        weights = self.weights[samples.stack[batch]]
        return samples.factors[batch] * (weights * values).sum(1), values, points

    def loss(self, samples: Samples, batch: Tensor) -> Tensor:
        """Of a batch of voxels, indices (B,)."""
        predicted, values, points = self.predict(samples, batch)
        data = torch.mean((samples.targets[batch] - predicted) ** 2)
        if self.options.penalty == 0 or values.shape[1] < 2:
            return data
        with torch.no_grad():
            base = self.field.base(points).reshape(values.shape)
        slope = (base + values).diff(dim=1) / self.steps_mm[samples.stack[batch]][:, None]
        edges = torch.sqrt(slope**2 + self.width**2).mean()
        return data + self.options.penalty * self.field.options["scale"] * edges

    def check(self) -> None:
        """Mean squared error of the held-out voxels; the best state so far is kept.

        The state is kept as a good one, too, to step back to.  Where no voxel is held out,
        the last good state is the best.
        """
        count = len(self.held_out)
        total = self.evaluation.run(min(count, HELD_OUT), self._squared_error) if count else 0.0
        error = total / max(1, count)
        if not (np.isfinite(error) and finite(self.field)):
            if self.good is None:
                raise FloatingPointError(
                    f"the error of the held-out voxels is {error} before training: the linear "
                    "solution or the stacks hold numbers that are not finite"
                )
            self.step_back(error)
            return
        self.history["held_out_step"].append(self.step)
        self.history["held_out"].append(error)
        if error < self.best or not count:
            self.best = error
            self.best_state = {
                k: v.clone() for k, v in self.field.state_dict().items() if k != "base.volume"
            }
        self.good = self.state()

    @torch.no_grad()
    def _squared_error(self, most: int) -> float:
        total = 0.0
        for batch in torch.arange(len(self.held_out), device=self.device).split(max(1, most)):
            predicted, _, _ = self.predict(self.held_out, batch)
            total += float(((self.held_out.targets[batch] - predicted).double() ** 2).sum())
        return total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all that changes: tensors, and what JSON can hold."""
        tensors = {
            f"field.{k}": v for k, v in self.field.state_dict().items() if k != "base.volume"
        }
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors |= {"random": self.random.get_state(), "order": self.order}
        record = {
            "step": self.step,
            "best": self.best,
            "history": {name: list(values) for name, values in self.history.items()},
            "pieces": self.pieces.count,
            "retreat": self.retreat.record(),
        }
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}, record

    def save(self, path: Path) -> None:
        """The whole state, so that going on gives the same numbers (on the CPU).

        A state that is not finite is none to go on from; the last one stays.
        """
        if finite(self.field):
            save_state(path, *self.state())

    def resume(self, path: Path) -> bool:
        """Take up a saved state; False where there is none."""
        found = load_state(path)
        if found is None:
            return False
        self.restore(*found)
        return True

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.field.load_state_dict(_part(tensors, "field.") | self._base)
        self.best_state = {k: v.to(self.device) for k, v in _part(tensors, "best.").items()}
        adam: dict[int, dict[str, Any]] = {}
        parameters = self.optimiser.param_groups[0]["params"]
        for name, value in _part(tensors, "adam.").items():
            index, key = name.split(".", 1)
            like = value if key == "step" else torch.empty_like(parameters[int(index)])
            adam.setdefault(int(index), {})[key] = like.copy_(value)  # laid out as its parameter
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict({**state, "state": adam})
        self.random.set_state(tensors["random"])
        self.order = tensors["order"]
        self.step, self.best = record["step"], record["best"]
        self.history = {name: list(values) for name, values in record["history"].items()}
        self.pieces.count = max(self.pieces.count, record["pieces"])
        self.retreat = Retreat(*record["retreat"])

    @property
    def _base(self) -> dict[str, Tensor]:
        return {"base.volume": self.field.base.volume}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _stacked(rows: list[np.ndarray], device: str) -> Tensor:
    return torch.from_numpy(np.stack(rows)).float().to(device)


def quadratures(stacks: list[Stack], settings: Settings) -> list[Quadrature]:
    """One quadrature a stack, all with the same number of points."""
    return [training_quadrature(settings.acquisition, stack.slice_thickness) for stack in stacks]
