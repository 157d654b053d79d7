"""Whether a tensor has values, or a shape alone.

Asked by what looks at values, such as targets or the tokens of an expert: a prediction of memory or time runs it on fake tensors.
"""

from __future__ import annotations

from torch import Tensor


def has_values(tensor: Tensor) -> bool:
    """False in a prediction of memory or time, whose tensors have shapes alone."""
    return type(tensor).__name__ != "FakeTensor"
