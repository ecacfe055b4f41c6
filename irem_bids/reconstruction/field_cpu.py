# SPDX-License-Identifier: Apache-2.0
"""The learned field on the CPU: look-ups compiled when first used, gradients written out.

A batch goes in chunks that fit the cache; nothing is recorded for automatic differentiation.
The plain twin, and the oracle in the tests, is :class:`.fields.ResidualField` with autograd
(:meth:`.training.Training.loss`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .operator_cpu import compiled, in_blocks

if TYPE_CHECKING:
    from .training import Training

CHUNK = 4096  # points at a time: their activations stay in the cache


@compiled
def _look_up(table: Any, points: Any, m: Any, out: Any, ends: Any) -> None:
    nx, ny, nz, features = table.shape
    for n in range(ends[0], ends[1]):
        a, b, c = points[n, 0], points[n, 1], points[n, 2]
        x = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        y = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        z = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
        for f in range(features):
            out[n, f] = 0
        if features == 4 and 0 <= x < nx - 1 and 0 <= y < ny - 1 and 0 <= z < nz - 1:
            i, j, k = int(x), int(y), int(z)
            u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - k)
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for pair in range(4):  # four numbers that lie together, as one vector
                d, e = pair >> 1, pair & 1
                share = (u if d else 1 - u) * (v if e else 1 - v)
                near, far = table[i + d, j + e, k], table[i + d, j + e, k + 1]
                one, two = share - share * w, share * w
                s0 += one * near[0] + two * far[0]
                s1 += one * near[1] + two * far[1]
                s2 += one * near[2] + two * far[2]
                s3 += one * near[3] + two * far[3]
            out[n, 0], out[n, 1], out[n, 2], out[n, 3] = s0, s1, s2, s3
            continue
        if not (-1 < x < nx and -1 < y < ny and -1 < z < nz):
            continue
        i, j, k = int(x + 1) - 1, int(y + 1) - 1, int(z + 1) - 1
        u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - k)
        for corner in range(8):
            d, e, g = corner >> 2, corner >> 1 & 1, corner & 1
            if 0 <= i + d < nx and 0 <= j + e < ny and 0 <= k + g < nz:
                share = (u if d else 1 - u) * (v if e else 1 - v) * (w if g else 1 - w)
                for f in range(features):
                    out[n, f] += share * table[i + d, j + e, k + g, f]


@compiled
def _spread(table: Any, points: Any, m: Any, values: Any) -> None:
    """Adjoint of :func:`_look_up`: ``values`` (N, F) are added to ``table``."""
    nx, ny, nz, features = table.shape
    for n in range(len(points)):
        a, b, c = points[n, 0], points[n, 1], points[n, 2]
        x = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        y = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        z = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
        if features == 4 and 0 <= x < nx - 1 and 0 <= y < ny - 1 and 0 <= z < nz - 1:
            i, j, k = int(x), int(y), int(z)
            u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - k)
            v0, v1, v2, v3 = values[n, 0], values[n, 1], values[n, 2], values[n, 3]
            for pair in range(4):
                d, e = pair >> 1, pair & 1
                share = (u if d else 1 - u) * (v if e else 1 - v)
                one, two = share - share * w, share * w
                near, far = table[i + d, j + e, k], table[i + d, j + e, k + 1]
                near[0] += one * v0
                near[1] += one * v1
                near[2] += one * v2
                near[3] += one * v3
                far[0] += two * v0
                far[1] += two * v1
                far[2] += two * v2
                far[3] += two * v3
            continue
        if not (-1 < x < nx and -1 < y < ny and -1 < z < nz):
            continue
        i, j, k = int(x + 1) - 1, int(y + 1) - 1, int(z + 1) - 1
        u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - k)
        for corner in range(8):
            d, e, g = corner >> 2, corner >> 1 & 1, corner & 1
            if 0 <= i + d < nx and 0 <= j + e < ny and 0 <= k + g < nz:
                share = (u if d else 1 - u) * (v if e else 1 - v) * (w if g else 1 - w)
                for f in range(features):
                    table[i + d, j + e, k + g, f] += share * values[n, f]


def _nodes(table: Tensor) -> NDArray[np.float32]:
    """(1, F, X, Y, Z) as (X, Y, Z, F), without a copy where the features lie together."""
    nodes: NDArray[np.float32] = table.detach()[0].permute(1, 2, 3, 0).numpy()
    return nodes


def _to_index(to_unit: Tensor, table: Tensor) -> NDArray[np.float64]:
    """(3, 4) world, mm, to the indices of a table whose corners are the unit box's."""
    matrix: NDArray[np.float64] = to_unit.numpy().astype(np.float64)
    half = (np.array(table.shape[2:]) - 1) / 2
    matrix[:, 3] += 1
    return matrix * half[:, None]


def look_up(table: Tensor, points: Tensor, to_unit: Tensor) -> Tensor:
    """(1, F, X, Y, Z) at (N, 3) mm to (N, F), trilinear, 0 outside."""
    out = torch.empty((len(points), table.shape[1]))
    _into(table, points, to_unit, out)
    return out


def _into(table: Tensor, points: Tensor, to_unit: Tensor, out: Tensor) -> None:
    given = (_nodes(table), points.numpy(), _to_index(to_unit, table), out.numpy())
    in_blocks(len(points), torch.get_num_threads(), lambda _, ends: _look_up(*given, ends))


class Gradient:
    """Loss and gradient of a batch of a training's voxels."""

    def __init__(self, training: Training) -> None:
        self.training, self.field = training, training.field
        self.layers: list[Any] = list(self.field.network)

    def __call__(self, batch: Tensor, most: int) -> Tensor:
        """The loss; gradients go into the parameters' ``grad``.  At most ``most`` voxels at a
        time."""
        with torch.no_grad():
            for parameter in self.field.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    parameter.grad.zero_()
            batch = batch.sort().values  # neighbours in space are looked up together
            size = max(1, min(most, CHUNK // self.training.offsets.shape[1]))
            parts = [self._chunk(part, len(batch)) for part in batch.split(size)]
            return torch.stack(parts).sum()

    def _chunk(self, batch: Tensor, total: int) -> Tensor:
        training, samples, field = self.training, self.training.samples, self.field
        which, factors = samples.stack[batch], samples.factors[batch]
        points, shape = training.points(samples, batch)
        kept = [self._features(points)]
        for layer in self.layers[:-1]:
            kept.append(torch.addmm(layer.bias, kept[-1], layer.weight.T).relu_())
        last, scale = self.layers[-1], float(field.options["scale"])
        values = torch.addmm(last.bias, kept[-1], last.weight.T).reshape(shape).mul_(scale)
        weights = training.weights[which]
        error = factors * (weights * values).sum(1) - samples.targets[batch]
        slopes = (error * factors)[:, None] * weights * (2 / total)
        loss = (error * error).sum() / total
        if training.options.penalty and shape[1] > 1:
            loss += self._penalty(points, values, which, slopes, total)
        self._backward(kept, slopes.mul_(scale).reshape(-1, 1), points)
        return loss

    def _features(self, points: Tensor) -> Tensor:
        features = torch.empty((len(points), len(self.field.tables) * self.field.features))
        for level, table in enumerate(self.field.tables):
            at = slice(level * self.field.features, (level + 1) * self.field.features)
            _into(table, points, self.field.to_unit, features[:, at])
        return features

    def _penalty(
        self, points: Tensor, values: Tensor, which: Tensor, slopes: Tensor, total: int
    ) -> Tensor:
        """The penalty's part of the loss; its gradient is added to ``slopes``."""
        training, field = self.training, self.field
        whole = look_up(field.base.volume[None, None], points, field.to_unit).reshape(values.shape)
        whole += values
        step = training.steps_mm[which][:, None]
        slope = whole.diff(dim=1) / step
        root = torch.sqrt(slope**2 + training.width**2)
        strength = training.options.penalty * float(field.options["scale"])
        strength /= total * (values.shape[1] - 1)
        each = slope / root / step * strength
        slopes[:, 1:] += each
        slopes[:, :-1] -= each
        return root.sum() * strength

    def _backward(self, kept: list[Tensor], slopes: Tensor, points: Tensor) -> None:
        """From the outputs' gradient (M, 1) to those of layers and tables."""
        for layer, inputs in zip(reversed(self.layers), reversed(kept), strict=True):
            layer.weight.grad.addmm_(slopes.T, inputs)
            layer.bias.grad += slopes.sum(0)
            slopes = slopes @ layer.weight
            if inputs is not kept[0]:
                slopes = torch.ops.aten.threshold_backward(slopes, inputs, 0)
        each = self.field.features

        def work(_: int, ends: NDArray[np.int64]) -> None:
            for level in range(ends[0], ends[1]):
                table = self.field.tables[level]
                given = slopes[:, level * each : (level + 1) * each].numpy()
                matrix = _to_index(self.field.to_unit, table)
                _spread(_nodes(table.grad), points.numpy(), matrix, given)

        in_blocks(len(self.field.tables), torch.get_num_threads(), work)
