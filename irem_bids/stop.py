# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: clusters send it some seconds before they kill.  Save, and leave with 75.

Outside training the main process leaves at once.  Within :func:`training` the next
checkpoint is due immediately, and the process leaves after it.  A thread that waits for
the signal ends the process after :data:`GRACE` seconds in any case, because Python runs
no handler while compiled code computes.  Whatever is written is written whole or not at
all, so that leaving is safe at any moment.  Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from .exitcodes import ExitCode

GRACE = 7.0  # s from the signal to the end in any case; clusters give 10 and more
PATIENCE = 2.0  # s that a training may go on without asking whether a checkpoint is due
MESSAGE = (
    "terminated (SIGTERM); finished steps and checkpoints are kept, the same command goes on "
    "from here"
)


class Terminated(BaseException):
    """SIGTERM has come; no ``except Exception`` may hold it up."""


class _State:
    """What this process knows of the signal."""

    def __init__(self) -> None:
        self.installed = False
        self.asked = False  # the signal has come
        self.since: float | None = None  # when the training first came to know of it
        self.training = False
        self.due_told = False  # the training has been told that a checkpoint is due
        self.worker = False
        self.farewells: list[Callable[[], None]] = []


_STATE = _State()


class Seconds(float):
    """Seconds between checkpoints that are over as soon as the signal has come.

    Training asks ``elapsed >= seconds``; Python lets the subclass of float answer.
    """

    def __le__(self, elapsed: float) -> bool:
        _STATE.due_told = _STATE.asked
        return _STATE.asked or float(self) <= elapsed


def install(*, worker: bool = False) -> None:
    """Handle SIGTERM in this process; a worker leaves without unwinding.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    if _STATE.installed or threading.current_thread() is not threading.main_thread():
        return
    _STATE.installed, _STATE.worker = True, worker
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, end == reading)
        os.set_inheritable(end, False)
    signal.signal(signal.SIGTERM, _handle)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="sigterm", daemon=True).start()


def _handle(number: int, frame: FrameType | None) -> None:
    if _STATE.asked:
        return
    _STATE.asked = True
    if not _STATE.training:
        _leave()


def _watch(reading: int) -> None:
    """End the process some seconds after the signal; other signals are not ours."""
    while data := os.read(reading, 1):
        if data[0] == signal.SIGTERM:
            break
    else:
        return
    time.sleep(GRACE)
    if not _STATE.worker:
        with contextlib.suppress(OSError, ValueError):
            os.write(2, f"irem-bids: error: {MESSAGE}\n".encode())
    _exit()


def _leave() -> None:
    if _STATE.worker:
        _exit()
    raise Terminated(MESSAGE)


def _exit() -> None:
    for farewell in _STATE.farewells:
        with contextlib.suppress(Exception):
            farewell()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(int(ExitCode.TEMPORARY))


def at_exit(farewell: Callable[[], None]) -> None:
    """Call this before the process ends by the thread."""
    _STATE.farewells.append(farewell)


def forget(farewell: Callable[[], None]) -> None:
    """The opposite of :func:`at_exit`."""
    with contextlib.suppress(ValueError):
        _STATE.farewells.remove(farewell)


def leave_if_asked() -> None:
    """Leave where the signal has come: nipype may have taken :class:`Terminated` for a failure."""
    if _STATE.asked:
        _leave()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Within, the signal waits for the next checkpoint: see :func:`check`."""
    _STATE.training = True
    try:
        yield
    finally:
        _STATE.training = False
        if _STATE.asked:
            _leave()


def check() -> None:
    """Between two steps of training: leave if the signal has come and the state was saved.

    Where nothing asks for a checkpoint, leave after :data:`PATIENCE` seconds.
    """
    if not _STATE.asked:
        return
    if _STATE.since is None:
        _STATE.since = time.monotonic()
    if _STATE.due_told or time.monotonic() - _STATE.since > PATIENCE:
        _leave()
