"""A model divided over ranks by hand, as tensor and pipeline parallelism divide one: what checkpoints have to put together.

The double knows no tensor parallel layers. Each rank's loss is that of its own part, so parts train without messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from deepspeed.checkpoint.names import name_children
from deepspeed.mesh.marks import Cut, Mark, mark
from tests.checkpoint.runs import own_states
from tests.engine.runs import engine_of, make_config, whole_weights

WIDTH, NUM_LAYERS = 12, 2
FUSED = 3 * WIDTH


class Grid:
    """An mpu: ranks are numbered by stage, then data-parallel, then tensor-parallel, the last ones next to each other."""

    def __init__(self, pp: int, tp: int) -> None:
        self.pp, self.tp = pp, tp
        self.dp = dist.get_world_size() // (pp * tp)
        rank = dist.get_rank()
        self.stage, self.dp_rank, self.tp_rank = rank // (self.dp * tp), rank // tp % self.dp, rank % tp

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.stage

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pp


class Layer(nn.Module):
    """A fused projection cut by rows in three ranges, one cut by columns, and what every rank repeats."""

    def __init__(self, tp: int, rank: int, marks: str) -> None:
        super().__init__()
        part = WIDTH // tp
        self.fused = nn.Parameter(torch.randn(FUSED // tp, WIDTH))
        self.down = nn.Parameter(torch.randn(WIDTH, part))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("seen", torch.tensor([3.0]))
        if marks == "megatron":
            self.fused.tensor_model_parallel = self.down.tensor_model_parallel = True  # type: ignore[attr-defined]
        if marks == "placed":
            ranges = tuple((i * WIDTH + rank * part, i * WIDTH + (rank + 1) * part) for i in range(3))
            mark(self.fused, Mark(cuts=(Cut("tp", 0, ranges, FUSED),)))
            mark(self.down, Mark(cuts=(Cut("tp", 1, ((rank * part, (rank + 1) * part),), WIDTH),)))

    def forward(self, x: Tensor) -> Tensor:
        return (
            (x @ self.fused.T).square().mean() + (self.down.T @ x.T).square().mean() + (x * self.scale).square().mean()
        )


def divided(grid: Grid, marks: str) -> nn.Module:
    """This rank's part: its stage's layers, each cut over tp."""
    num_here = NUM_LAYERS // grid.pp
    layers = nn.ModuleList()
    for i in range(num_here):
        torch.manual_seed(100 * (grid.stage * num_here + i) + (grid.tp_rank if marks == "none" else 0))
        layers.append(Layer(grid.tp, grid.tp_rank, marks))
    name_children(layers, {str(i): str(grid.stage * num_here + i) for i in range(num_here)})

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return sum((layer(x) for layer in self.layers), x.new_zeros(()))

    return Stage()


@dataclass
class Held:
    """What one rank holds, under its own names, and its (stage, dp rank, tp rank)."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    place: tuple[int, int, int] = (0, 0, 0)
    error: str = ""


def run(
    rank: int, world_size: int, folder: Any, pp: int, tp: int, stage: int, does: str, marks: str = "placed"
) -> Held:
    """Train and save, or load."""
    grid = Grid(pp, tp)
    model = divided(grid, marks)
    if does == "load":
        with torch.no_grad():
            for value in [*model.parameters(), *model.buffers()]:
                value.add_(1)
    with engine_of(model, make_config(stage, micro=2), mpu=grid) as engine:
        if does == "save":
            torch.manual_seed(grid.dp_rank)
            for _ in range(2):
                engine.backward(engine(torch.randn(2, WIDTH)))
                engine.step()
            engine.save_checkpoint(str(folder))
        else:
            before = engine.module.layers[0].scale.detach().clone() if stage < 3 else None
            try:
                engine.load_checkpoint(str(folder))
            except Exception as error:
                assert before is None or torch.equal(engine.module.layers[0].scale, before)
                return Held(error=str(error))
        return Held(own_weights(engine), own_states(engine), (grid.stage, grid.dp_rank, grid.tp_rank))


def own_weights(engine: Any) -> dict[str, Tensor]:
    """What this model-parallel rank holds, whole over its data-parallel ranks; on the first of them."""
    module = engine.module
    found = {name: deepspeed.utils.safe_get_full_fp32_param(param).clone() for name, param in module.named_parameters()}
    found |= {name: value.clone() for name, value in module.named_buffers()}
    return found if engine.mesh.rank("average") == 0 else {}


def put_together(ranks: list[Held], pp: int, tp: int) -> dict[str, Tensor]:
    """The whole model's weights and states, from what every rank holds, by indexing."""
    found: dict[str, Tensor] = {}
    per_stage = NUM_LAYERS // pp
    for stage in range(pp):
        parts: list[dict[str, Tensor]] = []
        for tp_rank in range(tp):
            here = [held for held in ranks if (held.place[0], held.place[2]) == (stage, tp_rank)]
            part = dict(next(held.weights for held in here if held.weights))
            pieces: dict[str, dict[int, Tensor]] = {}
            for held in here:
                for (kind, name, start), values in held.states.items():
                    pieces.setdefault(f"{kind} {name}", {})[start] = values
            for key, of_key in pieces.items():
                part[key] = torch.cat([of_key[at] for at in sorted(of_key)]).view(part[key.split()[-1]].shape)
            parts.append(part)
        for key in parts[0]:
            number = int(key.split("layers.")[1][0])
            name = key.replace(f"layers.{number}", f"layers.{stage * per_stage + number}")
            if key.endswith("fused"):
                thirds = [part[key].view(3, WIDTH // tp, WIDTH) for part in parts]
                found[name] = torch.cat(thirds, dim=1).reshape(FUSED, WIDTH)
            elif key.endswith("down"):
                found[name] = torch.cat([part[key] for part in parts], dim=1)
            else:
                assert all(torch.equal(part[key], parts[0][key]) for part in parts), key
                found[name] = parts[0][key]
    return found


class Tiny(nn.Module):
    """The model of the checkpoint in `version_1/`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("count", torch.tensor([0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def load_version_1(rank: int, world_size: int, folder: Any) -> Held:
    """Load what an earlier release wrote."""
    with engine_of(Tiny(), make_config(3, micro=2)) as engine:
        _, client = engine.load_checkpoint(str(folder))
        assert client is not None and client["note"] == "version 1"
        return Held(whole_weights(engine), own_states(engine))
