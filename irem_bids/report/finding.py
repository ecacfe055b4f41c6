# SPDX-License-Identifier: Apache-2.0
"""What a check found, and lists of names in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: ``look`` is true where a person should look; ``text`` says why in words.

    ``link`` is the section of the page with the evidence; ``cause`` names the defect for
    programs ('misregistered', 'slice', 'gain', 'label', 'thickness', 'field of view' ...).
    """

    name: str
    look: bool
    text: str
    link: str = ""
    cause: str = ""


def listed(words: Sequence[str], most: int = 8) -> str:
    """Words as a list in a sentence; what goes beyond ``most`` is counted.

    >>> listed(["axial1", "coronal1", "sagittal1"])
    'axial1, coronal1 and sagittal1'
    >>> listed(["a", "b", "c"], most=1)
    'a and 2 more'
    """
    shown = list(words[:most])
    if len(words) > most:
        shown.append(f"{len(words) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
