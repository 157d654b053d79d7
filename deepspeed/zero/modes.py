"""Leave the modes a script is in: what ZeRO makes and moves is plain memory, whoever asks for it.

Called around gathers and wherever memory that outlives the call is made. A tensor made under `torch.inference_mode()`
is an inference tensor for life, which autograd neither saves nor lets be written; inside a transform of `torch.func`
writing to a tensor that the transform has not wrapped is an error. An evaluation before the first step, a state dict kept
by an `@inference_mode` function or a `vmap` over the model may be the first to need a bucket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

AS_IT_IS: AbstractContextManager[None] = contextlib.nullcontext()


in_transform = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` (grad, vmap, jvp, ...) is running. Who asks torch for the stack of transforms has one made,
which is then copied for every node of every backward: 1.5 % of the instructions of a step of 200 small layers."""


def plain_modes() -> AbstractContextManager[None]:
    """Context: neither inference mode nor a transform of `torch.func`; gradient mode stays what it was."""
    if torch.is_inference_mode_enabled() or in_transform():
        return _left()
    return AS_IT_IS


@contextlib.contextmanager
def _left() -> Iterator[None]:
    # inference_mode(False) turns gradients on, so their mode is set after it.
    grad_mode = torch.is_grad_enabled()
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad_mode))
        if in_transform():
            stack.enter_context(torch._C._DisableFuncTorch())
        yield
