# SPDX-License-Identifier: Apache-2.0
"""The same bits each time, on a GPU too: a CPU gives them anyway; and one thread of BLAS."""

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


@contextlib.contextmanager
def small_matrices() -> Iterator[None]:
    """Within, BLAS has one thread, where threadpoolctl is there to say so.

    The matrices of the poses have some hundred rows: more threads wait for each other longer than
    they work, at the full cost of a processor (5 s instead of 0.6 s a round beside another job).
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # a machine with torch alone
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield
