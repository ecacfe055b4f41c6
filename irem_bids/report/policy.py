# SPDX-License-Identifier: Apache-2.0
"""What a page may do: run its own script, show its own pictures, nothing else."""

from __future__ import annotations

import base64
import hashlib


def header(script: str) -> str:
    """A Content-Security-Policy tag that lets this very script run and no other.

    Whatever slipped into the page could neither run nor be fetched from elsewhere.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"script-src 'sha256-{digest}'; img-src 'self' file: data:; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
    )
