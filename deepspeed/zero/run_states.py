"""A wrapped optimizer's states, which answer for the model's parameters too: `optimizer.state[param]`.

Installed by `zero.runs` where runs are whole parameters. States are kept by run; scripts, and tests of the 1-bit optimizers
above all, ask by parameter.

Invariant: asking for a parameter's state gives its run's, the same dictionary, and adds no other key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, final

from torch import Tensor


@final
class RunStates(defaultdict[Tensor, dict[str, Any]]):
    """By run; `run_of` finds the run that is a parameter, if there is one."""

    def __init__(self, states: dict[Tensor, dict[str, Any]], run_of: Callable[[object], Tensor | None]) -> None:
        super().__init__(dict, states)
        self._run_of = run_of

    def __missing__(self, key: Tensor) -> dict[str, Any]:
        run = self._run_of(key)
        if run is not None:
            return self[run]
        return super().__missing__(key)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        run = self._run_of(key)
        return run is not None and super().__contains__(run)

    def get(self, key: Any, default: Any = None) -> Any:
        """See dict."""
        if key in self:
            return self[key]
        return default

    def __reduce__(self) -> Any:
        """A copy is a plain one."""
        return defaultdict, (dict,), None, None, iter(self.items())
