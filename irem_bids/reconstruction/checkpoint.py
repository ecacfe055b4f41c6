# SPDX-License-Identifier: Apache-2.0
"""State of an unfinished training: tensors and a JSON record in one safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def save_state(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write whole or not at all, also when the process is killed."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary,
            metadata={"record": json.dumps(record)},
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save_state` wrote, or None when there is nothing usable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, OSError):
        return None
