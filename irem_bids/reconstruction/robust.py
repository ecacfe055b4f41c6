# SPDX-License-Identifier: Apache-2.0
"""Weights and gains of slices from their residuals.

A dropped or torn slice counts little.  Nothing is rejected in silence: the weights are part of
the result.  A slice of a moving head may be brighter or darker than its neighbours (its spins
were excited before, or had more time to recover); that is no part of the image.
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
ALIKE = 20.0  # residuals that count as one where they speak of a slice's gain
EVEN = 0.01  # spread of the slices' gains that misfit alone brings about, in the logarithm
UNEVEN = 0.1  # largest spread of the slices' gains that is believed, in the logarithm
FARTHEST = 0.35  # largest gain that is believed, in the logarithm


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


def slice_gains(
    model: StackModel,
    residual: Tensor,
    noise: float,
    sound: NDArray[np.bool_],
    present: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """(K,) gains of slices beyond what is smooth along the stack.

    A quadratic of the slice's number is left to the stack's gain and bias.  What remains of a
    slice's factor (that of its prediction that fits it best) is drawn to 1 by how far the
    ``sound`` slices (K,) of the stack scatter, beyond what the ``noise`` (variance of a residual)
    and ``EVEN`` explain.

    Parameters
    ----------
    residual
        (N,) acquired minus predicted, with the ``present`` gains (K,), 1 where there are none.
    """
    present = np.ones(model.slices) if present is None else present
    predicted = model.values - residual
    weighted = model.counts * predicted
    products = torch.stack([weighted * model.values, weighted * predicted], dim=1)
    asked, size = slice_sums(model, products).numpy().T
    known = np.flatnonzero((np.diff(model.starts) >= FEWEST) & (size > 0) & (asked > 0))
    sound, gains = sound[known], np.ones(model.slices)
    if sound.sum() < 5:
        return gains
    variance = noise * ALIKE / size[known]
    level = np.log(present[known] * asked[known] / size[known])
    trust = (variance + UNEVEN**2) ** -0.5
    smooth = np.polynomial.Polynomial.fit(known[sound], level[sound], 2, w=trust[sound])
    level -= smooth(known)
    scatter = 1.4826 * np.median(np.abs(level[sound]))
    spread = float(np.clip(scatter**2 - np.median(variance[sound]) - EVEN**2, 0.0, UNEVEN**2))
    gains[known] = np.exp(level * spread / (spread + variance))
    gains[known[np.abs(level) > FARTHEST]] = 1.0  # dropped, not uneven
    return gains
