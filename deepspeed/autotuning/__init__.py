"""The fastest configuration of a user's script: predicted first, then tried where the prediction is uncertain.

    autotuner   a search from its question to its result: `deepspeed --autotuning tune|run`
    space       what may change, and every candidate                                         (pure)
    prior       the cost model's seconds for them       surrogate  the same, corrected by trials (pure)
    tuners      which is tried next: grid, random, model-based                               (pure)
    resources   `ResourceManager`: runs experiments     experiment one trial's processes, to their end
    lessons     what a trial's end teaches              script     the user's command line   (pure)
    stopped     signals that ask to end, also where they were dropped
    files       what is written             found what is known so far, for summary, page, progress: what people read

What happens inside of a trial is the engine's: `engine.probe` (the first run), `engine.trial` (all others).
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.autotuning.autotuner": "Autotuner",
            "deepspeed.autotuning.resources": "ResourceManager",
            "deepspeed.autotuning.tuners": "GridTuner RandomTuner ModelBasedTuner",
        }
    ),
)
