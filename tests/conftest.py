# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test modules use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .stacks import write_description, write_stack

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images; tests that ask for it skip where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real images, ../shared/data, is not there")
    return folder


@pytest.fixture
def make_stack(tmp_path: Path) -> Callable[..., Path]:
    """``make_stack(name, plane, in_plane=, spacing=, oblique=, sidecar=)`` below tmp_path."""

    def make(name: str, plane: str = "axial", **keywords: object) -> Path:
        return write_stack(tmp_path / name, plane, **keywords)

    return make


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """A BIDS dataset: sub-01 with one small T1w stack per plane, with sidecars."""
    root = write_description(tmp_path / "bids")
    for label, plane in (("ax", "axial"), ("cor", "coronal"), ("sag", "sagittal")):
        write_stack(
            root / "sub-01" / "anat" / f"sub-01_acq-{label}_T1w.nii.gz",
            plane,
            sidecar={"SliceThickness": 5.0, "EchoTime": 0.01},
        )
    return root


@pytest.fixture
def cuda() -> str:
    """The CUDA device; the test is skipped, counted, where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return "cuda"
