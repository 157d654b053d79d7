"""The flops profiler: what every module of a model computes, and how long it takes.

counter.py    counts operations as they run, by phase
tree.py       the profile: modules with their numbers       (pure)
watch.py      hooks that fill it
profiler.py   FlopsProfiler, get_model_profile
text.py       the profile as text                           (pure)
flame.py      the profile as a flame chart in HTML          (pure)
rates.py      what the machine can do: products, copies, wire, disk
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert({"deepspeed.profiling.profiler": "FlopsProfiler get_model_profile"})
    | {"flops_profiler": "deepspeed.profiling.flops_profiler:"},
)
