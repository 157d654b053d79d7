"""From the configuration to tensor parallelism: what it says about a model's layers.

Read by the engine, which cuts the model, and by `memory`, which predicts what a rank then holds.
"""

from __future__ import annotations

from deepspeed.config import Config
from deepspeed.parallel.tensor.choose import Wishes
from deepspeed.parallel.tensor.rules import Action, Spec

_ACTIONS = {"row": Action.ROW, "column": Action.COLUMN, "skip": Action.WHOLE}


def layer_wishes(config: Config, *, is_part: bool = False) -> Wishes:
    """The section `tensor_parallel` in the terms of `parallel.tensor`. `is_part`: the model is one stage's layers."""
    section = config.tensor_parallel
    partition = section.partition_config
    specs = tuple(
        Spec(
            tuple(spec.patterns),
            _ACTIONS[spec.partition_type],
            None if spec.shape is None else tuple(spec.shape),
            spec.partition_dim,
            None if spec.model_types is None else tuple(spec.model_types),
        )
        for spec in (partition.layer_specs if partition is not None else ())
    )
    return Wishes(
        specs=specs,
        use_default_specs=partition.use_default_specs if partition is not None else True,
        preset=section.preset_model,
        overlaps=section.tp_overlap_comm,
        grain=section.tensor_parallel.tp_grain_size,
        cuts_head=section.vocab_parallel_lm_head,
        has_regions=section.sequence_parallel_regions,
        is_part=is_part,
    )
