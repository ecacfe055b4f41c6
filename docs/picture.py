# SPDX-License-Identifier: Apache-2.0
"""The picture of the README, from the demo's output: ``python docs/picture.py build/demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from irem_bids.reconstruction.baselines import resample_stack
from irem_bids.reconstruction.geometry import RigidTransform
from irem_bids.reconstruction.simulated_dataset import read_truth
from irem_bids.reconstruction.stack import Stack, read_image, read_stack
from irem_bids.tools import estimated_poses


def main() -> None:
    """One sagittal section: a stack as acquired, two reconstructions, the truth."""
    demo = Path(sys.argv[1])
    anat = demo / "derivatives" / "sub-01" / "anat"
    irem = anat / "sub-01_desc-irem_T1w.nii.gz"
    result, grid = read_image(irem)
    blurred, _ = read_image(anat / "sub-01_desc-bspline_T1w.nii.gz")
    known = read_truth(demo / "dataset")
    poses = estimated_poses(demo / "derivatives", irem, known)
    label = "axial1"
    stack = read_stack(demo / "dataset/sub-01/anat/sub-01_acq-axial_T1w.nii.gz", label=label)
    thick, _ = resample_stack(stack, poses[label], grid, order=0)
    truth = Stack("t", known.volume, known.grid, 2, 1.0, known.volume > 0)
    # the reference stack's hidden motion leads from the result's space to the truth's
    reference = next(n for n, p in poses.items() if p == RigidTransform())
    true, _ = resample_stack(truth, known.poses[reference].inverse(), grid)
    panels = {
        "axial stack, 4 mm slices": thick,
        "B-spline average of three stacks": blurred,
        "irem, 1 mm": result,
        "truth": true,
    }
    axis = int(np.argmax(np.abs(grid.directions[0])))  # left to right
    place = int(np.argwhere(result > 0)[:, axis].mean()) + 6
    up = [a for a in range(3) if a != axis]
    up.sort(key=lambda a: abs(grid.directions[2, a]))  # posterior-anterior, then up
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.3), facecolor="black")
    for axis_, (title, image) in zip(axes, panels.items(), strict=True):
        section = np.take(image, place, axis=axis)
        section = section if up[0] < up[1] else section.T
        section = section[:: 1 if grid.directions[1, up[0]] > 0 else -1]
        section = section[:, :: 1 if grid.directions[2, up[1]] > 0 else -1]
        window = np.percentile(image[image > 0], 99.5)
        axis_.imshow(section.T, cmap="gray", origin="lower", vmin=0, vmax=window)
        axis_.set_title(title, color="white", fontsize=9)
        axis_.axis("off")
    figure.tight_layout(pad=0.3)
    target = Path(__file__).parent / "_static" / "demo.png"
    figure.savefig(target, dpi=100, facecolor="black")


if __name__ == "__main__":
    main()
