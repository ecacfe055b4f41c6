# SPDX-License-Identifier: Apache-2.0
"""The steps as thin nipype interfaces: load, call ``reconstruction``, save.

A step works in its own folder and hands folders on.  nipype compares folders by
name only, so each step also hands on a key, the hash of what its result depends on.
Inputs marked ``nohash`` cannot change a result.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import traceback as tracebacks
from pathlib import Path
from typing import Any

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from . import __version__, completion, derivatives, log, stop
from .atomic import write_json
from .products import Result
from .resources import Meter, claimed_device
from .settings import WITH_DEVIATION, Settings

FAILURE_FILE = "failure.json"
LOG = logging.getLogger(log.PACKAGE)


class StepInput(BaseInterfaceInputSpec):
    label = traits.Str("", usedefault=True, nohash=True, desc="the group's name, for the log")
    version = traits.Str(
        __version__, usedefault=True, desc="another version takes no result of this one"
    )


class Step(SimpleInterface):
    """An interface whose failure is left in its folder as ``failure.json``."""

    input_spec = StepInput

    def _run_interface(self, runtime: Any) -> Any:
        stop.leave_if_asked()
        folder = Path(runtime.cwd)
        if not LOG.handlers:  # a worker
            log.configure()
        LOG.info("%s: %s", self.inputs.label, folder.name.replace("_", " "))
        try:
            self._work(folder)
        except Exception as error:
            failure = {
                "step": type(self).__name__.lower(),
                "type": type(error).__name__,
                "message": str(error) or type(error).__name__,
                "code": failure_code(error),
                "traceback": tracebacks.format_exc(),
            }
            try:
                write_json(folder / FAILURE_FILE, failure)
            except OSError:  # a full disk, which is told by the error itself, too
                LOG.error("%s: %s", self.inputs.label, failure["message"])
            raise
        return runtime

    def _work(self, folder: Path) -> None:
        raise TypeError(f"{type(self).__name__} has no work to do")


def failure_code(error: BaseException) -> int:
    """The exit code that fits an error: bad data, no memory, no space, or just failure."""
    from .exitcodes import ExitCode, UserError
    from .reconstruction.geometry import GeometryError
    from .reconstruction.recovery import out_of_memory
    from .reconstruction.stack import ImageError
    from .space import is_storage

    if isinstance(error, UserError):
        return int(error.code)
    if is_storage(error):
        return int(ExitCode.IO_ERROR)
    if isinstance(error, (ImageError, GeometryError)):
        return int(ExitCode.BAD_DATA)
    if out_of_memory(error):
        return int(ExitCode.TEMPORARY)
    if isinstance(error, OSError):
        return int(ExitCode.IO_ERROR)
    return int(ExitCode.FAILURE)


def set_threads(count: int) -> None:
    """Limit torch to ``count`` threads in this process."""
    import torch

    torch.set_num_threads(count)


# ---------------------------------------------------------------- normalise, paper 2.1
class _NormaliseInput(StepInput):
    group = traits.Dict(mandatory=True, desc="Group.to_dict")
    settings = traits.Dict(mandatory=True, desc="sections, completion.normalise_settings")
    threads = traits.Int(1, usedefault=True, nohash=True)


class _NormaliseOutput(TraitedSpec):
    prepared = Directory(desc="folder of Prepared.save")
    key = traits.Str(desc="hash of inputs, settings and version")


class Normalise(Step):
    """Stacks to one space: masks, bias, intensity scale, rigid poses."""

    input_spec = _NormaliseInput
    output_spec = _NormaliseOutput

    def _work(self, folder: Path) -> None:
        from . import plausible
        from .reconstruction.prepare import prepare, prepared_slices
        from .reconstruction.stack import read_stack

        set_threads(self.inputs.threads)
        meter = Meter()
        key = completion.inputs_key(self.inputs.group, self.inputs.settings)
        stacks = [
            read_stack(
                stack["path"],
                label=stack["label"],
                slice_thickness=stack["slice_thickness"],
                mask_path=stack["mask"],
                slice_times=stack["slice_times"],
            )
            for stack in self.inputs.group["stacks"]
        ]
        settings = Settings.from_dict(self.inputs.settings)
        prepared = prepare(stacks, settings, threads=self.inputs.threads)
        target = folder / "prepared"
        target.mkdir(exist_ok=True)
        prepared.save(target)
        centre = plausible.centre_of(prepared.stacks[prepared.reference])
        pairs = prepared.metrics.get("ncc_pairs", ())
        found = plausible.judge_poses(prepared.stacks, prepared.poses, centre, pairs)
        places = {
            done.label: prepared_slices(acquired, done)
            for acquired, done in zip(stacks, prepared.stacks, strict=True)
        }
        empty = {
            stack.label: [places[stack.label]["first"] + k for k in stack.empty_slices]
            for stack in prepared.stacks
        }
        step = {
            **meter.read("normalise"),
            "reference": prepared.stacks[prepared.reference].label,
            "poses": {
                stack.label: pose.matrix.tolist()
                for stack, pose in zip(prepared.stacks, prepared.poses, strict=True)
            },
            "metrics": prepared.metrics,
            "slices": places,
            "doubts": [*found.doubts, *plausible.judge_slices(empty).doubts],
        }
        write_json(target / "step.json", step)
        found.refuse()  # what was prepared stays, for the report of the failure
        self._results.update(prepared=str(target), key=key)


class _MethodInput(StepInput):
    prepared = Directory(mandatory=True)
    settings = traits.Dict(mandatory=True, desc="sections, completion.method_settings")
    checkpoints = Directory(mandatory=True, nohash=True, desc="of all methods; has 'locks'")
    devices = traits.List(traits.Str, ["cpu"], usedefault=True, nohash=True)
    use_gpu = traits.Bool(False, usedefault=True, nohash=True, desc="takes a GPU slot of nipype")
    threads = traits.Int(1, usedefault=True, nohash=True)


# ----------------------------------------------------------------- optimise, paper 2.2
class _OptimiseInput(_MethodInput):
    prepared_key = traits.Str(mandatory=True)
    method = traits.Str(mandatory=True)
    checkpoint_seconds = traits.Float(60.0, usedefault=True, nohash=True)
    afresh = traits.Bool(False, usedefault=True, nohash=True, desc="forget an old checkpoint")


class _OptimiseOutput(TraitedSpec):
    model = Directory(desc="folder of Fit.save")
    key = traits.Str(desc="hash of inputs, settings, method and version")


class Optimise(Step):
    """Stacks in one space to a continuous field; poses and gains refined."""

    input_spec = _OptimiseInput
    output_spec = _OptimiseOutput
    _can_resume = True

    def _work(self, folder: Path) -> None:
        from .reconstruction.optimise import fit
        from .reconstruction.prepare import Prepared, output_grid

        set_threads(self.inputs.threads)
        meter = Meter()
        method = self.inputs.method
        settings = Settings.from_dict(self.inputs.settings).updated(
            {"run": {"checkpoint_seconds": stop.Seconds(self.inputs.checkpoint_seconds)}}
        )
        key = completion.method_key(self.inputs.prepared_key, method, self.inputs.settings)
        prepared = Prepared.load(Path(self.inputs.prepared))
        checkpoint = Path(self.inputs.checkpoints) / key
        if self.inputs.afresh:
            shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir(parents=True, exist_ok=True)
        target = folder / "model"
        target.mkdir(exist_ok=True)
        name = f"{self.inputs.label}: {method}"
        with (
            claimed_device(self.inputs.devices, checkpoint.parent / "locks") as device,
            log.Progress(name) as progress,
            stop.training(),
        ):
            meter.started = time.monotonic()  # waiting for a device is no work

            def told(fraction: float, message: str) -> None:
                stop.check()
                progress(fraction, message)

            result = fit(
                method,
                prepared,
                output_grid(prepared, settings.output),
                settings,
                device=device,
                checkpoint=checkpoint,
                progress=told,
            )
            result.save(target)
            cost = meter.read("optimise", device)
        write_json(target / "step.json", {"device": device, **cost})
        shutil.rmtree(checkpoint, ignore_errors=True)
        self._results.update(model=str(target), key=key)


# -------------------------------------------------------------- reconstruct, paper 2.3
class _ReconstructInput(_MethodInput):
    model = Directory(mandatory=True)
    model_key = traits.Str(mandatory=True)


class _ReconstructOutput(TraitedSpec):
    folder = Directory(desc="model, volume, whole, mask and std (.nii.gz), quality.json")
    key = traits.Str(desc="the model's key")


class Reconstruct(Step):
    """Continuous field to a volume on the output grid, with its mask and metrics."""

    input_spec = _ReconstructInput
    output_spec = _ReconstructOutput

    def _work(self, folder: Path) -> None:
        from .reconstruction import uncertainty
        from .reconstruction.masks import output_mask
        from .reconstruction.metrics import snr
        from .reconstruction.optimise import Fit, quality
        from .reconstruction.prepare import Prepared, output_grid
        from .reconstruction.repeatable import repeatable
        from .reconstruction.sample import sample
        from .reconstruction.stack import write_image

        set_threads(self.inputs.threads)
        meter = Meter()
        settings = Settings.from_dict(self.inputs.settings)
        prepared = Prepared.load(Path(self.inputs.prepared))
        result = Fit.load(Path(self.inputs.model))
        grid = output_grid(prepared, settings.output)
        locks = Path(self.inputs.checkpoints) / "locks"
        with (
            claimed_device(self.inputs.devices, locks) as device,
            repeatable(settings.run.deterministic),
        ):
            meter.started = time.monotonic()
            values = sample(result.field.to(device), grid, device=device)
            metrics = quality(prepared, result, settings, values)
            costs = [meter.read("reconstruct", device)]
            mask, deviation = output_mask(prepared, grid), None
            if settings.output.uncertainty and result.method in WITH_DEVIATION:
                stop.check()
                meter = Meter()
                deviation = uncertainty.standard_deviation(
                    prepared, result, values, grid, mask, settings, device=device
                )
                costs.append(meter.read("uncertainty", device))
        target = folder / "result"
        shutil.copytree(self.inputs.model, target, dirs_exist_ok=True)
        found = _judge(prepared, result, values, grid, mask, metrics)
        found.refuse()
        if set(prepared.metrics["masked"].values()) == {"given"}:
            # The masks say what the result is about; all of it predicts the stacks in the report.
            write_image(target / "whole.nii.gz", values * prepared.scale, grid)
            values[~mask] = 0
        write_image(target / "volume.nii.gz", values * prepared.scale, grid)
        write_image(target / "mask.nii.gz", mask, grid)
        if deviation is not None:
            write_image(target / "std.nii.gz", deviation * prepared.scale, grid)
        ratio = snr(values, mask)
        metrics["snr_result"] = ratio if math.isfinite(ratio) else None
        write_json(target / "quality.json", {**metrics, **prepared.metrics})
        step = json.loads((target / "step.json").read_text())
        step["doubts"] = list(found.doubts)
        for cost in costs:
            for what, of_step in cost.items():
                step[what] = {**step.get(what, {}), **of_step}
        write_json(target / "step.json", step)
        self._results.update(folder=str(target), key=self.inputs.model_key)


def _judge(prepared: Any, result: Any, values: Any, grid: Any, mask: Any, metrics: Any) -> Any:
    """Every check of a result: :class:`.plausible.Findings`."""
    from . import plausible

    stacks, poses = prepared.stacks, result.poses
    found = [
        plausible.Findings(doubts=tuple(result.info.get("doubts", ()))),
        plausible.judge_poses(
            stacks,
            [poses[stack.label] for stack in stacks],
            plausible.centre_of(stacks[prepared.reference]),
            prepared.metrics.get("ncc_pairs", ()),
        ),
        plausible.judge_volume(values, grid, mask, stacks, poses),
    ]
    if result.method != "bspline":
        psnr = metrics.get("held_out_psnr")
        given = (stacks, poses, prepared.held_out, result.slice_weights)
        found.append(plausible.judge_prediction(psnr, *given))
    return plausible.Findings(
        tuple(text for one in found for text in one.failures),
        tuple(text for one in found for text in one.doubts),
    )


# --------------------------------------------------------------------- report and save
class _ResultInput(StepInput):
    group = traits.Dict(mandatory=True, desc="Group.to_dict")
    settings = traits.Dict(mandatory=True, desc="all sections, Settings.to_dict")
    prepared = Directory(mandatory=True)
    methods = traits.List(traits.Str, mandatory=True)
    folders = traits.List(Directory(), mandatory=True, desc="one per method")
    keys = traits.List(traits.Str, mandatory=True, desc="one per method")
    provenance = traits.Dict(mandatory=True, nohash=True, desc="versions, command line")
    output_dir = Directory(mandatory=True)


class _ReportInput(_ResultInput):
    reports = Directory(mandatory=True, desc="folder of what reports are made from")


class _ReportOutput(TraitedSpec):
    page = traits.Str(desc="the HTML page")


def result_of(inputs: Any) -> Result:
    """The result that a report or save step got as its inputs."""
    from .groups import Group

    return Result(
        group=Group.from_dict(inputs.group),
        prepared=Path(inputs.prepared),
        methods={m: Path(f) for m, f in zip(inputs.methods, inputs.folders, strict=True)},
        settings=Settings.from_dict(inputs.settings),
        keys=dict(zip(inputs.methods, inputs.keys, strict=True)),
        provenance=inputs.provenance,
    )


class Report(Step):
    """Figures of the group and the page of its subject and session."""

    input_spec = _ReportInput
    output_spec = _ReportOutput
    _always_run = True

    def _work(self, folder: Path) -> None:
        from . import pages

        os.environ.setdefault("MPLBACKEND", "agg")
        result = result_of(self.inputs)
        reports = Path(self.inputs.reports)
        pages.remember(result, reports)
        page = pages.write_page(result.group, reports, Path(self.inputs.output_dir))
        self._results["page"] = str(page)


class _SaveInput(_ResultInput):
    page = traits.Str(desc="the page is made before the group counts as finished")


class _SaveOutput(TraitedSpec):
    files = traits.List(traits.Str, desc="what was written")


class Save(Step):
    """BIDS derivatives of the group."""

    input_spec = _SaveInput
    output_spec = _SaveOutput
    _always_run = True

    def _work(self, folder: Path) -> None:
        files = derivatives.save(result_of(self.inputs), Path(self.inputs.output_dir))
        (folder / "saved.txt").write_text(str(self.inputs.provenance.get("run", "")))
        self._results["files"] = [str(path) for path in files]
