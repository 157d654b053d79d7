"""Hugging Face's `save_pretrained` for models that hold a part of their weights, or integers: its folder would load as another model.

`refuse_save_pretrained` is called by whoever changes a model's parameters in place. Transformers writes what `state_dict()` gives without a
look at it, and reads a folder with wrong names and shapes by drawing new weights. `refuse_resizing` is its companion for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from deepspeed.utils.errors import DeepSpeedError


def refuse_save_pretrained(model: nn.Module, is_other: Callable[[nn.Module], bool], what: str, cure: str) -> None:
    """From now on, `save_pretrained` of `model` raises DeepSpeedError, unless it is given a state dict.

    `is_other` says of each layer whether what it would write is not the model's own. Of a model with adapters, which writes those alone, only
    the layers count that are trained.
    """
    if not callable(getattr(model, "save_pretrained", None)) or not any(map(is_other, _written(model))):
        return
    words = f"save_pretrained of a {type(model).__name__} {what}: no {type(model).__name__} could read the folder.\n  {cure}"
    model.__dict__["save_pretrained"] = _Refused(model, words)


def refuse_resizing(model: nn.Module, what: str, cure: str) -> None:
    """From now on, `resize_token_embeddings` of `model` raises DeepSpeedError: Transformers would take a part's rows for all of them."""
    if callable(getattr(model, "resize_token_embeddings", None)):
        words = f"resize_token_embeddings of a {type(model).__name__} {what}.\n  {cure}"
        model.__dict__["resize_token_embeddings"] = Never(words)


class Never:
    """Stands before a method that has no right answer."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises DeepSpeedError, whatever is asked for."""
        raise DeepSpeedError(self._words)


def _written(model: nn.Module) -> Iterator[nn.Module]:
    has_adapters = hasattr(model, "peft_config")
    for layer in model.modules():
        if not has_adapters or any(param.requires_grad for param in layer.parameters(recurse=False)):
            yield layer


class _Refused:
    """Stands before the method of the model's class."""

    def __init__(self, model: Any, words: str) -> None:
        self._model = model
        self._words = words

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method: save_directory, is_main_process, state_dict, ..."""
        if kwargs.get("state_dict") is None and (len(args) < 3 or args[2] is None):
            raise DeepSpeedError(self._words)
        return type(self._model).save_pretrained(self._model, *args, **kwargs)
