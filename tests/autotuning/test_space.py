from __future__ import annotations

from typing import Any

import pytest

from deepspeed.autotuning.space import Question, candidates, check_mappings, check_values, listed
from deepspeed.config import load_config
from deepspeed.config.dotted import get_at, with_values
from deepspeed.utils.errors import DeepSpeedError


def names(config: dict[str, Any], num_ranks: int = 2, **section: Any) -> list[str]:
    read = load_config({"autotuning": section}).autotuning
    return [c.name for c in candidates(Question(config, read, num_ranks, is_host=True))]


def test_what_is_not_given_or_auto_is_searched_and_what_is_fixed_stays() -> None:
    found = names({}, max_train_micro_batch_size_per_gpu=2)
    assert found == [f"z{stage}_gas1_tmbspg{micro}" for stage in range(4) for micro in (1, 2)]
    fixed = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}
    assert names(fixed) == ["z2_gas5_tmbspg3"]
    assert names({**fixed, "train_micro_batch_size_per_gpu": "auto"}, max_train_micro_batch_size_per_gpu=2) == [
        "z2_gas5_tmbspg1",
        "z2_gas5_tmbspg2",
    ]


def test_with_a_fixed_train_batch_the_accumulation_follows() -> None:
    config = {"train_batch_size": 12, "zero_optimization": {"stage": 1}}
    assert names(config) == ["z1_gas6_tmbspg1", "z1_gas3_tmbspg2", "z1_gas2_tmbspg3", "z1_gas1_tmbspg6"]
    for candidate in candidates(Question(config, load_config({}).autotuning, 2)):
        load_config(candidate.apply(config)).batch_sizes(data_parallel_size=2, size_source="test")


def test_lists_are_the_users_own_space_unless_the_key_takes_a_list() -> None:
    config = {
        "train_micro_batch_size_per_gpu": [2, 4],
        "zero_optimization": {"stage": ["all"], "reduce_bucket_size": [1e6, 5e6]},
        "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}},
    }
    assert set(listed(config)) == {
        "train_micro_batch_size_per_gpu",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_size",
    }
    found = names(config)
    assert len(found) == 4 * 2 * 2
    assert found[0] == "z0_gas1_tmbspg2_rb1e6"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_micro_batch_size_per_gpu": [2, -1]}, "train_micro_batch_size_per_gpu = -1 is too small"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0 is too small"),
        ({"train_micro_batch_size_per_gpu": []}, r"train_micro_batch_size_per_gpu = \[\] lists no value to try"),
        ({"zero_optimization": {"stage": [1, 7]}}, "zero_optimization.stage = 7 is too large"),
        ({"zero_optimization": {"stage": [1], "reduce_bucket_size": [10**6, "big"]}}, 'reduce_bucket_size = "big"'),
        ({"zero_optimisation": {"stage": 1}}, "Did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": [1, 2], "offload_optimizer": {"device": ["cpu", "dsk"]}}}, '"dsk"'),
    ],
)
def test_what_is_wrong_in_a_space_is_told_by_its_key_and_value(config: dict[str, Any], words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        check_values(config)


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": "all"}},
        {"zero_optimization": {"stage": [1, "auto"]}, "train_micro_batch_size_per_gpu": "auto"},
        {"zero_optimization": {"stage": [0, 3], "zero_quantized_weights": [False, True]}},
        {"train_micro_batch_size_per_gpu": [1, 2], "gradient_accumulation_steps": [1, 3], "train_batch_size": [8, 12]},
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95], "lr": "auto"}}, "bf16": {"enabled": "auto"}},
    ],
)
def test_a_space_whose_values_go_with_some_of_each_other_is_right(config: dict[str, Any]) -> None:
    check_values(config)
    assert names(config, max_train_micro_batch_size_per_gpu=2)


def test_slow_searches_add_keys_where_they_have_an_effect() -> None:
    config = {"train_micro_batch_size_per_gpu": 4}
    found = names(config, fast=False)
    assert "z0_gas1_tmbspg4_rcfull_rb1Mi" in found
    assert "z3_gas1_tmbspg4_rcnone_pf50e6_rd0" in found
    assert not [name for name in found if "off" in name]  # ranks on CPUs: the host is the device
    on_gpu = candidates(Question(config, load_config({"autotuning": {"fast": False}}).autotuning, 2))
    assert any(c.values.get("zero_optimization.offload_optimizer.device") == "cpu" for c in on_gpu)


def test_bounds_of_the_section_hold_and_ranks_that_share_a_batch_count_once() -> None:
    config = {"zero_optimization": {"stage": 0}}
    assert names(config, 4, max_train_batch_size=16, min_train_batch_size=8) == ["z0_gas1_tmbspg2", "z0_gas1_tmbspg4"]
    assert names(config, 4, max_train_batch_size=8, mp_size=2) == [f"z0_gas1_tmbspg{m}" for m in (1, 2, 4)]
    found = candidates(
        Question(
            {**config, "train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": [1, 2]}},
            load_config({}).autotuning,
            4,
        )
    )
    assert [(c.name, c.data_parallel, c.train_batch) for c in found] == [
        ("z0_gas1_tmbspg2_tp1", 4, 8),
        ("z0_gas1_tmbspg2_tp2", 2, 4),
    ]


def test_bounds_that_a_user_gives_hold_for_batch_sizes_that_the_user_gives() -> None:
    config = {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": [1, 2, 2048]}
    assert names(config) == [f"z0_gas1_tmbspg{m}" for m in (1, 2, 2048)]
    assert names(config, max_train_micro_batch_size_per_gpu=2) == ["z0_gas1_tmbspg1", "z0_gas1_tmbspg2"]
    assert names(config, min_train_micro_batch_size_per_gpu=2) == ["z0_gas1_tmbspg2", "z0_gas1_tmbspg2048"]
    with pytest.raises(DeepSpeedError, match="no configuration satisfies the batch sizes"):
        names({"train_batch_size": 8}, max_train_batch_size=4)


@pytest.mark.parametrize(
    ("mappings", "words"),
    [
        ({"zero_optimization.stages": "--stage"}, "no such key.*\n.*Did you mean 'zero_optimization.stage'"),
        ({"stage": "--stage"}, "written with dots"),
        ({"train_micro_batch_size_per_gpu": ""}, "is no flag of a script"),
        ({"train_micro_batch_size_per_gpu": "batch"}, "is no flag of a script"),
    ],
)
def test_a_mapping_without_effect_is_refused(mappings: dict[str, str], words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        check_mappings(mappings, {})
    check_mappings(
        {" train_batch_size ": " -b", "optimizer.params.lr": "--lr"}, {"optimizer": {"params": {"lr": 1e-3}}}
    )


def test_no_configuration_left_says_what_to_widen() -> None:
    with pytest.raises(DeepSpeedError, match='Set train_batch_size and train_micro_batch_size_per_gpu to "auto"'):
        names({"train_batch_size": 3})


def test_a_candidate_changes_its_keys_alone() -> None:
    config = {
        "zero_optimization": {"stage": [1, 2], "overlap_comm": False},
        "autotuning": {"enabled": True},
        "fp16": {"enabled": True},
    }
    read = load_config({"autotuning": {"max_train_micro_batch_size_per_gpu": 1}}).autotuning
    made = [candidate.apply(config) for candidate in candidates(Question(config, read, 2))]
    assert [get_at(each, "zero_optimization.stage") for each in made] == [1, 2]
    assert made[0] == {
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "fp16": {"enabled": True},
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    assert config["zero_optimization"] == {"stage": [1, 2], "overlap_comm": False}


def test_values_at_dotted_keys_are_set_and_taken_away() -> None:
    assert with_values({"a": {"b": 1}}, {"a.c": 2, "d.e": 3, "a.b": None, "x.y": None}) == {
        "a": {"c": 2},
        "d": {"e": 3},
    }


def test_divided_candidates_say_over_how_many_ranks_and_in_which_way() -> None:
    config = {
        "tensor_parallel": {"autotp_size": "auto"},
        "pipeline": {"stages": [1, 2]},
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 2,
    }
    found = {c.name: c for c in candidates(Question(config, load_config({}).autotuning, 4, is_host=True))}
    assert {name: (c.data_parallel, dict(c.degrees), c.num_ranks) for name, c in found.items()} == {
        "z1_gas1_tmbspg2_tp1_pp1": (4, {}, 4),
        "z1_gas1_tmbspg2_tp1_pp2": (2, {"pp": 2}, 4),
        "z1_gas1_tmbspg2_tp2_pp1": (2, {"tp": 2}, 4),
        "z1_gas1_tmbspg2_tp2_pp2": (1, {"pp": 2, "tp": 2}, 4),
        "z1_gas1_tmbspg2_tp4_pp1": (1, {"tp": 4}, 4),
    }


def test_a_key_is_read_and_set_at_every_level() -> None:
    from deepspeed.autotuning.utils import get_val_by_key, set_val_by_key

    config = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}
    assert get_val_by_key(config, "device") == "cpu"
    assert get_val_by_key(config, "stage") == 0
    assert get_val_by_key(config, "nowhere") is None
    set_val_by_key(config, "device", "nvme")
    set_val_by_key(config, "nowhere", 1)
    assert config == {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0, "offload_param": {"device": "nvme"}}}
