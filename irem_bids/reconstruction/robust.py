# SPDX-License-Identifier: Apache-2.0
"""Weights of slices from their residuals: a dropped or torn slice counts little.

Nothing is rejected in silence: the weights are part of the result.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import generic_filter
from torch import Tensor

from .acquisition import StackModel
from .linear import slice_sums

SPREAD = 0.2  # least spread of the logarithm of root mean square residuals in a sound stack
TURN = 4.25  # spreads above its neighbours at which a slice counts half
STEEP = 8.0  # of the fall from 1 to 0 about it
FEWEST = 30  # voxels that a slice's weight can be told from
WINDOW = 9  # slices that a slice is compared with


def slice_weights(model: StackModel, residual: Tensor) -> NDArray[np.float64]:
    """(K,) weights in [0, 1]: 1 / (1 + (excess / TURN)^STEEP).

    The excess is the logarithm of a slice's root mean square residual over the median of its
    neighbours', in robust spreads of the stack.  Slices with too few voxels keep 1.
    """
    counts = torch.ones_like(residual)
    sums = slice_sums(model, torch.stack([residual * residual, counts], dim=1)).numpy()
    known = sums[:, 1] >= FEWEST
    weights = np.ones(model.slices)
    if known.sum() < 5:
        return weights
    level = 0.5 * np.log(sums[known, 0] / sums[known, 1] + 1e-12)
    around = generic_filter(level, np.median, size=WINDOW, mode="nearest")
    excess = level - around
    spread = max(SPREAD, 1.4826 * float(np.median(np.abs(excess - np.median(excess)))))
    ratio = np.maximum(excess / spread / TURN, 0.0)
    weights[known] = 1.0 / (1.0 + ratio**STEEP)
    return weights
