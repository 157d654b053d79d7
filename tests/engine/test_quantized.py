"""ZeRO++ under the engine: near the loss of plain stage 3 with a quarter of the bytes, and exact where a script looks."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.comm.choose import SHARED_MEMORY
from deepspeed.utils.errors import RankMismatchError
from deepspeed.utils.waits import COMMUNICATION
from tests.comm.between_nodes import counted_between_nodes
from tests.engine.runs import LONG, Run, engine_of, make_config, train, whole_weights
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share, total_loss

SAMPLES = 12
QUANTIZED = {"zero_quantized_weights": True, "zero_quantized_gradients": True}


@functools.lru_cache(maxsize=None)
def plain(num_steps: int, accumulation: int) -> Run:
    config = make_config(3, micro=SAMPLES // 2, accumulation=accumulation)
    return run_ranks(2, train, "gpt_tied", config, num_steps=num_steps, samples=SAMPLES)[0]


def zeropp(world_size: int, accumulation: int = 1, stage: int = 3, **extra: Any) -> dict[str, Any]:
    zero = {"stage3_max_reuse_distance": 0, **extra.pop("zero", {})}
    return make_config(stage, micro=SAMPLES // world_size, accumulation=accumulation, zero=zero, **extra)


@pytest.mark.parametrize(
    ("world_size", "accumulation", "zero"),
    [
        pytest.param(2, 1, {"zero_quantized_weights": True}, marks=LONG),
        (2, 2, {"zero_quantized_gradients": True}),
        (3, 1, QUANTIZED),
        pytest.param(4, 2, {**QUANTIZED, "zero_hpz_partition_size": 2}, marks=LONG),
        (4, 1, {**QUANTIZED, "zero_hpz_partition_size": 2, "zeropp_loco_param": {"err_beta": 0.8, "reset_T": 16}}),
        pytest.param(
            2, 1, {**QUANTIZED, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, marks=LONG
        ),
    ],
)
def test_the_loss_is_that_of_plain_stage_3_within_half_a_percent(
    world_size: int, accumulation: int, zero: dict[str, Any]
) -> None:
    config = zeropp(world_size, accumulation, zero=zero)
    run, *_ = run_ranks(world_size, train, "gpt_tied", config, num_steps=10, samples=SAMPLES)
    assert run.losses == pytest.approx(plain(10, accumulation).losses, rel=5e-3)
    assert run.losses != plain(10, accumulation).losses


@pytest.mark.parametrize(
    "precision",
    [pytest.param({"bf16": {"enabled": True}}, marks=LONG), {"fp16": {"enabled": True, "loss_scale": 64}}],
)
def test_low_precision_goes_with_it(precision: dict[str, Any]) -> None:
    config = zeropp(2, zero=QUANTIZED, **precision)
    run, *_ = run_ranks(2, train, "gpt_tied", config, num_steps=10, samples=SAMPLES)
    assert run.losses == pytest.approx(plain(10, 1).losses, rel=2e-2)
    assert run.skipped == 0


@pytest.mark.parametrize("stage", [pytest.param(1, marks=LONG), 2])
def test_gradients_are_quantized_below_stage_3_too(stage: int) -> None:
    config = zeropp(2, stage=stage, zero={"zero_quantized_gradients": True})
    run, *_ = run_ranks(2, train, "gpt_tied", config, num_steps=10, samples=SAMPLES)
    assert run.losses == pytest.approx(plain(10, 1).losses, rel=5e-3)


def seen_between_steps(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Parameters in a gather context, and their masters, right after a forward left quantised values here."""
    batches = make_batches(build("gpt_tied"), num_steps=2, accumulation=1, samples=SAMPLES)
    config = make_config(3, micro=SAMPLES // world_size, zero=QUANTIZED)  # with reuse: values stay after the forward
    found = []
    with engine_of(build("gpt_tied"), config) as engine:
        for (batch,) in batches:
            loss = total_loss(engine(*rank_share(batch, rank, world_size)))
            for param in engine.module.parameters():
                with deepspeed.zero.GatheredParameters([param]):
                    found.append((param.detach().clone(), deepspeed.utils.safe_get_full_fp32_param(param).clone()))
            engine.backward(loss)
            engine.step()
    return found


def test_a_script_that_gathers_parameters_sees_them_exactly() -> None:
    for seen in run_ranks(2, seen_between_steps):
        assert seen
        assert all(torch.equal(param, master) for param, master in seen)


def bad_gradient(rank: int, world_size: int) -> tuple[int, bool, str]:
    from deepspeed.utils import logging

    said: list[str] = []
    batches = make_batches(build("mlp"), num_steps=4, accumulation=1, samples=SAMPLES)
    config = zeropp(2, zero={**QUANTIZED, "zeropp_loco_param": {}})
    with engine_of(build("mlp"), config) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.logger, "warning", lambda text, *args, **kwargs: said.append(str(text) % args))
        for step, ((x, y),) in enumerate(batches):
            x, y = rank_share((x, y), rank, world_size)
            x = x * torch.inf if rank == 1 and step == 1 else x
            engine.backward(total_loss(engine(x, y)))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            is_finite = all(bool(param.isfinite().all()) for param in engine.module.parameters())
        return engine.skipped_steps, is_finite, "\n".join(said)


def test_a_step_with_infinity_on_one_rank_is_skipped_on_all_and_named() -> None:
    for skipped, is_finite, said in run_ranks(2, bad_gradient):
        assert (skipped, is_finite) == (1, True)
        assert re.search(r"the step is skipped: \[rank \d\] first bad gradient: \S+ has (nan|inf)", said), said


def infinite_weight(rank: int, world_size: int, key: str) -> tuple[int, str]:
    """What is quantized is a weight that a script made infinite, in the second of three steps; frozen where those are."""
    from deepspeed.utils import logging

    said: list[str] = []
    batches = make_batches(build("mlp"), num_steps=3, accumulation=1, samples=SAMPLES)
    model = build("mlp")
    weight = next(model.parameters())
    is_frozen = key == "zero_quantized_nontrainable_weights"
    weight.requires_grad_(not is_frozen)
    weight.data[0, 0] = torch.inf if is_frozen else 0.1
    with engine_of(model, zeropp(2, zero={key: True})) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.logger, "warning", lambda text, *args, **kwargs: said.append(str(text) % args))
        for step, ((x, y),) in enumerate(batches):
            if not is_frozen:
                with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                    if rank == 0:
                        weight.data.view(-1)[0] = torch.inf if step == 1 else 0.1
            engine.backward(total_loss(engine(*rank_share((x, y), rank, world_size))))
            engine.step()
        return engine.skipped_steps, "\n".join(said)


@pytest.mark.parametrize(
    ("key", "num_skipped"), [("zero_quantized_weights", 1), ("zero_quantized_nontrainable_weights", 3)]
)
def test_a_step_whose_weights_are_not_finite_when_they_are_quantized_is_skipped_and_named(
    key: str, num_skipped: int
) -> None:
    for skipped, said in run_ranks(2, infinite_weight, key):
        assert skipped == num_skipped
        assert re.search(r"the step is skipped: \[rank \d\] first bad gradient: \S+ has nan", said), said


def other_nodes(rank: int, world_size: int) -> None:
    key = "zero_hpz_partition_size"
    with engine_of(build("mlp"), zeropp(2, zero={key: 2})) as engine:
        (batch,), *_ = make_batches(build("mlp"), num_steps=1, accumulation=1, samples=SAMPLES)
        engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
    # The third time there were groups of either division which look alike.
    for differing in (zeropp(2, zero={key: 2 - rank}), zeropp(2, clip=rank + 1.0), zeropp(2, zero={key: 2 - rank})):
        with pytest.raises(RankMismatchError, match=rf"rank 1: has .*({key} = 1|clipping = 2.0) where rank 0's has"):
            deepspeed.initialize(model=build("mlp"), config=differing)


def test_ranks_that_divide_themselves_otherwise_are_told_each_time() -> None:
    run_ranks(2, other_nodes)


def bytes_of_a_step(rank: int, world_size: int, zero: dict[str, Any], ranks_per_node: int) -> dict[str, int]:
    """By kind of message, and `between nodes`."""
    batches = make_batches(build("gpt_tied"), num_steps=3, accumulation=1, samples=SAMPLES)
    config = zeropp(world_size, zero={**zero, "stage3_param_persistence_threshold": 0}, bf16={"enabled": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(ranks_per_node))
        patch.setenv("LOCAL_RANK", str(rank % ranks_per_node))
        patch.setenv(SHARED_MEMORY, "0")  # in memory ranks show each other more than gloo sends each
        with engine_of(build("gpt_tied"), config) as engine:
            for (batch,) in batches:
                before = dict(COMMUNICATION.nbytes)
                with counted_between_nodes(ranks_per_node) as sent:
                    engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
                    engine.step()
            nbytes = {op: n - before.get(op, 0) for op, n in COMMUNICATION.nbytes.items() if n > before.get(op, 0)}
            return {**nbytes, "between nodes": sum(sent)}


def test_a_step_moves_the_bytes_of_the_formula() -> None:
    wide, *_ = run_ranks(2, bytes_of_a_step, {}, 2)
    narrow, *_ = run_ranks(2, bytes_of_a_step, QUANTIZED, 2)
    assert narrow["zero.all_gather"] / wide["zero.all_gather"] == pytest.approx(8.125 / 16, rel=0.02)
    reduced = narrow["zero.quantized_near"] / wide["zero.reduce_scatter"]
    assert reduced == pytest.approx(4.25 / 16, rel=0.02)


def test_two_hops_move_a_quarter_of_the_bytes_between_nodes_in_16_bits() -> None:
    wide, two_hops, with_copy = (
        sum(sent["between nodes"] for sent in run_ranks(4, bytes_of_a_step, zero, 2))
        for zero in ({}, QUANTIZED, {**QUANTIZED, "zero_hpz_partition_size": 2})
    )
    by_arithmetic = (2 * 8.125 / 2 + 4.25 / 2) / (3 * 16)
    assert two_hops / wide == pytest.approx(by_arithmetic, rel=0.03)
    assert two_hops / wide < 0.26
    assert with_copy / wide < by_arithmetic * 0.7, "the backward's gathers stay in the node"


def frozen_in_int8(rank: int, world_size: int, quantizes: bool, folder: str) -> dict[str, Any]:
    batches = make_batches(build("frozen"), num_steps=4, accumulation=1, samples=SAMPLES)
    zero = {"zero_quantized_nontrainable_weights": quantizes, "stage3_param_persistence_threshold": 0}
    losses = []
    with engine_of(build("frozen"), zeropp(world_size, zero=zero)) as engine:
        for (batch,) in batches:
            loss = total_loss(engine(*rank_share(batch, rank, world_size)))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        kinds = {type(bucket.rest).__name__ for bucket in engine._built.buckets if not bucket.requires_grad}
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            values = {name: p.detach().clone() for name, p in engine.module.named_parameters() if not p.requires_grad}
    return {"losses": losses, "kinds": kinds, "values": values}


def test_frozen_parameters_rest_in_int8_and_are_within_half_a_scale(tmp_path: Any) -> None:
    exact, *_ = run_ranks(2, frozen_in_int8, False, str(tmp_path / "exact"))
    rounded, *_ = run_ranks(2, frozen_in_int8, True, str(tmp_path / "rounded"))
    assert rounded["kinds"] == {"Int8Rest"}
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    largest = max(value.abs().max() for value in exact["values"].values())  # neighbours may share a group
    for name, value in exact["values"].items():
        assert (rounded["values"][name] - value).abs().max() <= largest * 1.02 / 2 / 127


LOCO = {**QUANTIZED, "zeropp_loco_param": {"err_beta": 0.8, "reset_T": 4}}


def stepped(engine: Any, batches: list[Any], rank: int, world_size: int) -> None:
    for (batch,) in batches:
        engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
        engine.step()


def resumed(rank: int, world_size: int, stage: int, zero: dict[str, Any], folder: str) -> dict[str, Any]:
    """Weights after 6 steps in one go, and after a save, another engine and a load in between."""
    batches = make_batches(build("gpt_tied"), num_steps=6, accumulation=1, samples=SAMPLES)
    config, found = zeropp(world_size, stage=stage, zero=zero), {}
    with engine_of(build("gpt_tied"), config) as engine:
        stepped(engine, batches[:3], rank, world_size)
        engine.save_checkpoint(folder)
        stepped(engine, batches[3:], rank, world_size)
        found["uninterrupted"] = whole_weights(engine)
    with engine_of(build("gpt_tied", seed=5), config) as engine:
        stepped(engine, batches[:1], rank, world_size)  # errors of its own, which have to go
        engine.load_checkpoint(folder)
        stepped(engine, batches[3:], rank, world_size)
        found["resumed"] = whole_weights(engine)
    return found


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (3, LOCO),
        pytest.param(1, {key: value for key, value in LOCO.items() if key != "zero_quantized_weights"}, marks=LONG),
        pytest.param(2, {key: value for key, value in LOCO.items() if key != "zero_quantized_weights"}, marks=LONG),
        pytest.param(3, {**LOCO, "offload_optimizer": {"device": "cpu"}}, marks=LONG),
        pytest.param(3, QUANTIZED, marks=LONG),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(stage: int, zero: dict[str, Any], tmp_path: Any) -> None:
    found, *_ = run_ranks(2, resumed, stage, zero, str(tmp_path))
    assert found["uninterrupted"]
    for name, weight in found["uninterrupted"].items():
        assert torch.equal(weight, found["resumed"][name]), name


def goes_on(rank: int, world_size: int, folder: str) -> tuple[list[str], bool]:
    """What is said of the errors when a run of two ranks is loaded, and whether training goes on."""
    from deepspeed.engine import checkpoints

    batches = make_batches(build("mlp"), num_steps=2, accumulation=1, samples=SAMPLES)
    said: list[str] = []
    with engine_of(build("mlp"), zeropp(world_size, zero=LOCO)) as engine, pytest.MonkeyPatch.context() as patch:
        if world_size == 2:
            stepped(engine, batches, rank, world_size)
            engine.save_checkpoint(folder)
        patch.setattr(checkpoints, "log_dist", lambda message, *args, **kwargs: said.append(message))
        engine.load_checkpoint(folder)
        stepped(engine, batches, rank, world_size)
        return [line for line in said if "LoCo" in line], engine.skipped_steps == 0


def test_errors_begin_anew_with_another_number_of_ranks_and_one_line_says_so(tmp_path: Any) -> None:
    assert run_ranks(2, goes_on, str(tmp_path)) == [([], True)] * 2
    line = "LoCo: what quantised gradients had left out starts at zero: the number of ranks has changed."
    assert run_ranks(3, goes_on, str(tmp_path)) == [([line], True)] * 3
