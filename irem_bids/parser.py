# SPDX-License-Identifier: Apache-2.0
"""The command line, made from :mod:`irem_bids.settings`; standard library only."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .exitcodes import ExitCode, UserError
from .settings import SECTIONS, Settings, SettingsError, element_type

PROGRAM = "irem-bids"
LEVELS = ("participant", "group")
DESCRIPTION = (
    "Isotropic MR images from stacks of thick slices in several orientations. Every option below "
    "a section's title can also stand in the TOML file of --config-file; the command line wins."
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError` with code 64."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        if "required" in message:
            message += " (options that take several values go behind them)"
        raise UserError(f"{message}; see {PROGRAM} --help", ExitCode.USAGE)


def build_parser() -> Parser:
    """The parser; only options that were given appear in what it returns."""
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        usage="%(prog)s bids_dir output_dir {participant,group} [options]",
    )
    parser.add_argument("bids_dir", help="folder of the BIDS dataset")
    parser.add_argument("output_dir", help="folder of the results, a BIDS derivative dataset")
    parser.add_argument(
        "analysis_level",
        nargs="+",
        metavar="{participant,group}",
        help="'participant' reconstructs, 'group' gathers the metrics of all participants; "
        "both may be given",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="more lines in the log (stderr)"
    )
    parser.add_argument("--config-file", metavar="FILE", help="TOML file of settings")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the groups and each image left out with its reason; write nothing but "
        "a --bids-database-dir that exists",
    )
    parser.add_argument(
        "--reports-only", action="store_true", help="only make the reports of finished groups again"
    )
    parser.add_argument(
        "--boilerplate-only",
        action="store_true",
        help="only write the methods text for these settings (logs/CITATION.md, .tex, .bib)",
    )
    for section, cls in SECTIONS.items():
        title = (cls.__doc__ or section).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(f"[{section}] {title}")
        for option in dataclasses.fields(cls):
            _add_option(group, section, option)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``--like_this`` is read as ``--like-this``.

    Raises
    ------
    UserError
        A usage error (64); an unknown option is answered with the nearest one.
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args([_dashes(word) for word in argv])
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].split("=")[0]
        near = difflib.get_close_matches(word, flags, n=1) if word.startswith("-") else []
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognised argument: {unknown[0]}{hint}")
    return arguments


def settings_from(arguments: argparse.Namespace, base: Settings) -> Settings:
    """``base`` with the options that were given on the command line."""
    tables: dict[str, dict[str, Any]] = {}
    for dest, value in vars(arguments).items():
        section, dot, key = dest.partition(".")
        if dot:
            tables.setdefault(section, {})[key] = value
    try:
        return base.updated(tables)
    except SettingsError as error:
        raise UserError(f"{error} (command line)", ExitCode.USAGE) from error


def _dashes(word: str) -> str:
    if not re.match(r"--[a-z]", word):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _add_option(
    group: argparse._ArgumentGroup, section: str, option: dataclasses.Field[Any]
) -> None:
    kind, is_tuple, _ = element_type(option)
    metadata = option.metadata
    flags = [f"--{option.name.replace('_', '-')}"]
    flags += [flag for flag in metadata["flags"] if _dashes(flag) not in flags]
    flags = list(dict.fromkeys(_dashes(flag) for flag in flags))
    keywords: dict[str, Any] = {
        "dest": f"{section}.{option.name}",
        "default": argparse.SUPPRESS,
        "help": _help(option).replace("%", "%%"),
    }
    if kind is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **keywords)
        return
    choices = metadata["choices"]
    keywords["metavar"] = metadata["metavar"] or (
        "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
    )
    if kind is not str:
        keywords["type"] = kind
    if is_tuple:
        keywords.update(nargs="+", action="extend")
    group.add_argument(*flags, **keywords)


def _help(option: dataclasses.Field[Any]) -> str:
    """Help with unit and default."""
    text, default, unit = option.metadata["help"], option.default, option.metadata["unit"]
    notes = [f"unit: {unit}"] if unit else []
    if default not in (None, ()):
        shown = ", ".join(default) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            shown = "on" if default else "off"
        notes.append(f"default: {shown}")
    return f"{text} [{'; '.join(notes)}]" if notes else text
