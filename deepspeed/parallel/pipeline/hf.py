"""A causal language model of Hugging Face as a `PipelineModule`, in one call.

Called by users; stands on the model's layers (`hf_parts`), and for folders on their descriptions (`hf_folder`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import init_distributed
from deepspeed.parallel.pipeline.grid import SEQUENCE, PipelineParallelGrid
from deepspeed.parallel.pipeline.hf_folder import layers_in
from deepspeed.parallel.pipeline.hf_parts import layers_of
from deepspeed.parallel.pipeline.hf_sequence import SpreadParts
from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.pipeline.module import PipelineModule


def pipeline_of(
    model: Any, num_stages: int | None = None, *, load: Mapping[str, Any] | None = None, **settings: Any
) -> PipelineModule:
    """Cut a causal LM of Transformers into its blocks. `settings` are PipelineModule's.

    model: one that is there, or a folder that `save_pretrained` wrote, of which each rank reads its own layers alone, with
    `load` as the arguments of `from_pretrained` (dtype, attn_implementation).
    Inputs are input_ids [micro_batch, seq], or (input_ids, attention_mask); labels as the model's own, and so is the loss,
    unless `loss_fn` is given. With a topology that has an axis "sequence" both are a rank's own parts (`hf_sequence`).
    Raises LayerError for a model that its layers do not reproduce. Collective.
    """
    if isinstance(model, (str, os.PathLike)):
        layers, model = layers_in(os.fspath(model), dict(load or {}))
    elif load:
        raise LayerError("pipeline_of(load=...) is for folders; this model is loaded already.")
    else:
        layers = layers_of(model)
    topology = settings.get("topology")
    if topology is not None and topology.get_dim(SEQUENCE) > 1:
        return _spread(model, layers, num_stages, (load or {}).get("attn_implementation"), settings)
    settings.setdefault("loss_fn", functools.partial(_loss, model.loss_function, model.config))
    return PipelineModule(layers, num_stages=num_stages, **settings)


def _spread(
    model: Any, layers: list[Any], num_stages: int | None, core: str | None, settings: dict[str, Any]
) -> PipelineModule:
    """The pipeline of a model whose sequences lie in parts on the ranks of the topology's "sequence" axis."""
    if not dist.is_initialized():
        init_distributed()
    spread = SpreadParts(model, PipelineParallelGrid(settings["topology"]).get_sequence_parallel_group(), core)
    has_own_loss = settings.get("loss_fn") is None
    if has_own_loss:
        settings["loss_fn"] = functools.partial(spread.loss, model.loss_function, model.config)
    made = PipelineModule(layers, num_stages=num_stages, **settings)
    made.loss_is_whole = has_own_loss
    spread.attach(made)
    return made


def _loss(function: Callable[..., Tensor], config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return function(logits=logits, labels=labels, vocab_size=config.get_text_config().vocab_size)
