"""Named random states: which numbers dropout draws on each model-parallel rank.

Megatron-style models draw dropout of replicated activations from the default state, equal on all model-parallel ranks,
and dropout of sharded ones from a state of their own, which differs between ranks:

    default state          seed
    model-parallel state   seed + 2718 + rank          with get_cuda_rng_tracker().fork(): ...

A checkpoint notes the named states at its forward and restores them for its recomputation (`activation.call`),
as torch does with the default ones. "cuda" is in the names of the contract; the states are the accelerator's.

Invariant: leaving `fork` restores the default state exactly; the named one goes on from where it was.
Source: Megatron-LM (arXiv:1909.08053), section 3; the public contract of the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.activation import settings
from deepspeed.utils.errors import DeepSpeedError

MODEL_PARALLEL = "model-parallel-rng"
"""The name of the state that differs between model-parallel ranks."""

MODEL_PARALLEL_OFFSET = 2718


class CudaRNGStatesTracker:
    """Random states of this rank's device by name. States are never changed in place."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget every state."""
        self.states_.clear()
        self.seeds_.clear()

    def get_states(self) -> dict[str, Tensor]:
        """The states by name; the dict is the caller's."""
        return dict(self.states_)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Replace all states."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """A new state with a seed of its own; the default state stays as it is."""
        if seed in self.seeds_:
            raise DeepSpeedError(
                f"the random seed {seed} is used by another state already.\n  Give each state its own."
            )
        if name in self.states_:
            raise DeepSpeedError(f"the random state {name!r} exists already.\n  Call reset() first to start anew.")
        self.seeds_.add(seed)
        accelerator = get_accelerator()
        before = accelerator.get_rng_state()
        accelerator.manual_seed(seed)
        self.states_[name] = accelerator.get_rng_state()
        accelerator.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from the named state inside. Raises DeepSpeedError for a name that was not added."""
        if name not in self.states_:
            known = ", ".join(map(repr, self.states_)) or "none"
            raise DeepSpeedError(
                f"there is no random state {name!r} (there are: {known}).\n"
                "  Add it with model_parallel_cuda_manual_seed(seed) or get_cuda_rng_tracker().add(name, seed)."
            )
        accelerator = get_accelerator()
        before = accelerator.get_rng_state()
        accelerator.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = accelerator.get_rng_state()
            accelerator.set_rng_state(before)


_tracker = CudaRNGStatesTracker()


_CUDA_RNG_STATE_TRACKER, _MODEL_PARALLEL_RNG_TRACKER_NAME = _tracker, MODEL_PARALLEL
"""Under these names scripts reach for them."""


def _set_cuda_rng_state(new_state: Tensor, device: Any = -1) -> None:
    """Set the random state of a device; of the current one for -1."""
    get_accelerator().set_rng_state(new_state, None if device == -1 else device)


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The tracker of this process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default state with `seed`, and a fresh model-parallel state with `seed + 2718 + rank`.

    The rank is the model-parallel one that `configure` was told. Forgets all named states.
    """
    _tracker.reset()
    get_accelerator().manual_seed(seed)
    _tracker.add(MODEL_PARALLEL, seed + MODEL_PARALLEL_OFFSET + settings.current().ranks.rank)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed the existing model-parallel state anew, with `seed + 2718 + rank`."""
    with _tracker.fork():
        get_accelerator().manual_seed(seed + MODEL_PARALLEL_OFFSET + settings.current().ranks.rank)


@contextlib.contextmanager
def restored(states: Mapping[str, Any]) -> Iterator[None]:
    """Have the named states be `states` inside, and afterwards what they were."""
    before = _tracker.get_states()
    _tracker.set_states(states)
    try:
        yield
    finally:
        _tracker.set_states(before)
