"""ZeRO as one mechanism: a table of placements (`policy`), buckets, and four verbs on them.

Planned, pure
    policy             the table of placements
    layout             which elements belong to which parameter and which rank
    cut                which parameters share a bucket
    plan               the buckets of a model, as a list; which ranks share each
Built from that
    build              plan -> buckets
    space              which parameters lie where in a flat buffer
    bucket             a space whose memory comes and goes
    master             what the optimizer updates
    gather_exchanges   by which exchange parameters are gathered: plain, int8, a copy near by
    aliases            buffers of the model that are views of parameters
    overlaps           parameters that share memory
    quantized_weights  integers sharded as parameters are
Unshard, reshard
    hooks              where modules, graphs, and what autograd saved drive it
    gather             in step with the other ranks
    loads              slices that are read before they are gathered
    param              what a sharded parameter answers
    functions          what custom autograd functions are given
    leaves             modules that are not opened
    modes              out of the caller's modes
Reduce
    reduce             takes gradients from autograd, after the script's own hooks; when a bucket leaves the rank, in which
                       order, how many at once
    reduction          how a bucket is averaged, as a row: over whom, by what, in which dtype
    gradients          a bucket's gradients: what waits, lent flat buffers, slices in memory (stages 2 and 3); others are
    whole_gradients    ... in a buffer of the bucket's own: stages 0 and 1
    tiered_gradients   ... as slices on a tier: stages 2 and 3
    delivery           reduced gradients on their way to a tier
    feedback           errors of quantised reductions, saved
    shown              gradients shown as `param.grad`
    veil               a look at gradients that are slices
Update, publish
    optimizer          norm, decision, update, publication
    norm               one norm over every rank; the overflow
    local_norm         the same where ranks keep their own gradients
    runs               what the wrapped optimizer steps
    update             steps it
    stream             steps what rests on a tier
    on_disk            what is shown of a state there
    graphed            the update as a recorded graph
    late               a step before its norm is known, taken back exactly
    step_hooks         a script's hooks on the optimizer's step
    unused             parameters without gradients on any rank
    blame              gradients that are not finite
    rows               sparse gradients for SparseAdam
    untested           optimizers refused on flat pieces
    whole_parameters   what LAMB and Muon may ask of whole parameters
    own_reduction      what 1-bit optimizers may ask
    run_states         an optimizer's states, by parameter
On tiers
    placing            which bytes rest on which tier
    tiers_from_config  from offload sections to that
    away               states put away between steps
What a script does
    init               models built sharded
    tensor_factories   two names that Transformers replaces meanwhile
    access             whole values for users
    written            what modules write while they run
    read_only          what is changed where nothing says that it shall stay
    facts              what a script may change
    prints             what one rank alone wrote
    takeover           acts on what it did change
    join               parameters that begin to train later
    checkpoint_flats   what lies where, for checkpoints
    hook_switch        hooks off and on, as libraries handle them
    generation         many forwards on parameters gathered once
    tiled              linear layers in tiles

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
