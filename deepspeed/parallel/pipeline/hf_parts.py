"""A causal language model of Hugging Face as layers of a pipeline.

Used by `hf` and `hf_folder`; Transformers is not imported, the model brings its classes. A block is run by the model's own forward:

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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deepspeed.parallel.pipeline.layers import LayerError, TiedLayerSpec

_FACTORS = ("embedding_multiplier", "embed_scale", "scale_emb")
"""Attributes by which base models multiply embeddings."""


class Zeros(nn.Module):
    """In place of position embeddings, which the first layer has added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[] zero, which adds nothing to embeddings of any shape."""
        return torch.zeros(())


class Through(nn.Module):
    """In place of a norm, a dropout or a block that another layer has."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` as it is."""
        return x


class Spread(Protocol):
    """How a part is run where ranks have parts of sequences (`hf_sequence`)."""

    def run(self, part: PartialModel, values: Any) -> Any:
        """What `PartialModel.forward` would return for whole sequences, and the position ids."""


class PartialModel(nn.Module):
    """A base model with some of its modules, on (hidden states or tokens[, attention mask])."""

    def __init__(self, base: nn.Module, takes_tokens: bool = False) -> None:
        super().__init__()
        self.base, self.takes_tokens = base, takes_tokens
        self.spread: Spread | None = None

    def forward(self, values: Any) -> Any:
        """Hidden states, and the mask again where there is one."""
        if self.spread is not None:
            return self.spread.run(self, values)
        x, mask = values if isinstance(values, (tuple, list)) else (values, None)
        given = {"input_ids": x} if self.takes_tokens else {"inputs_embeds": x}
        hidden = self.base(**given, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden if mask is None else (hidden, mask)


class Ends(nn.Module):
    """The embedding, first so that it has one name wherever it is, what else the first layer needs, and the head it is."""

    def __init__(self, embed: nn.Module, front: PartialModel | None, whole: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        if front is not None:
            self.front = front
        self.whole = whole


class LiveEnds(TiedLayerSpec):
    """A tied end of a model whose module is there already."""

    def __init__(self, module: nn.Module, forward_fn: Callable[..., Any]) -> None:
        super().__init__("ends", type(module), forward_fn=forward_fn, tied_weight_attr=["embed.weight"])
        self._module, self._run = module, forward_fn

    def run(self, values: Any) -> Any:
        """What the layer does."""
        return self._run(self._module, values)

    def build(self, log: bool = False) -> nn.Module:
        """See LayerSpec."""
        return self._module


class LayerKey(NamedTuple):
    """One layer of a causal LM: "front", "block" (with its number), "norm" or "head"; ends that share a weight are tied."""

    kind: str
    number: int = 0
    is_tied: bool = False


def layers_of(model: Any) -> list[Any]:
    """The layers of `pipeline_of`. Raises LayerError for a model that they do not reproduce."""
    layers = [as_layer(model, key) for key in layer_keys(model)]
    _try(model, layers)
    return layers


def layer_keys(model: Any) -> list[LayerKey]:
    """What a model's layers are, in order. Raises LayerError for one that is no list of blocks."""
    base, blocks_name, norm_name = anatomy(model)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embed.weight
    if is_tied and getattr(head, "bias", None) is not None:
        raise LayerError(f"{type(model).__name__} has a head with a bias of its own over the embedding's weight.")
    blocks = [LayerKey("block", i) for i in range(len(getattr(base, blocks_name)))]
    norm = [LayerKey("norm")] if norm_name is not None else []
    return [LayerKey("front", is_tied=is_tied), *blocks, *norm, LayerKey("head", is_tied=is_tied)]


def as_layer(model: Any, key: LayerKey) -> Any:
    """The layer of `key` as a layer of a pipeline, of the model's own modules."""
    module = make_part(model, key)
    return LiveEnds(module, END_RUNS[key.kind]) if key.is_tied else module


def make_part(model: Any, key: LayerKey) -> nn.Module:
    """The module that runs the layer of `key`."""
    base, blocks_name, norm_name = anatomy(model)
    if key.kind == "block":
        return PartialModel(_skeleton(base, blocks_name, norm_name, [key.number]))
    if key.kind == "norm":
        return PartialModel(_skeleton(base, blocks_name, norm_name, [], has_norm=True))
    front = PartialModel(_skeleton(base, blocks_name, norm_name, [], has_embedding=True), takes_tokens=True)
    if key.kind == "front" and not key.is_tied:
        return front
    whole = _around(model, base, _skeleton(base, blocks_name, norm_name, []))
    if not key.is_tied:
        return Head(whole)
    # Where one rank has both ends, the first is made for both.
    return Ends(model.get_input_embeddings(), front if key.kind == "front" else None, whole)


def _run_front(ends: Any, values: Any) -> Any:
    return ends.front(values)


def _run_head(ends: Any, values: Any) -> Any:
    return _logits(ends.whole, values)


END_RUNS: dict[str, Callable[..., Any]] = {"front": _run_front, "head": _run_head}
"""What the tied ends do."""


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


def anatomy(model: Any) -> tuple[Any, str, str | None]:
    """The base model, and what its list of blocks and its last norm are called."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    base = getattr(base, "decoder", base)
    if not isinstance(base, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise LayerError(
            f"{type(model).__name__} is not a causal language model of Transformers: it has no base model."
        )
    lists = [name for name, child in base.named_children() if isinstance(child, nn.ModuleList) and len(child) > 0]
    plan = list(getattr(base.config, "base_model_pp_plan", None) or {})
    planned = [name for name in plan if name in lists]
    if len(planned) == 1:  # Transformers' own plan: what comes first, the blocks, and the norm after them
        after = plan[plan.index(planned[0]) + 1 :]
        return (
            base,
            planned[0],
            next((name for name in after if isinstance(getattr(base, name, None), nn.Module)), None),
        )
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
        made._modules[norm_name] = Through()
    if not has_embedding:
        for name, child in base.named_children():
            is_position = isinstance(child, nn.Embedding) and child is not base.get_input_embeddings()
            if is_position:
                made._modules[name] = Zeros()
            elif child is base.get_input_embeddings() or isinstance(child, nn.Dropout):
                made._modules[name] = Through()
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


def _try(model: Any, layers: Sequence[Any]) -> None:
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
                found = layer.run(found) if isinstance(layer, LiveEnds) else layer(found)
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
