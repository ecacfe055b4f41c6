# SPDX-License-Identifier: Apache-2.0
"""The paper's Fig. 4 and 5: each method on a T1w head (A) and a FLAIR (B), k = 4 and 8."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from simulation import DATA_SETS, DOWNSAMPLING, EPOCHS, epochs, make, record

PROFILES = ["box", "gaussian", "none"]
METHODS = ["bspline", "srr", "irem2021", "irem"]
PAPER = "irem2021 above SRR above B-spline, for A and B, k = 4 and 8, PSNR and SSIM (Fig. 4)"


def picture(path: Path, truth: np.ndarray, images: dict[str, np.ndarray]) -> None:
    """The middle coronal plane: truth and methods, one grey window, superior up."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = {"truth": truth, **images}
    chart, axes = pyplot.subplots(
        1, len(shown), figsize=(2.2 * len(shown), 2.5), layout="constrained"
    )
    for panel, (name, volume) in zip(axes, shown.items(), strict=True):
        plane = volume[:, volume.shape[1] // 2].T
        panel.imshow(plane, cmap="gray", origin="lower", vmin=0, vmax=np.quantile(truth, 0.999))
        panel.set_title(name)
        panel.axis("off")
    chart.savefig(path, dpi=110)


def main() -> None:
    """Every combination that is asked for; Fig. 5 is its picture, where a folder is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the truths")
    parser.add_argument("result", type=Path)
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument(
        "--downsampling", nargs="+", choices=DOWNSAMPLING, default=list(DOWNSAMPLING)
    )
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--told", choices=PROFILES, help="a slice profile that is not the true one")
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of irem2021")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pictures", type=Path, help="folder for Fig. 5")
    options = parser.parse_args()
    result = record(PAPER, options.crop, options.epochs)
    for name in options.sets:
        for k in options.k:
            for downsampling in options.downsampling:
                truth = options.data / DATA_SETS[name]
                made = make(truth, options.crop, k, downsampling, options.told)
                images = {}
                for method in options.methods:
                    scores, images[method] = made.score(
                        method, epochs(options.epochs), options.device
                    )
                    row = {"set": name, "k": k, "downsampling": downsampling, "method": method}
                    row |= {"told": options.told} if options.told else {}
                    result["rows"].append({**row, **scores})
                    print(result["rows"][-1], flush=True)
                    options.result.write_text(json.dumps(result, indent=1) + "\n")
                if options.pictures:
                    file = options.pictures / f"figure_5_{name}_k{k}_{downsampling}.png"
                    picture(file, made.volume, images)


if __name__ == "__main__":
    main()
