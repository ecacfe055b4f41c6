# SPDX-License-Identifier: Apache-2.0
"""The bill of materials names every package of the environment with its version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_bill_of_materials(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    subprocess.run([sys.executable, str(REPOSITORY / "docker" / "sbom"), str(path)], check=True)
    bill = json.loads(path.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    found = {re.sub(r"[-_.]+", "-", c["name"]).lower(): c for c in bill["components"]}
    lock = (REPOSITORY / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE))
    assert len(locked) > 30
    missing = [n for n in locked if re.sub(r"[-_.]+", "-", n).lower() not in found]
    assert missing == []
    nibabel = found["nibabel"]
    assert nibabel["purl"] == f"pkg:pypi/nibabel@{nibabel['version']}"
    assert nibabel["licenses"]
    assert len({c["bom-ref"] for c in bill["components"]}) == len(bill["components"])
