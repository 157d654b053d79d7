"""Checkpoints: tensors and JSON, published whole, loaded anywhere. See docs/checkpoint-format.md.

What is saved
    subject         a model under ZeRO, as named flats, and what this rank writes of it
    names           of files, and of what ranks hold
    owners          who writes what several model-parallel ranks hold
    boxes           any layout from any other: pieces of whole tensors (pure)
    values          Python values as JSON
    rng             random states
Saving
    save            the whole of it; background: while training goes on
    writer          one file; staging: through bounded memory; digest: of its blocks
    aside           where a save is written until it is whole, and how it takes the target's place
    ranks           all ranks succeed or all raise
    files           that survive a crash
    container       the safetensors layout
    manifest        every file and tensor, with digests
Loading
    find            from a folder and a tag to an open checkpoint
    source          what one must answer, whoever wrote it; store: ours
    load            into this run's own flats
    reader          blocks, checked; mapped: files in memory
    original        what the original wrote; original_stages, original_tensor, original_experts, original_autoep: with parallelism
As plain weights
    export          from a live engine
    zero_to_fp32    from a checkpoint
    hf_layout       as Hugging Face lays them out
    ds_to_universal, compat     names that scripts of the original call
    __main__        the command: inspect, verify, diff
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.checkpoint.constants": "BASE_OPTIMIZER_STATE BUFFER_NAMES CAT_DIM DS_VERSION FP32_FLAT_GROUPS "
            "FROZEN_PARAM_FRAGMENTS FROZEN_PARAM_SHAPES OPTIMIZER_STATE_DICT ORIGINAL_VOCAB_SIZE PADDED_VOCAB_SIZE PARAM "
            "PARAMETER_TO_AVERAGE_PATTERNS PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0 PARAMETER_WITH_ROW_PARALLELISM_PATTERNS "
            "PARAMETER_WITH_SUB_PARAMS PARAM_GROUPS PARAM_N_SUB_PARAMS PARAM_SHAPES PARAM_SLICE_MAPPINGS PARTITION_COUNT "
            "PIPELINE_REPLICATED_PARAMETER_PATTERNS SINGLE_PARTITION_OF_FP32_GROUPS SUB_PARAM_SHAPE "
            "TP_REPLICATED_PARAMETER_PATTERNS UNIVERSAL_CHECKPOINT_INFO UNIVERSAL_CHECKPOINT_VERSION_KEY "
            "UNIVERSAL_CHECKPOINT_VERSION_VALUE VOCABULARY_PARAMETER_PATTERNS VOCAB_TENSOR ZERO_STAGE",
            "deepspeed.checkpoint.deepspeed_checkpoint": "DeepSpeedCheckpoint",
            "deepspeed.checkpoint.universal_checkpoint": "SubparamShape enable_universal_checkpoint",
            "deepspeed.porch.tools": "get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank "
            "get_zero_ckpt_name_for_rank",
        }
    ),
)
