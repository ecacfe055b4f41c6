# SPDX-License-Identifier: Apache-2.0
"""The paper's Fig. 3: irem2021 against the dimension 2L of the Fourier features, k = 8."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simulation import DATA_SETS, DOWNSAMPLING, EPOCHS, epochs, make, record

PAPER = "PSNR grows with 2L, ever more slowly; 2L = 256 was chosen (Fig. 3, data set A)"


def main() -> None:
    """One row for each 2L."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the truths")
    parser.add_argument("result", type=Path)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--downsampling", choices=DOWNSAMPLING, default="averaging")
    parser.add_argument("--crop", type=float, help="use only the middle so many mm")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    made = make(options.data / DATA_SETS["A"], options.crop, options.k, options.downsampling)
    result = record(PAPER, options.crop, options.epochs)
    for features in options.features:
        changes = epochs(options.epochs)
        changes["irem2021"]["fourier_features"] = features
        scores, _ = made.score("irem2021", changes)
        result["rows"].append({"fourier_features": features, **scores})
        print(result["rows"][-1], flush=True)
        options.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
