"""The original's layer policies by name, for scripts that write `injection_policy={GPT2Block: HFGPT2LayerPolicy}`.

There they describe a layer to kernels that take its place. Here a policy is the names of the sub-layers whose outputs are summed over
ranks, as a tuple of names is (`policy`); compiled steps need no description. Rows of `legacy` point here.
"""

from __future__ import annotations


class TransformerPolicy:
    """The base of all; subclasses name sub-layers."""

    row_names: tuple[str, ...] = ()
    """As the values of `injection_policy`."""


DSPolicy = TransformerPolicy


class HFBertLayerPolicy(TransformerPolicy):
    """BERT and RoBERTa."""

    row_names = ("attention.output.dense", "output.dense")


class HFDistilBertLayerPolicy(TransformerPolicy):
    """DistilBERT."""

    row_names = ("attention.out_lin", "ffn.lin2")


class HFGPT2LayerPolicy(TransformerPolicy):
    """GPT-2."""

    row_names = ("attn.c_proj", "mlp.c_proj")


class HFGPTJLayerPolicy(TransformerPolicy):
    """GPT-J."""

    row_names = ("attn.out_proj", "mlp.fc_out")


class HFGPTNEOLayerPolicy(TransformerPolicy):
    """GPT-Neo."""

    row_names = ("attention.out_proj", "mlp.c_proj")


class GPTNEOXLayerPolicy(TransformerPolicy):
    """GPT-NeoX."""

    row_names = ("attention.dense", "mlp.dense_4h_to_h")


class BLOOMLayerPolicy(TransformerPolicy):
    """BLOOM."""

    row_names = ("self_attention.dense", "mlp.dense_4h_to_h")


class HFOPTLayerPolicy(TransformerPolicy):
    """OPT."""

    row_names = ("self_attn.out_proj", "fc2")


class HFCLIPLayerPolicy(TransformerPolicy):
    """CLIP."""

    row_names = ("self_attn.out_proj", "mlp.fc2")


class LLAMALayerPolicy(TransformerPolicy):
    """Llama, and decoders built alike."""

    row_names = ("self_attn.o_proj", "mlp.down_proj")


class LLAMA2LayerPolicy(LLAMALayerPolicy):
    """Llama 2."""


class InternLMLayerPolicy(LLAMALayerPolicy):
    """InternLM."""


class MegatronLayerPolicy(TransformerPolicy):
    """Megatron-LM's GPT; `version` and `megatron_v2` are what scripts set for the original's kernels, and change nothing."""

    row_names = ("attention.dense", "mlp.dense_4h_to_h")
    version = 0
    megatron_v2 = True
    use_mup = False


class UNetPolicy(TransformerPolicy):
    """Diffusion models' denoisers, which nothing here cuts: using it is an error that says so."""


class VAEPolicy(TransformerPolicy):
    """Diffusion models' decoders; as `UNetPolicy`."""


generic_policies: list[type[TransformerPolicy]] = [UNetPolicy, VAEPolicy]
"""Those for models without layers in a list."""
replace_policies: list[type[TransformerPolicy]] = [
    HFBertLayerPolicy,
    HFGPTNEOLayerPolicy,
    GPTNEOXLayerPolicy,
    HFGPTJLayerPolicy,
    MegatronLayerPolicy,
    HFGPT2LayerPolicy,
    BLOOMLayerPolicy,
    HFOPTLayerPolicy,
    HFCLIPLayerPolicy,
    HFDistilBertLayerPolicy,
    LLAMALayerPolicy,
    LLAMA2LayerPolicy,
    InternLMLayerPolicy,
]
"""Those for layers of transformers."""
