"""What a script changes about its model between steps is taken over as plain PyTorch would, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils.errors import DeepSpeedError, ShardError, TrainingStateError
from deepspeed.zero import takeover
from deepspeed.zero.facts import TREE_EVERY
from tests.edits import Edit, Net, adamw, assert_same, two_sides
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks

STAGES = (0, 1, 2, 3)


def run(edit: Edit, rank: int, world_size: int, prepare: Edit | None, num_steps: int, kwargs: dict[str, Any]) -> None:
    """Two steps, the edit, some more."""
    with two_sides(rank, world_size, prepare=prepare, **kwargs) as (plain, side):
        for either in (plain, side):
            for seed in range(2):
                either.backward(seed)
                either.step()
            edit(either)
            for seed in range(2, 2 + num_steps):
                either.backward(seed)
                either.step()
        assert_same(plain, side)


def runs(rank: int, world_size: int, cases: list[tuple[str, dict[str, Any]]], num_steps: int = 3) -> None:
    failed = []
    for name, kwargs in cases:
        edit, prepare = EDITS[name]
        try:
            run(edit, rank, world_size, prepare, num_steps, kwargs)
        except AssertionError as error:
            failed.append(f"{name}, {kwargs}: {error}")
        except Exception as error:
            error.add_note(f"edit {name}, {kwargs}")
            raise
    assert not failed, "\n".join(failed)


def freeze_first(module: Any) -> None:
    module.first.requires_grad_(False)


def freeze_most(module: Any) -> None:
    module.requires_grad_(False)
    module.last.requires_grad_(True)


def unfreeze(side: Any) -> None:
    side.module.requires_grad_(True)


def freeze(side: Any) -> None:
    side.module.layers[1].requires_grad_(False)
    side.module.first.weight.requires_grad_(False)


def alternate(side: Any) -> None:
    for turn in range(4):
        side.module.first.requires_grad_(turn % 2 == 0)
        side.module.layers[0].requires_grad_(turn % 2 == 1)
        side.backward(10 + turn)
        side.step()


def unfreeze_between_backward_and_step(side: Any) -> None:
    side.backward(20)
    side.module.first.requires_grad_(True)
    side.step()


def unfreeze_within_a_step(side: Any) -> None:
    side.backward(20)
    side.module.first.requires_grad_(True)
    side.backward(21)
    side.step()


def write_in_place(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            param.mul_(1.5).add_(0.1)


def clamp_through_data(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            param.data.clamp_(-0.2, 0.2)


def load_state_dict(side: Any) -> None:
    torch.manual_seed(5)
    state = Net().state_dict()
    with side.writing(side.module.parameters()):
        side.module.load_state_dict(state)


def restore_a_backup(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for param in side.module.parameters():
            backup = param.data.clone()
            param.data.add_(0.3)
            param.data = backup


def assign_other_values(side: Any) -> None:
    with side.writing(side.module.parameters()):
        for i, param in enumerate(side.module.parameters()):
            param.data = (param.data * (0.5 + 0.1 * i)).clone()


def assign_while_a_layer_is_idle(side: Any) -> None:
    side.module.layers[1].forward = torch.zeros_like  # its parameters have no gradient from now on
    assign_other_values(side)


def assign_a_transposed_view(side: Any) -> None:
    weight = side.module.layers[0].weight
    with side.writing([weight]):
        weight.data = weight.data.t()


def swap_two(side: Any) -> None:
    one, two = side.module.layers[0].weight, side.module.layers[1].weight
    with side.writing([one, two]):
        one.data, two.data = two.data, one.data


def train_on_others_for_a_while(side: Any) -> None:
    params = list(side.module.parameters())
    if side.stage == 3:
        return  # whole inside of a context only, and not while a step runs
    backup = [param.data for param in params]
    for param in params:
        param.data = param.data * 0.3
    side.backward(40)
    side.step()
    for param, values in zip(params, backup, strict=True):
        param.data = values


def put_back_what_was_taken_away(side: Any) -> None:
    """As an average of weights is swapped in for an evaluation; `.data` is kept, not copied."""
    params = list(side.module.parameters())
    with side.writing(params):
        backup = [param.data for param in params]
        for param in params:
            param.data = param.data * 0.3
    side.forward(41)
    with side.writing(params):
        for param, values in zip(params, backup, strict=True):
            param.data = values


def to_vector_and_back(side: Any) -> None:
    params = list(side.module.parameters())
    with side.writing(params):
        vector = nn.utils.parameters_to_vector(params) * 0.7
        nn.utils.vector_to_parameters(vector, params)


def convert_there_and_back(side: Any) -> None:
    if side.stage < 3:
        dtype = next(side.module.parameters()).dtype
        side.module.double()
        side.module.to(dtype)


def delete_a_layer(side: Any) -> None:
    del side.module.layers[1]


def new_layer(side: Any) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(8, 8, dtype=side.dtype)


def add_a_layer_with_group(side: Any) -> None:
    side.module.layers.append(new_layer(side))
    side.give(list(side.module.layers[-1].parameters()), lr=0.02)


def add_a_layer_without_group(side: Any) -> None:
    side.module.layers.append(new_layer(side))


def replace_a_parameter(side: Any) -> None:
    side.module.layers[0].weight = nn.Parameter(new_layer(side).weight.detach().clone())


def replace_a_parameter_with_group(side: Any) -> None:
    replace_a_parameter(side)
    side.give([side.module.layers[0].weight])


def replace_a_layer_with_group(side: Any) -> None:
    side.module.layers[2] = new_layer(side)
    side.give(list(side.module.layers[2].parameters()))


def tie_two_layers(side: Any) -> None:
    side.module.layers[1].weight = side.module.layers[0].weight


def evaluate(side: Any) -> None:
    side.module.eval()
    side.forward(30)
    side.module.train()


EDITS: dict[str, tuple[Edit, Callable[[Any], None] | None]] = {
    "unfreeze one": (unfreeze, freeze_first),
    "unfreeze most": (unfreeze, freeze_most),
    "freeze": (freeze, None),
    "alternate": (alternate, freeze_first),
    "unfreeze between backward and step": (unfreeze_between_backward_and_step, freeze_first),
    "unfreeze within a step": (unfreeze_within_a_step, freeze_first),
    "write in place": (write_in_place, None),
    "write with frozen ones": (write_in_place, freeze_first),
    "clamp through data": (clamp_through_data, None),
    "load_state_dict": (load_state_dict, None),
    "restore a backup": (restore_a_backup, None),
    "assign other values": (assign_other_values, None),
    "assign while a layer is idle": (assign_while_a_layer_is_idle, None),
    "assign a transposed view": (assign_a_transposed_view, None),
    "swap two": (swap_two, None),
    "train on others for a while": (train_on_others_for_a_while, None),
    "put back what was taken away": (put_back_what_was_taken_away, None),
    "to vector and back": (to_vector_and_back, None),
    "convert there and back": (convert_there_and_back, None),
    "delete a layer": (delete_a_layer, None),
    "add a layer with group": (add_a_layer_with_group, None),
    "add a layer without group": (add_a_layer_without_group, None),
    "replace a parameter": (replace_a_parameter, None),
    "replace a parameter with group": (replace_a_parameter_with_group, None),
    "replace a layer with group": (replace_a_layer_with_group, None),
    "tie two layers": (tie_two_layers, None),
    "evaluate": (evaluate, freeze_first),
}


@pytest.mark.quick("fp32-3-2", "bf16-2-2", "fp32-0-1", "bf16-1-1")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_edits_are_taken_over_as_plain_pytorch_would(stage: int, dtype: torch.dtype, world_size: int) -> None:
    cases = [
        (name, {"stage": stage, "dtype": dtype, "optimizer": ("sgd", "adamw")[i % 2]}) for i, name in enumerate(EDITS)
    ]
    run_ranks(world_size, runs, cases)


# Refused. ---------------------------------------------------------------------------------------------------------------


def cast(side: Any) -> None:
    side.module.double()


def change_shape(side: Any) -> None:
    side.module.scale.data = torch.ones(1)


def tie_memory(side: Any) -> None:
    side.module.layers[0].weight.data = side.module.layers[1].weight.data


def drop_a_group(side: Any) -> None:
    side.client.param_groups.pop()


def empty_a_group(side: Any) -> None:
    side.client.param_groups[0]["params"] = []


def give_a_stranger(side: Any) -> None:
    side.give([nn.Parameter(torch.ones(3))])


def give_twice(side: Any) -> None:
    side.give([side.module.scale])


REFUSALS: dict[str, tuple[Edit, str]] = {
    "cast": (cast, r"is float64 now; this run keeps it in float32 \(ZeRO stage \d\).*Convert the model back"),
    "shape": (change_shape, r"scale was given data of shape \(1,\); its shape is \(8,\)"),
    "tied memory": (tie_memory, r"was given the memory of layers.*module.weight = other.weight"),
    "dropped group": (drop_a_group, "the optimizer has 0 parameter groups, and had 1"),
    "emptied group": (empty_a_group, "does not list all of its tensors any more"),
    "stranger": (give_a_stranger, "is no parameter of the model"),
    "given twice": (give_twice, "was given scale, which is in group 0 already"),
}


def refuse(rank: int, world_size: int, stage: int) -> None:
    for name, (edit, words) in REFUSALS.items():
        if stage == 3 and name in ("cast", "tied memory"):
            continue  # converting a module leaves sharded parameters as they are, and they have no `.data` to give
        with two_sides(rank, world_size, stage) as (_, side):
            side.backward(0)
            edit(side)
            with pytest.raises(TrainingStateError, match=f"(?s){words}"):
                side.step()


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_taken_over_is_refused_by_name_on_every_rank(stage: int) -> None:
    run_ranks(2, refuse, stage)


def write_alone(side: Any) -> None:
    with torch.no_grad():
        side.module.scale.mul_(2.0)


def write_through_data_alone(side: Any) -> None:
    side.module.scale.data.mul_(2.0)


def assign_alone(side: Any) -> None:
    side.module.scale.data = side.module.scale.data * 2.0


def set_a_learning_rate_alone(side: Any) -> None:
    side.client.param_groups[0]["lr"] = 0.5


ALONE: dict[str, tuple[Edit, str]] = {
    "unfreeze": (unfreeze, "ranks changed the model differently: first.bias begins to train"),
    "delete": (delete_a_layer, r"ranks changed the model differently: layers"),
    "write": (write_alone, "scale was written on some ranks, and not on rank 1"),
    "write through data": (write_through_data_alone, "scale was written on some ranks, and not on rank 1"),
    "assign": (assign_alone, "scale was written on some ranks, and not on rank 1"),
    "learning rate": (set_a_learning_rate_alone, r"\[0\]\['lr'\] is 0.05 on rank 1 and 0.5 on rank 0"),
}


def change_alone(rank: int, world_size: int, stage: int) -> None:
    for i, (name, (edit, words)) in enumerate(ALONE.items()):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        with two_sides(rank, world_size, stage, dtype, prepare=freeze_first) as (_, side):
            if (
                name in ("write", "write through data", "assign")
                and stage == 3
                and side.module.scale.ds_status.name != "AVAILABLE"
            ):
                continue
            side.backward(0)
            if rank == 0:
                edit(side)
            with pytest.raises(TrainingStateError, match=words):
                for seed in range(TREE_EVERY):
                    side.step()
                    side.backward(seed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_on_one_rank_alone_is_an_error_on_all(stage: int) -> None:
    run_ranks(2, change_alone, stage)


def share_a_layer(rank: int, world_size: int, stage: int) -> None:
    shared = nn.Linear(6, 6)
    first, second = nn.Sequential(shared, nn.Linear(6, 3)), nn.Sequential(shared, nn.Linear(6, 1))
    config = {**make_config(stage, micro=1), "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with engine_of(first, config) as engine:
        with pytest.raises(DeepSpeedError, match=r"0\.\w+ and 1 more of this Sequential belong to another live engine"):
            deepspeed.initialize(model=second, optimizer=adamw(second.parameters()), config=config)
        engine.destroy()
        with engine_of(second, config) as other:
            other.backward(other(torch.ones(1, 6)).sum())
            other.step()


@pytest.mark.parametrize("stage", STAGES)
def test_engines_that_share_parameters_are_refused(stage: int) -> None:
    run_ranks(2, share_a_layer, stage)


def save_and_load(rank: int, world_size: int, stage: int, folder: Any) -> None:
    """A layer is deleted, another added and one unfrozen; all right before a save."""
    with two_sides(rank, world_size, stage, torch.bfloat16, "adamw", prepare=freeze_first) as (plain, side):
        for either in (plain, side):
            either.backward(0)
            either.step()
            delete_a_layer(either)
            add_a_layer_with_group(either)
            unfreeze(either)
            clamp_through_data(either)
        saved = plain.save(), side.save(folder)
        for either, own in zip((plain, side), saved, strict=True):
            either.backward(1)
            either.step()
            either.load(own)
            either.backward(2)
            either.step()
        assert_same(plain, side)


@pytest.mark.parametrize("stage", STAGES)
def test_what_changed_is_saved_and_loaded(stage: int, tmp_path: Any) -> None:
    run_ranks(2, save_and_load, stage, tmp_path)


class Renamed(Net):
    """Calls its last layer by another name."""

    @property
    def last(self) -> nn.Module:
        return self.head


def rename_the_last(side: Any) -> None:
    """The same modules, in the same order."""
    side.module._modules["head"] = side.module._modules.pop("last")
    side.module.__class__ = Renamed


def save_what_is_renamed(rank: int, world_size: int, stage: int, folder: Any) -> None:
    with two_sides(rank, world_size, stage, optimizer="adamw") as (plain, side):
        for either in (plain, side):
            either.backward(0)
            either.step()
            rename_the_last(either)
        saved = plain.save(), side.save(folder)
        for either, own in zip((plain, side), saved, strict=True):
            either.backward(1)
            either.step()
            either.load(own)
            either.backward(2)
            either.step()
        assert_same(plain, side)
        assert "head.weight" in side.weights()


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_that_is_called_something_else_now_is_saved_by_that_name(stage: int, tmp_path: Any) -> None:
    run_ranks(2, save_what_is_renamed, stage, tmp_path)


PAGE = Path(__file__).parents[2] / "docs" / "coming-from-pytorch.md"


def test_the_page_lists_what_is_tested_here_and_nothing_else() -> None:
    weights = PAGE.read_text().partition("## Gradients")[0]  # that part is tests/engine/test_gradients.py's
    rows = [line.split("|")[-2].strip() for line in weights.splitlines() if line.startswith("| ")]
    named = {name.strip(" `") for row in rows for name in row.split(",")} - {"tested as", "-"}
    assert named == {*EDITS, *REFUSALS, *REPLACED, *ALONE}


def write_few(rank: int, world_size: int) -> None:
    with two_sides(rank, world_size, 0, make_model=lambda: nn.Linear(2**9, 2**7)) as (_, side):
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(takeover, "warn_once", told.append)
            if rank == 1:
                side.module.weight.data[5, 5] += 1.0
            side.engine.zero_optimizer.takeover.put_in_order()
        assert len(told) == 1 and "weight is not the same on rank 1 as on rank 0 (ZeRO stage 0)" in told[0]


def test_a_single_element_written_through_data_on_one_rank_alone_is_told_where_ranks_step_the_whole() -> None:
    run_ranks(2, write_few)


def write_unsampled(side: Any, values: slice, value: float) -> int:
    """Write one of these elements of the weight past every sample; which."""
    prints, flat = side.engine.zero_optimizer.takeover.facts.prints, side.module.weight.data.view(-1)
    for i in range(*values.indices(flat.numel())):
        before = float(flat[i])
        flat[i] = value
        if not prints.written():
            return i
        flat[i] = before
    raise AssertionError("every element is sampled")


def write_few_again_and_again(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    with two_sides(rank, world_size, stage, dtype, make_model=lambda: Wide()) as (_, side):
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(takeover, "warn_once", told.append)
            for seed in range(TREE_EVERY):
                side.backward(seed)
                if rank == 1:
                    write_unsampled(side, slice(None), 1.0)
                side.step()
        (line,) = told
        assert f"weight is not the same on rank 1 as on rank 0 (ZeRO stage {stage})" in line and "in this step" in line


class Wide(nn.Module):
    """A weight of more words than a sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 2**9, 6 * 2**4) * 0.01)

    def forward(self, x: Any, y: Any) -> Any:
        """A loss with small gradients everywhere."""
        return (self.weight.float().sum() * 1e-6 * x.float().sum()).square() + 0.0 * y.float().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_element_that_one_rank_alone_writes_in_every_step_is_told_where_ranks_step_slices(
    stage: int, dtype: torch.dtype
) -> None:
    run_ranks(2, write_few_again_and_again, stage, dtype)


def write_few_once(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """Rank 1 writes one of the first elements, which rank 0 steps, and one of the last, which are its own."""
    with two_sides(rank, world_size, stage, dtype, make_model=lambda: Wide()) as (_, side):
        flat = side.module.weight.data.view(-1)
        before = flat.clone()
        places = [0, 0]
        side.backward(0)
        if rank == 1:
            places = [write_unsampled(side, slice(0, 99), 8.0), write_unsampled(side, slice(-99, None), 8.0)]
        side.step()
        told = [places]
        torch.distributed.broadcast_object_list(told, src=1)
        of_the_other, own = told[0]
        assert float(flat[of_the_other]) == pytest.approx(float(before[of_the_other]), abs=1e-2)  # lasted one step
        assert float(flat[own]) == pytest.approx(8.0, abs=0.1)  # every rank has it now
        everyone = [torch.empty_like(flat) for _ in range(world_size)]
        torch.distributed.all_gather(everyone, flat.clone())
        assert torch.equal(everyone[0], everyone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_few_elements_that_one_rank_alone_writes_are_the_owners_after_the_next_step(
    stage: int, dtype: torch.dtype
) -> None:
    run_ranks(2, write_few_once, stage, dtype)


def swap(side: Any) -> None:
    weight = side.module.layers[1].weight
    with side.writing([weight]):
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 0.5))


def load_by_assignment(side: Any) -> None:
    weights = dict(side.module.named_parameters())
    with side.writing(list(weights.values())):
        side.module.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, assign=True)


REPLACED: dict[str, tuple[Edit, str]] = {
    "swap": (swap, r"layers\.1\.weight was swapped with another tensor.*\(ZeRO stage \d\).*param\.copy_"),
    "load by assignment": (
        load_by_assignment,
        r"parameters that the optimizer does not have: \S+ and .*without assign=True",
    ),
}


def replace_tensors(rank: int, world_size: int, stage: int) -> None:
    for edit, words in REPLACED.values():
        with two_sides(rank, world_size, stage) as (_, side):
            side.backward(0)
            side.step()
            edit(side)
            side.backward(1)
            with pytest.raises(TrainingStateError, match=f"(?s){words}"):
                side.step()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_tensors_in_the_place_of_those_that_train_are_refused_by_name(stage: int, world_size: int) -> None:
    run_ranks(world_size, replace_tensors, stage)


def load_what_is_sharded(rank: int, world_size: int) -> None:
    state = {name: torch.ones_like(value) for name, value in Net().state_dict().items()}
    with two_sides(rank, world_size, 3) as (_, side):
        before = side.weights()
        for assign in (False, True):
            with pytest.raises(ShardError, match="(?s)'load_state_dict'; full shape.*modifier_rank=0"):
                side.module.load_state_dict(state, assign=assign)
        after = side.weights()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_loading_into_sharded_parameters_says_how() -> None:
    run_ranks(2, load_what_is_sharded)
