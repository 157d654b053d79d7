"""What the configuration can say and what comes of it, as three tables.

    NOT_YET     a value asks for a feature that this version does not have: an error
    TOGETHER    two keys, each right by itself, exclude each other: an error, with the reason
    NO_EFFECT   a key is accepted and does nothing here: one warning, with the reason

`check_available` is called by the engine before it builds anything, and reads the first and the last; `root.Config`
asks the second as it is read. A section that is present but off is fine, and so is a value that is the default.

Invariant: every field of the tree is read by the package, or stands in one of the tables. Building a feature ends with
deleting its lines here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from deepspeed.config.base import Problem, Section, value_at
from deepspeed.config.explain import show
from deepspeed.config.optimizer import ONE_BIT_OPTIMIZERS
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import NotAvailableError
from deepspeed.utils.logging import warn_once

Root = Any
"""The root `Config`, which reads this file's tables and so cannot be imported here."""


def _is_given(value: Any) -> bool:
    return value is not None


def _is_above_1(value: float | None) -> bool:
    return value is not None and value > 1


def _is_deepep(backend: str) -> bool:
    return backend == "deepep"


def _is_missing_optimizer(name: str | None) -> bool:
    return (name or "").lower() in ("muadam", "muadamw", "musgd")


NOT_YET: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("zero_optimization.offload_optimizer.super_offload", bool, "offload for Superchips"),
    ("zero_optimization.zenflow", _is_given, "ZenFlow"),
    ("optimizer.type", _is_missing_optimizer, "this optimizer"),
    ("amp.enabled", bool, "Apex mixed precision"),
    ("msamp.enabled", bool, "MS-AMP"),
    ("tensor_parallel.vocab_parallel_ce_backend", lambda backend: backend == "liger", "Liger's cross entropy"),
    ("tensor_parallel.injection_policy_tuple", _is_given, "layers named by their ends; partition_config names them"),
    ("tensor_parallel.replace_with_kernel_inject", bool, "kernels for inference in training"),
    ("expert_parallel.comm_backend", _is_deepep, "DeepEP"),
    ("compile.deepcompile", bool, 'DeepCompile, except for "passes": ["autosp"] alone'),
    ("hybrid_engine.enabled", bool, "the hybrid engine"),
    ("data_efficiency.enabled", bool, "data efficiency"),
    ("curriculum_learning.enabled", bool, "curriculum learning"),
    ("progressive_layer_drop.enabled", bool, "progressive layer dropping"),
    ("compression_training.layer_reduction.enabled", bool, "layer reduction"),
    ("compression_training.weight_quantization.enabled", bool, "weight quantization while training"),
    ("compression_training.activation_quantization.enabled", bool, "activation quantization while training"),
    ("compression_training.sparse_pruning.enabled", bool, "pruning"),
    ("compression_training.row_pruning.enabled", bool, "pruning"),
    ("compression_training.head_pruning.enabled", bool, "pruning"),
    ("compression_training.channel_pruning.enabled", bool, "pruning"),
    ("quantize_training.enabled", bool, "quantization while training"),
    ("quantize_training.eigenvalue.enabled", bool, "layer curvature"),
    ("eigenvalue.enabled", bool, "layer curvature"),
    ("sparse_attention", _is_given, "sparse attention"),
)
"""The key, when its value asks for the feature, and the feature."""


class Exclusion(NamedTuple):
    """Two keys that do not go together."""

    keys: tuple[str, ...]
    """Dotted; the first two, or more where the rule speaks about more."""
    applies: Callable[[Root], bool]
    """Whether a configuration breaks it."""
    rule: str
    """The reason, as the rest of a sentence that begins with the keys and their values."""
    cure: str
    """The way out, as a sentence."""


def _optimizer(config: Root) -> str:
    return ((config.optimizer and config.optimizer.type) or "").lower()


def _states_another_dtype(config: Root) -> bool:
    stated = config.data_types.param_dtype
    return stated is not None and stated != config.precision_dtype


def _without_zero(key: str) -> Callable[[Root], bool]:
    return lambda config: bool(value_at(config, key)) and config.zero_optimization.stage == 0


def _sums_with(key: str) -> Callable[[Root], bool]:
    return lambda config: config.gradient_allreduce_op == "sum" and value_at(config, key) not in (None, False)


def _uncounted_with(key: str) -> Callable[[Root], bool]:
    return lambda config: not config.managed_gradient_accumulation and bool(value_at(config, key))


def _below_stage(key: str, least: int) -> Callable[[Root], bool]:
    return lambda config: bool(value_at(config, key)) and config.zero_optimization.stage < least


def _one_bit_with(asks: Callable[[Root], bool]) -> Callable[[Root], bool]:
    return lambda config: _optimizer(config) in ONE_BIT_OPTIMIZERS and asks(config)


def _offloads(config: Root) -> bool:
    return _is_offloaded(config.zero_optimization.offload_optimizer)


def _is_offloaded(offload: Any) -> bool:
    return offload is not None and getattr(offload.device, "value", offload.device) != "none"


def _never_freezes(config: Root) -> bool:
    if _optimizer(config) not in ONE_BIT_OPTIMIZERS or config.scheduler is None:
        return False
    total = config.scheduler.params.get("total_num_steps")
    key = "var_freeze_step" if _optimizer(config) == "zerooneadam" else "freeze_step"
    freeze = config.optimizer.params.get(key, 100000)
    return all(isinstance(n, (int, float)) for n in (total, freeze)) and bool(freeze >= total)


_ONE_PRECISION = ("a model has one precision", "Set one of them to false.")
_AVERAGES = ("this can only average gradients", 'Use "mean", and multiply the loss by the number of ranks for a sum.')
_COUNTS = "this needs the engine to count micro-batches"
_STAGE = "zero_optimization.stage"

TOGETHER: tuple[Exclusion, ...] = (
    Exclusion(("fp16.enabled", "bf16.enabled"), lambda c: c.fp16.enabled and c.bf16.enabled, *_ONE_PRECISION),
    *(
        Exclusion(
            (key, _STAGE),
            _without_zero(key),
            "this needs ZeRO",
            f"Use stage 1, 2 or 3, or remove {key}.",
        )
        for key in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads")
    ),
    Exclusion(("amp.enabled", "fp16.enabled"), lambda c: c.amp.enabled and c.fp16.enabled, *_ONE_PRECISION),
    Exclusion(
        ("amp.enabled", _STAGE),
        lambda c: c.amp.enabled and c.zero_optimization.stage > 0,
        "Apex excludes ZeRO",
        "Use bf16 or fp16 instead.",
    ),
    Exclusion(
        ("data_types.param_dtype", "fp16.enabled", "bf16.enabled"),
        _states_another_dtype,
        "the model is {dtype}",
        "Remove param_dtype, or enable the section of that dtype.",
    ),
    Exclusion(
        ("gradient_allreduce_op", _STAGE),
        lambda c: c.gradient_allreduce_op == "sum" and c.zero_optimization.stage == 3,
        *_AVERAGES,
    ),
    *(
        Exclusion(
            ("gradient_allreduce_op", key),
            _sums_with(key),
            *_AVERAGES,
        )
        for key in ("zero_optimization.zenflow", "compile.deepcompile")
    ),
    Exclusion(
        ("zero_optimization.compute_grad_norm", "gradient_clipping"),
        lambda c: not c.zero_optimization.compute_grad_norm and c.gradient_clipping > 0,
        "clipping needs the norm (and is on by default)",
        "Set gradient_clipping to 0, or compute_grad_norm to true.",
    ),
    Exclusion(
        ("managed_gradient_accumulation", "zero_optimization.overlap_comm"),
        lambda c: (
            not c.managed_gradient_accumulation
            and bool(c.zero_optimization.overlap_comm)
            and c.zero_optimization.stage < 2
        ),
        _COUNTS,
        "Remove managed_gradient_accumulation, or set zero_optimization.overlap_comm to false.",
    ),
    *(
        Exclusion(
            ("managed_gradient_accumulation", key),
            _uncounted_with(key),
            _COUNTS,
            f"Remove managed_gradient_accumulation, or set {key} to false.",
        )
        for key in ("compile.deepcompile", "amp.enabled")
    ),
    Exclusion(
        ("optimizer.type", "fp16.loss_scale"),
        lambda c: _optimizer(c) == "lamb" and c.fp16.enabled and c.fp16.loss_scale != 0,
        "LAMB needs the dynamic loss scale",
        "Set loss_scale to 0.",
    ),
    Exclusion(
        ("optimizer.type", _STAGE),
        lambda c: _optimizer(c) in ONE_BIT_OPTIMIZERS and c.zero_optimization.stage > 1,
        "this optimizer averages whole momenta by itself, and from stage 2 on a rank keeps a slice of averaged gradients",
        "Set stage to 0 or 1, or use another optimizer.",
    ),
    *(
        Exclusion(
            ("optimizer.type", key),
            _one_bit_with(asks),
            "this optimizer averages whole momenta between devices by itself",
            cure,
        )
        for key, asks, cure in (
            ("zero_optimization.offload_optimizer", _offloads, "Leave the state on the device, or use Adam."),
            ("gradient_allreduce_op", lambda c: c.gradient_allreduce_op == "sum", 'Use "mean".'),
            (
                "zero_optimization.zero_quantized_gradients",
                lambda c: c.zero_optimization.zero_quantized_gradients,
                "Remove one of them: each compresses what is sent.",
            ),
        )
    ),
    *(
        Exclusion(
            (key, _STAGE),
            _below_stage(key, least),
            reason,
            f"Use stage {least}{' or above' if least < 3 else ''}, or remove {key}.",
        )
        for key, least, reason in (
            ("zero_optimization.zero_quantized_weights", 3, "below stage 3 no parameters are gathered in a step"),
            (
                "zero_optimization.zero_quantized_nontrainable_weights",
                3,
                "below stage 3 every rank computes with its own whole parameters",
            ),
            (
                "zero_optimization.zero_quantized_gradients",
                1,
                "what is quantized is a reduce-scatter, which stage 0 has none of",
            ),
        )
    ),
    Exclusion(
        ("zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.offload_param"),
        lambda c: (
            c.zero_optimization.zero_quantized_nontrainable_weights and _is_offloaded(c.zero_optimization.offload_param)
        ),
        "quantized parameters rest on the device",
        "Remove one of them.",
    ),
    Exclusion(
        ("optimizer.params", "scheduler.params"),
        _never_freezes,
        "the run ends (total_num_steps) before the steps without compression do (freeze_step or var_freeze_step, 100000 if "
        "not given), so nothing would ever be compressed",
        "Set freeze_step to a fifth of the steps or so, or use Adam.",
    ),
)
"""Pairs over sections; what concerns one section alone is in its own `rules`."""


def exclusions(config: Root) -> Iterator[Problem]:
    """The rows of TOGETHER that a configuration breaks."""
    for keys, applies, rule, cure in TOGETHER:
        if applies(config):
            yield Problem(keys, rule.format(dtype=dtype_name(config.precision_dtype)), cure)


_BY_ITSELF = "each bucket is gathered by itself"
_PIPELINED = "reads and writes are queued ahead by themselves"

NO_EFFECT: dict[str, str] = {
    "zero_force_ds_cpu_optimizer": "no optimizer is refused for an offloaded state that can step it",
    "disable_allgather": "it is of an old version",
    "allgather_size": _BY_ITSELF,
    "optimizer.legacy_fusion": "there is one layout of states",
    "bf16.immediate_grad_update": "gradients are always added up as backward produces them",
    "bf16.bf16_optimizer_states": "moments have the dtype of the masters",
    "tensor_parallel.partition_config.lm_head_patterns": "models tell their head themselves",
    "tensor_parallel.partition_config.strict_mode": "a rule that matches no layer is always an error",
    "torch_autocast.lower_precision_safe_modules": "gradients travel in communication_data_type",
    **dict.fromkeys(
        (
            "expert_parallel.shared_experts_pattern",
            "expert_parallel.shared_experts_gate_pattern",
            "expert_parallel.score_func",
            "expert_parallel.score_apply",
            "expert_parallel.route_scale",
            "expert_parallel.expert_w1",
            "expert_parallel.expert_w2",
            "expert_parallel.expert_w3",
            "expert_parallel.num_experts_attr",
            "expert_parallel.top_k_attr",
            "expert_parallel.has_shared_experts",
            "expert_parallel.expert_activation",
        ),
        "the model's own router, activation and shared experts are used as they are",
    ),
    "expert_parallel.combine_impl": "results are weighed and added up in one way",
    "expert_parallel.row_weighting_impl": "results are weighed and added up in one way",
    "expert_parallel.gate_up_impl": "matrices are used as the model has them",
    "expert_parallel.comm_num_sm": "it is DeepEP's",
    "expert_parallel.comm_qp_margin": "it is DeepEP's",
    "expert_parallel.comm_max_tokens_per_rank": "it is DeepEP's",
    "expert_parallel.validate_folding_routing": "ranks that share a tensor have the same tokens and route them alike",
    "expert_parallel.async_split_plan": "counts are exchanged in one message before the tokens",
    "zero_optimization.contiguous_gradients": "gradients always lie in flat buffers",
    "zero_optimization.reduce_scatter": "who receives what follows from the placement of gradients",
    "zero_optimization.use_multi_rank_bucket_allreduce": "every bucket belongs to all ranks",
    "zero_optimization.allgather_partitions": "parameters are always gathered by all-gathers",
    "zero_optimization.allgather_bucket_size": _BY_ITSELF,
    "zero_optimization.compute_grad_norm": "the norm travels with the check for overflow, and costs nothing more",
    "zero_optimization.elastic_checkpoint": "every checkpoint can be loaded with another number of ranks",
    "zero_optimization.offload_param.buffer_count": "transfer buffers follow from the buckets",
    "zero_optimization.offload_param.buffer_size": "transfer buffers follow from the buckets",
    "zero_optimization.offload_optimizer.buffer_count": "three tiles are in memory at a time",
    "zero_optimization.offload_optimizer.pipeline_read": _PIPELINED,
    "zero_optimization.offload_optimizer.pipeline_write": _PIPELINED,
    "zero_optimization.offload_optimizer.fast_init": "files are never written with zeros first",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "CPU optimizers use the threads that torch has",
    "zero_optimization.stage3_module_granularity_threshold": "small modules share a bucket by themselves",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": "parameters are always gathered by all-gathers",
    "zero_optimization.stage3_allgather_sequential": "set stage3_prefetch_bucket_size to 0 for no prefetch",
    "zero_optimization.ignore_unused_parameters": "a parameter without a gradient is not stepped, as in plain PyTorch",
    "zero_optimization.round_robin_gradients": "slices are even",
    "zero_optimization.parameter_alignment": "kernels take any alignment",
    "zero_optimization.mics_hierarchical_params_gather": "the communication library knows the links",
    "zero_optimization.memory_efficient_linear": "linear layers need no replacement",
    "zero_optimization.pipeline_loading_checkpoint": "a rank reads only what it keeps",
    "zero_optimization.override_module_apply": "nothing of torch is replaced",
    "zero_optimization.log_trace_cache_warnings": "there is no trace to leave",
    "zero_optimization.enable_sanity_checks": "checks are always on",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Muon's momentum rests where the other states do",
    "tensor_parallel.keep_module_on_host": "a model is cut where it lies",
    "weight_quantization.num_bits": "quantized_initialization and post_init_quant say it",
    "weight_quantization.q_type": "quantized_initialization and post_init_quant say it",
    "weight_quantization.q_groups": "quantized_initialization and post_init_quant say it",
    "timers.throughput.synchronized": "throughput is taken from the wall clock",
    "checkpoint.parallel_write.pipeline_stage": "every rank writes its own pieces",
    "checkpoint.checkpoint_serialization": "files are safetensors",
    "elasticity.min_time": "nothing waits between two starts",
    "autotuning.model_info.num_params": "the first run counts them",
    "autotuning.model_info.hidden_size": "the first run traces the model",
    "autotuning.model_info.num_layers": "the first run traces the model",
    "pipeline.pipe_partitioned": "activations travel whole",
    "pipeline.grad_partitioned": "gradients travel whole",
    "pipeline.partition": "the module's partition_method says it",
    "pipeline.seed_layers": "the module's seed_layers says it",
}
"""Keys that are accepted and do nothing, whatever their value: why."""

SETTINGS_OF: dict[str, str] = {
    "compile": "compile.deepcompile",
    "sparse_attention": "sparse_attention",
    "zero_optimization.zenflow": "zero_optimization.zenflow",
}
"""Sections whose every key is a setting of a feature of NOT_YET, beside those that an `enabled` of NOT_YET heads."""


def check_available(config: Root) -> None:
    """Raise NotAvailableError, naming every key that asks for a feature this version does not have yet.

    Warns, once each, of keys that have no effect here.
    """
    missing = [
        f"{path} = {show(value)} is not available yet: {feature}."
        for path, is_asked, feature in NOT_YET
        if is_asked(value := value_at(config, path))
        and not (path == "compile.deepcompile" and config.compile.splits_sequences)
    ]
    if missing:
        keys = "these keys" if len(missing) > 1 else "this key"
        raise NotAvailableError("\n".join([*missing, f"  Remove {keys}, or switch the feature off, to train without."]))
    for path in given_without_effect(config):
        warn_once(f"{path} = {show(value_at(config, path))} has no effect: {NO_EFFECT[path]}.")


def given_without_effect(config: Root) -> list[str]:
    """The keys of NO_EFFECT that have another value than their default."""
    return [path for path in NO_EFFECT if _is_changed(config, path)]


def _is_changed(config: Root, path: str) -> bool:
    *sections, key = path.split(".")
    holder: Any = config
    for name in sections:
        holder = getattr(holder, name)
        if holder is None:
            return False
    if not isinstance(holder, Section) or key not in holder.model_fields_set:
        return False
    field = type(holder).model_fields[key]
    value = getattr(holder, key)
    return bool(value != field.get_default(call_default_factory=True)) and not _is_default_section(value)


def _is_default_section(value: Any) -> bool:
    return isinstance(value, Section) and not value.model_fields_set and not value.model_extra


def as_markdown() -> str:
    """The tables, for `docs/configuration.md`."""
    rows: Mapping[str, list[str]] = {
        "Not yet: refused": [f"| `{path}` | {feature} |" for path, _, feature in NOT_YET],
        "Not together: refused": [
            f"| {', '.join(f'`{key}`' for key in keys)} | {rule.format(dtype='of another dtype')} |"
            for keys, _, rule, _ in TOGETHER
        ],
        "No effect here: accepted, one warning": [f"| `{path}` | {reason} |" for path, reason in NO_EFFECT.items()],
    }
    parts = ["# Configuration: what is refused, and what has no effect", _INTRODUCTION]
    parts += ["\n".join([f"## {title}\n", "| key | |", "|---|---|", *lines]) for title, lines in rows.items()]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Printed by `python -m deepspeed.config.tables` from the tables in `deepspeed/config/refused_or_ignored.py`; a test compares.

A key that resembles a valid one is an error that names the valid one. Any other unknown key at the top level, a key in
the wrong section and a key that only older versions knew is one warning. Keys that begin with `_` or `#` are comments."""
