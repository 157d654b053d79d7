"""How a weight is quantized, and the group size that fits its width. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.utils.errors import DeepSpeedConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Groups of `group_size` neighbours in a row share a scale."""

    num_bits: int = 8
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.num_bits not in (4, 8):
            raise DeepSpeedConfigError(f"num_bits = {self.num_bits}: weights are quantized to 4 or 8 bits.")
        if self.group_size < 1:
            raise DeepSpeedConfigError(
                f"group_size = {self.group_size} is too small.\n  Use 64, or another divisor of widths."
            )


SMALLEST_GROUP = 8
"""Below, scales would take more room than values."""


def fitting_group(width: int, wanted: int) -> int | None:
    """The largest even divisor of `width` up to `wanted`, of those that are a multiple of 32 where there are; None for widths
    that only divide into groups too small to be worth a scale.
    """
    divisors = [
        size for size in range(min(wanted, width), SMALLEST_GROUP - 1, -1) if width % size == 0 and size % 2 == 0
    ]
    aligned = [size for size in divisors if size % 32 == 0]
    return next(iter(aligned or divisors), None)


def fitting(spec: Spec, width: int, groups_per_row: int = 1) -> Spec | None:
    """The same with groups that divide rows of `width`: as large as asked for, or so many a row; None where none do."""
    group = fitting_group(width, width // groups_per_row if groups_per_row > 1 else spec.group_size)
    return None if group is None else Spec(num_bits=spec.num_bits, group_size=group, symmetric=spec.symmetric)
