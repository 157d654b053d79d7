"""Constructors that copy, load, tie and edit layers build under `zero.Init` what they build without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils.errors import ShardError
from tests.harness import run_ranks
from tests.zero.sharded import whole_values


class Teacher(nn.Module):
    """An EMA teacher, as a copy of what was registered before."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


class Loaded(nn.Module):
    """One layer gets the state dict of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.load_state_dict(self.a.state_dict())


class Cloned(nn.Module):
    """Clones of a layer that is registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
        self.width = nn.Parameter(torch.ones(self.layers[0].weight.shape[1]))


class Edited(nn.Module):
    """Edits of `.data` in place and by assignment, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.weight.data[0] = 7.0
        self.b.weight.data = self.a.weight.data * 2
        self.c.weight = self.a.weight
        nn.init.zeros_(self.c.bias)


class Derived(nn.Module):
    """Parameters and buffers that are made of other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.total = nn.Parameter(self.linear.weight.detach().sum(0))
        self.register_buffer("norm", self.linear.weight.detach().norm())
        self.register_buffer("table", torch.randn(3, 6), persistent=False)
        self.scales = nn.ParameterList(nn.Parameter(torch.full((2,), float(i))) for i in range(2))
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.eye(2))})


class Applied(nn.Module):
    """Initialised by `apply` at the end, with gradients off, and by a method of a layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(5, 6, padding_idx=0))
        self.apply(self._init)
        self.layers[0].reset_parameters()
        with torch.no_grad():
            self.layers[2].weight[1].fill_(3.0)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.orthogonal_(module.weight)


class Base(nn.Module):
    """A constructor that calls another one, and replaces and freezes what that made."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)


class Replaced(Base):
    """See Base."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.body.requires_grad_(False)
        del self.body.bias
        self.body.register_parameter("bias", None)


class Branching(nn.Module):
    """Looks at values while it builds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        largest = float(self.a.weight.abs().max())
        self.b = nn.Linear(6, 4 if largest < 100 else 2)
        self.a.weight.data.div_(largest)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12), 2),
    "transformer": lambda: nn.Transformer(6, 2, 1, 1, 12),
    "teacher": Teacher,
    "loaded": Loaded,
    "cloned": Cloned,
    "edited": Edited,
    "derived": Derived,
    "applied": Applied,
    "replaced": Replaced,
    "branching": Branching,
}


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True),
    lambda: nn.GRU(4, 6, batch_first=True),
    lambda: nn.LSTM(4, 6, proj_size=3),
    lambda: nn.RNNCell(4, 6),
    lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True),
    lambda: nn.Bilinear(3, 4, 5),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.PReLU(4)),
    lambda: nn.ConvTranspose1d(3, 6, 2, groups=3),
    lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4)),
    lambda: nn.EmbeddingBag(7, 3, mode="sum"),
    lambda: nn.Embedding.from_pretrained(torch.randn(4, 3), freeze=False),
    lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6]),
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 12), 2, nn.LayerNorm(6)),
    lambda: nn.Sequential(*(copy.deepcopy(nn.Linear(3, 3)) for _ in range(3))),
    lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ModuleList([nn.RMSNorm(3), nn.Identity()])}),
]
"""Of torch.nn."""


def layers(rank: int, world_size: int) -> None:
    for make in LAYERS:
        torch.manual_seed(rank)
        with deepspeed.zero.Init(dtype=torch.float32):
            model = make()
        torch.manual_seed(0)
        plain = make()
        values = whole_values(model)
        for key, param in plain.named_parameters():
            assert torch.equal(values[key], param.detach()), f"{plain}: {key}"
        for (key, buffer), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(buffer, wanted), f"{plain}: {key}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_of_torch_are_built_as_the_first_ranks(world_size: int) -> None:
    run_ranks(world_size, layers)


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", "with arguments")


INITIALISERS: list[Callable[[torch.Tensor], object]] = [
    nn.init.normal_, nn.init.trunc_normal_, nn.init.ones_, nn.init.eye_, nn.init.xavier_uniform_, nn.init.xavier_normal_,
    nn.init.kaiming_uniform_, nn.init.orthogonal_, lambda w: nn.init.sparse_(w, 0.3), lambda w: nn.init.orthogonal_(w[:3], 2.0),
    lambda w: w.data.fill_(nn.init._calculate_correct_fan(w, "fan_out")),
]  # fmt: skip
"""Of torch.nn.init; called on a layer that its parent has taken, which is sharded then."""


def initialised(rank: int, world_size: int) -> None:
    for initialise in INITIALISERS:

        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(5, 6))
                initialise(self.layers[0].weight)  # noqa: B023

        torch.manual_seed(rank)
        with deepspeed.zero.Init(dtype=torch.float32):
            model = Late()
        torch.manual_seed(0)
        plain = Late()
        for key, value in whole_values(model).items():
            assert torch.equal(value, plain.get_parameter(key)), f"{_name(initialise)}: {key}"
    if world_size > 1:
        with pytest.raises(ShardError, match="cannot be used in 'orthogonal_'"):
            nn.init.orthogonal_(model.layers[0].weight)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_initialiser_of_torch_writes_sharded_weights(world_size: int) -> None:
    run_ranks(world_size, initialised)


def built(rank: int, world_size: int, name: str, dtype: torch.dtype, nested: bool) -> None:
    torch.manual_seed(rank)
    with deepspeed.zero.Init(dtype=dtype):
        if nested:
            with deepspeed.zero.Init(dtype=dtype):
                model = BUILD[name]()
        else:
            model = BUILD[name]()
    torch.manual_seed(0)
    plain = BUILD[name]()
    values = whole_values(model)
    assert values.keys() == {key for key, _ in plain.named_parameters()}
    for key, param in plain.named_parameters():
        assert torch.equal(values[key], param.detach().to(dtype)), key
        assert model.get_parameter(key).requires_grad is param.requires_grad
        assert model.get_parameter(key).numel() == 0, f"{key} is not sharded"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in sorted(BUILD)),
        # A layer is cast when its parent takes it; one that is initialised again after that draws in bf16.
        *((name, torch.bfloat16) for name in ("cloned", "loaded", "teacher")),
    ],
)
def test_a_constructor_builds_the_first_ranks_weights(name: str, dtype: torch.dtype, world_size: int) -> None:
    run_ranks(world_size, built, name, dtype, False)


@pytest.mark.parametrize("name", ["encoder", "teacher"])
def test_a_constructor_in_nested_contexts_too(name: str) -> None:
    run_ranks(2, built, name, torch.float32, True)
