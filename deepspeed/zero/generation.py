"""Many forwards on parameters that are gathered once: `deepspeed.zero.unwrap_model_for_generation`.

At stage 3 every forward gathers what it uses, in step with all other ranks. A loop that makes one token after the other would gather
the model once a token, and ranks whose answers have different lengths would wait for each other. Inside of this context all
parameters are whole and no module stops at a hook, so nothing is sent and no rank waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.access import GatheredParameters
from deepspeed.zero.hook_switch import ParameterOffload


@contextlib.contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[nn.Module]:
    """The module of an engine, whole and without the hooks of stage 3; at other stages as it is.

    Collective where parameters are sharded: all ranks enter and leave; in between they do what they like, also nothing. Needs room
    for the whole model. Contexts may nest. Raises DeepSpeedError for what is no engine and no module.
    """
    module = getattr(model, "module", model)
    if not isinstance(module, nn.Module):
        raise DeepSpeedError(
            f"unwrap_model_for_generation got a {type(model).__name__}.\n  Pass what deepspeed.initialize returned."
        )
    optimizer = getattr(model, "optimizer", None) if model is not module else None
    offload = optimizer if isinstance(optimizer, ParameterOffload) else getattr(optimizer, "parameter_offload", None)
    if not isinstance(offload, ParameterOffload):
        yield module
        return
    with GatheredParameters(module.parameters()):
        offload.take_off()
        try:
            yield module
        finally:
            offload.put_back()
