# SPDX-License-Identifier: Apache-2.0
"""Steps whose singular values are all 1, against SciPy's polar decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import polar

from irem_bids.reconstruction.orthogonal import MOMENTUM, Orthogonal, semi_orthogonal


@pytest.mark.parametrize("shape", [(4, 4), (5, 40), (16, 432)])
def test_is_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape) * np.geomspace(1, 1e-2, shape[1])
    expected, _ = polar(matrix, side="left")
    found = semi_orthogonal(torch.from_numpy(matrix))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_directions_without_a_gradient_stay_without_a_step() -> None:
    matrix = torch.zeros(3, 20)
    matrix[0, 2], matrix[1, 5] = 3.0, -1e-3
    expected = torch.zeros(3, 20)
    expected[0, 2], expected[1, 5] = 1.0, -1.0
    torch.testing.assert_close(semi_orthogonal(matrix), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_and_what_is_not_finite_give_no_step(value: float) -> None:
    assert not semi_orthogonal(torch.full((3, 5), value)).any()


def test_two_steps_of_a_convolution_by_hand() -> None:
    random = torch.Generator().manual_seed(2)
    start, first, second = (torch.randn(4, 2, 3, 3, 3, generator=random) for _ in range(3))
    weight = torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last_3d))
    optimiser = Orthogonal([weight], lr=0.1)
    momentum, expected = np.zeros((4, 54)), start.double().numpy().reshape(4, 54)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimiser.step()
        each = gradient.double().numpy().reshape(4, 54)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * each
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * each
        expected = expected - 0.1 * polar(ahead, side="left")[0]
    found = weight.detach().numpy().reshape(4, 54)
    np.testing.assert_allclose(found, expected, atol=1e-5)
