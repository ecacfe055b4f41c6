# SPDX-License-Identifier: Apache-2.0
"""nipype as this app runs it: its environment, its settings, which plugin."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import derivatives, stop
from .atomic import write_text
from .exitcodes import ExitCode, UserError
from .resources import Resources, set_thread_variables, visible_gpus
from .settings import Settings

LOG = logging.getLogger("irem_bids")


def environment(work_dir: Path, resources: Resources) -> None:
    """Variables that workers inherit: threads, no network, a home that can be written."""
    visible = visible_gpus()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    set_thread_variables(resources.threads)
    level = "INFO" if LOG.isEnabledFor(logging.DEBUG) else "CRITICAL"
    names = ("workflow", "interface", "utils")
    config = "\n".join(["[logging]", *(f"{name}_level = {level}" for name in names)])
    write_text(work_dir / "nipype" / "nipype.cfg", config + "\n")
    os.environ["NIPYPE_CONFIG_DIR"] = str(work_dir / "nipype")
    os.environ["NIPYPE_NO_ET"] = "1"
    os.environ["NO_ET"] = "1"
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("MPLCONFIGDIR", str(work_dir / "matplotlib"))
    derivatives.templateflow_stub(work_dir / "templateflow")


def quieten_nipype() -> None:
    """Leave failures to this app's own table, also where nipype was imported before."""
    level = logging.INFO if LOG.isEnabledFor(logging.DEBUG) else logging.CRITICAL
    for name in ("nipype", "nipype.workflow", "nipype.interface", "nipype.utils"):
        logging.getLogger(name).setLevel(level)


def configure(cohort_wf: Any, crashes: Path, *, stop_on_first: bool) -> None:
    """nipype's settings, carried by the graph so that workers have them, too."""
    cohort_wf.config["execution"] = {
        "crashdump_dir": str(crashes),
        "crashfile_format": "txt",
        "hash_method": "content",
        "stop_on_first_crash": str(stop_on_first).lower(),
        "remove_unnecessary_outputs": "false",
        "poll_sleep_duration": "0.2",
        "check_version": "false",
        "create_report": "false",
    }
    cohort_wf.config["monitoring"] = {"enabled": "false"}


def choose_plugin(
    count: int, settings: Settings, resources: Resources
) -> tuple[str, dict[str, Any]]:
    """nipype's plugin and its arguments.

    One process does where two steps cannot run side by side; starting workers takes
    seconds.
    """
    if settings.run.use_plugin:
        return read_plugin(settings.run.use_plugin)
    chains = count * len(settings.output.method)
    beside = 1 if resources.gpu else resources.threads  # a training on a GPU takes one processor
    if chains == 1 or resources.nprocs < resources.threads + beside:
        return "Linear", {}
    return "MultiProc", {
        "n_procs": resources.nprocs,
        "memory_gb": resources.memory_gb,
        "n_gpu_procs": len(resources.devices) if resources.gpu else 0,
        "raise_insufficient": True,
        "mp_context": "forkserver",
    }


@contextlib.contextmanager
def started_plugin(name: str, arguments: dict[str, Any]) -> Iterator[Any]:
    """nipype's plugin by its name; our own, whose workers end here, in the place of MultiProc."""
    if name != "MultiProc":
        yield name
        return
    from .plugin import SturdyMultiProc

    plugin = SturdyMultiProc(plugin_args=arguments)
    stop.at_exit(plugin.kill)
    try:
        yield plugin
    finally:
        plugin.stop()
        stop.forget(plugin.kill)


def read_plugin(path: str) -> tuple[str, dict[str, Any]]:
    """A YAML file with ``plugin`` and ``plugin_args``.

    Raises
    ------
    UserError
        The file is missing (66) or has no plugin (64).
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"--use-plugin {path}: cannot be read ({error.strerror})", ExitCode.NO_INPUT
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"--use-plugin {path}: not YAML: {error}", ExitCode.USAGE) from error
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise UserError(
            f"--use-plugin {path}: expected a line 'plugin: NAME' and, if need be, 'plugin_args:'",
            ExitCode.USAGE,
        )
    return content["plugin"], dict(content.get("plugin_args") or {})
