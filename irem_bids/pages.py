# SPDX-License-Identifier: Apache-2.0
"""The pages: of a subject and session, and of all participants.

What a subject's page is made from is remembered in the work folder.  A page shows all
contrasts of a subject and session, and groups end one by one, perhaps in several processes:
each leaves a record, and the page is made from the records there are.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import log
from .atomic import write_json, write_text
from .exitcodes import ExitCode, UserError
from .groups import Group
from .paths import completed_key
from .products import Result
from .settings import Settings
from .tables import collect, column_record, columns_of, describe_column, table_text

LOG = logging.getLogger(log.PACKAGE)


def remember(result: Result, reports: Path, errors: Sequence[dict[str, Any]] = ()) -> Path:
    """Write the record of a group; ``errors`` has ``step``, ``message``, ``traceback`` each."""
    record = {
        "group": result.group.to_dict(),
        "prepared": str(result.prepared),
        "methods": {method: str(folder) for method, folder in result.methods.items()},
        "settings": result.settings.to_dict(),
        "provenance": result.provenance,
        "keys": result.keys,
        "errors": list(errors),
    }
    return write_json(reports / f"{result.group.name}.json", record)


def recall(path: Path, output_dir: Path) -> Any:
    """A record as :class:`irem_bids.report.ReportInput`."""
    from .report import ReportInput

    record = json.loads(path.read_text())
    return ReportInput(
        group=Group.from_dict(record["group"]),
        prepared=Path(record["prepared"]),
        methods={method: Path(folder) for method, folder in record["methods"].items()},
        settings=Settings.from_dict(record["settings"]),
        provenance=record["provenance"],
        errors=record["errors"],
        out_dir=output_dir,
    )


def records_of(group: Group, reports: Path, output_dir: Path) -> list[Path]:
    """Records of all groups of a group's subject and session that belong to this output."""
    same = []
    for path in sorted(reports.glob(f"sub-{group.subject}_*.json")):
        other = Group.from_dict(json.loads(path.read_text())["group"])
        alike = (other.subject, other.session) == (group.subject, group.session)
        if alike and (other.name == group.name or belongs(path, output_dir)):
            same.append(path)
    return same


def belongs(path: Path, output_dir: Path) -> bool:
    """Whether a record tells of what is in an output, or will be: a work folder may have served
    another dataset, which in a container has the same paths and subjects of the same name."""
    record = json.loads(path.read_text())
    group = Group.from_dict(record["group"])
    if not all(Path(stack.path).is_file() for stack in group.stacks):
        return False
    saved = ((completed_key(output_dir, group, m), key) for m, key in record["keys"].items())
    return bool(record["errors"]) or all(there in (None, key) for there, key in saved)


def write_page(group: Group, reports: Path, output_dir: Path) -> Path:
    """Make the page of a group's subject and session; one process at a time does it."""
    from .report import build_report

    reports.mkdir(parents=True, exist_ok=True)
    lock = reports / f".sub-{group.subject}_ses-{group.session or ''}.lock"
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        paths = records_of(group, reports, output_dir)
        inputs = [recall(path, output_dir) for path in paths]
        return Path(build_report(inputs, output_dir, group.subject, group.session))


def run_group(output_dir: str | Path, settings: Settings) -> ExitCode:
    """Collect the metrics of all participants: ``group_<contrast>.tsv``, ``.json``, ``.html``.

    Raises
    ------
    UserError
        There are no metrics below the output folder (66).
    """
    output = Path(output_dir).resolve()
    contrasts = collect(output)
    if not contrasts:
        raise UserError(
            f"{output}: no sub-*/**/*_qc.json; run the level 'participant' first",
            ExitCode.NO_INPUT,
        )
    for suffix, rows in contrasts.items():
        columns = columns_of(rows)
        write_text(output / f"group_{suffix}.tsv", table_text(rows))
        write_json(output / f"group_{suffix}.json", {c: column_record(c) for c in columns})
        write_text(output / f"group_{suffix}.html", group_html(suffix, rows, output))
        LOG.info("group_%s.html and .tsv: %d rows", suffix, len(rows))
    return ExitCode.SUCCESS


def group_html(suffix: str, rows: Sequence[dict[str, Any]], output: Path) -> str:
    """The page of one contrast, its points linked to the reports that there are."""
    from .report.grouppage import Column, group_page

    there = {path.name for path in output.glob("sub-*.html")}
    links = []
    for row in rows:
        session = row.get("session_id")
        parts = [
            str(row["participant_id"]),
            *([str(session)] if session not in (None, "n/a") else []),
        ]
        name = "_".join(parts) + ".html"
        links.append(name if name in there else None)
    columns = [Column(name, *describe_column(name)) for name in columns_of(list(rows))]
    return group_page(suffix, rows, columns, links)
