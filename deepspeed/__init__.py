"""An independent, from-scratch DeepSpeed: train and run large models on PyTorch.

This file is the face: every public name, and where it lives. All of them are imported at first use, so that importing
the package costs little more than importing torch, prints nothing and touches no device.
"""

import os as _os

_os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from deepspeed import legacy as _legacy
from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__version__ = version = "1.0.0"
__version_major__, __version_minor__, __version_patch__ = (int(part) for part in __version__.split("."))
__git_hash__ = __git_branch__ = None

_legacy.install()

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.engine.initialize": "initialize add_config_arguments tp_model_init",
            "deepspeed.parallel.tensor.requested": "set_autotp_mode",
            "deepspeed.engine.engine": "DeepSpeedEngine",
            "deepspeed.engine.data": "DeepSpeedDataLoader",
            "deepspeed.comm": "init_distributed",
            "deepspeed.config.legacy_config": "DeepSpeedConfig",
            "deepspeed.utils.errors": "DeepSpeedConfigError",
            "deepspeed.utils.logging": "logger log_dist",
            "deepspeed.utils.on_device": "OnDevice",
            "deepspeed.accelerator": "get_accelerator",
            "deepspeed.zero.optimizer": "DeepSpeedOptimizer ZeroOptimizer",
        }
    )
    | {
        name: f"deepspeed.{name}:"
        for name in "accelerator comm config elasticity env_report inference launcher memory monitor profiling utils zero".split()
    }
    | {"dist": "deepspeed.comm:", "checkpointing": "deepspeed.activation:"}
    | _invert(
        {
            "deepspeed.pipe": "PipelineModule",
            "deepspeed.runtime.pipe.engine": "PipelineEngine",
            "deepspeed.inference.engine": "InferenceEngine",
            "deepspeed.inference.config": "DeepSpeedInferenceConfig",
            "deepspeed.runtime.hybrid_engine": "DeepSpeedHybridEngine",
            "deepspeed.ops.transformer": "DeepSpeedTransformerLayer DeepSpeedTransformerConfig",
            "deepspeed.module_inject": "replace_transformer_layer revert_transformer_layer",
        }
    )
    | _invert({"deepspeed.inference.initialize": "init_inference default_inference_config"})
    | {"origin": "deepspeed:__file__", "submodule_search_locations": "deepspeed:__path__"}
    | {"add_argument": "~gone: Call deepspeed.add_config_arguments(parser)."}
    | _legacy.names(),
)
