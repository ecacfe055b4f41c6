# SPDX-License-Identifier: Apache-2.0
"""The scores of the lesion battery on reconstructions whose score is known."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from irem_bids.reconstruction.geometry import Grid

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import lesions


@pytest.fixture(scope="module")
def perfect() -> lesions.Seen:
    """A reconstruction without fault but for noise of 2 %."""
    random = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, 3] = -31.5
    grid = Grid((64, 64, 64), affine)
    clean = np.zeros(grid.shape, np.float32)
    clean[2:-2, 2:-2, 2:-2] = 100.0
    clean += random.normal(0, 1, grid.shape).astype(np.float32)
    wanted = [(d, s) for d in (4.0, 6.0) for s in (1, -1) for _ in range(3)]
    spots = lesions.choose(clean, grid, 1, wanted[:8])
    for number, one in enumerate(spots):
        one["stacks"] = list(range(3 - number % 3))
    planted = lesions.Planted(spots, clean, grid)
    noise = [random.normal(0, 2, grid.shape).astype(np.float32) for _ in range(2)]
    head = np.zeros(grid.shape, dtype=bool)
    head[2:-2, 2:-2, 2:-2] = True
    return lesions.Seen(
        planted, clean + noise[0], planted.truth() + noise[0], clean + noise[1], head
    )


def test_each_stack_sees_its_own_lesions(perfect: lesions.Seen) -> None:
    planted = perfect.planted
    changed = [np.count_nonzero(planted.truth(k) != planted.clean) for k in range(3)]
    assert changed[0] > changed[1] > changed[2] > 0
    assert np.array_equal(planted.truth(0), planted.truth())  # the first sees all of them


def test_contrast_of_perfect_halved_and_lost_lesions(perfect: lesions.Seen) -> None:
    for share in (1.0, 0.5, 0.0):
        seen = replace(perfect, within=perfect.without + np.float32(share) * perfect.change)
        table = lesions.contrast(seen)
        found = [v for rows in table.values() for v in rows["all"].values()]
        assert len(found) >= 4
        np.testing.assert_allclose(found, share, atol=0.01)


def test_only_what_stands_out_of_noise_is_a_false_structure(perfect: lesions.Seen) -> None:
    assert lesions.false_structures(perfect)["false_structures"] == 0
    corners = 17.0 * np.array(list(itertools.product((-1, 1), repeat=3)))
    centres = np.array([one["centre"] for one in perfect.planted.lesions])
    apart = np.linalg.norm(corners[:, None] - centres, axis=2).min(axis=1)
    centre = corners[np.argmax(apart)]
    assert apart.max() > 15
    spot = lesions.paint(perfect.within, perfect.planted.grid, [
        {"centre": centre, "diameter": 5.0, "sign": 1}
    ])  # fmt: skip
    found = lesions.false_structures(replace(perfect, within=spot))
    assert found["false_structures"] == 1
    assert found["largest_change_over_largest_noise"] > 2
    # what another random start makes in the same size is the method's chance, not the lesion's work
    for share, count in ((0.9, 1), (1.1, 0)):
        chance = perfect.without + np.float32(share) * (spot - perfect.within)
        again = lesions.false_structures(replace(perfect, within=spot, retrained=chance))
        assert again["false_structures"] == 1
        assert again["false_structures_beyond_retraining"] == count


def test_an_asymmetry_stays_on_its_side(perfect: lesions.Seen) -> None:
    planted = lesions.planted_asymmetry(perfect.planted.clean, perfect.planted.grid, 3, 1)
    seen = replace(perfect, planted=planted, within=planted.truth() + perfect.noise * 0)
    seen = replace(seen, without=planted.clean)
    found = lesions.asymmetry(seen)
    assert found["recovered"] == pytest.approx(1)
    assert found["on_the_other_side"] == 0
    swapped = replace(seen, within=seen.within[::-1])
    assert lesions.asymmetry(swapped)["on_the_other_side"] > 0.9
