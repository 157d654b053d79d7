"""Checkpointed calls give the bits of plain ones, dropout included, wherever their inputs rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from deepspeed.activation import settings as activation_settings
from deepspeed.activation.saved import Packed
from tests.harness import run_ranks

checkpointing = deepspeed.checkpointing
WIDTH = 24


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    """Undo `configure` and forget named random states."""
    checkpointing.get_cuda_rng_tracker().reset()
    activation_settings._configured.__init__()  # type: ignore[misc]


class Ranks:
    """An mpu of ours: all ranks of the group are model-parallel."""

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD


class Block(nn.Module):
    """Dropout from the default random state and from the model-parallel one, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, scale: Tensor, flag: str = "", *, shift: Tensor | None = None) -> Tensor:
        x = self.layers(x) * scale
        tracker = checkpointing.get_cuda_rng_tracker()
        if tracker.get_states():
            with tracker.fork():
                x = torch.dropout(x, 0.5, True)
        return x if shift is None else x + shift


def train(call: Callable[..., Any] | None, *, rows: int = 5, seed: int = 3) -> tuple[float, list[Tensor]]:
    """Loss and gradients (of parameters, then of the inputs) of three blocks; `call` runs each."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    x, shift = torch.randn(rows, WIDTH, requires_grad=True), torch.randn(rows, WIDTH, requires_grad=True)
    scale = torch.rand(rows, 1)
    torch.manual_seed(seed)
    h = x.exp()
    for block in blocks:
        h = h + (call or (lambda f, *a, **k: f(*a, **k)))(block, h, scale, "flag", shift=shift)
    loss = h.square().mean()
    loss.backward()
    grads = [p.grad for block in blocks for p in block.parameters()] + [x.grad, shift.grad]
    return loss.item(), [grad.clone() for grad in grads if grad is not None]


def assert_same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> None:
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1]) == 14
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


CALLS = ["checkpoint", "non_reentrant_checkpoint"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"checkpoint_in_cpu": True},
    {"synchronize": True, "profile": True},
    {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 3},
    {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 3, "checkpoint_in_cpu": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("name", CALLS)
def test_one_rank_gives_the_bits_of_a_plain_call(name: str, options: dict[str, Any]) -> None:
    checkpointing.configure(None, **options)
    assert_same(train(getattr(checkpointing, name)), train(None))


def several(rank: int, world_size: int, name: str) -> None:
    try:
        checkpointing.configure(Ranks())
        checkpointing.model_parallel_cuda_manual_seed(7)
        plain = train(None)
        checkpointing.model_parallel_cuda_manual_seed(7)
        again = train(getattr(checkpointing, name))
        assert_same(again, plain)
        losses: list[Any] = [None] * world_size
        dist.all_gather_object(losses, again[0])
        assert losses[0] != losses[1], "model-parallel dropout differs between the ranks"
    finally:
        forget()


@pytest.mark.parametrize("name", CALLS)
def test_model_parallel_dropout_repeats_itself(name: str) -> None:
    run_ranks(2, several, name)


@pytest.mark.parametrize("options", [*OPTIONS[3:], {"partition_activations": True}], ids="+".join)
@pytest.mark.parametrize("name", CALLS)
def test_partitioned_inputs_give_the_bits_of_whole_ones(name: str, options: dict[str, Any]) -> None:
    run_ranks(2, equal_inputs, name, options)


def equal_inputs(rank: int, world_size: int, name: str, options: dict[str, Any]) -> None:
    try:
        checkpointing.configure(Ranks(), **options)
        for rows, _ in itertools.product((4, 5), range(2)):  # 5 * 24 elements are not divisible by 2 * 64
            assert_same(train(getattr(checkpointing, name), rows=rows), train(None, rows=rows))
    finally:
        forget()


@pytest.mark.parametrize("in_cpu", [False, True])
def test_each_rank_keeps_its_share_of_a_partitioned_input(in_cpu: bool) -> None:
    shares = run_ranks(2, kept, in_cpu)
    assert shares == [[[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]], [[3.0, 4.0, 0.0], [5.0, 5.0, 0.0]]]


def kept(rank: int, world_size: int, in_cpu: bool) -> list[list[float]]:
    try:
        checkpointing.configure(Ranks(), partition_activations=True, checkpoint_in_cpu=in_cpu)
        settings = activation_settings.current()
        from deepspeed.activation.saved import Saver

        saver = Saver([True, True, False], partition=True, in_cpu=in_cpu, ranks=settings.ranks, arena=None)
        packed = [saver.pack(torch.arange(5.0)), saver.pack(torch.full((5,), 5.0)), saver.pack(torch.ones(5))]
        assert isinstance(packed[2], Tensor), "a constant stays whole"
        assert torch.equal(saver.unpack(packed[0]), torch.arange(5.0))
        return [piece.piece.tolist() for piece in packed[:2] if isinstance(piece, Packed)]
    finally:
        forget()


@pytest.mark.parametrize("name", CALLS)
def test_outputs_come_back_as_the_function_made_them(name: str) -> None:
    call = getattr(checkpointing, name)
    x = torch.randn(3, requires_grad=True)
    assert isinstance(call(lambda v: (v * 2,), x), Tensor), "a tuple of one is unwrapped"
    first, second = call(lambda v: (v * 2, v * 3), x)
    nested = call(lambda v: {"y": v * 2, "n": 4}, x)
    assert nested["n"] == 4
    (first.sum() + second.sum() + nested["y"].sum()).backward()
    assert torch.equal(x.grad, torch.full((3,), 7.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CALLS)
def test_tensors_in_nested_arguments_get_gradients(name: str) -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    getattr(checkpointing, name)(
        lambda pair, *, other: pair[0] * pair[1] * other["y"], (x, 2), other={"y": y}
    ).sum().backward()
    assert torch.equal(x.grad, 2 * y.detach()) and torch.equal(y.grad, 2 * x.detach())  # type: ignore[arg-type]


def test_parameters_get_gradients_where_no_input_does() -> None:
    layer = nn.Linear(4, 4)
    checkpointing.checkpoint(layer, torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_without_grad_mode_the_function_is_just_run() -> None:
    calls = []
    with torch.no_grad():
        checkpointing.checkpoint(lambda v: calls.append(1) or v, torch.ones(2, requires_grad=True))
    assert calls == [1]


@pytest.mark.parametrize("name", CALLS)
def test_a_contiguous_buffer_is_made_once_and_refuses_one_checkpoint_more(name: str) -> None:
    call = getattr(checkpointing, name)
    checkpointing.configure(None, partition_activations=True, contiguous_checkpointing=True, num_checkpoints=3)
    arena = activation_settings.current().arena
    assert arena is not None
    for _ in range(2):
        train(call)
        assert arena.nbytes == 2 * 3 * 5 * WIDTH * 4, "two positions with activations, three slots each"
    checkpointing.reset()
    assert arena.nbytes == 0
    checkpointing.set_num_layers(2)
    with pytest.raises(ValueError, match="more than number_checkpoints = 2 checkpoints are alive at once"):
        train(call)


def test_profile_reports_forward_and_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("deepspeed.activation.call.log_dist", lambda text, **_: lines.append(text))
    checkpointing.configure(None, profile=True)
    checkpointing.checkpoint(nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["checkpoint Linear: forward", "checkpoint Linear: recompute"]


def test_configure_takes_defaults_then_the_configuration_then_arguments() -> None:
    config = {"train_batch_size": 1, "activation_checkpointing": {"cpu_checkpointing": True, "profile": True}}
    assert not checkpointing.is_configured()
    checkpointing.configure(None, deepspeed_config=config, profile=False)
    settings = activation_settings.current()
    assert checkpointing.is_configured()
    assert (settings.checkpoint_in_cpu, settings.profile, settings.partition_activations) == (True, False, False)
    checkpointing.configure(None, deepspeed_config=deepspeed.DeepSpeedConfig(config))
    assert activation_settings.current().profile
    checkpointing.configure(None)
    assert not activation_settings.current().checkpoint_in_cpu, "a second call starts from the defaults"
    checkpointing.partition_activations_in_checkpoint(True)
    assert activation_settings.current().partition_activations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contiguous_checkpointing": True, "num_checkpoints": 2}, "without partition_activations"),
        ({"contiguous_checkpointing": True, "partition_activations": True}, "num_checkpoints = None"),
        ({"mpu_": object()}, "mpu_ is a object without get_model_parallel_rank"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        checkpointing.configure(**{"mpu_": None, **options})


def test_legacy_path_is_the_same_module() -> None:
    from deepspeed.runtime.activation_checkpointing import checkpointing as legacy

    assert legacy.checkpoint is checkpointing.checkpoint
    assert issubclass(legacy.CheckpointFunction, torch.autograd.Function)
