"""Whether the parts of a model's layers fit together once they are cut over ranks: a forward of one rank's parts, by shapes alone.

Called before a model is cut. Rules that go by names and structure do not see what stands between two layers: a norm or a convolution over
all of the width, a state of as many heads as the configuration says. Those would meet a part, and end the first call in torch's words.

Invariant: the model is not changed and no rank is asked. A model that does not run without values when it is whole,
or cannot be copied, is not judged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from deepspeed.memory.layers import AbsentRanks
from deepspeed.memory.trace import fake_copy
from deepspeed.parallel.tensor.apply import carry_out, draw
from deepspeed.parallel.tensor.choose import Chosen, Wishes
from deepspeed.parallel.tensor.refusal import CutRefusedError, Why

_TOKENS = 3
_SAMPLES = 4000
_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


def check_fit(model: nn.Module, size: int, wishes: Wishes, chosen: Chosen) -> None:
    """Raise CutRefusedError, on every rank alike, where the parts of the first or the last of `size` ranks do not run, and the whole
    model does; names the module.

    Judged are whole models of Transformers that take token ids (a prompt, and one token after it), pictures or sound.
    """
    if not _inputs(model) or wishes.is_part or wishes.has_regions:
        return
    for rank in (0, size - 1):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        cut, ranks = _copy(model, mode), AbsentRanks(size, rank)
        if cut is None:
            return
        with mode:
            carry_out(cut, ranks, draw(cut, ranks, wishes, chosen)[1], lambda param: None)
        found = _error(cut, mode)
        if found is None or isinstance(found[1], _UNKNOWN):
            continue
        whole = _copy(model, mode)
        if whole is None or _error(whole, mode) is not None:
            continue
        name, error = found
        raise CutRefusedError(
            Why.FIT,
            f"{type(model).__name__} cannot be cut over {size} ranks by its {chosen.source}: in {name or 'its forward'} a part meets what "
            f"expects the whole, or parts of other sizes ({str(error).splitlines()[0]}).",
            "Choose another number of ranks, or have the layers around it stay whole.",
        )


def _copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module | None:
    """Without values; its experts by products whose shapes do not depend on which were chosen. None where it cannot be copied."""
    try:
        made = fake_copy(model, mode).eval()
    except Exception:  # layers have process groups, locks, whatever a script gave them
        return None
    for module in made.modules():
        config = getattr(module, "config", None)
        if isinstance(getattr(config, _EXPERTS, None), str):
            setattr(config, _EXPERTS, "batched_mm")
    return made


def _error(model: nn.Module, mode: FakeTensorMode) -> tuple[str, Exception] | None:
    """What a forward raises, with the name of the module that it was in."""
    names = {module: name for name, module in model.named_modules()}
    inside: list[str] = []
    for module in names:
        module.register_forward_pre_hook(lambda module, args: inside.append(names[module]))
        module.register_forward_hook(lambda module, args, output: inside.pop() and None)
    try:
        with mode, torch.no_grad(), _quiet():
            made = {
                name: torch.zeros(shape, dtype=torch.int64 if name.endswith("_ids") else dtype, device="cpu")
                for dtype in [next((p.dtype for p in model.parameters()), torch.float32)]
                for name, shape in _inputs(model).items()
            }
            output = model(**made)
            name = next((name for name in _CACHES if getattr(output, name, None) is not None), None)
            if name is not None and list(made) == ["input_ids"]:
                inside.clear()
                model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu"), **{name: output[name]})
    except Exception as error:  # whatever the model's code raises for what it cannot do
        return (inside[-1] if inside else ""), error
    return None


def _inputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model is called with; none for a model that takes something else."""
    config: Any = getattr(model, "config", None)
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    frames = 2 * getattr(config, "max_source_positions", 50)
    shapes = {
        "input_ids": (1, _TOKENS),
        "pixel_values": (1, getattr(config, "num_channels", 3), height, width),
        "input_values": (1, _SAMPLES),
        "input_features": (1, getattr(config, "num_mel_bins", 80), frames),
    }
    main = getattr(model, "main_input_name", None)
    found = {main: shapes[main]} if main in shapes else {}
    if found and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = (1, 1)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own lines about operations whose shapes do not fit."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


_EXPERTS = "_experts_implementation_internal"
_CACHES = ("past_key_values", "cache", "cache_params")
