"""Activation checkpointing: keep the inputs of a piece of the model, and compute the rest again in backward.

    settings     what `configure` said, and the model-parallel ranks
    saved        where a checkpoint's inputs rest: whole, sharded over those ranks, on the CPU, in one buffer
    call         the checkpoint, reentrant and not, on `torch.utils.checkpoint`
    rng          named random states, so that dropout repeats itself per model-parallel rank
    hidden       the inputs of a whole model's checkpoints in main memory, by a context around its forward
    blocks       the engine's part: which blocks of a model recompute, and how much of them

What users reach as `deepspeed.checkpointing.<name>` is in the table below.
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.activation.settings": "configure is_configured reset set_num_layers partition_activations_in_checkpoint",
            "deepspeed.activation.call": "checkpoint non_reentrant_checkpoint CheckpointFunction",
            "deepspeed.porch.tools": "detach_variable",
            "deepspeed.activation.rng": "_CUDA_RNG_STATE_TRACKER _MODEL_PARALLEL_RNG_TRACKER_NAME _set_cuda_rng_state CudaRNGStatesTracker get_cuda_rng_tracker model_parallel_cuda_manual_seed "
            "model_parallel_reconfigure_tp_seed",
            "deepspeed.activation.blocks": "checkpoint_blocks find_blocks Recompute",
        }
    )
    | {  # as forks for other devices spell two of them
        "get_cpus_rng_tracker": "deepspeed.activation.rng:get_cuda_rng_tracker",
        "model_parallel_cpus_manual_seed": "deepspeed.activation.rng:model_parallel_cuda_manual_seed",
    },
)
