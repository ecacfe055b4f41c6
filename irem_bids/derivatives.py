# SPDX-License-Identifier: Apache-2.0
"""Names, sidecars and atomic writing of the derivatives of one group.

Names come from path patterns that pybids and niworkflows' ``DerivativesDataSink``
share.  Everything is written into a hidden folder of the output first and then
renamed, so that a file is there complete or not at all.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import MODALITIES, Settings

if TYPE_CHECKING:
    from .bids import Group

LONG_NAMES = {
    "task": "task",
    "acq": "acquisition",
    "ce": "ceagent",
    "trc": "tracer",
    "rec": "reconstruction",
    "run": "run",
    "echo": "echo",
    "flip": "flip",
    "inv": "inv",
    "mt": "mt",
    "part": "part",
}
_START = "sub-{subject}[/ses-{session}]/{datatype<anat>|anat}/sub-{subject}[_ses-{session}]"
_SHARED = (
    "[_task-{task}][_acq-{acquisition}][_ce-{ceagent}][_trc-{tracer}][_rec-{reconstruction}]"
    "[_run-{run}][_mod-{modality}][_echo-{echo}][_flip-{flip}][_inv-{inv}][_mt-{mt}][_part-{part}]"
)
PATTERNS = [
    _START + _SHARED + "[_space-{space}][_desc-{desc}]_{suffix<T1w|T2w|PDw|FLAIR|mask>}"
    "{extension<.nii.gz|.json>|.nii.gz}",
    _START + _SHARED + "_from-{from}_to-{to}_mode-{mode<image|points>|image}[_desc-{desc}]"
    "_{suffix<xfm>|xfm}{extension<.txt>|.txt}",
    _START + _SHARED + "[_desc-{desc}]_{suffix<qc>}{extension<.json|.tsv>|.json}",
    _START + _SHARED + "[_desc-{desc}]_{suffix<model>}{extension<.safetensors>|.safetensors}",
]
PUBLISHED = (".nii.gz", ".txt", ".tsv", ".safetensors", ".json")  # the order of publishing
KEY_HOLDERS = tuple(f"_{suffix}.json" for suffix in MODALITIES)
STAGING = ".irem-bids-"


@dataclass(frozen=True)
class Result:
    """A group whose steps have run.

    Attributes
    ----------
    prepared
        Folder of ``Prepared.save``.
    methods
        Method to its folder with ``volume.nii.gz``, ``mask.nii.gz``, ``quality.json``,
        ``fit.json``, ``step.json`` and ``model.safetensors``.
    keys
        Method to the key of its result (:mod:`irem_bids.completion`).
    provenance
        ``command``, ``versions`` and what else the run says of itself.
    """

    group: Group
    prepared: Path
    methods: dict[str, Path]
    settings: Settings
    keys: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Product:
    """One file to save: where it is, its entities (long names) and its sidecar."""

    path: Path
    entities: dict[str, str]
    sidecar: dict[str, Any] | None = None


# ---------------------------------------------------------------------------- names
def base_entities(group: Group) -> dict[str, str]:
    """Long-named entities that every file of a group has."""
    entities = {"subject": group.subject, "datatype": "anat"}
    if group.session:
        entities["session"] = group.session
    for short, value in group.entities.items():
        entities[LONG_NAMES[short]] = str(value)
    return entities


def contrast_entity(group: Group, suffix: str) -> dict[str, str]:
    """The entity that keeps contrasts apart in files whose suffix does not name it.

    T1w has none.  Another contrast's masks carry ``space-<contrast>`` (the grid of that
    reconstruction), which BIDS knows; files outside BIDS carry ``mod-<contrast>``.
    """
    if group.suffix == "T1w" or suffix == group.suffix:
        return {}
    return {"space" if suffix == "mask" else "modality": group.suffix}


def relative_path(group: Group, **entities: str) -> str:
    """Path of a derivative below the output folder; ``entities`` have long names.

    Raises
    ------
    ValueError
        No pattern fits the entities.
    """
    from bids.layout.writing import build_path

    named = {**base_entities(group), **contrast_entity(group, entities["suffix"]), **entities}
    path = build_path(named, PATTERNS)
    if not path:
        raise ValueError(f"no name of a derivative fits the entities {named}")
    return str(path)


def image_path(group: Group, method: str) -> str:
    """Path of a method's reconstruction below the output folder."""
    return relative_path(group, desc=method, suffix=group.suffix, extension=".nii.gz")


def registered_path(group: Group, label: str) -> str:
    """Path of a registered stack below the output folder."""
    return relative_path(
        group, acquisition=label, desc="registered", suffix=group.suffix, extension=".nii.gz"
    )


def sidecar_path(group: Group, method: str) -> str:
    """Path of the reconstruction's sidecar below the output folder."""
    return relative_path(group, desc=method, suffix=group.suffix, extension=".json")


def completed_key(output_dir: Path, group: Group, method: str) -> str | None:
    """The key in the sidecar of a finished reconstruction, or None."""
    try:
        sidecar = json.loads((output_dir / sidecar_path(group, method)).read_text())
        key = sidecar["IremBids"]["Key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if (output_dir / image_path(group, method)).is_file() else None


# ------------------------------------------------------------------- atomic writing
def publish(source: Path, target: Path) -> Path:
    """Move a finished file to ``target`` on the same file system, whole or not at all.

    A hard link to a file elsewhere is copied first, so that outputs share nothing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_nlink > 1:
        copy = source.with_name(source.name + ".copy")
        shutil.copyfile(source, copy)
        os.replace(copy, source)
    os.chmod(source, 0o666 & ~_umask())
    with source.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(source, target)
    return target


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; leaves it alone if it says the same."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, default=str) + "\n")


# ------------------------------------------------------------------------- sidecars
def image_sidecar(result: Result, method: str) -> dict[str, Any]:
    """Sidecar of a reconstruction."""
    from . import __version__

    folder = result.methods[method]
    step = _read_json(folder / "step.json")
    quality = _read_json(folder / "quality.json")
    shape, sizes, stripped = _describe_image(folder)
    masks = [stack.mask_uri for stack in result.group.stacks if stack.mask_uri]
    return {
        "Description": f"Isotropic {result.group.suffix} image from "
        f"{len(result.group.stacks)} stacks of thick slices, method {method}",
        "SkullStripped": bool(masks) and stripped,
        "Sources": [stack.uri for stack in result.group.stacks] + masks,
        "Resolution": f"{sizes[0]:.4g} mm isotropic, axes along the reference stack",
        "VoxelSize": sizes,
        "Shape": shape,
        "Units": "arbitrary",
        "Stacks": [stack_description(stack) for stack in result.group.stacks],
        "ReferenceStack": _reference_label(result),
        "Excluded": [
            {"Path": Path(one.path).name, "Reason": one.reason} for one in result.group.excluded
        ],
        "Method": method,
        "RandomSeed": result.settings.run.random_seed,
        "Device": step.get("device", "cpu"),
        "Seconds": {
            **_read_json(result.prepared / "step.json").get("seconds", {}),
            **step.get("seconds", {}),
        },
        "Versions": result.provenance.get("versions", {}),
        "Metrics": quality,
        "IremBids": {
            "Version": __version__,
            "Key": result.keys.get(method),
            "Settings": _image_settings(result.settings, method),
        },
    }


def stack_description(stack: Any) -> dict[str, Any]:
    """What was used of a stack, and where its slice thickness came from."""
    return {
        "Label": stack.label,
        "URI": stack.uri,
        "Plane": stack.plane,
        "Shape": list(stack.shape),
        "InPlaneVoxelSize": list(stack.in_plane),
        "SliceSpacing": stack.spacing,
        "SliceThickness": stack.slice_thickness,
        "SliceThicknessSource": stack.thickness_source,
        "Mask": stack.mask_uri,
    }


def _image_settings(settings: Settings, method: str) -> dict[str, Any]:
    from .completion import method_settings

    return method_settings(settings, method)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _describe_image(folder: Path) -> tuple[list[int], list[float], bool]:
    """Shape, voxel sizes (mm), and whether all is zero outside the mask."""
    import nibabel as nib
    import numpy as np

    image = nib.nifti1.load(folder / "volume.nii.gz")
    mask = np.asanyarray(nib.nifti1.load(folder / "mask.nii.gz").dataobj) > 0
    outside = np.asanyarray(image.dataobj)[~mask]
    sizes = [round(float(size), 6) for size in nib.affines.voxel_sizes(image.affine)]
    return [int(n) for n in image.shape], sizes, bool(outside.size) and not outside.any()


# ------------------------------------------------------------------------- products
def products(result: Result, made: Path) -> list[Product]:
    """Every file of a group; those that no step has written yet are made in ``made``."""
    made.mkdir(parents=True, exist_ok=True)
    group = result.group
    files = []
    for method, folder in result.methods.items():
        sidecar = image_sidecar(result, method)
        image = {"suffix": group.suffix, "desc": method, "extension": ".nii.gz"}
        files.append(Product(folder / "volume.nii.gz", image, sidecar))
        files += _quality_files(method, sidecar, group, made)
        model = folder / "model.safetensors"
        if result.settings.output.model_out and model.is_file():
            entities = {"suffix": "model", "desc": method, "extension": ".safetensors"}
            files.append(Product(model, entities))
    files.append(_mask_product(result))
    files += _transforms(result, made)
    if result.settings.output.save_registered:
        files += _registered_stacks(result, made)
    return files


def _mask_product(result: Result) -> Product:
    folder = next(iter(result.methods.values()))
    group = result.group
    given = [stack.mask_uri for stack in group.stacks if stack.mask_uri]
    sidecar: dict[str, Any] = {
        "Type": "Brain" if given else "ROI",
        "Sources": given or [stack.uri for stack in group.stacks],
    }
    if "space" in contrast_entity(group, "mask"):
        image = image_path(group, next(iter(result.methods)))
        sidecar["SpatialReference"] = f"bids::{image}"
    entities = {"suffix": "mask", "desc": "brain" if given else "head", "extension": ".nii.gz"}
    return Product(folder / "mask.nii.gz", entities, sidecar)


def quality_row(group: Group, method: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """One flat row of metrics; nested ones are joined by underscores."""
    row: dict[str, Any] = {
        "participant_id": f"sub-{group.subject}",
        "session_id": f"ses-{group.session}" if group.session else "n/a",
        "suffix": group.suffix,
        "method": method,
        "stacks": len(group.stacks),
    }
    return {**row, **flatten(metrics)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars of a nested dictionary under joined names; lists are left out.

    >>> flatten({"psnr": 30.0, "ncc": {"axial1": 0.9}, "curve": [1, 2]})
    {'psnr': 30.0, 'ncc_axial1': 0.9}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}_"))
        elif isinstance(value, (str, int, float, bool)) or value is None:
            flat[f"{prefix}{key}"] = value
    return flat


def table_text(rows: list[dict[str, Any]]) -> str:
    """Rows as tab-separated values; what a row lacks is ``n/a``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["\t".join(columns)]
    for row in rows:
        lines.append("\t".join(_cell(row.get(column)) for column in columns))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split()) or "n/a"


def _quality_files(method: str, sidecar: dict[str, Any], group: Group, made: Path) -> list[Product]:
    row = quality_row(group, method, sidecar["Metrics"])
    content = {
        **{key: row[key] for key in ("participant_id", "session_id", "suffix", "method", "stacks")},
        "entities": dict(group.entities),
        "metrics": sidecar["Metrics"],
        "seconds": sidecar["Seconds"],
        "device": sidecar["Device"],
        "version": sidecar["IremBids"]["Version"],
    }
    files = {
        ".json": write_json(made / f"{method}_qc.json", content),
        ".tsv": write_text(made / f"{method}_qc.tsv", table_text([row])),
    }
    return [
        Product(path, {"suffix": "qc", "desc": method, "extension": extension})
        for extension, path in files.items()
    ]


def _reference_label(result: Result) -> str:
    """Label of the reference stack."""
    return str(_read_json(result.prepared / "step.json").get("reference", ""))


def _transforms(result: Result, made: Path) -> list[Product]:
    """ITK files of the registration's poses and of each method's refined ones.

    ``from-X_to-Y`` resamples an image in the space of X into that of Y, and so maps
    points of Y to points of X: it holds the inverse of the pose of X.
    """
    from .reconstruction.geometry import RigidTransform

    step = _read_json(result.prepared / "step.json")
    reference, first = step["reference"], step["poses"]
    sets: list[tuple[str | None, dict[str, Any]]] = [(None, first)]
    for method, folder in result.methods.items():
        poses = _read_json(folder / "fit.json").get("poses", {})
        if any(poses[label] != first.get(label) for label in poses):
            sets.append((method, poses))
    files = []
    for desc, poses in sets:
        for label, matrix in poses.items():
            if label == reference and matrix == first[reference]:
                continue
            path = made / f"from-{label}_desc-{desc}_xfm.txt"
            write_text(path, RigidTransform(matrix).inverse().to_itk_text())
            entities = {
                "from": label,
                "to": reference,
                "mode": "image",
                "suffix": "xfm",
                "extension": ".txt",
            }
            files.append(Product(path, {**entities, **({"desc": desc} if desc else {})}))
    return files


def _registered_stacks(result: Result, made: Path) -> list[Product]:
    """The normalised stacks resampled onto the grid of the result (cubic B-spline)."""
    from .reconstruction.baselines import resample_stack
    from .reconstruction.prepare import Prepared
    from .reconstruction.stack import read_image, write_image

    prepared = Prepared.load(result.prepared)
    _, grid = read_image(next(iter(result.methods.values())) / "volume.nii.gz")
    uris = {stack.label: stack.uri for stack in result.group.stacks}
    files = []
    for stack, pose in zip(prepared.stacks, prepared.poses, strict=True):
        values, _ = resample_stack(stack, pose, grid)
        path = write_image(made / f"{stack.label}.nii.gz", values * prepared.scale, grid)
        sidecar = {"SkullStripped": False, "Sources": [uris[stack.label]]}
        entities = {
            "acquisition": stack.label,
            "desc": "registered",
            "suffix": result.group.suffix,
            "extension": ".nii.gz",
        }
        files.append(Product(path, entities, sidecar))
    return files


# --------------------------------------------------------------------------- saving
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
        return [publish(path, output_dir / path.relative_to(base)) for path in written]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publishing_order(path: Path) -> int:
    """Data before sidecars, and those of the reconstructions, with the keys, at the very end."""
    order = next(i for i, ending in enumerate(PUBLISHED) if path.name.endswith(ending))
    return order + path.name.endswith(KEY_HOLDERS)
