# SPDX-License-Identifier: Apache-2.0
"""Every option of irem-bids, once.

Each option is a field of a frozen dataclass with its default, help text, unit
and allowed values.  The command line, the TOML file, the log of a run and the
usage page are all made from these classes; nothing else holds a default.

This module imports the standard library only, so that ``--help`` is instant
and the numerics can use it from a notebook.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

METHODS = ("irem", "irem2021", "srr", "bspline")
WITH_DEVIATION = ("irem", "srr")  # methods with a forward model that can be repeated
MODALITIES = ("T1w", "T2w", "PDw", "FLAIR")


class SettingsError(ValueError):
    """A setting that does not exist, has the wrong type or is out of range."""


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    nohash: bool = False,
) -> Any:
    """Declare an option.

    ``flags`` are further command-line spellings, ``nohash`` marks an option
    that cannot change a result (device, threads), so that changing it does not
    compute anything again.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": choices,
        "low": low,
        "high": high,
        "flags": flags,
        "metavar": metavar,
        "nohash": nohash,
    }
    if isinstance(default, (list, dict)):
        raise TypeError("defaults are immutable: use a tuple")
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Selection:
    """Which images of the dataset are used."""

    participant_label: tuple[str, ...] = option(
        (), "participants to process, with or without 'sub-'; all if not given", metavar="LABEL"
    )
    session_label: tuple[str, ...] = option(
        (), "sessions to process, with or without 'ses-'", flags=("--session-id",), metavar="LABEL"
    )
    modalities: tuple[str, ...] = option(
        (),
        "contrasts to reconstruct; default: T1w where a participant's session has any usable "
        "group of it, else every contrast that qualifies",
        choices=MODALITIES,
    )
    bids_filter_file: str | None = option(
        None, "JSON file of filters as for pybids under the key 'stack'", metavar="FILE"
    )
    bids_database_dir: str | None = option(
        None,
        "folder that remembers headers and sidecars of the dataset, to create and reuse",
        metavar="DIR",
        nohash=True,
    )
    skip_bids_validation: bool = option(
        False, "do not ask that file names be valid BIDS", nohash=True
    )
    derivatives: tuple[str, ...] = option(
        (), "derivative datasets with brain masks of the stacks", flags=("-d",), metavar="DIR"
    )
    isotropic_ratio: float = option(
        1.5,
        "an image whose slice spacing is less than this many in-plane voxels is near-isotropic "
        "and not a stack",
        low=1.0,
        high=10.0,
    )


@dataclass(frozen=True)
class Normalise:
    """Paper 2.1: masks, bias, intensity scale and one rigid pose per stack."""

    n4: bool = option(
        False,
        "correct the bias field of each stack with N4 first; off: the result has what is common "
        "to the stacks' bias fields (irem fits in what they differ; srr and bspline do not)",
    )
    reference: str = option(
        "auto",
        "reference stack: 'auto' takes the one with the most foreground voxels weighted by "
        "signal-to-noise ratio, 'random' draws it with the seed as in the paper",
        choices=("auto", "random"),
    )
    registration: bool = option(
        True,
        "register the stacks rigidly; off: trust the headers, and irem fits no gain or bias either",
    )
    registration_levels: int = option(
        3, "levels of the multi-resolution registration", low=1, high=5
    )
    registration_starts: int = option(
        8, "starting poses tried where the stacks agree poorly at first", low=1, high=64
    )
    intensity_percentile: float = option(
        99.0,
        "percentile of the foreground that is scaled to 1 before training",
        unit="%",
        low=50.0,
        high=100.0,
    )
    held_out: float = option(
        0.02, "fraction of foreground voxels never trained on, for the metrics", low=0.0, high=0.5
    )


@dataclass(frozen=True)
class Acquisition:
    """The forward model: how a voxel of a thick slice sees the head."""

    profile: str = option(
        "gaussian",
        "slice profile: 'gaussian' with full width at half maximum equal to the slice "
        "thickness, 'box' of that width, 'sinc' for a Hamming-windowed sinc pulse at small flip "
        "angle, or 'none' for point samples as in the paper",
        choices=("gaussian", "box", "sinc", "none"),
    )
    profile_file: str | None = option(
        None,
        "file with a measured slice profile, used instead of a named one: two columns, mm from "
        "the slice's middle and response",
        metavar="FILE",
    )
    profile_width: str = option(
        "auto",
        "width of each stack's slice profile: as 'stated' by the slice thickness, or 'learned' "
        "along with the image (irem); 'auto' tries both and decides by the error of held-out "
        "voxels",
        choices=("auto", "stated", "learned"),
    )
    slice_thickness: float | None = option(
        None,
        "use this slice thickness for every stack instead of the sidecars'",
        unit="mm",
        low=0.05,
        high=50.0,
    )


@dataclass(frozen=True)
class Srr:
    """Super-resolution reconstruction: profile-aware, total variation."""

    srr_lambda: float | None = option(
        None,
        "weight of total variation against the squared residual, both in scaled intensity; "
        "default: 0.08 times the noise of the stacks (for srr up to twice that where the noise is "
        "above 0.024), on voxels as large as theirs in plane",
        low=0.0,
    )
    srr_huber: float = option(
        0.01, "width of the Huber smoothing of total variation, scaled intensity", low=1e-6
    )
    srr_iterations: int = option(40, "conjugate-gradient iterations in all", low=1, high=10000)
    srr_reweightings: int = option(4, "reweightings of the total variation (IRLS)", low=1, high=100)


@dataclass(frozen=True)
class Irem:
    """The default method: a continuous field on the profile-aware linear solution."""

    refine_poses: bool = option(
        True, "refine poses, gains and bias together with the image; not with --no-registration"
    )
    pose_rounds: int = option(
        3, "joint Gauss-Newton rounds for image, poses and gains", low=0, high=50
    )
    motion: str = option(
        "auto",
        "what moves: each 'stack' as a whole, or each 'slice', smoothly in the order of "
        "acquisition; 'auto' tries both and decides by the error of held-out voxels",
        choices=("auto", "stack", "slice"),
    )
    robust: bool = option(
        True, "give slices that do not fit (dropped, torn by motion) little weight"
    )
    hidden: int = option(16, "channels of the network", low=4, high=256)
    layers: int = option(4, "convolutions of the network", low=2, high=16)
    steps: int = option(
        300, "training steps on a simulated repeat of the scan; 0: no network", low=0, high=10**6
    )
    batch_size: int = option(2, "blocks of 24 x 24 x 24 voxels per step", low=1, high=1024)
    learning_rate: float = option(6e-3, "learning rate of the network", low=0.0)


@dataclass(frozen=True)
class Irem2021:
    """The network of Wu et al. (MICCAI 2021); every gap in the paper is a setting."""

    fourier_features: int = option(256, "2L, the dimension of the Fourier features", low=2)
    fourier_sigma: float = option(
        1.0, "standard deviation of B; the paper says 1", low=1e-3, high=100.0
    )
    coordinate_range: float = option(
        1.0,
        "voxel centres are mapped to [-range, range] along the longest axis of the head's box; "
        "not given in the paper (the authors' sibling projects use 1)",
        low=1e-3,
        high=1e4,
    )
    width: int = option(256, "neurons of a layer", low=1)
    epochs_2021: int = option(1500, "epochs; not given in the paper", low=0)
    batch_size_2021: int = option(2500, "mini-batch, voxels", low=2)
    learning_rate_2021: float = option(1e-4, "initial learning rate of Adam", low=0.0)
    decay_every: int = option(500, "epochs after which the learning rate is halved", low=1)
    background: bool = option(
        False, "train on voxels outside the mask, too; not given in the paper"
    )
    output_activation: str = option(
        "none",
        "what follows the last layer; the paper says that each layer is followed by "
        "batch normalisation and ReLU, which for the last means 'batchnorm-relu'",
        choices=("none", "relu", "batchnorm-relu"),
    )
    initialisation: str = option(
        "kaiming",
        "initial weights: 'kaiming' for ReLU layers, or 'torch' for PyTorch's default; "
        "not given in the paper",
        choices=("kaiming", "torch"),
    )


@dataclass(frozen=True)
class Output:
    """What is written."""

    method: tuple[str, ...] = option(
        ("irem",), "reconstruction methods, one or several", choices=METHODS
    )
    output_resolution: float | None = option(
        None,
        "voxel size of the result; default: the finest in-plane voxel",
        unit="mm",
        low=0.1,
        high=10.0,
    )
    margin: float = option(
        5.0, "margin around the head in the result", unit="mm", low=0.0, high=100.0
    )
    save_registered: bool = option(
        False,
        "also write the stacks resampled to the result's grid, at the poses of the registration "
        "and scaled alike",
    )
    uncertainty: bool = option(
        True, "also write a standard deviation for each voxel (irem and srr)"
    )
    model_out: bool = option(False, "also write the trained field, for irem-bids-sample")


@dataclass(frozen=True)
class Run:
    """How the run is carried out; beyond rounding, only the first two change an image."""

    random_seed: int = option(2021, "seed of everything random", flags=("--seed",), low=0)
    deterministic: bool = option(
        False, "on a GPU, the same bits each time, more slowly; a CPU gives them anyway"
    )
    device: str = option("auto", "'auto', 'cpu', 'cuda' or 'cuda:N'", nohash=True)
    gpus: int | None = option(
        None,
        "GPUs used, one training on each at a time; 0: none; default: all that this process sees",
        low=0,
        nohash=True,
    )
    nprocs: int | None = option(
        None,
        "processors used in all; default: those available to this process",
        flags=("--nthreads", "--n-cpus", "--n_cpus"),
        low=1,
        nohash=True,
    )
    omp_nthreads: int | None = option(
        None, "threads of one step; default: nprocs, 8 at most", low=1, nohash=True
    )
    mem: str | None = option(
        None,
        "memory in all, as '16G', '16GB', '16000M'; a bare number is GB; default: 90 % of "
        "what this process may use",
        flags=("--mem-gb", "--mem_gb"),
        metavar="SIZE",
        nohash=True,
    )
    use_plugin: str | None = option(
        None,
        "YAML file with a nipype plugin and its arguments",
        flags=("--nipype-plugin-file",),
        metavar="FILE",
        nohash=True,
    )
    work_dir: str | None = option(
        None,
        "folder for intermediate results; default: 'irem-bids-work' beside the output folder, or "
        "in the current one where that would lie inside the dataset",
        flags=("-w",),
        metavar="DIR",
        nohash=True,
    )
    clean_workdir: bool = option(
        False, "empty this dataset's work folder after success", nohash=True
    )
    checkpoint_seconds: float = option(
        60.0,
        "a run that is killed goes on from a checkpoint at most this old",
        unit="s",
        low=0.0,
        nohash=True,
    )
    force: bool = option(False, "compute finished groups again", nohash=True)
    stop_on_first_crash: bool = option(False, "stop at the first failure", nohash=True)


SECTIONS: dict[str, type] = {
    "selection": Selection,
    "normalise": Normalise,
    "acquisition": Acquisition,
    "srr": Srr,
    "irem": Irem,
    "irem2021": Irem2021,
    "output": Output,
    "run": Run,
}


@dataclass(frozen=True)
class Settings:
    """All sections; the same names are the tables of the TOML file."""

    selection: Selection = Selection()
    normalise: Normalise = Normalise()
    acquisition: Acquisition = Acquisition()
    srr: Srr = Srr()
    irem: Irem = Irem()
    irem2021: Irem2021 = Irem2021()
    output: Output = Output()
    run: Run = Run()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All values as plain dictionaries (tuples become lists), one per section."""
        return {
            name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(getattr(self, name)).items()
            }
            for name in SECTIONS
        }

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> Settings:
        """Build settings from (part of) what :meth:`to_dict` gives.

        Raises
        ------
        SettingsError
            An unknown section or key (the nearest known one is named), a value
            of the wrong type, out of range or not among the choices.
        """
        return cls().updated(tables)

    def updated(self, tables: dict[str, Any]) -> Settings:
        """A copy with the given values replaced; checks like :meth:`from_dict`."""
        sections = {}
        for name, values in tables.items():
            if name not in SECTIONS:
                raise SettingsError(_unknown("section", name, list(SECTIONS)))
            if not isinstance(values, dict):
                raise SettingsError(f"[{name}] is {values!r}; expected a table of settings")
            known = {f.name: f for f in dataclasses.fields(SECTIONS[name])}
            checked = {}
            for key, value in values.items():
                if key not in known:
                    raise SettingsError(_unknown(f"setting in [{name}]", key, list(known)))
                checked[key] = check_value(name, known[key], value)
            sections[name] = dataclasses.replace(getattr(self, name), **checked)
        return dataclasses.replace(self, **sections)


def _unknown(what: str, name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what}: {name!r}; {hint}"


def element_type(option_field: dataclasses.Field) -> tuple[type, bool, bool]:
    """``(type, is_tuple, may_be_none)`` of an option, from its annotation."""
    annotation = typing.get_type_hints(
        next(cls for cls in SECTIONS.values() if option_field in dataclasses.fields(cls))
    )[option_field.name]
    optional = False
    if isinstance(annotation, types.UnionType):
        arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = len(arguments) < len(typing.get_args(annotation))
        annotation = arguments[0]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True, optional
    return annotation, False, optional


def check_value(section: str, option_field: dataclasses.Field, value: Any) -> Any:
    """Return ``value`` in the option's type, or raise :class:`SettingsError`."""
    kind, is_tuple, optional = element_type(option_field)
    if value is None and optional:
        return None
    if is_tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = (value,)
        return tuple(_check_one(section, option_field, kind, item) for item in value)
    return _check_one(section, option_field, kind, value)


def _check_one(section: str, option_field: dataclasses.Field, kind: type, value: Any) -> Any:
    name, metadata = f"[{section}] {option_field.name}", option_field.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise SettingsError(
            f"{name} is {value!r} ({type(value).__name__}); expected {kind.__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} is {value!r}; expected a finite number")
    if metadata["choices"] and value not in metadata["choices"]:
        raise SettingsError(
            f"{name} is {value!r}; expected one of {', '.join(metadata['choices'])}"
        )
    for bound, wrong, words in (
        (metadata["low"], lambda v, b: v < b, "at least"),
        (metadata["high"], lambda v, b: v > b, "at most"),
    ):
        if bound is not None and wrong(value, bound):
            raise SettingsError(f"{name} is {value!r}; expected {words} {bound:g}")
    return value
