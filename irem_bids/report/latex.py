# SPDX-License-Identifier: Apache-2.0
"""The methods text as LaTeX."""

from __future__ import annotations

import re

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
_HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[round]{natbib}
\begin{document}
"""
_TAIL = r"""
\bibliographystyle{plainnat}
\bibliography{CITATION}
\end{document}
"""


def latex(text: str) -> str:
    r"""Paragraphs of a methods text as LaTeX, citations as ``\citep`` (natbib).

    >>> print(latex("the method `srr` [@ebner2020automated; @wu2021irem] kept 2 %"))
    the method \texttt{srr} \citep{ebner2020automated,wu2021irem} kept 2 \%
    """
    out = []
    for part in re.split(r"(\[@[^\]]+\]|`[^`]+`)", text):
        if part.startswith("[@"):
            keys = re.findall(r"@([\w:-]+)", part)
            out.append(f"\\citep{{{','.join(keys)}}}")
        elif part.startswith("`"):
            out.append(f"\\texttt{{{_escaped(part[1:-1])}}}")
        else:
            out.append(_escaped(part))
    return "".join(out)


def document(text: str) -> str:
    """A whole document that compiles beside ``CITATION.bib``."""
    return f"{_HEAD}{latex(text)}{_TAIL}"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
