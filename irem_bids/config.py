# SPDX-License-Identifier: Apache-2.0
"""Settings from and to TOML; standard library only."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from .exitcodes import ExitCode, UserError
from .settings import SECTIONS, Settings, SettingsError

#: Settings that are paths: made absolute, so that a saved file works from any folder.
PATHS = {
    "acquisition": ("profile_file",),
    "selection": ("bids_filter_file", "bids_database_dir", "derivatives"),
    "run": ("use_plugin", "work_dir"),
}


def read_config(path: str | Path) -> Settings:
    """Settings of a TOML file over the defaults.

    Raises
    ------
    UserError
        The file is missing (66), not TOML, or has an unknown or impossible
        setting (64; the nearest known name is given).
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return Settings.from_dict(tables)
    except OSError as error:
        raise UserError(
            f"--config-file {path}: cannot be read ({error.strerror})", ExitCode.NO_INPUT
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config-file {path}: is not UTF-8 text", ExitCode.USAGE) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"--config-file {path}: is not valid TOML ({error})", ExitCode.USAGE
        ) from error
    except SettingsError as error:
        raise UserError(f"--config-file {path}: {error}", ExitCode.USAGE) from error


def with_absolute_paths(settings: Settings) -> Settings:
    """The same settings with every path absolute."""
    changes: dict[str, dict[str, Any]] = {}
    for section, keys in PATHS.items():
        for key in keys:
            value = getattr(getattr(settings, section), key)
            if isinstance(value, tuple):
                value = tuple(str(Path(item).absolute()) for item in value)
            elif value is not None:
                value = str(Path(value).absolute())
            changes.setdefault(section, {})[key] = value
    return settings.updated(changes)


def settings_to_toml(settings: Settings) -> str:
    """Every setting as a TOML file that ``--config-file`` takes back.

    TOML has no null: settings without a value are left out, with a comment.

    >>> import tomllib
    >>> Settings.from_dict(tomllib.loads(settings_to_toml(Settings()))) == Settings()
    True
    """
    lines: list[str] = []
    values = settings.to_dict()
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for key, value in values[section].items():
            lines.append(f"# {key} is not set" if value is None else f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
