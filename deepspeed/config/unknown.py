"""Keys that no field names: comments, typos, and keys that mean nothing here.

`take_known` is called by `explain.read_section` before pydantic sees the dict. Public configurations hold keys of other
programs, of older versions and of the wrong section, which the original passes over without a word; refusing them all
would refuse files that train elsewhere, and silence would hide mistakes. So, for a key that no field names:

    begins with _ or #                             a comment
    listed in MEANS, or a key of another section   left out; one warning says where its meaning lives
    resembles a key of its section                 stays, and becomes an error that names that key
    anything else at the top, or in a section that the original reads key by key
                                                   left out; one warning
    anything else                                  stays, and becomes an error

Invariant: what is left out is named once, by its full path. The caller's dict is not changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_origin

from deepspeed.config.base import Section
from deepspeed.config.schema import all_paths, field_of, inner_section, names_of
from deepspeed.utils.logging import warn_once

NEAR = 0.8
"""From this similarity on (difflib's ratio) a key is taken for a typo of another."""

_MOST_PLACES = 3
"""A key that stands in more sections than this (enabled, type) belongs to none of them in particular."""

_NO_SCALE = "bf16 has fp32's range and needs no loss scale"
_APEX = "it is a setting of Apex: section amp"
_ACCELERATE = "it belongs in Accelerate's own file, not in DeepSpeed's"
_TRAINER = "it is an argument of the training script"
_LAUNCHER = "the launcher's command line says it"

MEANS: dict[str, str] = {
    **{f"bf16.{key}": _NO_SCALE for key in ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis")},
    **{f"bf16.{key}": _NO_SCALE for key in ("min_loss_scale", "consecutive_hysteresis")},
    "bf16.auto_cast": "inputs are cast by torch_autocast, or by the script",
    "bf16.opt_level": _APEX,
    "fp16.opt_level": _APEX,
    "fp16.fp16": "fp16.enabled switches fp16 on",
    "fp16.type": "fp16.enabled switches fp16 on, bf16.enabled bf16",
    "fp16.fp16_scale_tolerance": "the dynamic loss scale has hysteresis",
    "fp16_opt_level": _APEX,
    "compile.enabled": "the script calls engine.compile(); compile.deepcompile chooses DeepCompile",
    "compile.disable": "the script calls engine.compile(), or does not",
    "compile.backend": "the script gives it to engine.compile(backend=...)",
    "compile.kwargs": "the script gives them to engine.compile(compile_kwargs=...)",
    "max_grad_norm": "use gradient_clipping",
    "clip_grad": "use gradient_clipping",
    "grad_clip": "use gradient_clipping",
    "lr": "use optimizer.params.lr",
    "learning_rate": "use optimizer.params.lr",
    "betas": "use optimizer.params.betas",
    "eps": "use optimizer.params.eps",
    "weight_decay": "use optimizer.params.weight_decay",
    "warmup_num_steps": "use scheduler.params.warmup_num_steps",
    "cpu_offload": "use zero_optimization.offload_optimizer.device",
    "stage3_gather_fp16_weights_on_model_save": "use zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_stage": "use zero_optimization.stage",
    "offload_optimizer_device": "use zero_optimization.offload_optimizer.device",
    "offload_param_device": "use zero_optimization.offload_param.device",
    "offload_optimizer_nvme_path": "use zero_optimization.offload_optimizer.nvme_path",
    "offload_param_nvme_path": "use zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "use zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero3_init_flag": _ACCELERATE,
    "deepspeed_config_file": _ACCELERATE,
    "deepspeed_multinode_launcher": _ACCELERATE,
    "deepspeed_moe_layer_cls_names": _ACCELERATE,
    "mixed_precision": "use fp16.enabled or bf16.enabled",
    "gradient_accumulation_dtype": "use data_types.grad_accum_dtype",
    "fp32_allreduce": 'use communication_data_type, "fp32"',
    "allreduce_always_fp32": 'use communication_data_type, "fp32"',
    "checkpoint_activations": "the model calls deepspeed.checkpointing; activation_checkpointing.recompute does it here",
    "gradient_checkpointing": "the model calls deepspeed.checkpointing; activation_checkpointing.recompute does it here",
    "activation_checkpoint": "use activation_checkpointing",
    "monitor_config": "tensorboard, wandb, csv_monitor and comet stand at the top level",
    "comms_config": "use comms_logger",
    "elastic_checkpoint": "every checkpoint can be loaded with another number of ranks",
    "eigenvalue_enabled": "use eigenvalue.enabled",
    "batch_size": "use train_batch_size or train_micro_batch_size_per_gpu",
    "micro_batch_size": "use train_micro_batch_size_per_gpu",
    "per_device_train_batch_size": "use train_micro_batch_size_per_gpu",
    "inference_batch_size": _TRAINER,
    "num_train_epochs": _TRAINER,
    "seed": _TRAINER,
    "steps_per_logger": "use steps_per_print",
    "distributed_backend": "the script gives it to deepspeed.init_distributed",
    "world_size": _LAUNCHER,
    "cuda_visible_devices": f"{_LAUNCHER} (--include)",
    "memory_efficient_linear": "linear layers need no replacement here",
    "checkpoint.tag_validation_enabled": "use checkpoint.tag_validation",
    "flops_profiler.step": "use flops_profiler.profile_step",
    "mem_chunk": "chunks of memory are PatrickStar's; zero_optimization.offload_param and offload_optimizer say where bytes rest",
    "eigenvalue.model_name": "eigenvalue.layer_name says where the layers are in the model, whatever its name",
    "quantize_training.quantize_eigenvalue": "use quantize_training.eigenvalue.enabled",
}
"""Keys of older versions, of other programs and of common mistakes, by full path: where their meaning lives."""


def take_known(section: type[Section], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without comments and keys that have no effect, each of which is named in a warning, once."""
    return _sift(section, section, _without_comments(data), "")


def _without_comments(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_comments(inner) for key, inner in value.items() if not str(key).startswith(("_", "#"))}
    if isinstance(value, (list, tuple)):
        return [_without_comments(inner) for inner in value]
    return value


def _sift(root: type[Section], section: type[Section], data: Mapping[str, Any], place: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in section.adapt(dict(data)).items():
        path = f"{place}{key}"
        field = field_of(section, key)
        if field is not None:
            kept[key] = _sift_below(root, field.annotation, value, path)
        elif key in section.old_keys or section.model_config.get("extra") == "allow":
            kept[key] = value
        elif reason := _why_without_effect(root, section, place, key):
            warn_once(f"{path} has no effect: {reason}.")
        else:
            kept[key] = value
    return kept


def _sift_below(root: type[Section], annotation: Any, value: Any, path: str) -> Any:
    """The same for the sections in the value of a field: one, a list of them, or a table of the user's names."""
    section = inner_section(annotation)
    if section is None:
        return value
    if isinstance(value, list):
        return [_sift_below(root, annotation, item, f"{path}[{place}]") for place, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if get_origin(annotation) is dict:
        return {name: _sift_below(root, section, item, f"{path}.{name}") for name, item in value.items()}
    return _sift(root, section, value, f"{path}.")


def _why_without_effect(root: type[Section], section: type[Section], place: str, key: str) -> str | None:
    """Why a key that no field names is left out; None where it is an error."""
    path = f"{place}{key}"
    if reason := MEANS.get(path.replace("bfloat16.", "bf16.", 1)):
        return reason
    known = [*(name for names in names_of(section).values() for name in names), *section.old_keys]
    if difflib.get_close_matches(key, known, n=1, cutoff=NEAR):
        return None
    paths = all_paths(root, aliases=True)
    homes = [other for other in paths if other.rpartition(".")[2] == key]
    if 0 < len(homes) <= _MOST_PLACES:
        return f"it belongs in {' or '.join(homes)}"
    if not _is_lenient(root, path):
        return None
    if place in ("optimizer.", "scheduler."):
        return f"it is not a key of {place[:-1]}; settings stand in {place}params"
    homes_of = {} if place else {other.rpartition(".")[2]: other for other in reversed(paths)}
    near = difflib.get_close_matches(key, homes_of, n=1, cutoff=NEAR)
    return f"it is not a configuration key{f' (nearest: {homes_of[near[0]]})' if near else ''}"


def _is_lenient(root: type[Section], path: str) -> bool:
    return root.strict_sections is not None and path.partition(".")[0] not in root.strict_sections
