# SPDX-License-Identifier: Apache-2.0
"""What the network and the sharpening are worth: development cases with each switched off.

SRR gets the weight of its penalty from the truth, irem does not.  ``trilinear``: stacks are
predicted by plain linear interpolation, as before :mod:`irem_bids.reconstruction.sharpening`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from development_cases import Bench, best_srr, header, parser

from irem_bids.reconstruction import acquisition


@contextlib.contextmanager
def trilinear() -> Iterator[None]:
    """Without the sharpening."""
    nothing = np.zeros(3, np.float32)
    with mock.patch.object(acquisition, "amounts", return_value=nothing):
        yield


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    record = header("network.py", options)
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
