"""Decoding in one compiled call per token, for decoders built as Llama is: put beneath Hugging Face's own forward and generate.

Called by the engine after a model was loaded and quantized. `fuse` describes the layers to `kernels.native_decode` and takes the place
of the inner model's forward: one new token of up to 32 sequences, without gradients, over a dynamic cache, goes through the
compiled layers; prompts, and everything else, through the forward that was there.

Invariant: logits are the unfused ones to rounding (fp32). Where a model, a weight or a device does not fit, nothing is changed, and
one line says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deepspeed.inference.watched import Watched, has_global_hooks, own_forward
from deepspeed.kernels import native_decode, native_products
from deepspeed.kernels.native_decode import Layer, Layers, LayersOverCache, Weight
from deepspeed.quant.linear import QuantizedLinear
from deepspeed.utils.logging import warn_once

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Whose decoder layers are norm, attention with rotary positions, norm, gated MLP with SiLU."""


class NotFusable(Exception):  # noqa: N818 - a reason, which becomes one line
    """Why a model runs unfused."""


class FusedForward:
    """Stands for the inner model's forward; see the module's text."""

    def __init__(self, inner: Any, layers: Layers) -> None:
        self._inner = inner
        self._layers = layers
        self._caches: WeakKeyDictionary[Any, LayersOverCache] = WeakKeyDictionary()
        self._num_layers = len(inner.layers)
        self._class_forward = type(inner).forward
        self._watched = Watched(inner.layers.modules())
        self.num_fused = 0
        """Tokens' forwards that went through the compiled layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner model's forward."""
        found = self._fused(**kwargs) if not args and not torch.is_grad_enabled() else None
        return _plain_forward(self._inner)(*args, **kwargs) if found is None else found

    def __deepcopy__(self, memo: Any) -> Any:
        return _plain_forward(memo[id(self._inner)])

    def __reduce__(self) -> Any:
        return _plain_forward, (self._inner,)

    def _fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        from deepspeed.inference.cache import adopt
        from deepspeed.inference.int8_cache import adopt_int8

        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.shape[1] != 1 or given.shape[0] > native_products.MAX_ROWS or use_cache is False:
            return None
        if _asks_for_more(others) or not self._is_as_it_was():
            return None
        held: Any = adopt_int8(cache) or adopt(cache)
        if not held or len(held) != self._num_layers or held[0].batch != given.shape[0]:
            return None
        position = held[0].length
        ranges = _ranges(attention_mask, given.shape[0], position)
        if ranges is None:
            return None
        hidden = self._inner.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.full((given.shape[0], 1), position)
        cos, sin = (part[:, 0].contiguous() for part in self._inner.rotary_emb(hidden, position_ids=position_ids))
        x = hidden[:, 0].clone(memory_format=torch.contiguous_format)
        batch = x.shape[0]
        if cos.shape[0] != batch:
            cos, sin = cos.expand(batch, -1).contiguous(), sin.expand(batch, -1).contiguous()
        self._over(held).step(x, cos, sin, ranges, position)
        for layer in held:
            layer.grow_to(position + 1)
        self.num_fused += 1
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._inner.norm(x.unsqueeze(1)), cache=cache)

    def _is_as_it_was(self) -> bool:
        """Whether the compiled layers still compute what the model's forward does, and all that it is asked for."""
        inner = self._inner
        config = inner.config
        return (
            type(inner).forward is self._class_forward
            and config.num_hidden_layers == self._num_layers
            and not any(getattr(config, key, None) for key in _RECORDED)
            and inner._modules.get("layers") is self._watched.modules[0]
            and getattr(config, "sliding_window", None) is None
            and _has_own_attention(config)
            and not (inner.training or has_global_hooks() or torch.is_autocast_enabled("cpu"))
            and not torch.compiler.is_compiling()
            and self._watched.is_as_it_was()
        )

    def _over(self, held: Sequence[Any]) -> LayersOverCache:
        """The layers over a cache's buffers; made once for as long as those stay, as several caches may be under way."""
        buffers = [layer.room(1) for layer in held]
        found = self._caches.get(held[0])
        if found is None or not found.are_over(buffers):
            found = self._caches[held[0]] = self._layers.over(buffers)
        return found


def _plain_forward(inner: Any) -> Any:
    return type(inner).forward.__get__(inner)


_RECORDED = ("output_attentions", "output_hidden_states")
_ATTENTION = ("eager", "sdpa")


def _asks_for_more(others: Mapping[str, Any]) -> bool:
    """Whether arguments ask for what a compiled step does not give."""
    return others.get("return_dict") is False or any(
        value not in (None, False) for key, value in others.items() if key != "return_dict"
    )


def _has_own_attention(config: Any) -> bool:
    """Whether attention is Hugging Face's: of a name that means plain attention, and not registered anew by a script."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    return name in _ATTENTION and (found is None or found.__module__.startswith("transformers."))


def _ranges(mask: Any, batch: int, position: int) -> Tensor | None:
    """[batch, 2]: what each sequence sees; None for a mask that is no padding on the left."""
    ranges = torch.tensor([[0, position + 1]]).repeat(batch, 1)
    if mask is None:
        return ranges
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != position + 1:
        return None
    seen = mask.bool()
    num_seen = seen.sum(1)
    starts = position + 1 - num_seen
    if not bool(seen.gather(1, starts.clamp(max=position).unsqueeze(1)).all()) or bool((num_seen == 0).any()):
        return None
    if not torch.equal(seen.to(torch.int8).argmax(1), starts):
        return None
    ranges[:, 0] = starts
    return ranges


def unfuse(module: Any) -> None:
    """Give a model its own forward back."""
    inner = getattr(module, "model", None)
    if isinstance(inner, nn.Module) and isinstance(inner.__dict__.get("forward"), FusedForward):
        del inner.__dict__["forward"]


def fuse(module: nn.Module) -> bool:
    """Put the compiled step beneath a model, where it fits; whether it does."""
    try:
        inner, layers = _describe(module)
    except NotFusable as reason:
        warn_once(f"{type(module).__name__} runs unfused: {reason}.")
        return False
    inner.__dict__["forward"] = FusedForward(inner, layers)
    return True


def _describe(module: nn.Module) -> tuple[Any, Layers]:
    inner: Any = getattr(module, "model", None)
    family = type(module).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES or inner is None or not type(module).__module__.startswith("transformers."):
        raise NotFusable(f"compiled steps are for {', '.join(FAMILIES)}")
    if not native_decode.is_there():
        raise NotFusable("the package was built without a compiler")
    _refuse_own(inner)
    config: Any = module.config
    attention: Any = inner.layers[0].self_attn
    heads, shared, dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    if getattr(config, "sliding_window", None) or any(
        getattr(layer.self_attn, "sliding_window", None) for layer in inner.layers
    ):
        raise NotFusable("its attention has a sliding window")
    if dim % 16 or dim > 512:
        raise NotFusable(f"its heads have {dim} elements, which is no multiple of 16 up to 512")
    eps = float(inner.layers[0].input_layernorm.variance_epsilon)
    described = [_layer(layer, index, eps) for index, layer in enumerate(inner.layers)]
    return inner, Layers(described, heads=heads, shared=shared, dim=dim, eps=eps)


def _refuse_own(inner: Any) -> None:
    """Raise NotFusable where a script has put something of its own in the place of what Hugging Face's layers compute."""
    own = inner.__dict__.get("forward")
    if type(inner).forward.__module__ != type(inner).__module__ or not (own is None or isinstance(own, FusedForward)):
        raise NotFusable("its decoder's forward was replaced")
    if not len(inner.layers) or len(inner.layers) != inner.config.num_hidden_layers:
        raise NotFusable(f"it has {len(inner.layers)} layers and says {inner.config.num_hidden_layers}")
    for name, module in inner.layers.named_modules():
        reason = own_forward(module)
        if reason is not None:
            raise NotFusable(f"layers.{name} is {reason}")


def _layer(layer: Any, index: int, eps: float) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if type(mlp.act_fn).__name__ not in _SILU:
        raise NotFusable(f"its activation is {type(mlp.act_fn).__name__}")
    if attention.layer_idx != index or abs(attention.scaling - attention.head_dim**-0.5) > 1e-9:
        raise NotFusable(
            f"layer {index} has scores of the scale {attention.scaling}, or the cache of layer {attention.layer_idx}"
        )
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, *norms):
        if norm is not None and norm.variance_epsilon != eps:
            raise NotFusable(f"its norms have different epsilons, {eps} and {norm.variance_epsilon}")
    return Layer(
        before_attention=_plain(layer.input_layernorm.weight),
        before_mlp=_plain(layer.post_attention_layernorm.weight),
        query=_weight(attention.q_proj),
        key=_weight(attention.k_proj),
        value=_weight(attention.v_proj),
        out=_weight(attention.o_proj),
        gate=_weight(mlp.gate_proj),
        up=_weight(mlp.up_proj),
        down=_weight(mlp.down_proj),
        query_norm=None if norms[0] is None else _plain(norms[0].weight),
        key_norm=None if norms[1] is None else _plain(norms[1].weight),
    )


_SILU = ("SiLU", "SiLUActivation")


def _weight(linear: nn.Module) -> Weight:
    bias = linear.bias
    held = None if bias is None else _plain(bias)
    if type(linear) is nn.Linear:
        return Weight(_plain(linear.weight), linear.out_features, linear.in_features, bias=held)
    if type(linear) is not QuantizedLinear:
        raise NotFusable(f"it has a {type(linear).__name__}")
    weight = linear.quantized
    if not weight.spec.symmetric or not native_products.takes(weight.spec.group_size):
        raise NotFusable("the loops take symmetric groups of a multiple of 32")
    return Weight(
        weight.values, weight.rows, weight.width, weight.spec.num_bits, weight.spec.group_size, weight.scales, held
    )


def _plain(tensor: Any) -> Tensor:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise NotFusable("compiled steps compute in fp32, in main memory")
    found: Tensor = tensor.detach()
    return found
