# SPDX-License-Identifier: Apache-2.0
"""The network of Wu et al. (MICCAI 2021, "IREM"), exactly as the paper has it.

Eighteen fully connected layers, each followed by batch normalisation and ReLU; Fourier
features of the position (2L = 256) go in, and again beside the activations of the 6th and
the 12th layer, so that the 1st, 7th and 13th layers have 256, 512 and 512 inputs.  What
the paper leaves open is decided here or by a setting of ``Irem2021``:

- The 18th layer is the one that gives the intensity (256 inputs, 1 output); what follows
  it is ``output_activation``.
- Positions are centred on the box of the training points and divided by half its longest
  side, so that one cycle of a feature is equally long along the three axes; then
  multiplied by ``coordinate_range``.
- An epoch is one pass in random order.  The last, incomplete batch of an epoch is left
  out (batch normalisation of a few voxels is noise; each epoch leaves out others), unless
  there are fewer voxels than one batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import Irem2021
from .checkpoint import load_state, save_state
from .fields import Field
from .recovery import Pieces, Retreat, finite

LOGGER = logging.getLogger(__name__)
LAYERS = 18
SKIPS = (6, 12)  # the network's input is put beside the activation of these layers
BETAS, EPSILON = (0.9, 0.999), 1e-8
CHECKPOINT = "irem2021.safetensors"
ARCHITECTURE = ("fourier_features", "fourier_sigma", "coordinate_range", "width")
CHUNK = 65536  # points per step of an evaluation
BEFORE_RECORDING = 10  # steps, in which the libraries choose and set up what they need

Progress = Callable[[float, str], None]
Points = NDArray[np.floating]


class PaperNetwork(Field):
    """The paper's continuous field.

    Parameters
    ----------
    centre, half_extent
        Box of the positions: its middle (3,) in mm and half its longest side in mm.
    network
        The settings of the paper's network (or a mapping of some of them, as
        :meth:`config` returns them).
    generator
        Source of B and of the initial weights; a fixed seed if not given.
    """

    kind: ClassVar[str] = "irem2021"
    centre: Tensor
    frequencies: Tensor

    def __init__(
        self,
        centre: tuple[float, float, float],
        half_extent: float,
        network: Irem2021 | Mapping[str, Any] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, Irem2021):
            network = Irem2021(**(network or {}))
        if network.fourier_features % 2:
            raise ValueError(
                f"fourier_features is {network.fourier_features}; expected an even number (2L)"
            )
        self.settings, self.half_extent = network, float(half_extent)
        random = generator or torch.Generator().manual_seed(0)
        half = network.fourier_features // 2
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32))
        # B of the paper, (L, 3)
        self.register_buffer(
            "frequencies", network.fourier_sigma * torch.randn(half, 3, generator=random)
        )
        self.linears, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
        for number in range(1, LAYERS + 1):
            last = number == LAYERS
            inputs = network.fourier_features if number == 1 else network.width
            inputs += network.fourier_features if number - 1 in SKIPS else 0
            outputs = 1 if last else network.width
            linear = torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs)
            _initialise(linear, network.initialisation, random)
            self.linears.append(linear)
            if not last or network.output_activation == "batchnorm-relu":
                self.norms.append(torch.nn.BatchNorm1d(outputs))
        self._folded: list[tuple[Tensor, Tensor]] | None = None
        self.register_load_state_dict_post_hook(lambda module, _keys: module._unfold())

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        kept = (*ARCHITECTURE, "output_activation", "initialisation")
        return {
            "centre": self.centre.tolist(),
            "half_extent": self.half_extent,
            "network": {name: getattr(self.settings, name) for name in kept},
        }

    def features(self, points: Tensor) -> Tensor:
        """Equation 2: (N, 3) positions in mm to (N, 2L) ``[cos, sin](2 pi B p)``."""
        scaled = (points - self.centre) * (self.settings.coordinate_range / self.half_extent)
        phase = 2 * math.pi * scaled @ self.frequencies.T
        return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)

    def forward(self, points: Tensor) -> Tensor:
        """(N, 3) points in mm to (N,) scaled intensities; not training, batch-norm is folded."""
        features = self.features(points)
        activation = features
        folded = None if self.training else self._fold()
        for number in range(1, LAYERS + 1):
            if number - 1 in SKIPS:
                activation = torch.cat([activation, features], dim=-1)
            if folded is None:
                activation = self.linears[number - 1](activation)
                if number <= len(self.norms):
                    activation = self.norms[number - 1](activation)
            else:
                weight, bias = folded[number - 1]
                activation = torch.nn.functional.linear(activation, weight, bias)
            if number < LAYERS or self.settings.output_activation != "none":
                activation = torch.relu(activation)
        return activation[:, 0]

    def train(self, mode: bool = True) -> PaperNetwork:
        """Switch between training and inference."""
        self._unfold()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._unfold()
        return super()._apply(fn, recurse)

    def _unfold(self) -> None:
        self._folded = None

    def _fold(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer with the batch normalisation behind it multiplied in."""
        if self._folded is None:
            pairs = []
            with torch.inference_mode(False), torch.no_grad():
                for index, layer in enumerate(self.linears):
                    linear = cast(torch.nn.Linear, layer)
                    weight, bias = linear.weight.double(), linear.bias.double()
                    if index < len(self.norms):
                        norm = cast(torch.nn.BatchNorm1d, self.norms[index])
                        mean, variance = norm.running_mean, norm.running_var
                        scale = norm.weight / torch.sqrt(cast(Tensor, variance).double() + norm.eps)
                        weight = weight * scale[:, None]
                        bias = (bias - cast(Tensor, mean)) * scale + norm.bias
                    pairs.append((weight.to(linear.weight.dtype), bias.to(linear.bias.dtype)))
            self._folded = pairs
        return self._folded


def _initialise(linear: torch.nn.Linear, how: str, random: torch.Generator) -> None:
    """Initial weights from ``random``: 'kaiming' (uniform, ReLU gain, no bias) or 'torch'."""
    if how == "kaiming":
        torch.nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu", generator=random)
        torch.nn.init.zeros_(linear.bias)
    else:
        bound = 1 / math.sqrt(linear.in_features)
        torch.nn.init.uniform_(linear.weight, -bound, bound, generator=random)
        torch.nn.init.uniform_(linear.bias, -bound, bound, generator=random)


def learning_rate(settings: Irem2021, epoch: int) -> float:
    """Learning rate of an epoch (from 0): halved every ``decay_every`` epochs."""
    return settings.learning_rate_2021 * 0.5 ** (epoch // settings.decay_every)


def fit_paper(
    points: Points,
    values: Points,
    settings: Irem2021,
    *,
    seed: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    held_out: tuple[Points, Points] | None = None,
    checkpoint_seconds: float = 60.0,
    doubts: list[str] | None = None,
) -> tuple[PaperNetwork, dict[str, list[float]]]:
    """Train the paper's network on point samples.

    Parameters
    ----------
    points, values
        (N, 3) positions in reference space, mm, and (N,) scaled intensities.
    seed
        Of B, the initial weights and the order of the voxels.
    checkpoint
        Folder of the checkpoint, written about every ``checkpoint_seconds`` and at the
        end.  A run that finds one of the same data, settings and seed goes on from it, on
        the CPU to the bit.
    progress
        Called after each epoch with the fraction done and a line of text.
    held_out
        Points and values that are only predicted, for the curve.
    doubts
        Gets what a report should say: memory that ended, a loss that was not finite.

    Returns
    -------
    The network, ready for inference, and its history: ``loss`` (mean of an epoch) at
    ``step``, ``held_out`` (mean squared error) at ``held_out_step``.
    """
    if len(points) < 2 or np.shape(points) != (len(values), 3):
        raise ValueError(
            f"points {np.shape(points)} and values {np.shape(values)}; expected (N, 3) and (N,), "
            "N at least 2"
        )
    training = _Training(points, values, settings, seed, torch.device(device))
    store = None
    if checkpoint is not None:
        store = Path(checkpoint) / CHECKPOINT
        training.resume(store)
    saved = time.monotonic()
    while training.epoch < settings.epochs_2021:
        training.step()
        if training.batch == 0:
            _end_of_epoch(training, settings, held_out, progress)
        if store is not None and time.monotonic() - saved >= checkpoint_seconds:
            training.save(store)
            saved = time.monotonic()
    if store is not None:
        training.save(store)
    training.network.eval()
    if doubts is not None:
        doubts += training.pieces.doubts + training.retreat.doubts
    return training.network, training.history


def _end_of_epoch(
    training: _Training,
    settings: Irem2021,
    held_out: tuple[Points, Points] | None,
    progress: Progress | None,
) -> None:
    """Note the held-out error (about 200 times in all) and report."""
    every = max(1, settings.epochs_2021 // 200)
    done = training.epoch == settings.epochs_2021
    due = done or training.epoch % every == 0
    due = due and training.steps not in [0, *training.history["held_out_step"][-1:]]
    if held_out is not None and len(held_out[1]) and due:
        error = training.evaluation.run(
            CHUNK, lambda most: _mean_squared_error(training.network, *held_out, most)
        )
        training.history["held_out_step"].append(training.steps)
        training.history["held_out"].append(error)
    if progress is not None and training.history["loss"]:
        text = f"epoch {training.epoch} of {settings.epochs_2021}"
        text += f", loss {training.history['loss'][-1]:.5f}"
        progress(training.epoch / settings.epochs_2021, text)


def _mean_squared_error(network: PaperNetwork, points: Points, values: Points, most: int) -> float:
    """``most`` points at a time."""
    network.eval()
    total, device = 0.0, network.centre.device
    with torch.no_grad():
        for start in range(0, len(values), most):
            piece = slice(start, start + most)
            where = torch.as_tensor(np.asarray(points[piece], dtype=np.float32), device=device)
            found = network(where).cpu().numpy().astype(np.float64)
            total += float(np.sum((found - values[piece]) ** 2))
    network.train()
    return total / len(values)


class _Recorded:
    """A step of a training as a CUDA graph; ``take`` takes the (``size``,) voxels' numbers.

    What it reads and writes beside them stays where it is: weights, moments, rate, loss.
    """

    def __init__(self, take: Callable[[Tensor], None], size: int, device: torch.device) -> None:
        self.picked = torch.zeros(size, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):  # nothing is computed yet
            take(self.picked)

    def run(self, picked: Tensor) -> None:
        """The step on these voxels."""
        self.picked.copy_(picked)
        self.graph.replay()


class _Training:
    """Network, optimiser, data and where the training stands."""

    def __init__(
        self, points: Points, values: Points, settings: Irem2021, seed: int, device: torch.device
    ) -> None:
        low, high = np.min(points, axis=0), np.max(points, axis=0)
        centre = tuple(float(v) for v in (low + high) / 2)
        extent = max(float((high - low).max()) / 2, 1e-6)
        random = torch.Generator().manual_seed(seed)
        network = PaperNetwork(
            (centre[0], centre[1], centre[2]), extent, settings, generator=random
        )
        self.network = network.to(device).train()
        gpu, rate = device.type == "cuda", settings.learning_rate_2021
        # a recorded step sees the rate change only if it is a tensor
        self.optimiser = torch.optim.Adam(
            self.network.parameters(),
            lr=torch.tensor(rate, device=device) if gpu else rate,
            betas=BETAS,
            eps=EPSILON,
            fused=gpu,
            capturable=gpu,
        )
        self.points = torch.as_tensor(np.asarray(points, dtype=np.float32), device=device)
        self.values = torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)
        self.settings, self.seed, self.device = settings, seed, device
        self.size = min(settings.batch_size_2021, len(values))
        self.batches = len(values) // self.size
        self.random = torch.Generator(device=device).manual_seed(seed + 1)
        self.epoch = self.batch = self.steps = self.taken = 0
        self.history: dict[str, list[float]] = {
            "step": [],
            "loss": [],
            "held_out_step": [],
            "held_out": [],
        }
        self.pieces, self.retreat = Pieces("training"), Retreat()
        self.evaluation = Pieces("held-out voxels")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.recorded: _Recorded | None = None
        self._begin_epoch()
        self.good = self.state()

    def _begin_epoch(self) -> None:
        self.before = self.random.get_state()  # what the order of this epoch is drawn from
        self.order = torch.randperm(len(self.values), generator=self.random, device=self.device)
        self.loss_sum.zero_()
        rate = learning_rate(self.settings, self.epoch) * self.retreat.rate
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self) -> None:
        """One batch; after the last one the next epoch begins (``batch`` is 0).

        On a GPU the first steps are made one by one, then one is recorded and run again and
        again: its 200 small kernels take less time than Python to ask for them.
        """
        picked = self.order[self.batch * self.size : (self.batch + 1) * self.size]
        if self.recorded is not None:
            self.recorded.run(picked)
        else:
            self._take(picked)
        self.steps += 1
        self.taken += 1
        if self.taken == BEFORE_RECORDING and self.device.type == "cuda":
            self._record()
        self.batch += 1
        if self.batch == self.batches:
            self._close_epoch(float(self.loss_sum) / self.batches)

    def _take(self, picked: Tensor) -> None:
        loss = self.pieces.run(len(picked), lambda most: self._gradient(picked, most))
        self.optimiser.step()
        self.loss_sum += loss

    def _record(self) -> None:
        """Record a step, unless memory is short or bits must be the same."""
        if self.pieces.count > 1 or torch.are_deterministic_algorithms_enabled():
            return
        try:
            self.recorded = _Recorded(self._take, self.size, self.device)
        except RuntimeError as error:
            LOGGER.warning("a step cannot be recorded, going on one by one: %s", error)

    def _gradient(self, picked: Tensor, most: int) -> Tensor:
        """The gradient of a batch's loss, about ``most`` voxels at a time, and the loss.

        Each piece is normalised by itself where there are several.
        """
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in picked.tensor_split(-(-len(picked) // most)):
            predicted = self.network(self.points[part])
            loss = torch.nn.functional.mse_loss(predicted, self.values[part])
            loss = loss * (len(part) / len(picked))
            loss.backward()
            total += loss.detach()
        return total

    def _close_epoch(self, loss: float) -> None:
        """Keep the state; where it is not finite, step back to the last epoch that was."""
        if not (math.isfinite(loss) and finite(self.network)):
            self.retreat.step_back(loss, f"epoch {self.epoch + 1}")
            tensors, where = self.good
            self.restore(tensors, where | {"retreat": self.retreat.record()})
            return
        self.history["step"].append(self.steps)
        self.history["loss"].append(loss)
        self.epoch, self.batch = self.epoch + 1, 0
        self._begin_epoch()
        self.good = self.state()

    @cached_property
    def identity(self) -> str:
        """Hash of the data, the settings and the seed (the number of epochs may grow)."""
        settings = dataclasses.asdict(self.settings)
        del settings["epochs_2021"]
        key = hashlib.sha256(json.dumps([settings, self.seed], sort_keys=True).encode())
        for tensor in (self.points, self.values):
            key.update(tensor.cpu().numpy().tobytes())
        return key.hexdigest()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all that changes: tensors, and what JSON can hold."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in state.items()}
        tensors |= {"random": self.before, "loss_sum": self.loss_sum}
        where = {
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.steps,
            "history": {name: list(values) for name, values in self.history.items()},
            "pieces": self.pieces.count,
            "retreat": self.retreat.record(),
        }
        return {name: t.detach().clone().contiguous() for name, t in tensors.items()}, where

    def restore(self, tensors: dict[str, Tensor], where: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.network.load_state_dict(
            {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value.clone()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.recorded, self.taken = None, 0  # it was of other tensors
        self.epoch, self.batch, self.steps = where["epoch"], where["batch"], where["steps"]
        self.history = {name: list(values) for name, values in where["history"].items()}
        self.pieces.count = max(self.pieces.count, where["pieces"])
        self.retreat = Retreat(*where["retreat"])
        self.random.set_state(tensors["random"].cpu())
        self._begin_epoch()
        self.loss_sum += tensors["loss_sum"]

    def save(self, path: Path) -> None:
        """Write the whole state to ``path``, whole or not at all.

        A state that is not finite is none to go on from; the last one stays.
        """
        if not finite(self.network):
            return
        tensors, where = self.state()
        save_state(path, tensors, {"identity": self.identity, **where})

    def resume(self, path: Path) -> bool:
        """Take the state from ``path`` if it is there and belongs to this training."""
        found = load_state(path)
        if found is None:
            return False
        tensors, where = found
        if where["identity"] != self.identity or where["epoch"] > self.settings.epochs_2021:
            return False
        self.restore({name: t.to(self.device) for name, t in tensors.items()}, where)
        self.good = self.state()
        return True
