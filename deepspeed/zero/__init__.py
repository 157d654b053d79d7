"""ZeRO as one mechanism: a table of placements (`policy`), buckets, and four verbs on them.

    policy     the table                           layout     interval arithmetic (pure)
    cut        which parameters share a bucket     plan       the buckets of a model (pure)
    build      plan -> buckets                     master     what the optimizer updates
    space      which parameters lie where          loads      how a bucket is filled
    bucket     a space whose memory comes and goes param      what a sharded parameter answers
    gather     unshard / reshard, in step          hooks      where modules and graphs drive it
    reduce     gradients on their way: when        gradients  how: whole, sliced or on a tier
    arrivals   what autograd has given             delivery   where reduced gradients rest
    pool       borrowed flat buffers               optimizer  norm, update, publish
    norm       one norm over every rank            shown      gradients shown as `param.grad`
    gather_exchanges   by which exchange: plain, int8, a copy near by
    feedback   errors of quantised reductions, saved
    local_norm one where ranks keep their own      own_reduction   what 1-bit optimizers may ask
    whole_parameters   what LAMB and Muon may ask          access     whole values for users
    init       models built sharded                leaves     modules that are not opened
    tiled      linear layers in tiles              modes      out of the caller's modes
    facts      what a script may change            takeover   acts on what it did change
    join       parameters that begin to train later           saved    weights that autograd saved
    runs       what the wrapped optimizer steps    update     steps it
    blame      gradients that are not finite       rounds     in which order buckets leave (pure)
    placing    which bytes rest on which tier      tiers_from_config   from offload sections to that
    stream     the step of what rests on a tier    checkpoint_flats   what lies where, for checkpoints
    away       states put away between steps       hook_switch   hooks off and on, as libraries handle them
    generation many forwards on parameters gathered once
    veil       a look at gradients that are slices            tensor_factories   names that Transformers replaces
    last_hook  takes gradients after the script's own hooks    in_flight reductions under way
    prints     what one rank alone wrote           aliases    buffers that are views of parameters
    quantized_weights   integers sharded as parameters are  unused     parameters without gradients on any rank
    late       a step before its norm is known, taken back exactly
    overlaps   parameters that share memory        untested   optimizers refused on flat pieces
    graphed    the update as a recorded graph
    run_states an optimizer's states, by parameter rows       sparse gradients for SparseAdam

What users reach as `deepspeed.zero.<name>` is in the table below.
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.zero.init": "Init MiCS_Init",
            "deepspeed.zero.access": "GatheredParameters register_external_parameter unregister_external_parameter",
            "deepspeed.zero.generation": "unwrap_model_for_generation",
            "deepspeed.zero.tiled": "TiledLinear TiledLinearReturnBias",
            "deepspeed.zero.param": "ZeroParamStatus",
        }
    ),
)
