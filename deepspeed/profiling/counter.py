"""Counts floating-point operations as they run, by phase.

Used by `tree.py` for the profile of every module, and by the engine's step monitor for the operations of a step. A torch
dispatch mode: it sees each operation below autograd, so it counts what is computed however it was written (functional,
einsum, a custom autograd.Function, a recomputation, an expert that got no token), forward and backward.

What an operation costs is torch's knowledge (`torch.utils.flop_counter.flop_registry`): matrix products, convolutions and
attention at 2 operations per multiply-add; element-wise operations are not counted. Asking torch imports Triton where it is
installed (66 MB of resident memory), so products are counted here, and torch is asked only what it alone knows. Two things are
added: kernels that torch leaves out (the CPU's attention, grouped products, products with a vector, products in place, whole recurrent layers, the whole transformer layers that torch.nn runs without
gradients), and what is model work and what is not. An attention kernel's backward computes
the scores a second time; that is counted as recomputation, like the forward that activation checkpointing repeats, so
that the model's own operations (MFU's numerator, PaLM, arXiv:2204.02311, appendix B) are the same whatever kernel runs
and whatever is checkpointed. Attention is counted over the full square also where a causal mask halves it, as everybody
does.

Invariant: results are those of the unwatched program. Operations launched behind torch's back (Triton kernels called
directly, c10d) are not seen.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.utils import compiler


class Phase(enum.Enum):
    """What an operation belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Gradients, without anything that forward had computed before."""
    RECOMPUTE = "recompute"
    """Work of forward done again in backward."""
    UPDATE = "update"
    """The optimizer's (Muon multiplies matrices)."""


@functools.cache
def flop_registry() -> dict[Any, Callable[..., int]]:
    """Torch's formulas. Their module imports Triton where it is installed."""
    from torch.utils.flop_counter import flop_registry as registry

    return registry


def _by_torch(packet: Any) -> Callable[..., int] | None:
    """Torch's formula. Not asked for what has none; whoever adds some, as packages may, has imported their module."""
    is_known = any(word in packet.__name__ for word in _TORCH_KNOWS) or "torch.utils.flop_counter" in sys.modules
    return flop_registry().get(packet) if is_known else None


def current_node() -> Any:
    """The autograd node whose backward is running; None outside of backward."""
    return torch._C._current_autograd_node()


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Scores and mix, [B, H, S, D]; grouped heads count by the queries' number of heads."""
    batch, heads, num_queries, width = query.shape
    return 2 * batch * heads * num_queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Five products: the scores again, and twice forward's two."""
    batch, heads, num_queries, width = query.shape
    return 2 * batch * heads * num_queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _rows(tensor: Any) -> int:
    """How many vectors a tensor [..., D] has; nested ones have no one shape."""
    return int(tensor.numel()) // int(tensor.shape[-1] if not tensor.is_nested else tensor.size(-1))


def _num_scores(query: Any, key: Any) -> int:
    """Pairs of a query and a key, over the batch: [B, S, D] each, or nested."""
    if not query.is_nested:
        return int(query.shape[0] * query.shape[1] * key.shape[1])
    lengths = [sizes[:, 0] for sizes in (query._nested_tensor_size(), key._nested_tensor_size())]
    return int((lengths[0] * lengths[1]).sum())


def _multi_head_attention(
    query: Any, key: Any, value: Any, width: int, heads: int, qkv: Any, qkv_bias: Any, out: Any, *_: Any, **__: Any
) -> int:
    """torch.nn.MultiheadAttention without gradients: projections in, scores and mix, projection out."""
    projections = (_rows(query) + _rows(key) + _rows(value)) * qkv.numel() // 3 + _rows(query) * out.numel()
    return 2 * (projections + 2 * _num_scores(query, key) * width)


def _encoder_layer(
    src: Any, width: int, heads: int, qkv: Any, qkv_bias: Any, out: Any, out_bias: Any, *rest: Any, **__: Any
) -> int:
    """torch.nn.TransformerEncoderLayer without gradients. `rest`: gelu, norms (6 values), then the two linear layers."""
    up, down = rest[7], rest[9]
    layers = _rows(src) * (up.numel() + down.numel())
    return _multi_head_attention(src, src, src, width, heads, qkv, qkv_bias, out) + 2 * layers


def _recurrent(input: Any, *rest: Any, **__: Any) -> int:
    """A layer over all its times, [..., in]: each vector meets each weight. On the CPU weights come one by one."""
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:4]
    return 2 * _rows(input) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _recurrent_backward(*args: Any, **kwargs: Any) -> int:
    """A product each for the gradients of what came in and of the weights."""
    return 2 * _recurrent(*args, **kwargs)


def _product(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """[..., M, K] times [..., K, N]."""
    return 2 * int(left.numel()) * int(right.shape[-1])


def _added_product(_self: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return _product(left, right)


def _products(lefts: Any, rights: Any, *_: Any, **__: Any) -> int:
    return sum(_product(left, right) for left, right in zip(lefts, rights, strict=True))


def _times_rows(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """[..., K] times a weight that lies as [N, K]."""
    return 2 * int(left.numel()) * int(right.shape[0])


def _times_vector(matrix: Any, *_: Any, **__: Any) -> int:
    """[M, K] times [K], or [K] times [K]."""
    return 2 * int(matrix.numel())


def _added_vector(_self: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return _times_vector(matrix)


def _grouped_product(left: Any, right: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Groups of rows, of columns, of both or of none: each row of `left` meets each column of one group.

    left [M, K] and right [G, K, N]: rows fall into groups. [G, M, K] and [K, N]: columns do. [M, K] and [K, N]: K does.
    """
    if left.dim() == 3 and right.dim() == 2:
        return 2 * int(left.shape[-2]) * int(left.shape[-1]) * int(right.shape[-1])
    return _product(left, right)


def _trilinear(first: Any, weight: Any, second: Any, *expand_and_sum: Any, **__: Any) -> int:
    """torch.nn.functional.bilinear: three factors, spread over common dims, of which some are summed."""
    shapes = []
    for tensor, dims in zip((first, weight, second), expand_and_sum[:3], strict=True):
        shape = list(tensor.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * int(torch.broadcast_shapes(*shapes).numel())


def _convolution_tbc(x: Any, weight: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """[T, B, in] with [width, in, out]."""
    return 2 * int(out_val.numel()) * int(weight.shape[0] * weight.shape[1])


def _twice_product(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * _product(left, right)


def _experts(_tokens: Any, at: Any, _weights: Any, _counts: Any, up: Any, down: Any, *_: Any, **__: Any) -> int:
    """Each of `at`'s rows meets one matrix of each kind."""
    return 2 * int(at.numel()) * int(up[0].numel() + down[0].numel())


def _experts_backward(_gradient: Any, *given: Any, **__: Any) -> int:
    """A product of each kind for the rows and one for the matrix, as far as they are needed."""
    at, up, down, (of_tokens, of_up, of_down) = given[1], given[4], given[5], given[7]
    return 2 * int(at.numel()) * int(up[0].numel() * (of_tokens + of_up) + down[0].numel() * (1 + of_down))


_OURS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._native_multi_head_attention: _multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    torch.ops.aten._cudnn_rnn: _recurrent,
    torch.ops.aten._cudnn_rnn_backward: _recurrent_backward,
}
_PRODUCTS: dict[Callable[..., int], str] = {
    _times_vector: "mv dot vdot",
    _added_vector: "addmv addmv_",
    _product: "mm bmm _int_mm _scaled_mm _scaled_mm_v2",
    _added_product: "addmm baddbmm addmm_ baddbmm_ addbmm addbmm_ _addmm_activation",
    _products: "_foreach_mm",
    _times_rows: "_weight_int8pack_mm mkldnn_linear",
    _grouped_product: "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2",
    _trilinear: "_trilinear",
    _convolution_tbc: "conv_tbc",
}
for _formula, _names in _PRODUCTS.items():  # not every torch has all of them
    _OURS |= {getattr(torch.ops.aten, name): _formula for name in _names.split() if hasattr(torch.ops.aten, name)}

_TORCH_KNOWS = ("conv", "attention")
"""In the names of operations whose formulas are torch's."""

_OTHERS: dict[str, Callable[..., int]] = {
    "mkldnn::_linear_pointwise": _times_rows,
    "deepspeed::experts": _experts,
    "deepspeed::experts_backward": _experts_backward,
    "transformers::grouped_mm_fallback": _grouped_product,
    "transformers::grouped_mm_fallback_backward": _twice_product,
}
"""Operations that are registered with torch, by name: what is inside of them is not seen."""

for _name in (
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
):  # torch's formulas refuse grouped heads
    for _suffix, _formula in (("", _attention), ("_backward", _attention_backward)):
        _packet = getattr(torch.ops.aten, f"_scaled_dot_product_{_name}{_suffix}", None)
        if _packet is not None:
            _OURS[_packet] = _formula

_METADATA = {
    getattr(torch.ops.aten, name).default
    for name in (
        "sym_is_contiguous is_contiguous is_strides_like_format is_non_overlapping_and_dense size sym_size stride "
        "sym_stride storage_offset sym_storage_offset numel sym_numel dim"
    ).split()
    if hasattr(torch.ops.aten, name)
} | {torch.ops.prim.device.default, torch.ops.prim.layout.default}
"""Questions about a tensor subclass, which it answers itself."""


class OpCounter(TorchDispatchMode):
    """While entered, calls `add(phase, operation, flops)` for every counted operation.

    `is_updating` is to be set while the optimizer steps. Entered anew for each stretch that is to be counted.
    """

    supports_higher_order_operators = True

    def __init__(self, add: Callable[[Phase, str, int], None]) -> None:
        super().__init__()
        self._add = add
        self.is_updating = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's word for hiding `__torch_dispatch__` when a class is made, which loads the compiler at the first operation."""
        return False

    def __enter__(self) -> OpCounter:
        """Begin to count; a model that is compiled does not have the counting compiled into it."""
        if compiler.is_loaded():
            _hide()
        entered: OpCounter = super().__enter__()
        return entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return NotImplemented
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        packet = func._overloadpacket
        formula = _OURS.get(packet) or _by_torch(packet) or _OTHERS.get(packet._qualified_op_name)
        if formula is None:
            with self:  # in inference mode composite operations arrive whole
                decomposed = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if decomposed is NotImplemented else decomposed
        out = func(*args, **kwargs)
        self._count(packet, args, formula(*args, **kwargs, out_val=out))
        return out

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        formula = flop_registry().get(func)
        if formula is None:
            return NotImplemented
        out = func(*args, **kwargs)
        self._count(func, args, formula(*args, **kwargs, out_val=out))
        return out

    def _count(self, op: Any, args: Any, flops: int) -> None:
        name = str(op).rpartition(".")[2]
        if self.is_updating:
            self._add(Phase.UPDATE, name, flops)
        elif current_node() is None:
            self._add(Phase.FORWARD, name, flops)
        elif torch.is_grad_enabled():  # autograd runs without gradients, but for what is to be differentiated again
            self._add(Phase.RECOMPUTE, name, flops)
        elif "attention" in name and name.endswith("backward"):
            scores = flops // 5 if op not in _OURS else _scores(args)
            self._add(Phase.RECOMPUTE, name, scores)
            self._add(Phase.BACKWARD, name, flops - scores)
        else:
            self._add(Phase.BACKWARD, name, flops)


@functools.cache
def _hide() -> None:
    OpCounter.__torch_dispatch__ = torch._disable_dynamo(OpCounter.__torch_dispatch__)  # type: ignore[method-assign]


def _scores(args: Any) -> int:
    _, query, key = args[:3]
    return 2 * query.numel() * key.shape[-2]


class StepFlops:
    """Totals by phase: `model` is the step's useful work on this rank."""

    def __init__(self) -> None:
        self.by_phase = dict.fromkeys(Phase, 0)

    def add(self, phase: Phase, op: str, flops: int) -> None:
        """For an `OpCounter`."""
        self.by_phase[phase] += flops

    @property
    def model(self) -> int:
        """Forward and backward."""
        return self.by_phase[Phase.FORWARD] + self.by_phase[Phase.BACKWARD]
