# SPDX-License-Identifier: Apache-2.0
"""Expected against observed error of the standard deviation maps, from development cases.

Reads results of ``development_cases.py --calibration`` and draws, for each, the root mean
square error against the standard deviation in bins of equal size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", type=Path, help="SVG to write")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of development cases")
    parser.add_argument("--method", default="irem")
    options = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "calibration"
    figure, axes = plt.subplots(figsize=(4.5, 4.2), layout="constrained")
    largest = 0.0
    for marker, path in zip("os^Dvx", options.results, strict=False):
        record = json.loads(path.read_text())
        for seed, row in record["seeds"].items():
            found = row[options.method]["calibration"]
            scale = 1 / found["rms_error"]
            expected = [scale * v for v in found["bins_expected"]]
            seen = [scale * v for v in found["bins_error"]]
            largest = max(largest, *expected, *seen)
            axes.plot(
                expected, seen, marker, markersize=4, alpha=0.8,
                label=f"{record['case']} seed {seed}: {100 * found['within_95']:.1f} % within "
                f"±1.96 sd, r = {found['correlation_of_bins']:.3f}",
            )  # fmt: skip
    axes.plot([0, largest], [0, largest], color="0.5", linewidth=1, zorder=0)
    axes.set_xlabel("expected: standard deviation / rms error of the head")
    axes.set_ylabel("observed: rms error of the bin / rms error of the head")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
