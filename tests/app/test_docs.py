# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from irem_bids.exitcodes import ExitCode
from irem_bids.parser import build_parser
from irem_bids.settings import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def options() -> ModuleType:
    """docs/options.py."""
    spec = importlib.util.spec_from_file_location("docs_options", DOCS / "options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_notebook_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = BLOCK.findall((DOCS / "notebook.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/notebook.md, block {number}", "exec"), names)
    scores = names["scores"]
    assert scores["srr"].psnr > scores["bspline"].psnr
    assert scores["srr"].ssim > 0.9
    assert names["prepared"].metrics["ncc_after"] > names["prepared"].metrics["ncc_before"]
    assert "dB on held-out voxels" in capsys.readouterr().out


def test_usage_page_has_every_section(options: ModuleType) -> None:
    page = (DOCS / "usage.md").read_text(encoding="utf-8")
    named = re.findall(r"^```\{options-table\} (\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(SECTIONS)


@pytest.mark.parametrize("section", list(SECTIONS))
def test_option_table_matches_the_command_line(options: ModuleType, section: str) -> None:
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    table = options.markdown_table(section)
    fields = dataclasses.fields(SECTIONS[section])
    assert len(table.splitlines()) == len(fields) + 2
    shown = set(re.findall(r"`(--?[a-z][a-z0-9-]*)`", table))
    assert shown and shown <= known


def test_exit_codes_are_all_listed() -> None:
    page = (DOCS / "usage.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}


def test_no_hyperparameter_is_typed_into_the_pages(options: ModuleType) -> None:
    """Settings named on the method page exist."""
    known = {f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)}
    page = (DOCS / "method.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", page))
    assert named and named <= known
