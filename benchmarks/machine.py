# SPDX-License-Identifier: Apache-2.0
"""Where and at which commit a campaign runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Command, commit, processors and Python."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": done.stdout.strip(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
