# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzz campaign, with seeds that the long ones do not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST = 1_000_000


def test_a_short_campaign(tmp_path: Path) -> None:
    command = [
        sys.executable, str(REPOSITORY / "benchmarks" / "fuzz.py"), str(tmp_path / "result.json"),
        "--datasets", "25", "--headers", "400", "--first", str(FIRST),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "result.json").read_text())
    for name, count in (("headers", 400), ("datasets", 25)):
        assert record[name]["failures"] == []
        assert sum(record[name]["outcomes"].values()) == count
        assert record[name]["peak_memory_mb"] < 1500
    assert record["headers"]["outcomes"]["refused"] > 50
    assert record["headers"]["outcomes"]["used"] > 50
    assert {"usable", "exit code 65"} <= set(record["datasets"]["outcomes"])
