"""A causal language model of Hugging Face as a `PipelineModule`, in one call.

Called by users; stands on the model's layers (`hf_parts`), and for folders on their descriptions (`hf_folder`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from deepspeed.parallel.pipeline.grid import SEQUENCE
from deepspeed.parallel.pipeline.hf_folder import layers_in
from deepspeed.parallel.pipeline.hf_parts import layers_of
from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.pipeline.module import PipelineModule


def pipeline_of(
    model: Any, num_stages: int | None = None, *, load: Mapping[str, Any] | None = None, **settings: Any
) -> PipelineModule:
    """Cut a causal LM of Transformers into its blocks. `settings` are PipelineModule's.

    model: one that is there, or a folder that `save_pretrained` wrote, of which each rank reads its own layers alone, with
    `load` as the arguments of `from_pretrained` (dtype, attn_implementation).
    Inputs are input_ids [micro_batch, seq], or (input_ids, attention_mask); labels as the model's own, and so is the loss,
    unless `loss_fn` is given. Raises LayerError for a model that its layers do not reproduce. Collective.
    """
    topology = settings.get("topology")
    if topology is not None and topology.get_dim(SEQUENCE) > 1:
        raise LayerError(
            f"pipeline_of does not go with the topology's {topology.get_dim(SEQUENCE)} parts of sequences: a model's blocks would "
            'take each part for a whole sequence.\n  Leave the "sequence" axis out, or write layers with DistributedAttention.'
        )
    if isinstance(model, (str, os.PathLike)):
        layers, model = layers_in(os.fspath(model), dict(load or {}))
    elif load:
        raise LayerError("pipeline_of(load=...) is for folders; this model is loaded already.")
    else:
        layers = layers_of(model)
    settings.setdefault("loss_fn", functools.partial(_loss, model.loss_function, model.config))
    return PipelineModule(layers, num_stages=num_stages, **settings)


def _loss(function: Callable[..., Tensor], config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return function(logits=logits, labels=labels, vocab_size=config.get_text_config().vocab_size)
