"""A causal language model of Hugging Face as a `PipelineModule`, in one call.

Called by users; Transformers is not imported, the model brings its classes. A block is run by the model's own forward:

    ends (embedding)   the base model without blocks and norm            input_ids -> hidden states
    block i            the base model with this block alone              inputs_embeds -> hidden states
    norm               the base model with its norm alone
    head               the whole model around a base model without anything, for logits as the model scales them

so masks, rotary embeddings and attention kinds are the model's affair. What a base model does to embeddings it is given
(positions, dropout, factors) is taken out of blocks, and a trial compares the layers with the model before they are used.

Invariant: parameters are the model's own objects; a tied head is a tied layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.parallel.pipeline.layers import LayerError, TiedLayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule

_FACTORS = ("embedding_multiplier", "embed_scale", "scale_emb")
"""Attributes by which base models multiply embeddings."""


class _Zeros(nn.Module):
    """In place of position embeddings, which the first layer has added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class _Through(nn.Module):
    """In place of a norm, a dropout or a block that another layer has."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Part(nn.Module):
    """A base model with some of its modules, on (hidden states or tokens[, attention mask])."""

    def __init__(self, base: nn.Module, takes_tokens: bool = False) -> None:
        super().__init__()
        self.base, self.takes_tokens = base, takes_tokens

    def forward(self, values: Any) -> Any:
        """Hidden states, and the mask again where there is one."""
        x, mask = values if isinstance(values, (tuple, list)) else (values, None)
        given = {"input_ids": x} if self.takes_tokens else {"inputs_embeds": x}
        hidden = self.base(**given, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden if mask is None else (hidden, mask)


class Ends(nn.Module):
    """The embedding, first so that it has one name wherever it is, what else the first layer needs, and the head it is."""

    def __init__(self, embed: nn.Module, front: Part | None, whole: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        if front is not None:
            self.front = front
        self.whole = whole


class _LiveTied(TiedLayerSpec):
    """A tied layer whose module is there already."""

    def __init__(self, module: nn.Module, forward_fn: Callable[..., Any]) -> None:
        super().__init__("ends", type(module), forward_fn=forward_fn, tied_weight_attr=["embed.weight"])
        self._module, self._run = module, forward_fn

    def run(self, values: Any) -> Any:
        """What the layer does."""
        return self._run(self._module, values)

    def build(self, log: bool = False) -> nn.Module:
        """See LayerSpec."""
        return self._module


def pipeline_of(model: Any, num_stages: int | None = None, **settings: Any) -> PipelineModule:
    """Cut a causal LM of Transformers into its blocks. `settings` are PipelineModule's.

    Inputs are input_ids [micro_batch, seq], or (input_ids, attention_mask); labels as the model's own, and so is the loss,
    unless `loss_fn` is given. Raises LayerError for a model that its layers do not reproduce. Collective.
    """
    layers = layers_of(model)
    settings.setdefault("loss_fn", functools.partial(_loss, model.loss_function, model.config))
    return PipelineModule(layers, num_stages=num_stages, **settings)


def layers_of(model: Any) -> list[Any]:
    """The layers of `pipeline_of`. Raises LayerError for a model that they do not reproduce."""
    base, blocks_name, norm_name = _anatomy(model)
    blocks = getattr(base, blocks_name)
    embed = model.get_input_embeddings()
    head = model.get_output_embeddings()
    front = Part(_skeleton(base, blocks_name, norm_name, [], has_embedding=True), takes_tokens=True)
    parts: list[Any] = [Part(_skeleton(base, blocks_name, norm_name, [i])) for i in range(len(blocks))]
    if norm_name is not None:
        parts.append(Part(_skeleton(base, blocks_name, norm_name, [], has_norm=True)))
    whole = _around(model, base, _skeleton(base, blocks_name, norm_name, []))
    if head is not None and head.weight is embed.weight:
        if getattr(head, "bias", None) is not None:
            raise LayerError(f"{type(model).__name__} has a head with a bias of its own over the embedding's weight.")
        ends: list[Any] = [
            _LiveTied(Ends(embed, front, whole), lambda module, values: front(values)),
            _LiveTied(Ends(embed, None, whole), lambda module, values: _logits(whole, values)),
        ]
    else:
        ends = [front, Head(whole)]
    layers = [ends[0], *parts, ends[1]]
    _try(model, layers)
    return layers


class Head(nn.Module):
    """The model without its base."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, values: Any) -> Tensor:
        """Logits [micro_batch, seq, vocabulary]."""
        return _logits(self.whole, values)


def _logits(whole: Any, values: Any) -> Tensor:
    x = values[0] if isinstance(values, (tuple, list)) else values
    return whole(inputs_embeds=x, use_cache=False).logits


def _loss(function: Callable[..., Tensor], config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return function(logits=logits, labels=labels, vocab_size=config.get_text_config().vocab_size)


def _anatomy(model: Any) -> tuple[Any, str, str | None]:
    """The base model, and what its list of blocks and its last norm are called."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    base = getattr(base, "decoder", base)
    if not isinstance(base, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise LayerError(
            f"{type(model).__name__} is not a causal language model of Transformers: it has no base model."
        )
    lists = [name for name, child in base.named_children() if isinstance(child, nn.ModuleList) and len(child) > 0]
    if len(lists) != 1:
        raise LayerError(f"{type(base).__name__} has {len(lists)} lists of blocks ({', '.join(lists)}), not one.")
    names = [name for name, _ in base.named_children()]
    after = names[names.index(lists[0]) + 1 :]
    norms = [name for name in after if "norm" in name.lower() or name.lower().startswith("ln")]
    norms = norms or [name for name in names if name.startswith("final") and "norm" in name]  # OPT's stands before
    return base, lists[0], norms[-1] if norms else None


def _skeleton(
    base: Any,
    blocks_name: str,
    norm_name: str | None,
    kept: list[int],
    *,
    has_embedding: bool = False,
    has_norm: bool = False,
) -> Any:
    """The base model with these blocks alone; what is left out is not among its modules."""
    made = copy.copy(base)
    made.__dict__ = {**base.__dict__, "_modules": dict(base._modules), "config": copy.copy(base.config)}
    blocks = getattr(base, blocks_name)
    made._modules[blocks_name] = nn.ModuleList([blocks[i] for i in kept])
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if name in made.config.__dict__:
            setattr(made.config, name, len(kept))
    kinds = getattr(made.config, "layer_types", None)
    if kinds and kept:
        made.config.layer_types = [kinds[i] for i in kept]
    if norm_name is not None and not has_norm:
        made._modules[norm_name] = _Through()
    if not has_embedding:
        for name, child in base.named_children():
            is_position = isinstance(child, nn.Embedding) and child is not base.get_input_embeddings()
            if is_position:
                made._modules[name] = _Zeros()
            elif child is base.get_input_embeddings() or isinstance(child, nn.Dropout):
                made._modules[name] = _Through()
        for name in _FACTORS:
            if isinstance(getattr(made, name, None), float):
                made.__dict__[name] = 1.0
    return made


def _around(model: Any, base: Any, empty: Any) -> Any:
    """The whole model with an empty base."""
    made = copy.copy(model)
    made.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
    name = next(
        name for name, child in model.named_children() if child is base or getattr(child, "decoder", None) is base
    )
    child = model._modules[name]
    if child is not base:  # OPT and the like: model.decoder
        outer = copy.copy(child)
        outer.__dict__ = {**child.__dict__, "_modules": {**child._modules, "decoder": empty}}
        empty = outer
    made._modules[name] = empty
    return made


def _try(model: Any, layers: list[Any]) -> None:
    """Compare the layers with the model on a few tokens, where its weights are here."""
    if any(p.is_meta or getattr(p, "ds_id", None) is not None for p in model.parameters()):
        return
    was_training, device = model.training, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.get_text_config().vocab_size, (2, 7), generator=generator).to(device)
    state = torch.random.get_rng_state()
    model.eval()
    for layer in layers:
        if isinstance(layer, nn.Module):
            layer.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits
            found: Any = tokens
            for layer in layers:
                found = layer.run(found) if isinstance(layer, _LiveTied) else layer(found)
    except Exception as error:
        raise LayerError(
            f"{type(model).__name__} cannot be cut into its blocks: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.random.set_rng_state(state)
        model.train(was_training)
        for layer in layers:
            if isinstance(layer, nn.Module):
                layer.train(was_training)
    if not torch.equal(expected, found):
        gap = (expected - found).abs().max().item()
        raise LayerError(
            f"{type(model).__name__} is not the sum of its blocks: logits differ by {gap:g} where it is run layer by layer.\n"
            "  Write its layers as LayerSpec, or train it with ZeRO alone."
        )
