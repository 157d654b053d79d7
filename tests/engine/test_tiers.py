"""Training with bytes at rest on the cpu and nvme tiers: the same numbers as without, on every tier that exists."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.comm.exchange import Pending
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.tiers.swap_folder import SwapFolder
from deepspeed.utils.errors import TierError, TrainingStateError
from deepspeed.zero import tiers_from_config
from tests.engine.runs import EPS, LR, engine_of, make_config, train, whole_weights
from tests.engine.test_equals_plain_pytorch import SAMPLES, assert_equals, oracle
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share, total_loss
from tests.oracle import assert_close_weights

TILE = 1 << 11
"""Elements of the smallest tile, so that the test models' shards are cut into many."""

OPTIMIZER_TIERS = {1: ["cpu"], 2: ["cpu"], 3: ["none", "cpu", "nvme"]}
COMBINATIONS = [
    (stage, optimizer, param)
    for stage, tiers in OPTIMIZER_TIERS.items()
    for optimizer in tiers
    for param in (["none", "cpu", "nvme"] if stage == 3 else ["none"])
    if (optimizer, param) != ("none", "none")
]


def offloaded(stage: int, optimizer: str, param: str, path: Path, **options: Any) -> dict[str, Any]:
    """The `zero_optimization` section of a combination; small tiles, and nothing kept in memory that need not be."""
    zero: dict[str, Any] = {"sub_group_size": TILE, "stage3_max_reuse_distance": 300}
    nvme = {"nvme_path": str(path)}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer, **nvme, **options}
    if param != "none":
        zero["offload_param"] = {"device": param, **nvme, "max_in_cpu": 0}
    return zero


@functools.lru_cache(maxsize=None)
def in_memory(
    name: str, stage: int, world_size: int, clip: float, precision: str | None = None, make_kwargs: Any = None
) -> Any:
    """The run without offload that every tier must equal bit for bit."""
    return _run(name, stage, world_size, clip, precision, {"stage3_max_reuse_distance": 300}, make_kwargs)


def cpu_adam(model: Any) -> dict[str, Any]:
    """The optimizer that offload takes by itself, given by the user: so it runs without offload too."""
    return {"optimizer": DeepSpeedCPUAdam(model.parameters(), lr=LR, eps=EPS, weight_decay=0.01)}


def _run(
    name: str,
    stage: int,
    world_size: int,
    clip: float,
    precision: str | None,
    zero: dict[str, Any],
    make_kwargs: Any = None,
) -> Any:
    low = {precision: {"enabled": True, **({"loss_scale": 128} if precision == "fp16" else {})}} if precision else {}
    config = make_config(stage, micro=SAMPLES // world_size, accumulation=2, clip=clip, zero=zero, **low)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.01, "torch_adam": True}}
    return run_ranks(world_size, train, name, config, num_steps=5, make_kwargs=make_kwargs)[0]


def assert_same_bits(run: Any, expected: Any) -> None:
    assert run.losses == expected.losses
    assert run.grad_norms == expected.grad_norms
    assert run.weights.keys() == expected.weights.keys()
    assert [name for name in run.weights if not torch.equal(run.weights[name], expected.weights[name])] == []


@pytest.mark.quick("*-2", "3-nvme-nvme-1")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "optimizer", "param"), COMBINATIONS)
def test_every_tier_gives_the_bits_of_no_offload(
    stage: int, optimizer: str, param: str, world_size: int, tmp_path: Path
) -> None:
    run = _run("gpt_tied", stage, world_size, 0.5, None, offloaded(stage, optimizer, param, tmp_path))
    assert_same_bits(run, in_memory("gpt_tied", stage, world_size, 0.5))
    assert_equals(run, oracle("gpt_tied", 5, 2, 0.5))


@pytest.mark.quick("*-bf16", "2-cpu-none-fp16", "3-nvme-nvme-fp16")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("stage", "optimizer", "param"), [c for c in COMBINATIONS if "none" not in c[1:2]])
def test_low_precision_gives_the_bits_of_no_offload(
    stage: int, optimizer: str, param: str, precision: str, tmp_path: Path
) -> None:
    run = _run("gpt_untied", stage, 2, 0.5, precision, offloaded(stage, optimizer, param, tmp_path))
    assert_same_bits(run, in_memory("gpt_untied", stage, 2, 0.5, precision))


@pytest.mark.quick("*-bf16", "3-nvme-nvme-None", "2-cpu-none-fp16")
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize(("stage", "optimizer", "param"), [(2, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "nvme")])
def test_the_fused_cpu_step_gives_the_bits_of_the_same_optimizer_in_memory(
    stage: int, optimizer: str, param: str, precision: str | None, tmp_path: Path
) -> None:
    zero = offloaded(stage, optimizer, param, tmp_path)
    run = _run("gpt_tied", stage, 2, 0.5, precision, zero, cpu_adam)
    assert_same_bits(run, in_memory("gpt_tied", stage, 2, 0.5, precision, cpu_adam))


@pytest.mark.parametrize("ratio", [0.0, 0.4])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_step_shared_between_tier_and_device_gives_the_same_bits(device: str, ratio: float, tmp_path: Path) -> None:
    run = _run("gpt_tied", 3, 2, 0.5, None, offloaded(3, device, "none", tmp_path, ratio=ratio))
    assert_same_bits(run, in_memory("gpt_tied", 3, 2, 0.5))


def train_on_a_slow_network(rank: int, world_size: int, *args: Any, **kwargs: Any) -> Any:
    """`train` where no reduction has ended before it is waited for, so that those of two micro-batches are on their way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pending, "is_done", False)
        return train(rank, world_size, *args, **kwargs)


def test_a_micro_batch_is_added_to_one_that_is_still_being_reduced(tmp_path: Path) -> None:
    zero = offloaded(3, "nvme", "nvme", tmp_path)
    config = make_config(3, micro=SAMPLES // 2, accumulation=3, clip=0.5, zero=zero)
    slow = run_ranks(2, train_on_a_slow_network, "gpt_tied", config, num_steps=4)[0]
    del zero["offload_optimizer"], zero["offload_param"]
    assert_same_bits(slow, run_ranks(2, train, "gpt_tied", config, num_steps=4)[0])


@pytest.mark.parametrize("name", ["unused", "frozen", "experts", "branching"])
def test_parameters_without_gradients_keep_their_values_on_disk(name: str, tmp_path: Path) -> None:
    run = _run(name, 3, 2, 0.0, None, offloaded(3, "nvme", "nvme", tmp_path))
    assert_same_bits(run, in_memory(name, 3, 2, 0.0))


def put_away_and_back(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Train, put everything away, train on; then once more with an explicit way back."""
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=4, accumulation=1, samples=SAMPLES)
    freed = []
    with engine_of(model, make_config(stage, micro=SAMPLES // world_size, bf16={"enabled": True})) as engine:
        for step, (batch,) in enumerate(batches):
            engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
            engine.step()
            engine.offload_states()
            freed.append(all(b.rest.tensor.untyped_storage().nbytes() == 0 for b in engine._built.buckets))
            with pytest.raises(TrainingStateError, match=r"reload_states\(\) first"):
                deepspeed.utils.safe_get_full_fp32_param(next(model.parameters()))
            if step % 2:
                engine.reload_states()
        return {"weights": whole_weights(engine), "freed": freed}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_put_away_between_steps_come_back_as_they_were(stage: int) -> None:
    got, *_ = run_ranks(2, put_away_and_back, stage)
    config = make_config(stage, micro=SAMPLES // 2, bf16={"enabled": True})
    expected, *_ = run_ranks(2, train, "gpt_tied", config, num_steps=4)
    assert got["freed"] == [True] * 4
    assert [name for name in expected.weights if not torch.equal(got["weights"][name], expected.weights[name])] == []


def refuse_to_put_away(rank: int, world_size: int) -> None:
    with engine_of(build("mlp"), make_config(1, micro=1)) as engine:
        with pytest.raises(ValueError, match="not to nvme"):
            engine.offload_states(device="nvme")
        with pytest.raises(ValueError, match="sideways"):
            engine.offload_states(include={"sideways"})
    with engine_of(build("mlp"), make_config(0, micro=1)) as engine:
        with pytest.raises(AssertionError, match="does not go with stage 0"):
            engine.offload_states()


def test_putting_away_is_refused_where_it_means_nothing() -> None:
    run_ranks(1, refuse_to_put_away)


def lose_the_disk(rank: int, world_size: int, path: Path, when: str) -> str:
    """Damage rank 1's swap file before a forward, or before a step; every rank must say so, none may hang."""
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=1, accumulation=2, samples=SAMPLES)
    config = make_config(3, micro=SAMPLES // world_size, zero=offloaded(3, "nvme", "nvme", path))
    with engine_of(model, config) as engine:
        first, second = (rank_share(batch, rank, world_size) for batch in batches[0])
        engine.backward(total_loss(engine(*first)))
        engine.step()
        if when == "step":
            engine.backward(total_loss(engine(*second)))
        if rank == 1:
            for file in path.glob("deepspeed_swap/*/rank1/data"):
                file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(TierError) as caught:
            if when == "forward":
                engine(*second)
            else:
                engine.step()
        return str(caught.value)


@pytest.mark.parametrize("when", ["forward", "step"])
def test_a_damaged_swap_file_is_an_error_on_every_rank(when: str, tmp_path: Path) -> None:
    messages = run_ranks(2, lose_the_disk, tmp_path, when)
    assert "damaged since it was written" in messages[1]
    assert "rank 1" in messages[0]


def refuse_lamb(rank: int, world_size: int, path: Path) -> None:
    config = make_config(3, micro=1, zero=offloaded(3, "nvme", "none", path))
    config["optimizer"] = {"type": "Lamb", "params": {"lr": 1e-3}}
    with pytest.raises(ValueError, match="one tile at a time"), engine_of(build("mlp"), config):
        pass


def test_an_optimizer_that_needs_whole_parameters_is_refused_on_disk(tmp_path: Path) -> None:
    run_ranks(1, refuse_lamb, tmp_path)


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Adagrad", "SGD", "RMSprop"])
def test_other_optimizers_step_on_tiers_as_in_memory(name: str, tmp_path: Path) -> None:
    tier = "cpu" if name == "Lamb" else "nvme"
    params = {
        "lr": 1e-3,
        **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {}),
        **({"eps": EPS} if name == "Adagrad" else {}),
    }
    runs = []
    for zero in ({}, offloaded(3, tier, "none", tmp_path)):
        config = make_config(3, micro=SAMPLES // 2, clip=0.5, zero=zero)
        config["optimizer"] = {"type": name, "params": params}
        runs.append(run_ranks(2, train, "gpt_tied", config, num_steps=4)[0])
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-6)
    assert_close_weights(runs[1].weights, runs[0].weights, 1e-5)


def test_a_folder_that_one_rank_cannot_use_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    messages = run_ranks(2, open_no_disk_of_rank_1, str(tmp_path))
    assert all("rank 1" in message and "nvme_path" in message for message in messages)


def open_no_disk_of_rank_1(rank: int, world_size: int, path: str) -> str:
    """Both ranks have the same configuration; on rank 1 the folder is a file."""
    here = Path(path) / "here"
    if rank == 0:
        here.mkdir()
    torch.distributed.barrier()
    config = make_config(3, micro=1, zero=offloaded(3, "nvme", "nvme", here))
    if rank == 1:
        tiers_from_config.SwapFolder = lambda path, rank: SwapFolder(Path(path).parent / "file", rank)
    try:
        with pytest.raises(TierError) as caught, engine_of(build("mlp"), config):
            pass
    finally:
        tiers_from_config.SwapFolder = SwapFolder
    return str(caught.value)


def fill_a_small_disk(rank: int, world_size: int, path: Path) -> str:
    model = torch.nn.Linear(1024, 1024)
    config = make_config(3, micro=1, zero=offloaded(3, "nvme", "nvme", path))
    with pytest.raises(TierError) as caught, engine_of(model, config):
        pass
    return str(caught.value)


def test_a_disk_too_small_for_the_model_is_known_before_anything_is_built(small_disk: Callable[..., Path]) -> None:
    for message in run_ranks(2, fill_a_small_disk, small_disk("4m")):
        assert "needs" in message
        assert "free" in message
        assert "offload less" in message


def train_on(
    rank: int, world_size: int, zero: dict[str, Any], load: Path | None, save: Path | None, steps: range
) -> Any:
    """Some steps of a run of four, from one checkpoint to another."""
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=4, accumulation=1, samples=SAMPLES)
    config = make_config(3, micro=SAMPLES // world_size, clip=0.5, zero=zero, bf16={"enabled": True})
    with engine_of(model, config, **cpu_adam(model)) as engine:
        if load is not None:
            engine.load_checkpoint(str(load))
        losses = []
        for step in steps:
            loss = total_loss(engine(*rank_share(batches[step][0], rank, world_size)))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if save is not None:
            engine.save_checkpoint(str(save))
        return losses, whole_weights(engine)


@pytest.mark.quick("none-nvme", "nvme-cpu", "cpu-none")
@pytest.mark.parametrize("after", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("before", ["none", "cpu", "nvme"])
def test_a_checkpoint_of_any_tier_goes_on_from_any_other(before: str, after: str, tmp_path: Path) -> None:
    first, second = (offloaded(3, tier, tier, tmp_path) for tier in (before, after))
    (whole_losses, whole), *_ = run_ranks(2, train_on, offloaded(3, "none", "none", tmp_path), None, None, range(4))
    (early, _), *_ = run_ranks(2, train_on, first, None, tmp_path / "saved", range(2))
    (late, weights), *_ = run_ranks(2, train_on, second, tmp_path / "saved", None, range(2, 4))
    assert early + late == whole_losses
    assert [name for name in whole if not torch.equal(weights[name], whole[name])] == []


def set_gradients(rank: int, world_size: int, path: Path) -> None:
    model = build("gpt_tied")
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=SAMPLES)
    with engine_of(
        model, make_config(3, micro=SAMPLES // world_size, zero=offloaded(3, "nvme", "nvme", path))
    ) as engine:
        engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
        for value in (1.0, 2.0):
            deepspeed.utils.safe_update_full_grad_vectorized(
                list(model.parameters()), lambda gradient, _, value=value: torch.full_like(gradient, value)
            )
        found = [deepspeed.utils.safe_get_full_grad(param) for param in model.parameters()]
        assert all(gradient is not None and bool((gradient == 2).all()) for gradient in found)
        engine.step()
        numel = engine.num_parameters()
        assert engine.get_global_grad_norm() == pytest.approx(2 * numel**0.5, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_on_disk_can_be_set_again_and_again(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, set_gradients, tmp_path)


def lose_the_folder(rank: int, world_size: int, path: Path, when: str) -> str:
    """Rank 1's folder goes away before a forward or a backward; every rank must say so, none may hang."""
    model = build("unused")
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=SAMPLES)
    share = rank_share(batch, rank, world_size)
    config = make_config(3, micro=SAMPLES // world_size, zero=offloaded(3, "nvme", "nvme", path))
    with engine_of(model, config) as engine:
        engine.backward(total_loss(engine(*share)))
        engine.step()
        loss = total_loss(engine(*share)) if when == "backward" else None
        if rank == 1:
            for folder in path.glob("deepspeed_swap/*/rank1"):
                shutil.rmtree(folder)
        with pytest.raises(TierError) as caught:
            engine.backward(loss if loss is not None else total_loss(engine(*share)))
            engine.step()
        return str(caught.value)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_folder_that_vanishes_under_way_is_an_error_on_every_rank(when: str, tmp_path: Path) -> None:
    assert all("rank 1" in message for message in run_ranks(2, lose_the_folder, tmp_path, when, timeout=20))
