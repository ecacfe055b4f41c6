# SPDX-License-Identifier: Apache-2.0
"""What the network and the sharpening are worth: development cases with each switched off.

SRR gets the weight of its penalty from the truth, irem does not.  ``trilinear``: stacks are
predicted by plain linear interpolation, as before :mod:`irem_bids.reconstruction.sharpening`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from development_cases import CASES, Bench, best_srr
from simulated_head import machine

from irem_bids.reconstruction import acquisition


@contextlib.contextmanager
def trilinear() -> Iterator[None]:
    """Without the sharpening."""
    nothing = np.zeros(3, np.float32)
    with mock.patch.object(acquisition, "amounts", return_value=nothing):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the truths")
    parser.add_argument("result", type=Path, help="JSON to write")
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.7, 1.4, 2.0])
    parser.add_argument("--truth", help="another truth of the folder")
    parser.add_argument("--crop", type=float, help="middle of the truth, mm")
    parser.add_argument("--protocol", default="{}", help="changes of the protocol, JSON")
    parser.add_argument("--set", nargs="*", default=[], help="section.option=JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(calibration=False)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "command": ["python", "benchmarks/network.py", "DATA", "RESULT", *sys.argv[3:]],
        "machine": machine(),
        "case": options.case,
        "seeds": {},
    }
    for seed in options.seeds:
        bench = Bench(options.case, seed, options.data, options)
        plain = bench.settings.updated({"irem": {"steps": 0}})
        row: dict[str, Any] = {"protocol": vars(bench.protocol)}
        record["seeds"][str(seed)] = row

        def keep(name: str, found: dict[str, Any], row: dict[str, Any] = row) -> None:
            row[name] = found
            options.result.write_text(json.dumps(record, indent=1) + "\n")
            print(name, json.dumps(found), flush=True)

        keep("srr", best_srr(bench, options.strengths))
        keep("irem", bench.run("irem", bench.settings))
        keep("irem without network", bench.run("irem", plain))
        with trilinear():
            keep("srr trilinear", best_srr(bench, options.strengths))
            keep("irem trilinear, without network", bench.run("irem", plain))


if __name__ == "__main__":
    main()
