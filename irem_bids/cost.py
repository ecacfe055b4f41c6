# SPDX-License-Identifier: Apache-2.0
"""What a reconstruction is estimated to need: seconds, memory and GPU memory.

The constants are all here.  Processor seconds of ``srr`` and of normalisation, and memory, were
measured by ``benchmarks/scaling.py`` (heads of 64 to 240 voxels) and on a 1.5 mm head of three
stacks of 4 mm, with both processors of an x86_64 without a GPU busy; ``irem`` and the standard
deviation on a 1 mm and a 1.5 mm head; N4 and the report with ``benchmarks/simulated_head.py``;
``irem2021`` on crops of 50 and 60 mm by ``benchmarks/lesions.py`` and ``paper/figure_4.py`` (100
and about 50 s per epoch and million acquired voxels).  Another machine is faster or slower, so that
an estimate of seconds is good within a factor of about two.  Training on a GPU was not measured:
its seconds are those of the CPU, which they do not exceed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .log import duration
from .resources import Resources
from .settings import WITH_DEVIATION, Settings

if TYPE_CHECKING:
    from .groups import Group

BASE_GB = 0.8  # an interpreter with torch, SimpleITK and the figures' libraries
BYTES_PER_VOXEL = (80, 50)  # of the result: once, and per stack; measured, rounded up
GPU_BASE_GB = 0.6  # a CUDA context and torch's libraries
#: Seconds: once, and per million voxels of the result's box with three stacks.
NORMALISE = (3.0, 2.5)
REPORT = (15.0, 1.0)
METHODS = {"irem": (60.0, 6.0), "srr": (5.0, 1.2), "bspline": (1.0, 3.4)}
UNCERTAINTY = (4.0, 1.2)  # of irem and srr, each
IREM2021_EPOCH = 100.0  # s per epoch and million acquired voxels
N4 = 10.0  # s per million acquired voxels
STACKS = 3  # of the measurements


@dataclass(frozen=True)
class Cost:
    """Seconds on the processors of one step, memory and GPU memory at a time, 10^9 bytes."""

    seconds: float
    memory_gb: float
    gpu_gb: float

    def __str__(self) -> str:
        gpu = f", {self.gpu_gb:.1f} GB of a GPU" if self.gpu_gb else ""
        return f"{duration(self.seconds)}, {self.memory_gb:.1f} GB{gpu}"


def result_voxels(group: Group, settings: Settings) -> float:
    """Voxels of the result, if it covers the box of the largest stack."""
    size = settings.output.output_resolution
    finest = size or min(min(stack.in_plane) for stack in group.stacks)
    largest = max(
        math.prod(stack.shape) * math.prod(stack.in_plane) * stack.spacing for stack in group.stacks
    )
    return largest / finest**3


def training_gb(group: Group, settings: Settings) -> float:
    """Memory of the arrays of one training, without the interpreter."""
    each = BYTES_PER_VOXEL[0] + BYTES_PER_VOXEL[1] * len(group.stacks)
    return each * result_voxels(group, settings) / 1e9


def memory_gb(group: Group, settings: Settings, resources: Resources) -> float:
    """Estimated memory of one training in 10^9 bytes, not above what there is."""
    wanted = BASE_GB + training_gb(group, settings)
    return round(min(wanted, resources.memory_gb), 3)


def estimate(group: Group, settings: Settings, resources: Resources) -> Cost:
    """What one group needs."""
    millions = result_voxels(group, settings) / 1e6
    acquired = sum(math.prod(stack.shape) for stack in group.stacks) / 1e6
    share = len(group.stacks) / STACKS
    seconds = NORMALISE[0] + NORMALISE[1] * millions * share
    seconds += N4 * acquired if settings.normalise.n4 else 0.0
    for method in settings.output.method:
        if method == "irem2021":
            seconds += IREM2021_EPOCH * acquired * settings.irem2021.epochs_2021
        else:
            once, each = METHODS[method]
            seconds += once + each * millions * share
        if settings.output.uncertainty and method in WITH_DEVIATION:
            seconds += UNCERTAINTY[0] + UNCERTAINTY[1] * millions * share
    seconds += REPORT[0] + REPORT[1] * millions
    arrays = training_gb(group, settings)
    return Cost(seconds, BASE_GB + arrays, GPU_BASE_GB + arrays if resources.gpu else 0.0)


def side_by_side(costs: Iterable[Cost], resources: Resources) -> int:
    """How many groups of these are worked on at a time."""
    costs = list(costs)
    if not costs:
        return 1
    by_memory = int(resources.memory_gb / max(cost.memory_gb for cost in costs))
    by_processors = resources.nprocs // resources.threads
    if resources.gpu:
        by_processors = len(resources.devices)
    return max(1, min(by_processors, by_memory, len(costs)))


def summary(costs: Iterable[Cost], resources: Resources) -> str:
    """One or two lines on all groups together."""
    costs = list(costs)
    if not costs:
        return ""
    width = side_by_side(costs, resources)
    most = max(cost.memory_gb for cost in costs)
    total = Cost(
        sum(cost.seconds for cost in costs) / width,
        min(most * width, max(resources.memory_gb, most)),
        max(cost.gpu_gb for cost in costs),
    )
    text = (
        f"estimate in all: {total} with {resources.nprocs} processor"
        f"{'' if resources.nprocs == 1 else 's'}, {width} at a time "
        "(seconds are good within a factor of two)\n"
    )
    if most > resources.memory_gb:
        text += (
            f"warning: a group needs {most:.1f} GB, and this process may use "
            f"{resources.memory_gb:.1f} GB; give more, or a coarser --output-resolution\n"
        )
    return text
