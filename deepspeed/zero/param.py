"""Parameters under ZeRO stage 3: what they answer while sharded, and how they refuse the rest.

A parameter stays one Python object for life; only its class changes with its bucket's state. `ZeroParameter` is a
plain parameter with the `ds_*` attributes other libraries read. `ShardedParameter` is what it is while sharded: it
answers questions about itself, and any other use either gathers it (inside the forward of a module that an engine
drives) or raises `ShardError` with the cure. A silent zero-size tensor never gets out.

Torch's own uninitialised parameters change class in the same way (torch.nn.parameter.UninitializedTensorMixin).
"""

from __future__ import annotations

import copy
import enum
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import ShardError
from deepspeed.utils.logging import current_rank, warn_once
from deepspeed.zero.written import data_taken

if TYPE_CHECKING:
    from deepspeed.zero.bucket import Bucket


class ZeroParamStatus(enum.Enum):
    """Whether a parameter's full values are here; the names are public (`param.ds_status`)."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter's place: its bucket and its index there."""

    bucket: Bucket
    index: int

    def __reduce__(self) -> Any:
        """A slot does not travel: the parameter's copy or pickle is a plain one."""
        return type(None), ()


_ids = itertools.count()


def slot_of(param: Tensor) -> Slot | None:
    """The slot of a parameter that ZeRO manages at any stage, else None."""
    return param.__dict__.get("_zero_slot")


def full_shape(param: Tensor) -> torch.Size:
    """The full shape of a parameter, sharded or not."""
    slot = slot_of(param)
    return slot.bucket.shapes[slot.index] if slot else param.shape


def stored_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter's numbers where they lie in buckets: a complex one is pairs of real numbers."""
    shape = full_shape(param)
    return torch.Size((*shape, 2)) if param.is_complex() else shape


def real_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's numbers."""
    return param.dtype.to_real() if param.dtype.is_complex else param.dtype


def full_numel(param: Tensor) -> int:
    """The full count of a parameter's numbers, sharded or not."""
    return stored_shape(param).numel()


_GRAD: Any = torch._C.TensorBase.grad
"""The attribute itself, below any class of Python's."""


DATA: Any = torch._C.TensorBase.data
"""The same, for the engine's own assignments, which are no script's."""


def grads_of(params: Iterable[Tensor]) -> list[Tensor | None]:
    """`param.grad` of each, asked for by the engine itself."""
    with torch._C.DisableTorchFunctionSubclass():  # sharded parameters answer through a function of Python's
        return list(map(_GRAD.__get__, params))


def give_grads(params: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Set `param.grad` of each: once per step of all of them, where a plain loop is the fastest way."""
    with torch._C.DisableTorchFunctionSubclass():
        for param, gradient in zip(params, gradients, strict=False):
            param.grad = gradient


class HiddenGradient(Tensor):
    """Parameters whose `grad`, where it is None because ranks have slices of it, says so once; see `zero.veil`."""

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @property
    def grad(self) -> Tensor | None:
        """The gradient that autograd or the script left."""
        (gradient,) = grads_of([self])
        if gradient is None:
            self._tell()
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if gradient is None and grads_of([self]) == [None]:
            self._tell()
        if gradient is not None and isinstance(self, ShardedParameter):
            raise ShardError(
                refusal(self, "param.grad = ...").partition("\n")[0]
                + "\n  Call deepspeed.utils.safe_set_full_grad(param, gradient) "
                "on every rank, or assign inside of `with deepspeed.zero.GatheredParameters([param]):`."
            )
        with torch._C.DisableTorchFunctionSubclass():
            _GRAD.__set__(self, gradient)

    @grad.deleter
    def grad(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            _GRAD.__delete__(self)

    def _tell(self) -> None:
        slot = slot_of(self)
        if slot is not None and slot.bucket.on_gradient_missed is not None:
            slot.bucket.on_gradient_missed(slot.bucket.names[slot.index])


class ZeroParameter(nn.Parameter):
    """A parameter that ZeRO stage 3 manages, with the attributes that other libraries look for."""

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The values, past autograd and torch's counters: the bucket looks whether they were changed when it is resharded."""
        slot = slot_of(self)
        if slot is not None:
            data_taken(slot.bucket, slot.index)
        return cast(Tensor, DATA.__get__(self))

    @data.setter
    def data(self, values: Tensor) -> None:
        slot = slot_of(self)
        if slot is not None:
            slot.bucket.written.may_be.setdefault(slot.index, None)
        DATA.__set__(self, values)

    @property
    def _slot(self) -> Slot:
        slot = slot_of(self)
        if slot is None:
            raise AttributeError("a parameter that ZeRO does not manage has no ds_ attributes")
        return slot

    @property
    def ds_id(self) -> int:
        """A number unique to the parameter in this process."""
        assert self._slot is not None
        return self.__dict__.setdefault("_ds_id", next(_ids))

    @property
    def ds_shape(self) -> torch.Size:
        """Full shape."""
        return self._slot.bucket.shapes[self._slot.index]

    @property
    def ds_numel(self) -> int:
        """Full element count."""
        return self.ds_shape.numel()

    @property
    def ds_status(self) -> ZeroParamStatus:
        """Whether the full values are here."""
        return ZeroParamStatus[_STATUS[self._slot.bucket.state.value]]

    @property
    def ds_persist(self) -> bool:
        """Whether the parameter is small enough never to be sharded."""
        return not self._slot.bucket.is_sharded

    @property
    def ds_tensor(self) -> Tensor:
        """This rank's elements, 1-D; empty if other ranks hold them all."""
        slot = self._slot
        bucket, index = slot.bucket, slot.index
        for piece in bucket.layout.pieces(bucket.exchange.rank):
            if piece.param == index:
                return bucket.shard.narrow(0, piece.in_shard, piece.numel)
        return bucket.shard.new_empty(0)

    @property
    def ds_process_group(self) -> Any:
        """The process group over which the parameter is sharded."""
        return self._slot.bucket.exchange.group

    @property
    def ds_active_sub_modules(self) -> set[int]:
        """Kept for callers that clear it; gathers are counted by the bucket here."""
        return self.__dict__.setdefault("_ds_active_sub_modules", set())

    def partition_numel(self) -> int:
        """Elements of this rank's part."""
        return self.ds_tensor.numel()

    def all_gather(self, param_list: Iterable[nn.Parameter] | None = None, async_op: bool = False) -> None:
        """Gather this parameter, or those listed, with everything in their buckets. Collective."""
        for bucket in buckets_of(param_list or [self]):
            bucket.unshard()

    def partition(self, param_list: Iterable[nn.Parameter] | None = None, has_been_updated: bool = False) -> None:
        """Reshard this parameter, or those listed; changes are kept if `has_been_updated`."""
        for bucket in buckets_of(param_list or [self]):
            if has_been_updated:
                bucket.write_shard()
            bucket.reshard()

    def detach(self) -> Tensor:
        """A plain tensor of the same memory.

        But `nn.Parameter(param)`, with which `weight_norm` makes a parameter from another, insists that detaching gives the
        class it was given; it gets that, not managed by anybody.
        """
        detached = Tensor.detach(self)
        if sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            if type(self) is not ZeroParameter:
                raise ShardError(refusal(self, "nn.Parameter(...)"))
            return Tensor._make_subclass(ZeroParameter, detached)
        return detached

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        made = nn.Parameter(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + Tensor.__repr__(self)


_STATUS = {"sharded": "NOT_AVAILABLE", "gathering": "INFLIGHT", "unsharded": "AVAILABLE"}


def buckets_of(params: Iterable[Tensor]) -> list[Bucket]:
    """The distinct buckets of those parameters that are sharded between uses, in the order of the parameters."""
    slots = (slot_of(param) for param in params)
    return list(dict.fromkeys(slot.bucket for slot in slots if slot and slot.bucket.is_sharded))


Resolver = Callable[["Bucket", Callable[..., Any]], bool]
"""Called when a sharded parameter is used: makes its bucket usable and answers True, or declines."""

_resolvers: list[Resolver] = []

Adopter = Callable[[nn.Parameter, str], None]
"""Told of each copy of a sharded parameter, with its name, while a model is built: shards the copy too."""

_adopters: list[Adopter] = []
"""Of the contexts of `zero.Init` that are open, the innermost last. Inside of one, sharded parameters answer their full
shape, because constructors compute with it."""


def add_adopter(adopter: Adopter) -> None:
    """A context in which models are built has been entered."""
    _adopters.append(adopter)


def remove_adopter(adopter: Adopter) -> None:
    """It has been left."""
    if adopter in _adopters:
        _adopters.remove(adopter)


def add_resolver(resolver: Resolver) -> None:
    """Let `resolver` answer for uses of sharded parameters outside their modules; asked in order of registration."""
    _resolvers.append(resolver)


def remove_resolver(resolver: Resolver) -> None:
    """Take a resolver back."""
    if resolver in _resolvers:
        _resolvers.remove(resolver)


def gather_for(param: Tensor, func: Callable[..., Any]) -> bool:
    """Have a sharded parameter usable, if somebody gathers for this use."""
    slot = slot_of(param)
    return slot is not None and any(resolve(slot.bucket, func) for resolve in list(_resolvers))


def _attribute(names: str, *verbs: str) -> list[Any]:
    """What `__torch_function__` is given when those attributes (that this torch has) are read, set or deleted."""
    descriptors = [Tensor.__dict__.get(name) or getattr(torch._C.TensorBase, name, None) for name in names.split()]
    return [getattr(descriptor, verb) for descriptor in descriptors for verb in verbs if hasattr(descriptor, verb)]


_READABLE = (
    "shape dtype device layout requires_grad grad is_leaf grad_fn ndim is_sparse is_cuda is_cpu is_meta is_xpu is_mps "
    "is_quantized is_nested is_mkldnn names _version itemsize output_nr retains_grad _backward_hooks "
    "_post_accumulate_grad_hooks"
)
_METHODS = (
    "numel size dim nelement stride is_floating_point is_complex element_size storage_offset is_contiguous register_hook "
    "register_post_accumulate_grad_hook requires_grad_ _is_view is_pinned get_device retain_grad __hash__ __repr__"
)
_ANSWERED = {
    *_attribute(_READABLE, "__get__"),
    *_attribute("requires_grad grad _backward_hooks _post_accumulate_grad_hooks", "__set__"),
    *_attribute("grad", "__delete__"),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch._has_compatible_shallow_copy_type,
}
"""Questions about the tensor object itself: answered as they stand."""

_SHAPE = {
    *_attribute("shape ndim", "__get__"),
    *(getattr(Tensor, name) for name in "size dim __len__".split()),
}
"""Questions about the shape. Not about the number of elements, by which code knows that a parameter is sharded."""

_HANDED_OUT = {Tensor.detach, *_attribute("data", "__get__")}
"""What `state_dict()` and the like take: they get a placeholder that refuses in the same way."""


class ShardedStorage:
    """The storage of a sharded parameter as far as it can be told here: which one it is, and how large when whole.

    Saving asks for it to find ties (`id_tensor_storage` of Transformers and Accelerate, `storage_ptr` of safetensors). The
    address is that of the parameter's place in its bucket: one per parameter object and what is taken from it, of no other.
    """

    def __init__(self, param: Tensor, itemsize: int) -> None:
        slot = slot_of(param)
        assert slot is not None, "only managed parameters are sharded"
        self._param, self._slot, self._itemsize = param, slot, itemsize
        self.device = slot.bucket.full.device

    def data_ptr(self) -> int:
        """The address that stands for the parameter."""
        return id(self._slot)

    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self._slot.bucket.layout.numels[self._slot.index] * self._slot.bucket.dtype.itemsize

    def size(self) -> int:
        """Elements of the whole parameter for a typed storage, bytes for an untyped one."""
        return self.nbytes() // self._itemsize

    __len__ = size

    @property
    def _cdata(self) -> int:
        return id(self._slot)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ShardError(refusal(self._param, f"storage().{name}"))


def _same_slot(value: Tensor, other: Tensor) -> bool:
    return slot_of(value) is slot_of(other)


_IDENTITY: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.data_ptr: lambda value: id(slot_of(value)),
    Tensor.untyped_storage: lambda value: ShardedStorage(value, 1),
    Tensor.storage: lambda value: ShardedStorage(value, value.dtype.itemsize),
    Tensor._typed_storage: lambda value: ShardedStorage(value, value.dtype.itemsize),
    Tensor.is_set_to: _same_slot,
}
"""Questions about which memory this is: answered without gathering where nobody gathers for the use."""

_LIKE = {getattr(torch, f"{kind}_like") for kind in "empty zeros ones full rand randn randint".split()}
"""What only asks for shape, dtype and device: answered with whole tensors, as a moving average or an optimizer's first state begins."""

_READERS = ("_to_ndarray", "_tobytes", "_is_complete")
"""Functions of safetensors that ask for the address to write what is there."""


def _may_tell_shape() -> bool:
    """Not to Transformers, which takes sharded parameters for empty and acts on that."""
    return not str(sys._getframe(2).f_globals.get("__name__")).startswith("transformers.")


def _initialiser() -> str | None:
    """The function of `torch.nn.init` that asks, if one does. What has no elements `orthogonal_` would leave as it is."""
    frame = sys._getframe(2)
    return frame.f_code.co_name if frame.f_globals.get("__name__") == nn.init.__name__ else None


def _refuse_loading(value: Tensor) -> None:
    """Raise ShardError where torch compares the shape of a sharded parameter with that of what it is to load: it would say that
    the parameter has size `[0]`, after it has loaded those that are whole."""
    if sys._getframe(2).f_code is nn.Module._load_from_state_dict.__code__:
        raise ShardError(
            f"{refusal(value, 'load_state_dict').partition(chr(10))[0]}\n"
            "  Load inside of `with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):` on every rank; "
            "a checkpoint of this library by engine.load_checkpoint(folder)."
        )


def _is_read(func: Callable[..., Any]) -> bool:
    """Whether the caller of `data_ptr` wants the memory itself, not to know which it is."""
    frame = sys._getframe(2)
    return (
        func is Tensor.data_ptr
        and frame.f_code.co_name in _READERS
        and str(frame.f_globals.get("__name__")).partition(".")[0] in ("safetensors", "huggingface_hub")
    )


_SET_DATA = set(_attribute("data", "__set__"))
_CONVERSIONS = {*(getattr(Tensor, name) for name in "to cpu cuda float half bfloat16 double".split()), *_SET_DATA}


def _converts_module(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether `module.to(...)` and the like ask: Lightning converts modules before and after training. Sharded parameters
    then stay as they are; the same call on the parameter alone is refused like any other use."""
    if func not in _CONVERSIONS or (func in _SET_DATA and args[0] is not args[1]):
        return False
    frame = sys._getframe(2)
    for _ in range(3):
        if frame.f_code is nn.Module._apply.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _writes_nothing() -> bool:
    """Whether `save_pretrained` of Transformers makes a state dict on a rank that it will not write from.

    It renames, splits and merges the weights on every rank before one of them writes. Where there are no values, shapes do.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "save_pretrained":
            return frame.f_locals.get("save_on_this_rank") is False
    return False


def _unchanged(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The sharded value that a call leaves as it is, or None: what Transformers does when it ties a decoder with a bias.

    It compares the lengths of weight and bias, pads the bias by the difference, which is none (sharded parameters all say
    `[0]`), and puts the result back: `bias.data = pad(bias.data, (0, 0))`.
    """
    value = args[0] if args else None
    if not isinstance(value, _Sharded):
        return None
    if func is nn.functional.pad:
        amounts = args[1] if len(args) > 1 else kwargs.get("pad", (1,))
        return None if any(amounts) else value
    is_own = func in _SET_DATA and isinstance(args[1], ShardedPlaceholder) and slot_of(args[1]) is slot_of(value)
    return value if is_own else None


def _sharded_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    return [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, _Sharded)]


class _Sharded(Tensor):
    """Behaviour shared by a sharded parameter and the placeholders taken from it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPE or func is Tensor.numel:
            initialiser = _initialiser()
            if initialiser and not _adopters:
                raise ShardError(refusal(args[0], initialiser))
            if _adopters and (initialiser or (func in _SHAPE and _may_tell_shape())):
                return func(torch.empty(full_shape(args[0]), device="meta"), *args[1:], **kwargs)
            _refuse_loading(args[0])
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _CONVERSIONS and _converts_module(func, args):
            warn_once(
                "converting a module leaves sharded parameters as they are: dtype and device are the configuration's."
            )
            return None if func in _SET_DATA else args[0]  # torch never lets go of what a setter returns
        if (same := _unchanged(func, args, kwargs)) is not None:
            return None if func in _SET_DATA else same
        held = []
        try:
            for value in _sharded_in(args, kwargs):
                if not isinstance(value, _Sharded):
                    continue  # of a bucket that an earlier argument had unsharded
                bucket = value._zero_slot.bucket  # type: ignore[attr-defined]
                if isinstance(value, ShardedParameter) and gather_for(value, func):
                    bucket.hold()
                    held.append(bucket)
                elif func in _HANDED_OUT:
                    with torch._C.DisableTorchFunctionSubclass():
                        if _writes_nothing():
                            return torch.empty(full_shape(value), dtype=value.dtype, device="meta")
                        return _placeholder(value)
                elif func in _IDENTITY and not _is_read(func):
                    return _IDENTITY[func](*args, **kwargs)
                elif func in _LIKE:
                    whole = torch.empty((), dtype=value.dtype, device=value.device).expand(full_shape(value))
                    return func(whole, *args[1:], **kwargs)
                else:
                    raise ShardError(refusal(value, func))
            return func(*args, **kwargs)
        finally:
            for bucket in held:
                bucket.unhold()


class ShardedParameter(_Sharded, HiddenGradient, ZeroParameter):
    """A parameter that nobody holds: only this rank's part of it exists here, or values wait for their next user."""

    __torch_function__ = _Sharded.__dict__["__torch_function__"]

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether Transformers' initialisation leaves the parameter as it is. It initialises a model that a constructor made
        inside of another's on the first rank alone, whose values count, and comes by again on the others: what is sharded has
        its values, unless it is still being built. Asked by others (which weights did a checkpoint lack?) it is what was set."""
        frame = sys._getframe(1)
        is_initialising = (
            frame.f_code.co_name in ("_init_weights", "_initialize_weights")
            or frame.f_globals.get("__name__") == "transformers.initialization"
        )
        return self.__dict__.get("_is_hf_initialized", is_initialising and not _adopters)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value

    @_is_hf_initialized.deleter
    def _is_hf_initialized(self) -> None:
        self.__dict__.pop("_is_hf_initialized", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        slot = slot_of(self)
        assert slot is not None, "only managed parameters are sharded"
        bucket = slot.bucket
        if not gather_for(self, copy.deepcopy):
            raise ShardError(refusal(self, "copy.deepcopy"))
        bucket.hold()
        try:
            made = ZeroParameter.__deepcopy__(self, memo)
        finally:
            bucket.unhold()
        if _adopters:
            _adopters[-1](made, bucket.names[slot.index])
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardError(refusal(self, "pickle"))

    def __repr__(self) -> str:  # type: ignore[override]
        slot = slot_of(self)
        assert slot is not None
        return f"ShardedParameter({slot.bucket.names[slot.index]}, shape={tuple(self.ds_shape)}, here={self.partition_numel()})"


class ShardedPlaceholder(_Sharded):
    """What `param.detach()` and `state_dict()` give for a sharded parameter: a name and a shape, no values."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardError(refusal(self, "pickle"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ShardError(refusal(self, "copy.deepcopy"))


def _placeholder(param: Tensor) -> Tensor:
    made = torch.Tensor._make_subclass(ShardedPlaceholder, torch.empty(0, dtype=param.dtype, device=param.device))
    made._zero_slot = param._zero_slot  # type: ignore[attr-defined]
    return made


def refusal(param: Tensor, func: Callable[..., Any] | str) -> str:
    """The message for a use of a sharded parameter that nobody can answer."""
    slot = slot_of(param)
    assert slot is not None, "only managed parameters are sharded"
    bucket, index = slot.bucket, slot.index
    here = sum(piece.numel for piece in bucket.layout.pieces(bucket.exchange.rank) if piece.param == index)
    use = func if isinstance(func, str) else getattr(func, "__name__", str(func)).strip("_")
    return (
        f"[rank {current_rank()}]: {bucket.names[index]} is sharded and cannot be used in {use!r}; full shape "
        f"{tuple(bucket.shapes[index])}, this rank holds {here} of {bucket.layout.numels[index]} elements.\n"
        "  Wrap the access in `with deepspeed.zero.GatheredParameters([param]):` on every rank; to save the model use "
        "engine.save_16bit_model(folder)."
    )
