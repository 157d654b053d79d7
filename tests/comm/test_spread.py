"""One rank's values of any tensor reach all, and nothing else in memory changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.comm.choose import make_exchange
from deepspeed.comm.spread import spread
from tests.harness import run_ranks

CPU = torch.device("cpu")


def _base(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(24) + 100 * rank).to(dtype)


STRIDED: dict[str, Any] = {
    "transposed": lambda x: x.view(4, 6).t(),
    "columns": lambda x: x.view(4, 6)[:, 1:3],
    "every other": lambda x: x[::2],
    "expanded": lambda x: x[3:4].expand(5, 7),
    "expanded inside": lambda x: x[:6].view(2, 1, 3).expand(2, 4, 3),
    "overlapping": lambda x: x.unfold(0, 4, 2),
    "scalar": lambda x: x[5],
    "empty": lambda x: x[:0],
    "channels last": lambda x: x.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


def strided(rank: int, world_size: int, kind: str) -> None:
    base = _base(rank)
    tensor = STRIDED[kind](base)
    outside = torch.ones(24, dtype=torch.bool)
    if tensor.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
        positions = STRIDED[kind](torch.arange(24))
        outside[positions.reshape(-1)] = False
    assert spread(make_exchange(None, CPU), tensor, CPU) is tensor
    assert torch.equal(tensor, STRIDED[kind](_base(0)))
    assert torch.equal(base[outside], _base(rank)[outside])


@pytest.mark.parametrize("kind", STRIDED)
def test_a_tensor_keeps_its_memory_and_what_lies_between_is_not_touched(kind: str) -> None:
    run_ranks(2, strided, kind)


def strides_differ(rank: int, world_size: int) -> None:
    tensor = torch.full((3, 4), float(rank)) if rank else torch.arange(12.0).view(4, 3).t()
    spread(make_exchange(None, CPU), tensor, CPU)
    assert torch.equal(tensor, torch.arange(12.0).view(4, 3).t())


def test_strides_may_differ_between_ranks() -> None:
    run_ranks(2, strides_differ)


DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def dtypes(rank: int, world_size: int) -> None:
    for dtype in DTYPES:
        tensor = _base(rank).remainder(7).to(dtype)
        spread(make_exchange(None, CPU), tensor, CPU)
        assert torch.equal(tensor.view(torch.uint8), _base(0).remainder(7).to(dtype).view(torch.uint8)), dtype
    conjugate = torch.tensor([1 + 2j, 3 - 1j]) * (rank + 1)
    tensor = conjugate.conj()
    assert torch.equal(spread(make_exchange(None, CPU), tensor, CPU), torch.tensor([1 - 2j, 3 + 1j]))


def test_every_dtype_travels() -> None:
    run_ranks(2, dtypes)


def _kinds(rank: int) -> dict[str, Tensor]:
    dense = torch.diag(torch.arange(4.0) + rank)
    dense[0, 3] = rank  # one element more on rank 1
    return {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(dense, 0.5, 3 + rank, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2 + rank), torch.ones(3)], layout=torch.jagged),
    }


def others(rank: int, world_size: int) -> None:
    for kind, tensor in _kinds(rank).items():
        found, wanted = spread(make_exchange(None, CPU), tensor, CPU), _kinds(0)[kind]
        assert found.layout is wanted.layout, kind
        pairs = [(found, wanted)]
        if kind == "nested":
            pairs = list(zip(found.unbind(), wanted.unbind(), strict=True))
        elif kind == "quantized":
            pairs = [(found.int_repr(), wanted.int_repr())]
            assert found.q_zero_point() == 3
        for one, other in pairs:
            assert torch.equal(*(t if t.layout is torch.strided else t.to_dense() for t in (one, other))), kind


def test_sparse_quantized_and_nested_tensors_are_replaced_by_the_first_ranks() -> None:
    run_ranks(2, others)


def inference(rank: int, world_size: int) -> None:
    with torch.inference_mode():
        tensor = _base(rank)
    found = spread(make_exchange(None, CPU), tensor, CPU)
    assert not found.is_inference()
    assert torch.equal(found, _base(0))


def test_a_tensor_made_in_inference_mode_is_replaced() -> None:
    run_ranks(2, inference)
