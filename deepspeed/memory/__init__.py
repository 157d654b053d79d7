"""How much memory a run will need, and why: predicted without allocating, measured, explained.

    trace     a training step of a model on fake tensors: what happens to memory, and where the engine acts
    sizes     the buckets of the plan (`zero.plan`), without memory
    replay    an engine played to the trace, on a ledger
    ledger    bytes by kind and tier, and their peak        messages  what a rank sends in a step
    estimator one configuration          options  all of them, and the smallest change that fits
    scaling   any size of the micro-batch, from two traces
    shape     a model as a stack of like blocks, from two small traces        clocked  its own seconds here, from short copies
    parts     a micro-batch's part, where ranks share sequences        layers  a rank's parts of layers, where ranks share those
    experts   a rank's layers with experts, where ranks share those        inside  what layers send that ranks share
    fit       whether parts of layers fit together, before they are cut
    quantized_notes what weight_quantization makes of the weights it names
    budget    the least recomputation that fits        measure  the peak of something that is run
    cli, html `deepspeed estimate`       model_states  the original's formulas

What users reach as `deepspeed.memory.<name>` is in the table below.
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

_STATES = " ".join(
    f"estimate_zero{stage}_model_states_mem_needs{kind}" for stage in (2, 3) for kind in ("", "_all_live", "_all_cold")
)

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.memory.estimator": "estimate Estimate Estimator",
            "deepspeed.memory.scaling": "BatchEstimator",
            "deepspeed.memory.options": "survey Survey Limits",
            "deepspeed.memory.trace": "TraceError trace_step",
            "deepspeed.memory.measure": "Measured measure_peak",
            "deepspeed.memory.budget": "choose_plan ladder",
            "deepspeed.memory.html": "write_page",
            "deepspeed.memory.model_states": _STATES,
        }
    ),
)
