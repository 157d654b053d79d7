"""The lowest layer: errors, logging, dtypes, timers, and the face `deepspeed.utils` that scripts import from.

    errors, logging        what is raised, what is written
    arguments              numbers on the command line
    dtypes, figures        names of dtypes; counts, bytes and seconds for people
    launch_env, ports      what the program that started this process said; TCP ports
    lazy, compiler         names imported at first use; torch's compiler unloaded until it is needed
    waits, timer, nvtx     where a step waits; timers; spans
    schedule               what changes as a run goes on
    nested, values         attributes by dotted path; whether a tensor has values
    allocator              what is done with memory that was freed
    save_pretrained        Hugging Face's, refused where a folder would hold a part
    saved_hooks            the saved-tensor hooks that are on top
    on_device              `deepspeed.OnDevice`
    whole_files            files that are there whole or not at all
    compatible_ops         native operations that a script may count on

Imports nothing of the package but itself.
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports
from deepspeed.utils.logging import log_dist, logger, set_log_level_from_string

_SAFE = " ".join(
    f"safe_{verb}_{size}_{what}"
    for verb in ("get", "set")
    for size in ("full", "local")
    for what in ("fp32_param", "optimizer_state", "grad")
)

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.zero.access": f"{_SAFE} safe_update_full_grad_vectorized",
            "deepspeed.zero.leaves": "set_z3_leaf_module set_z3_leaf_modules set_z3_leaf_modules_by_name "
            "set_z3_leaf_modules_by_suffix unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module",
            "deepspeed.engine.data": "RepeatingLoader",
            "deepspeed.utils.on_device": "OnDevice",
            "deepspeed.utils.timer": "SynchronizedWallClockTimer ThroughputTimer NoopTimer",
            "deepspeed.utils.nested": "recursive_getattr recursive_setattr",
            "deepspeed.utils.nvtx": "instrument_w_nvtx",
            "deepspeed.comm": "is_initialized init_distributed",
            "deepspeed.porch.enums": "fragment_address",
        }
    )
    | {
        "link_hp_params": "~internal",
        "groups": "deepspeed.mesh.groups:",
        "zero_to_fp32": "deepspeed.checkpoint.zero_to_fp32:",
    },
)

__all__ = ["log_dist", "logger", "set_log_level_from_string"]
