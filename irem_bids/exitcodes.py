# SPDX-License-Identifier: Apache-2.0
"""Exit codes of the BIDS Apps execution specification, and the error that carries one."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a run ended."""

    SUCCESS = 0
    FAILURE = 1
    NOT_BIDS = 16
    UNKNOWN_LEVEL = 17
    NOTHING_SELECTED = 18
    USAGE = 64
    BAD_DATA = 65
    NO_INPUT = 66
    CANNOT_CREATE = 73
    IO_ERROR = 74
    TEMPORARY = 75


class UserError(Exception):
    """A mistake or a bad input that the user can mend: one message, no traceback.

    Parameters
    ----------
    message
        What was found, what was expected and what to do.
    code
        The exit code of the run.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.code = ExitCode(code)

    def __reduce__(self) -> tuple:
        return type(self), (self.message, self.code)
