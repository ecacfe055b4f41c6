# SPDX-License-Identifier: Apache-2.0
"""What became of each group: read from its folder, told in the log, as an exit code."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import log
from .bids import Discovery
from .exitcodes import ExitCode
from .groups import Group

LOG = logging.getLogger(log.PACKAGE)


@dataclass(frozen=True)
class Outcome:
    """What became of a group: ``done``, ``skipped`` or ``failed``, and why."""

    name: str
    status: str
    cause: str = ""
    code: int = int(ExitCode.SUCCESS)
    errors: tuple[dict[str, Any], ...] = field(default=(), compare=False)


def outcome_of(
    group: Group, place: Any, fault: BaseException | None, stopped: bool = False
) -> Outcome:
    """Done if its last step left a result in this run, else failed with the first cause."""
    folder = place.group_folder(group)
    failures = [_failure(path) for path in sorted(folder.glob("*/failure.json"))]
    if failures:
        first = failures[0]
        cause = f"{first['step']}: {first['message']}"
        codes = {failure["code"] for failure in failures}
        code = codes.pop() if len(codes) == 1 else int(ExitCode.FAILURE)
        return Outcome(group.name, "failed", cause, code, tuple(failures))
    if saved_in(folder, place.provenance["run"]):
        return Outcome(group.name, "done")
    if fault is None:
        cause = "not finished: the plugin returned before it had run (an asynchronous plugin?)"
    elif stopped:
        cause = "not finished: --stop-on-first-crash, and another step failed"
    else:
        words = str(fault).strip().splitlines() or [type(fault).__name__]
        cause = f"a step ended without a message (killed? out of memory?): {words[-1]}"
    error = {"step": "run", "message": cause, "traceback": ""}
    return Outcome(group.name, "failed", cause, int(ExitCode.FAILURE), (error,))


def _failure(path: Path) -> dict[str, Any]:
    """What a step left of its failure; a full disk may have cut it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        code = int(ExitCode.FAILURE)
        return {"step": path.parent.name, "message": f"{error}", "code": code, "traceback": ""}


def damaged_groups(discovery: Discovery) -> list[Outcome]:
    """Groups that damaged images leave too small: failures; what never was a group is none."""
    return [
        Outcome(rejected.name, "failed", f"{rejected.reason}: {rejected.damage}",
                int(ExitCode.BAD_DATA))
        for rejected in discovery.excluded
        if rejected.damage
    ]  # fmt: skip


def saved_in(folder: Path, run_name: str) -> bool:
    """The step 'save' has ended in the run of this name."""
    try:
        return (folder / "save" / "saved.txt").read_text() == run_name
    except OSError:
        return False


def tell(outcomes: Sequence[Outcome], output_dir: Path) -> ExitCode:
    """A line per group and their count, in the log; the exit code that fits."""
    width = max((len(o.name) for o in outcomes), default=0)
    for outcome in outcomes:
        level = logging.ERROR if outcome.status == "failed" else logging.INFO
        text = f"{outcome.name:<{width}}  {outcome.status:<7}  {outcome.cause}".rstrip()
        LOG.log(level, "%s", text)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    counts = ", ".join(
        f"{sum(o.status == status for o in outcomes)} {status}"
        for status in ("done", "skipped", "failed")
    )
    LOG.info("%s; output in %s", counts, output_dir)
    if not failed:
        return ExitCode.SUCCESS
    codes = {outcome.code for outcome in failed}
    if len(codes) == 1 and len(failed) == len(outcomes):
        return ExitCode(codes.pop())
    return ExitCode.FAILURE
