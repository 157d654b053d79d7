"""Every product that torch has is counted, or stands here with the reason why it is not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from deepspeed.profiling import counter
from deepspeed.profiling.counter import _OURS, OpCounter, Phase, _by_torch

_PRODUCT = re.compile(r"(^|_)(bmm|mm|mv|dot|vdot|addmm|addmv|addbmm|baddbmm|matmul|linear|trilinear|bilinear|conv\d?d?|"
                      r"convolution|attention|rnn|lstm|gru|spmm|hspmm|addr|ger)(_|$|\d)")  # fmt: skip

_NOT_COUNTED = {
    "sparse: what is multiplied depends on the values": "_cslt_sparse_mm _cslt_sparse_mm_search _sparse_addmm "
    "_sparse_mm_reduce_impl _sparse_mm_reduce_impl_backward _sparse_semi_structured_addmm _sparse_semi_structured_linear "
    "_sparse_semi_structured_mm _sparse_sparse_matmul hspmm sparse_sampled_addmm sspaddmm",
    "weights of 4 bits, for inference": "_dyn_quant_matmul_4bit _weight_int4pack_mm _weight_int4pack_mm_for_cpu "
    "_weight_int4pack_mm_with_scales_and_zeros _mixed_dtypes_linear",
    "quantized layers of torch.ao, for inference": "quantized_gru quantized_lstm",
    "gates of a recurrent cell, element by element; its products come before": "_thnn_fused_gru_cell "
    "_thnn_fused_gru_cell_backward _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl",
    "an outer product: no sum, so element by element": "addr addr_",
    "interpolation": "_upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward upsample_bilinear2d "
    "upsample_bilinear2d_backward upsample_linear1d upsample_linear1d_backward upsample_trilinear3d "
    "upsample_trilinear3d_backward",
    "behind aten.convolution, which is counted": "_conv_depthwise2d _mps_convolution _mps_convolution_transpose "
    "_nnpack_spatial_convolution _slow_conv2d_backward conv_depthwise3d convolution_backward_overrideable "
    "cudnn_convolution_transpose miopen_convolution miopen_convolution_transpose miopen_depthwise_convolution "
    "mkldnn_convolution mps_convolution_backward mps_convolution_transpose_backward slow_conv3d_forward "
    "slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d mkldnn_reorder_conv2d_weight "
    "mkldnn_reorder_conv3d_weight",
    "fused for inference by a compiler, which the profiler does not look into": "cudnn_convolution_add_relu "
    "cudnn_convolution_relu miopen_convolution_add_relu miopen_convolution_relu _triton_multi_head_attention "
    "_triton_scaled_dot_attention",
    "of devices whose other kernels are not counted either": "_lstm_mps lstm_mps_backward miopen_rnn miopen_rnn_backward "
    "_scaled_dot_product_attention_math_for_mps mkldnn_linear_backward mkldnn_linear_backward_input "
    "mkldnn_linear_backward_weights linear_backward",
    "behind attention kernels that are counted": "_cudnn_attention_forward _cudnn_attention_backward "
    "_flash_attention_forward_no_dropout_inplace",
    "made of others that are counted": "linear matmul_backward",
    "moves weights": "_cudnn_rnn_flatten_weight _compute_linear_combination",
}


def kernels() -> list[str]:
    """Names of aten operations that look like products and are not made of other operations."""
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "aten::" in name}
    return sorted(name for name in names if _PRODUCT.search(name) and hasattr(torch.ops.aten, name) and is_kernel(name))


def is_kernel(name: str) -> bool:
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload).name() for overload in packet.overloads()]
    return not all(
        torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CompositeImplicitAutograd") for overload in overloads
    )


def test_every_product_of_torch_is_counted_or_listed_with_the_reason() -> None:
    listed = {name for names in _NOT_COUNTED.values() for name in names.split()}
    counted = {
        name for name in kernels() if (packet := getattr(torch.ops.aten, name)) in _OURS or packet in flop_registry
    }
    assert set(kernels()) - counted - listed == set()
    assert listed & counted == set()


def test_torch_is_asked_for_every_formula_that_it_alone_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counter.flop_registry() is flop_registry
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")  # as in a process that has not asked yet
    packets = [op for op in flop_registry if isinstance(op, torch._ops.OpOverloadPacket)]
    asked = [op for op in packets if op not in _OURS]
    assert asked and all(_by_torch(op) is flop_registry[op] for op in asked)
    assert _by_torch(torch.ops.aten.add) is None


def counted(function: Callable[[], Any]) -> int:
    found = []
    with OpCounter(lambda phase, op, flops: found.append(flops)):
        function()
    return sum(found)


def r(*shape: int) -> Tensor:
    return torch.ones(shape)


OFFSETS = torch.tensor([16, 32], dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: r(3, 5) @ r(5), 30),
        (lambda: r(5) @ r(5, 3), 30),
        (lambda: r(5) @ r(5), 10),
        (lambda: torch.vdot(r(5), r(5)), 10),
        (lambda: torch.mv(r(3, 5), r(5)), 30),
        (lambda: r(2, 3, 5) @ r(5), 60),
        (lambda: r(3, 5) @ r(5, 1), 30),
        (lambda: torch.addmv(r(3), r(3, 5), r(5)), 30),
        (lambda: r(3).addmv_(r(3, 5), r(5)), 30),
        (lambda: r(3, 4).addmm_(r(3, 5), r(5, 4)), 120),
        (lambda: r(2, 3, 4).baddbmm_(r(2, 3, 5), r(2, 5, 4)), 240),
        (lambda: torch.addbmm(r(3, 4), r(2, 3, 5), r(2, 5, 4)), 240),
        (lambda: torch.mm(r(3, 5), r(5, 4), out=r(3, 4)), 120),
        (lambda: F.bilinear(r(7, 3), r(7, 5), r(4, 3, 5)), 2 * 7 * 4 * 3 * 5),
        (lambda: nn.Bilinear(3, 5, 4)(r(7, 3), r(7, 5)), 2 * 7 * 4 * 3 * 5),
        (lambda: torch.einsum("ij,j->i", r(3, 5), r(5)), 30),
        (lambda: torch.conv_tbc(r(6, 2, 3), r(3, 3, 4), r(4)), 2 * 4 * 2 * 4 * 3 * 3),
        (lambda: torch._grouped_mm(r(32, 16), r(2, 16, 8), offs=OFFSETS), 2 * 32 * 16 * 8),
        (lambda: torch._grouped_mm(r(2, 16, 16), r(16, 32), offs=OFFSETS), 2 * 16 * 16 * 32),
        (lambda: torch._grouped_mm(r(16, 32), r(32, 8), offs=OFFSETS), 2 * 16 * 32 * 8),
        (lambda: torch._grouped_mm(r(2, 16, 16), r(2, 16, 8)), 2 * 2 * 16 * 16 * 8),
    ],
)  # fmt: skip
def test_a_product_costs_two_operations_per_multiply_add(function: Callable[[], Any], expected: int) -> None:
    assert counted(function) == expected


def test_the_backward_of_grouped_products_and_of_bilinear_is_counted() -> None:
    by_phase = dict.fromkeys(Phase, 0)

    def add(phase: Phase, op: str, flops: int) -> None:
        by_phase[phase] += flops

    weight, x = r(2, 16, 8).requires_grad_(), r(32, 16).requires_grad_()
    first, second = r(7, 3).requires_grad_(), r(7, 5).requires_grad_()
    with OpCounter(add):
        torch._grouped_mm(x, weight, offs=OFFSETS).square().sum().backward()
    assert by_phase[Phase.BACKWARD] == 2 * by_phase[Phase.FORWARD] == 4 * 32 * 16 * 8
    by_phase.update(dict.fromkeys(Phase, 0))
    layer = nn.Bilinear(3, 5, 4)
    with OpCounter(add):
        layer(first, second).sum().backward()
    assert by_phase[Phase.BACKWARD] == 3 * by_phase[Phase.FORWARD]
