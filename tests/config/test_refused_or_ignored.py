from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import Config, check_available, load_config
from deepspeed.config.refused_or_ignored import NOT_YET
from deepspeed.config.schema import all_paths
from deepspeed.utils.errors import NotAvailableError
from tests.config.keys import KEYS, nest

ASKS: dict[str, Any] = {
    "zero_optimization.zenflow": {},
    "optimizer.type": "MuAdamW",
    "amp.enabled": True,
    "msamp.enabled": True,
    "tensor_parallel.vocab_parallel_ce_backend": "liger",
    "tensor_parallel.injection_policy_tuple": ["o_proj"],
    "tensor_parallel.replace_with_kernel_inject": True,
    "compile.deepcompile": True,
    "hybrid_engine.enabled": True,
    "data_efficiency.enabled": True,
    "curriculum_learning.enabled": True,
    "progressive_layer_drop.enabled": True,
    "compression_training.layer_reduction.enabled": True,
    "quantize_training.enabled": True,
    "quantize_training.eigenvalue.enabled": True,
    "eigenvalue.enabled": True,
    "sparse_attention": {},
}


@pytest.mark.parametrize(("path", "value"), ASKS.items())
def test_asking_for_what_is_not_built_yet_names_the_key(path: str, value: Any) -> None:
    with pytest.raises(NotAvailableError) as caught:
        check_available(load_config(nest(path, value)))
    assert str(caught.value).startswith(f"{path} = ")
    assert "is not available yet: " in str(caught.value)


def test_splitting_sequences_is_the_one_pass_that_needs_no_compiler() -> None:
    check_available(load_config({"compile": {"deepcompile": True, "passes": ["autosp"]}}))
    with pytest.raises(
        NotAvailableError, match="compile.deepcompile = true is not available yet: DeepCompile, except for"
    ):
        check_available(load_config({"compile": {"deepcompile": True, "passes": ["autosp", "z1"]}}))


@pytest.mark.parametrize(
    ("written", "path"),
    [
        (
            {
                "compression_training": {
                    "sparse_pruning": {"shared_parameters": {"enabled": True, "method": "snip_momentum"}}
                }
            },
            "compression_training.sparse_pruning.enabled",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload",
        ),
        ({"optimizer": {"type": "musgd"}}, "optimizer.type"),
        (
            {"expert_parallel": {"comm_backend": "deepep", "comm_max_tokens_per_rank": 8}},
            "expert_parallel.comm_backend",
        ),
    ],
)
def test_the_same_where_other_keys_are_needed(written: dict[str, Any], path: str) -> None:
    with pytest.raises(NotAvailableError, match=path):
        check_available(load_config(written))


def test_everything_asked_for_is_named_at_once() -> None:
    config = load_config({"amp": {"enabled": True}, "eigenvalue": {"enabled": True}})
    with pytest.raises(NotAvailableError, match=r"(?s)amp\.enabled.*eigenvalue\.enabled.*Remove these keys"):
        check_available(config)


SECTIONS = sorted({path.split(".")[0] for path in KEYS if "." in path} - {"sparse_attention", "datastates_ckpt"})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_present_and_off_is_fine(section: str) -> None:
    check_available(load_config({section: {}}))


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"activation_checkpointing": {"partition_activations": True}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "nvme_path": None}}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 2}},
        {"optimizer": {"type": "Muon"}},
        {"sequence_parallel_size": 1},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}},
        {"datastates_ckpt": False},
        {"datastates_ckpt": True},
        {"nebula": {"enabled": True}},
        {"checkpoint": {"writer": {"decoupled": True}}},
        {"weight_quantization": {"enabled": True, "quantized_initialization": {}, "post_init_quant": {}}},
        {"tensor_parallel": {"autotp_size": 1}},
    ],
)
def test_what_works_is_not_refused(written: dict[str, Any]) -> None:
    check_available(load_config(written))


def test_every_line_of_the_table_is_about_a_key() -> None:
    sections = {path.rpartition(".")[0] for path in all_paths(Config)}
    paths = {path for path, _, _ in NOT_YET}
    assert {
        path for path in paths if path not in all_paths(Config) and path.removesuffix(".enabled") not in sections
    } == set()
