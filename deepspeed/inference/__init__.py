"""Running models: `deepspeed.init_inference`.

config.py       what `init_inference` is told, typed and strict
initialize.py   the doors: init_inference, default_inference_config
engine.py       InferenceEngine: forward, generate, timing, compiling
prepare.py      a module cast, and placed on its device
quantize_layers.py   what int8 and the section `quant` mean for a model
policy.py       a user's injection_policy, checked against the model
policies.py     the original's layer policies by name
injection.py    the original's calls beneath init_inference: replace_transformer_layer, AutoTP
group_wise.py   Quantizer, DeQuantizer, GroupQuantizer, for tensors that scripts quantize themselves
agreed.py       what ranks agree on before, and that one's error is everybody's
tensor.py       over which ranks a model is cut, and that they stay together
calls.py        a rank that fails inside of a call tells the others
served.py       the same over sharded weights, which nobody can leave
experts.py      ranks that share experts answer together
quantized_experts.py   experts' matrices in 8 or 4 bits, expert by expert
parts.py        quantized layers of which a rank has a part
found.py        from what `checkpoint` says to open weights
room.py         memory that is read into, and given back
weights.py      stored tensors, and reading a part of one
joined.py       files of ranks: a rank's own part, or all together
packed.py       what GPTQ, AWQ and bitsandbytes store, made whole
names.py        which stored tensors make which parameter
load.py         weights into a module, parameter by parameter
undo.py         a module as it was, to be put back where something fails
streamed.py     weights that rest elsewhere between their uses
save.py         save_mp_checkpoint_path
fused.py        one compiled call per token, beneath the model's own forward
watched.py      modules that it passes by, as long as they are what they were
cache.py        keys and values that grow in place
int8_cache.py   keys and values in int8
times.py        how long forwards take, inside of generate too
estimate.py     `deepspeed estimate --inference`: weights, cache and working memory of a rank
limits.py       what is refused before a prompt costs any work
"""

from deepspeed.utils.lazy import lazy_exports

_LATER = "InferenceEngineV2 RaggedInferenceEngineConfig build_hf_engine build_engine_from_ds_checkpoint"

__getattr__, __dir__ = lazy_exports(
    __name__,
    dict.fromkeys(_LATER.split(), "~inference with continuous batching")
    | {"DeepSpeedTPConfig": "deepspeed.inference.config"}
    | {name: f"deepspeed.inference.{name}:" for name in ("config", "engine")},
)
