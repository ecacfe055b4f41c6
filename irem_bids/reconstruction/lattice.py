# SPDX-License-Identifier: Apache-2.0
"""The forward model of a stack that moves as a whole, a third of the work of the general one.

The taps of neighbouring slices then fall on one lattice: the stack's grid with ``fine`` points
a slice (and, where voxels are averaged in plane, some a voxel).  So the volume is looked up
once a lattice point, not once a tap, and a voxel is a weighted sum along the lattice.  Same
sums as :mod:`.operator_cpu` in another order; that module is the oracle in the tests.

The lattice is stored with its axes in the order of the volume's, so that memory is read along
its lines; only what some voxel sees is looked up.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .operator_cpu import (
    BLOCKS,
    compiled,
    edge_spread,
    edge_value,
    in_blocks,
    inner,
    place,
    spread_at,
    value_at,
)

FEWEST = 50_000  # taps, below which the loops are not worth compiling
STRIP = 16  # lines that are visited plane after plane, before the next ones: see _read_ahead
CACHE_LINE = 16  # float32


@inner
def _start(matrix: Any, d0: int, d1: int) -> tuple[float, float, float]:
    """Where a line of the lattice starts in the volume."""
    return (
        matrix[0, 0] * d0 + matrix[0, 1] * d1 + matrix[0, 3],
        matrix[1, 0] * d0 + matrix[1, 1] * d1 + matrix[1, 3],
        matrix[2, 0] * d0 + matrix[2, 1] * d1 + matrix[2, 3],
    )


@inner
def _inside(matrix: Any, sizes: Any, start: Any, low: int, high: int) -> tuple[int, int]:
    """Points [a, b) of [low, high) of a line whose eight neighbours are all in the volume."""
    first, last = float(low), float(high - 1)
    for axis in range(3):
        slope, origin = matrix[axis, 2], start[axis]
        if abs(slope) < 1e-6:
            slope = 1e-6  # the ends are then far, or there is no point
        one, two = (0.001 - origin) / slope, (sizes[axis] - 1.001 - origin) / slope
        if one > two:
            one, two = two, one
        if one > first:
            first = one
        if two < last:
            last = two
    if first > last:
        return low, low
    return int(np.ceil(first)), int(np.floor(last)) + 1


@inner
def _places(
    matrix: Any, sizes: Any, start: Any, low: Any, high: Any, at: Any, part: Any
) -> tuple[int, int]:
    """Bounds of a line's points with eight neighbours, and :func:`.operator_cpu.place` of each."""
    ny, nz = np.int32(sizes[1]), np.int32(sizes[2])
    dx, dy, dz = np.float32(matrix[0, 2]), np.float32(matrix[1, 2]), np.float32(matrix[2, 2])
    px, py, pz = np.float32(start[0]), np.float32(start[1]), np.float32(start[2])
    a, b = _inside(matrix, sizes, start, low, high)
    for n in range(b - a):
        t = np.float32(np.int32(n + a))
        place(px + t * dx, py + t * dy, pz + t * dz, ny, nz, n, at, part)
    return a, b


@inner
def _span(matrix: Any, size: Any, axis: Any, d0: Any, d1: Any, depth: Any) -> tuple[int, int]:
    """First voxel along an axis of the volume that a plane of a strip sees, and the last's next."""
    low = matrix[axis, 0] * d0 + matrix[axis, 1] * d1 + matrix[axis, 3]
    high = low
    for slope in (matrix[axis, 1] * STRIP, matrix[axis, 2] * depth):
        low, high = low + min(slope, 0.0), high + max(slope, 0.0)
    return max(int(low), 0), min(max(int(high) + 2, 0), size)


@inner
def _read_ahead(
    volume: Any, sizes: Any, matrix: Any, d0: Any, d1: Any, depth: Any, seen: Any
) -> tuple[Any, tuple[int, int]]:
    """Read what a strip's plane is the first to see of the volume, in the order of memory.

    The lines of a turned stack meet the volume's a few voxels at a time, and a processor that
    fetches them so waits for memory most of the time.  A strip's share of the planes that it
    sees at once stays in the cache, if it is narrow.  ``seen``: the planes of the volume that
    the plane before saw.  Returns a sum, so that no compiler drops the reads, and the planes.
    """
    first, end = _span(matrix, sizes[0], 0, d0, d1, depth)
    low, high = _span(matrix, sizes[1], 1, d0, d1, depth)
    total = np.float32(0)
    for plane in range(first, end):
        if seen[0] <= plane < seen[1]:
            continue
        row = plane * sizes[1]
        for at in range((row + low) * sizes[2], (row + high) * sizes[2], CACHE_LINE):
            total += volume[at]
    return total, (first, end)


@compiled
def _look_up(
    volume: Any, sizes: Any, matrix: Any, lines: Any, depth: Any, out: Any, ends: Any
) -> Any:
    """The volume (flat) at the lattice's points; ``lines`` (D0, D1, 2) bound its third axis.

    Returns what :func:`_read_ahead` does.
    """
    ny, nz = np.int32(sizes[1]), np.int32(sizes[2])
    at, part = np.empty(depth, np.int32), np.empty((3, depth), np.float32)
    read = np.float32(0)
    for first in range(0, lines.shape[1], STRIP):
        seen = (0, 0)
        for d0 in range(ends[0], ends[1]):
            part_read, seen = _read_ahead(volume, sizes, matrix, d0, first, depth, seen)
            read += part_read
            for d1 in range(first, min(first + STRIP, lines.shape[1])):
                low, high = lines[d0, d1, 0], lines[d0, d1, 1]
                start = _start(matrix, d0, d1)
                a, b = _places(matrix, sizes, start, low, high, at, part)
                for n in range(b - a):
                    u, v, w = part[0, n], part[1, n], part[2, n]
                    out[d0, d1, n + a] = value_at(volume, ny, nz, at[n], u, v, w)
                for d2 in range(low, high):
                    if d2 < a or d2 >= b:
                        x, y = start[0] + matrix[0, 2] * d2, start[1] + matrix[1, 2] * d2
                        z = start[2] + matrix[2, 2] * d2
                        out[d0, d1, d2] = edge_value(volume, sizes, x, y, z)
    return read


@compiled
def _sum(
    lattice: Any, axis: Any, fine: Any, coarse: Any, weights: Any, lines: Any, out: Any, ends: Any
) -> None:
    """Voxels (dense) as sums over the lattice; ``lines`` bound the third axis of ``out``."""
    c0, c1, c2 = coarse
    taps = len(weights)
    f0, f1 = fine if axis == 0 else c0, fine if axis == 1 else c1
    n0, n1 = taps if axis == 0 else c0, taps if axis == 1 else c1
    for d0 in range(ends[0], ends[1]):
        for d1 in range(out.shape[1]):
            low, high = lines[d0, d1, 0], lines[d0, d1, 1]
            line = out[d0, d1, low:high]
            for n in range(len(line)):
                line[n] = 0
            for s0 in range(n0):
                for s1 in range(n1):
                    seen = lattice[f0 * d0 + s0, f1 * d1 + s1]
                    if axis == 2:
                        for n in range(len(line)):
                            at, total = fine * (n + low), np.float32(0)
                            for t in range(taps):
                                total += weights[t] * seen[at + t]
                            line[n] += total
                        continue
                    weight = weights[s0 if axis == 0 else s1]
                    if c2 == 1:
                        part = seen[low:high]
                        for n in range(len(line)):
                            line[n] += weight * part[n]
                        continue
                    for n in range(len(line)):
                        for t in range(c2):
                            line[n] += weight * seen[c2 * (n + low) + t]


@inner
def _line_values(
    rows: Any,
    axis: Any,
    fine: Any,
    coarse: Any,
    weights: Any,
    d0: Any,
    d1: Any,
    line: Any,
    low: Any,
) -> None:
    """What the rows (dense, 0 where there is none) give the points of a line, from ``low`` on."""
    for n in range(len(line)):
        line[n] = 0
    taps, high, c = len(weights), low + len(line), coarse[2]
    if axis == 2:
        own = rows[d0 // coarse[0], d1 // coarse[1]]
        for k in range(len(own)):
            if own[k] != 0:
                for t in range(taps):
                    line[fine * k + t - low] += weights[t] * own[k]
        return
    place = d0 if axis == 0 else d1
    for k in range(max(0, -((taps - 1 - place) // fine)), min(rows.shape[axis], place // fine + 1)):
        own = rows[k, d1 // coarse[1]] if axis == 0 else rows[d0 // coarse[0], k]
        weight = weights[place - fine * k]
        if c == 1:
            part = own[low:high]
            for n in range(len(line)):
                line[n] += weight * part[n]
        else:
            for n in range(len(line)):
                line[n] += weight * own[(n + low) // c]


@compiled
def _spread(
    rows: Any, sizes: Any, matrix: Any, lines: Any, axis: Any, fine: Any, coarse: Any,
    weights: Any, depth: Any, out: Any, ends: Any,
) -> Any:  # fmt: skip
    """Adjoint of sum and look-up: ``rows`` (dense) are added to the volume ``out`` (flat).

    Returns what :func:`_read_ahead` does.
    """
    ny, nz = np.int32(sizes[1]), np.int32(sizes[2])
    at, part = np.empty(depth, np.int32), np.empty((3, depth), np.float32)
    buffer = np.empty(depth, np.float32)
    read = np.float32(0)
    for first in range(0, lines.shape[1], STRIP):
        seen = (0, 0)
        for d0 in range(ends[0], ends[1]):
            part_read, seen = _read_ahead(out, sizes, matrix, d0, first, depth, seen)
            read += part_read
            for d1 in range(first, min(first + STRIP, lines.shape[1])):
                low, high = lines[d0, d1, 0], lines[d0, d1, 1]
                if low >= high:
                    continue
                line = buffer[: high - low]
                _line_values(rows, axis, fine, coarse, weights, d0, d1, line, low)
                start = _start(matrix, d0, d1)
                a, b = _places(matrix, sizes, start, low, high, at, part)
                for d2 in range(low, high):
                    value = line[d2 - low]
                    if value == 0:
                        continue
                    if d2 < a or d2 >= b:
                        x, y = start[0] + matrix[0, 2] * d2, start[1] + matrix[1, 2] * d2
                        edge_spread(out, sizes, x, y, start[2] + matrix[2, 2] * d2, value)
                    else:
                        n = d2 - a
                        u, v, w = part[0, n], part[1, n], part[2, n]
                        spread_at(out, ny, nz, at[n], u, v, w, value)
    return read


@dataclass(frozen=True)
class Taps:
    """Of a stack on the lattice.

    ``fine``: lattice points a slice; ``coarse``: per axis of the stack the points a voxel, 1
    through the slices; ``weights``: (T,) through a slice, T odd.
    """

    fine: int
    coarse: tuple[int, int, int]
    weights: NDArray[np.float32]

    def counts(self, shape: tuple[int, ...], axis: int) -> NDArray[np.int64]:
        """(3,) lattice points along the axes of a stack of ``shape`` with slices on ``axis``."""
        counts: NDArray[np.int64] = np.multiply(shape, self.coarse, dtype=np.int64)
        counts[axis] = self.fine * (shape[axis] - 1) + len(self.weights)
        return counts

    def worth_it(self, rows: int, shape: tuple[int, ...], axis: int) -> bool:
        """Whether one look-up a lattice point is less work than one a tap of ``rows`` voxels."""
        taps = rows * len(self.weights) * math.prod(self.coarse)
        return taps > FEWEST and 2 * taps > int(np.prod(self.counts(shape, axis)))


class Lattice:
    """The voxels of a stack and the lattice that they look at.

    Parameters
    ----------
    index
        (N, 3) voxels of the stack.
    shape, axis
        Of the stack; its slice axis.
    matrix
        (3, 4) voxel of the stack to voxel of the volume.
    """

    def __init__(
        self,
        index: NDArray[np.int16],
        shape: tuple[int, ...],
        axis: int,
        taps: Taps,
        matrix: NDArray[np.float64],
    ) -> None:
        self.order = _nearest_axes(matrix[:, :3])
        self._taps, self._axis = taps, self.order.index(axis)
        self._coarse = np.array([taps.coarse[a] for a in self.order])
        where = index[:, self.order].astype(np.int64)
        dense = np.zeros([shape[a] for a in self.order], np.float32)
        self._rows = np.ravel_multi_index(tuple(where.T), dense.shape)
        self._dense = dense
        factors, reach = self._coarse.copy(), len(taps.weights) // 2
        factors[self._axis] = taps.fine
        self._lattice: NDArray[np.float32] = np.empty(
            tuple(taps.counts(shape, axis)[self.order]), np.float32
        )
        self._thin = taps.weights * np.float32(1 / np.prod(self._coarse))
        self._set_lines(where)
        self._into = np.eye(4)  # of the lattice into the stack's voxels, both in this order
        for a, factor in enumerate(factors):
            self._into[a, a] = 1 / factor
            self._into[a, 3] = -reach / factor if a == self._axis else 0.5 / factor - 0.5
        self.place(matrix)

    def place(self, matrix: NDArray[np.float64]) -> None:
        """Take over a new pose: (3, 4) voxel of the stack to voxel of the volume."""
        columns = [*self.order, 3]
        self._matrix = np.ascontiguousarray(matrix[:, columns] @ self._into)

    def _set_lines(self, where: NDArray[np.int64]) -> None:
        """The lines' bounds: of the voxels that are used, and of the lattice that they see."""
        used = np.zeros(self._dense.shape, bool)
        used[tuple(where.T)] = True
        self._used = bounds(used)
        for a in range(3):
            if a != self._axis:
                used = np.repeat(used, self._coarse[a], axis=a)
        need, taps = np.zeros(self._lattice.shape, bool), len(self._taps.weights)
        into, out = np.moveaxis(used, self._axis, 0), np.moveaxis(need, self._axis, 0)
        for k in range(len(into)):
            out[self._taps.fine * k : self._taps.fine * k + taps] |= into[k]
        self._lines = bounds(need)

    @property
    def points(self) -> int:
        """Lattice points that a look-up visits."""
        return int((self._lines[..., 1] - self._lines[..., 0]).sum())

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        arrays = (self._lattice, self._dense, self._rows, self._lines, self._used)
        return sum(array.nbytes for array in arrays)

    def forward(self, volume: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
        """Volume (X, Y, Z) to predicted rows (N,)."""
        sizes = np.array(volume.shape)
        flat = volume.reshape(-1)
        given = (flat, sizes, self._matrix, self._lines, self._lattice.shape[2], self._lattice)
        in_blocks(len(self._lines), threads, lambda _, ends: _look_up(*given, ends))
        taps = (self._axis, self._taps.fine, self._coarse, self._thin)
        sums = (self._lattice, *taps, self._used, self._dense)
        in_blocks(len(self._dense), threads, lambda _, ends: _sum(*sums, ends))
        return np.take(self._dense, self._rows)

    def adjoint(self, values: NDArray[np.float32], out: NDArray[np.float32], threads: int) -> None:
        """Add rows (N,) to the partial volumes ``out`` (BLOCKS, X, Y, Z)."""
        self._dense.fill(0)
        self._dense.reshape(-1)[self._rows] = values
        sizes = np.array(out.shape[1:])
        taps = (self._axis, self._taps.fine, self._coarse, self._thin)
        depth = self._lattice.shape[2]
        given = (self._dense, sizes, self._matrix, self._lines, *taps, depth)
        parts = out.reshape(BLOCKS, -1)
        in_blocks(len(self._lines), threads, lambda b, ends: _spread(*given, parts[b], ends))


def bounds(inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(X, Y, 2) first true voxel of each line along the third axis, and one beyond the last."""
    out = np.zeros((*inside.shape[:2], 2), np.int64)
    some, size = inside.any(axis=2), inside.shape[2]
    out[..., 0] = np.where(some, inside.argmax(axis=2), 0)
    out[..., 1] = np.where(some, size - inside[:, :, ::-1].argmax(axis=2), 0)
    return out


def _nearest_axes(matrix: NDArray[np.float64]) -> list[int]:
    """The stack's axes in the order of the volume's axes that they lie nearest to."""
    size = np.abs(matrix) / np.linalg.norm(matrix, axis=0)
    orders = list(itertools.permutations(range(3)))
    near = [sum(float(size[a, order[a]]) for a in range(3)) for order in orders]
    return list(orders[int(np.argmax(near))])
