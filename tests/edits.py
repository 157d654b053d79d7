"""A script that edits its model between steps, run twice: in plain PyTorch, and through an engine.

Tests of single kinds (`tests/zero/test_facts.py`) and the fuzzer (`tests/soak/edits.py`) write edits once, as functions of
a *side*; a side has the model, and knows how weights are written and groups are given on it. After the same edits and
steps both sides must have the same weights.

In low precision the plain side is the textbook one: fp32 masters that start exact, gradients of the ranks' shares averaged
in fp32 and rounded once. What a script writes into a weight is its master's value from then on; elements that were not
written keep what rounding took from the weight.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from tests.engine.runs import small_units

ROWS = 4
"""Samples of all ranks together in a step."""

FP16_SCALE = 128.0
"""What losses are multiplied by in fp16: gradients of both sides are rounded at the same place."""

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Net(nn.Module):
    """A residual net that runs whatever layers it has."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error, fp32."""
        hidden = self.first(x) * self.scale
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return F.mse_loss(self.last(hidden).float(), y.float())


def sgd(params: Any) -> torch.optim.Optimizer:
    """With momentum and weight decay, so that a parameter that is stepped without a gradient would show."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(params: Any) -> torch.optim.Optimizer:
    """With an eps that does not blow rounding up."""
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.05, eps=1e-4)


OPTIMIZERS: dict[str, MakeOptimizer] = {"sgd": sgd, "adamw": adamw}


def batch_of(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of all ranks in one step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, 6, generator=generator).to(dtype), torch.randn(ROWS, 3, generator=generator)


class Side(Protocol):
    """What an edit may use."""

    module: Any
    dtype: torch.dtype
    stage: int
    """Of the engine; edits that cannot be made to sharded parameters skip 3 on both sides."""

    def writing(self, params: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Inside, these may be read and written."""

    def give(self, params: list[nn.Parameter], **settings: Any) -> None:
        """Add a parameter group."""

    def forward(self, seed: int) -> None:
        """A forward alone, for evaluation."""

    def backward(self, seed: int) -> None:
        """A forward and backward; gradients add up."""

    def step(self) -> None:
        """Update."""


Edit = Callable[[Any], None]


class PlainSide:
    """Plain PyTorch, on one process, with the shares of all ranks."""

    def __init__(
        self, module: nn.Module, make_optimizer: MakeOptimizer, stage: int, dtype: torch.dtype, world_size: int
    ) -> None:
        self.world_size, self.dtype, self.stage = world_size, dtype, stage
        self.scale = FP16_SCALE if dtype == torch.float16 else 1.0
        exact = {name: param.detach().clone() for name, param in module.named_parameters()}
        self.module = module.to(dtype)
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        for name, param in module.named_parameters():
            self._make_master(param, exact[name] if param.requires_grad else param)
        self.optimizer = make_optimizer(list(self.masters.values()))
        self._grads: dict[nn.Parameter, list[Tensor]] = {}

    def _make_master(self, param: nn.Parameter, value: Tensor) -> nn.Parameter:
        is_own = param.dtype == torch.float32
        self.masters[param] = param if is_own else nn.Parameter(value.detach().float())
        return self.masters[param]

    def writing(self, params: Iterable[nn.Parameter]) -> Any:
        return torch.no_grad()

    def give(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.optimizer.add_param_group({"params": [self._make_master(p, p) for p in params], **settings})

    def forward(self, seed: int) -> None:
        with torch.no_grad():
            self.module(*batch_of(seed, self.dtype))

    def backward(self, seed: int) -> None:
        x, y = batch_of(seed, self.dtype)
        for x_share, y_share in zip(x.chunk(self.world_size), y.chunk(self.world_size), strict=True):
            for param in self.module.parameters():
                param.grad = None
            loss = self.module(x_share, y_share)
            (loss * self.scale).backward()
            for param in self.module.parameters():
                if param.grad is not None:
                    self._grads.setdefault(param, []).append(param.grad)

    @torch.no_grad()
    def step(self) -> None:
        for param, master in self.masters.items():
            self._follow(param, master)
            master.grad = None
            if param in self._grads:
                total = sum(grad.float() for grad in self._grads[param]) / self.world_size
                assert isinstance(total, Tensor)
                master.grad = total.to(param.dtype).float() / self.scale
        self.optimizer.step()
        for param, master in self.masters.items():
            if master is not param:
                param.copy_(master)
        for param in {*self.masters, *self.module.parameters()}:
            param.grad = None
        self._grads.clear()

    def _follow(self, param: nn.Parameter, master: nn.Parameter) -> None:
        if master is not param:
            master.data = torch.where(master.to(param.dtype) != param, param.float(), master)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter's value, fp32."""
        return {name: param.detach().float().clone() for name, param in self.module.named_parameters()}

    def save(self) -> Any:
        """Everything that a checkpoint has, by name."""
        saved = {}
        for name, param in self.module.named_parameters():
            master = self.masters.get(param)
            if master is not None:
                self._follow(param, master)
            state = self.optimizer.state.get(master, {}) if master is not None else {}
            saved[name] = copy.deepcopy((param.detach(), None if master is None else master.detach(), dict(state)))
        return saved

    @torch.no_grad()
    def load(self, saved: Any) -> None:
        """Back to what `save` gave."""
        for name, param in self.module.named_parameters():
            value, master_value, state = copy.deepcopy(saved[name])
            master = self.masters.get(param)
            param.copy_(value)
            if master is not None:
                master.copy_(value if master_value is None else master_value)
                self.optimizer.state.pop(master, None)
                if state:
                    self.optimizer.state[master] = state
        self._grads.clear()


class EngineSide:
    """The same through `deepspeed.initialize`, on this rank of several."""

    def __init__(
        self, module: nn.Module, make_optimizer: MakeOptimizer, stage: int, dtype: torch.dtype, rank: int, world_size: int,
        **zero: Any,
    ) -> None:  # fmt: skip
        self.module, self.stage, self.dtype = module, stage, dtype
        self.rank, self.world_size = rank, world_size
        self.client = make_optimizer(module.parameters())
        config = {
            "train_micro_batch_size_per_gpu": ROWS // world_size, "gradient_clipping": 0.0,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16, "loss_scale": FP16_SCALE},
            "zero_optimization": {
                "stage": stage, "reduce_bucket_size": 100, "stage3_param_persistence_threshold": 10, **zero,
            },
        }  # fmt: skip
        with small_units():
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.client, config=config)
        self._num_backward = 0

    def writing(self, params: Iterable[nn.Parameter]) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        if self.stage == 3:
            stack.enter_context(deepspeed.zero.GatheredParameters(list(params), modifier_rank=0))
        return stack

    def give(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.client.add_param_group({"params": params, **settings})

    def forward(self, seed: int) -> None:
        with torch.no_grad():
            self.engine(*self._share(seed))

    def backward(self, seed: int) -> None:
        self.engine.backward(self.engine(*self._share(seed)))

    def _share(self, seed: int) -> tuple[Tensor, Tensor]:
        x, y = (value.chunk(self.world_size)[self.rank] for value in batch_of(seed, self.dtype))
        return x, y

    def step(self) -> None:
        self.engine.step()

    def weights(self) -> dict[str, Tensor]:
        """Every parameter's value, fp32. Collective."""
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            return {name: param.detach().float().clone() for name, param in self.module.named_parameters()}

    def save(self, folder: Path) -> Any:
        """A checkpoint."""
        self.engine.save_checkpoint(str(folder), tag="edits")
        return folder

    def load(self, folder: Path) -> None:
        """Back to it."""
        self.engine.load_checkpoint(str(folder), tag="edits")


@contextlib.contextmanager
def two_sides(
    rank: int,
    world_size: int,
    stage: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "sgd",
    prepare: Edit | None = None,
    make_model: Callable[[], nn.Module] = Net,
    **zero: Any,
) -> Iterator[tuple[PlainSide, EngineSide]]:
    """Both sides of one model; `prepare(module)` edits it before either has an optimizer."""
    torch.manual_seed(0)
    model = make_model()
    if prepare is not None:
        prepare(model)
    plain = PlainSide(copy.deepcopy(model), OPTIMIZERS[optimizer], stage, dtype, world_size)
    side = EngineSide(model, OPTIMIZERS[optimizer], stage, dtype, rank, world_size, **zero)
    try:
        yield plain, side
    finally:
        side.engine.destroy()


def assert_same(plain: PlainSide, side: EngineSide) -> None:
    """Both sides have the same parameters with the same values."""
    want, got = plain.weights(), side.weights()
    assert want.keys() == got.keys(), f"names differ: {sorted(want.keys() ^ got.keys())}"
    # bf16: two orders of summation, and now and then the rounding of a weight.
    tolerance = 2e-6 if plain.dtype == torch.float32 else 2e-2
    for name, value in want.items():
        off = float((got[name] - value).abs().max() / value.abs().max().clamp_min(1.0)) if value.numel() else 0.0
        assert off <= tolerance, f"{name} is off by {off:.2e}"
