"""A rank that fails alone inside of a call of a cut model: the others end soon, with its words, and all go on afterwards."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")

SOON_S = 20.0


def call(engine: Any, how: str) -> Any:
    batch = prompts("left")
    if how == "forward":
        return engine(**batch).logits
    return engine.generate(**batch, max_new_tokens=4)


def ends(engine: Any, how: str, is_own: bool, words: str, rank: int) -> None:
    started_s = time.monotonic()
    with pytest.raises(
        OverflowError if is_own else DeepSpeedError, match=words if is_own else rf"\[rank {rank} of .*{words}"
    ):
        call(engine, how)
    assert time.monotonic() - started_s < SOON_S


def one_fails(rank: int, world_size: int, dtype: str, failing: int, how: str, where: str) -> None:
    torch.set_num_threads(1)
    engine = deepspeed.init_inference(build("llama"), dtype=dtype, tp={"tp_size": world_size})
    wanted = call(engine, how)

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    for _ in range(2):
        if rank == failing:
            handle = engine.module.get_submodule(where).register_forward_pre_hook(fail)
        ends(
            engine,
            how,
            rank == failing,
            "OverflowError: no memory is left" if rank != failing else "no memory",
            failing,
        )
        if rank == failing:
            handle.remove()
        assert torch.equal(call(engine, how), wanted)
    again = deepspeed.init_inference(build("llama"), dtype=dtype, tp={"tp_size": world_size})
    assert torch.equal(call(again, how), wanted)


@pytest.mark.quick("fp32-1-forward-*", "int8-*")
@pytest.mark.parametrize(
    ("dtype", "failing", "how", "where"),
    [("fp32", 1, "forward", "model.layers.1.mlp"), ("int8", 0, "generate", ""), ("fp32", 1, "generate", "model.norm")],
)
def test_the_others_end_with_the_words_of_the_one_that_failed(dtype: str, failing: int, how: str, where: str) -> None:
    run_ranks(2, one_fails, dtype, failing, how, where, timeout=90)


def test_two_others_end_too() -> None:
    run_ranks(3, one_fails, "fp32", 2, "forward", "model.layers.0.self_attn", timeout=90)


def expert_fails(rank: int, world_size: int, failing: int, how: str, where: str) -> None:
    """Of ranks that share experts, and have prompts and lengths of their own."""
    torch.set_num_threads(1)
    engine = deepspeed.init_inference(build("mixtral"), dtype="fp32", moe={"ep_size": world_size})
    batch = {key: value[rank : rank + 1] for key, value in prompts("left").items()}

    def answer() -> torch.Tensor:
        if how == "forward":
            return engine(**batch).logits
        return (engine if how == "generate" else engine.module).generate(**batch, max_new_tokens=3 + 2 * rank)

    wanted = answer()

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    for _ in range(2):
        started_s = time.monotonic()
        if rank == failing:
            handle = engine.module.get_submodule(where).register_forward_pre_hook(fail)
            with pytest.raises(OverflowError):
                answer()
            handle.remove()
        else:
            with pytest.raises(DeepSpeedError, match=rf"\[rank {failing} of .*OverflowError: no memory is left"):
                answer()
        assert time.monotonic() - started_s < SOON_S
        assert torch.equal(answer(), wanted)


@pytest.mark.quick("0-generate-lm_head")
@pytest.mark.parametrize(
    ("failing", "how", "where"),
    [(1, "forward", "model.layers.1.mlp"), (0, "generate", "lm_head"), (1, "module", "model.layers.1.self_attn")],
)
def test_ranks_that_share_experts_end_too(failing: int, how: str, where: str) -> None:
    run_ranks(2, expert_fails, failing, how, where, timeout=90)


class Failing:
    """A logits processor that fails at its third token."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise OverflowError("no memory is left")
        return scores


def streamed_fails(rank: int, world_size: int, failing: int, where: str, through: str) -> None:
    """Of ranks that share weights, and have prompts and lengths of their own."""
    torch.set_num_threads(1)
    family = "t5" if where == "decoder" else "llama"
    zero = {"stage": 3} if through == "module" else {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = deepspeed.init_inference(build(family), dtype="fp32", zero=zero)
    batch = {key: value[rank % 3 : rank % 3 + 1] for key, value in prompts("left").items()}

    def answer(**more: Any) -> torch.Tensor:
        return (engine if through == "engine" else engine.module).generate(**batch, max_new_tokens=6 + 2 * rank, **more)

    wanted = answer()

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    for _ in range(3):
        started_s = time.monotonic()
        more: dict[str, Any] = {}
        handle = None
        if rank == failing and where == "processor":
            more["logits_processor"] = [Failing()]
        elif rank == failing and where == "before":
            handle = engine.module.register_forward_pre_hook(fail, prepend=True)
        elif rank == failing:
            handle = engine.module.get_submodule(where).register_forward_pre_hook(fail)
        words = "no memory" if rank == failing else rf"\[rank {failing} of .*OverflowError: no memory is left"
        with pytest.raises(OverflowError if rank == failing else DeepSpeedError, match=words):
            answer(**more)
        assert time.monotonic() - started_s < SOON_S
        if handle is not None:
            handle.remove()
        assert torch.equal(answer(), wanted)
    engine.destroy()


@pytest.mark.quick("1-before-engine", "0-decoder-engine")
@pytest.mark.parametrize(
    ("failing", "where", "through"),
    [
        (1, "model.layers.1.mlp", "engine"),
        (0, "processor", "module"),
        (1, "before", "engine"),
        (0, "decoder", "engine"),
    ],
)
def test_ranks_that_share_weights_end_too(failing: int, where: str, through: str) -> None:
    run_ranks(2, streamed_fails, failing, where, through, timeout=120)


def streamed_forward_fails(rank: int, world_size: int, failing: int, where: str, through: str, error: type) -> None:
    """A plain forward of ranks that share weights."""
    torch.set_num_threads(1)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", zero=zero)
    called = engine if through == "engine" else engine.module
    batch = {key: value[rank : rank + 1] for key, value in prompts("left").items()}

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return called(**batch).logits

    wanted = answer()

    def fail(*args: Any) -> None:
        raise error("no memory is left")

    for _ in range(3):
        started_s = time.monotonic()
        handle = None
        if rank == failing:
            at = engine.module if where == "before" else engine.module.get_submodule(where)
            handle = at.register_forward_pre_hook(fail, prepend=where == "before")
        words = "no memory" if rank == failing else rf"\[rank {failing} of .*{error.__name__}: no memory is left"
        with pytest.raises(error if rank == failing else DeepSpeedError, match=words):
            answer()
        assert time.monotonic() - started_s < SOON_S / 2
        if handle is not None:
            handle.remove()
        assert torch.equal(answer(), wanted)
    assert torch.equal(engine.generate(**batch, max_new_tokens=1)[:, -1], wanted[:, -1].argmax(-1))
    engine.destroy()


@pytest.mark.parametrize(
    ("failing", "where", "through", "error"),
    [
        (1, "model.layers.1.mlp", "engine", OverflowError),
        (0, "before", "engine", OverflowError),
        (1, "model.norm", "module", OverflowError),
        (0, "before", "module", OverflowError),
        (1, "model.layers.0.self_attn", "engine", KeyboardInterrupt),
    ],
)
def test_forwards_of_ranks_that_share_weights_end_too(failing: int, where: str, through: str, error: type) -> None:
    run_ranks(2, streamed_forward_fails, failing, where, through, error, timeout=90)


class TwoModels:
    """A pipeline whose second model runs on what the first says."""

    def __init__(self) -> None:
        self.first, self.second = build("llama"), build("qwen2")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(ids).logits.argmax(-1)).logits


def one_of_two_fails(rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = deepspeed.init_inference(TwoModels(), dtype="fp32", zero=zero)
    ids = prompts("alone")["input_ids"]
    wanted = engine(ids)

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    for module in (engine.module.first, engine.module.second):
        started_s = time.monotonic()
        handle = module.register_forward_pre_hook(fail, prepend=True) if rank == 1 else None
        with pytest.raises(OverflowError if rank == 1 else DeepSpeedError, match="no memory is left"):
            engine(ids)
        assert time.monotonic() - started_s < SOON_S / 2
        if handle is not None:
            handle.remove()
        assert torch.equal(engine(ids), wanted)
    engine.destroy()


def test_a_pipeline_of_models_whose_weights_are_shared_ends_too() -> None:
    run_ranks(2, one_of_two_fails, timeout=90)


def test_three_ranks_that_share_weights_end_too() -> None:
    run_ranks(3, streamed_fails, 1, "processor", "engine", timeout=120)


def module_fails(rank: int, world_size: int) -> None:
    """What a script does with `engine.module`, the engine itself being gone."""
    torch.set_num_threads(1)
    module = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_size": world_size}).module
    batch = prompts("left")
    torch.manual_seed(rank)
    sampled = [module.generate(**batch, max_new_tokens=4, do_sample=True) for _ in range(2)]
    told: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(told, [each.tolist() for each in sampled])
    assert told[0] == told[1], "ranks sample the same, whatever their own random state"
    wanted = module(**batch).logits, module.generate(**batch, max_new_tokens=4)

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    layer = module.model.layers[1].mlp
    for call in (lambda: module(**batch), lambda: module.generate(**batch, max_new_tokens=4)):
        started_s = time.monotonic()
        handle = layer.register_forward_pre_hook(fail) if rank == 1 else None
        with pytest.raises(OverflowError if rank == 1 else DeepSpeedError, match="no memory is left"):
            call()
        assert time.monotonic() - started_s < SOON_S
        if handle is not None:
            handle.remove()
    assert torch.equal(module(**batch).logits, wanted[0])
    assert torch.equal(copy.deepcopy(module).generate(**batch, max_new_tokens=4), wanted[1])


def test_calls_of_the_module_itself_end_too_and_sample_the_same() -> None:
    run_ranks(2, module_fails, timeout=90)


def two_engines(rank: int, world_size: int) -> None:
    """A call that fails in one leaves its messages in the group of both."""
    size = {"tp_size": world_size}
    first = deepspeed.init_inference(build("llama"), dtype="fp32", tp=size)
    second = deepspeed.init_inference(build("qwen2"), dtype="fp32", tp=size)
    wanted = call(first, "generate"), call(second, "generate")

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    handle = second.module.model.layers[1].register_forward_pre_hook(fail) if rank == 1 else None
    with pytest.raises(OverflowError if rank == 1 else DeepSpeedError, match="no memory is left"):
        call(second, "forward")
    if handle is not None:
        handle.remove()
    assert torch.equal(call(first, "generate"), wanted[0])
    assert torch.equal(call(second, "generate"), wanted[1])
    first.destroy()
    assert torch.equal(call(second, "generate"), wanted[1])


def test_another_engine_over_the_same_ranks_goes_on() -> None:
    run_ranks(2, two_engines, timeout=60)


def all_or_late(rank: int, world_size: int) -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_size": world_size})
    wanted = call(engine, "forward")
    group = engine._ranks.tensor.group
    with pytest.raises(IndexError, match="id 97 is outside"):
        engine(input_ids=torch.tensor([[97]]))
    assert torch.equal(call(engine, "forward"), wanted)

    def fail(*args: Any) -> None:
        raise OverflowError("afterwards")

    if rank == 1:  # after the last collective: the other rank has its answer, and hears of nothing
        handle = engine.module.register_forward_hook(fail)
        with pytest.raises(OverflowError):
            call(engine, "forward")
        handle.remove()
    else:
        call(engine, "forward")
    assert torch.equal(call(engine, "forward"), wanted)
    assert engine._ranks.tensor.group is group, "nobody waited in it"


def test_where_all_failed_or_none_waits_they_go_on_as_they_are() -> None:
    run_ranks(2, all_or_late, timeout=60)


def other_prompts(rank: int, world_size: int) -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_size": world_size})
    wanted = call(engine, "generate")
    for prompt in (torch.full((1, 4), 5 + rank), torch.full((1, 4 + rank), 5)):
        with pytest.raises(AssertionError, match="Data inconsistency"):
            engine.generate(prompt, max_new_tokens=3)
    assert torch.equal(call(engine, "generate"), wanted)


def test_ranks_that_are_given_other_prompts_are_told_at_any_generation() -> None:
    run_ranks(2, other_prompts, timeout=60)
