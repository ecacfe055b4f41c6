# SPDX-License-Identifier: Apache-2.0
"""Saving the derivatives of one group through niworkflows' sink.

Everything is written into a hidden folder of the output first and then renamed, so that
a file is there complete or not at all.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import publish, write_json
from .paths import (
    PATTERNS,
    base_entities,
    completed_key,
    contrast_entity,
    relative_path,
    sidecar_path,
)
from .products import Product, Result, products
from .settings import MODALITIES

if TYPE_CHECKING:
    from .groups import Group

PUBLISHED = (".nii.gz", ".txt", ".tsv", ".safetensors", ".json")  # the order of publishing
KEY_HOLDERS = tuple(f"_{suffix}.json" for suffix in MODALITIES)
STAGING = ".irem-bids-"


def templateflow_stub(folder: Path | None = None) -> None:
    """Point TemplateFlow at an empty archive, unless the user has set its home.

    No template is used here.  Importing niworkflows would otherwise write into HOME,
    which may be read-only, and index a skeleton for five seconds.
    """
    if os.environ.get("TEMPLATEFLOW_HOME"):
        return
    home = folder or Path(tempfile.gettempdir()) / f"irem-bids-templateflow-{os.getuid()}"
    write_json(home / "tpl-none" / "template_description.json", {"Name": "none"})
    os.environ["TEMPLATEFLOW_HOME"] = str(home)
    os.environ["TEMPLATEFLOW_AUTOUPDATE"] = "0"


@functools.cache
def datasink_class() -> type:
    """niworkflows' sink with this app's names; its import takes seconds."""
    templateflow_stub()
    from niworkflows.interfaces.bids import DerivativesDataSink

    class IremDerivativesDataSink(DerivativesDataSink):
        """The sink with the patterns of :data:`PATTERNS` and no folder of its own."""

        out_path_base = ""
        _file_patterns = tuple(PATTERNS)

    return IremDerivativesDataSink


def sink(product: Product, group: Group, base: Path) -> list[Path]:
    """Let the sink write one product (and its sidecar) under ``base``."""
    entities = {
        **base_entities(group),
        **contrast_entity(group, product.entities["suffix"]),
        **product.entities,
    }
    folder = f"sub-{group.subject}" + (f"/ses-{group.session}" if group.session else "")
    stem = folder.replace("/", "_")
    extension = entities.pop("extension")
    writer = datasink_class()(
        base_directory=str(base),
        in_file=[str(product.path)],
        source_file=[f"{folder}/anat/{stem}_{group.suffix}.nii.gz"],
        check_hdr=False,
    )
    for key, value in entities.items():
        setattr(writer.inputs, key, value)
    if extension == ".nii.gz":
        writer.inputs.compress = True
    if product.sidecar is not None:
        writer.inputs.meta_dict = product.sidecar
    outputs = writer.run().outputs
    out_file = outputs.out_file
    written = [Path(out_file if isinstance(out_file, str) else out_file[0])]
    if isinstance(outputs.out_meta, str):
        written.append(Path(outputs.out_meta))
    return written


def save(result: Result, output_dir: Path) -> list[Path]:
    """Write all derivatives of a group; returns their paths.

    The sidecars of the reconstructions come last: they hold the keys that say that
    the group is finished.  Those of an older result with other settings go first, so
    that a run killed in between is not taken for a finished one.
    """
    staging = output_dir / f"{STAGING}{result.group.name}"
    shutil.rmtree(staging, ignore_errors=True)
    base = staging / "out"
    base.mkdir(parents=True)
    try:
        written = []
        for product in products(result, staging / "made"):
            written += sink(product, result.group, base)
        written.sort(key=_publishing_order)
        for method, key in result.keys.items():
            if completed_key(output_dir, result.group, method) not in (None, key):
                (output_dir / sidecar_path(result.group, method)).unlink(missing_ok=True)
                kept = {path.relative_to(base) for path in written}
                for old in _belonging(result.group, method):
                    if old not in kept:
                        (output_dir / old).unlink(missing_ok=True)
        return [publish(path, output_dir / path.relative_to(base)) for path in written]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _belonging(group: Group, method: str) -> list[Path]:
    """What an older result may have left that a new one need not have: not to lie beside it."""
    names: list[dict[str, str]] = [
        {"suffix": "std", "desc": method, "extension": ".nii.gz"},
        {"suffix": "std", "desc": method, "extension": ".json"},
        {"suffix": "model", "desc": method, "extension": ".safetensors"},
        *(
            {"suffix": "mask", "desc": desc, "extension": extension}
            for desc in ("brain", "head")
            for extension in (".nii.gz", ".json")
        ),
        *(
            {"from": one.label, "to": other.label, "mode": "image", "desc": method}
            | {"suffix": "xfm", "extension": ".txt"}
            for one in group.stacks
            for other in group.stacks  # any of them may have been the reference
        ),
    ]
    return [Path(relative_path(group, **entities)) for entities in names]


def _publishing_order(path: Path) -> int:
    """Data before sidecars, and those of the reconstructions, with the keys, at the very end."""
    order = next(i for i, ending in enumerate(PUBLISHED) if path.name.endswith(ending))
    return order + path.name.endswith(KEY_HOLDERS)
