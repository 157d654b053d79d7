"""Values that scripts compare with, and small tuples that they unpack."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.utils.dtypes import parse_dtype


class ZeroStageEnum(int, enum.Enum):
    """The ZeRO stages; equal to their numbers."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class DtypeEnum(enum.Enum):
    """Dtypes of an inference configuration; called with any spelling of one."""

    fp16 = torch.float16
    fp32 = torch.float32
    bf16 = torch.bfloat16
    int8 = torch.int8

    @classmethod
    def _missing_(cls, value: object) -> Any:
        return cls(parse_dtype(str(value).removeprefix("torch.")))

    @classmethod
    def from_str(cls, value: str) -> DtypeEnum:
        """The member that a string names. Raises ValueError for what is no dtype."""
        return cls(value)


class PartitionedParamStatus(enum.Enum):
    """Where a parameter that rests on a disk is; `deepspeed.zero.ZeroParamStatus` is what parameters here have."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


@dataclass
class fragment_address:  # noqa: N801 - the public name
    """An interval of a flat buffer, in elements."""

    numel: int
    start: int
