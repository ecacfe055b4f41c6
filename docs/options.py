# SPDX-License-Identifier: Apache-2.0
"""The tables of options on the usage page, from ``irem_bids.settings``."""

import dataclasses
from typing import Any

from irem_bids.settings import SECTIONS, element_type


def flags(option: dataclasses.Field[Any]) -> list[str]:
    """Spellings of an option on the command line."""
    names = [f"--{option.name.replace('_', '-')}", *option.metadata["flags"]]
    return list(dict.fromkeys(name.replace("_", "-") for name in names))


def default_text(option: dataclasses.Field[Any]) -> str:
    """The default as one reads it."""
    value = option.default
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(value) if isinstance(value, tuple) else f"{value}"
    unit = option.metadata["unit"]
    return f"{text} {unit}" if unit else text


def values_text(option: dataclasses.Field[Any]) -> str:
    """Type or choices, bounds and unit."""
    kind, is_tuple, _ = element_type(option)
    metadata = option.metadata
    if metadata["choices"]:
        text = ", ".join(f"`{choice}`" for choice in metadata["choices"])
    else:
        text = {bool: "on or off", int: "integer", float: "number", str: "text"}[kind]
    bounds = [
        f"{words} {metadata[key]:g}"
        for key, words in (("low", "from"), ("high", "to"))
        if metadata[key] is not None
    ]
    parts = [text, *([" ".join(bounds)] if bounds else [])]
    if metadata["unit"]:
        parts.append(metadata["unit"])
    if is_tuple:
        parts.append("one or several")
    return "; ".join(parts)


def markdown_table(section: str) -> str:
    """All options of a section as a Markdown table."""
    rows = ["| option | what | values | default |", "| --- | --- | --- | --- |"]
    for option in dataclasses.fields(SECTIONS[section]):
        names = "<br>".join(f"`{flag}`" for flag in flags(option))
        if element_type(option)[0] is bool:
            names += f"<br>`--no-{option.name.replace('_', '-')}`"
        what = option.metadata["help"].replace("%%", "%")
        row = [names, what, values_text(option), default_text(option)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(rows) + "\n"
