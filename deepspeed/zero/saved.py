"""Weights that autograd saved ask for their bucket when a backward reads them.

Used by `zero.hooks` while a module that uses sharded buckets runs. Hooks on a module's outputs see only what is returned:
not a loss kept as an attribute, a closure, a distribution, a feature that somebody's hook took. A saved weight is read
whatever led there, so that is where the bucket is asked for:

    forward    pack: a tensor inside the memory of a bucket in use is kept as `SavedWeight`, any other as it is
    backward   unpack: a `SavedWeight` first has its bucket unsharded (a look at a counter where the output hooks did it)

A view that autograd saved shares the storage of the bucket's `full`, so it is valid again once that is full (Note [Storage
resize and autograd] in `zero.bucket`).

Torch does not count versions of what such hooks keep, so they are compared here, and a tensor that was changed in place
after it was saved is an error as it is without hooks. Hooks that somebody else has put around the call (checkpointing,
`save_on_cpu`) are called from inside of these, in their place. The transforms of `torch.func` refuse to run under any: the
one name that they enter by, `torch.autograd.graph.disable_saved_tensors_hooks`, is therefore replaced while these are up,
by itself without them; what runs inside is reported as unseen.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.saved_hooks import top_saved_hooks

if TYPE_CHECKING:
    from deepspeed.zero.bucket import Bucket

ASKS_ITSELF = "trl.kernels.chunked_logprob"
"""TRL's loss saves the head's weight and gathers it itself in its backward, by the `ds_status` of the parameter. What torch
unpacks from hooks is never the parameter itself, so where this code is loaded there are none, and outputs alone count."""

Hook = Callable[[Any], Any]
Memory = tuple[int, int, "Bucket"]
"""First address, the one after the last, and the bucket whose `full` is there."""


class SavedWeight(NamedTuple):
    """What is kept for a weight that autograd saved: `value` is what the hooks below ours made of it, or the view."""

    value: Any
    bucket: Bucket
    num_updates: int
    """How often the bucket's values had been changed."""


class Hooks(NamedTuple):
    """A pair as torch takes it."""

    pack: Hook
    unpack: Hook


class SavedWeights:
    """The hooks of one model. `ask(bucket)` unshards in a backward; `unseen()` tells of a transform that began."""

    def __init__(self, ask: Callable[[Bucket], None], unseen: Callable[[], None]) -> None:
        self._ask, self._unseen = ask, unseen
        self._memories: list[Memory] = []
        self._own = Hooks(self._pack, self._unpack)
        self._up: list[Hooks | None] = []
        """By running module call: the hooks that it put up, None where those of the call around it serve."""
        self._disable: Any = None

    def enter(self, buckets: list[Bucket]) -> list[Memory]:
        """A module call begins that uses `buckets`; returns what `leave` takes."""
        outer = self._memories
        self._memories = [*map(_memory, buckets), *outer]
        hooks = self._make_hooks() if torch._C._autograd._saved_tensors_hooks_is_enabled() else None  # type: ignore[attr-defined]
        if hooks is not None:
            if not any(self._up):
                self._replace_disable()
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        self._up.append(hooks)
        return outer

    def leave(self, outer: list[Memory]) -> None:
        """The innermost call has ended."""
        self._memories = outer
        if self._up.pop() is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            if not any(self._up):
                torch.autograd.graph.disable_saved_tensors_hooks = self._disable

    def add(self, bucket: Bucket) -> None:
        """The innermost call uses one more bucket."""
        self._memories = [_memory(bucket), *self._memories]

    def _make_hooks(self) -> Hooks | None:
        if ASKS_ITSELF in sys.modules:
            return None
        top = top_saved_hooks()
        if top is None:
            return self._own
        if any(hooks is not None and hooks.pack is top[0] for hooks in self._up):
            return None
        return self._around(*top)

    def _bucket_at(self, tensor: Tensor) -> Bucket | None:
        try:
            address = tensor.data_ptr()
        except (RuntimeError, NotImplementedError):
            return None  # sparse, or a stand-in of a tracer: nothing of a bucket
        for start, stop, bucket in self._memories:
            if start <= address < stop:
                return bucket
        return None

    # The next two run once per tensor that the model saves, each: they call nothing that they can do themselves.

    def _pack(self, tensor: Tensor) -> SavedWeight | tuple[Tensor, int]:
        try:
            address = tensor.data_ptr()
        except (RuntimeError, NotImplementedError):
            return tensor, tensor._version
        for start, stop, bucket in self._memories:
            if start <= address < stop:
                return SavedWeight(tensor, bucket, bucket.num_updates)
        return tensor, tensor._version

    def _unpack(self, saved: Any) -> Tensor:
        if type(saved) is SavedWeight:
            self._read(saved)
            return saved.value
        tensor, version = saved
        if tensor._version != version:
            raise TrainingStateError(
                f"a tensor of shape {tuple(tensor.shape)} that autograd saved for backward has been modified by an inplace "
                f"operation since: it is at version {tensor._version}, expected version {version}.\n"
                "  Use the operation's out-of-place form, or torch.autograd.set_detect_anomaly(True) to find it."
            )
        return tensor

    def _around(self, pack_below: Hook, unpack_below: Hook) -> Hooks:
        """Hooks that keep what those below keep."""

        def pack(tensor: Tensor) -> Any:
            bucket = self._bucket_at(tensor)
            below = pack_below(tensor)
            return (below,) if bucket is None else SavedWeight(below, bucket, bucket.num_updates)

        def unpack(saved: Any) -> Tensor:
            if type(saved) is SavedWeight:
                self._read(saved)
            return unpack_below(saved[0])

        return Hooks(pack, unpack)

    def _read(self, saved: SavedWeight) -> None:
        if saved.num_updates != saved.bucket.num_updates:
            raise TrainingStateError(
                f"a backward needs {saved.bucket.names[0]} and others as they were in its forward, but they have been modified "
                "by an inplace operation since: a step, or a write.\n"
                "  Run backward before engine.step(), and a new forward after it."
            )
        self._ask(saved.bucket)

    def _replace_disable(self) -> None:
        original = self._disable = torch.autograd.graph.disable_saved_tensors_hooks

        @contextlib.contextmanager
        def disable(message: str) -> Iterator[None]:
            with self._lowered(), original(message):
                yield

        torch.autograd.graph.disable_saved_tensors_hooks = disable  # type: ignore[assignment]

    @contextlib.contextmanager
    def _lowered(self) -> Iterator[None]:
        """Without our hooks, for as long as there are none of others above or between them."""
        down = []
        while (hooks := top_saved_hooks()) and self._is_ours(hooks[0]):
            down.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        if down:
            self._unseen()
        try:
            yield
        finally:
            for hooks in reversed(down):
                torch._C._autograd._push_saved_tensors_default_hooks(*hooks)

    def _is_ours(self, pack: Hook) -> bool:
        return any(hooks is not None and hooks.pack == pack for hooks in self._up)


def _memory(bucket: Bucket) -> Memory:
    start = bucket.full.data_ptr()
    return start, start + bucket.full.nbytes, bucket
