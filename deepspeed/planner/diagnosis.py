"""What the doctor found: what a step is made of, and the changes that help. Pure.

Made by `doctor`, drawn by `doctor_page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.planner.cost import Parts


@dataclass(frozen=True)
class Finding:
    """A change that fits, and what it gains."""

    what: str
    values: dict[str, Any]
    gain: float
    """Samples per second over the present ones, less one."""
    nbytes: int


@dataclass(frozen=True)
class Diagnosis:
    """What a step is made of, and what to change."""

    parts: Parts
    samples_s: float
    nbytes: int
    fits: bool
    room_nbytes: int | None
    findings: Sequence[Finding]
    notes: Sequence[str]
    is_clocked: bool = False
    """Whether forward and backward are the model's own seconds here, rather than operations over rates."""
