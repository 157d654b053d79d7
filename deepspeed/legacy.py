"""The porch: import paths that scripts and libraries use, and where the things live here.

`import deepspeed` installs one finder for the paths in the table; nothing else of the package knows them. Each path is
a module whose names are imported at first use. Adding a promised path is adding a line.

What comes with a later version is in the table too, as "~feature": a placeholder that can be imported, subclassed and
compared with, and says the feature when it is called (`porch/placeholder.py`). Building a feature ends with naming its
module in its lines here. Constants stand in `porch/constants.py`, by path.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from deepspeed.utils.lazy import invert, lazy_exports

_SCHEDULES = (
    "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR VALID_LR_SCHEDULES add_tuning_arguments "
    "get_config_from_args get_lr_from_config"
)
_ESTIMATORS = " ".join(f"estimate_zero{{0}}_model_states_mem_needs{kind}" for kind in ("", "_all_live", "_all_cold"))

_CONSTANTS = "="
"""The key of a row whose path has constants."""


def _later(feature: str, names: str) -> dict[str, str]:
    """Placeholders for the names of a feature; "internal" is what has no counterpart here."""
    return dict.fromkeys(names.split(), f"~{feature}")


def _gone(cure: str, name: str) -> dict[str, str]:
    """A placeholder for a name that the original has lost too, and what to do instead."""
    return {name: f"~gone: {cure}"}


_TOOLS = "deepspeed.porch.tools"
_NORMS = "deepspeed.porch.norms"
_MOE, _EXPERTS = "deepspeed.moe.layer", "deepspeed.parallel.expert"
_PIPE_MODULE = {
    "deepspeed.parallel.pipeline.module": "PipelineModule DualPipeVModule",
    "deepspeed.parallel.pipeline.layers": "LayerSpec TiedLayerSpec PipelineError",
}
_DIFFUSION = "kernels of diffusion models"
_INJECTION = {
    "deepspeed.inference.injection": "replace_transformer_layer revert_transformer_layer",
    "deepspeed.inference.group_wise": "GroupQuantizer",
}
_INFERENCE, _AUTOTP = "inference", "automatic tensor parallelism"
_DATA, _LTD = "data efficiency", "random layer-token drop"
_COMPRESSION, _SPARSE = "compression", "sparse attention"
_SP, _TENSOR = "deepspeed.parallel.sequence", "deepspeed.parallel.tensor"
_POLICIES = invert(
    {
        "deepspeed.inference.policies": "HFBertLayerPolicy HFDistilBertLayerPolicy HFGPT2LayerPolicy HFGPTJLayerPolicy "
        "HFGPTNEOLayerPolicy GPTNEOXLayerPolicy BLOOMLayerPolicy HFOPTLayerPolicy HFCLIPLayerPolicy LLAMALayerPolicy "
        "LLAMA2LayerPolicy InternLMLayerPolicy MegatronLayerPolicy UNetPolicy VAEPolicy"
    }
)

PATHS: dict[str, dict[str, str]] = {
    "deepspeed.constants": {_CONSTANTS: ""},
    "deepspeed.autotuning.utils": invert({"deepspeed.config.dotted": "get_val_by_key set_val_by_key"}),
    "deepspeed.git_version_info": {
        **invert(
            {
                "deepspeed.porch.version": "installed_ops compatible_ops torch_info accelerator_name git_hash git_branch",
            }
        ),
        "version": "deepspeed:__version__",
    },
    "deepspeed.runtime": {
        "DeepSpeedOptimizer": "deepspeed.zero.optimizer",
        "ZeROOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
    },
    "deepspeed.runtime.engine": {
        _CONSTANTS: "",
        **invert({"deepspeed.engine.engine": "DeepSpeedEngine", _TOOLS: "autocast_if_enabled", _MOE: "MoE"}),
        "DeepSpeedOptimizerCallable": "collections.abc:Callable",
        "DeepSpeedSchedulerCallable": "collections.abc:Callable",
        **_later("internal", "EngineTimers"),
    },
    "deepspeed.runtime.config": {
        _CONSTANTS: "",
        **invert(
            {
                "deepspeed.config.legacy_config": "DeepSpeedConfig",
                "deepspeed.utils.errors": "DeepSpeedConfigError",
                "deepspeed.porch.enums": "DtypeEnum",
            }
        ),
    },
    "deepspeed.runtime.config_utils": {
        "DeepSpeedConfigModel": "deepspeed.config.base:Section",
        "dict_raise_error_on_duplicate_keys": _TOOLS,
    },
    "deepspeed.runtime.constants": {_CONSTANTS: ""},
    "deepspeed.runtime.compiler": invert({_TOOLS: "is_compiling disable"}),
    "deepspeed.runtime.sparse_tensor": invert({"deepspeed.comm.sparse_tensor": "SparseTensor"}),
    "deepspeed.runtime.comm": {},
    "deepspeed.runtime.comm.coalesced_collectives": invert(
        {
            "deepspeed.comm.coalesced": "reduce_scatter_coalesced all_to_all_quant_reduce all_to_all_loco_quant_reduce",
        }
    ),
    "deepspeed.runtime.comm.compressed": invert({"deepspeed.comm.backend": "CompressedBackend"}),
    "deepspeed.runtime.comm.nccl": {"NcclBackend": "deepspeed.comm.backend:CompressedBackend"},
    "deepspeed.runtime.comm.mpi": {"MpiBackend": "deepspeed.comm.backend:CompressedBackend"},
    "deepspeed.runtime.comm.hccl": {"HcclBackend": "deepspeed.comm.backend:CompressedBackend"},
    "deepspeed.runtime.csr_tensor": {"CSRTensor": "deepspeed.runtime.sparse_tensor:SparseTensor"},
    "deepspeed.runtime.eigenvalue": _later("layer curvature", "Eigenvalue"),
    "deepspeed.runtime.quantize": _later("quantization while training", "Quantizer"),
    "deepspeed.runtime.progressive_layer_drop": _later("progressive layer dropping", "ProgressiveLayerDrop"),
    "deepspeed.runtime.hybrid_engine": _later("the hybrid engine", "DeepSpeedHybridEngine"),
    "deepspeed.runtime.bf16_optimizer": _later("internal", "BF16_Optimizer"),
    "deepspeed.runtime.state_dict_factory": _later("checkpoints for inference", "MegatronSDLoader SDLoaderFactory"),
    "deepspeed.runtime.checkpoint_engine": invert(
        {
            "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine": "TorchCheckpointEngine CheckpointEngine",
        }
    ),
    "deepspeed.runtime.checkpoint_engine.checkpoint_engine": _later("internal", "CheckpointEngine"),
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine": {
        "CheckpointEngine": "deepspeed.runtime.checkpoint_engine.checkpoint_engine",
        **_later("internal", "TorchCheckpointEngine"),
    },
    "deepspeed.runtime.checkpoint_engine.nebula_checkpoint_engine": _later("internal", "NebulaCheckpointEngine"),
    "deepspeed.runtime.fp16": {},
    "deepspeed.runtime.fp16.fused_optimizer": _later("internal", "FP16_Optimizer"),
    "deepspeed.runtime.fp16.unfused_optimizer": _later("internal", "FP16_UnfusedOptimizer"),
    "deepspeed.runtime.fp16.loss_scaler": {
        "LossScaler": "deepspeed.precision.scaler:StaticLossScale",
        "LossScalerBase": "deepspeed.precision.scaler:StaticLossScale",
        "DynamicLossScaler": "deepspeed.precision.scaler:DynamicLossScale",
        **_later("internal", "CreateLossScaler"),
    },
    "deepspeed.runtime.fp16.onebit": {
        **invert(
            {
                "deepspeed.optim.onebit_adam": "OnebitAdam",
                "deepspeed.optim.onebit_lamb": "OnebitLamb",
                "deepspeed.optim.zero_one_adam": "ZeroOneAdam",
            }
        ),
    },
    "deepspeed.runtime.fp16.onebit.adam": invert({"deepspeed.runtime.fp16.onebit": "OnebitAdam"}),
    "deepspeed.runtime.fp16.onebit.lamb": invert({"deepspeed.runtime.fp16.onebit": "OnebitLamb"}),
    "deepspeed.runtime.fp16.onebit.zoadam": invert({"deepspeed.runtime.fp16.onebit": "ZeroOneAdam"}),
    "deepspeed.runtime.fp16.onebit_adam": invert({"deepspeed.runtime.fp16.onebit": "OnebitAdam"}),
    "deepspeed.runtime.domino": {},
    "deepspeed.runtime.domino.transformer": _later("Domino", "DominoTransformer DominoTransformerLayer"),
    "deepspeed.runtime.swap_tensor": {},
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper": {
        "PartitionedParamStatus": "deepspeed.porch.enums",
        **_later("internal", "AsyncPartitionedParameterSwapper"),
    },
    "deepspeed.runtime.sequence_parallel": {},
    "deepspeed.runtime.sequence_parallel.ulysses_sp": {
        **invert(
            {
                f"{_SP}.hf": "UlyssesSPAttentionHF",
                f"{_SP}.loader": "UlyssesSPDataLoaderAdapter",
                f"{_SP}.tiled": "TiledMLP AutogradComputeMLP SequenceTiledCompute sequence_tiled_compute",
                f"{_SP}.logits_loss": "TiledFusedLogitsLoss",
            }
        ),
    },
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": {"*": f"{_SP}.parallel_state:"},
    "deepspeed.sequence": invert(
        {
            f"{_SP}.tile_hf": "tile_model",
            f"{_SP}.vision": "auto_wrap_model_for_sp detect_model_sp_info SPModelInfo UlyssesSPViTAttention "
            "ModalityFusionSPAdapter LlavaFusionAdapter InternVLFusionAdapter Qwen2VLFusionAdapter",
        }
    ),
    "deepspeed.sequence.layer": invert(
        {f"{_SP}.attention": "DistributedAttention single_all_to_all _SeqAllToAll apply_rotary_pos_emb"}
    ),
    "deepspeed.sequence.cross_entropy": invert(
        {f"{_SP}.cross_entropy": "vocab_parallel_cross_entropy vocab_sequence_parallel_cross_entropy"}
    ),
    "deepspeed.sequence.linear_cross_entropy": invert({f"{_SP}.vocabulary": "vocab_parallel_linear_cross_entropy"}),
    "deepspeed.sequence.vocab_parallel_ops": invert(
        {f"{_SP}.vocabulary": "vocab_parallel_logprobs vocab_parallel_entropy vocab_parallel_kl_div"}
    ),
    "deepspeed.sequence.auto_sp": invert({f"{_SP}.vision": "auto_wrap_model_for_sp"}),
    "deepspeed.sequence.autosp_detector": invert({f"{_SP}.vision": "detect_model_sp_info SPModelInfo"}),
    "deepspeed.sequence.autosp_vit": invert({f"{_SP}.vision": "UlyssesSPViTAttention"}),
    "deepspeed.sequence.autosp_fusion": invert(
        {f"{_SP}.vision": "ModalityFusionSPAdapter LlavaFusionAdapter InternVLFusionAdapter Qwen2VLFusionAdapter"}
    ),
    "deepspeed.sequence.fpdt_layer": invert(
        {f"{_SP}.fpdt": "FPDT_Attention FPDT_FFN FPDT_InputConstruct FPDT_LogitsLoss SequenceChunk"}
    ),
    "deepspeed.pipe": invert(_PIPE_MODULE),
    "deepspeed.runtime.pipe": invert(
        {
            **_PIPE_MODULE,
            "deepspeed.parallel.pipeline.topology": "ProcessTopology",
        }
    ),
    "deepspeed.runtime.pipe.module": invert(_PIPE_MODULE),
    "deepspeed.runtime.pipe.engine": {
        _CONSTANTS: "",
        "DeepSpeedEngine": "deepspeed.engine.engine",
        **invert({"deepspeed.engine.pipeline": "PipelineEngine DualPipeVEngine _tensor_bytes"}),
        **invert({_TOOLS: "_is_even _is_odd"}),
    },
    "deepspeed.runtime.pipe.p2p": _later(
        "internal", "recv send init_process_groups can_send_recv wait send_obj recv_obj"
    ),
    "deepspeed.runtime.pipe.schedule": {
        **invert(
            {
                "deepspeed.parallel.pipeline.instructions": "PipeInstruction BufferOpInstruction OptimizerStep ReduceGrads "
                "ReduceTiedGrads LoadMicroBatch ForwardPass BackwardPass SendActivation RecvActivation SendGrad RecvGrad "
                "CommitP2P",
                "deepspeed.parallel.pipeline.slots": "PipeSchedule TrainSchedule InferenceSchedule DataParallelSchedule "
                "DualPipeVSchedule",
            }
        ),
        **invert({_TOOLS: "_is_even _is_odd"}),
    },
    "deepspeed.runtime.pipe.topology": invert(
        {
            "deepspeed.porch.ranks": "get_data_parallel_rank get_data_parallel_world_size get_pipe_parallel_rank "
            "get_pipe_parallel_world_size get_slice_parallel_rank",
            "deepspeed.parallel.pipeline.topology": "ProcessTopology PipeDataParallelTopology "
            "PipeModelDataParallelTopology _prime_factors",
            "deepspeed.parallel.pipeline.grid": "PipelineParallelGrid",
        }
    ),
    "deepspeed.moe": {},
    "deepspeed.moe.layer": {
        **invert({f"{_EXPERTS}.layer": "MoE"}),
        **_gone("Use MoE of the same module; use_tutel=True is accepted there.", "MoE_tutel"),
    },
    "deepspeed.moe.sharded_moe": invert(
        {
            f"{_EXPERTS}.layer": "MOELayer",
            f"{_EXPERTS}.gate": "TopKGate top1gating top2gating topkgating",
        }
    ),
    "deepspeed.moe.experts": invert({f"{_EXPERTS}.experts": "Experts"}),
    "deepspeed.moe.utils": {
        **invert(
            {
                f"{_EXPERTS}.groups": "is_moe_param has_moe_layers is_moe_param_group configure_moe_param_groups "
                "split_params_into_shared_and_expert_params split_params_grads_into_shared_and_expert_params "
                "split_params_into_different_moe_groups_for_optimizer"
            }
        ),
    },
    "deepspeed.runtime.data_pipeline": {},
    "deepspeed.runtime.data_pipeline.constants": {_CONSTANTS: ""},
    "deepspeed.runtime.data_pipeline.curriculum_scheduler": _later("curriculum learning", "CurriculumScheduler"),
    "deepspeed.runtime.data_pipeline.data_routing": {},
    "deepspeed.runtime.data_pipeline.data_routing.basic_layer": _later(_LTD, "RandomLayerTokenDrop"),
    "deepspeed.runtime.data_pipeline.data_routing.scheduler": _later(_LTD, "RandomLTDScheduler"),
    "deepspeed.runtime.data_pipeline.data_routing.helper": _later(
        _LTD, "convert_to_random_ltd remove_random_ltd_state_dict save_without_random_ltd"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling": {},
    "deepspeed.runtime.data_pipeline.data_sampling.data_analyzer": _later(
        _DATA, "DataAnalyzer DistributedDataAnalyzer"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.data_sampler": _later(_DATA, "DeepSpeedDataSampler"),
    "deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset": _later(
        _DATA, "MMapIndexedDataset MMapIndexedDatasetBuilder"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": _later(
        _DATA,
        "get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed batch_by_seqlens "
        "lr_scheduler_for_variable_batch_size dataloader_for_variable_batch_size",
    ),
    "deepspeed.compression": invert(
        {
            "deepspeed.compression.compress": "init_compression redundancy_clean",
            "deepspeed.compression.scheduler": "compression_scheduler",
        }
    ),
    "deepspeed.compression.scheduler": _later(_COMPRESSION, "compression_scheduler"),
    "deepspeed.compression.compress": _later(
        _COMPRESSION, "init_compression redundancy_clean student_initialization get_compress_methods"
    ),
    "deepspeed.compression.constants": {_CONSTANTS: ""},
    "deepspeed.compression.helper": {
        **invert({"deepspeed.utils.nested": "recursive_getattr recursive_setattr"}),
        **_later(_COMPRESSION, "convert_conv1d_to_linear rewrite_optimizer_step module_replacement"),
    },
    "deepspeed.inference.quantization": {},
    "deepspeed.inference.quantization.quantization": {
        "_init_group_wise_weight_quantization": "deepspeed.zero.quantized_weights:init_group_wise_weight_quantization"
    },
    "deepspeed.inference.quantization.utils": invert({"deepspeed.inference.group_wise": "Quantizer DeQuantizer"}),
    "deepspeed.inference.v2": {},
    "deepspeed.inference.v2.config_v2": {
        **invert(
            {"deepspeed.inference": "RaggedInferenceEngineConfig", "deepspeed.inference.config": "DeepSpeedTPConfig"}
        ),
        **_later("inference with continuous batching", "QuantizationConfig"),
    },
    "deepspeed.model_implementations": {
        "DeepSpeedInferenceConfig": "deepspeed.inference.config",
        **_later("internal", "DeepSpeedTransformerInference"),
    },
    "deepspeed.inference.v2.checkpoint": _later(_INFERENCE, "CheckpointEngineBase HuggingFaceCheckpointEngine"),
    "deepspeed.inference.v2.engine_factory": {
        **invert({"deepspeed.inference.v2.checkpoint": "HuggingFaceCheckpointEngine"}),
        **invert({"deepspeed.inference": "build_hf_engine build_engine_from_ds_checkpoint"}),
    },
    "deepspeed.inference.v2.ragged": _later(_INFERENCE, "DSStateManagerConfig DSStateManager"),
    "deepspeed.module_inject": {
        **_POLICIES,
        **invert(
            {
                f"{_TENSOR}.by_hand": "LinearAllreduce LinearLayer",
                f"{_TENSOR}.tables": "EmbeddingLayer Normalize",
                f"{_TENSOR}.requested": "set_autotp_mode",
            }
        ),
        **invert(_INJECTION),
        **invert({"deepspeed.inference.policies": "DSPolicy", "deepspeed.inference.injection": "AutoTP"}),
        **_later(_AUTOTP, "ReplaceWithTensorSlicing"),
        **_later(_DIFFUSION, "generic_injection"),
    },
    "deepspeed.module_inject.replace_module": {
        **invert(_INJECTION),
        **_later(_AUTOTP, "ReplaceWithTensorSlicing"),
        **_later(_DIFFUSION, "generic_injection"),
    },
    "deepspeed.module_inject.layers": invert(
        {
            f"{_TENSOR}.by_hand": "LinearAllreduce LinearLayer LinearAllreduceWithReplicatedInput LmHeadLinearAllreduce "
            "SubParamLinearLayer SubParamLinearAllreduce fused_LinearLayer GateUpPack_LinearLayer conv_LinearLayer "
            "Conv_LinearALlreduce VocabParallelLinear",
            f"{_TENSOR}.tables": "VocabParallelEmbedding HiddenParallelEmbedding EmbeddingLayer OPTEmbedding Normalize",
            f"{_TENSOR}.whole": "GatherReplacedLayerParams",
            f"{_TENSOR}.requested": "set_autotp_mode is_autotp_training_mode",
            "deepspeed.porch.tools": "is_model_parallel_parameter",
        }
    ),
    "deepspeed.module_inject.autotp_config": invert(
        {f"{_TENSOR}.specs": "TPLayerSpec PartitionType AutoTPConfig AutoTPPresets merge_autotp_configs"}
    ),
    "deepspeed.module_inject.auto_tp": {
        **invert({f"{_TENSOR}.head": "VocabParallelCausalLMLoss"}),
        **invert({"deepspeed.inference.injection": "AutoTP"}),
        **_later(_AUTOTP, "ReplaceWithTensorSlicing Loading"),
    },
    "deepspeed.module_inject.policy": {
        **invert({"deepspeed.inference.policies": "DSPolicy TransformerPolicy"}),
        **_later(_INFERENCE, "transpose"),
    },
    "deepspeed.module_inject.replace_policy": {
        **_POLICIES,
        **invert({"deepspeed.inference.policies": "replace_policies generic_policies"}),
    },
    "deepspeed.module_inject.tp_shard": invert({f"{_TENSOR}.by_hand": "get_shard_size get_shard_size_list"}),
    "deepspeed.utils.init_on_device": invert({"deepspeed.utils.on_device": "OnDevice"}),
    "deepspeed.utils.tp_shard": invert({f"{_TENSOR}.by_hand": "get_shard_size get_shard_size_list"}),
    "deepspeed.compile": {},
    "deepspeed.compile.passes": {},
    "deepspeed.compile.passes.offload_adam_states": _later(
        "DeepCompile", "move_opt_states move_opt_states_sync offload_adam_states_for_init"
    ),
    "deepspeed.compile.passes.prefetch": _later("DeepCompile", "schedule_prefetch"),
    "deepspeed.compile.passes.selective_gather": _later("DeepCompile", "selective_gather"),
    "deepspeed.compile.passes.sp_compile": invert({f"{_SP}.marked": "prepare_autosp_inputs AutoSPInputs"}),
    "deepspeed.compile.passes.zero3_compile": _later("DeepCompile", "add_z3_gather_release"),
    "deepspeed.io": _later("internal", "FastFileWriter FastFileWriterConfig MockFileWriter PyFileWriter"),
    "deepspeed.tools": {},
    "deepspeed.tools.tensor_logger": _later("internal", "TensorLogger save_logged_tensors"),
    "deepspeed.accelerator.abstract_accelerator": {"DeepSpeedAccelerator": "deepspeed.accelerator.base"},
    "deepspeed.accelerator.cpu_accelerator": {"CPU_Accelerator": "deepspeed.accelerator.cpu:CpuAccelerator"},
    "deepspeed.accelerator.cuda_accelerator": {"CUDA_Accelerator": "deepspeed.accelerator.device:DeviceAccelerator"},
    "deepspeed.accelerator.real_accelerator": invert({"deepspeed.accelerator": "get_accelerator set_accelerator"}),
    "deepspeed.comm.comm": {"*": "deepspeed.comm:"},
    "deepspeed.comm.torch": _later("internal", "TorchBackend"),
    "deepspeed.checkpoint.constants": {_CONSTANTS: ""},
    "deepspeed.checkpoint.deepspeed_checkpoint": {
        _CONSTANTS: "",
        **_later("internal", "DeepSpeedCheckpoint"),
    },
    "deepspeed.checkpoint.reshape_utils": invert({_TOOLS: "get_files get_files_with_prefix"}),
    "deepspeed.checkpoint.universal_checkpoint": {
        "enable_universal_checkpoint": _TOOLS,
        **_later("internal", "SubparamShape load_hp_checkpoint_state"),
    },
    "deepspeed.runtime.base_optimizer": invert({"deepspeed.zero.optimizer": "DeepSpeedOptimizer"}),
    "deepspeed.runtime.lr_schedules": invert({"deepspeed.optim.schedules": _SCHEDULES}),
    "deepspeed.runtime.dataloader": invert({"deepspeed.engine.data": "DeepSpeedDataLoader RepeatingLoader"}),
    "deepspeed.runtime.utils": {
        **invert(
            {
                "deepspeed.accelerator.memory": "see_memory_usage",
                "deepspeed.utils.nested": "move_to_device",
                "deepspeed.porch.partitioned": "PartitionedTensor",
                _TOOLS: "set_random_seed noop_context graph_process inf get_ma_status empty_cache align_dense_tensors "
                "is_model_parallel_parameter bwc_tensor_model_parallel_rank",
                _NORMS: "clip_grad_norm_ clip_tensors_by_global_norm get_global_norm get_global_norm_of_tensors",
            }
        ),
        "get_grad_norm": f"{_NORMS}:get_global_norm_of_tensors",
        "partition_uniform": "deepspeed.parallel.pipeline.partition:uniform",
        "partition_balanced": "deepspeed.parallel.pipeline.partition:balanced",
        **_later("internal", "CheckOverflow DummyOptim all_gather_dp_groups"),
    },
    "deepspeed.checkpointing": {"*": "deepspeed.activation:"},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.offload_activations": {
        "get_checkpoint_hidden_states_offloading_ctx_manager": "deepspeed.activation.hidden"
    },
    "deepspeed.runtime.activation_checkpointing.checkpointing": {"*": "deepspeed.activation:"},
    "deepspeed.runtime.zero": invert(
        {"deepspeed.runtime.zero.partition_parameters": "Init GatheredParameters ZeroParamStatus"}
    ),
    "deepspeed.runtime.zero.config": {
        _CONSTANTS: "",
        "ZeroStageEnum": "deepspeed.porch.enums",
        "DeepSpeedZeroConfig": "deepspeed.config.zero:ZeroConfig",
    },
    "deepspeed.runtime.zero.constants": {_CONSTANTS: ""},
    "deepspeed.runtime.zero.mics": {"MiCS_Init": "deepspeed.zero.init:Init", **_later("internal", "MiCS_Optimizer")},
    "deepspeed.runtime.zero.mics_utils": _later("internal", "MiCS_CommGroups create_mics_comm_groups scale_tensors"),
    "deepspeed.runtime.zero.utils": {
        **invert({_TOOLS: "is_zero_supported_optimizer is_zero_param apply_to_tensors_only"}),
        "ZeRORuntimeException": "deepspeed.utils.errors:DeepSpeedError",
        **_later("internal", "_initialize_parameter_parallel_groups"),
    },
    "deepspeed.runtime.zero.partitioned_param_coordinator": {
        "iter_params": _TOOLS,
        **_later("internal", "InflightParamRegistry PartitionedParameterCoordinator"),
    },
    "deepspeed.runtime.zero.partitioned_param_profiler": _later("internal", "PartitionedParameterProfiler"),
    "deepspeed.runtime.zero.stage1": {"FP16_DeepSpeedZeroOptimizer_Stage1": "deepspeed.zero.optimizer:ZeroOptimizer"},
    "deepspeed.runtime.zero.stage2": {"FP16_DeepSpeedZeroOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer"},
    "deepspeed.runtime.zero.partition_parameters": {
        **invert(
            {
                "deepspeed.zero.init": "Init",
                "deepspeed.zero.access": "GatheredParameters register_external_parameter unregister_external_parameter",
                "deepspeed.zero.param": "ZeroParamStatus",
                "deepspeed.accelerator": "get_accelerator",
                "deepspeed.zero.tensor_factories": "zero_wrapper_for_fp_tensor_constructor _orig_torch_arange",
                _TOOLS: "shutdown_init_context is_zero_param",
            }
        ),
        **_later("internal", "AllGatherCoalescedHandle _init_external_params"),
    },
    "deepspeed.runtime.zero.offload_config": invert({"deepspeed.zero.away": "OffloadDeviceEnum OffloadStateTypeEnum"}),
    "deepspeed.runtime.zero.stage_1_and_2": {
        "DeepSpeedZeroOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
        **invert({"deepspeed.memory.model_states": _ESTIMATORS.format(2)}),
    },
    "deepspeed.runtime.zero.stage3": {
        "DeepSpeedZeroOptimizer_Stage3": "deepspeed.zero.optimizer:ZeroOptimizer",
        **invert({"deepspeed.memory.model_states": _ESTIMATORS.format(3)}),
    },
    "deepspeed.runtime.zero.parameter_offload": {
        "DeepSpeedZeRoOffload": "deepspeed.zero.hook_switch:ParameterOffload",
        "is_zero_param": _TOOLS,
    },
    "deepspeed.runtime.zero.tiling": invert({"deepspeed.zero.tiled": "TiledLinear TiledLinearReturnBias"}),
    "deepspeed.runtime.zero.muon": {},
    "deepspeed.runtime.zero.muon.original_muon": invert({"deepspeed.optim.muon": "Muon MuonWithAuxAdam"}),
    "deepspeed.checkpoint.utils": invert({"deepspeed.utils.nested": "clone_tensors_for_torch_save"}),
    "deepspeed.ops": {"__compatible_ops__": "deepspeed.utils.compatible_ops:COMPATIBLE"},
    "deepspeed.ops.adam": invert({"deepspeed.optim": "FusedAdam DeepSpeedCPUAdam"}),
    "deepspeed.ops.adam.multi_tensor_apply": _later("internal", "MultiTensorApply"),
    "deepspeed.ops.adam.fused_adam": invert({"deepspeed.optim": "FusedAdam"}),
    "deepspeed.ops.adam.cpu_adam": invert({"deepspeed.optim": "DeepSpeedCPUAdam"}),
    "deepspeed.ops.lamb.fused_lamb": invert({"deepspeed.optim": "FusedLamb"}),
    "deepspeed.ops.lamb": invert({"deepspeed.optim": "FusedLamb"}),
    "deepspeed.ops.lion": invert({"deepspeed.optim": "FusedLion DeepSpeedCPULion"}),
    "deepspeed.ops.adagrad": invert({"deepspeed.optim": "DeepSpeedCPUAdagrad"}),
    "deepspeed.ops.aio": invert({"deepspeed.op_builders": "AsyncIOBuilder GDSBuilder"}),
    "deepspeed.ops.op_builder": {"*": "deepspeed.op_builders:"},
    "deepspeed.ops.op_builder.builder": {
        "OpBuilder": "deepspeed.op_builders",
        **invert({"deepspeed.porch.version": "TORCH_MAJOR TORCH_MINOR"}),
    },
    "deepspeed.ops.op_builder.sparse_attn": {"SparseAttnBuilder": "deepspeed.op_builders"},
    "deepspeed.ops.sparse_attention": {
        **invert(
            {
                "deepspeed.ops.sparse_attention.sparsity_config": "SparsityConfig DenseSparsityConfig FixedSparsityConfig "
                "VariableSparsityConfig BigBirdSparsityConfig BSLongformerSparsityConfig LocalSlidingWindowSparsityConfig",
            }
        ),
        **_later(_SPARSE, "SparseSelfAttention BertSparseSelfAttention SparseAttentionUtils sparse_attn_op"),
    },
    "deepspeed.ops.sparse_attention.sparsity_config": _later(
        _SPARSE,
        "SparsityConfig DenseSparsityConfig FixedSparsityConfig VariableSparsityConfig BigBirdSparsityConfig "
        "BSLongformerSparsityConfig LocalSlidingWindowSparsityConfig",
    ),
    "deepspeed.ops.deepspeed4science": _later("attention with pair biases", "DS4Sci_EvoformerAttention"),
    "deepspeed.ops.fp_quantizer": _later("quantization to fp8 and below", "FP_Quantize"),
    "deepspeed.ops.transformer": _later(
        _INFERENCE, "DeepSpeedTransformerLayer DeepSpeedTransformerConfig DeepSpeedTransformerInference"
    ),
    "deepspeed.ops.transformer.inference": _later(
        _INFERENCE,
        "DeepSpeedInferenceConfig DeepSpeedTransformerInference DeepSpeedMoEInference DeepSpeedMoEInferenceConfig",
    ),
    "deepspeed.ops.op_builder.all_ops": invert({"deepspeed.op_builders": "ALL_OPS"}),
    "deepspeed.profiling.flops_profiler": invert({"deepspeed.profiling.profiler": "FlopsProfiler get_model_profile"}),
    "deepspeed.profiling.flops_profiler.profiler": {"*": "deepspeed.profiling.profiler:"},
    "deepspeed.monitor.monitor": invert(
        {"deepspeed.monitor.master": "MonitorMaster", "deepspeed.monitor.backend": "Monitor"}
    ),
    "deepspeed.monitor.config": {
        **invert({"deepspeed.monitor.master": "get_monitor_config"}),
        "DeepSpeedMonitorConfig": "deepspeed.config:Config",
    },
    "deepspeed.utils.zero_to_fp32": {"*": "deepspeed.checkpoint.zero_to_fp32:"},
    "deepspeed.utils.groups": {"*": "deepspeed.mesh.groups:"},
    "deepspeed.utils.tensor_fragment": {
        **invert(
            {
                "deepspeed.porch.enums": "fragment_address",
                "deepspeed.utils": " ".join(
                    f"safe_{verb}_full_{what}"
                    for verb in ("get", "set")
                    for what in ("fp32_param", "optimizer_state", "grad")
                ),
            }
        ),
        **_later("internal", "tensor_fragment"),
    },
    "deepspeed.utils.debug": invert(
        {_TOOLS: "debug_extract_module_and_param_names debug_module2name_id debug_param2name_id"}
    ),
}


class _Porch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the paths of the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in PATHS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=not PATHS[fullname] or _has_children(fullname))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        whole = PATHS[spec.name].get("*")
        return importlib.import_module(whole.rstrip(":")) if whole else None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        if module.__name__ not in PATHS:
            return
        names: dict[str, str] = dict(PATHS[module.__name__])
        if names.pop(_CONSTANTS, None) is not None:
            module.__dict__.update(importlib.import_module("deepspeed.porch.constants").VALUES[module.__name__])
        shown = [name for name in (*module.__dict__, *names) if not name.startswith("_")]
        prefix = module.__name__ + "."
        names |= {path.removeprefix(prefix): path + ":" for path in PATHS if path.startswith(prefix)}
        get, listing = lazy_exports(module.__name__, names)
        module.__dict__.update(__getattr__=get, __dir__=listing, __all__=shown)


def _has_children(path: str) -> bool:
    return any(other.startswith(path + ".") for other in PATHS)


def install() -> None:
    """Make the table's paths importable; once."""
    if not any(isinstance(finder, _Porch) for finder in sys.meta_path):
        sys.meta_path.append(_Porch())


def names() -> dict[str, Any]:
    """The table's top-level packages under `deepspeed`, for its lazy attributes."""
    return {path.split(".")[1]: ".".join(path.split(".")[:2]) + ":" for path in PATHS if path.count(".") == 1}
