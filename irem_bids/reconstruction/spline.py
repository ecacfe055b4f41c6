# SPDX-License-Identifier: Apache-2.0
"""Cubic B-spline interpolation of a volume at points in mm (scipy, threaded).

The simulator and the metrics look at images with this; the reconstruction has its
own code, so that the one can be the other's oracle.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates, spline_filter

from .geometry import FloatArray, Grid

PAD = 12  # voxels of zeros around the volume; a cubic spline's ringing falls to 1e-7 in them
CHUNK = 200_000  # points


class Spline:
    """A volume, zero outside its grid, as an interpolating cubic spline.

    Parameters
    ----------
    volume
        (I, J, K) intensities.
    grid
        Where they lie.
    pad
        Voxels of zeros put around; 0 lets the image end at its outermost voxel centres.
    """

    def __init__(self, volume: NDArray, grid: Grid, *, pad: int = PAD) -> None:
        self.grid, self.pad = grid, pad
        padded = np.pad(np.asarray(volume, dtype=np.float64), pad)
        self.coefficients = spline_filter(padded, order=3, mode="mirror").astype(np.float32)

    def at_index(self, indices: NDArray) -> NDArray[np.float32]:
        """Intensities at (3, ...) fractional voxel indices of the grid; 0 outside."""
        return map_coordinates(
            self.coefficients,
            indices + self.pad,
            order=3,
            prefilter=False,
            mode="constant",
            cval=0.0,
            output=np.float32,
        )

    def at(self, points: ArrayLike, *, threads: int = 1) -> NDArray[np.float32]:
        """Intensities (...) at points (..., 3), RAS+ mm; 0 outside."""
        positions: FloatArray = np.asarray(points, dtype=np.float64)
        flat = positions.reshape(-1, 3)
        pieces = [flat[i : i + CHUNK] for i in range(0, len(flat), CHUNK)]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            values = list(pool.map(lambda p: self.at_index(self.grid.to_index(p).T), pieces))
        joined = np.concatenate(values) if values else np.zeros(0, dtype=np.float32)
        return joined.reshape(positions.shape[:-1])
