# SPDX-License-Identifier: Apache-2.0
"""Can the result be true?  Checks after the fact: some fail the group, the others warn.

A check that fails a group is one that no head can pass: a pose far from the header with
which the stacks do not even agree, a result that is not finite, a head that lies outside
the result.  All else is a doubt, which goes into the sidecar and the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, spline_filter

from .exitcodes import ExitCode, UserError
from .reconstruction.baselines import without
from .reconstruction.geometry import Grid, RigidTransform
from .reconstruction.stack import Stack

FAR_DEGREES, FAR_MM = 45.0, 60.0  # of a stack's pose about the head's centre, from the header
AGREEING = 0.5  # mean correlation with the other stacks that a far pose needs
OUTSIDE_FAILS, OUTSIDE_TOLD = 0.1, 0.005  # share of the foreground outside the result
RANGE_SLACK = 0.25  # of the stacks' range, that the result may go beyond it
RANGE_SHARE = 0.001  # of the result's foreground, that may go further
PSNR_DROP = 0.5  # dB below plain interpolation


@dataclass(frozen=True)
class Findings:
    """What fails the group, and what is doubtful."""

    failures: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def refuse(self) -> None:
        """Raise the first failure.

        Raises
        ------
        UserError
            The group fails (65).
        """
        if self.failures:
            raise UserError("; ".join(self.failures), ExitCode.BAD_DATA)


def judge_poses(
    stacks: Sequence[Stack],
    poses: Sequence[RigidTransform],
    centre: NDArray[np.float64],
    pairs: Sequence[Mapping[str, Any]],
) -> Findings:
    """Poses further than plausible from the headers.

    ``pairs`` has the correlation ``after`` registration of each pair of labels ``a``, ``b``.
    A far pose with which the stack agrees with the others is a doubt: a head can turn.
    """
    failures, doubts = [], []
    for stack, pose in zip(stacks, poses, strict=True):
        vector = pose.to_vector(centre)
        turn = float(np.rad2deg(np.linalg.norm(vector[:3])))
        shift = float(np.linalg.norm(vector[3:]))
        if turn <= FAR_DEGREES and shift <= FAR_MM:
            continue
        own = [p.get("after") for p in pairs if stack.label in (p.get("a"), p.get("b"))]
        known = [float(v) for v in own if v is not None and np.isfinite(v)]
        agreement = float(np.mean(known)) if known else 0.0
        text = (
            f"{stack.label} was moved by {shift:.0f} mm and {turn:.0f}° from where its header "
            f"puts it (agreement with the others {agreement:.2f})"
        )
        if agreement < AGREEING:
            failures.append(f"{text}: its registration failed; check that it is of this head")
        else:
            doubts.append(f"{text}: look at it")
    return Findings(tuple(failures), tuple(doubts))


def judge_slices(empty: Mapping[str, Sequence[int]]) -> Findings:
    """Slices that hold one value only and are left out; ``empty``: per label those acquired."""
    return Findings(
        doubts=tuple(
            f"{label}: {len(slices)} slice(s) with one value only left out, as dropped: "
            f"{', '.join(map(str, slices))} (counted from 0)"
            for label, slices in empty.items()
            if slices
        )
    )


def judge_volume(
    values: NDArray[np.float32],
    grid: Grid,
    mask: NDArray[np.bool_],
    stacks: Sequence[Stack],
    poses: Mapping[str, RigidTransform],
) -> Findings:
    """A result (X, Y, Z), scaled intensity as in the stacks, that cannot be."""
    failures, doubts = [], []
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        return Findings((f"{count} voxels of the result are NaN or infinite",))
    inside = values[mask]
    if inside.size == 0 or float(np.ptp(inside)) == 0.0:
        return Findings(("the result has one value everywhere",))
    for stack in stacks:
        share = _outside(stack, poses[stack.label], grid)
        if share > OUTSIDE_FAILS:
            failures.append(f"{share:.0%} of the head in {stack.label} lies outside the result")
        elif share > OUTSIDE_TOLD:
            doubts.append(f"{share:.1%} of the head in {stack.label} lies outside the result")
    seen = [stack.data[stack.mask] for stack in stacks]
    low, high = float(min(s.min() for s in seen)), float(max(s.max() for s in seen))
    slack = RANGE_SLACK * (high - low)
    beyond = float(np.mean((inside < low - slack) | (inside > high + slack)))
    if beyond > RANGE_SHARE:
        doubts.append(
            f"{beyond:.1%} of the result's foreground goes beyond the range of the stacks by more "
            f"than {RANGE_SLACK:.0%} of it"
        )
    return Findings(tuple(failures), tuple(doubts))


def _outside(stack: Stack, pose: RigidTransform, grid: Grid) -> float:
    """Share of a stack's foreground outside a grid."""
    index = grid.to_index(pose.apply(stack.grid.to_world(np.argwhere(stack.mask))))
    within = (index >= -0.5) & (index <= np.array(grid.shape) - 0.5)
    return 1.0 - float(within.all(axis=1).mean())


def judge_prediction(
    psnr: float | None,
    stacks: Sequence[Stack],
    poses: Mapping[str, RigidTransform],
    held_out: Sequence[NDArray[np.bool_]],
    weights: Mapping[str, NDArray[np.float64]] | None = None,
) -> Findings:
    """Held-out voxels predicted worse (``psnr``, dB) than by plain interpolation: a doubt.

    ``weights``: per label (K,) by which slices count in ``psnr``.
    """
    plain = interpolated_psnr(stacks, poses, held_out, weights)
    if psnr is None or plain is None or psnr >= plain - PSNR_DROP:
        return Findings()
    return Findings(
        doubts=(
            f"voxels that were not used are predicted worse ({psnr:.1f} dB) than by plain "
            f"interpolation of the stacks ({plain:.1f} dB)",
        )
    )


def interpolated_psnr(
    stacks: Sequence[Stack],
    poses: Mapping[str, RigidTransform],
    held_out: Sequence[NDArray[np.bool_]],
    weights: Mapping[str, NDArray[np.float64]] | None = None,
) -> float | None:
    """Held-out voxels predicted by the mean of the stacks' cubic B-splines, dB, peak 1.

    Each counts as its slice does in ``weights`` (per label (K,); all alike if not given).
    """
    splines = [
        spline_filter(without(stack, held).filled().data, order=3, output=np.float32, mode="mirror")
        for stack, held in zip(stacks, held_out, strict=True)
    ]
    error, count = 0.0, 0.0
    for stack, held in zip(stacks, held_out, strict=True):
        points = poses[stack.label].apply(stack.grid.to_world(np.argwhere(held)))
        total, weight = np.zeros(len(points)), np.zeros(len(points))
        for other, spline in zip(stacks, splines, strict=True):
            index = other.grid.to_index(poses[other.label].inverse().apply(points))
            within = ((index >= -0.5) & (index <= np.array(other.data.shape) - 0.5)).all(axis=1)
            values = map_coordinates(spline, index.T, order=3, mode="mirror", prefilter=False)
            total += np.where(within, values, 0)
            weight += within
        seen = weight > 0
        trust = stack.by_slice((weights or {}).get(stack.label, 1.0))[held][seen]
        error += float(trust @ (stack.data[held][seen] - total[seen] / weight[seen]) ** 2)
        count += float(trust.sum())
    return -10 * float(np.log10(error / count)) if count and error > 0 else None


def centre_of(stack: Stack) -> NDArray[np.float64]:
    """World position (3,) of the middle of a stack's foreground, mm."""
    return stack.grid.middle_of(stack.mask)
