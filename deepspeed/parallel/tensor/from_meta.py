"""Values for a model on the meta device while its layers are cut: no rank ever has the whole.

Called by `apply.carry_out` for the engine. Values are drawn by the modules' own initialisation, in the order of
`nn.Module.apply` (children first): `_init_weights` of the model of Transformers around a module, else `reset_parameters` and then
`_init_weights` of whatever is around it. A first pass, on meta, sees which module writes which tensor:

    writers     c_proj.weight: c_proj, attn      (GPT-2 draws it again from around it)
    fill        memory before its first writer's turn, cut and given up after its last one's

Invariant: the modules draw the same numbers in the same order as on a model that is whole, so that parts are those of
one that is given memory whole and initialised with the same seed, whatever the number of ranks. The first rank's numbers hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.utils.errors import DeepSpeedConfigError

_CURE = "  Load or initialise the model first, or build it under deepspeed.zero.Init(), which meets values that constructors make."


@dataclass
class _Turn:
    """One module's turn to write values."""

    name: str
    module: nn.Module
    run: Callable[[], None]
    writes: dict[Tensor, None] = field(default_factory=dict)
    shared: dict[str, torch.Size] = field(default_factory=dict)
    """Its parameters that a module before it has too, whose values hold, with their whole shapes."""


def is_on_meta(model: nn.Module) -> bool:
    """Whether parameters have no values. Raises DeepSpeedConfigError where some have and some have not."""
    named = dict(model.named_parameters())
    empty = [name for name, param in named.items() if param.is_meta]
    if empty and len(empty) < len(named):
        filled = next(name for name in named if name not in empty)
        raise DeepSpeedConfigError(
            f"{empty[0]} has no values (it is on the meta device), and {filled} has: layers are cut of all or of none.\n{_CURE}"
        )
    return bool(empty)


@torch.no_grad()
def fill(model: nn.Module, finish: Callable[[nn.Parameter], None]) -> None:
    """Give every tensor of a model on meta its values; `finish` gets each parameter once it has all of them, to leave a part.

    At most the parameters that a module writes, or several modules around each other, are whole at a time. Every rank draws. Raises
    DeepSpeedConfigError, before anything is changed, for what no module gives a value.
    """
    turns = _turns(model)
    last = {tensor: turn for turn in turns for tensor in turn.writes}
    for turn in turns:
        for tensor in turn.writes:
            if tensor.is_meta:
                _allocate(tensor)
        with _apart(turn):
            turn.run()
        for tensor in turn.writes:
            if last[tensor] is turn and isinstance(tensor, nn.Parameter):
                finish(tensor)


def _turns(model: nn.Module) -> list[_Turn]:
    turns = list(_in_order(model, "", None))
    names: dict[Tensor, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(tensor, name)
    _check_kinds(turns, names)
    owner: dict[Tensor, _Turn] = {}
    written: dict[Tensor, int] = dict.fromkeys(names, 0)
    for turn in turns:
        for key, param in turn.module._parameters.items():
            if param is not None and owner.setdefault(param, turn) is not turn:
                turn.shared[key] = param.shape
        with (
            torch.random.fork_rng(devices=[]),
            _apart(turn),
            _Watch({_id_of(tensor): tensor for tensor in names}) as seen,
        ):
            _dry(turn)
        for tensor, numel in seen.written.items():
            turn.writes[tensor] = None
            written[tensor] += numel
    for tensor, name in names.items():
        if tensor.is_meta and written[tensor] < tensor.numel():
            where, what = owner.get(tensor), "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            kind = type(where.module).__name__ if where is not None else "its module"
            raise DeepSpeedConfigError(
                f"the {what} {name} has no values (it is on the meta device), and neither {kind}.reset_parameters nor an "
                f"_init_weights(module) of a model around it gives it all of them.\n{_CURE}"
            )
    return turns


def _dry(turn: _Turn) -> None:
    try:
        turn.run()
    except (RuntimeError, NotImplementedError) as error:
        raise DeepSpeedConfigError(
            f"{turn.name or 'the model'} ({type(turn.module).__name__}) cannot be initialised while it is on the meta device: {error}\n{_CURE}"
        ) from error


def _check_kinds(turns: list[_Turn], names: dict[Tensor, str]) -> None:
    for turn in turns:
        if hasattr(turn.module, "base_layer"):
            raise DeepSpeedConfigError(
                f"{turn.name} has adapters, and no values (it is on the meta device): their first values are their library's.\n{_CURE}"
            )
    for tensor, name in names.items():
        held = "hooks" if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None) else None
        held = held or ("weak references to it" if weakref.getweakrefs(tensor) else None)
        if tensor.is_meta and held is not None:
            raise DeepSpeedConfigError(
                f"{name} has no values (it is on the meta device), and {held}, which would be lost when it gets them.\n{_CURE}"
            )


def _in_order(module: nn.Module, name: str, around: Any) -> Iterator[_Turn]:
    """Children first, as `apply` goes; a module in two places has one turn, its first."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str, around: Any) -> Iterator[_Turn]:
        if module in seen:
            return
        seen.add(module)
        own = module if callable(getattr(module, "_init_weights", None)) else around
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name, own)
        yield _Turn(name, module, _way(module, own))

    return walk(module, name, around)


def _way(module: nn.Module, around: Any) -> Callable[[], None]:
    """How a module gets its values."""
    is_transformers = hasattr(around, "config") and hasattr(around, "init_weights")

    def run() -> None:
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if not is_transformers and callable(reset):
            reset()
        if around is not None:
            around._init_weights(module)

    return run


@contextmanager
def _apart(turn: _Turn) -> Iterator[None]:
    """Memory of nobody's in place of what a module before has too: the numbers are drawn, and not kept."""
    own: dict[str, Any] = turn.module._parameters
    kept = {key: own[key] for key in turn.shared}
    for key, shape in turn.shared.items():
        own[key] = nn.Parameter(torch.empty(shape, dtype=kept[key].dtype, device=kept[key].device), requires_grad=False)
    try:
        yield
    finally:
        own.update(kept)


def _allocate(tensor: Tensor) -> None:
    """Memory for a tensor on meta, which stays the object that it is."""
    made = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, made)


def _id_of(tensor: Tensor) -> int:
    """What a tensor's views and its `data` share with it, also on meta."""
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Sees which of some tensors are written to, in elements."""

    def __init__(self, known: dict[int, Tensor]) -> None:
        super().__init__()
        self.known = known
        self.written: dict[Tensor, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = zip(func._schema.arguments, args, strict=False)
        named = ((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs)
        for argument, value in (*given, *named):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and (found := self.known.get(_id_of(tensor))) is not None:
                    self.written[found] = self.written.get(found, 0) + tensor.numel()
        return func(*args, **kwargs)
