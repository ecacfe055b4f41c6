# SPDX-License-Identifier: Apache-2.0
"""Checks after the fact: what fails a group, what warns, and what passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from irem_bids import interfaces, plausible
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.reconstruction.fields import GridField
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.reconstruction.optimise import Fit
from irem_bids.reconstruction.prepare import Prepared
from irem_bids.reconstruction.stack import Stack

from .. import corpus

LABELS = ("axial1", "coronal1", "sagittal1")


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    """Three stacks of the ball, scaled to 1; the ball is their foreground."""
    found = []
    for label, plane in zip(LABELS, corpus.AXES, strict=True):
        data, grid = corpus.ball(plane)
        values = (data / 400.0).astype(np.float32)
        found.append(Stack(label, values, grid, 2, 12.0, values > 0.25))
    return found


def identity() -> dict[str, RigidTransform]:
    return dict.fromkeys(LABELS, RigidTransform())


def volume() -> tuple[np.ndarray, Grid, np.ndarray]:
    """The ball itself on a grid of 5 mm."""
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    affine[:3, 3] = -5 * 11.5
    grid = Grid((24, 24, 24), affine)
    radius = np.linalg.norm(grid.to_world(np.indices(grid.shape).reshape(3, -1).T), axis=1)
    values = (1.0 / (1 + np.exp((radius - 40) / 2))).reshape(grid.shape).astype(np.float32)
    return values, grid, values > 0.25


def pairs(after: float | None) -> list[dict]:
    return [{"a": "axial1", "b": "coronal1", "before": 0.1, "after": after}]


@pytest.mark.parametrize(
    ("vector", "after", "fails", "doubts"),
    [
        ([0.1, 0, 0, 5, 0, 0], 0.2, 0, 0),
        ([0.8, 0, 0, 0, 0, 0], 0.9, 0, 1),  # a fetus that turned
        ([0.8, 0, 0, 0, 0, 0], 0.2, 1, 0),
        ([0, 0, 0, 0, 70, 0], 0.2, 1, 0),
        ([0, 0, 0, 0, 70, 0], None, 1, 0),
        ([0, 0, 0, 0, 50, 0], 0.0, 0, 0),
    ],
)
def test_poses(
    stacks: list[Stack], vector: list[float], after: float | None, fails: int, doubts: int
) -> None:
    centre = plausible.centre_of(stacks[0])
    poses = [RigidTransform(), RigidTransform.from_vector(vector, centre), RigidTransform()]
    found = plausible.judge_poses(stacks, poses, centre, pairs(after))
    assert (len(found.failures), len(found.doubts)) == (fails, doubts)
    if fails:
        with pytest.raises(UserError, match=r"coronal1 was moved by .* registration failed") as e:
            found.refuse()
        assert e.value.code is ExitCode.BAD_DATA
    else:
        found.refuse()


def test_a_sound_volume_passes(stacks: list[Stack]) -> None:
    values, grid, mask = volume()
    found = plausible.judge_volume(values, grid, mask, stacks, identity())
    assert found == plausible.Findings()


def test_volumes_that_cannot_be(stacks: list[Stack]) -> None:
    values, grid, mask = volume()
    broken = values.copy()
    broken[3, 3, 3] = np.nan
    found = plausible.judge_volume(broken, grid, mask, stacks, identity())
    assert found.failures == ("1 voxels of the result are NaN or infinite",)
    found = plausible.judge_volume(0 * values, grid, mask, stacks, identity())
    assert found.failures == ("the result has one value everywhere",)
    half = Grid((24, 24, 12), grid.affine)
    found = plausible.judge_volume(values[..., :12], half, mask[..., :12], stacks, identity())
    assert len(found.failures) == 3
    assert "of the head in axial1 lies outside the result" in found.failures[0]
    loud = np.where(values > 0.9, 4.0, values)
    found = plausible.judge_volume(loud, grid, mask, stacks, identity())
    assert found.failures == ()
    assert "goes beyond the range of the stacks by more than 25%" in found.doubts[0]


def test_empty_slices_are_told() -> None:
    (text,) = plausible.judge_slices({"axial1": [6, 8], "coronal1": []}).doubts
    assert text.startswith("axial1: 2 slice(s)") and "6, 8 (counted from 0)" in text


def test_prediction_against_plain_interpolation(stacks: list[Stack]) -> None:
    rng = np.random.default_rng(0)
    held = [(rng.random(s.data.shape) < 0.05) & s.mask for s in stacks]
    plain = plausible.interpolated_psnr(stacks, identity(), held)
    assert plain is not None and 15 < plain < 60
    good = plausible.judge_prediction(plain, stacks, identity(), held)
    assert good == plausible.Findings()
    poor = plausible.judge_prediction(plain - 3, stacks, identity(), held)
    assert poor.failures == ()  # the paper's network may be trained as briefly as anybody likes
    assert "predicted worse" in poor.doubts[0]
    none = [np.zeros_like(h) for h in held]
    assert plausible.judge_prediction(20.0, stacks, identity(), none) == plausible.Findings()
    # a slice that was rejected has no say
    torn = stacks[0].data.copy()
    torn[:, :, 5] = 0.1 * torn[:, :, 5]
    broken = [stacks[0].with_data(torn), *stacks[1:]]
    trust = {stacks[0].label: np.where(np.arange(torn.shape[2]) == 5, 0.0, 1.0)}
    every = plausible.interpolated_psnr(broken, identity(), held)
    sound = plausible.interpolated_psnr(broken, identity(), held, trust)
    assert every is not None and sound is not None and every < sound
    # what is held out must not be known
    changed = [replace(s, data=np.where(h, 9.0, s.data)) for s, h in zip(stacks, held, strict=True)]
    worse = plausible.interpolated_psnr(changed, identity(), held)
    assert worse is not None and worse < 0


def test_what_a_training_has_to_say_is_among_the_doubts(stacks: list[Stack]) -> None:
    held = tuple(np.zeros_like(stack.mask) for stack in stacks)
    prepared = Prepared(tuple(stacks), tuple(identity().values()), 0, 1.0, held, {})
    values, grid, mask = volume()
    doubts = ["training: memory ended; each batch was computed in 2 pieces"]
    field = GridField(grid.shape, grid.affine.tolist())
    result = Fit("bspline", field, grid, 1.0, identity(), {}, {}, {"doubts": doubts})
    found = interfaces._judge(prepared, result, values, grid, mask, {})
    assert found.failures == ()
    assert doubts[0] in found.doubts
