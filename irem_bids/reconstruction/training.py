# SPDX-License-Identifier: Apache-2.0
"""Training of the default field: what the linear solution misses (:mod:`.rehearsal`).

The loss of a batch of blocks of the example is the mean of (P (R - m))^2 over its mask, with m
what the solver missed of the simulated scan's known image, R what the network adds and P the
share of an error that the stacks leave (:mod:`.consistency`); blocks are mirrored at random.
What the network adds is used, reconciled with the stacks, if with it the held-out voxels of the
real scan are predicted better than without; if not, as it stands if that predicts them better:
on a head with less detail than the stacks have noise, their word brings the noise back.
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
from .checkpoint import load_state, save_state
from .fields import ResidualField
from .orthogonal import Orthogonal
from .recovery import Pieces, Retreat, finite
from .rehearsal import Example
from .solution import Progress

LOG_EVERY = 20  # steps
CHECKS = 8  # states to step back to
BLOCK = 24  # voxels of a block's edge
WARM = 20  # steps in which the learning rate rises
ORTHOGONAL_RATE = 8.3  # of the hidden layers' steps, over the learning rate
LAST_RATE = 0.02  # of the learning rate, at the end
VOLUMES = ("base.volume", "correction")  # of a field: not among what training changes


class Training:
    """Steps on blocks of the example; its whole state can be saved and taken up again.

    The hidden layers take semi-orthogonal steps (:mod:`.orthogonal`), the last one and the
    biases Adam's.

    Where memory ends, a batch is computed in pieces, whose gradients sum to the same.  Where
    the loss is not finite, it steps back to the last state that was checked, at a lower rate.

    ``held_out`` gives the mean squared error of the held-out voxels for a volume (X, Y, Z) on
    the field's grid; None where there are none.  ``reconcile`` brings a volume back to the stacks
    (:func:`.consistency.reconciled`).
    """

    def __init__(
        self,
        field: ResidualField,
        example: Example | None,
        held_out: Callable[[Tensor], float] | None,
        reconcile: Callable[[Tensor], Tensor],
        settings: Settings,
        device: str,
    ) -> None:
        self.field, self.reconcile = field.to(device), reconcile
        self.held_out, self.device, self.options = held_out, device, settings.irem
        hidden = [w for w in field.network.parameters() if w.dim() > 1][:-1]
        rest = [w for w in field.network.parameters() if not any(w is other for other in hidden)]
        rate = self.options.learning_rate
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "orthogonal": Orthogonal(hidden, lr=ORTHOGONAL_RATE * rate),
            "adam": torch.optim.Adam(rest, lr=rate, betas=(0.9, 0.99)),
        }
        self.random = torch.Generator().manual_seed(settings.run.random_seed)
        self.steps = self.options.steps
        if example is not None:
            self._blocks(example)
        if example is None or not len(self.corners):
            self.steps = 0
        self.step = 0
        self.history: dict[str, list[float]] = {
            "step": [],
            "loss": [],
            "held_out_step": [],
            "held_out": [],
        }
        self.best = float("inf")
        self.best_state: dict[str, Tensor] = {}
        self.best_reconciled = True
        self.best_volumes: dict[str, Tensor] = {}  # of this run; what was resumed has none yet
        self.pieces, self.retreat = Pieces("training"), Retreat()
        self.good: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def _blocks(self, example: Example) -> None:
        """Where blocks may lie: those whose middle counts."""
        edge = self.field.reach
        self.size = [min(BLOCK, n) for n in example.mask.shape]
        self.solution = torch.nn.functional.pad(example.solution[None, None], (edge,) * 6)[0, 0]
        self.missing, self.mask = example.missing, example.mask.float()
        self.unseen = example.unseen((self.size[0], self.size[1], self.size[2]))
        low = [n // 2 for n in self.size]
        room = [m - n + 1 for m, n in zip(example.mask.shape, self.size, strict=True)]
        middle = example.mask
        for axis in range(3):
            middle = middle.narrow(axis, low[axis], room[axis])
        self.corners = middle.nonzero().cpu()

    @property
    def doubts(self) -> list[str]:
        """What the report should say of it."""
        return self.pieces.doubts + self.retreat.doubts

    def run(self, path: Path | None, seconds: float, progress: Progress | None) -> None:
        """All steps that are left; a checkpoint at ``path`` every ``seconds``."""
        if path is not None:
            self.resume(path)
        if self.step == 0:
            self.judge()
        if self.good is None:
            self.good = self.state()
        last = time.monotonic()
        check_every = max(1, self.steps // CHECKS)
        while self.step < self.steps:
            self.advance()
            if self.step % check_every == 0 or self.step == self.steps:
                self.check()
            if progress:
                progress(self.step / self.steps, f"step {self.step} of {self.steps}")
            if path is not None and time.monotonic() - last >= seconds:
                self.save(path)
                last = time.monotonic()
        if self.history["held_out_step"][-1] != self.step:
            self.judge()
        self.field.load_state_dict(self.best_state | self._volumes)
        if self.best_volumes:
            self.field.correction.copy_(self.best_volumes["correction"])
            self.field.whole = self.best_volumes["whole"]
        else:
            self.field.settle(self.reconcile if self.best_reconciled else None)

    def advance(self) -> None:
        """One step; the learning rates rise, then fall along a cosine."""
        count = self.options.batch_size
        picked = torch.randint(len(self.corners), (count,), generator=self.random)
        mirrored = torch.randint(2, (count, 3), generator=self.random).bool().tolist()
        place = list(zip(self.corners[picked].tolist(), mirrored, strict=True))
        half = 0.5 * (1 + np.cos(np.pi * self.step / self.steps))
        share = (LAST_RATE + (1 - LAST_RATE) * float(half)) * min(1.0, (self.step + 1) / WARM)
        rate = self.options.learning_rate * self.retreat.rate * share
        self.optimisers["orthogonal"].param_groups[0]["lr"] = ORTHOGONAL_RATE * rate
        self.optimisers["adam"].param_groups[0]["lr"] = rate
        voxels = int(np.prod(self.size))
        loss = self.pieces.run(count * voxels, lambda most: self.gradient(place, most // voxels))
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.step += 1
        if self.step % LOG_EVERY == 0 or self.step == self.steps:
            value = float(loss)
            if not np.isfinite(value):
                self.step_back(value)
                return
            self.history["step"].append(self.step)
            self.history["loss"].append(value)

    def gradient(self, place: list[tuple[list[int], list[bool]]], most: int) -> Tensor:
        """The gradient of a batch's loss, ``most`` blocks at a time, and the loss."""
        self.field.zero_grad(set_to_none=True)
        total, most = torch.zeros((), device=self.device), max(1, most)
        solutions, missing, masks = self.batch(place)
        counted = masks.sum().clamp_min(1.0)
        for first in range(0, len(place), most):
            part = slice(first, first + most)
            error = masks[part] * (self.field.missing(solutions[part]) - missing[part])
            waves = torch.fft.rfftn(error, dim=(1, 2, 3)) * self.unseen
            left = torch.fft.irfftn(waves, s=self.size, dim=(1, 2, 3))
            loss = (left**2).sum() / counted / self.field.options["scale"] ** 2
            loss.backward()
            total += loss.detach()
        return total

    def batch(self, place: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, ...) blocks of the solution (with margin), of what it missed, and of the mask."""
        rows: tuple[list[Tensor], ...] = ([], [], [])
        margin = 2 * self.field.reach
        for corner, mirrored in place:
            flips = [axis for axis in range(3) if mirrored[axis]]
            for row, volume, more in zip(
                rows, (self.solution, self.missing, self.mask), (margin, 0, 0), strict=True
            ):
                box = tuple(slice(a, a + n + more) for a, n in zip(corner, self.size, strict=True))
                row.append(volume[box].flip(flips))
        return torch.stack(rows[0]), torch.stack(rows[1]), torch.stack(rows[2])

    def step_back(self, value: float) -> None:
        """Take up the last good state, with a lower learning rate."""
        self.retreat.step_back(value, f"step {self.step}")
        tensors, record = self.good or self.state()
        self.restore(tensors, record | {"retreat": self.retreat.record()})

    def check(self) -> None:
        """Keep the state as one to step back to, or step back; at the end, judge it."""
        if not finite(self.field):
            self.step_back(float("nan"))
            return
        if self.step == self.steps:
            self.judge()
        else:
            self.good = self.state()

    def judge(self) -> None:
        """Error of the held-out voxels; the state stays the best if it is the least so far.

        Where no voxel is held out, the last state, reconciled, is the best.
        """
        error = self._judged(reconciled=True)
        if not np.isfinite(error):
            if not self.step:
                raise FloatingPointError(
                    f"the error of the held-out voxels is {error} before training: the linear "
                    "solution or the stacks hold numbers that are not finite"
                )
            self.step_back(error)
            return
        if error > self.best and self.field.trained:
            error = min(error, self._judged(reconciled=False))
        self.history["held_out_step"].append(self.step)
        self.history["held_out"].append(error)

    def _judged(self, *, reconciled: bool) -> float:
        """Error of the present state, settled in one of two ways; it may become the best."""
        volume = self.field.settle(self.reconcile if reconciled else None)
        error = self.held_out(volume) if self.held_out else 0.0
        if error < self.best or not self.held_out:
            self.best, self.best_reconciled = error, reconciled
            self.best_volumes = {"correction": self.field.correction.clone(), "whole": volume}
            self.best_state = {
                k: v.clone() for k, v in self.field.state_dict().items() if k not in VOLUMES
            }
        return error

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all that changes: tensors, and what JSON can hold."""
        tensors = {f"field.{k}": v for k, v in self.field.state_dict().items() if k not in VOLUMES}
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors |= {"random": self.random.get_state()}
        record = {
            "step": self.step,
            "best": self.best,
            "best_reconciled": self.best_reconciled,
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
        self.field.load_state_dict(_part(tensors, "field.") | self._volumes)
        self.best_state = {k: v.to(self.device) for k, v in _part(tensors, "best.").items()}
        self.best_volumes = {}
        for name, optimiser in self.optimisers.items():
            found: dict[int, dict[str, Any]] = {}
            for entry, value in _part(tensors, f"{name}.").items():
                index, key = entry.split(".", 1)
                found.setdefault(int(index), {})[key] = value.clone()
            optimiser.load_state_dict({**optimiser.state_dict(), "state": found})
        self.random.set_state(tensors["random"])
        self.step, self.best = record["step"], record["best"]
        self.best_reconciled = record["best_reconciled"]
        self.history = {name: list(values) for name, values in record["history"].items()}
        self.pieces.count = max(self.pieces.count, record["pieces"])
        self.retreat = Retreat(*record["retreat"])

    @property
    def _volumes(self) -> dict[str, Tensor]:
        return {name: v for name, v in self.field.state_dict().items() if name in VOLUMES}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
