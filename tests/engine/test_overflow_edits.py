"""A step of fp16 that overflows after the script has edited its model is skipped with what it edited in place, as plain
PyTorch with a loss scale would: the edits stay, nothing is stepped, and training goes on from them.

And what a script does to gradients has its effect where optimizer states rest in main memory or on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
import deepspeed.utils.errors
from tests.edits import EngineSide, PlainSide, adamw, assert_same
from tests.edits import Net as EditedNet
from tests.harness import run_ranks

Edit = Callable[[Any], None]


class Net(EditedNet):
    """The net whose loss can be made to overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.explodes = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error, or infinity times that."""
        loss = super().forward(x, y)
        return loss * float("inf") if self.explodes else loss


def write(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            param.mul_(0.5)


def write_through_data(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            param.data.clamp_(-0.2, 0.2)


def assign(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            param.data = param.data * 0.5


def freeze(side: Any) -> None:
    side.module.layers[1].requires_grad_(False)


def unfreeze(side: Any) -> None:
    side.module.first.requires_grad_(True)


def add(side: Any) -> None:
    torch.manual_seed(7)
    side.module.layers.append(nn.Linear(8, 8, dtype=side.dtype))
    side.give(list(side.module.layers[-1].parameters()))


def delete(side: Any) -> None:
    del side.module.layers[1]


EDITS: tuple[Edit, ...] = (write, write_through_data, assign, freeze, unfreeze, add, delete)


def freeze_first(module: Any) -> None:
    module.first.requires_grad_(False)


def overflow(rank: int, world_size: int, stage: int, device: str, folder: Path) -> None:
    """Each edit before or after the backward of a step that overflows, and two steps more."""
    places: dict[str, Any] = (
        {} if device == "none" else {"offload_optimizer": {"device": device, "nvme_path": str(folder)}}
    )
    for i, edit in enumerate((*EDITS, *EDITS)):
        torch.manual_seed(0)
        model = Net()
        freeze_first(model)
        plain = PlainSide(copy.deepcopy(model), adamw, stage, torch.float16, world_size)
        side = EngineSide(model, adamw, stage, torch.float16, rank, world_size, **places)
        comes_after = i >= len(EDITS)
        try:
            for either in (plain, side):
                either.backward(0)
                either.step()
                if not comes_after:
                    edit(either)
                either.module.explodes = True
                either.backward(1)
                either.module.explodes = False
                if comes_after:
                    edit(either)
            plain._grads.clear()  # skipped
            side.step()
            assert side.engine.skipped_steps == 1, "the step was taken"
            for either in (plain, side):
                for seed in (2, 3):
                    either.backward(seed)
                    either.step()
            assert_same(plain, side)
        except BaseException as error:
            error.add_note(
                f"[{edit.__name__} {'after' if comes_after else 'before'} the backward, stage {stage}, {device}]"
            )
            raise
        finally:
            side.engine.destroy()


@pytest.mark.quick("0-none-2", "2-cpu-2", "3-none-2", "3-nvme-1")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("stage", "device"),
    [(0, "none"), (1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"), (3, "nvme")],
)
def test_a_step_that_overflows_keeps_what_the_script_edited_and_steps_nothing(
    stage: int, device: str, world_size: int, tmp_path: Path
) -> None:
    run_ranks(world_size, overflow, stage, device, tmp_path)


def assigned_gradients(rank: int, world_size: int, stage: int, device: str, dtype: torch.dtype, folder: Path) -> None:
    """Half of each gradient is assigned, set, or edited where it is shown."""
    places: dict[str, Any] = {"offload_optimizer": {"device": device, "nvme_path": str(folder)}}
    torch.manual_seed(0)
    model = EditedNet()
    plain = PlainSide(copy.deepcopy(model), adamw, stage, dtype, world_size)
    side = EngineSide(model, adamw, stage, dtype, rank, world_size, **places)
    try:
        for seed in range(4):
            for either in (plain, side):
                either.backward(seed)
            for gradients in plain._grads.values():
                gradients[:] = [gradient * 0.5 for gradient in gradients]
            params = list(model.parameters())
            for param in params:
                half = deepspeed.utils.safe_get_full_grad(param) * 0.5
                if seed % 2:
                    deepspeed.utils.safe_set_full_grad(param, half)
                else:
                    with deepspeed.zero.GatheredParameters([param]):
                        param.grad = half.to(dtype)
            for either in (plain, side):
                either.step()
        assert_same(plain, side)
    finally:
        side.engine.destroy()


@pytest.mark.quick("[13]-cpu-fp32-2", "3-nvme-bf16-[12]")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "device"), [(1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_gradients_that_a_script_gives_are_stepped_where_states_rest_on_a_tier(
    stage: int, device: str, dtype: torch.dtype, world_size: int, tmp_path: Path
) -> None:
    run_ranks(world_size, assigned_gradients, stage, device, dtype, tmp_path)


def scales(rank: int, world_size: int, stage: int) -> None:
    """Losses scaled by `optimizer.backward`, by a scale that the script sets."""
    torch.manual_seed(0)
    model = EditedNet()
    plain = PlainSide(copy.deepcopy(model), adamw, stage, torch.float16, world_size)
    side = EngineSide(model, adamw, stage, torch.float16, rank, world_size)
    optimizer = side.engine.optimizer
    try:
        for seed, scale in enumerate((128.0, 32.0, 512.0)):
            optimizer.loss_scale = plain.scale = scale
            assert optimizer.loss_scaler.cur_scale == side.engine.loss_scale() == scale
            plain.backward(seed)
            plain.step()
            optimizer.backward(side.engine(*side._share(seed)))
            with pytest.raises(deepspeed.utils.errors.TrainingStateError, match="gradients of a backward are there"):
                optimizer.loss_scale = 64.0
            side.step()
        assert_same(plain, side)
    finally:
        side.engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_scale_that_the_script_sets_scales_what_the_optimizer_differentiates(
    stage: int, world_size: int
) -> None:
    run_ranks(world_size, scales, stage)


def of_inputs(rank: int, world_size: int, stage: int) -> None:
    """Gradients by `torch.autograd.grad` are the caller's own: nothing is accumulated, so nothing has to be scaled."""
    torch.manual_seed(0)
    model = EditedNet()
    plain = copy.deepcopy(model).half()
    side = EngineSide(model, adamw, stage, torch.float16, rank, world_size)
    found = []
    try:
        for net in (plain, side.engine):
            x, y = side._share(0)
            x.requires_grad_(True)
            loss = net(x, y)
            found += torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-3)
        with pytest.raises(deepspeed.utils.errors.TrainingStateError, match="on an unscaled loss"):
            loss.backward()
    finally:
        side.engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_of_inputs_are_taken_in_fp16_without_a_loss_scale(stage: int, world_size: int) -> None:
    run_ranks(world_size, of_inputs, stage)
