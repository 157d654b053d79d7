"""From the configuration to tensor parallelism: what it says about a model's layers.

Read by the engine, which cuts the model, and by `memory`, which predicts what a rank then holds.
"""

from __future__ import annotations

from deepspeed.config import Config
from deepspeed.config.parallelism import LayerSpecConfig
from deepspeed.parallel.tensor.choose import Wishes
from deepspeed.parallel.tensor.rules import Action, Spec
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError

_ACTIONS = {"row": Action.ROW, "column": Action.COLUMN, "skip": Action.WHOLE}


def _action(spec: LayerSpecConfig) -> Action:
    """What a rule asks for. Raises DeepSpeedConfigError, NotAvailableError (a NotImplementedError) for options of others' kinds."""
    action = _ACTIONS[spec.partition_type]
    where = f"tensor_parallel.partition_config.layer_specs: the rule for {list(spec.patterns)} has"
    if spec.grad_allreduce and action is not Action.WHOLE:
        raise DeepSpeedConfigError(
            f"{where} grad_allreduce = true and partition_type {spec.partition_type!r}: it is for layers that stay whole.\n"
            '  Set partition_type to "skip", or remove grad_allreduce.'
        )
    if spec.gather_output and spec.shape is not None:
        raise NotAvailableError(f"{where} gather_output = true and a shape.\n  Leave one of them out.")
    if spec.gather_output and action is Action.COLUMN:
        return Action.COLUMN_GATHERED
    return Action.SUM_GRADIENT if spec.grad_allreduce else action


def layer_wishes(config: Config, *, is_part: bool = False) -> Wishes:
    """The section `tensor_parallel` in the terms of `parallel.tensor`. `is_part`: the model is one stage's layers."""
    section = config.tensor_parallel
    partition = section.partition_config
    if partition is not None and partition.tp_size not in (None, 1, section.autotp_size) and section.autotp_size > 1:
        raise DeepSpeedConfigError(
            f"tensor_parallel.partition_config.tp_size = {partition.tp_size}, and tensor_parallel.autotp_size = {section.autotp_size}.\n"
            "  Remove the first."
        )
    specs = tuple(
        Spec(
            tuple(spec.patterns),
            _action(spec),
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
        cuts_words=partition is not None and partition.embedding_partition_dim == 0,
        overlaps=section.tp_overlap_comm,
        grain=section.tensor_parallel.tp_grain_size,
        cuts_head=section.vocab_parallel_lm_head,
        has_regions=section.sequence_parallel_regions,
        is_part=is_part,
    )
