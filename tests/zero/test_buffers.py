"""Buffers of any kind: a model trains with them as in plain PyTorch, and every rank has the first rank's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.zero.sharded import whole_values

EDGES = torch.tensor([[0, 1, 3, 2], [1, 2, 0, 2]])


def _dense(rank: int) -> Tensor:
    return torch.zeros(4, 4).index_put(tuple(EDGES), torch.arange(1.0, 5.0) + rank)


def _coalesced(rank: int) -> Tensor:
    return _dense(rank).to_sparse()


def _uncoalesced(rank: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.cat([EDGES, EDGES], 1), torch.arange(8.0) + rank, (4, 4))


def _nested(rank: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2 + rank), torch.full((3,), 2.0)], layout=torch.jagged)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "dense": _dense,
    "coo": _coalesced,
    "uncoalesced": _uncoalesced,
    "csr": lambda rank: _dense(rank).to_sparse_csr(),
    "csc": lambda rank: _dense(rank).to_sparse_csc(),
    "bsr": lambda rank: _dense(rank).to_sparse_bsr((2, 2)),
    "nested": _nested,
    "quantized": lambda rank: torch.quantize_per_tensor(_dense(rank), 0.5, 3 + rank, torch.qint8),
    "per_channel": lambda rank: torch.quantize_per_channel(
        _dense(rank), torch.full((4,), 0.5 + rank), torch.zeros(4, dtype=torch.int64), 0, torch.quint8
    ),
    "float8": lambda rank: _dense(rank).to(torch.float8_e4m3fn),
    "uint16": lambda rank: _dense(rank).to(torch.uint16),
    "float64": lambda rank: _dense(rank).double() / 3,
    "complex": lambda rank: torch.complex(_dense(rank), _dense(rank + 1)),
    "conjugate": lambda rank: torch.complex(_dense(rank), _dense(rank + 1)).conj(),
    "bool": lambda rank: _dense(rank) > 1 + rank,
    "expanded": lambda rank: torch.full((1, 4), 1.0 + rank).expand(4, 4),
    "overlapping": lambda rank: (torch.arange(7.0) + rank).as_strided((4, 4), (1, 1)),
    "sliced": lambda rank: (torch.arange(32.0) + rank).view(4, 8)[:, ::2],
    "transposed": lambda rank: _dense(rank).t(),
    "channels_last": lambda rank: (_dense(rank).view(1, 4, 2, 2)).to(memory_format=torch.channels_last),
    "scalar": lambda rank: torch.tensor(2.0 + rank),
    "empty": lambda rank: torch.empty(0, 3),
    "inference": lambda rank: _in_inference(rank),
}


def _in_inference(rank: int) -> Tensor:
    with torch.inference_mode():
        return _dense(rank) + 0


def _values(tensor: Tensor) -> list[Tensor]:
    """The numbers of a tensor of any kind, dense."""
    if tensor.is_nested:
        return [part for one in tensor.unbind() for part in _values(one)]
    if tensor.is_quantized:
        return [tensor.dequantize()]
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return [dense.resolve_conj().contiguous().reshape(-1).view(torch.uint8)]


class Model(nn.Module):
    """A linear layer, scaled by what it reads of its buffers: one of every kind, every other one left out of state dicts."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        for i, (kind, make) in enumerate(KINDS.items()):
            self.register_buffer(kind, make(rank), persistent=i % 2 > 0)

    def forward(self, x: Tensor) -> Tensor:
        """A scalar, fp32."""
        read = [
            values.float().abs().mean() for kind in KINDS for values in _values(getattr(self, kind)) if values.numel()
        ]
        return (self.linear(self.norm(x)).float() * torch.stack(read).mean().log()).square().mean()


def trains(rank: int, world_size: int, stage: int) -> None:
    torch.manual_seed(0)
    model, plain = Model(rank), Model(0)
    for part in ("norm", "linear"):
        getattr(plain, part).load_state_dict(getattr(model, part).state_dict())
    x = torch.randn(8, 4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.01, eps=1e-5)
    with engine_of(model, make_config(stage, micro=8)) as engine:
        for _ in range(2):
            optimizer.zero_grad()
            plain(x).backward()
            optimizer.step()
            engine.backward(engine(x))
            engine.step()
        for kind in KINDS:
            found, wanted = getattr(model, kind), getattr(plain, kind)
            assert (found.dtype, found.layout) == (wanted.dtype, wanted.layout), kind
            pairs = zip(_values(found), _values(wanted), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), kind
        assert engine.module.state_dict().keys() == plain.state_dict().keys()
        values = whole_values(model)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(values[name], param.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_a_model_with_buffers_of_every_kind_trains(stage: int, world_size: int) -> None:
    run_ranks(world_size, trains, stage)
