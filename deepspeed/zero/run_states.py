"""A wrapped optimizer's states, which answer for the model's parameters too: `optimizer.state[param]`.

Installed by `zero.runs`. States are kept by run; scripts ask by parameter. Where a rank has all states in memory, a parameter that is
asked for becomes a run of its own, whose states are shown in the parameter's shape. Where ranks have parts, states can be dropped
(`del optimizer.state[param]`, `pop`, `optimizer.state[param] = {}`), and whoever reads them is told how.

Invariant: asking for a parameter's state gives its run's, the same tensors, and adds no other key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, final

import torch
from torch import Tensor

from deepspeed.optim.traits import Needs, needs_of
from deepspeed.utils.errors import TrainingStateError
from deepspeed.zero.master import Master
from deepspeed.zero.param import slot_of

States = dict[str, Any]


class Runs(Protocol):
    """What is asked of the runs (`zero.runs`). Parameters go by the number of their master and their index there."""

    optimizer: torch.optim.Optimizer
    masters: list[Master]
    gives_whole: bool

    def place_of(self, tensor: object) -> tuple[int, int] | None:
        """A parameter's numbers; None for anything else."""
        ...

    def has_whole(self, index: int) -> bool:
        """Whether this rank has all of a master's states, in memory."""
        ...

    def has_any_state(self, index: int, param: int) -> bool:
        """Whether a parameter has states."""
        ...

    def runs_of(self, index: int, param: int) -> Sequence[Tensor]:
        """This rank's runs of one parameter and nothing else."""
        ...


@final
class RunStates(defaultdict[Tensor, States]):
    """By run, and by parameter of the model."""

    def __init__(self, states: dict[Tensor, States], runs: Runs) -> None:
        super().__init__(dict, states)
        self._runs = runs
        self.dropped: set[tuple[int, int]] = set()
        """Parameters dropped since the last step of which this rank has nothing, so that it can tell by no state."""

    def __missing__(self, key: Tensor) -> States:
        place = self._runs.place_of(key)
        if place is None:
            return super().__missing__(key)
        if not self._runs.has_whole(place[0]):
            self._refuse(key)
        run = self._runs_of(place)[0]
        shape = self._runs.masters[place[0]].bucket.shape_of_numbers(place[1])
        return self[run] if self._runs.gives_whole else _Shown(self[run], shape)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        place = self._runs.place_of(key)
        return place is not None and place not in self.dropped and self._runs.has_any_state(*place)

    def get(self, key: Any, default: Any = None) -> Any:
        """See dict."""
        return self[key] if key in self else default  # noqa: SIM401

    def __setitem__(self, key: Tensor, states: States) -> None:
        place = self._runs.place_of(key)
        if place is None:
            super().__setitem__(key, states)
            return
        if states and not self._runs.has_whole(place[0]):
            self._refuse(key)
        for run in self._runs_of(place):
            super().__setitem__(run, {name: _flat(value, run) for name, value in states.items()})

    def __delitem__(self, key: Tensor) -> None:
        place = self._runs.place_of(key)
        if place is None:
            super().__delitem__(key)
        elif key not in self:
            raise KeyError(key)
        else:
            self._drop(place)

    def pop(self, key: Any, *default: Any) -> Any:
        """See dict. Of parameters that ranks have parts of: this rank's part of the states, 1-D."""
        place = self._runs.place_of(key)
        if place is None or key not in self:
            return super().pop(key, *default)
        states = dict(self[key]) if self._runs.has_whole(place[0]) else None
        dropped = self._drop(place)
        return dropped if states is None else states

    def _drop(self, place: tuple[int, int]) -> States:
        runs = self._runs_of(place)
        if not runs:
            self.dropped.add(place)
        return next(iter([super(RunStates, self).pop(run, {}) for run in runs]), {})

    def _runs_of(self, place: tuple[int, int]) -> Sequence[Tensor]:
        """This rank's runs of one parameter and nothing else."""
        if not (self._runs.gives_whole or needs_of(self._runs.optimizer) is Needs.ELEMENTWISE):
            self._refuse(self._runs.masters[place[0]].bucket.params[place[1]])
        return self._runs.runs_of(*place)

    def _refuse(self, param: Tensor) -> NoReturn:
        slot = slot_of(param)
        assert slot is not None, "only for the model's parameters"
        raise TrainingStateError(
            f"optimizer.state[param] of {slot.bucket.names[slot.index]}: this rank has only a part of its state, among other "
            f"parameters' ({type(self._runs.optimizer).__name__}).\n"
            '  Read it by deepspeed.utils.safe_get_full_optimizer_state(param, "exp_avg"), write it by '
            "safe_set_full_optimizer_state(param, value, ...), on every rank; `del optimizer.state[param]` starts it anew, where the "
            "optimizer is element-wise."
        )

    def __reduce__(self) -> Any:
        """A copy is a plain one."""
        return defaultdict, (dict,), None, None, iter(self.items())


@final
class _Shown(States):
    """A run's states in the shape of its parameter."""

    def __init__(self, states: States, shape: torch.Size) -> None:
        numel = shape.numel()
        super().__init__(
            (name, value.view(shape) if isinstance(value, Tensor) and value.shape == (numel,) else value)
            for name, value in states.items()
        )
        self._states, self._numel = states, numel

    def __setitem__(self, name: str, value: Any) -> None:
        self._states[name] = value.reshape(-1) if isinstance(value, Tensor) and value.numel() == self._numel else value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        del self._states[name]
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """See dict."""
        self._states.pop(name, *default)
        return super().pop(name, *default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """See dict."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def clear(self) -> None:
        """See dict."""
        self._states.clear()
        super().clear()

    def __reduce__(self) -> Any:
        """A copy is a plain one."""
        return dict, (dict(self),)


def _flat(value: Any, run: Tensor) -> Any:
    is_like = isinstance(value, Tensor) and value.dim() > 0 and value.numel() == run.numel()
    return value.reshape(run.shape) if is_like else value
