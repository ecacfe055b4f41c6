# SPDX-License-Identifier: Apache-2.0
"""What a computation does when memory ends, and a training when its loss is not finite."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

LOGGER = logging.getLogger(__name__)
SMALLEST = 64  # points at a time, below which halving frees nothing
RETREATS = 3  # times that a training steps back before it fails
SLOWER = 0.1  # of the learning rate, each time
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc",
          "cannot allocate memory", "failed to allocate memory", "unable to allocate")  # fmt: skip

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ended, on the CPU or on a GPU: the libraries have no common type for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)


@dataclass
class Pieces:
    """In how many pieces a batch is computed: twice as many whenever memory ends.

    ``what`` is computed, for the log.
    """

    what: str
    count: int = 1

    def run(self, points: int, work: Callable[[int], T]) -> T:
        """``work(size)``, which computes ``points`` points with ``size`` of them at a time.

        Raises
        ------
        MemoryError
            Memory ends with :data:`SMALLEST` points at a time, too.
        """
        while True:
            size = -(-points // self.count)
            try:
                return work(size)
            except (MemoryError, RuntimeError, OSError) as error:
                if not out_of_memory(error):
                    raise
                if size <= SMALLEST:
                    raise MemoryError(
                        f"{self.what}: out of memory with {size} points at a time ({error}); "
                        "give more memory, or a coarser --output-resolution"
                    ) from error
            # here the error, and what its frames hold, are gone
            _release()
            self.count *= 2
            LOGGER.warning(
                "%s: out of memory with %d points at a time; going on with %d",
                self.what, size, -(-points // self.count),
            )  # fmt: skip

    @property
    def doubts(self) -> list[str]:
        """What to say of it in the report."""
        if self.count == 1:
            return []
        return [f"{self.what}: memory ended; each batch was computed in {self.count} pieces"]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Retreat:
    """How often a training stepped back, and the share of the learning rate that is left."""

    count: int = 0
    rate: float = 1.0

    def step_back(self, loss: float, place: str) -> None:
        """Lower the rate, or give up.

        Raises
        ------
        FloatingPointError
            It stepped back :data:`RETREATS` times before.
        """
        if self.count == RETREATS:
            raise FloatingPointError(
                f"the training diverges: the loss is {loss} at {place}, also at {self.rate:g} of "
                f"the learning rate, after {RETREATS} returns to the last good state; lower the "
                "learning rate, or use --method srr"
            )
        self.count += 1
        self.rate *= SLOWER
        LOGGER.warning(
            "the loss is %s at %s: back to the last good state, with %g of the learning rate",
            loss, place, self.rate,
        )  # fmt: skip

    def record(self) -> list[float]:
        """JSON-safe arguments of another one."""
        return [self.count, self.rate]

    @property
    def doubts(self) -> list[str]:
        """What to say of it in the report."""
        if not self.count:
            return []
        times = "once" if self.count == 1 else f"{self.count} times"
        return [
            f"the training diverged and stepped back {times}; it ended with {self.rate:g} of the "
            "learning rate"
        ]


def finite(module: torch.nn.Module) -> bool:
    """Whether every number of a module is finite; asks its device once."""
    tensors = [*module.parameters(), *module.buffers()]
    each = [torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    return not each or bool(torch.stack(each).all())
