"""Two names that Transformers looks up and replaces while it builds a model under `zero.Init`.

Here tensor factories are left as they are, so there is nothing to wrap: parameters are cast when their module is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The factory itself."""
    return fn
