"""What one rank raises while a model is prepared ends all ranks soon, with its name; the model is what it was, and can be prepared then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.inference import engine as engine_module
from deepspeed.inference import prepare, tensor
from deepspeed.inference.load import Loader
from deepspeed.parallel.tensor import apply
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero import init as zero_init
from tests.harness import run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")

SOON_S = 10.0
PHASES: dict[str, tuple[Any, str, int]] = {
    "check": (prepare, "run_dtype", 1),
    "decide": (tensor, "decide", 1),
    "cut": (apply, "_part", 5),
    "cast": (prepare, "cast", 1),
    "load": (Loader, "fill", 4),
    "load the rest": (Loader, "_read", 2),
    "quantize": (Loader, "quantized", 3),
    "place": (prepare, "place", 1),
    "put to rest": (zero_init, "Bucket", 5),
    "spread": (engine_module.experts.ExpertRanks, "spread", 1),
}
"""Where a rank fails: at which call of what."""
WAYS: dict[str, dict[str, Any]] = {
    "tp": {"tensor_parallel": {"tp_size": 2}},
    "stage 3": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "experts": {"moe": {"ep_size": 2}},
}


def fails_once(patch: pytest.MonkeyPatch, phase: str) -> None:
    """Have this rank fail there."""
    owner, name, number = PHASES[phase]
    own, counted = getattr(owner, name), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        if counted[0] == number:
            raise MemoryError(f"no memory in {phase}")
        return own(*args, **kwargs)

    patch.setattr(owner, name, fail)


def one_fails(rank: int, world_size: int, way: str, phase: str, failing: int, folder: str) -> None:
    torch.set_num_threads(1)
    model = build("mixtral" if way == "experts" else "llama")
    own = {name: param.clone() for name, param in model.named_parameters()}
    given = {**WAYS[way], "dtype": "int8" if phase == "quantize" else "fp32"}
    if phase in ("load", "load the rest", "quantize"):
        given["checkpoint"] = folder
    for _ in range(2):
        started_s = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                fails_once(patch, phase)
            words = (
                "no memory in" if rank == failing else rf"\[rank {failing} of 2\] (MemoryError: )?no memory in {phase}"
            )
            with pytest.raises(MemoryError if rank == failing else DeepSpeedError, match=words):
                deepspeed.init_inference(model, **given)
        assert time.monotonic() - started_s < SOON_S
        assert all(torch.equal(param, own[name]) for name, param in model.named_parameters())
    batch = prompts("left")
    wanted = build("mixtral" if way == "experts" else "llama").generate(**batch, max_new_tokens=4)
    engine = deepspeed.init_inference(model, **{**given, "dtype": "fp32"})
    assert torch.equal(engine.generate(**batch, max_new_tokens=4), wanted)
    engine.destroy()


@pytest.mark.parametrize(
    ("way", "phase", "failing"),
    [
        *(("tp", phase, 1) for phase in ("check", "decide", "cut", "cast", "load", "quantize", "place")),
        ("tp", "cut", 0),
        *(("stage 3", phase, 1) for phase in ("check", "cast", "load", "load the rest", "quantize", "put to rest")),
        ("stage 3", "put to rest", 0),
        *(("experts", phase, 1) for phase in ("check", "spread", "cast")),
    ],
)
def test_what_one_rank_raises_while_it_prepares_ends_all(way: str, phase: str, failing: int, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    run_ranks(2, one_fails, way, phase, failing, str(tmp_path), timeout=60)


def over_a_given_group(rank: int, world_size: int) -> None:
    """Two engines over a group of the script's; what fails in one is known to the other, and to a third."""
    group = dist.new_group([0, 1])
    first = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_group": group})
    second = deepspeed.init_inference(build("qwen2"), dtype="fp32", tp={"tp_group": group})
    batch = prompts("left")
    wanted = [each.generate(**batch, max_new_tokens=4) for each in (first, second)]

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    def fails(engine: Any) -> None:
        handle = engine.module.model.layers[1].register_forward_pre_hook(fail) if rank == 1 else None
        with pytest.raises(OverflowError if rank == 1 else DeepSpeedError, match="no memory is left"):
            engine(**batch)
        if handle is not None:
            handle.remove()

    for failing, other, number in ((first, second, 1), (second, first, 0)):
        fails(failing)
        assert torch.equal(other.generate(**batch, max_new_tokens=4), wanted[number])
    fails(first)
    third = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_group": group})
    assert torch.equal(third.generate(**batch, max_new_tokens=4), wanted[0])
    fails(third)
    assert torch.equal(second.generate(**batch, max_new_tokens=4), wanted[1])
    for each in (first, second, third):
        each.destroy()
    dist.destroy_process_group(group)


def other_groups(rank: int, world_size: int) -> None:
    """A rank that is in more groups than the other, or has destroyed one, finds the group that takes the place of another."""
    more = [dist.new_group([0], use_local_synchronization=True) for _ in range(2)] if rank == 0 else []
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_size": 2})
    batch = prompts("left")
    wanted = engine.generate(**batch, max_new_tokens=4)

    def fail(*args: Any) -> None:
        raise OverflowError("no memory is left")

    for _ in range(3):
        handle = engine.module.model.layers[1].mlp.register_forward_pre_hook(fail) if rank == 1 else None
        with pytest.raises(OverflowError if rank == 1 else DeepSpeedError, match="no memory is left"):
            engine(**batch)
        if handle is not None:
            handle.remove()
        assert torch.equal(engine.generate(**batch, max_new_tokens=4), wanted)
        if more:
            dist.destroy_process_group(more.pop())
    engine.destroy()


def test_another_group_is_found_whatever_other_groups_a_rank_is_in() -> None:
    run_ranks(2, other_groups, timeout=60)


def test_engines_over_a_group_that_was_given_share_its_count_of_messages() -> None:
    run_ranks(2, over_a_given_group, timeout=60)
