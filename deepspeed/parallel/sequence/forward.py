"""What happens around a model's forward under sequence parallelism: its inputs are joined once, for all layers, and corrected.

Attached to the model by `UlyssesSPAttentionHF.register_with_transformers`, or by the engine where the model was not yet there.
Before the forward, ranks gather position ids, padding mask and labels (`inputs.py`). Then the model gets

    attention_mask    none: attention knows the padding of the whole sequence
    shift_labels      where labels alone were given, shifted over the whole sequence: a shift inside of each part would lose
                      the target of every part's last token

and the result rests on the position ids themselves, so that a layer that runs again in a backward, when other forwards have
come between, finds those of its own forward.

Invariant: what is refused is refused on all ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepspeed.parallel.sequence.inputs import SequenceInputs, gather_inputs, shifted, with_targets
from deepspeed.parallel.sequence.marked import own_parts
from deepspeed.utils.logging import warn_once

_ON_MODEL, _ON_IDS = "_sequence_forward", "_sequence_inputs"


class Settings(Protocol):
    """What a registration decided."""

    @property
    def group(self) -> Any:
        """The ranks that share a sequence."""

    @property
    def disable_in_eval(self) -> bool:
        """Whether forwards in evaluation mode get whole sequences."""

    def check_length(self, length: int) -> None:
        """Refuse a whole sequence of another length than was said."""


class SequenceForward:
    """The hook of one model. `latest`: the inputs of its last forward. `is_running`: whether one is under way.

    A model that is copied or pickled takes one along that does nothing.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings
        self.latest: SequenceInputs | None = None
        self.is_running = False
        self.window: int | None = None
        """The smallest sliding window that a mask of this forward was asked for."""
        self._has_compared = False
        self._handles: list[Any] = []
        self._model: Callable[[], nn.Module | None] = lambda: None

    def attach(self, model: nn.Module) -> None:
        """Once per model; a second one takes the place of the first."""
        before = forward_of(model)
        if before is not None:
            before.detach()
        self._model = weakref.ref(model)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        model.__dict__[_ON_MODEL] = self

    def detach(self) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is not None:
            model.__dict__.pop(_ON_MODEL, None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.latest = self.window = None
        if self.settings is None:
            return None
        if self.settings.disable_in_eval and not model.training:
            if torch.is_grad_enabled():
                warn_once(
                    f"{type(model).__name__} is in evaluation mode, where disable_in_eval=True has each rank attend to its own input "
                    "alone, and gradients are recorded. Call model.train() before training on parts of sequences."
                )
            return None
        named = by_name(model, args, kwargs)
        parts = own_parts(named, self.settings.group, compares=not self._has_compared)
        if parts is not None:
            self._has_compared = True
            args, kwargs = _replaced(list(named)[: len(args)], parts, args, kwargs)
            named = {**named, **parts}
        position_ids, mask, labels = named.get("position_ids"), named.get("attention_mask"), named.get("labels")
        targets = named.get("shift_labels")
        problem = ""
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            is_block = type(mask).__name__ == "BlockMask"
            what = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            if not is_block:
                problem = (
                    f"attention_mask is {what}: a mask over pairs of tokens cannot be cut along the sequence.\n"
                    "  Pass the padding mask [batch, sequence], or packed samples by their position_ids alone."
                )
            mask = None
        length = position_ids.shape[-1] if position_ids is not None else None
        is_per_token = all(
            isinstance(t, Tensor) and t.dim() == 2 and t.shape[1] == length for t in (labels, targets) if t is not None
        )
        known = (targets if targets is not None else labels) if is_per_token else None
        inputs = gather_inputs(self.settings.group, position_ids, mask, known, problem)
        self.settings.check_length(inputs.length)
        if inputs.labels is not None:
            whole = inputs.labels if targets is not None else shifted(inputs.labels)
            inputs = with_targets(inputs, whole)
            if targets is None:
                kwargs = {**kwargs, "shift_labels": inputs.own(whole)}
        self.latest, self.is_running = inputs, True
        assert position_ids is not None, "refused by gather_inputs"
        position_ids.__dict__[_ON_IDS] = inputs
        return _without_mask(model, args, kwargs)

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.is_running = False

    def __reduce__(self) -> Any:
        return SequenceForward, ()

    @contextlib.contextmanager
    def over(self, position_ids: Tensor, mask: Tensor | None) -> Iterator[SequenceInputs]:
        """Around a forward of some of a model's layers, which nobody hooks: ranks join these local inputs, unless they are of one
        that was joined before. Collective over the ranks of a sequence."""
        assert self.settings is not None, "a copy has none and is not run like this"
        inputs = getattr(position_ids, _ON_IDS, None)
        if inputs is None:
            inputs = gather_inputs(self.settings.group, position_ids, mask)
            position_ids.__dict__[_ON_IDS] = inputs
        self.latest, self.window, self.is_running = inputs, None, True
        try:
            yield inputs
        finally:
            self.is_running = False

    def of(self, position_ids: Any) -> SequenceInputs | None:
        """The inputs of the forward that these local position ids belong to; else those of the last forward."""
        return getattr(position_ids, _ON_IDS, None) or self.latest


def forward_of(model: nn.Module) -> SequenceForward | None:
    """The hook of a model, if it has one."""
    found = model.__dict__.get(_ON_MODEL)
    return found if isinstance(found, SequenceForward) else None


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by their names."""
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _replaced(
    positional: list[str], parts: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(parts.get(name, value) for name, value in zip(positional, args, strict=True))
    return args, {**kwargs, **{name: part for name, part in parts.items() if name not in positional}}


def _without_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs.get("attention_mask") is not None:
        kwargs = {**kwargs, "attention_mask": None}
    names = list(inspect.signature(model.forward).parameters)[: len(args)] if args else []
    if "attention_mask" in names:
        at = names.index("attention_mask")
        args = (*args[:at], None, *args[at + 1 :])
    return args, kwargs
