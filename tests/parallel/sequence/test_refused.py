"""What cannot be, refused by its words on every rank, and what a registration leaves behind: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.parallel.sequence import runs


def said_by(call: Any) -> str:
    """The error's text."""
    with pytest.raises(DeepSpeedError) as error:
        call()
    return str(error.value)


def register(model: Any, size: int = 2, core: str | None = "sdpa", **more: Any) -> Any:
    """With the batch size that nobody needs."""
    return UlyssesSPAttentionHF.register_with_transformers(model, core, size, micro_batch_size=1, **more)


def refused_registrations(rank: int, world: int) -> dict[str, str]:
    """Each by its reason."""
    from transformers import CONFIG_MAPPING

    model = runs.tiny_model()
    hybrid = CONFIG_MAPPING["qwen3_next"](
        num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, hidden_size=32
    )
    holder = nn.Linear(2, 2)
    holder.config = hybrid
    mamba = nn.Linear(2, 2)
    mamba.config = CONFIG_MAPPING["mamba"](num_hidden_layers=3, num_attention_heads=2)
    found = {
        "eager": said_by(lambda: register(model, core="eager")),
        "unknown": said_by(lambda: register(model, core="spda")),
        "differs": said_by(lambda: register(model, core="flex_attention")),
        "no config": said_by(lambda: register(nn.Linear(2, 2))),
        "heads": said_by(
            lambda: register(runs.tiny_model(heads=1, kv=1, attention="flex_attention"), core="flex_attention")
        ),
        "linear": said_by(lambda: register(holder)),
        "mamba": said_by(lambda: register(mamba)),
        "size": said_by(lambda: register(model, size=3)),
    }
    assert register(model, size=1) is None
    try:
        register(model)
        register(model)
        found["second"] = said_by(lambda: register(model, disable_in_eval=True))
        found["groups"] = said_by(lambda: parallel_state_sp.initialize_sequence_parallel(2))
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()
    return found


def test_registrations_that_cannot_be_are_refused_by_name() -> None:
    for found in run_ranks(2, refused_registrations):
        assert 'core_attn_implementation = "eager"' in found["eager"]
        assert "'spda' is not an attention of transformers" in found["unknown"]
        assert "made with attn_implementation = 'sdpa'" in found["differs"]
        assert "a Linear has no config" in found["no config"]
        assert "1 attention heads cannot be split over 2 sequence-parallel ranks" in found["heads"]
        assert "linear_attention: layers 0, 2" in found["linear"]
        assert "linear_attention: layers 0, 1, 2" in found["mamba"]
        assert "sequence parallel size 3 does not divide the 2 ranks" in found["size"]
        assert "was called before with other settings" in found["second"]
        assert "sequence parallel groups of 2 ranks were made before" in found["groups"]


def refused_forwards(rank: int, world: int) -> dict[str, str]:
    """Each by its reason; afterwards the model runs as it did before it was registered."""
    model = runs.tiny_model()
    batch = runs.batch_of("plain")
    expected = model(input_ids=batch["input_ids"]).logits
    try:
        register(model, seq_length=16, seq_length_is_variable=False, disable_in_eval=True)
        part = runs.cut(batch, rank, 2)
        ids, positions = part["input_ids"], part["position_ids"]
        found = {
            "no position ids": said_by(lambda: model(input_ids=ids)),
            "on one rank": said_by(lambda: model(input_ids=ids, position_ids=positions if rank else None)),
            "4-D mask": said_by(
                lambda: model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(1, 1, 8, 8))
            ),
            "batches": said_by(
                lambda: model(input_ids=ids.repeat(rank + 1, 1), position_ids=positions.repeat(rank + 1, 1))
            ),
            "length": said_by(lambda: model(input_ids=ids[:, 1:], position_ids=positions[:, 1:])),
        }
        assert torch.equal(model.eval()(input_ids=batch["input_ids"]).logits, expected)
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()
    assert torch.equal(model.train()(input_ids=batch["input_ids"]).logits, expected)
    return found


def test_forwards_that_cannot_be_are_refused_on_every_rank() -> None:
    for found in run_ranks(2, refused_forwards):
        assert found["no position ids"].startswith("Ulysses SP requires position_ids in every forward() call")
        assert "Without: sequence-parallel rank 0 of 2" in found["on one rank"]
        assert "a tensor of 4 dimensions" in found["4-D mask"]
        assert "batches of different sizes: [1, 2]" in found["batches"]
        assert "a sequence of 14 tokens" in found["length"]


def refused_sizes(rank: int, world: int) -> dict[str, str]:
    """Sizes by the configuration and by mesh_param."""
    found = {}
    for name, config, mesh in (
        ("size", {"sequence_parallel_size": 3}, None),
        ("data", {"sequence_parallel_size": 2, "data_parallel_size": 2}, None),
        ("mesh", {}, (2, 2)),
        ("both", {"sequence_parallel_size": 3}, (1, 2)),
    ):
        model = nn.Linear(2, 2)
        whole = runs.config_of(0, **config)
        found[name] = said_by(lambda m=model, c=whole, p=mesh: deepspeed.initialize(model=m, config=c, mesh_param=p))
    return found


def test_sizes_that_do_not_make_up_the_ranks_are_refused() -> None:
    for found in run_ranks(2, refused_sizes):
        assert "sequence_parallel_size = 3: these do not make up the 2 ranks" in found["size"]
        assert "sequence_parallel_size = 2 and data_parallel_size = 2" in found["data"]
        assert "mesh_param = (2, 2): these do not make up the 2 ranks" in found["mesh"]
        assert "mesh_param = (1, 2), but sequence_parallel_size = 3" in found["both"]


def by_configuration(rank: int, world: int) -> list[Any]:
    """What an engine knows of a mesh that the configuration or mesh_param asks for."""
    found = []
    for config, mesh in (({"sequence_parallel_size": 2}, None), ({}, (2, 2)), ({"data_parallel_size": 2}, None)):
        engine, *_ = deepspeed.initialize(model=nn.Linear(2, 2), config=runs.config_of(1, **config), mesh_param=mesh)
        group = engine.seq_parallel_group
        ranks = torch.distributed.get_process_group_ranks(group) if group is not None else None
        found.append((ranks, engine.train_batch_size(), engine.dp_world_size))
        engine.destroy()
    return found


def test_the_configuration_and_mesh_param_divide_the_ranks() -> None:
    first, *_, last = run_ranks(4, by_configuration)
    assert first == [([0, 1], 2, 2), ([0, 1], 2, 2), (None, 4, 4)]
    assert last == [([2, 3], 2, 2), ([2, 3], 2, 2), (None, 4, 4)]


def low_precision(rank: int, world: int) -> str:
    """A bf16 loss that is equal everywhere, with nothing in its graph that says why."""
    model = nn.Linear(2, 1).bfloat16()
    engine, *_ = deepspeed.initialize(
        model=model, config=runs.config_of(1, sequence_parallel_size=2, bf16={"enabled": True})
    )
    loss = engine(torch.ones(1, 2, dtype=torch.bfloat16)).sum() * 1
    said = said_by(lambda: engine.backward(loss))
    engine.destroy()
    return said


def test_an_equal_loss_in_half_precision_names_the_key_that_decides() -> None:
    assert '"sequence_parallel_loss" to "summed" or "local"' in run_ranks(2, low_precision)[0]


def plain_backwards(rank: int, world: int) -> str:
    """A loss that the engine does not see, where it says how losses are weighted; then one that it does."""
    config = runs.config_of(1, sequence_parallel_size=2, sequence_parallel_loss="summed")
    engine, *_ = deepspeed.initialize(model=nn.Linear(2, 1), config=config)
    said = said_by(lambda: engine(torch.ones(1, 2)).sum().backward())
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()
    engine.destroy()
    return said


def test_a_plain_backward_is_refused_where_the_loss_has_to_be_weighted_first() -> None:
    for said in run_ranks(2, plain_backwards):
        assert 'sequence_parallel_loss = "summed": the loss has to be weighted first' in said
        assert "Use engine.backward(loss)" in said
