"""Forty configurations of public repositories: those that run elsewhere run here, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspeed.config import DeepSpeedConfigError, check_available, load_config
from deepspeed.config.refused_or_ignored import given_without_effect
from deepspeed.utils.errors import NotAvailableError

FILES = Path(__file__).parent / "public"

ACCEPTED = {
    "refused_01": ["offload_optimizer has no effect"],
    "refused_04": ["offload_param_device has no effect", "zero_stage has no effect", "cpu_offload is an old"],
    "refused_05": ["bf16.loss_scale has no effect", "checkpoint_activations has no effect"],
    "refused_07": ["comms_config has no effect", "monitor_config has no effect"],
    "refused_08": [],
    "notyet_06": [],
    "notyet_08": [],
    "ok_01": ["use stage3_gather_16bit_weights_on_model_save"],
    "ok_07": ["cpu_offload is an old"],
    "ok_23": ["cpu_offload is an old"],
}
"""Files with something to say, and words of it; the names say what an earlier version did with the file."""

NOT_YET = {
    "refused_03": "eigenvalue.enabled = true is not available yet: layer curvature",
    "refused_06": "compression_training.weight_quantization.enabled = true is not available yet",
    "notyet_01": "compression_training.row_pruning.enabled = true is not available yet: pruning",
    "notyet_02": "data_efficiency.enabled = true is not available yet",
    "notyet_03": "data_efficiency.enabled = true is not available yet",
    "notyet_04": "is not available yet: sparse attention",
    "notyet_05": "curriculum_learning.enabled = true is not available yet",
    "notyet_07": "compression_training.channel_pruning.enabled = true is not available yet",
}


@pytest.mark.parametrize("name", sorted(ACCEPTED | {f"ok_{i:02}": [] for i in range(1, 25)}))
def test_what_runs_elsewhere_runs_here_and_says_what_means_nothing(name: str, warned: pytest.LogCaptureFixture) -> None:
    config = load_config(FILES / f"{name}.json")
    for words in ACCEPTED.get(name, []):
        assert sum(words in text for text in warned.messages) == 1
    assert bool(ACCEPTED.get(name)) == bool(warned.messages)
    warned.clear()
    check_available(config)
    assert len(warned.messages) == len(given_without_effect(config))


@pytest.mark.parametrize(("name", "words"), NOT_YET.items())
def test_what_asks_for_a_later_feature_says_which(name: str, words: str) -> None:
    with pytest.raises(NotAvailableError) as caught:
        check_available(load_config(FILES / f"{name}.json"))
    assert words in str(caught.value)


def test_keys_of_a_fork_in_a_strict_section_are_all_named() -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config(FILES / "refused_02.json")
    assert "10 things in the configuration are wrong" in str(caught.value)
    assert "zero_optimization.sub_group_buffer_num is not a configuration key" in str(caught.value)
    assert "mem_chunk" not in str(caught.value)


def test_every_file_is_in_a_test() -> None:
    named = {*ACCEPTED, *NOT_YET, "refused_02", *(f"ok_{i:02}" for i in range(1, 25))}
    assert {path.stem for path in FILES.glob("*.json")} == named
