# SPDX-License-Identifier: Apache-2.0
"""What there is to save of a group: every file with its entities and its sidecar."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .atomic import write_json, write_text
from .completion import method_settings
from .paths import contrast_entity, image_path
from .settings import Settings
from .tables import quality_row, table_text

if TYPE_CHECKING:
    from .groups import Group

ROUNDING = 1e-9  # of a pose's matrix, mm


@dataclass(frozen=True)
class Result:
    """A group whose steps have run.

    Attributes
    ----------
    prepared
        Folder of ``Prepared.save``.
    methods
        Method to its folder with ``volume.nii.gz``, ``mask.nii.gz``, ``quality.json``,
        ``fit.json``, ``step.json``, ``model.safetensors`` and, where asked for, ``std.nii.gz``.
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


def image_sidecar(result: Result, method: str) -> dict[str, Any]:
    """Sidecar of a reconstruction."""
    folder = result.methods[method]
    step = _read_json(folder / "step.json")
    quality = _read_json(folder / "quality.json")
    shape, sizes, stripped = _describe_image(folder)
    masks = _masks(result)
    return {
        "Description": f"Isotropic {result.group.suffix} image from "
        f"{len(result.group.stacks)} stacks of thick slices, method {method}",
        "SkullStripped": len(masks) == len(result.group.stacks) and stripped,
        "Sources": [stack.uri for stack in result.group.stacks] + masks,
        "Resolution": f"{sizes[0]:.4g} mm isotropic, axes along the reference stack",
        "VoxelSize": sizes,
        "Shape": shape,
        "Units": "arbitrary",
        "Stacks": [stack_description(stack) for stack in result.group.stacks],
        "ReferenceStack": _reference_label(result),
        **acquisition_of(result, method),
        "Excluded": [
            {"Path": Path(one.path).name, "Reason": one.reason} for one in result.group.excluded
        ],
        "Warnings": [
            *result.group.warnings,
            *_read_json(result.prepared / "step.json").get("doubts", []),
            *step.get("doubts", []),
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
            "Settings": _settings(result.settings, method),
        },
    }


def _settings(settings: Settings, method: str) -> dict[str, Any]:
    """Those that shape the image; of a measured profile the name, not the folder."""
    tables = method_settings(settings, method)
    file = tables["acquisition"]["profile_file"]
    if file is not None:
        tables["acquisition"]["profile_file"] = Path(file).name
    return tables


def acquisition_of(result: Result, method: str) -> dict[str, Any]:
    """What a method found out about the acquisition, by stack and acquired slice.

    ``SliceWeights`` and, where slices moved, ``SliceGains`` (brightness beyond that of the stack)
    are null for slices without foreground; ``SliceMotion`` holds rotation vectors (rad, RAS+ axes)
    about ``SliceMotionPivot``, then translations (mm), beyond the
    stack's pose; ``EstimatedSliceThickness`` is the width of the profile, mm; ``Network`` says
    how the held-out voxels judged it, ``SpectrumShare`` how gaps were bridged.
    """
    fit = _read_json(result.methods[method] / "fit.json")
    places = _read_json(result.prepared / "step.json").get("slices", {})

    def whole(label: str, rows: list[Any]) -> list[Any]:
        place = places.get(label, {"first": 0, "acquired": len(rows)})
        out: list[Any] = [None] * place["acquired"]
        out[place["first"] : place["first"] + len(rows)] = rows
        return out

    found: dict[str, Any] = {}
    if fit.get("gains") and method == "irem":
        found["Gains"] = fit["gains"]
    info = fit.get("info", {})
    if network := info.get("network"):
        found["Network"] = network
    if "spectrum_share" in info:
        found["SpectrumShare"] = round(info["spectrum_share"], 3)
    if fit.get("slice_weights"):
        found["SliceWeights"] = {k: whole(k, v) for k, v in fit["slice_weights"].items()}
    if fit.get("slice_gains"):
        found["SliceGains"] = {
            label: whole(label, [round(gain, 4) for gain in gains])
            for label, gains in fit["slice_gains"].items()
        }
    if fit.get("slice_motion"):
        found["SliceMotion"] = {k: whole(k, v) for k, v in fit["slice_motion"].items()}
        found["SliceMotionPivot"] = fit["slice_pivot"]
    if any(width != 1 for width in fit.get("widths", {}).values()):
        thickness = {stack.label: stack.slice_thickness for stack in result.group.stacks}
        found["EstimatedSliceThickness"] = {
            label: round(width * thickness[label], 4) for label, width in fit["widths"].items()
        }
    return found


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
        files += _deviation(result, method, sidecar)
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


def _deviation(result: Result, method: str, image: dict[str, Any]) -> list[Product]:
    path = result.methods[method] / "std.nii.gz"
    if not path.is_file():
        return []
    sidecar = {
        "Description": "Standard deviation of each voxel of the image, by reconstructing stacks "
        "simulated from it; 0 outside the mask",
        "Sources": [f"bids::{image_path(result.group, method)}"],
        **{key: image[key] for key in ("Resolution", "Units", "SkullStripped")},
    }
    return [Product(path, {"suffix": "std", "desc": method, "extension": ".nii.gz"}, sidecar)]


def _masks(result: Result) -> list[str]:
    """The masks that were given and used; one without an edge, for example, is not."""
    used = _read_json(result.prepared / "step.json").get("metrics", {}).get("masked", {})
    stacks = [stack for stack in result.group.stacks if used.get(stack.label) == "given"]
    return [stack.mask_uri for stack in stacks if stack.mask_uri]


def _mask_product(result: Result) -> Product:
    folder = next(iter(result.methods.values()))
    group, given = result.group, _masks(result)
    brain = len(given) == len(group.stacks)
    sidecar: dict[str, Any] = {
        "Type": "Brain" if brain else "ROI",
        "Sources": given if brain else [stack.uri for stack in group.stacks] + given,
    }
    if "space" in contrast_entity(group, "mask"):
        image = image_path(group, next(iter(result.methods)))
        sidecar["SpatialReference"] = f"bids::{image}"
    entities = {"suffix": "mask", "desc": "brain" if brain else "head", "extension": ".nii.gz"}
    return Product(folder / "mask.nii.gz", entities, sidecar)


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
        if not all(_same(poses[label], first[label]) for label in poses):
            sets.append((method, poses))
    files = []
    for desc, poses in sets:
        for label, matrix in poses.items():
            if label == reference and _same(matrix, first[reference]):
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


def _same(pose: list[list[float]], other: list[list[float]]) -> bool:
    """Whether two matrices differ by rounding only."""
    pairs = zip(itertools.chain(*pose), itertools.chain(*other), strict=True)
    return all(abs(a - b) < ROUNDING for a, b in pairs)


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
        values, _ = resample_stack(stack.filled(), pose, grid)
        path = write_image(made / f"{stack.label}.nii.gz", values * prepared.scale, grid)
        sidecar = {
            "Description": "A stack of thick slices on the grid of the result, at the pose of the "
            "registration, its intensities scaled alike with the others",
            "SkullStripped": False,
            "Sources": [uris[stack.label]],
        }
        entities = {
            "acquisition": stack.label,
            "desc": "registered",
            "suffix": result.group.suffix,
            "extension": ".nii.gz",
        }
        files.append(Product(path, entities, sidecar))
    return files
