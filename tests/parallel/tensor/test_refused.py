"""What tensor parallelism refuses, in these words, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.parallel.tensor import requested
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.harness import run_ranks
from tests.parallel.tensor.families import FAMILIES
from tests.parallel.tensor.models import small
from tests.parallel.tensor.runs import config

pytest.importorskip("transformers")

TP = "tensor_parallel"
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"autotp_size": 3}, {}, "autotp_size = 3 does not divide the 2 ranks"),
    (
        {"autotp_size": 2},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        "has 1 attention heads, which cannot be split",
    ),
    (
        {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": [".*nowhere.*"]}]}},
        {},
        "no layer of LlamaForCausalLM matches",
    ),
    ({"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": ["("]}]}}, {}, "is no regular expression"),
    (
        {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": [".*"], "shape": [[[1]], 2]}]}},
        {},
        "supports only 1-level nesting",
    ),
    (
        {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": [".*o_proj"], "grad_allreduce": True}]}},
        {},
        "it is for layers that stay whole",
    ),
    (
        {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": [".*"]}], "tp_size": 4}},
        {},
        "partition_config.tp_size = 4",
    ),
]


def refuse(rank: int, world_size: int, section: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        deepspeed.initialize(model=small("llama", **changes), config={**config(2), TP: section})
    assert words in str(caught.value)


@pytest.mark.parametrize(("section", "changes", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_is_one_error_on_every_rank(section: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    run_ranks(2, refuse, section, changes, words)


class Mpu:
    """Says that two ranks share layers."""

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank()


def said(tp: dict[str, Any], mpu: Any = None, told: Any = None, size: int = 2) -> str:
    """What is said about groups and an mpu, given in the section, to `initialize` and to `tp_model_init`."""
    model = torch.nn.Linear(2, 2)
    if told is not None:
        deepspeed.tp_model_init(model, tp_size=size, dtype=torch.float32, tp_group=told)
    with pytest.raises(ValueError, match="Give|Make") as caught:
        deepspeed.initialize(model=model, mpu=mpu, config={**config(2), TP: {"autotp_size": 2, "tp": tp}})
    return str(caught.value)


def refuse_two_who_say_which_ranks(rank: int, world_size: int) -> None:
    everyone, alone = torch.distributed.group.WORLD, [torch.distributed.new_group([r]) for r in range(2)]
    both = ", and deepspeed.initialize an mpu: both say which ranks share layers.\n  Give one."
    try:
        assert said({}, mpu=Mpu(), told=everyone) == f"tp_model_init provided tp_group{both}"
        assert said({"tp_group": everyone}, mpu=Mpu()) == f"tensor_parallel.tp provided tp_group{both}"
        assert said({"tp_group": everyone, "mpu": Mpu()}) == f"tensor_parallel.tp provided tp_group{both}"
        assert said({"mpu": Mpu()}, mpu=Mpu()).startswith(
            "tensor_parallel.tp.mpu and deepspeed.initialize(mpu=...) are two"
        )
        assert said({"tp_group": alone[rank]}).startswith(
            "tensor_parallel.tp provided tp_group of ranks [0], but layers are to be cut over 2 ranks."
        )
        with pytest.raises(ValueError, match=r"the group has 1 ranks"):
            deepspeed.tp_model_init(torch.nn.Linear(2, 2), tp_size=2, dtype=None, tp_group=alone[rank])
        with pytest.raises(ValueError, match=r"tp_size = 2 without tensor_parallel\.autotp_size"):
            deepspeed.initialize(model=torch.nn.Linear(2, 2), config={**config(2), TP: {"tp": {"tp_size": 2}}})
    finally:
        torch.distributed.destroy_process_group(alone[rank])


def test_an_mpu_and_a_group_together_are_one_error_on_every_rank() -> None:
    run_ranks(2, refuse_two_who_say_which_ranks)


def cut_by_what_python_gives(rank: int, world_size: int) -> list[int]:
    found = []
    for tp in ({"tp_group": torch.distributed.group.WORLD}, {"mpu": Mpu()}):
        size = 2 if "mpu" in tp else 0
        engine, *_ = deepspeed.initialize(
            model=small("llama"), config={**config(2), TP: {"autotp_size": size, "tp": tp}}
        )
        found += [engine.autotp_size(), engine.module.model.layers[0].mlp.up_proj.weight.shape[0]]
        engine.destroy()
    return found


def test_a_group_or_an_mpu_in_the_section_says_which_ranks_share_layers() -> None:
    assert run_ranks(2, cut_by_what_python_gives) == [[2, 24, 2, 24]] * 2


def refuse_style(rank: int, world_size: int) -> None:
    model = small("llama")
    model._tp_plan = {"model.layers.*.self_attn.q_proj": "diagonal"}  # type: ignore[assignment]
    with pytest.raises(DeepSpeedConfigError, match="'diagonal', a style nobody knows"):
        deepspeed.initialize(model=model, config=config(2))


def refuse_plans_names(rank: int, world_size: int) -> None:
    model = small("llama")
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.gate": "colwise"}  # type: ignore[assignment,dict-item]
    with pytest.raises(
        DeepSpeedConfigError, match=r"names 'model\.layers\.\*\.mlp\.gate', and no layer or parameter is"
    ):
        deepspeed.initialize(model=model, config=config(2))


def test_a_plan_that_names_a_layer_that_is_not_there_is_refused() -> None:
    run_ranks(2, refuse_plans_names)


def refuse_heads(rank: int, world_size: int) -> None:
    asked = {**config(2), TP: {"autotp_size": 2, "vocab_parallel_lm_head": True}}
    with pytest.raises(ValueError, match="has no head that get_output_embeddings"):
        deepspeed.initialize(model=small("llama").model, config=asked)
    family, changes = FAMILIES["falcon, several heads"]
    with pytest.raises(
        DeepSpeedConfigError, match=r"query_key_value has 1 key heads in one layer with their queries, fewer than"
    ):
        deepspeed.initialize(model=small(family, **{**changes, "num_kv_heads": 1}), config=config(2))
    stripes = small(
        "codegen", n_embd=60, n_head=6, rotary_dim=4, n_layer=1, n_inner=48, **dict.fromkeys(NOT_ITS, "none")
    )
    for layer in stripes.transformer.h:  # type: ignore[union-attr]
        layer.attn.mp_num = 3
    with pytest.raises(DeepSpeedConfigError, match=r"its fused layer lies in 3 stripes \(mp_num\)"):
        deepspeed.initialize(model=stripes, config=config(2))


NOT_ITS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "intermediate_size")


def test_heads_that_cannot_be_cut_are_refused() -> None:
    run_ranks(2, refuse_heads)


def test_a_style_nobody_knows_is_named() -> None:
    run_ranks(2, refuse_style)


class Fused(torch.nn.Module):
    """Blocks whose attention is one layer of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"Wqkv": torch.nn.Linear(8, 24), "out_proj": torch.nn.Linear(8, 8)})]
        )


def refuse_folder(rank: int, world_size: int, folder: str) -> None:
    """A folder of one rank's parts is refused; one of weights that are handed in is written."""
    model = small("llama")
    engine, *_ = deepspeed.initialize(model=model, config=config(2))
    with pytest.raises(DeepSpeedError, match="cut over 2 ranks would write this rank's part"):
        engine.module.save_pretrained(folder)
    whole = small("llama")
    engine.module.save_pretrained(folder, is_main_process=rank == 0, state_dict=whole.state_dict())
    dist.barrier()
    read = type(model).from_pretrained(folder).state_dict()
    assert all(torch.equal(read[name], value) for name, value in whole.state_dict().items())


def test_a_rank_does_not_write_its_part_as_the_model(tmp_path: Path) -> None:
    run_ranks(2, refuse_folder, str(tmp_path))


def refuse_fused(rank: int, world_size: int) -> None:
    with pytest.raises(
        DeepSpeedConfigError, match=r"blocks\.0\.Wqkv is several layers in one, and its structure does not say"
    ):
        deepspeed.initialize(model=Fused(), config=config(2))
    with pytest.raises(DeepSpeedConfigError, match=r"qkv_proj is several layers in one, and its preset 'phi3'"):
        deepspeed.initialize(model=small("phi3"), config={**config(2), TP: {"autotp_size": 2, "preset_model": "phi3"}})


def test_a_fused_layer_whose_order_nobody_told_is_not_cut_by_chance() -> None:
    run_ranks(2, refuse_fused)


def test_calls_of_tp_model_init_that_contradict_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    assert deepspeed.tp_model_init(model, tp_size=2, dtype=torch.bfloat16) is model
    with pytest.raises(ValueError, match="Conflicting tp_model_init arguments"):
        deepspeed.tp_model_init(model, tp_size=4, dtype=torch.bfloat16)
    assert requested.take() == requested.Request(2, torch.bfloat16, None)
    assert requested.take() is None
