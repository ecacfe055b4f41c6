# SPDX-License-Identifier: Apache-2.0
"""The same bits each time, on a GPU too: a CPU gives them anyway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def repeatable(asked: bool) -> Iterator[None]:
    """Within, torch uses deterministic algorithms only, and refuses where it has none."""
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # read when cuBLAS starts: without it, matrix products may differ from run to run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
