"""A pipeline trains as one process does that accumulates the same micro-batches, whatever the schedule and ZeRO stage."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec, PipelineError, TiedLayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.topology import PipeModelDataParallelTopology
from tests.harness import RanksFailedError, run_ranks
from tests.parallel.pipeline.models import (
    LONG,
    batches,
    config_of,
    joined,
    mlp,
    start,
    train,
    train_plain,
    whole_weights,
)

SCHEDULES = {
    "gpipe": (1, "loop"),
    "1f1b": (1, "loop"),
    "zb-h1": (1, "loop"),
    "zb-h2": (1, "loop"),
    "interleaved": (2, "loop"),
    "zb-v": (2, "v"),
    "dualpipe-v": (2, "v"),
}


def cut_mlp(schedule: str = "1f1b", stages: int = 2, **more: Any) -> PipelineModule:
    chunks, placement = SCHEDULES[schedule]
    return PipelineModule(
        mlp(), num_stages=stages, loss_fn=nn.MSELoss(), partition_method="uniform", num_chunks=chunks,
        placement=placement, **more,
    )  # fmt: skip


def _schedules(rank: int, world: int, pairs: list[tuple[str, int]], interval: int) -> dict[Any, Any]:
    found = {}
    for schedule, zero in pairs:
        module = cut_mlp(schedule, activation_checkpoint_interval=interval)
        engine = start(module, config_of(zero, schedule=schedule))
        found[schedule, zero] = train(engine)
        engine.destroy()
    return found


@pytest.mark.parametrize("interval", [0, 2])
def test_every_schedule_equals_one_process_bit_for_bit(interval: int) -> None:
    pairs = [(name, zero) for i, name in enumerate(SCHEDULES) for zero in (range(4) if LONG else ([0, 1, 2][i % 3],))]
    expected = train_plain(mlp())
    found = run_ranks(2, _schedules, pairs, interval)
    for pair in pairs:
        both = [mine[pair] for mine in found]
        assert [mine["losses"] for mine in both] == [expected["losses"]] * 2, pair
        weights = joined(both)
        assert weights.keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            assert torch.equal(weights[name], value), (pair, name)
        assert both[0]["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def _with_data_parallel(rank: int, world: int, zeros: list[int]) -> dict[int, Any]:
    found = {}
    for zero in zeros:
        engine = start(cut_mlp(), config_of(zero, gradient_clipping=0.05))
        found[zero] = train(engine)
        engine.destroy()
    return found


def test_data_parallel_pipelines_clip_over_all_stages_at_every_zero_stage() -> None:
    expected = train_plain(mlp(), num_ranks=2, clip=0.05)
    zeros = [0, 1, 2, 3] if LONG else [1, 3]
    found = run_ranks(4, _with_data_parallel, zeros)
    for zero in zeros:
        runs = [mine[zero] for mine in found]
        assert all(mine["losses"] == pytest.approx(expected["losses"], rel=1e-6) for mine in runs)
        assert all(mine["norm"] == pytest.approx(expected["norm"], rel=1e-5) for mine in runs)
        weights = joined(runs)
        for name, value in expected["weights"].items():
            assert torch.allclose(weights[name], value, atol=1e-6, rtol=1e-5), (zero, name)


class Embed(nn.Module):
    """Tokens to vectors, and by `head` back, which has no use for places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 16) * 0.3)
        self.places = nn.Parameter(torch.randn(8, 16) * 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight) + self.places[: tokens.shape[1]]


def head(module: Embed, x: Tensor) -> Tensor:
    return x @ module.weight.t()


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tied_layers() -> list[Any]:
    hidden = [LayerSpec(nn.Sequential, nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)]
    return [TiedLayerSpec("embed", Embed), *hidden, TiedLayerSpec("embed", Embed, forward_fn=head)]


def token_batches(num: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    for i in range(num):
        tokens = torch.randint(12, (2, 5 + i % 3), generator=generator)
        yield tokens, tokens.roll(1, 1)


def _tied(rank: int, world: int, stages: int, zero: int, chunks: int, placement: Any) -> dict[str, Any]:
    torch.manual_seed(7)
    module = PipelineModule(
        tied_layers(), num_stages=stages, loss_fn=token_loss, seed_layers=True, num_chunks=chunks, placement=placement,
        partition_method="uniform",
    )  # fmt: skip
    engine = start(module, config_of(zero))
    data = token_batches(8)
    losses = [engine.train_batch(data).item() for _ in range(2)]
    found = {"losses": losses, "norm": engine.get_global_grad_norm(), "weights": whole_weights(engine)}
    engine.destroy()
    return found


def test_tied_layers_dropout_and_changing_lengths_train_as_on_one_rank() -> None:
    (expected,) = run_ranks(1, _tied, 1, 0, 1, "loop")
    for zero, chunks, placement in [(0, 1, "loop"), (1, 1, "loop"), (3, 1, "loop"), (2, 2, "v")]:
        found = run_ranks(2, _tied, 2, zero, chunks, placement)
        assert all(mine["losses"] == pytest.approx(expected["losses"], rel=1e-6) for mine in found)
        assert found[0]["losses"][0] == expected["losses"][0], "the first loss is bit for bit: masks are the same"
        assert all(mine["norm"] == pytest.approx(expected["norm"], rel=1e-6) for mine in found)
        if placement == "loop":
            for name in ("weight", "places"):
                assert torch.equal(*(mine["weights"][f"tied_modules.embed.{name}"] for mine in found))
        weights = joined(found)
        for name, value in expected["weights"].items():
            assert torch.allclose(weights[name], value, atol=1e-7), name


class Split(nn.Module):
    """Hands on a hidden state, a mask, integers and None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return self.layer(x), x > 0, torch.arange(len(x)), None


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, values: tuple[Any, ...]) -> Tensor:
        x, mask, places, nothing = values
        assert mask.dtype is torch.bool and places.dtype is torch.int64 and nothing is None
        return self.layer(torch.where(mask, x, -x)) + places[:, None]


def _kinds(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = PipelineModule([Split(), Join()], num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
    mixed = start(module, config_of(accumulation=2))
    first = mixed.train_batch(batches(2)).item()
    sent = mixed._mail.bytes_sent
    with pytest.raises(PipelineError, match="Only train_batch"):
        mixed(1)
    with pytest.raises(PipelineError, match="Only train_batch"):
        mixed.step()
    with torch.no_grad(), pytest.raises(RuntimeError, match="requires gradients"):
        mixed.train_batch(batches(2))
    loss, logits = mixed.eval_batch(batches(2), return_logits=True)
    listed = mixed.eval_batch(batches(2), reduce_output=None)
    found = {"loss": first, "sent": sent, "eval": loss.item(), "logits": logits, "listed": listed}
    found["steps"] = (mixed.global_steps, mixed.micro_steps, mixed.global_samples)
    mixed.destroy()
    # A stage without parameters, and bf16.
    layers = [nn.Flatten(), nn.Identity(), nn.Linear(16, 16), nn.Linear(16, 4)]
    module = PipelineModule(
        layers, num_stages=2, loss_fn=lambda out, y: (out.float() - y).pow(2).mean(), partition_method="uniform"
    )
    empty = start(module, config_of(1, bf16={"enabled": True}))
    data = ((x.bfloat16(), y) for x, y in batches(8))
    found["empty"] = [empty.train_batch(data).item() for _ in range(2)]
    empty.destroy()
    return found


def test_stages_hand_on_masks_integers_and_none_and_may_be_without_parameters() -> None:
    first, last = run_ranks(2, _kinds)
    assert first["loss"] == last["loss"] and first["eval"] == last["eval"]
    assert first["logits"] is None and last["logits"].shape == (4, 4)
    assert first["listed"] is None and len(last["listed"]) == 2
    hidden, mask, places = 4 * 16 * 4, 4 * 16, 4 * 8
    assert first["sent"] == 2 * (hidden + mask + places) and last["sent"] == 2 * hidden
    assert first["steps"] == (1, 0, 8)
    assert first["empty"] == last["empty"] and first["empty"][1] < first["empty"][0]


class Detaching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Mean(nn.Linear):
    """Makes the loss on a stage that is not the last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean()


class Failing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("nobody expects this")


def _fails(
    layers: list[Any],
    data: Any,
    error: type[BaseException],
    words: str,
    rank: int,
    loss_fn: Any = nn.functional.mse_loss,
) -> None:
    module = PipelineModule(layers, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    engine = start(module, config_of(accumulation=3))
    began = time.monotonic()
    with pytest.raises(error) as caught:
        engine.train_batch(iter(data))
    assert words in str(caught.value), (rank, str(caught.value))
    assert time.monotonic() - began < 20
    engine.destroy()


def _bad_input(rank: int, world: int) -> None:
    two, good = [nn.Linear(16, 16), nn.Linear(16, 4)], list(batches(3))
    for count, words in ((1, "needs as many layers"), (0, "needs as many layers")):
        with pytest.raises(LayerError, match=words):
            PipelineModule(two[:count], num_stages=2)
    with pytest.raises(ValueError, match="does not divide the 2 ranks"):
        PipelineModule(two, num_stages=3)
    with pytest.raises(ValueError, match="the topology has 6 ranks, the process group 2"):
        PipelineModule(two, topology=PipeModelDataParallelTopology(num_pp=3, num_mp=1, num_dp=2))
    with pytest.raises(RuntimeError, match="num_stages or topology"):
        PipelineModule(two)
    with pytest.raises(RuntimeError, match="found no valid layers"):
        PipelineModule(two, num_stages=2, partition_method="type:attention")
    with pytest.raises(NotImplementedError, match="profile"):
        PipelineModule(two, num_stages=2, partition_method="profile")
    module = PipelineModule(two, num_stages=2, loss_fn=nn.MSELoss())
    with pytest.raises(AssertionError, match="mpu= does not go with"):
        deepspeed.initialize(model=module, config=config_of(), mpu=module.mpu())
    with pytest.raises(ValueError, match="pipeline.schedule"):
        start(module, config_of(schedule="zb-v"))
    _fails(two, [], StopIteration, "no batch left", rank)
    _fails(two, good[:2], PipelineError, "ended after 2 of the 3 micro-batches", rank)
    _fails(two, [(good[0][0][:2], good[0][1][:2]), *good[1:]], PipelineError, "[2, 4, 4] samples", rank)
    _fails(two, [good[0][0]] * 3, PipelineError, "(inputs, labels)", rank)
    _fails([Detaching(16, 16), two[1]], good, ValueError, "without gradient", rank)
    _fails(two, good, PipelineError, "loss has shape (4, 4): training needs one number", rank, loss_fn=None)
    _fails(
        [Mean(16, 16), nn.Identity()],
        good,
        PipelineError,
        "is a tuple, not a tensor",
        rank,
        loss_fn=lambda out, y: (1, 2),
    )
    _fails(two, good, PipelineError, "does not require grad: it was detached", rank, lambda out, y: out.detach().mean())
    _fails([nn.Linear(16, 16), Failing(16, 4)], good, Exception, "nobody expects this", rank)


def test_bad_input_is_one_clear_error_on_all_ranks() -> None:
    run_ranks(2, _bad_input)


def _generated(rank: int, world: int, limit: int) -> dict[str, Any]:
    engine = start(
        cut_mlp("1f1b"),
        config_of(1, schedule="generated", pipeline={"schedule": "generated", "max_activation_memory": limit}),
    )
    before = str(engine.actions)
    found = train(engine, steps=4)
    found |= {"before": before, "after": str(engine.actions), "name": engine.actions.name, "costs": engine._lists.costs}
    engine.destroy()
    return found


def test_a_generated_list_is_made_of_measured_times_and_trains_with_the_same_bits() -> None:
    expected = train_plain(mlp(), steps=4)
    found = run_ranks(2, _generated, 0)
    assert found[0]["before"].startswith("rank 0: 0F0 0F1 0I0 0W0")
    assert found[0]["after"] == found[1]["after"] and found[0]["costs"] == found[1]["costs"]
    assert found[0]["name"] != "1f1b in halves"
    costs = found[0]["costs"]
    assert min(*costs.forward, *costs.input, costs.hop) > 0 and min(costs.activation) > 4 * 16 * 4
    assert all(mine["losses"] == expected["losses"] for mine in found)
    for name, value in joined(found).items():
        assert torch.equal(value, expected["weights"][name])
    with pytest.raises(RanksFailedError, match="may keep 8 alive, one micro-batch at each of its stages takes"):
        run_ranks(2, _generated, 8)
