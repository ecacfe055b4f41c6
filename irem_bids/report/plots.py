# SPDX-License-Identifier: Apache-2.0
"""Curves as small SVG files: training, and the pose of each stack."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

# Okabe-Ito, told apart by the colour-blind; each series has its own marker or dash, too
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#8c4a78")
MARKERS = ("o", "s", "^", "D")
AXES = ("R-L", "A-P", "S-I")
SIZE = (4.8, 3.3)  # inches: text stays legible at the width of a telephone
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "irem-bids",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def _canvas() -> tuple[Canvas, Axes]:
    figure = Canvas(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Canvas, path: Path) -> Path:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": "irem-bids"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def thin(x: Sequence[float], y: Sequence[float], most: int = 800) -> tuple[NDArray, NDArray]:
    """At most ``most`` points of a curve, each the median of its neighbours."""
    count = min(len(x), len(y))
    xs, ys = np.asarray(x[:count], dtype=float), np.asarray(y[:count], dtype=float)
    keep = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    if xs.size <= most:
        return xs, ys
    parts = np.array_split(np.arange(xs.size), most)
    return (
        np.array([np.median(xs[p]) for p in parts]),
        np.array([np.median(ys[p]) for p in parts]),
    )


def training(history: Mapping[str, Sequence[float]], path: Path) -> Path | None:
    """Loss and held-out error over the steps; ``None`` where nothing was recorded."""
    series = []
    for name, xs, ys in (
        ("training loss", "step", "loss"),
        ("held-out error", "held_out_step", "held_out"),
    ):
        x, y = thin(history.get(xs, ()), history.get(ys, ()))
        if x.size:
            series.append((name, x, y))
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas()
        for number, (name, x, y) in enumerate(series):
            axes.plot(
                x,
                y,
                color=COLOURS[number],
                label=name,
                linewidth=1.4,
                linestyle="-" if number == 0 else "--",
                marker=MARKERS[number] if x.size <= 30 else None,
                markersize=4,
            )
        values = np.concatenate([y for _, _, y in series])
        if values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("scaled intensity squared")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return _save(figure, path)


def slice_curves(
    residual: NDArray[np.float64],
    weights: Mapping[str, NDArray[np.float64]],
    marked: Sequence[int],
    path: Path,
) -> Path | None:
    """Residual of each slice (K,), and weights (K,) by method on an axis of their own.

    ``marked`` slices have a cross.  ``None`` where no slice has a residual.
    """
    known = np.flatnonzero(np.isfinite(residual))
    if not known.size:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas()
        axes.plot(
            known, residual[known], color=COLOURS[0], marker="o", markersize=3, label="residual"
        )
        if len(marked):
            axes.plot(
                list(marked),
                residual[list(marked)],
                linestyle="",
                marker="x",
                markersize=11,
                markeredgewidth=2.5,
                color=COLOURS[1],
                label="stands out",
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("slice")
        axes.set_ylabel("median residual (scaled intensity)")
        axes.grid(alpha=0.3)
        series = axes.get_legend_handles_labels()[0]
        if weights:
            right = axes.twinx()
            right.spines["right"].set_visible(True)
            right.set_ylim(0, 1.05)
            right.set_ylabel("weight")
            for number, (name, values) in enumerate(weights.items()):
                series += right.step(
                    np.arange(len(values)),
                    values,
                    where="mid",
                    linestyle=("--", ":", "-.")[number % 3],
                    color=COLOURS[(number + 2) % len(COLOURS)],
                    label=f"weight by {name}",
                )
        figure.legend(handles=series, frameon=False, ncols=2, loc="outside upper center")
        return _save(figure, path)


def slice_motion(motion: NDArray[np.float64], path: Path) -> Path:
    """Rotation and translation of each slice; ``motion`` (K, 6) in rad and mm."""
    with matplotlib.rc_context(STYLE):
        figure = Canvas(figsize=(SIZE[0], 1.5 * SIZE[1]), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, sharex=True)
        for axes, values, unit in (
            (upper, np.rad2deg(motion[:, :3]), "rotation (degrees)"),
            (lower, motion[:, 3:], "translation (mm)"),
        ):
            for axis in range(3):
                axes.plot(
                    values[:, axis],
                    color=COLOURS[axis],
                    marker=MARKERS[axis],
                    markersize=3,
                    linewidth=1,
                    label=AXES[axis],
                )
            axes.set_ylabel(unit)
            axes.grid(alpha=0.3)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.set_xlabel("slice")
        upper.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
        return _save(figure, path)


def pose_components(
    labels: Sequence[str], sets: Mapping[str, NDArray[np.float64]], unit: str, path: Path
) -> Path:
    """Three components per stack as markers.

    ``sets`` maps what estimated the pose ('registration', a method) to (stacks, 3) values
    in ``unit``; the first set is drawn hollow.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas()
        places = np.arange(len(labels))
        count = len(sets) * 3
        for number, values in enumerate(sets.values()):
            for axis in range(3):
                shift = 0.7 * ((axis * len(sets) + number + 0.5) / count - 0.5)
                axes.plot(
                    places + shift,
                    values[:, axis],
                    linestyle="",
                    markersize=6,
                    marker=MARKERS[axis],
                    color=COLOURS[axis],
                    markerfacecolor="white" if number == 0 else COLOURS[axis],
                    alpha=1.0 if number < 2 else 0.6,
                    label=AXES[axis] if number == 0 else None,
                )
        axes.axhline(0, color="0.4", linewidth=0.8)
        for place in places[1:]:
            axes.axvline(place - 0.5, color="0.9", linewidth=0.8)
        axes.set_xticks(places, list(labels), rotation=30 if len(labels) > 3 else 0)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylabel(unit)
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
        return _save(figure, path)


def pose_table(
    stacks: Sequence[Any], poses: Sequence[Any], reference: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """((stacks, 3) rotation vectors in degrees, (stacks, 3) shifts in mm), about one centre.

    The centre is the middle of the foreground of the ``reference`` stack, so that a shift is
    how far the middle of the head was moved.
    """
    fixed = stacks[reference]
    centre = fixed.grid.middle_of(fixed.mask)
    vectors = np.array([pose.to_vector(centre) for pose in poses])
    return np.rad2deg(vectors[:, :3]), vectors[:, 3:]
