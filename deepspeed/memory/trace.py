"""One training step of a model as a list of what happens to memory, without memory: traced on fake tensors.

Called by the estimator and the recomputation budget; calls the model. A copy of the model with fake parameters (shapes
and dtypes, no values) runs forward and backward under a mode that sees every storage come and go. What ZeRO adds depends
on the stage and is not in here: the trace marks the places where the engine acts (a module begins, a gradient is ready),
and `memory.replay` plays an engine to it. So one trace serves every stage and offload.

    ALLOCATE i n, FREE i       storage i of n bytes; parameters' own storages are left out
    ENTER m, LEAVE m           module m's call
    OUTPUT m, INPUT m          the gradient has reached m's outputs; has left m's inputs
    GRADIENT p n               parameter p's gradient of n bytes is complete, and handed over
    FORWARD, BACKWARD, END     phases

Invariant: what is traced is the user's own code and torch's own autograd, dispatched as for a CPU. Kernels' private
scratch is not seen. Attention is traced as torch's fused kernel where the CPU has one for the call; a device with the
same kernel keeps the same tensors. Source: torch's FakeTensorMode; the way of watching storages is that of
torch.distributed._tools.mem_tracker.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deepspeed.activation.blocks import Recompute, blocks_of
from deepspeed.comm.recorder import Current
from deepspeed.parallel.sequence.tile_hf import is_tiled
from deepspeed.precision import Widening, needs_wide_matmul
from deepspeed.profiling.counter import OpCounter, StepFlops
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.hooks import tensors_in
from deepspeed.zero.param import full_shape


class What(enum.Enum):
    """What happened; see the module's text."""

    ALLOCATE = "allocate"
    FREE = "free"
    ENTER = "enter"
    LEAVE = "leave"
    OUTPUT = "output"
    INPUT = "input"
    GRADIENT = "gradient"
    FORWARD = "forward"
    BACKWARD = "backward"
    END = "end"


class Event(NamedTuple):
    """One thing that happened, to the storage, module or parameter of this number."""

    what: What
    number: int = -1
    nbytes: int = 0


class Message(NamedTuple):
    """What a layer sends to the ranks that share it, behind so many events."""

    op: str
    nbytes: int
    at: int


@dataclass
class Trace:
    """The events of one micro-batch, and the fake model they happened in."""

    model: nn.Module
    events: list[Event] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    flops: StepFlops = field(default_factory=StepFlops)
    """Operations of the micro-batch, by phase."""
    messages: list[Message] = field(default_factory=list)
    """In the order in which layers send them."""
    origin: str = ""
    """The file and line in the model's code, or the module, that the largest storage at the activations' peak is from."""


class TraceError(DeepSpeedError, RuntimeError):
    """The model cannot be run without values."""


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model (plain, meta or under ZeRO) whose tensors have shapes only; floating parameters in `dtype`."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        kind = dtype if dtype is not None and param.is_floating_point() else param.dtype
        memo[id(param)] = nn.Parameter(_empty(mode, full_shape(param), kind), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _empty(mode, buffer.shape, buffer.dtype)
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        if not is_tiled(module.__dict__.get("forward")):
            module.__dict__.pop("forward", None)
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return made


def _empty(mode: FakeTensorMode, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


def trace_step(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    autocast: torch.dtype | None = None,
    plan: list[Recompute] | Recompute = Recompute.NONE,
    prepare: Callable[[nn.Module], None] | None = None,
    loss_of: Callable[[Any], Tensor] | None = None,
) -> Trace:
    """Trace forward and backward of a micro-batch. `args`, `kwargs`: tensors count by shape and dtype.

    plan: what blocks recompute. prepare: called with the fake copy before it runs. loss_of: from the model's output to
    the scalar that is differentiated; by default the first floating scalar in it, or else its floating tensors' sum.
    Raises TraceError where the model looks at values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = fake_copy(model, mode, dtype)
    if prepare is not None:
        prepare(skeleton)
    if plan is not Recompute.NONE:
        blocks = blocks_of(skeleton)
        blocks.apply([plan] * len(blocks.blocks) if isinstance(plan, Recompute) else plan)
    inputs = tree_map_only(Tensor, lambda t: _input_like(t, mode, dtype), (args, dict(kwargs)))
    widens = device_type == "cpu" and needs_wide_matmul(dtype)
    recorder = Recorder(skeleton)
    # Not before the recorder's hooks: these are the engine's, which run inside of the widening's.
    Widening(skeleton.modules() if widens else ())
    try:
        with mode, OpCounter(recorder.trace.flops.add), recorder, torch.enable_grad():
            recorder.note(What.FORWARD)
            for tensor in tree_leaves(inputs):
                if isinstance(tensor, Tensor):
                    recorder.see(tensor)
            with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
                output = skeleton(*inputs[0], **inputs[1])
            loss = (loss_of or default_loss)(output)
            del output
            recorder.note(What.BACKWARD)
            loss.backward()
            recorder.note(What.END)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise TraceError(
            f"{type(model).__name__} looks at values ({error}), which a prediction does not have.\n"
            "  Estimate a part of the model that does not, or leave out what branches on data (masks, expert choice)."
        ) from error
    finally:
        recorder.detach()
    return recorder.trace


def default_loss(output: Any) -> Tensor:
    """What of an output is differentiated: its floating scalar named or placed first, or the mean of what requires grad."""
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
    scalars = [tensor for tensor in tensors if tensor.numel() == 1]
    if scalars:
        return scalars[0].reshape(())
    if not tensors:
        raise TraceError(
            "the model's output has no floating tensor that requires grad, so there is nothing to differentiate.\n"
            "  Give a batch with targets, or loss_of=, and check that some parameters train."
        )
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum()


def _input_like(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    lowers = tensor.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    made = _empty(mode, tensor.shape, dtype if lowers else tensor.dtype)
    return made.requires_grad_(tensor.requires_grad)


class Recorder(TorchDispatchMode):
    """Writes the trace while it is on. Weak references tell when storages go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace(model, modules=list(model.modules()), params=list(model.parameters()))
        self._live: dict[int, Any] = {}
        self._num_storages = 0
        self._own = {param.untyped_storage()._cdata for param in (*model.parameters(), *model.buffers())}
        self._handles: list[Any] = []
        self._before: Callable[[str, int], None] | None = None
        self._attach()

    def note(self, what: What, index: int = -1, nbytes: int = 0) -> None:
        """Add an event."""
        self.trace.events.append(Event(what, index, nbytes))

    def __enter__(self) -> Recorder:
        self._before, Current.predicted = Current.predicted, self._send
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        Current.predicted = self._before

    def _send(self, op: str, nbytes: int) -> None:
        self.trace.messages.append(Message(op, nbytes, len(self.trace.events)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = _run(func, args, kwargs or {})
        for leaf in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(leaf, Tensor):
                self.see(leaf)
            elif isinstance(leaf, (tuple, list)):
                for inner in leaf:
                    if isinstance(inner, Tensor):
                        self.see(inner)
        return output

    def see(self, tensor: Tensor) -> None:
        """Note a storage, the first time."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._own:
            return
        index, self._num_storages = self._num_storages, self._num_storages + 1
        nbytes = storage.nbytes()
        self.note(What.ALLOCATE, index, nbytes)
        self._live[key] = weakref.ref(storage, functools.partial(self._gone, key, index, nbytes))

    def _gone(self, key: int, index: int, nbytes: int, reference: Any) -> None:
        if self._live.pop(key, None) is not None:
            self.note(What.FREE, index, nbytes)

    def _attach(self) -> None:
        for index, module in enumerate(self.trace.modules):
            has_frozen = any(not param.requires_grad for param in module.parameters(recurse=False))
            self._handles += [
                module.register_forward_pre_hook(
                    functools.partial(self._enter, index, has_frozen), prepend=True, with_kwargs=True
                ),
                module.register_forward_hook(functools.partial(self._leave, index), always_call=True),
            ]
        for index, param in enumerate(self.trace.params):
            if param.requires_grad:
                self._handles.append(
                    param.register_post_accumulate_grad_hook(functools.partial(self._take_gradient, index))
                )

    def _enter(self, index: int, has_frozen: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.note(What.ENTER, index)
        if has_frozen and torch.is_grad_enabled():
            tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
            if tensors:
                torch.autograd.graph.register_multi_grad_hook(tensors, lambda _: self.note(What.INPUT, index))

    def _leave(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(self._reach_output, index))
        self.note(What.LEAVE, index)

    def _reach_output(self, index: int, gradient: Tensor) -> None:
        self.note(What.OUTPUT, index)

    def _take_gradient(self, index: int, param: nn.Parameter) -> None:
        assert param.grad is not None
        nbytes = param.grad.numel() * param.grad.element_size()
        # Handed over: freed here (unless somebody else holds it) and counted by whoever replays from now on.
        param.grad = None
        self.note(What.GRADIENT, index, nbytes)

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._live.clear()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator. Products in groups have shapes in bf16 alone (torch 2.13), and are run in other dtypes too."""
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
        low = tree_map_only(Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, args)
        return func(*low, **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def own_memory(trace: Trace) -> Iterator[int]:
    """Bytes that the model's computation alone has live, after each event: activations, gradients of a moment."""
    live = 0
    for event in trace.events:
        if event.what is What.ALLOCATE:
            live += event.nbytes
        elif event.what is What.FREE:
            live -= event.nbytes
        yield live
