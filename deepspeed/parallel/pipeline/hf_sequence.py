"""Parts of sequences in the stages of a Hugging Face model: what `hf.pipeline_of` adds where its topology has an axis "sequence".

    data        (input_ids[, attention_mask[, position_ids]]), labels     a rank's own parts, [micro_batch, part]
    stages      (hidden states, attention mask or None, position ids), so that each stage knows the whole sequence's

Attention is that of `parallel.sequence`: the first part of a stage that meets a micro-batch joins position ids and padding over the
ranks, the rest of the stage finds them on the position ids. Without position ids tokens are counted over all parts.

The loss is the whole sequence's: labels are shifted over the cuts, and a rank's sum is divided by the number of all targets and
multiplied by the number of ranks, so that the mean over ranks is one process' loss, and the mean of gradients its gradient.

Invariant: ranks of a sequence run the same list of actions, so they meet in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.parallel.pipeline.hf_parts import PartialModel
from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.sequence.hf import register_group
from deepspeed.parallel.sequence.inputs import IGNORED, gather_inputs, shifted


class SpreadParts:
    """Runs the parts of one model. `group`: the ranks that share a sequence; `core`: the attention it was loaded with, None for its
    own. Raises DeepSpeedConfigError for attention that cannot be spread, LayerError for a model without position ids."""

    def __init__(self, model: Any, group: Any, core: str | None) -> None:
        self._group = group
        self._forward = register_group(model, core, group)

    def attach(self, module: nn.Module) -> None:
        """Have every part of a built pipeline run by this."""
        for part in module.modules():
            if isinstance(part, PartialModel):
                if "position_ids" not in inspect.signature(type(part.base).forward).parameters:
                    raise LayerError(
                        f"{type(part.base).__name__} takes no position_ids: a part of a sequence would count from 0.\n"
                        '  Leave the "sequence" axis out of the topology.'
                    )
                part.spread = self

    def run(self, part: PartialModel, values: Any) -> Any:
        """See Spread."""
        given = tuple(values) if isinstance(values, (tuple, list)) else (values,)
        x, mask, position_ids = (*given, None, None)[:3]
        if position_ids is None:
            position_ids = self._count(part, x, mask)
        tokens = {"input_ids": x} if part.takes_tokens else {"inputs_embeds": x}
        with self._forward.over(position_ids, mask):
            base: Any = part.base
            hidden = base(**tokens, position_ids=position_ids, use_cache=False).last_hidden_state
        return hidden, mask, position_ids

    def _count(self, part: PartialModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
        for child in part.base.children():
            if mask is not None and "attention_mask" in inspect.signature(child.forward).parameters:
                raise LayerError(
                    f"{type(part.base).__name__} counts positions by its attention mask, of which a rank has a part.\n"
                    "  Give the first stage (input_ids, attention_mask, position_ids)."
                )
        own = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        lengths = gather_inputs(self._group, own).lengths
        return own + sum(lengths[: dist.get_rank(self._group)])

    def loss(self, function: Callable[..., Tensor], config: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """This rank's share of a micro-batch's loss, times the number of ranks. labels: [micro_batch, part]."""
        own = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape[0], -1)
        inputs = gather_inputs(self._group, own, None, labels)
        assert inputs.labels is not None, "given"
        targets = shifted(inputs.labels)
        num_targets = int((targets != IGNORED).sum())
        mine = function(
            logits=logits, labels=None, shift_labels=inputs.own(targets), num_items_in_batch=num_targets,
            vocab_size=config.get_text_config().vocab_size,
        )  # fmt: skip
        return mine * dist.get_world_size(self._group)
