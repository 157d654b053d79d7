"""The public names promised for data-parallel training, with their parameters; a missing one fails.

Each line of a table is `name(parameters)`, `name` for what is no function, in the order in which callers may pass them.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

import deepspeed

NAMES = """
deepspeed.initialize(args, model, optimizer, model_parameters, training_data, lr_scheduler, distributed_port, mpu, \
dist_init_required, collate_fn, config, mesh_param, config_params)
deepspeed.init_distributed(dist_backend, auto_mpi_discovery, distributed_port, verbose, timeout, init_method, \
dist_init_required, config, rank, world_size)
deepspeed.add_config_arguments(parser)
deepspeed.OnDevice(dtype, device, enabled)
deepspeed.DeepSpeedEngine(args, model, optimizer, model_parameters, training_data, lr_scheduler, mpu, dist_init_required, \
collate_fn, config, config_class, mesh_device, dont_change_device)
deepspeed.DeepSpeedConfig
deepspeed.DeepSpeedConfigError
deepspeed.DeepSpeedDataLoader
deepspeed.DeepSpeedOptimizer
deepspeed.ZeroOptimizer
deepspeed.get_accelerator()
deepspeed.accelerator.get_accelerator()
deepspeed.logger
deepspeed.log_dist(message, ranks, level)
deepspeed.dist
deepspeed.ops
deepspeed.runtime
deepspeed.__version__
deepspeed.__version_major__
deepspeed.__version_minor__
deepspeed.__version_patch__
deepspeed.__git_hash__
deepspeed.__git_branch__

deepspeed.zero.Init(module, data_parallel_group, mem_efficient_linear, remote_device, pin_memory, config_dict_or_path, \
config, enabled, dtype, mpu, zero_param_parallel_group, zero_quantized_weights, zero_quantized_nontrainable_weights, \
sequence_data_parallel_group, param_swapper)
deepspeed.zero.GatheredParameters(params, modifier_rank, fwd_module, enabled)
deepspeed.zero.register_external_parameter(module, parameter)
deepspeed.zero.unregister_external_parameter(module, parameter)
deepspeed.zero.TiledLinear(in_features, out_features, bias, in_splits, out_splits, input_is_already_split, \
combine_out_splits, linear_cls, init_linear)
deepspeed.zero.TiledLinear.copy_params_from(self, other)
deepspeed.zero.TiledLinearReturnBias

deepspeed.utils.safe_get_full_fp32_param(param)
deepspeed.utils.safe_get_full_optimizer_state(param, optim_state_key)
deepspeed.utils.safe_get_full_grad(param)
deepspeed.utils.safe_set_full_fp32_param(param, value)
deepspeed.utils.safe_set_full_optimizer_state(param, value, optim_state_key)
deepspeed.utils.safe_set_full_grad(param, value)
deepspeed.utils.safe_get_local_fp32_param(param)
deepspeed.utils.safe_get_local_optimizer_state(param, optim_state_key)
deepspeed.utils.safe_get_local_grad(param)
deepspeed.utils.safe_set_local_fp32_param(param, value)
deepspeed.utils.safe_set_local_optimizer_state(param, value, optim_state_key)
deepspeed.utils.safe_set_local_grad(param, value)
deepspeed.utils.safe_update_full_grad_vectorized(params, fn)
deepspeed.utils.set_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found)
deepspeed.utils.unset_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found)
deepspeed.utils.set_z3_leaf_modules_by_name(model, module_names, flag, raise_if_not_found)
deepspeed.utils.set_z3_leaf_modules_by_suffix(model, module_name_suffixes, flag, raise_if_not_found)
deepspeed.utils.set_z3_leaf_module(module, flag)
deepspeed.utils.get_z3_leaf_modules(model)
deepspeed.utils.z3_leaf_module(module)
deepspeed.utils.RepeatingLoader(loader)
deepspeed.utils.log_dist(message, ranks, level)
deepspeed.utils.logger
deepspeed.utils.logging.logger
deepspeed.utils.set_log_level_from_string(level)
deepspeed.utils.instrument_w_nvtx(func)
deepspeed.utils.OnDevice
deepspeed.utils.recursive_getattr
deepspeed.utils.recursive_setattr
deepspeed.utils.is_initialized()
deepspeed.utils.timer.SynchronizedWallClockTimer
deepspeed.utils.timer.SynchronizedWallClockTimer.log(self, names, normalizer, reset, memory_breakdown, ranks)
deepspeed.utils.timer.ThroughputTimer
deepspeed.utils.timer.NoopTimer
deepspeed.utils.groups.initialize(ep_size, mpu)
deepspeed.utils.groups._get_data_parallel_group()
deepspeed.utils.groups._get_data_parallel_rank()
deepspeed.utils.groups._get_data_parallel_world_size()
deepspeed.utils.groups._get_sequence_parallel_group()
deepspeed.utils.groups._get_sequence_parallel_rank()
deepspeed.utils.groups._get_sequence_parallel_world_size()
deepspeed.utils.groups._get_sequence_data_parallel_group()
deepspeed.utils.groups._get_sequence_data_parallel_rank()
deepspeed.utils.groups._get_sequence_data_parallel_world_size()
deepspeed.utils.groups.get_data_parallel_group()
deepspeed.utils.groups.get_data_parallel_rank()
deepspeed.utils.groups.get_data_parallel_world_size()
deepspeed.utils.groups.get_model_parallel_rank()
deepspeed.utils.groups.get_model_parallel_world_size()
deepspeed.utils.groups.get_tensor_model_parallel_rank()
deepspeed.utils.groups.get_tensor_model_parallel_world_size()

deepspeed.monitor.monitor.MonitorMaster(monitor_config)
deepspeed.monitor.monitor.MonitorMaster.write_events(self, event_list)
deepspeed.monitor.config.get_monitor_config(param_dict)
deepspeed.monitor.csv_monitor.csvMonitor(csv_config)
deepspeed.monitor.tensorboard.TensorBoardMonitor(tensorboard_config)
deepspeed.monitor.wandb.WandbMonitor(wandb_config)
deepspeed.monitor.comet.CometMonitor(comet_config)
deepspeed.profiling.flops_profiler.get_model_profile(model, input_shape, args, kwargs, print_profile, detailed, module_depth, \
top_modules, warm_up, as_string, output_file, ignore_modules, mode)
deepspeed.profiling.flops_profiler.FlopsProfiler(model, ds_engine, recompute_fwd_factor)
deepspeed.profiling.flops_profiler.FlopsProfiler.start_profile(self, ignore_list)
deepspeed.profiling.flops_profiler.FlopsProfiler.stop_profile(self)
deepspeed.profiling.flops_profiler.FlopsProfiler.reset_profile(self)
deepspeed.profiling.flops_profiler.FlopsProfiler.end_profile(self)
deepspeed.profiling.flops_profiler.FlopsProfiler.get_total_flops(self, as_string)
deepspeed.profiling.flops_profiler.FlopsProfiler.get_total_macs(self, as_string)
deepspeed.profiling.flops_profiler.FlopsProfiler.get_total_duration(self, as_string)
deepspeed.profiling.flops_profiler.FlopsProfiler.get_total_params(self, as_string)
deepspeed.profiling.flops_profiler.FlopsProfiler.print_model_profile(self, profile_step, module_depth, top_modules, detailed, \
output_file)
deepspeed.profiling.flops_profiler.FlopsProfiler.print_model_aggregated_profile(self, module_depth, top_modules)
deepspeed.profiling.flops_profiler.profiler.FlopsProfiler

deepspeed.comm.broadcast(tensor, src, group, async_op, prof, log_name, debug)
deepspeed.comm.broadcast_object_list(object_list, src, group, device)
deepspeed.comm.all_gather(tensor_list, tensor, group, async_op, prof, log_name, debug)
deepspeed.comm.all_gather_into_tensor(output_tensor, tensor, group, async_op, prof, log_name, debug)
deepspeed.comm.all_gather_object
deepspeed.comm.all_gather_coalesced(output_tensors, input_tensors, group, async_op)
deepspeed.comm.allgather_fn(output_tensor, input_tensor, group, async_op)
deepspeed.comm.reduce_scatter(output, input_list, op, group, async_op, prof, log_name, debug)
deepspeed.comm.reduce_scatter_tensor(output_tensor, tensor, op, group, async_op, prof, log_name, debug)
deepspeed.comm.reduce_scatter_fn
deepspeed.comm.all_reduce(tensor, op, group, async_op, prof, log_name, debug)
deepspeed.comm.inference_all_reduce
deepspeed.comm.all_reduce_coalesced(tensors, op, group, async_op)
deepspeed.comm.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)
deepspeed.comm.all_to_all(output_tensor_list, input_tensor_list, group, async_op)
deepspeed.comm.send(tensor, dst, group, tag)
deepspeed.comm.recv(tensor, src, group, tag)
deepspeed.comm.isend(tensor, dst, group, tag)
deepspeed.comm.irecv(tensor, src, group, tag)
deepspeed.comm.batch_isend_irecv
deepspeed.comm.gather(tensor, gather_list, dst, group, async_op)
deepspeed.comm.scatter(tensor, scatter_list, src, group, async_op)
deepspeed.comm.reduce(tensor, dst, op, group, async_op)
deepspeed.comm.barrier(group, async_op, device_ids)
deepspeed.comm.monitored_barrier(group, timeout, wait_all_ranks)
deepspeed.comm.new_group(ranks)
deepspeed.comm.destroy_process_group(group)
deepspeed.comm.get_rank(group)
deepspeed.comm.get_world_size(group)
deepspeed.comm.get_local_rank()
deepspeed.comm.get_global_rank(group, group_rank)
deepspeed.comm.get_world_group()
deepspeed.comm.get_all_ranks_from_group(group)
deepspeed.comm.is_initialized()
deepspeed.comm.is_available()
deepspeed.comm.initialize_mesh_device(mesh_shape)
deepspeed.comm.has_all_gather_into_tensor()
deepspeed.comm.has_reduce_scatter_tensor()
deepspeed.comm.has_coalescing_manager()
deepspeed.comm.ReduceOp
deepspeed.comm.P2POp
deepspeed.comm.ProcessGroup
deepspeed.comm.init_distributed(dist_backend, auto_mpi_discovery, distributed_port, verbose, timeout, init_method, \
dist_init_required, config, rank, world_size)
deepspeed.comm.mpi_discovery(distributed_port, verbose)
deepspeed.comm.configure(deepspeed_config, enabled, prof_all, prof_ops, verbose, debug)
deepspeed.comm.log_summary(show_straggler, return_dict)
deepspeed.comm.reset_log()
deepspeed.comm.has_comm_data()
deepspeed.comm.get_comm_operation_count()
deepspeed.comm.get_logged_comm_ops()

deepspeed.runtime.engine.DeepSpeedEngine
deepspeed.runtime.config.DeepSpeedConfig
deepspeed.runtime.config.DeepSpeedConfigError
deepspeed.runtime.base_optimizer.DeepSpeedOptimizer
deepspeed.runtime.dataloader.DeepSpeedDataLoader
deepspeed.runtime.dataloader.RepeatingLoader
deepspeed.runtime.lr_schedules.LRRangeTest(optimizer, lr_range_test_min_lr, lr_range_test_step_size, \
lr_range_test_step_rate, lr_range_test_staircase, last_batch_iteration)
deepspeed.runtime.lr_schedules.OneCycle(optimizer, cycle_min_lr, cycle_max_lr, decay_lr_rate, cycle_first_step_size, \
cycle_second_step_size, cycle_first_stair_count, cycle_second_stair_count, decay_step_size, cycle_momentum, \
cycle_min_mom, cycle_max_mom, decay_mom_rate, last_batch_iteration)
deepspeed.runtime.lr_schedules.OneCycle.get_mom(self)
deepspeed.runtime.lr_schedules.WarmupLR(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, \
last_batch_iteration)
deepspeed.runtime.lr_schedules.WarmupDecayLR(optimizer, total_num_steps, warmup_min_lr, warmup_max_lr, warmup_num_steps, \
warmup_type, last_batch_iteration)
deepspeed.runtime.lr_schedules.WarmupCosineLR(optimizer, total_num_steps, warmup_min_ratio, warmup_num_steps, \
cos_min_ratio, warmup_type, last_batch_iteration)
deepspeed.runtime.lr_schedules.WarmupLR.step(self, batch_iteration)
deepspeed.runtime.lr_schedules.WarmupLR.get_lr(self)
deepspeed.runtime.lr_schedules.WarmupLR.get_last_lr(self)
deepspeed.runtime.lr_schedules.WarmupLR.state_dict(self)
deepspeed.runtime.lr_schedules.WarmupLR.load_state_dict(self)
deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
deepspeed.runtime.lr_schedules.add_tuning_arguments(parser)
deepspeed.runtime.lr_schedules.get_config_from_args(args)
deepspeed.runtime.lr_schedules.get_lr_from_config(config)
deepspeed.runtime.zero.partition_parameters.Init
deepspeed.runtime.zero.partition_parameters.GatheredParameters
deepspeed.runtime.zero.partition_parameters.register_external_parameter
deepspeed.runtime.zero.partition_parameters.unregister_external_parameter
deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE
deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.INFLIGHT
deepspeed.runtime.zero.partition_parameters.zero_wrapper_for_fp_tensor_constructor
deepspeed.runtime.zero.partition_parameters._orig_torch_arange
deepspeed.runtime.zero.partition_parameters.get_accelerator()
deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, \
cpu_offload, additional_buffer_factor)
deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node, num_nodes, \
additional_buffer_factor)
deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(total_params, num_gpus_per_node, \
num_nodes, additional_buffer_factor)
deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs(total_params, largest_layer_params, \
num_gpus_per_node, num_nodes, cpu_offload, cpu_offload_params, zero_init, additional_buffer_factor)
deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node, num_nodes, \
additional_buffer_factor)
deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_cold(total_params, largest_layer_params, \
num_gpus_per_node, num_nodes, additional_buffer_factor)
deepspeed.runtime.activation_checkpointing.checkpointing.configure(mpu_, deepspeed_config, partition_activations, \
contiguous_checkpointing, num_checkpoints, checkpoint_in_cpu, synchronize, profile)
deepspeed.runtime.activation_checkpointing.checkpointing.is_configured()
deepspeed.runtime.activation_checkpointing.checkpointing.checkpoint(function, args, kwargs)
deepspeed.runtime.activation_checkpointing.checkpointing.non_reentrant_checkpoint(function, args)
deepspeed.runtime.activation_checkpointing.checkpointing.reset()
deepspeed.runtime.activation_checkpointing.checkpointing.get_cuda_rng_tracker()
deepspeed.runtime.activation_checkpointing.checkpointing.model_parallel_cuda_manual_seed(seed)
deepspeed.runtime.activation_checkpointing.checkpointing.model_parallel_reconfigure_tp_seed(seed)
deepspeed.runtime.activation_checkpointing.checkpointing.partition_activations_in_checkpoint(partition_activation)
deepspeed.runtime.activation_checkpointing.checkpointing.set_num_layers(nlayers)
deepspeed.runtime.activation_checkpointing.checkpointing.CheckpointFunction
deepspeed.runtime.activation_checkpointing.checkpointing.CudaRNGStatesTracker.add(self, name, seed)
deepspeed.runtime.activation_checkpointing.checkpointing.CudaRNGStatesTracker.fork(self, name)
deepspeed.runtime.activation_checkpointing.checkpointing.CudaRNGStatesTracker.get_states(self)
deepspeed.runtime.activation_checkpointing.checkpointing.CudaRNGStatesTracker.set_states(self, states)
deepspeed.runtime.activation_checkpointing.checkpointing.CudaRNGStatesTracker.reset(self)
deepspeed.checkpointing.checkpoint(function, args, kwargs)
deepspeed.runtime.zero.tiling.TiledLinear
deepspeed.runtime.zero.muon.original_muon.Muon(params, lr, weight_decay, momentum, ns_method)
deepspeed.runtime.zero.muon.original_muon.MuonWithAuxAdam(param_groups)
deepspeed.runtime.utils.see_memory_usage(message, force)
deepspeed.ops.adam.FusedAdam(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay, amsgrad, set_grad_none)
deepspeed.ops.adam.DeepSpeedCPUAdam(model_params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adamw_mode, \
fp32_optimizer_states)
deepspeed.ops.lamb.FusedLamb(params, lr, bias_correction, betas, eps, eps_inside_sqrt, weight_decay, max_grad_norm, \
max_coeff, min_coeff, amsgrad)
deepspeed.ops.lion.FusedLion(params, lr, betas, weight_decay, set_grad_none)
deepspeed.ops.lion.DeepSpeedCPULion(model_params, lr, betas, weight_decay, fp32_optimizer_states)
deepspeed.ops.adagrad.DeepSpeedCPUAdagrad(model_params, lr, eps, weight_decay, amsgrad, fp32_optimizer_states)
deepspeed.ops.aio.AsyncIOBuilder.NAME
deepspeed.ops.op_builder.AsyncIOBuilder.load(self, verbose)
deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible(self, verbose)
deepspeed.ops.op_builder.GDSBuilder.load(self, verbose)
"""

ENGINE = """
forward(self, inputs, kwargs)
backward(self, loss, retain_graph, scale_wrt_gas)
scale(self, loss)
step(self, lr_kwargs)
zero_grad(self)
train(self, mode)
eval(self)
is_gradient_accumulation_boundary(self)
set_gradient_accumulation_boundary(self, is_boundary)
no_sync(self)
coalesce_grad_reduction(self)
allreduce_gradients(self, bucket_size)
was_step_applied(self)
get_global_grad_norm(self)
get_lr(self)
get_mom(self)
compile(self, backend, compile_kwargs, schedule, compiled_autograd_enabled)
is_compiled
destroy(self)
empty_partition_cache(self)
train_batch_size(self)
train_micro_batch_size_per_gpu(self)
gradient_accumulation_steps(self)
get_batch_info(self)
set_train_batch_size(self, train_batch_size)
set_train_micro_batch_size(self, micro_batch_size)
deepspeed_io(self, dataset, batch_size, route, pin_memory, data_sampler, collate_fn, num_local_io_workers)
save_checkpoint(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)
load_checkpoint(self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, \
load_module_only, custom_load_fn)
wait_for_checkpoint(self)
load_module_state_dict(self, checkpoint, strict, custom_load_fn, fetch_z3_params)
save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)
save_fp16_model(self, save_dir, save_filename, exclude_frozen_parameters)
module_state_dict(self, destination, prefix, keep_vars, exclude_frozen_parameters)
_zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters)
zero_gather_16bit_weights_on_model_save(self)
zero_optimization(self)
zero_optimization_stage(self)
zero_optimization_partition_gradients(self)
zero_optimization_partition_weights(self)
fp16_enabled(self)
bfloat16_enabled(self)
loss_scale(self)
dynamic_loss_scale(self)
gradient_clipping(self)
optimizer_name(self)
scheduler_name(self)
steps_per_print(self)
get_data_types(self)
aio_config(self)
random_ltd_enabled(self)
curriculum_learning_enabled(self)
flops_profiler_enabled(self)
autotuning_enabled(self)
communication_data_type
pld_enabled(self)
amp_enabled(self)
sparse_gradients_enabled(self)
curriculum_enabled_legacy(self)
elasticity_enabled(self)
eigenvalue_enabled(self)
config
device
local_rank
global_rank
world_size
dp_world_size
mp_world_size
micro_steps
"""

OPTIMIZER = """
step(self, closure)
zero_grad(self, set_to_none)
backward(self, loss, retain_graph)
state_dict(self)
load_state_dict(self)
param_groups
state
defaults
loss_scale
cur_scale
dynamic_loss_scale
single_partition_of_fp32_groups
fp32_partitioned_groups_flat
"""


CLASSES = {"OneCycle", "WarmupLR", "ZeroParamStatus", "AsyncIOBuilder", "GDSBuilder", "CudaRNGStatesTracker"}
"""Whose members are listed by legacy paths."""


def lines_of(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.strip()]


def resolve(path: str) -> Any:
    """What a dotted path means after `import deepspeed`, by attributes alone."""
    value: Any = deepspeed
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def assert_has(path: str) -> None:
    name, _, promised = path.partition("(")
    value = resolve(name)
    if promised:
        wanted = [] if promised == ")" else promised.rstrip(")").split(", ")
        actual = list(inspect.signature(value).parameters)
        assert [parameter for parameter in actual if parameter in wanted] == wanted, f"has ({', '.join(actual)})"


@pytest.mark.parametrize("line", lines_of(NAMES))
def test_a_promised_name_is_there_with_its_parameters(line: str) -> None:
    assert_has(line)


@pytest.mark.parametrize("line", lines_of(ENGINE))
def test_the_engine_has_what_is_promised(line: str) -> None:
    assert_has(f"deepspeed.DeepSpeedEngine.{line}")


@pytest.mark.parametrize("line", lines_of(OPTIMIZER))
def test_the_optimizer_has_what_is_promised(line: str) -> None:
    assert_has(f"deepspeed.ZeroOptimizer.{line}")


@pytest.mark.parametrize(
    "path", sorted({line.split("(")[0] for line in lines_of(NAMES) if ".runtime." in line or ".ops." in line})
)
def test_legacy_paths_import_as_modules_too(path: str) -> None:
    *owners, name = path.split(".")
    while owners[-1] in CLASSES:
        name = owners.pop()
    assert hasattr(importlib.import_module(".".join(owners)), name)


def test_both_spellings_of_a_name_are_one_object() -> None:
    assert deepspeed.runtime.engine.DeepSpeedEngine is deepspeed.DeepSpeedEngine
    assert deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3 is deepspeed.ZeroOptimizer
    assert deepspeed.dist is deepspeed.comm and deepspeed.utils.logger is deepspeed.utils.logging.logger
    assert issubclass(deepspeed.ZeroOptimizer, deepspeed.DeepSpeedOptimizer) and issubclass(
        deepspeed.DeepSpeedOptimizer, torch.optim.Optimizer
    )
    assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES == [
        "LRRangeTest",
        "OneCycle",
        "WarmupLR",
        "WarmupDecayLR",
        "WarmupCosineLR",
    ]


def test_the_launcher_s_name_of_the_environment_file_imports() -> None:
    assert importlib.import_module("deepspeed.launcher.runner").DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"


def test_what_does_not_exist_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'deepspeed' has no attribute 'initialise'"):
        deepspeed.initialise  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("deepspeed.runtime.nothing")
