# SPDX-License-Identifier: Apache-2.0
"""How near an image is to another, and how good it is by itself.  All within a mask.

Every function takes arrays of one shape and an optional boolean mask of that shape;
without a mask all voxels count.  The rigid and intensity gauge is in ``gauge.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

# Immerkaer's second difference, which images without noise nearly annihilate.
SECOND_DIFFERENCE = (1.0, -2.0, 1.0)
MAD_TO_SIGMA = 1.4826022185056018
SSIM_SIGMA = 1.5  # voxels; Wang 2004: an 11 x 11 window of this standard deviation
SSIM_TRUNCATE = 3.5  # the window's half width of 5 voxels, in standard deviations
SSIM_K1, SSIM_K2 = 0.01, 0.03


class MetricError(ValueError):
    """Images that cannot be compared: shapes differ, or the mask is empty."""


def _checked(mask: Mask | None, *images: NDArray) -> Mask:
    shapes = {image.shape for image in images} | ({mask.shape} if mask is not None else set())
    if len(shapes) != 1:
        raise MetricError(f"images and mask must have one shape, got {sorted(shapes)}")
    inside = np.ones(images[0].shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if not inside.any():
        raise MetricError("the mask is empty: no voxel to compare")
    return inside


def head_mask(volume: NDArray, fraction: float = 0.1) -> Mask:
    """The head in a volume with a dark background.

    Voxels above ``fraction`` of the 99th percentile of the positive intensities; the
    largest connected piece of them after a closing by two voxels, with holes filled.
    """
    positive = volume[volume > 0]
    if positive.size == 0:
        raise MetricError("the image has no positive intensity: no head to find")
    bright = np.pad(volume > fraction * np.percentile(positive, 99), 3)
    closed = ndimage.binary_closing(bright, iterations=2)
    labels, count = ndimage.label(closed)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        closed = labels == int(np.argmax(sizes))
    filled = ndimage.binary_fill_holes(closed)
    return np.asarray(filled[3:-3, 3:-3, 3:-3], dtype=bool)


def peak_value(truth: NDArray, mask: Mask | None = None, peak: str | float = "p99.9") -> float:
    """The peak of the PSNR and range of the SSIM.

    ``'p99.9'`` is the 99.9th percentile of the truth in the mask, ``'range'`` the
    maximum less the minimum of the truth over the whole volume (as in the projects of
    the paper's authors); a number stands for itself.
    """
    if isinstance(peak, (int, float)):
        return float(peak)
    inside = _checked(mask, truth)
    if peak == "p99.9":
        return float(np.percentile(truth[inside], 99.9))
    if peak == "range":
        return float(truth.max() - truth.min())
    raise MetricError(f"peak is {peak!r}; expected 'p99.9', 'range' or a number")


def psnr(
    image: NDArray, truth: NDArray, mask: Mask | None = None, *, peak: str | float = "p99.9"
) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak^2 / mean squared error in the mask)."""
    inside = _checked(mask, image, truth)
    difference = image[inside].astype(np.float64) - truth[inside]
    error = float(np.mean(difference**2))
    if error == 0.0:
        return float("inf")
    return float(10.0 * np.log10(peak_value(truth, inside, peak) ** 2 / error))


def ssim_map(image: NDArray, truth: NDArray, data_range: float) -> NDArray[np.float32]:
    """Structural similarity (Wang 2004) of every voxel: a 3D Gaussian window of 1.5 voxels."""

    def smooth(values: NDArray) -> NDArray:
        return ndimage.gaussian_filter(values, SSIM_SIGMA, truncate=SSIM_TRUNCATE, mode="reflect")

    x, y = np.asarray(image, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.asarray(numerator / denominator, dtype=np.float32)


def ssim(
    image: NDArray, truth: NDArray, mask: Mask | None = None, *, peak: str | float = "p99.9"
) -> float:
    """Mean of :func:`ssim_map` in the mask; its data range is :func:`peak_value`."""
    inside = _checked(mask, image, truth)
    box = _bounding_box(inside, margin=6)  # the window reaches 5 voxels
    values = ssim_map(image[box], truth[box], peak_value(truth, inside, peak))
    return float(values[inside[box]].mean(dtype=np.float64))


def _bounding_box(mask: Mask, margin: int) -> tuple[slice, ...]:
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(
        slice(max(0, s.start - margin), min(n, s.stop + margin))
        for s, n in zip(found, mask.shape, strict=True)
    )


def ncc(image: NDArray, other: NDArray, mask: Mask | None = None) -> float:
    """Normalised cross-correlation in the mask, -1 to 1; 0 where an image is constant."""
    inside = _checked(mask, image, other)
    a, b = image[inside].astype(np.float64), other[inside].astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b / norm) if norm > 0 else 0.0


def noise_sigma(
    image: NDArray, mask: Mask | None = None, *, slice_axis: int | None = None
) -> float:
    """Standard deviation of the noise, from the image alone (after Immerkaer 1996).

    Second differences along the axes, one after the other, remove what is smooth and
    keep white noise; their median absolute deviation in the mask is scaled to a standard
    deviation.  With ``slice_axis`` the differences stay within the slices, for thick
    ones.  Fine structure counts as noise, so the value is an upper bound in sharp images
    and too low in images whose noise is smooth (interpolated, regularised).
    """
    inside = _checked(mask, image)
    filtered = np.asarray(image, dtype=np.float64)
    axes = [axis for axis in range(image.ndim) if axis != slice_axis and image.shape[axis] > 2]
    for axis in axes:
        filtered = ndimage.correlate1d(filtered, SECOND_DIFFERENCE, axis=axis, mode="nearest")
        inside = inside & _without_ends(inside.shape, axis)
    if not inside.any():
        raise MetricError("the mask has no voxel away from the image's border")
    norm = float(np.sqrt(6.0)) ** len(axes)
    values = filtered[inside]
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))) / norm)


def _without_ends(shape: tuple[int, ...], axis: int) -> Mask:
    """False in the first and the last plane across ``axis``."""
    keep = np.ones(shape, dtype=bool)
    ends = [slice(None)] * len(shape)
    for end in (0, -1):
        keep[(*ends[:axis], end, *ends[axis + 1 :])] = False
    return keep


def snr(image: NDArray, mask: Mask | None = None, *, slice_axis: int | None = None) -> float:
    """Signal-to-noise ratio: mean intensity in the mask over :func:`noise_sigma`."""
    inside = _checked(mask, image)
    sigma = noise_sigma(image, inside, slice_axis=slice_axis)
    signal = float(image[inside].mean(dtype=np.float64))
    return signal / sigma if sigma > 0 else float("inf")


def snr_of_repeats(first: NDArray, second: NDArray, mask: Mask | None = None) -> float:
    """SNR from two images that differ in their noise only (NEMA's difference method).

    Mean of both in the mask over the standard deviation of the difference / sqrt(2).
    """
    inside = _checked(mask, first, second)
    a, b = first[inside].astype(np.float64), second[inside].astype(np.float64)
    sigma = float(np.std(a - b) / np.sqrt(2.0))
    return float((a + b).mean() / 2.0) / sigma if sigma > 0 else float("inf")


def expected_snr_ratio(
    voxel: tuple[float, float, float],
    other: tuple[float, float, float],
    minutes: float = 1.0,
    other_minutes: float = 1.0,
) -> float:
    """How many times the SNR of a scan is another's, by physics alone.

    SNR grows with the voxel's volume and the square root of the scan time, the argument
    of Scherrer et al. 2012 (the paper's reference 18) for thick slices.  Voxel sizes in
    mm, scan times in any one unit.

    >>> expected_snr_ratio((0.7, 0.7, 2.8), (0.7, 0.7, 0.7))
    4.0
    """
    volume = float(np.prod(voxel) / np.prod(other))
    return round(volume * float(np.sqrt(minutes / other_minutes)), 12)
