# SPDX-License-Identifier: Apache-2.0
"""Where and at which commit a campaign runs."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Of this process and of those below it that have ended."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return round(sum(one.ru_utime + one.ru_stime for one in used), 1)


def machine() -> dict[str, Any]:
    """Command (files by name only), commit, processors, load by everything, and Python."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", str(script), *words]),
        "commit": done.stdout.strip(),
        "processors": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
