# SPDX-License-Identifier: Apache-2.0
"""The report of a subject: figures, metrics and words, in one page that needs no network.

``build_report`` is what the workflow calls.  ``material`` reads a group's working folder,
``figures`` draws it (``views`` for slices, ``plots`` for curves), ``summary`` says what needs a
look, ``methods`` writes the methods text, ``sections`` makes a fragment of HTML per section,
and ``assemble`` has nireports put them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assemble import build_report
    from .figures import make_figures
    from .material import ReportInput
    from .methods import bibliography, methods_text, write_citation

_HOMES = {
    "ReportInput": "material",
    "build_report": "assemble",
    "make_figures": "figures",
    "methods_text": "methods",
    "bibliography": "methods",
    "write_citation": "methods",
}
__all__ = [
    "ReportInput",
    "bibliography",
    "build_report",
    "make_figures",
    "methods_text",
    "write_citation",
]


def __getattr__(name: str) -> Any:
    """Import on first use: matplotlib and nireports are slow to load."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
