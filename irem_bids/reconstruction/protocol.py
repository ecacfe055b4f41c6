# SPDX-License-Identifier: Apache-2.0
"""What a simulated scanner does: every option of the simulator, once.

The standard library only, so that ``irem-bids-simulate --help`` is instant.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import option

ORIENTATIONS = ("axial", "coronal", "sagittal")
PROFILES = ("gaussian", "box", "decimate")


class SimulationError(ValueError):
    """A protocol that cannot be simulated."""


@dataclass(frozen=True)
class Protocol:
    """Lengths are in mm, angles in degrees; see the help of each field."""

    orientations: tuple[str, ...] = option(
        ORIENTATIONS,
        "plane of each stack, in order; a repeated one is shifted by a part of the spacing",
        choices=ORIENTATIONS,
    )
    in_plane: float | None = option(
        None,
        "in-plane voxel; default: the truth's smallest voxel size; averaged in plane where it is "
        "more than 5 % larger than that (not by 'decimate')",
        unit="mm",
    )
    thickness: float = option(4.0, "slice thickness, as the sidecar says it", unit="mm")
    gap: float = option(0.0, "gap between slices; slices follow by thickness + gap", unit="mm")
    profile: str = option(
        "gaussian",
        "slice profile: 'gaussian' with its full width at half maximum, or 'box' with its width, "
        "equal to the thickness; 'decimate' takes point samples",
        choices=PROFILES,
    )
    width_factor: float = option(1.0, "true width of the profile over the sidecar's thickness")
    obliqueness: float = option(
        0.0, "each field of view is turned by up to this, and the header knows", unit="degrees"
    )
    margin: float = option(4.0, "air added on each side of the truth's box", unit="mm")
    motion_degrees: float = option(
        0.0,
        "hidden motion of a stack about the head's centre: the rotation vector is uniform in a "
        "ball of this radius",
        unit="degrees",
    )
    motion_mm: float = option(
        0.0,
        "hidden motion of a stack: the translation is uniform in a ball of this radius",
        unit="mm",
    )
    slice_degrees: float = option(
        0.0,
        "hidden motion of slices, a random walk in interleaved order of acquisition: standard "
        "deviation of a step, each component of the rotation vector",
        unit="degrees",
    )
    slice_mm: float = option(0.0, "the same for each component of the translation", unit="mm")
    slice_bound: float = option(
        5.0, "the walk is reflected at this, degrees and mm", unit="degrees or mm"
    )
    gain: float = option(0.0, "the gain of a stack is uniform in 1 - this to 1 + this")
    bias: float = option(
        0.0, "the smooth bias field of a stack (a quadratic) reaches from 1 - this to 1 + this"
    )
    snr: float | None = option(
        None,
        "signal-to-noise ratio: mean of the truth's foreground over sigma of the Rician noise; "
        "default: no noise",
    )
    damaged: float = option(
        0.0, "fraction of slices dropped or torn, among the middle 70 % of a stack"
    )
    seed: int = option(0, "seed of everything random")

    def __post_init__(self) -> None:
        unknown = [o for o in self.orientations if o not in ORIENTATIONS]
        if unknown or not self.orientations:
            raise SimulationError(
                f"orientations are {list(self.orientations)}; expected some of "
                f"{', '.join(ORIENTATIONS)}"
            )
        if self.profile not in PROFILES:
            raise SimulationError(
                f"profile is {self.profile!r}; expected one of {', '.join(PROFILES)}"
            )
        for name in ("thickness", "width_factor", "slice_bound", "in_plane", "snr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SimulationError(f"{name} is {value}; expected above 0")
        for name in ("gain", "bias", "damaged"):
            if not 0 <= getattr(self, name) < 1:
                raise SimulationError(f"{name} is {getattr(self, name)}; expected 0 to below 1")
        motions = ("motion_degrees", "motion_mm", "slice_degrees", "slice_mm")
        for name in ("gap", "obliqueness", "margin", *motions):
            if not 0 <= getattr(self, name) < 1000:
                raise SimulationError(f"{name} is {getattr(self, name)}; expected 0 or more")

    @property
    def spacing(self) -> float:
        """Distance of slice centres, mm."""
        return self.thickness + self.gap
