# SPDX-License-Identifier: Apache-2.0
"""``irem-bids``: from the command line to exit code.

Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import log, stop
from .exitcodes import ExitCode, UserError
from .parser import LEVELS, PROGRAM, parse, settings_from
from .settings import Settings

if TYPE_CHECKING:
    from .bids import Discovery, Excluded

INTERRUPTED = 130  # the shell's code for a run ended by Ctrl-C
SHOWN_REJECTIONS = 20

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app and return its exit code; a user's mistake is one message on stderr."""
    try:
        return int(_run(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _fail(str(error), error.code)
    except stop.Terminated as error:
        return _fail(str(error), ExitCode.TEMPORARY)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", INTERRUPTED)
    except MemoryError:
        return _fail("out of memory; give more, or lower --nprocs", ExitCode.TEMPORARY)
    except OSError as error:
        from .space import is_storage

        if not is_storage(error):
            return _defect(error)
        return _fail(f"{error.filename or 'output'}: {error.strerror}", ExitCode.IO_ERROR)
    except Exception as error:  # the last line of defence: a defect, shown with its traceback
        return _defect(error)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{PROGRAM}: error: {message}\n")
    return int(code)


def _defect(error: Exception) -> int:
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return _fail(f"a defect of {PROGRAM} ({error}); please report it", ExitCode.FAILURE)


def _run(argv: Sequence[str]) -> ExitCode:
    arguments = parse(argv)
    log.configure(arguments.verbose)
    levels = list(dict.fromkeys(arguments.analysis_level))
    for level in levels:
        if level not in LEVELS:
            raise UserError(
                f"unknown analysis level {level!r}; expected {' or '.join(LEVELS)}",
                ExitCode.UNKNOWN_LEVEL,
            )
    from .checks import check_dataset, check_output, check_profile
    from .config import read_config, with_absolute_paths
    from .resources import limit_threads

    base = read_config(arguments.config_file) if arguments.config_file else Settings()
    settings = with_absolute_paths(settings_from(arguments, base))
    limit_threads(settings.run)
    bids_dir, output_dir = Path(arguments.bids_dir), Path(arguments.output_dir)
    check_dataset(bids_dir, strict=not settings.selection.skip_bids_validation)
    check_output(bids_dir, output_dir)
    check_profile(settings.acquisition.profile_file)
    bids_dir, output_dir = bids_dir.resolve(), output_dir.resolve()
    settings = _with_work_dir(bids_dir, output_dir, settings)
    if arguments.boilerplate_only:
        return _boilerplate(output_dir, settings)
    code = ExitCode.SUCCESS
    if "participant" in levels:
        if arguments.dry_run:
            return _dry_run(bids_dir, settings)
        code = _participants(bids_dir, output_dir, settings, arguments.reports_only)
    if "group" in levels:
        if arguments.dry_run:
            raise UserError("--dry-run is for the participant level", ExitCode.USAGE)
        code = _group(output_dir, settings) or code
    return code


def _with_work_dir(bids_dir: Path, output_dir: Path, settings: Settings) -> Settings:
    from .checks import choose_work_dir

    folder = choose_work_dir(bids_dir, output_dir, settings.run.work_dir)
    return settings.updated({"run": {"work_dir": str(folder)}})


def _dry_run(bids_dir: Path, settings: Settings) -> ExitCode:
    """Print what a run would use and need; the exit code is the run's."""
    from .bids import describe

    database = settings.selection.bids_database_dir
    if database is not None and not Path(database).exists():
        settings = settings.updated({"selection": {"bids_database_dir": None}})
    discovery = _discover(bids_dir, settings, dry_run=True)
    from .cost import estimate, summary
    from .resources import resolve

    resources = resolve(settings.run)
    costs = {group.name: estimate(group, settings, resources) for group in discovery.groups}
    sys.stdout.write(describe(discovery, costs) + summary(costs.values(), resources))
    return ExitCode.SUCCESS if discovery.groups else ExitCode.BAD_DATA


def _discover(bids_dir: Path, settings: Settings, *, dry_run: bool) -> Discovery:
    from .bids import discover

    with log.Progress("reading images") as progress:
        return discover(bids_dir, settings, dry_run=dry_run, progress=progress)


def _participants(
    bids_dir: Path, output_dir: Path, settings: Settings, reports_only: bool
) -> ExitCode:
    from .checks import check_resources, create_output

    stop.install()
    check_resources(settings.run)
    discovery = _discover(bids_dir, settings, dry_run=False)
    if not discovery.groups:
        raise UserError(_nothing_usable(discovery), ExitCode.BAD_DATA)
    _log_discovery(discovery)
    create_output(output_dir)
    from .cohort import run_cohort

    return run_cohort(discovery, bids_dir, output_dir, settings, reports_only=reports_only)


def _boilerplate(output_dir: Path, settings: Settings) -> ExitCode:
    from .checks import create_output

    create_output(output_dir)
    from .cohort import write_boilerplate

    return write_boilerplate(output_dir, settings)


def _group(output_dir: Path, settings: Settings) -> ExitCode:
    if not output_dir.is_dir():
        raise UserError(
            f"{output_dir}: there is no such folder; run the participant level first",
            ExitCode.NO_INPUT,
        )
    from .cohort import run_group

    return run_group(output_dir, settings)


def _nothing_usable(discovery: Discovery) -> str:
    lines = ["no group of images can be reconstructed"]
    for rejected in discovery.excluded[:SHOWN_REJECTIONS]:
        lines.append(f"  {rejected.name}: {rejected.reason}")
        lines += [f"    {Path(e.path).name}: {e.reason}" for e in rejected.excluded]
    if len(discovery.excluded) > SHOWN_REJECTIONS:
        more = len(discovery.excluded) - SHOWN_REJECTIONS
        lines.append(f"  and {more} more; --dry-run shows them all")
    return "\n".join(lines)


def _log_discovery(discovery: Discovery) -> None:
    for group in discovery.groups:
        logger.info("%s: %d stacks (%s)", group.name, len(group.stacks), ", ".join(group.planes))
        _log_excluded(logging.INFO, group.name, group.excluded)
        for text in group.warnings:
            logger.warning("%s: %s", group.name, text)
    for rejected in discovery.excluded:
        logger.warning("%s cannot be used: %s", rejected.name, rejected.reason)
        _log_excluded(logging.WARNING, rejected.name, rejected.excluded)
    for rejected in discovery.not_asked:
        logger.info("%s is not reconstructed: %s", rejected.name, rejected.reason)
    for note in discovery.notes:
        logger.warning(note)


def _log_excluded(level: int, name: str, excluded: tuple[Excluded, ...]) -> None:
    for image in excluded:
        logger.log(level, "%s: left out: %s: %s", name, Path(image.path).name, image.reason)
