# SPDX-License-Identifier: Apache-2.0
"""The forward model's three loops on a GPU, by our own kernels where there are any.

Same arguments and results as :mod:`.operator_torch`, which takes over where there are none, and
where deterministic algorithms are asked for: the kernels add in any order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import operator_torch
from .cuda import Long, kernels
from .operator_torch import DeviceRows


def forward(volume: Tensor, rows: DeviceRows) -> Tensor:
    """Volume (X, Y, Z) to predicted rows (N,)."""
    ours = kernels(volume.device)
    if ours is None:
        return operator_torch.forward(volume, rows)
    out = torch.empty(len(rows.index), device=volume.device)
    given = (volume.contiguous(), rows.index, rows.maps, rows.steps, rows.weights, out)
    ours.launch("rows_forward", len(out), *given, *_sizes(rows, volume.shape))
    return out


def adjoint(values: Tensor, rows: DeviceRows, shape: tuple[int, ...]) -> Tensor:
    """Rows (N,) to volume (X, Y, Z), the exact adjoint of :func:`forward`."""
    ours = kernels(values.device)
    if ours is None or torch.are_deterministic_algorithms_enabled():
        return operator_torch.adjoint(values, rows, shape)
    out = torch.zeros(shape, device=values.device)
    given = (values.contiguous(), rows.index, rows.maps, rows.steps, rows.weights, out)
    ours.launch("rows_adjoint", len(values), *given, *_sizes(rows, shape))
    return out


def derivatives(
    volume: Tensor, rows: DeviceRows, affine: NDArray[np.float64], pivot: NDArray[np.float64]
) -> Tensor:
    """(N, 7): as :func:`.operator_torch.derivatives`."""
    ours = kernels(volume.device)
    if ours is None:
        return operator_torch.derivatives(volume, rows, affine, pivot)
    out = torch.empty(len(rows.index), 7, device=volume.device)
    matrix = np.asarray(affine)[:3, :3]
    numbers = np.concatenate([matrix.ravel(), np.linalg.inv(matrix).ravel(), pivot])
    frame = torch.from_numpy(numbers).float().to(volume.device)
    given = (volume.contiguous(), rows.index, rows.maps, rows.steps, rows.through, rows.weights)
    sizes = _sizes(rows, volume.shape)
    ours.launch("rows_derivatives", len(out), *given, frame, out, *sizes)
    return out


def _sizes(rows: DeviceRows, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows, taps, slice axis, shape of the volume."""
    return Long(len(rows.index)), len(rows.weights), rows.axis, *shape
