"""Divided steps: the cost model of a rank's share, what layers send beside what engines count, bubbles beside schedules' lists."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.memory.shape import ModelShape, shape_of
from deepspeed.planner.cost import Choice, Work, step_parts
from deepspeed.planner.divided import divided_parts
from deepspeed.planner.layouts import Layout, sent_inside
from deepspeed.profiling.rates import Rates
from deepspeed.utils.waits import COMMUNICATION
from tests.harness import run_ranks

LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="make test-autotuning")

RATES = Rates(matmul_flops=1e11, copy_nbytes_s=1e10, wire_nbytes_s=1e9, wire_latency_s=1e-5)
WORK = Work(num_params=4 * 10**6 + 2000, flops=3e9, forward_flops=1e9, activation_nbytes=4e6, num_modules=40, is_host=True)  # fmt: skip
SHAPE = ModelShape(
    name="stack", num_blocks=4, block_params=10**6, block_cut_params=10**6, block_expert_params=0, outer_params=2000,
    first_params=1000, block_flops=7e8, outer_flops=2e8, block_kept_nbytes=9e5, outer_kept_nbytes=4e5, boundary_nbytes=65536.0,
    itemsize=4, num_heads=8, num_kv_heads=8,
)  # fmt: skip


def parts(layout: Layout, shape: ModelShape | None = SHAPE) -> Any:
    ranks = layout.dp * layout.sp
    choice = Choice(stage=layout.stage, micro=layout.micro, accumulation=layout.accumulation, ranks=ranks)
    return divided_parts(RATES, WORK, choice, shape, layout)


def test_a_layout_that_divides_nothing_is_a_data_parallel_step() -> None:
    for layout in (Layout(), Layout(dp=4, stage=2, micro=4, accumulation=2)):
        choice = Choice(stage=layout.stage, micro=layout.micro, accumulation=layout.accumulation, ranks=layout.dp)
        assert parts(layout) == parts(layout, None) == step_parts(RATES, WORK, choice)


def test_a_rank_that_was_traced_computes_what_was_traced() -> None:
    layout = Layout(micro=8, tp=2)
    choice = Choice(stage=0, micro=8)
    halves, more = (divided_parts(RATES, WORK, choice, SHAPE, layout, flops=share * WORK.flops) for share in (0.5, 0.6))
    assert halves == parts(layout)
    assert more.compute > halves.compute and more.inside == halves.inside


def test_ranks_that_share_layers_compute_and_update_less_and_send_what_their_layers_need() -> None:
    one, two = parts(Layout(micro=8)), parts(Layout(micro=8, tp=2))
    assert one.busy / 2 < two.busy < 0.75 * one.busy
    assert two.update == pytest.approx(one.update / 2, rel=1e-3)
    sums = 4 * 4 + 2
    assert two.inside == pytest.approx(sums * 8 * 65536 / 1e9 + sums * 1e-5)
    assert parts(Layout(micro=8, sp=2)).inside == pytest.approx(4 * 2 * 8 * 65536 / 2 * 4 / 2 / 1e9 + 16e-5)


@pytest.mark.parametrize(("stages", "micros"), [(2, 1), (2, 8), (4, 6)])
def test_a_pipelines_bubble_is_that_of_its_list(stages: int, micros: int) -> None:
    found = divided_parts(
        replace(RATES, wire_latency_s=0.0, wire_nbytes_s=1e30),
        WORK,
        Choice(stage=0, micro=2, accumulation=micros),
        SHAPE,
        Layout(pp=stages, micro=2, accumulation=micros),
    )
    assert found.bubble / (found.busy + found.bubble) == pytest.approx((stages - 1) / (micros + stages - 1))


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        )
    )  # fmt: skip


def count(rank: int, world_size: int, layers: int) -> dict[str, dict[str, int]]:
    """Message bytes of a step of two micro-batches by operation, with layers and with sequences shared by all ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    found = {}
    for name in ("tensor", "sequence"):
        model, mpu = llama(layers), None
        own = {"tensor_parallel": {"autotp_size": world_size}}
        ids = torch.zeros(2, 8, dtype=torch.long)
        batch = {"input_ids": ids, "position_ids": torch.arange(8).expand(2, -1)}
        if name == "sequence":
            own = {"sequence_parallel_size": world_size}  # type: ignore[dict-item]
            mpu = UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=world_size,
                micro_batch_size=2, seq_length=8, seq_length_is_variable=True,
            )  # fmt: skip
            batch = {key: tensor.tensor_split(world_size, dim=1)[rank] for key, tensor in batch.items()}
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 1},
            **own,
        }
        engine = deepspeed.initialize(model=model, config=config, mpu=mpu)[0]
        before = dict(COMMUNICATION.nbytes)
        for _ in range(2):
            engine.backward(engine(**batch).logits.float().mean())
            engine.step()
        found[name] = {op: n - before.get(op, 0) for op, n in COMMUNICATION.nbytes.items()}
        engine.destroy()
    return found


@LONG
def test_what_divided_layers_send_is_what_engines_count_to_the_byte() -> None:
    pytest.importorskip("transformers")
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        shape = shape_of(llama(3), {"input_ids": ids, "labels": ids}, dtype=torch.float32)
    for counted in run_ranks(2, count, 3):
        whole, sent = {}, {}
        for name, layout in (("tensor", Layout(tp=2, micro=2)), ("sequence", Layout(sp=2, micro=2))):
            sent[name] = 2 * sent_inside(shape, layout)[name].nbytes
            whole[name] = counted[name][{"tensor": "tensor.all_reduce", "sequence": "sequence.all_to_all"}[name]]
        assert sent["tensor"] == whole["tensor"] * 2 * (2 - 1) / 2, "a ring sends each message 2 (n - 1) / n times"
        assert sent["sequence"] == whole["sequence"] * (2 - 1) / 2, "a rank keeps its own part"
