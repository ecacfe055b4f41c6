# SPDX-License-Identifier: Apache-2.0
"""Log lines on stderr, and progress: a bar where a person watches, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TextIO

PACKAGE = "irem_bids"
BAR_WIDTH = 30
LINE_EVERY = 30.0  # s between two log lines of one progress


def configure(verbosity: int = 0, stream: TextIO | None = None) -> logging.Logger:
    """Send this package's log to ``stream`` (stderr); verbosity 0 is INFO, 1 and more DEBUG."""
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbosity > 0 else logging.INFO)
    logger.propagate = False
    return logger


def duration(seconds: float) -> str:
    """Seconds as text.

    >>> duration(7), duration(125), duration(7300)
    ('7 s', '2:05 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class Progress:
    """``progress(fraction, message)`` with the time left.

    A bar is drawn on a terminal; elsewhere a log line appears every
    :data:`LINE_EVERY` seconds.  Use as a context manager, so that the bar's
    line is ended.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._bar = self._stream.isatty()
        self._start = self._last = time.monotonic()
        self._drawn = False

    def __call__(self, fraction: float, message: str = "") -> None:
        """Show that ``fraction`` (0 to 1) of the work is done."""
        now = time.monotonic()
        if now - self._last < (0.1 if self._bar else LINE_EVERY) and not (
            self._bar and fraction >= 1
        ):
            return
        self._last = now
        left = (now - self._start) * (1 - fraction) / fraction if fraction > 0 else None
        text = f"{self._label} {100 * fraction:3.0f} %"
        if left is not None:
            text += f", {duration(left)} left"
        if message:
            text += f" ({message})"
        if not self._bar:
            logging.getLogger(PACKAGE).info(text)
            return
        done = round(BAR_WIDTH * min(max(fraction, 0.0), 1.0))
        self._stream.write(f"\r\x1b[K[{'#' * done}{'-' * (BAR_WIDTH - done)}] {text}")
        self._stream.flush()
        self._drawn = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
