# SPDX-License-Identifier: Apache-2.0
"""The gauge: what a reconstruction is free to choose, taken out before scoring.

Stacks alone cannot tell a rigid motion common to all poses, nor a common gain, so a
perfect reconstruction may lie elsewhere and in another unit than the truth.  Images are
compared after the rigid motion, scale and offset that fit best; poses after the rigid
motion that fits best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .geometry import FloatArray, Grid, RigidTransform
from .metrics import MetricError, head_mask
from .spline import Spline

LEVELS = ((4.0, 20_000), (2.0, 40_000), (0.0, 120_000))  # smoothing (mm), points
DELTA = 0.02  # mm, step of the numerical derivatives
SLAB = 1_000_000  # voxels resampled at a time
ROUNDS = 25  # Levenberg-Marquardt steps per level
STILL = 1e-4  # mm, rad * mm of lever: a smaller step ends a level


@dataclass(frozen=True)
class Gauge:
    """A reconstruction in the truth's space and units.

    Attributes
    ----------
    volume
        ``scale * reconstruction + offset`` on the truth's grid; ``offset`` further from the
        mask than the window of the SSIM reaches.
    transform
        Points of the truth's space to points of the reconstruction's, RAS+ mm.
    scale, offset
        Reconstructed intensity to the truth's.
    coverage
        Fraction of the mask that lies in the reconstruction's field of view.
    """

    volume: NDArray[np.float32]
    transform: RigidTransform
    scale: float
    offset: float
    coverage: float


def gauge(
    reconstruction: NDArray,
    recon_grid: Grid,
    truth: NDArray,
    truth_grid: Grid,
    mask: NDArray[np.bool_] | None = None,
    *,
    start: RigidTransform | None = None,
    threads: int = 1,
) -> Gauge:
    """Find the rigid motion, scale and offset that bring a reconstruction nearest to the truth.

    Least squares of the difference in ``mask`` (default: the head in the truth) by
    Levenberg-Marquardt, coarse to fine, with cubic B-spline interpolation.
    """
    inside = head_mask(truth) if mask is None else np.asarray(mask, dtype=bool)
    if inside.shape != truth.shape or not inside.any():
        raise MetricError(
            f"the mask is {inside.shape} with {int(inside.sum())} voxels; "
            f"expected some voxels of the truth's {truth.shape}"
        )
    indices = np.argwhere(inside)
    centre = truth_grid.to_world(indices.mean(axis=0))
    vector = np.zeros(6) if start is None else start.to_vector(centre)
    scale, offset = 1.0, 0.0
    for sigma, count in LEVELS:
        picked = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]
        fit = _Fit(
            Spline(_smooth(reconstruction, recon_grid, sigma), recon_grid, pad=0),
            _smooth(truth, truth_grid, sigma)[tuple(picked.T)].astype(np.float64),
            truth_grid.to_world(picked),
            centre,
            threads,
        )
        vector, scale, offset = fit.solve(vector)
    transform = RigidTransform.from_vector(vector, centre)
    volume, coverage = resample_near(
        reconstruction, recon_grid, truth_grid, inside, transform, threads
    )
    return Gauge(
        volume * np.float32(scale) + np.float32(offset), transform, scale, offset, coverage
    )


def _smooth(volume: NDArray, grid: Grid, sigma: float) -> NDArray[np.float32]:
    values = np.asarray(volume, dtype=np.float32)
    if sigma == 0:
        return values
    return ndimage.gaussian_filter(values, sigma / grid.voxel_size, mode="nearest", truncate=3.0)


def resample_near(
    reconstruction: NDArray,
    recon_grid: Grid,
    truth_grid: Grid,
    inside: NDArray[np.bool_],
    transform: RigidTransform,
    threads: int,
) -> tuple[NDArray[np.float32], float]:
    """The reconstruction on the truth's grid near the mask, and the share of the mask it covers."""
    spline = Spline(reconstruction, recon_grid)
    indices = np.argwhere(near_mask(inside))
    volume, covered = np.zeros(truth_grid.shape, dtype=np.float32), 0
    for start in range(0, len(indices), SLAB):
        piece = indices[start : start + SLAB]
        points = transform.apply(truth_grid.to_world(piece))
        volume[tuple(piece.T)] = spline.at(points, threads=threads)
        covered += int(_within(points[inside[tuple(piece.T)]], recon_grid).sum())
    return volume, covered / int(inside.sum())


def near_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels that the SSIM of those in ``mask`` looks at: up to 5 away along each axis."""
    near = mask
    for axis in range(mask.ndim):
        near = ndimage.maximum_filter1d(near.astype(np.uint8), 11, axis=axis, mode="constant") > 0
    return near


def _within(points: FloatArray, grid: Grid) -> NDArray[np.bool_]:
    index = grid.to_index(points)
    return np.asarray(((index >= 0) & (index <= np.array(grid.shape) - 1)).all(axis=-1))


class _Fit:
    """Least squares of ``scale * image(T p) + offset - target`` over the motion T.

    Scale and offset are solved for each motion (variable projection).
    """

    def __init__(
        self,
        spline: Spline,
        target: FloatArray,
        points: FloatArray,
        centre: FloatArray,
        threads: int,
    ) -> None:
        self.spline, self.target, self.points = spline, target, points
        self.centre, self.threads = centre, threads

    def _image(self, points: FloatArray) -> FloatArray:
        return self.spline.at(points, threads=self.threads).astype(np.float64)

    def _values(self, vector: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """Moved points, image there, and which of them the image covers."""
        moved = RigidTransform.from_vector(vector, self.centre).apply(self.points)
        return moved, self._image(moved), _within(moved, self.spline.grid)

    def _intensity(self, values: FloatArray, seen: NDArray[np.bool_]) -> tuple[float, float, float]:
        """Best scale and offset, and the mean squared residual."""
        if int(seen.sum()) < 100:
            raise MetricError(
                f"only {int(seen.sum())} of {len(seen)} points of the truth lie in the "
                "reconstruction: give images that overlap"
            )
        x, y = values[seen], self.target[seen]
        variance = float(np.var(x))
        if variance <= 0:
            raise MetricError("the reconstruction is constant in the mask")
        scale = float(np.mean((x - x.mean()) * (y - y.mean())) / variance)
        offset = float(y.mean() - scale * x.mean())
        return scale, offset, float(np.mean((scale * x + offset - y) ** 2))

    def solve(self, vector: FloatArray) -> tuple[FloatArray, float, float]:
        """Refine ``vector`` (6,): rotation vector (rad) about the centre, translation (mm)."""
        damping = 1e-3
        moved, values, seen = self._values(vector)
        scale, offset, error = self._intensity(values, seen)
        for _ in range(ROUNDS):
            jacobian = self._jacobian(vector, moved, values, scale)[seen]
            residual = (scale * values + offset - self.target)[seen]
            normal = jacobian.T @ jacobian
            gradient = jacobian.T @ residual
            accepted = False
            for _attempt in range(8):
                damped = normal + damping * np.diag(np.diag(normal))
                try:
                    step = -np.linalg.solve(damped, gradient)[:6]
                except np.linalg.LinAlgError:
                    raise MetricError(
                        "the images have no structure in the mask that could tell of a motion; "
                        "give images, or a mask, with contrast"
                    ) from None
                moved_new, values_new, seen_new = self._values(vector + step)
                new = self._intensity(values_new, seen_new)
                if new[2] <= error:
                    accepted = True
                    break
                damping *= 10
            if not accepted:
                break
            vector, moved, values, seen = vector + step, moved_new, values_new, seen_new
            scale, offset, error = new
            damping = max(damping / 10, 1e-9)
            if float(np.abs(step * np.repeat([80.0, 1.0], 3)).max()) < STILL:
                break
        return vector, scale, offset

    def _jacobian(
        self, vector: FloatArray, moved: FloatArray, values: FloatArray, scale: float
    ) -> FloatArray:
        """(N, 8) derivatives by rotation vector, translation, scale, offset."""
        slopes = np.stack(
            [
                (self._image(moved + step) - self._image(moved - step)) / (2 * DELTA)
                for step in DELTA * np.eye(3)
            ],
            axis=1,
        )
        columns = []
        for axis in range(3):
            turn = np.zeros(6)
            turn[axis] = 1e-6
            plus = RigidTransform.from_vector(vector + turn, self.centre).apply(self.points)
            minus = RigidTransform.from_vector(vector - turn, self.centre).apply(self.points)
            columns.append(scale * np.sum(slopes * (plus - minus), axis=1) / 2e-6)
        columns += [scale * slopes[:, axis] for axis in range(3)]
        return np.stack([*columns, values, np.ones_like(values)], axis=1)


def common_motion(moved: ArrayLike, target: ArrayLike) -> RigidTransform:
    """The rigid motion that brings points (N, 3) nearest to ``target`` (N, 3) (Kabsch)."""
    a, b = np.asarray(moved, dtype=np.float64), np.asarray(target, dtype=np.float64)
    centre_a, centre_b = a.mean(axis=0), b.mean(axis=0)
    u, _, vt = np.linalg.svd((a - centre_a).T @ (b - centre_b))
    sign = np.sign(np.linalg.det(vt.T @ u.T))
    rotation = vt.T @ np.diag([1.0, 1.0, sign]) @ u.T
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = centre_b - rotation @ centre_a
    return RigidTransform(matrix)


def target_registration_error(
    estimated: Sequence[RigidTransform], true: Sequence[RigidTransform], points: ArrayLike
) -> list[float]:
    """Mean target registration error (mm) of each pose, one common rigid motion removed.

    Parameters
    ----------
    estimated
        Scanner space of each stack to the result's space.
    true
        Scanner space of each stack to the truth's space, in the same order.
    points
        (N, 3) foreground points in the truth's space, mm (a few thousand suffice).
    """
    targets = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if len(estimated) != len(true) or not len(true) or len(targets) < 4:
        raise MetricError(
            f"{len(estimated)} estimated and {len(true)} true poses, {len(targets)} points; "
            "expected as many of each and at least 4 points"
        )
    found = [e.apply(t.inverse().apply(targets)) for e, t in zip(estimated, true, strict=True)]
    back = common_motion(np.concatenate(found), np.tile(targets, (len(found), 1)))
    return [float(np.linalg.norm(back.apply(f) - targets, axis=1).mean()) for f in found]
