# SPDX-License-Identifier: Apache-2.0
"""The forward model's three loops on the CPU, compiled when first used (numba).

No matrix is kept: positions follow from the map of a row's slice and the taps of its profile.
Rows run in ``BLOCKS`` fixed blocks, so that sums do not depend on the number of threads.
The plain twin of this module, and its oracle in the tests, is :mod:`.operator_torch`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .acquisition import Rows

BLOCKS = 2
_njit: Any = numba.njit
_OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy", "no_cfunc_wrapper": True}
compiled = _njit(**_OPTIONS)
inner = _njit(**_OPTIONS, no_cpython_wrapper=True)  # called from compiled loops only


@inner
def _corner(corner: Any, sizes: Any, x: Any, y: Any, z: Any) -> tuple[Any, Any]:
    """Flat index and weight of one of eight neighbours; -1 where it is outside the volume."""
    nx, ny, nz = sizes
    a, b, c = corner >> 2, corner >> 1 & 1, corner & 1
    i, j, k = int(x + 1) - 1, int(y + 1) - 1, int(z + 1) - 1
    u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - k)
    f = (u if a else 1 - u) * (v if b else 1 - v) * (w if c else 1 - w)
    if 0 <= i + a < nx and 0 <= j + b < ny and 0 <= k + c < nz:
        return ((i + a) * ny + j + b) * nz + k + c, f
    return -1, f


@inner
def _near(sizes: Any, x: Any, y: Any, z: Any) -> bool:
    """Whether a point has any neighbour in the volume."""
    return -1 < x < sizes[0] and -1 < y < sizes[1] and -1 < z < sizes[2]


@inner
def edge_value(volume: Any, sizes: Any, x: Any, y: Any, z: Any) -> Any:
    """Trilinear in a flat volume, 0 outside of it."""
    total = np.float32(0)
    if _near(sizes, x, y, z):
        for corner in range(8):
            at, f = _corner(corner, sizes, x, y, z)
            if at >= 0:
                total += f * volume[at]
    return total


@inner
def edge_spread(out: Any, sizes: Any, x: Any, y: Any, z: Any, value: Any) -> None:
    """Adjoint of :func:`edge_value`."""
    if _near(sizes, x, y, z):
        for corner in range(8):
            at, f = _corner(corner, sizes, x, y, z)
            if at >= 0:
                out[at] += f * value


@inner
def place(x: Any, y: Any, z: Any, ny: Any, nz: Any, n: Any, at: Any, parts: Any) -> None:
    """Float32 indices to the flat index of the first of eight neighbours, ``at[n]``, and the
    fractions ``parts[:, n]``.  Apart from the look-up, loops of it run on vectors."""
    i, j, k = np.int32(x), np.int32(y), np.int32(z)
    at[n] = np.int32(np.int32(i * ny + j) * nz + k)
    parts[0, n] = x - np.float32(i)
    parts[1, n] = y - np.float32(j)
    parts[2, n] = z - np.float32(k)


@inner
def value_at(volume: Any, ny: Any, nz: Any, first: Any, u: Any, v: Any, w: Any) -> Any:
    """Trilinear in a flat volume from eight neighbours that are all in it."""
    at, one = np.uint64(first), np.uint64(1)  # unsigned: no wrapping round
    below, right = at + np.uint64(nz), at + np.uint64(ny * nz)
    corner = right + np.uint64(nz)
    p = volume[at] + w * (volume[at + one] - volume[at])
    q = volume[below] + w * (volume[below + one] - volume[below])
    r = volume[right] + w * (volume[right + one] - volume[right])
    s = volume[corner] + w * (volume[corner + one] - volume[corner])
    p += v * (q - p)
    r += v * (s - r)
    return p + u * (r - p)


@inner
def spread_at(out: Any, ny: Any, nz: Any, first: Any, u: Any, v: Any, w: Any, value: Any) -> None:
    """Adjoint of :func:`value_at`."""
    at, one = np.uint64(first), np.uint64(1)
    below, right = at + np.uint64(nz), at + np.uint64(ny * nz)
    corner = right + np.uint64(nz)
    far = value * u
    near = value - far
    q, s = near * v, far * v
    p, r = near - q, far - s
    a, b, c, d = p * w, q * w, r * w, s * w
    out[at] += p - a
    out[at + one] += a
    out[below] += q - b
    out[below + one] += b
    out[right] += r - c
    out[right + one] += c
    out[corner] += s - d
    out[corner + one] += d


@inner
def _centre(index: Any, m: Any, n: Any) -> tuple[float, float, float]:
    a, b, c = float(index[n, 0]), float(index[n, 1]), float(index[n, 2])
    return (
        m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3],
        m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3],
        m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3],
    )


@inner
def _inside(sizes: Any, bounds: Any, x: float, y: float, z: float) -> bool:
    """Whether all taps about a centre have their eight neighbours in the volume."""
    return (
        x + bounds[0, 0] >= 0 and x + bounds[1, 0] < sizes[0] - 1
        and y + bounds[0, 1] >= 0 and y + bounds[1, 1] < sizes[1] - 1
        and z + bounds[0, 2] >= 0 and z + bounds[1, 2] < sizes[2] - 1
    )  # fmt: skip


@compiled
def _forward(
    volume: Any, sizes: Any, index: Any, axis: int, maps: Any, steps: Any, bounds: Any,
    weights: Any, out: Any, ends: Any,
) -> None:  # fmt: skip
    ny, nz, taps = np.int32(sizes[1]), np.int32(sizes[2]), len(weights)
    for n in range(ends[0], ends[1]):
        k = index[n, axis]
        d = steps[k]
        px, py, pz = _centre(index, maps[k], n)
        total = np.float32(0)
        if _inside(sizes, bounds[k], px, py, pz):
            fx, fy, fz = np.float32(px), np.float32(py), np.float32(pz)
            for t in range(taps):
                x, y, z = fx + d[0, t], fy + d[1, t], fz + d[2, t]
                i, j, o = np.int32(x), np.int32(y), np.int32(z)
                u, v, w = x - np.float32(i), y - np.float32(j), z - np.float32(o)
                at = (i * ny + j) * nz + o
                total += weights[t] * value_at(volume, ny, nz, at, u, v, w)
        else:
            for t in range(taps):
                x, y, z = px + d[0, t], py + d[1, t], pz + d[2, t]
                total += weights[t] * edge_value(volume, sizes, x, y, z)
        out[n] = total


@compiled
def _adjoint(
    values: Any, sizes: Any, index: Any, axis: int, maps: Any, steps: Any, bounds: Any,
    weights: Any, out: Any, ends: Any,
) -> None:  # fmt: skip
    ny, nz, taps = np.int32(sizes[1]), np.int32(sizes[2]), len(weights)
    for n in range(ends[0], ends[1]):
        value = values[n]
        if value == 0:
            continue
        k = index[n, axis]
        d = steps[k]
        px, py, pz = _centre(index, maps[k], n)
        if _inside(sizes, bounds[k], px, py, pz):
            fx, fy, fz = np.float32(px), np.float32(py), np.float32(pz)
            for t in range(taps):
                x, y, z = fx + d[0, t], fy + d[1, t], fz + d[2, t]
                i, j, o = np.int32(x), np.int32(y), np.int32(z)
                u, v, w = x - np.float32(i), y - np.float32(j), z - np.float32(o)
                at = (i * ny + j) * nz + o
                spread_at(out, ny, nz, at, u, v, w, weights[t] * value)
        else:
            for t in range(taps):
                x, y, z = px + d[0, t], py + d[1, t], pz + d[2, t]
                edge_spread(out, sizes, x, y, z, weights[t] * value)


@compiled
def _derivatives(
    volume: Any, index: Any, axis: int, maps: Any, steps: Any, through: Any, weights: Any,
    affine: Any, inverse: Any, pivot: Any, out: Any, ends: Any,
) -> None:  # fmt: skip
    nx, ny, nz = volume.shape
    arm_slope, slope = np.zeros((3, 3)), np.zeros(3)
    for n in range(ends[0], ends[1]):
        k = index[n, axis]
        m, d, e = maps[k], steps[k], through[k]
        px, py, pz = _centre(index, m, n)
        arm_slope[:] = 0
        slope[:] = 0
        width = 0.0
        for t in range(len(weights)):
            x, y, z = px + d[t, 0], py + d[t, 1], pz + d[t, 2]
            if not (0 <= x < nx - 1 and 0 <= y < ny - 1 and 0 <= z < nz - 1):
                continue
            i, j, o = int(x), int(y), int(z)
            u, v, w = x - i, y - j, z - o
            v000, v001 = volume[i, j, o], volume[i, j, o + 1]
            v010, v011 = volume[i, j + 1, o], volume[i, j + 1, o + 1]
            v100, v101 = volume[i + 1, j, o], volume[i + 1, j, o + 1]
            v110, v111 = volume[i + 1, j + 1, o], volume[i + 1, j + 1, o + 1]
            p, q = v000 + w * (v001 - v000), v010 + w * (v011 - v010)
            r, s = v100 + w * (v101 - v100), v110 + w * (v111 - v110)
            low, high = p + v * (q - p), r + v * (s - r)
            gx = weights[t] * (high - low)
            gy = weights[t] * ((q - p) + u * ((s - r) - (q - p)))
            near = (v001 - v000) + v * ((v011 - v010) - (v001 - v000))
            far = (v101 - v100) + v * ((v111 - v110) - (v101 - v100))
            gz = weights[t] * (near + u * (far - near))
            slope[0] += gx
            slope[1] += gy
            slope[2] += gz
            ax, ay, az = x - pivot[0], y - pivot[1], z - pivot[2]
            arm_slope[0, 0] += ax * gx
            arm_slope[0, 1] += ax * gy
            arm_slope[0, 2] += ax * gz
            arm_slope[1, 0] += ay * gx
            arm_slope[1, 1] += ay * gy
            arm_slope[1, 2] += ay * gz
            arm_slope[2, 0] += az * gx
            arm_slope[2, 1] += az * gy
            arm_slope[2, 2] += az * gz
            width += e[t, 0] * gx + e[t, 1] * gy + e[t, 2] * gz
        for pair in range(3):  # the torque: antisymmetric part of arm times slope, in the world
            f, g = (pair + 1) % 3, (pair + 2) % 3
            torque = 0.0
            for row in range(3):
                for h in range(3):
                    torque += arm_slope[row, h] * (
                        affine[f, row] * inverse[h, g] - affine[g, row] * inverse[h, f]
                    )
            out[n, pair] = torque
            out[n, 3 + pair] = (
                slope[0] * inverse[0, pair]
                + slope[1] * inverse[1, pair]
                + slope[2] * inverse[2, pair]
            )
        out[n, 6] = width


@compiled
def _factors(voxels: Any, bias: Any, gain: Any, out: Any, ends: Any) -> None:
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = bias
    for n in range(ends[0], ends[1]):
        x, y, z = voxels[n, 0], voxels[n, 1], voxels[n, 2]
        value = x * (b0 + b3 * x + b6 * y + b7 * z) + y * (b1 + b4 * y + b8 * z) + z * (b2 + b5 * z)
        out[n] = gain * np.exp(value)


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that are kept: to start one costs as much as a block of a coarse level."""
    return ThreadPoolExecutor(BLOCKS - 1, thread_name_prefix="block")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not live on in a child


def in_blocks(count: int, threads: int, work: Callable[[int, NDArray[np.int64]], None]) -> None:
    """``work(block, (first, end))`` for each of ``BLOCKS`` parts of ``range(count)``.

    The caller's thread does the first; ``work`` itself must not call this.
    """
    edges = [count * block // BLOCKS for block in range(BLOCKS + 1)]
    pairs = [np.array(pair) for pair in itertools.pairwise(edges)]
    if threads <= 1:
        for block, ends in enumerate(pairs):
            work(block, ends)
        return
    others = [_helpers().submit(work, block, pairs[block]) for block in range(1, BLOCKS)]
    try:
        work(0, pairs[0])
    finally:  # they write where the caller may soon write
        errors = [other.exception() for other in others]
    for error in filter(None, errors):
        raise error


def _arguments(rows: Rows, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What both loops take; ``bounds`` (K, 2, 3) are those of the taps about their centre."""
    slack = 1e-3  # for positions that are rounded to float32
    bounds = np.stack([rows.steps.min(1) - slack, rows.steps.max(1) + slack], axis=1)
    steps = np.ascontiguousarray(rows.steps.transpose(0, 2, 1))
    return np.array(shape), rows.index, rows.axis, rows.maps, steps, bounds, rows.weights


def forward(volume: NDArray[np.float32], rows: Rows, threads: int) -> NDArray[np.float32]:
    """Volume (X, Y, Z) to predicted rows (N,)."""
    out = np.empty(len(rows.index), np.float32)
    shared, flat = _arguments(rows, volume.shape), volume.reshape(-1)
    in_blocks(len(out), threads, lambda _, ends: _forward(flat, *shared, out, ends))
    return out


def adjoint(
    values: NDArray[np.float32], rows: Rows, out: NDArray[np.float32], threads: int
) -> None:
    """Add rows (N,) to the partial volumes ``out`` (BLOCKS, X, Y, Z), whose sum is the exact
    adjoint of :func:`forward`."""
    shared, parts = _arguments(rows, out.shape[1:]), out.reshape(BLOCKS, -1)
    values = np.ascontiguousarray(values)
    in_blocks(len(values), threads, lambda b, ends: _adjoint(values, *shared, parts[b], ends))


def derivatives(
    volume: NDArray[np.float32],
    rows: Rows,
    affine: NDArray[np.float64],
    pivot: NDArray[np.float64],
    threads: int,
) -> NDArray[np.float32]:
    """(N, 7): by rotation about ``pivot`` (voxel indices; per rad, world axes), shift (per mm)
    and relative width of the profile."""
    out = np.empty((len(rows.index), 7), np.float32)
    matrix = np.ascontiguousarray(affine[:3, :3])
    shared = (rows.index, rows.axis, rows.maps, rows.steps, rows.through, rows.weights)
    inverse = np.linalg.inv(matrix)
    in_blocks(
        len(out),
        threads,
        lambda _, ends: _derivatives(volume, *shared, matrix, inverse, pivot, out, ends),
    )
    return out


def factors(
    voxels: NDArray[np.float32], gain: float, bias: NDArray[np.float64], threads: int
) -> NDArray[np.float32]:
    """(N,) gain times bias at (N, 3): see :class:`.acquisition.Receiver`."""
    out = np.empty(len(voxels), np.float32)
    terms = tuple(np.float32(b) for b in bias)
    in_blocks(
        len(out), threads, lambda _, ends: _factors(voxels, terms, np.float32(gain), out, ends)
    )
    return out
