# SPDX-License-Identifier: Apache-2.0
"""Steps that change every direction of a layer alike (Muon; Jordan et al. 2024).

The gradient of a layer is dominated by a few directions, along which Adam's steps go, too.  Here
the momentum of a layer's gradient, a matrix U of outputs by inputs, is replaced by the
semi-orthogonal matrix next to it,

    (U U^T)^(-1/2) U,

all of whose singular values are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
FLOOR = 1e-7  # of the largest eigenvalue of U U^T: what is smaller is rounding


def semi_orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) to the semi-orthogonal (M, N) next to it; directions in which it is 0 stay 0.

    One that is not finite, or 0, gives 0.
    """
    gram = (matrix @ matrix.T).double()
    if not bool(torch.isfinite(gram).all()) or not bool(gram.any()):
        return torch.zeros_like(matrix)
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(FLOOR * float(values[-1])).rsqrt()
    return ((vectors * root) @ vectors.T).to(matrix.dtype) @ matrix


class Orthogonal(torch.optim.Optimizer):
    """Steps of spectral norm ``lr`` along the momentum of weights of two dimensions or more."""

    def __init__(self, weights: Iterable[Tensor], lr: float) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; there is no ``closure``."""
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad.reshape(len(weight), -1)
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                ahead = torch.lerp(gradient, state["momentum"], MOMENTUM)  # Nesterov's
                step = semi_orthogonal(ahead).reshape(weight.shape)
                weight.add_(step, alpha=-group["lr"])
