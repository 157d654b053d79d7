"""Why a model is not cut: a refusal with its kind, because the way out depends on who asked.

Raised by `choose`, `rules` and `apply` with the way out that training has (`partition_config`). Inference has no such key: it takes the
kind (`why`) and what was wrong (`what`), and says its own way out.

Invariant: nobody reads a refusal's words to learn what it is.
"""

from __future__ import annotations

import enum

from deepspeed.utils.errors import DeepSpeedConfigError


class Why(enum.Enum):
    """What stands against cutting a model."""

    FAMILY = enum.auto()
    """Its layers cannot be told by their structure."""
    FUSED = enum.auto()
    """A layer is several in one, in an order that nothing says."""
    NOTHING = enum.auto()
    """No rule finds a layer."""
    PLAN = enum.auto()
    """Its own plan names what is not there, or a style that nobody knows."""
    KIND = enum.auto()
    """A layer is of a class that cannot be cut."""
    REPLACED = enum.auto()
    """A layer computes with something else than its class's forward."""
    SHARED = enum.auto()
    """Two layers share a parameter, and would cut it in different ways."""
    KEYS = enum.auto()
    """A fused layer has fewer heads of keys than there are ranks."""
    FIT = enum.auto()
    """What stands between two layers expects the whole."""
    NORM = enum.auto()
    """A norm of queries or keys sees several heads, or each by a module of its own."""


class CutRefusedError(DeepSpeedConfigError):
    """A model, or a layer, that cannot be cut over ranks. `cure` is the way out by the keys of training."""

    def __init__(self, why: Why, what: str, cure: str) -> None:
        super().__init__(why, what, cure)
        self.why, self.what, self.cure = why, what, cure

    def __str__(self) -> str:
        return f"{self.what}\n  {self.cure}"
