"""A causal LM's layers from a folder that `save_pretrained` wrote, of which a rank reads those of its stages alone.

Called by `hf.pipeline_of`. Each layer is a description; building it loads, by the model's own `from_pretrained`, a model in which
everything else was taken out before any weight was read: tensors that nobody asks for are not read from safetensors. So names
that changed, weights that are joined and dtypes are Transformers' affair.

There is nothing here to compare the layers with. What they compute is tried on a small model of the same class instead.

Invariant: a rank holds no weight of another stage, not for a moment.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deepspeed.parallel.pipeline.hf_parts import (
    END_RUNS,
    Ends,
    Head,
    LayerKey,
    PartialModel,
    Through,
    Zeros,
    anatomy,
    layer_keys,
    layers_of,
    make_part,
)
from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec, TiedLayerSpec
from deepspeed.utils.logging import warn_once

_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 64, "max_position_embeddings": 64, "n_embd": 32, "n_head": 4, "n_positions": 64, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_KINDS: dict[str, type[nn.Module]] = {"front": PartialModel, "block": PartialModel, "norm": PartialModel, "head": Head}


class Folder:
    """Where a model lies, and its class. `load`: the arguments of `from_pretrained`."""

    def __init__(self, path: str, load: dict[str, Any]) -> None:
        import transformers  # optional
        from transformers.integrations import is_deepspeed_zero3_enabled

        self.path, self.load = path, load
        if is_deepspeed_zero3_enabled():
            raise LayerError(
                "pipeline_of(folder) while an HfDeepSpeedConfig of ZeRO stage 3 is alive: from_pretrained would share every layer out "
                "over all ranks.\n  Drop it; the pipeline's engine shards what each rank has read."
            )
        given = {k: v for k, v in load.items() if k in ("trust_remote_code", "revision", "subfolder")}
        self.config = transformers.AutoConfig.from_pretrained(path, **given)
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        if kind is None:
            raise LayerError(f"{path} is of type {self.config.model_type!r}, which has no causal language model.")
        self.kind: Any = kind

    def outline(self) -> Any:
        """The whole model without memory."""
        with torch.device("meta"):
            return self.kind(copy.deepcopy(self.config))

    def read(self, key: LayerKey) -> nn.Module:
        """One layer with its weights. Raises LayerError where the folder lacks some of them."""
        kind = _taken_out(self.kind, key)
        with _without_bars():
            model, told = kind.from_pretrained(self.path, output_loading_info=True, **self.load)
        missing = sorted(told["missing_keys"])
        if missing:
            raise LayerError(f"{self.path} has no weights {', '.join(missing[:3])} of {key.kind} {key.number}.")
        return make_part(model.train(), key)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """One progress bar per layer tells nobody anything."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


class FolderLayer(LayerSpec):
    """A layer that is read when it is built."""

    def __init__(self, folder: Folder, key: LayerKey, outline: nn.Module) -> None:
        super().__init__(_KINDS[key.kind])
        self._folder, self._key, self._outline = folder, key, outline

    def build(self, log: bool = False) -> nn.Module:
        """See LayerSpec."""
        return self._folder.read(self._key)

    def outline(self) -> nn.Module:
        """See LayerSpec."""
        return self._outline


class FolderEnds(TiedLayerSpec):
    """A tied end that is read when it is built."""

    def __init__(self, folder: Folder, key: LayerKey, outline: nn.Module) -> None:
        super().__init__("ends", Ends, forward_fn=END_RUNS[key.kind], tied_weight_attr=["embed.weight"])
        self._folder, self._key, self._outline = folder, key, outline

    def build(self, log: bool = False) -> nn.Module:
        """See LayerSpec."""
        return self._folder.read(self._key)

    def outline(self) -> nn.Module:
        """See LayerSpec."""
        return self._outline


def layers_in(path: str, load: dict[str, Any]) -> tuple[list[LayerSpec], Any]:
    """The layers of a folder's model as descriptions, and the model without memory."""
    folder = Folder(path, load)
    whole = folder.outline()
    _require_known(whole)
    _try_small(folder)
    layers: list[LayerSpec] = []
    for key in layer_keys(whole):
        outline = make_part(whole, key)
        layers.append((FolderEnds if key.is_tied else FolderLayer)(folder, key, outline))
    return layers, whole


def _require_known(model: Any) -> None:
    base, blocks_name, norm_name = anatomy(model)
    for name, child in base.named_children():
        is_known = name in (blocks_name, norm_name) or isinstance(child, nn.Embedding)
        if not is_known and next(child.parameters(), None) is not None:
            raise LayerError(
                f"{type(model).__name__} has weights in {name} beside embeddings, blocks and norm: nobody knows whose layer they are."
            )


def _try_small(folder: Folder) -> None:
    """Compare the layers of a small model of the class with that model."""
    config = copy.deepcopy(folder.config)
    kinds = list(getattr(config, "layer_types", None) or [])
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values()) or [0, 1]
    if kinds:
        config.layer_types = [kinds[i] for i in kept]
    for name, value in {**_SMALL, "num_hidden_layers": len(kept), "n_layer": len(kept)}.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    state = torch.random.get_rng_state()
    try:
        made = folder.kind(config).float()
    except Exception as error:  # sizes that the class ties to each other in a way of its own
        warn_once(f"pipeline_of({folder.path}): no small model to try its layers on ({type(error).__name__}: {error}).")
        return
    finally:
        torch.random.set_rng_state(state)
    layers_of(made)


def _taken_out(kind: Any, key: LayerKey) -> Any:
    """The model's class, of which everything but one layer is taken out as soon as it is made."""

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        _take_out(self, key)

    attributes = {
        "__init__": make,
        "__module__": kind.__module__,
        "_keys_to_ignore_on_load_unexpected": ["."],
    }
    return type(kind.__name__, (kind,), attributes)


def _take_out(model: Any, key: LayerKey) -> None:
    base, blocks_name, norm_name = anatomy(model)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    has_embedding = key.kind == "front" or key.is_tied
    blocks = getattr(base, blocks_name)
    for i in range(len(blocks)):
        if (key.kind, key.number) != ("block", i):
            blocks[i] = Through()
    for name, child in list(base.named_children()):
        if isinstance(child, nn.Embedding) and not has_embedding:
            base._modules[name] = Through() if child is embed else Zeros()
        elif isinstance(child, nn.Embedding) and child is not embed and key.kind != "front":
            base._modules[name] = Zeros()
    if norm_name is not None and key.kind != "norm":
        base._modules[norm_name] = Through()
    if key.kind != "head" and not key.is_tied:
        for name, child in list(model.named_children()):
            if child is head:
                model._modules[name] = Through()
    if not key.is_tied:
        model.all_tied_weights_keys = {}
