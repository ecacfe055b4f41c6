# SPDX-License-Identifier: Apache-2.0
"""What each part of ``irem`` is worth: a development case with each switched off alone.

The linear base cannot be: it is what the network looks at.  SRR, for comparison, gets the weight
of its penalty from the truth.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from development_cases import Bench, best_srr, header, parser

from irem_bids.reconstruction import acquisition, linear, optimise, rehearsal, solution
from irem_bids.reconstruction.refine import Freedom

NOTHING = 1e-9  # weight of a penalty that is switched off

#: What is switched off, by the settings that do it.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "slice profile": {"acquisition": {"profile": "none"}},
    "refined poses, gain and bias": {"irem": {"refine_poses": False}},
    "slice poses": {"irem": {"motion": "stack"}},
    "width of the profile": {"acquisition": {"profile_width": "stated"}},
    "penalty": {"srr": {"srr_lambda": NOTHING}},
    "robust weights": {"irem": {"robust": False}},
    "network": {"irem": {"steps": 0}},
}


@contextlib.contextmanager
def _without_receivers() -> Iterator[None]:
    with mock.patch.object(solution, "Freedom", functools.partial(Freedom, receiver=False)):
        yield


@contextlib.contextmanager
def _without_bregman() -> Iterator[None]:
    plain = linear.solve
    with (
        mock.patch.object(optimise, "restored", plain),
        mock.patch.object(rehearsal, "restored", plain),
    ):
        yield


@contextlib.contextmanager
def _without_reconciling() -> Iterator[None]:
    with mock.patch.object(optimise, "reconciled", lambda system, guess: guess):
        yield


@contextlib.contextmanager
def _trilinear() -> Iterator[None]:
    with mock.patch.object(acquisition, "amounts", return_value=np.zeros(3, np.float32)):
        yield


#: What has no setting, by what goes without it.
PARTS = {
    "gain and bias": _without_receivers,
    "Bregman iteration": _without_bregman,
    "reconciling the network with the stacks": _without_reconciling,
    "sharpened interpolation": _trilinear,
}


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    record = header("ablation.py", options)
    for seed in options.seeds:
        bench = Bench(options.case, seed, options.data, options)
        rows: dict[str, Any] = {}
        record["seeds"][str(seed)] = {"protocol": vars(bench.protocol), "without": rows}

        def keep(name: str, found: dict[str, Any], rows: dict[str, Any] = rows) -> None:
            kept = ("psnr", "ssim", "held_out_psnr", "motion", "slice_error_mm", "contrast")
            rows[name] = {k: found[k] for k in kept if found.get(k) is not None}
            if "target_registration_error_mm" in found:
                errors = list(found["target_registration_error_mm"].values())
                rows[name]["target_registration_error_mm"] = float(np.mean(errors))
            rows[name]["cpu_s"] = round(found["seconds"]["cpu"], 1)
            options.result.write_text(json.dumps(record, indent=1) + "\n")
            print(name, json.dumps(rows[name]), flush=True)

        keep("srr", best_srr(bench, options.strengths))
        keep("nothing", bench.run("irem", bench.settings))
        for name, changes in OPTIONS.items():
            settings = bench.settings.updated(changes)
            if settings != bench.settings:
                keep(name, bench.run("irem", settings))
        for name, without in PARTS.items():
            with without():
                keep(name, bench.run("irem", bench.settings))


if __name__ == "__main__":
    main()
