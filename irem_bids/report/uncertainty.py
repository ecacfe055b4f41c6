# SPDX-License-Identifier: Apache-2.0
"""The standard deviation of a result: one scale for all methods, and its figure."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from . import views
from .material import Material, MethodResult
from .studio import Figure, Studio, around_head, coloured, zoomed
from .wording import number

TILE = 340  # pixels, about, of the longer side of a picture
MAP = "viridis"  # told apart by the colour-blind, and its lightness alone tells the order
#: Colours at even steps from 0 to :func:`top`, for pages: between them they are mixed.
STOPS = tuple(to_hex(matplotlib.colormaps[MAP](step / 12)) for step in range(13))
WITHIN = 1.96  # standard deviations either way hold 95 % of a normal distribution


def top(material: Material) -> float:
    """Where the scale of all maps ends, in units of the image: 99 % of the head lie below it."""
    ends = [
        float(np.percentile(result.std[result.mask], 99))
        for result in material.methods.values()
        if result.std is not None and result.mask is not None and result.mask.any()
    ]
    most = max(ends, default=0.0)
    if not most > 0:
        return 1.0
    step = 10.0 ** (np.floor(np.log10(most)) - 1)
    return float(np.ceil(most / step - 1e-9) * step)


def maps(studio: Studio, result: MethodResult) -> list[Figure]:
    """A result and its standard deviation through the middle of its head, in three planes."""
    if result.std is None or result.volume is None or result.mask is None:
        return []
    prepared = studio.material.prepared
    scale = 1.0 if prepared is None else prepared.scale
    most = top(studio.material)
    image, middle = around_head(result, result.volume / scale)
    std, _ = around_head(result, result.std / most)
    mm = float(image.grid.voxel_size.min()) / max(1, round(TILE / max(image.grid.shape)))
    grey, colour = [], []
    for plane in views.PLANES:
        pixels = views.grey(views.picture(image.data, plane, middle[plane]), studio.levels)
        grey.append(zoomed(np.repeat(pixels[..., None], 3, axis=2), image.grid, plane, mm))
        pixels = coloured(views.picture(std.data, plane, middle[plane]), MAP)
        colour.append(zoomed(pixels, std.grid, plane, mm))
    black, white = studio.levels
    median = float(np.median(result.std[result.mask]))
    share = 100 * median / scale / (white - black)
    words = f"median in the head {number(median)}, {share:.2g} % of the window of the image"
    return [
        Figure(
            views.save_png(
                views.montage([*grey, *colour], 3), studio.path(f"uncertainty{result.name}")
            ),
            "uncertainty",
            method=result.name,
            alt=f"reconstruction by {result.name} above its standard deviation, axial, coronal "
            f"and sagittal sections at the same place; {words}",
            caption=f"above the image, below its standard deviation; {words}",
        )
    ]
