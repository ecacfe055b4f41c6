# SPDX-License-Identifier: Apache-2.0
"""What the stacks hold well stays theirs: a guess is changed to agree with them.

A network may say what no stack can see, but has no say where the stacks look.  So its guess z
is reconciled with the data,

    x = argmin  1/2 sum_s || y_s - G_s A_s x ||^2_{W_s} + mu/2 || x - z ||^2,

which leaves of the guess's error e, wave by wave, mu / (mu + sum_s d_s |H_s(k)|^2) e: all of it
where every slice profile has the transfer H_s(k) = 0, next to nothing where one passes the wave
(d_s: weight of stack s per voxel of the volume).  The network is trained on just that share.
Null-space networks (Schwab, Antholzer and Haltmeier 2019, Inverse Problems 35:025008) are the
limit mu -> 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .linear import System

GUESS = 0.13  # mu over the stacks' weight per voxel; chosen on three development crops
ITERATIONS = 3  # of conjugate gradients from the guess; 8 change the PSNR by 0.003 dB


def density(system: System) -> list[float]:
    """Per stack d_s: its weight per voxel of the volume, where it looks."""
    each = []
    for model, weight in zip(system.models, system.weights(), strict=True):
        sizes = np.abs(np.linalg.det(model.rows.maps[:, :, :3]))  # of its voxels, in the volume's
        mean = float(weight.mean(dtype=torch.float64)) if len(weight) else 0.0
        each.append(mean / float(sizes.mean()))
    return each


def reconciled(system: System, guess: Tensor) -> Tensor:
    """The volume (X, Y, Z) nearest to both the stacks and the guess (X, Y, Z)."""
    strength = GUESS * sum(density(system))
    rows = list(zip(system.models, system.factors(), system.weights(), strict=True))

    def adjoint(each: list[Tensor]) -> Tensor:
        parts = system.empty_parts()
        for (model, factor, weight), values in zip(rows, each, strict=True):
            model.add_adjoint(factor * weight * values, parts)
        return parts.sum(0) * system.domain

    residual = adjoint(system.residuals(guess))
    volume, direction = guess.clone(), residual.clone()
    square = float((residual.double() ** 2).sum())
    for _ in range(ITERATIONS):
        if square <= 0:
            break
        seen = [factor * model.forward(direction) for model, factor, _ in rows]
        image = adjoint(seen) + strength * direction
        step = square / float((direction.double() * image).sum())
        volume += step * direction
        residual -= step * image
        last, square = square, float((residual.double() ** 2).sum())
        direction = residual + (square / last) * direction
    return volume


def unseen(system: System, shape: tuple[int, int, int]) -> Tensor:
    """What :func:`reconciled` leaves of a guess's error, by wave: on the frequencies of
    ``torch.fft.rfftn`` of a block of ``shape``; the middle slice of a stack stands for all."""
    sides = [torch.fft.fftfreq(n) for n in shape[:2]] + [torch.fft.rfftfreq(shape[2])]
    waves = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)  # cycles per voxel
    each = density(system)
    passed = torch.zeros(waves.shape[:-1])
    for model, amount in zip(system.models, each, strict=True):
        taps = torch.from_numpy(model.rows.steps[model.slices // 2])
        phase = 2 * np.pi * (waves @ taps.T)
        weights = torch.from_numpy(model.rows.weights)
        transfer = (torch.cos(phase) @ weights) ** 2 + (torch.sin(phase) @ weights) ** 2
        passed += amount * transfer
    strength = GUESS * sum(each)
    return (strength / (strength + passed)).to(system.domain.device)
