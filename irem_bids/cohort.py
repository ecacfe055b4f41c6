# SPDX-License-Identifier: Apache-2.0
"""A run over all groups: which need work, the graph, what became of each."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, completion, dataset, paths, space, stop
from .atomic import write_text
from .bids import Discovery, dataset_links
from .claims import Claims, sweep
from .config import settings_to_toml
from .engine import choose_plugin, configure, environment, quieten_nipype, started_plugin
from .exitcodes import ExitCode, UserError
from .groups import Group
from .outcomes import Outcome, damaged_groups, outcome_of, tell
from .pages import run_group
from .products import Result
from .resources import Resources, resolve
from .settings import Settings
from .tables import table_text

__all__ = ["run_cohort", "run_group", "write_boilerplate"]

LOG = logging.getLogger("irem_bids")
WAIT = 0.5  # s between two looks at what other runs work on
PACKAGES = (
    "torch", "nipype", "pybids", "niworkflows", "nireports", "nilearn", "nibabel", "SimpleITK",
    "numpy", "scipy", "numba",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of the app.

    ``name`` is the start of its file names in ``logs/``.
    """

    bids_dir: Path
    output_dir: Path
    work_dir: Path
    settings: Settings
    name: str
    provenance: dict[str, Any]

    @property
    def logs(self) -> Path:
        """Folder of logs."""
        return self.output_dir / "logs"

    @property
    def settings_file(self) -> Path:
        """The settings of the run, written when it begins."""
        return self.logs / f"{self.name}_settings.toml"


# ------------------------------------------------------------------------- the run
def run_cohort(
    discovery: Discovery,
    bids_dir: str | Path,
    output_dir: str | Path,
    settings: Settings,
    *,
    reports_only: bool = False,
) -> ExitCode:
    """Reconstruct every group that is not finished yet; one that fails stops no other.

    Raises
    ------
    UserError
        A folder cannot be made (73), a GPU is asked for and absent (75).
    """
    resources = resolve(settings.run)
    run = open_run(bids_dir, output_dir, settings)
    try:
        return _run_cohort(discovery, run, resources, reports_only)
    except OSError as error:
        if not space.is_storage(error):
            raise
        words = space.told(discovery.groups, settings, run.output_dir, run.work_dir)
        raise UserError(f"{error}; {words}", ExitCode.IO_ERROR) from error


def _run_cohort(
    discovery: Discovery, run: Run, resources: Resources, reports_only: bool
) -> ExitCode:
    settings = run.settings
    warning = space.check_space(discovery.groups, settings, run.output_dir, run.work_dir)
    if warning:
        LOG.warning(warning)
    links = dataset_links(run.bids_dir, settings)
    dataset.write_dataset_files(run.output_dir, links, run.work_dir)
    write_text(run.settings_file, settings_to_toml(settings))
    if reports_only:
        environment(run.work_dir, resources)
        outcomes = [_report_again(group, run) for group in discovery.groups]
        return close_run(outcomes, run)
    outcomes = _work_on(discovery.groups, run, resources) + damaged_groups(discovery)
    check_output(run)
    code = close_run(outcomes, run)
    if settings.run.clean_workdir and code is ExitCode.SUCCESS:
        clean_work(discovery.groups, run)
    return code


def _work_on(groups: Sequence[Group], run: Run, resources: Resources) -> list[Outcome]:
    """Every group once: those that other runs work on are waited for, and done if they were not."""
    found: dict[str, Outcome] = {}
    waiting = False
    sweep(run.output_dir)
    with Claims((run.output_dir, run.work_dir)) as claims:
        while left := [group for group in groups if group.name not in found]:
            mine = []
            for group in left:
                if not claims.take(group.name):
                    continue
                claims.sweep(group.name)
                if not run.settings.run.force and is_finished(group, run.output_dir, run.settings):
                    text = "finished before; --force repeats it"
                    found[group.name] = Outcome(group.name, "skipped", text)
                    claims.release(group.name)
                else:
                    mine.append(group)
            if mine:
                for outcome in run_groups(mine, run, resources):
                    found[outcome.name] = outcome
                    claims.release(outcome.name)
            elif len(found) < len(groups):
                if not waiting:
                    LOG.info("another run works on the %d group(s) that are left: waiting",
                             len(groups) - len(found))  # fmt: skip
                waiting = True
                time.sleep(WAIT)
    return [found[group.name] for group in groups]


def open_run(bids_dir: str | Path, output_dir: str | Path, settings: Settings) -> Run:
    """Make the folders of a run and its name."""
    output = Path(output_dir).resolve()
    work = Path(settings.run.work_dir or output.parent / "irem-bids-work").resolve()
    for folder, what in ((output, "output"), (work, "work")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".irem-bids-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write to the {what} folder {folder}: {error.strerror or error}; "
                f"choose another one{' with --work-dir' if what == 'work' else ''}",
                ExitCode.CANNOT_CREATE,
            ) from error
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{now}_{uuid.uuid4().hex[:8]}"
    return Run(Path(bids_dir).resolve(), output, work, settings, name, provenance(name))


def own_folder(run: Run) -> Path:
    """Folder of the output's own in the work folder; the output knows its name, wherever it is."""
    path = run.logs / "work_folder.txt"
    if not path.is_file():
        fresh = write_text(path.with_name(f".{run.name}_work_folder.txt"), uuid.uuid4().hex[:12])
        try:
            os.link(fresh, path)  # of several runs that begin at once, one gives the name
        except OSError:  # it is there, or the file system has no links
            if not path.exists():
                shutil.copyfile(fresh, path)
        fresh.unlink(missing_ok=True)
    return run.work_dir / f"output-{path.read_text().strip()}"


def check_output(run: Run) -> None:
    """Refuse to call a run well whose output folder went away under it.

    Raises
    ------
    UserError
        What it wrote in the beginning is not there: a mount was lost (74).
    """
    if not run.settings_file.is_file():
        raise UserError(
            f"{run.settings_file}: was written when the run began, and is not there; was a mount "
            "lost? What was written since may lie beneath the mount point; mount it again, and "
            "the same command goes on",
            ExitCode.IO_ERROR,
        )


def provenance(name: str) -> dict[str, Any]:
    """Versions, command line and name of a run."""
    versions = {"irem-bids": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    program = Path(sys.argv[0]).name.replace("__main__.py", "irem-bids")
    command = " ".join([program, *sys.argv[1:]])
    return {"run": name, "versions": versions, "command_line": command}


def is_finished(group: Group, output_dir: Path, settings: Settings) -> bool:
    """Every file asked for is there, made of these inputs with these settings."""
    recorded = {m: paths.completed_key(output_dir, group, m) for m in settings.output.method}
    if not all(recorded.values()) or not paths.page_path(group, output_dir).is_file():
        return False
    for method in settings.output.method:
        if (
            settings.output.model_out
            and not (
                output_dir
                / paths.relative_path(group, suffix="model", desc=method, extension=".safetensors")
            ).is_file()
        ):
            return False
    if settings.output.save_registered and not all(
        (output_dir / paths.registered_path(group, stack.label)).is_file() for stack in group.stacks
    ):
        return False
    try:
        inputs = completion.inputs_key(group.to_dict(), completion.normalise_settings(settings))
    except OSError:
        return False
    return all(
        key == completion.method_key(inputs, method, completion.method_settings(settings, method))
        for method, key in recorded.items()
    )


# ----------------------------------------------------------------------- the graph
def run_groups(groups: Sequence[Group], run: Run, resources: Resources) -> list[Outcome]:
    """Build the graph, run it, and say what became of each group."""
    environment(run.work_dir, resources)
    from .workflow import Place, init_cohort_wf

    quieten_nipype()

    place = Place(run.output_dir, run.work_dir, own_folder(run), resources, run.provenance)
    for group in groups:
        folder = place.group_folder(group)
        if run.settings.run.force:
            shutil.rmtree(folder, ignore_errors=True)
            (place.reports / f"{group.name}.json").unlink(missing_ok=True)
        for failure in folder.glob("*/failure.json"):
            failure.unlink()
    crashes = run.work_dir / "crashes" / run.name
    stopped = run.settings.run.stop_on_first_crash
    plugin, arguments = choose_plugin(len(groups), run.settings, resources)
    LOG.info(
        "%d group(s), %d processor(s), %d thread(s) a step, %.1f GB, %s, plugin %s",
        len(groups), resources.nprocs, resources.threads, resources.memory_gb,
        " ".join(resources.devices), plugin,
    )  # fmt: skip
    # Where nothing runs side by side, a graph for each group: nipype takes every group of a
    # graph through a step before the next step, so that none would be finished for long.
    batches = [[group] for group in groups] if plugin == "Linear" else [list(groups)]
    fault: BaseException | None = None
    for batch in batches:
        cohort_wf = init_cohort_wf(groups=batch, settings=run.settings, place=place)
        configure(cohort_wf, crashes, stop_on_first=stopped)
        try:
            with started_plugin(plugin, arguments) as engine:
                cohort_wf.run(plugin=engine, plugin_args=arguments)
        except Exception as error:
            fault = error
            LOG.debug("the graph ended with an error", exc_info=True)
        stop.leave_if_asked()
        if stopped and fault:
            break
    outcomes = [outcome_of(group, place, fault, stopped) for group in groups]
    outcomes = [_with_space(o, g, run) for o, g in zip(outcomes, groups, strict=True)]
    keep_crashes(crashes, outcomes, run)
    for group, outcome in zip(groups, outcomes, strict=True):
        if outcome.status == "failed":
            report_failure(group, outcome, place, run.settings)
    return outcomes


# ------------------------------------------------------------------- what came of it
def _with_space(outcome: Outcome, group: Group, run: Run) -> Outcome:
    """An outcome whose cause is the disk says how much there is and how much it takes."""
    if outcome.status != "failed" or not space.is_storage(outcome.cause):
        return outcome
    words = space.told([group], run.settings, run.output_dir, run.work_dir)
    return replace(outcome, cause=f"{outcome.cause}; {words}", code=int(ExitCode.IO_ERROR))


def report_failure(group: Group, outcome: Outcome, place: Any, settings: Settings) -> None:
    """A page for a group that failed: what there is, and the errors."""
    from . import pages

    folder = place.group_folder(group)
    methods = {
        method: folder / f"reconstruct_{method}" / "result" for method in settings.output.method
    }
    result = Result(
        group=group,
        prepared=folder / "normalise" / "prepared",
        methods={method: path for method, path in methods.items() if path.is_dir()},
        settings=settings,
        provenance=place.provenance,
    )
    try:
        pages.remember(result, place.reports, outcome.errors)
        pages.write_page(group, place.reports, place.output_dir)
    except Exception as error:  # the failure itself must still be told
        LOG.warning("%s: no report of the failure: %s", group.name, error)


def _report_again(group: Group, run: Run) -> Outcome:
    """Make a page anew from the work folder."""
    from . import pages

    reports = own_folder(run) / "reports"
    record = reports / f"{group.name}.json"
    if not record.is_file():
        cause = f"--reports-only: nothing of it in the work folder {reports.parent}"
        return Outcome(group.name, "failed", cause, int(ExitCode.NO_INPUT))
    if not pages.belongs(record, run.output_dir):
        cause = (
            f"--reports-only: what the work folder {reports.parent} has of it is not what made "
            "the images in the output; run without --reports-only, and with --force, to make both"
        )
        return Outcome(group.name, "failed", cause, int(ExitCode.NO_INPUT))
    try:
        pages.write_page(group, reports, run.output_dir)
    except Exception as error:
        LOG.exception("%s: the report failed", group.name)
        return Outcome(group.name, "failed", f"report: {error}", int(ExitCode.FAILURE))
    return Outcome(group.name, "done", "report")


def keep_crashes(crashes: Path, outcomes: Sequence[Outcome], run: Run) -> None:
    """Copy crash texts to the logs, whole or not at all."""
    for number, crash in enumerate(sorted(crashes.glob("crash-*.txt")), start=1):
        text = crash.read_text(errors="replace")
        write_text(run.logs / f"{run.name}_crash-{number}.txt", text)


def close_run(outcomes: Sequence[Outcome], run: Run) -> ExitCode:
    """Write the table of groups to the log and the logs folder; returns the exit code."""
    rows = [
        {"group": o.name, "status": o.status, "code": o.code, "cause": o.cause} for o in outcomes
    ]
    if rows:
        write_text(run.logs / f"{run.name}_groups.tsv", table_text(rows))
    write_citation(run)
    return tell(outcomes, run.output_dir)


def write_citation(run: Run) -> None:
    """Methods text with citations for the settings of this run."""
    write_boilerplate(run.output_dir, run.settings, run.provenance["versions"])


def write_boilerplate(
    output_dir: Path, settings: Settings, versions: dict[str, str] | None = None
) -> ExitCode:
    """``logs/CITATION.md``, ``.tex`` and ``.bib``: the methods text for some settings."""
    from .report.methods import methods_text, write_citation

    known = provenance("boilerplate")["versions"] if versions is None else versions
    paths = write_citation(output_dir / "logs", methods_text(settings, versions=known))
    LOG.debug("methods text: %s", ", ".join(str(path) for path in paths))
    return ExitCode.SUCCESS


def clean_work(groups: Sequence[Group], run: Run) -> None:
    """Remove what this dataset's groups left in the work folder."""
    from .workflow import COHORT_NAME, Place

    one = Resources(1, 1, 1.0, ("cpu",))
    place = Place(run.output_dir, run.work_dir, own_folder(run), one, {})
    for group in groups:
        shutil.rmtree(place.group_folder(group), ignore_errors=True)
        (place.reports / f"{group.name}.json").unlink(missing_ok=True)
    shutil.rmtree(run.work_dir / "crashes", ignore_errors=True)
    folder = place.own / COHORT_NAME
    for leftover in folder.glob("*.json"):
        leftover.unlink(missing_ok=True)
    locks = place.checkpoints / "locks"
    for left in (folder, place.reports, place.own, locks, locks.parent):
        if left.is_dir() and not any(left.iterdir()):
            left.rmdir()
