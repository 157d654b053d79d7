"""Where ZeRO touches the user's modules and graphs: the hooks that drive the gatherer, and the watch on backward.

Attached by the engine, at stage 3 to the modules that use sharded buckets (`ModuleHooks`), at every stage to the
outputs of the model (`BackwardWatch`). Nothing of the user's is replaced; `detach` takes every hook away.

    pre-forward    request the module's buckets            (opens a forward phase if none is running)
    post-forward   release them; hook the outputs          (closes the phase it opened)
    output hook    request the buckets before their backward (opens the backward phase)
    saved weight   the same, for a backward that reaches a module by another way than its outputs (`SavedWeights`)
    gradient       the same, for parameters whose gradient may need no saved weight: those that only meet inputs, and own modules'
    input hook     frozen buckets: their backward is over
    bucket full    trainable buckets: their backward is over (from the reducer)
    end of backward   release what is left, close the phase

What a transform of `torch.func` ran, and what a backward with `create_graph=True` read, may be read again in ways that
nothing here sees: those buckets stay unsharded until the step (`_keep`).

Hooks on outputs see only what is returned: not a loss kept as an attribute, a closure, a distribution, a feature that
somebody's hook took. A saved weight is read whatever led there, so that is where the bucket is asked for:

    forward    pack: a tensor inside the memory of a bucket in use is kept as `SavedWeight`, any other as it is
    backward   unpack: a `SavedWeight` first has its bucket unsharded (a look at a counter where the output hooks did it)

A view that autograd saved shares the storage of the bucket's `full`, so it is valid again once that is full (Note [Storage
resize and autograd] in `zero.bucket`). Torch does not count versions of what such hooks keep, so they are compared here, and a
tensor that was changed in place after it was saved is an error as it is without hooks. Hooks that somebody else has put around
the call (checkpointing, `save_on_cpu`) are called from inside of these, in their place.

A sharded parameter that is used outside its own module (a tied head, a functional call) is gathered at that use, while
a hooked module runs, and belongs to that module from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepspeed.utils import compiler
from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.logging import warn_once
from deepspeed.utils.saved_hooks import SavedHook, SavedHooks, lower_for_transforms, top_saved_hooks
from deepspeed.zero import functions
from deepspeed.zero import param as zero_param
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gather import Gatherer, PhaseKind, RankLeftError
from deepspeed.zero.modes import AS_IT_IS, in_transform, plain_modes
from deepspeed.zero.param import Slot, slot_of

Handle = torch.utils.hooks.RemovableHandle
_WANTS_GRADIENT = operator.attrgetter("requires_grad")

ASKS_ITSELF = "trl.kernels.chunked_logprob"
"""TRL's loss saves the head's weight and gathers it itself in its backward, by the `ds_status` of the parameter. What torch
unpacks from hooks is never the parameter itself, so where this code is loaded there are none, and outputs alone count."""

Memory = tuple[int, int, Bucket]
"""First address, the one after the last, and the bucket whose `full` is there."""


def _plain() -> AbstractContextManager[None]:
    """`plain_modes`, which is not entered where there is nothing to leave: at nearly every module."""
    return plain_modes() if torch.is_inference_mode_enabled() or in_transform() else AS_IT_IS


def _differentiates(args: tuple[Any, ...]) -> bool:
    """Whether one of the arguments is a tensor that requires a gradient, as nearly always the first is."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in args)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses (which pytree alone does not open)."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif not isinstance(leaf, (str, bytes, int, float, type(None))) and isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
    return found


class BackwardWatch:
    """Tells when a backward pass that involves the model begins and ends, also with plain `loss.backward()`."""

    def __init__(self) -> None:
        self.is_running = False
        self.num_begun = 0
        """Passes seen so far."""
        self.on_begin: list[Callable[[], None]] = []
        self.on_end: list[Callable[[], None]] = []

    def watch(self, outputs: Any) -> None:
        """Have the first gradient that reaches one of the outputs begin a pass."""
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a pass, if none is running. Only inside of autograd's backward."""
        if not self.is_running:
            self.is_running = True
            self.num_begun += 1
            torch.autograd.Variable._execution_engine.queue_callback(self.end)
            for listener in self.on_begin:
                listener()

    def stand_in(self) -> None:
        """Begin and end a pass that reached nothing of the model here, for the ranks whose pass does. Outside of autograd."""
        for listener in [*self.on_begin, *self.on_end]:
            listener()

    def end(self) -> None:
        """End the pass that is running, if any; called by autograd, and before a forward or step after a failure."""
        if self.is_running:
            self.is_running = False
            for listener in self.on_end:
                listener()


# What autograd saved. -------------------------------------------------------------------------------------------------


class SavedWeight(NamedTuple):
    """What is kept for a weight that autograd saved: `value` is what the hooks below ours made of it, or the view."""

    value: Any
    bucket: Bucket
    num_updates: int
    """How often the bucket's values had been changed."""


class SavedWeights:
    """The hooks of one model. `ask(bucket)` unshards in a backward; `unseen()` tells of a transform that began.

    Without `ask`, as around what a script computes of parameters that it has gathered, what is saved keeps the memory that it is in.
    """

    def __init__(self, ask: Callable[[Bucket], None] | None, unseen: Callable[[], None]) -> None:
        self._ask, self._unseen = ask, unseen
        self._memories: list[Memory] = []
        self._own: SavedHooks = (self._pack, self._unpack) if ask else (self._pack_view, self._unpack_view)
        self._up: list[SavedHooks | None] = []
        """By running module call: the hooks that it put up, None where those of the call around it serve."""
        self._restore: Callable[[], None] = _do_nothing

    def enter(self, buckets: list[Bucket]) -> list[Memory]:
        """A module call begins that uses `buckets`; returns what `leave` takes."""
        outer = self._memories
        self._memories = [*map(_memory, buckets), *outer]
        hooks = self._make_hooks() if torch._C._autograd._saved_tensors_hooks_is_enabled() else None  # type: ignore[attr-defined]
        if hooks is not None:
            if not any(self._up):
                self._restore = lower_for_transforms(self._is_ours, self._unseen)
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        self._up.append(hooks)
        return outer

    def leave(self, outer: list[Memory]) -> None:
        """The innermost call has ended."""
        self._memories = outer
        if self._up.pop() is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            if not any(self._up):
                self._restore()

    def add(self, bucket: Bucket) -> None:
        """The innermost call uses one more bucket."""
        self._memories = [_memory(bucket), *self._memories]

    def _make_hooks(self) -> SavedHooks | None:
        if ASKS_ITSELF in sys.modules:
            return None
        top = top_saved_hooks()
        if top is None:
            return self._own
        if any(hooks is not None and hooks[0] is top[0] for hooks in self._up):
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

    def _pack_view(self, tensor: Tensor) -> Any:
        """Autograd saves a leaf itself, which is empty when its bucket is resharded."""
        saved, view = self._pack(tensor), Tensor.detach(tensor)
        return saved._replace(value=(view, view._version)) if isinstance(saved, SavedWeight) else saved

    def _unpack_view(self, saved: Any) -> Tensor:
        if isinstance(saved, SavedWeight):
            self._read(saved)
        return self._unpack(saved.value if isinstance(saved, SavedWeight) else saved)

    def _around(self, pack_below: SavedHook, unpack_below: SavedHook) -> SavedHooks:
        """Hooks that keep what those below keep."""

        def pack(tensor: Tensor) -> Any:
            bucket = self._bucket_at(tensor)
            below = pack_below(tensor if bucket is None or self._ask else Tensor.detach(tensor))
            return (below,) if bucket is None else SavedWeight(below, bucket, bucket.num_updates)

        def unpack(saved: Any) -> Tensor:
            if type(saved) is SavedWeight:
                self._read(saved)
            return unpack_below(saved[0])

        return pack, unpack

    def _read(self, saved: SavedWeight) -> None:
        if saved.num_updates != saved.bucket.num_updates:
            raise TrainingStateError(
                f"a backward needs {saved.bucket.names[0]} and others as they were in its forward, but they have been modified "
                "by an inplace operation since: a step, or a write.\n"
                "  Run backward before engine.step(), and a new forward after it."
            )
        if self._ask is not None:
            self._ask(saved.bucket)

    def _is_ours(self, pack: SavedHook) -> bool:
        return any(hooks is not None and hooks[0] == pack for hooks in self._up)


def _memory(bucket: Bucket) -> Memory:
    start = bucket.full.data_ptr()
    return start, start + bucket.full.nbytes, bucket


# What modules use. ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Frame:
    """One call of a hooked module, from its forward to the end of its backward."""

    module: nn.Module
    buckets: list[Bucket]
    opened_phase: bool
    own: dict[Bucket, list[nn.Parameter]] = dataclasses.field(default_factory=dict)
    """Parameters in those of the buckets that are held for these alone."""
    outer: list[Memory] | None = None
    """What `SavedWeights.leave` takes; None for a call that records no graph."""
    error: BaseException | None = None
    """What was being handled when the call began, where errors are told."""
    is_unseen: bool = False
    """Whether a transform of `torch.func` ran in or around the call, whose backward asks for nothing."""


def _params_inside(module: nn.Module, buckets: Iterable[Bucket]) -> dict[Bucket, list[nn.Parameter]]:
    """The parameters of a module and those inside, by bucket; of those of `buckets` that have others beside them."""
    inside: dict[Bucket, list[nn.Parameter]] = {bucket: [] for bucket in buckets if bucket.is_sharded}
    for param in module.parameters():
        slot = slot_of(param)
        if slot is not None and slot.bucket in inside:
            inside[slot.bucket].append(param)
    return {bucket: params for bucket, params in inside.items() if 0 < len(params) < len(bucket.params)}


def _of_several(root: nn.Module) -> set[Bucket]:
    """The buckets of parameters that several modules have."""
    seen: set[nn.Parameter] = set()
    found: set[Bucket] = set()
    for module in root.modules():
        for param in module._parameters.values():
            slot = None if param is None else slot_of(param)
            if param in seen and slot is not None:
                found.add(slot.bucket)
            elif param is not None:
                seen.add(param)
    return found


class ModuleHook(functools.partial[None]):
    """A hook that stays behind: a module that is copied or pickled takes one along that does nothing."""

    def __reduce__(self) -> Any:
        return ModuleHook, (_do_nothing,)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """What the hooks of a copied module do."""


def _leave(gatherer: Gatherer) -> None:
    """End the phase that an error ends here; the others' ends with a RankLeftError."""
    with contextlib.suppress(RankLeftError):
        gatherer.end(has_left=True)


def abandon(hooks: ModuleHooks) -> None:
    """End calls that an error has left without their hooks (KeyboardInterrupt), if any. Collective then."""
    while hooks._frames:
        frame = hooks._frames.pop()
        if frame.outer is not None:
            hooks._saved.leave(frame.outer)
        for bucket in frame.buckets:
            hooks.gatherer.release(bucket, frame.own.pop(bucket, None))
    with _plain():
        _leave(hooks.gatherer)


class ModuleHooks:
    """The hooks of one model at stage 3. `users[module]` are the buckets whose parameters the module uses itself."""

    def __init__(
        self, root: nn.Module, users: Mapping[nn.Module, Sequence[Bucket]], gatherer: Gatherer, watch: BackwardWatch
    ):
        self.root = root
        self.gatherer = gatherer
        self.watch = watch
        self.users = {module: list(buckets) for module, buckets in users.items()}
        self.users.setdefault(root, [])
        self._inside: dict[nn.Module, dict[Bucket, list[nn.Parameter]]] = {}
        """What of `users[module]` a call of the module holds for itself: a bucket may be of many small modules."""
        self._names = {module: name for name, module in root.named_modules()}
        self._frames: list[Frame] = []
        self._held: dict[Bucket, set[Frame | None]] = {}
        """Buckets that this backward has requested and not released, with the calls that still need them: one bucket may
        serve modules whose backward passes overlap, such as the projections of an attention."""
        self._shared: set[Bucket] = set()
        """Buckets with a parameter that several modules have: see `bucket_completed`."""
        self._kept: set[Bucket] = set()
        """Buckets that stay unsharded until the step."""
        self.tells_errors = False
        """Whether a phase that an error ends here ends with a RankLeftError on the other ranks."""
        self._makes_graph = False
        """Whether the running backward has `create_graph=True`."""
        self._saved = SavedWeights(self._read_saved, self._mark_unseen)
        self._first: set[nn.Module] = set()
        """Modules that were called with nothing to differentiate: see `_ask_at_gradients`."""
        self._asking: dict[nn.Parameter, Handle] = {}
        self.handles: list[Handle] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks in place."""
        self.attach_to_modules()
        self.watch.on_begin.append(self._begin_backward)
        self.watch.on_end.append(self._end_backward)
        zero_param.add_resolver(self._resolve)
        functions.attach(self)
        for bucket in self.gatherer.buckets:
            bucket.use_around = functools.partial(self.use_around, bucket)

    def attach_to_modules(self) -> None:
        """Put the hooks on the modules; once, whether they are there or not."""
        self._detach_from_modules()
        for module in self.users:
            self._attach_to(module)
        for module in self.root.modules():
            if not type(module).__module__.startswith("torch.nn"):
                self._ask_at_gradients(module.parameters(recurse=False))
        self._shared |= _of_several(self.root)

    def _detach_from_modules(self) -> None:
        for handle in (*self.handles, *self._asking.values()):
            handle.remove()
        self.handles.clear()
        self._asking.clear()
        self._first.clear()

    def _ask_at_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Have parameters unsharded when their gradient arrives, whatever led there. Autograd saves a weight for the gradient of
        what it meets, not for its own: of a first layer, and of what is only added, nothing would ask."""
        for param in params:
            slot = slot_of(param)
            if slot is not None and slot.bucket.is_sharded and param.requires_grad and param not in self._asking:
                self._asking[param] = param.register_hook(functools.partial(self._before_gradient, slot))

    def _before_gradient(self, slot: Slot, gradient: Tensor) -> None:
        self._read_saved(slot.bucket)

    def detach(self) -> None:
        """Take every hook away; parameters stay as they are."""
        self._detach_from_modules()
        zero_param.remove_resolver(self._resolve)
        functions.detach(self)
        for bucket in self.gatherer.buckets:
            bucket.use_around = None
        for listeners, listener in (
            (self.watch.on_begin, self._begin_backward),
            (self.watch.on_end, self._end_backward),
        ):
            if listener in listeners:
                listeners.remove(listener)

    def add_user(self, module: nn.Module, bucket: Bucket) -> None:
        """Have `bucket` unsharded around every call of `module` from now on."""
        if module not in self.users:
            self.users[module] = []
            self._attach_to(module)
        if bucket not in self.users[module]:
            self.users[module].append(bucket)

    def divide(self, old: Bucket, new: Bucket) -> None:
        """Some parameters of `old` are in `new` now: whoever uses the one uses the other too."""
        self.gatherer.add(new)
        if old in self._shared:
            self._shared.add(new)
        new.use_around = functools.partial(self.use_around, new)
        asking = [param for param in new.params if param in self._asking]
        for param in asking:
            self._asking.pop(param).remove()
        self._ask_at_gradients(asking)
        for module, buckets in self.users.items():
            if old in buckets:
                self.users[module] = [bucket for bucket in buckets if bucket is not old or old.params] + [new]
                self._inside[module] = _params_inside(module, self.users[module])

    def use_around(self, bucket: Bucket, module: nn.Module | None, is_used: bool = True) -> None:
        """A script says that `module` uses `bucket`, from the call that is running on, or that it does no more; None for the
        script's own code, in a gather context, whose backward may reach it by no module's outputs."""
        if module is None:
            self._ask_at_gradients(bucket.params)
            return
        if not is_used:
            self.users[module].remove(bucket)
            return
        self.add_user(module, bucket)
        if self._frames and bucket not in self._frames[-1].buckets:
            with plain_modes():
                self.gatherer.request(bucket)
            self._use_in(self._frames[-1], bucket)

    def _attach_to(self, module: nn.Module) -> None:
        self._inside[module] = _params_inside(module, self.users[module])
        self.handles += [
            module.register_forward_pre_hook(ModuleHook(self._pre_forward), prepend=True, with_kwargs=True),
            module.register_forward_hook(ModuleHook(self._post_forward), always_call=True),
        ]

    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # a graph that held our work would not unshard anything
            compiler.hidden(self._pre_forward)(module, args, kwargs)
            return
        opens = not self.gatherer.in_phase
        if opens:
            self.watch.end()
            kind = PhaseKind.FORWARD if torch.is_grad_enabled() else PhaseKind.INFERENCE
            with _plain():  # it prefetches
                self.gatherer.begin(kind, self._names.get(module, ""))
        is_unseen = in_transform()
        frame = Frame(module, list(self.users[module]), opens, own=dict(self._inside[module]), is_unseen=is_unseen)
        if self.tells_errors:
            frame.error = sys.exc_info()[1]
        self._frames.append(frame)
        with _plain():
            for bucket in frame.buckets:
                self.gatherer.request(bucket, frame.own.get(bucket))
        if torch.is_grad_enabled():
            if frame.buckets and module not in self._first and not _differentiates(args):
                self._see_first(module, (args, kwargs))
            self._watch_frozen(frame, (args, kwargs))
            frame.outer = self._saved.enter(frame.buckets)

    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            compiler.hidden(self._post_forward)(module, args, output)
            return
        if not self._frames or self._frames[-1].module is not module:
            return  # the module was given its hooks while this call ran (`use_around`)
        frame = self._frames.pop()
        if frame.outer is not None:
            self._saved.leave(frame.outer)
        kept: list[Bucket] = []
        if frame.is_unseen:
            self._keep(frame.buckets)
        else:
            kept = self._hand_on_views(frame, output)
        is_watched = torch.is_grad_enabled() and not frame.is_unseen
        if is_watched and frame.buckets:
            self._hook_outputs(frame, output)
            if self.watch.is_running:
                # Recomputed in backward (checkpointing): autograd keeps frozen parameters themselves, not views of them,
                # and compares their shapes when the recomputation ends. Their own backward comes right after it.
                self._hold([bucket for bucket in frame.buckets if not bucket.requires_grad], frame)
        if is_watched and frame.module is self.root:
            self.watch.watch(output)
        for bucket in frame.buckets:
            if bucket not in kept:
                self.gatherer.release(bucket, frame.own.pop(bucket, None))
        if frame.opened_phase:
            with _plain():  # it may gather for ranks that are not done
                if self.tells_errors and sys.exc_info()[1] is not frame.error:
                    _leave(self.gatherer)
                else:
                    self.gatherer.end()

    def _hand_on_views(self, frame: Frame, output: Any) -> list[Bucket]:
        """A module may return a piece of its parameter (`self.weight[:n]`), which is used after it. Then the calling module
        needs the bucket too, in forward and backward; where nobody calls, the returned piece keeps the memory it is in."""
        storages = {tensor.untyped_storage()._cdata for tensor in tensors_in(output)} if frame.buckets else set()
        kept = [bucket for bucket in frame.buckets if bucket.full.untyped_storage()._cdata in storages]
        for bucket in kept:
            bucket.hold()
            bucket.unhold(frame.own.pop(bucket, None))
            if self._frames:
                self._use_in(self._frames[-1], bucket)
            else:
                self.gatherer.release(bucket)
                if bucket.holders == 0:
                    bucket.leave_full()
                    self.gatherer.drop(bucket)
        return kept

    def _use_in(self, frame: Frame, bucket: Bucket) -> None:
        """The innermost call uses a bucket that it holds and had not asked for."""
        frame.buckets.append(bucket)
        if frame.outer is not None:
            self._saved.add(bucket)

    def _hook_outputs(self, frame: Frame, output: Any) -> None:
        def before_backward(gradient: Tensor) -> None:
            self.watch.begin()
            self._hold(frame.buckets, frame)

        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(before_backward)

    def _see_first(self, module: nn.Module, inputs: Any) -> None:
        if not any(tensor.requires_grad for tensor in tensors_in(inputs)):
            self._first.add(module)
            self._ask_at_gradients(module.parameters())

    def _watch_frozen(self, frame: Frame, inputs: Any) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # sharded ones would ask themselves what may be asked
            frozen = [bucket for bucket in frame.buckets if not any(map(_WANTS_GRADIENT, bucket.params))]
        tensors = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad] if frozen else []
        count = len(tensors)
        waits_for = set(range(count))

        # Not torch's register_multi_grad_hook: its hooks hold the nodes that hold them, and the model is never freed.
        # For the same reason this one must not mention `tensors`.
        def seen(i: int, gradient: Tensor) -> None:
            waits_for.discard(i)
            if not waits_for:
                waits_for.update(range(count))
                self._unhold(frozen, frame)

        for i, tensor in enumerate(tensors):
            tensor.register_hook(functools.partial(seen, i))

    def _read_saved(self, bucket: Bucket) -> None:
        """A node reads a weight that it saved."""
        if bucket.holders and bucket.is_unsharded:
            return
        if torch._C._current_graph_task_id() == -1:  # somebody looks at a node's `_saved_...`
            self.gatherer.request(bucket)
            self.gatherer.release(bucket)
        else:
            self.watch.begin()
            self._hold([bucket], None)

    def _mark_unseen(self) -> None:
        """A transform begins: what the running calls do in it cannot be seen."""
        for frame in self._frames:
            frame.is_unseen = True

    def keep_until_step(self, buckets: Iterable[Bucket]) -> None:
        """Have buckets unsharded until the step. Outside of a phase: the same ones, in one order, on every rank."""
        with plain_modes():
            for bucket in buckets:
                if bucket not in self._kept:
                    self._kept.add(bucket)
                    self.gatherer.request(bucket)

    def _keep(self, buckets: Iterable[Bucket]) -> None:
        self.keep_until_step(buckets)
        warn_once(
            "a second derivative (create_graph=True), a transform of torch.func, or a submodule called on its own: the "
            "parameters that it uses stay whole on every rank until engine.step()."
        )

    def before_update(self) -> None:
        """The backward is over, and no unsharded copy may outlive the change of the shards."""
        self.watch.end()
        for bucket in self._kept:
            self.gatherer.release(bucket)
        self._kept.clear()
        self.gatherer.reshard_all()
        for bucket in self.gatherer.buckets:
            bucket.shard_changed()

    def _hold(self, buckets: Iterable[Bucket], frame: Frame | None) -> None:
        for bucket in buckets:
            if bucket not in self._held:
                self._held[bucket] = set()
                self.gatherer.request(bucket)
            self._held[bucket].add(frame)

    def _unhold(self, buckets: Iterable[Bucket], frame: Frame | None = None) -> None:
        """The backward of one call (or of all) needs the buckets no more; a graph that it made does."""
        for bucket in () if self._makes_graph else buckets:
            calls = self._held.get(bucket, set())
            if frame is not None:
                calls.discard(frame)
            if bucket in self._held and (frame is None or not calls):
                del self._held[bucket]
                self.gatherer.release(bucket)
                self.gatherer.drop(bucket)

    def bucket_completed(self, bucket: Bucket) -> None:
        """All gradients of a bucket have been computed: its parameters are not needed any more. Unless a tile of a tied head gave
        its own in a backward of its own, and the embedding's, for which autograd asks the parameter's shape, is to come."""
        if bucket not in self._shared:
            self._unhold([bucket])

    def _begin_backward(self) -> None:
        self._makes_graph = torch.is_grad_enabled()
        if not self.gatherer.in_phase:
            self.gatherer.begin(PhaseKind.BACKWARD)

    def _end_backward(self) -> None:
        if self._makes_graph:
            self._keep(self._held)
            self._makes_graph = False
        self._unhold(list(self._held))
        if not self._frames:
            self.gatherer.end()

    def _resolve(self, bucket: Bucket, func: Callable[..., Any]) -> bool:
        """Gather a bucket for a use outside its own modules, if one of our modules is running."""
        if bucket not in self.gatherer.buckets:
            return False
        if not self._frames:
            return self._resolve_inside(bucket)
        frame = self._frames[-1]
        with plain_modes():
            self.gatherer.request(bucket)
        self._use_in(frame, bucket)
        self.add_user(frame.module, bucket)
        return True

    def _resolve_inside(self, bucket: Bucket) -> bool:
        """Gather a bucket for a module that is called on its own and shares it with others: a generator or a closure that
        the model returned goes on after the forward."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") in self._names:
                break
            frame = frame.f_back
        if frame is None:
            return False
        if torch.is_grad_enabled():
            self._keep([bucket])
        else:
            self.gatherer.request(bucket)
            self.gatherer.release(bucket)
        return True
