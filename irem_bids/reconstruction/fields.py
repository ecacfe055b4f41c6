# SPDX-License-Identifier: Apache-2.0
"""Continuous fields: functions of position in mm that give an intensity."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class Field(torch.nn.Module):
    """A function from reference space to scaled intensity.

    ``forward`` takes points (N, 3), float32, RAS+ mm, and returns (N,) intensities in
    scaled units.  ``config`` returns what the constructor needs, JSON-safe.
    """

    kind: ClassVar[str]

    def forward(self, points: Tensor) -> Tensor:
        """(N, 3) points in mm to (N,) intensities."""
        raise TypeError("Field is abstract: use one of its kinds")

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild the field, without its weights."""
        raise TypeError("Field is abstract: use one of its kinds")
