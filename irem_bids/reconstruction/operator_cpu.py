# SPDX-License-Identifier: Apache-2.0
"""The forward model's three loops on the CPU, compiled when first used (numba).

No matrix is kept: positions follow from the map of a row's slice and the taps of its profile.
Rows run in ``BLOCKS`` fixed blocks, so that sums do not depend on the number of threads.
The plain twin of this module, and its oracle in the tests, is :mod:`.operator_torch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .acquisition import Rows

BLOCKS = 2
_compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


@_compiled
def _forward(
    volume: Any, index: Any, axis: int, maps: Any, steps: Any, weights: Any, out: Any, ends: Any
) -> None:
    nx, ny, nz = volume.shape
    for n in range(ends[0], ends[1]):
        k = index[n, axis]
        m, d = maps[k], steps[k]
        a, b, c = float(index[n, 0]), float(index[n, 1]), float(index[n, 2])
        px = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        py = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        pz = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
        total = np.float32(0)
        for t in range(len(weights)):
            x, y, z = px + d[t, 0], py + d[t, 1], pz + d[t, 2]
            if not (-1 < x < nx and -1 < y < ny and -1 < z < nz):
                continue
            i, j, o = int(x + 1) - 1, int(y + 1) - 1, int(z + 1) - 1
            u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - o)
            if i >= 0 and j >= 0 and o >= 0 and i < nx - 1 and j < ny - 1 and o < nz - 1:
                p = volume[i, j, o] + w * (volume[i, j, o + 1] - volume[i, j, o])
                q = volume[i, j + 1, o] + w * (volume[i, j + 1, o + 1] - volume[i, j + 1, o])
                r = volume[i + 1, j, o] + w * (volume[i + 1, j, o + 1] - volume[i + 1, j, o])
                s = volume[i + 1, j + 1, o] + w * (
                    volume[i + 1, j + 1, o + 1] - volume[i + 1, j + 1, o]
                )
                p += v * (q - p)
                r += v * (s - r)
                total += weights[t] * (p + u * (r - p))
            else:
                for corner in range(8):
                    ci, cj, cl = i + (corner >> 2), j + (corner >> 1 & 1), o + (corner & 1)
                    if 0 <= ci < nx and 0 <= cj < ny and 0 <= cl < nz:
                        f = u if corner >> 2 else 1 - u
                        f *= v if corner >> 1 & 1 else 1 - v
                        f *= w if corner & 1 else 1 - w
                        total += weights[t] * f * volume[ci, cj, cl]
        out[n] = total


@_compiled
def _adjoint(
    values: Any, index: Any, axis: int, maps: Any, steps: Any, weights: Any, out: Any, ends: Any
) -> None:
    nx, ny, nz = out.shape
    for n in range(ends[0], ends[1]):
        value = values[n]
        if value == 0:
            continue
        k = index[n, axis]
        m, d = maps[k], steps[k]
        a, b, c = float(index[n, 0]), float(index[n, 1]), float(index[n, 2])
        px = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        py = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        pz = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
        for t in range(len(weights)):
            x, y, z = px + d[t, 0], py + d[t, 1], pz + d[t, 2]
            if not (-1 < x < nx and -1 < y < ny and -1 < z < nz):
                continue
            i, j, o = int(x + 1) - 1, int(y + 1) - 1, int(z + 1) - 1
            u, v, w = np.float32(x - i), np.float32(y - j), np.float32(z - o)
            g = weights[t] * value
            if i >= 0 and j >= 0 and o >= 0 and i < nx - 1 and j < ny - 1 and o < nz - 1:
                right = g * u
                left = g - right
                p, q = left * (1 - v), left * v
                r, s = right * (1 - v), right * v
                out[i, j, o] += p * (1 - w)
                out[i, j, o + 1] += p * w
                out[i, j + 1, o] += q * (1 - w)
                out[i, j + 1, o + 1] += q * w
                out[i + 1, j, o] += r * (1 - w)
                out[i + 1, j, o + 1] += r * w
                out[i + 1, j + 1, o] += s * (1 - w)
                out[i + 1, j + 1, o + 1] += s * w
            else:
                for corner in range(8):
                    ci, cj, cl = i + (corner >> 2), j + (corner >> 1 & 1), o + (corner & 1)
                    if 0 <= ci < nx and 0 <= cj < ny and 0 <= cl < nz:
                        f = u if corner >> 2 else 1 - u
                        f *= v if corner >> 1 & 1 else 1 - v
                        f *= w if corner & 1 else 1 - w
                        out[ci, cj, cl] += g * f


@_compiled
def _derivatives(
    volume: Any, index: Any, axis: int, maps: Any, steps: Any, through: Any, weights: Any,
    affine: Any, inverse: Any, pivot: Any, out: Any, ends: Any,
) -> None:  # fmt: skip
    nx, ny, nz = volume.shape
    arm_slope, slope = np.zeros((3, 3)), np.zeros(3)
    for n in range(ends[0], ends[1]):
        k = index[n, axis]
        m, d, e = maps[k], steps[k], through[k]
        a, b, c = float(index[n, 0]), float(index[n, 1]), float(index[n, 2])
        px = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        py = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        pz = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
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


def _in_blocks(count: int, threads: int, work: Callable[[int, NDArray[np.int64]], None]) -> None:
    edges = np.linspace(0, count, BLOCKS + 1).astype(np.int64)
    pairs = [np.array(pair) for pair in itertools.pairwise(edges)]
    if threads <= 1:
        for block, ends in enumerate(pairs):
            work(block, ends)
        return
    with ThreadPoolExecutor(min(BLOCKS, threads)) as pool:
        for done in [pool.submit(work, block, ends) for block, ends in enumerate(pairs)]:
            done.result()


def forward(volume: NDArray[np.float32], rows: Rows, threads: int) -> NDArray[np.float32]:
    """Volume (X, Y, Z) to predicted rows (N,)."""
    out = np.empty(len(rows.index), np.float32)
    shared = (rows.index, rows.axis, rows.maps, rows.steps, rows.weights)
    _in_blocks(len(out), threads, lambda _, ends: _forward(volume, *shared, out, ends))
    return out


def adjoint(
    values: NDArray[np.float32], rows: Rows, shape: tuple[int, ...], threads: int
) -> NDArray[np.float32]:
    """Rows (N,) to volume (X, Y, Z), the exact adjoint of :func:`forward`."""
    out = np.zeros((BLOCKS, *shape), np.float32)
    shared = (rows.index, rows.axis, rows.maps, rows.steps, rows.weights)
    values = np.ascontiguousarray(values)
    _in_blocks(len(values), threads, lambda b, ends: _adjoint(values, *shared, out[b], ends))
    total: NDArray[np.float32] = out[0]
    for part in out[1:]:
        total += part
    return total


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
    _in_blocks(
        len(out),
        threads,
        lambda _, ends: _derivatives(volume, *shared, matrix, inverse, pivot, out, ends),
    )
    return out
