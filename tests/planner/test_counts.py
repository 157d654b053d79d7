"""Counts of messages: every kind and byte that a plan says layers and engines send, beside what real runs log.

Planned twice: of the configuration, by its own traced part (`memory.messages`), and of the layout, by short models (`memory.inside`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import deepspeed
from deepspeed.memory.inside import Way
from deepspeed.memory.shape import shape_of, with_inside
from deepspeed.planner.cluster import read_cluster
from deepspeed.planner.layouts import Layout, evaluate, layouts, messages_inside
from deepspeed.planner.traffic import step_messages
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.planner import families

LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="make test-autotuning")
TENSOR: dict[str, Any] = {"tensor_parallel": {"autotp_size": 2}}
SEQUENCE: dict[str, Any] = {"sequence_parallel_size": 2}
AGAIN: dict[str, Any] = {"activation_checkpointing": {"recompute": "full"}}
EXPERTS: dict[str, Any] = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
SHARED: list[tuple[str, int, dict[str, Any]]] = [
    ("tp2", 2, TENSOR),
    ("tp2 recompute", 2, {**TENSOR, **AGAIN}),
    ("sp2", 2, SEQUENCE),
    ("sp2 recompute", 2, {**SEQUENCE, **AGAIN}),
    ("tp2 sp2", 4, {**TENSOR, **SEQUENCE}),
]
REFUSED = {"untold": "tp", "t5": "sp"}
"""Dims that the engine refuses to a family, and no plan offers."""


def config_of(own: dict[str, Any], stage: int = 0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        "comms_logger": {"enabled": True},
        **own,
    }


def counted(rank: int, world_size: int, family: str, configs: list[dict[str, Any]]) -> list[families.Counts]:
    return [families.counted_run(rank, family, config) for config in configs]


def layout_of(name: str) -> Layout:
    return Layout(
        **{word[:2]: int(word[2:]) for word in name.split() if word != "recompute"},
        micro=2,
        recompute="recompute" in name,
    )


def planned(family: str) -> Any:
    model, batch = families.make(family), families.batch(samples=1)
    ways = [Way(), Way(2), *([Way(1, 2)] if family == "mixtral" else [])]
    return with_inside(shape_of(model, batch, dtype=torch.float32), model, batch, ways, dtype=torch.float32)


@LONG
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_plan_counts_is_what_a_run_logs(family: str) -> None:
    cases = [case for case in SHARED if REFUSED.get(family, "-") not in case[0]]
    shape = planned(family)
    for ranks in (2, 4):
        own = [(name, config_of(config)) for name, num_ranks, config in cases if num_ranks == ranks]
        if not own:
            continue
        for counts in run_ranks(ranks, counted, family, [config for _, config in own]):
            for (name, config), real in zip(own, counts, strict=True):
                told = step_messages(families.make(family), config, families.batch(), world_size=ranks)
                assert told == real, name
                layers = {op: sent for op, sent in real.items() if not op.startswith("zero.")}
                assert messages_inside(shape, layout_of(name)) == layers, name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sums_of_cut_layers_are_counted_as_they_happen(family: str) -> None:
    """BERT's embedding and head are whole on each rank; a Llama's embedding is summed, and so is what its joined head sends back."""
    config = config_of(TENSOR, stage=1)
    expected = {"bert": {"tensor.all_reduce": (12, 12 * 2048)}, "llama": {"tensor.all_reduce": (14, 14 * 2048), "tensor.all_gather": (1, 4096)}}[family]  # fmt: skip
    assert step_messages(families.make(family), config, families.batch(), world_size=2) == expected
    assert messages_inside(planned(family), Layout(tp=2, micro=2)) == expected
    assert all(counts == [expected] for counts in run_ranks(2, counted, family, [config]))


def even_router(self: Any, hidden_states: torch.Tensor) -> Any:
    """One expert for each token, in turn."""
    tokens = hidden_states.reshape(-1, self.hidden_dim)
    logits = torch.nn.functional.linear(tokens, self.weight)
    index = (torch.arange(len(tokens)) % self.num_experts)[:, None]
    return logits, logits.softmax(-1).gather(1, index), index


def counted_evenly(rank: int, world_size: int, configs: list[dict[str, Any]]) -> list[families.Counts]:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    before = MixtralTopKRouter.forward
    MixtralTopKRouter.forward = even_router  # type: ignore[method-assign]
    try:
        return [families.counted_run(rank, "switching", config) for config in configs]
    finally:
        MixtralTopKRouter.forward = before  # type: ignore[method-assign]


def test_tokens_that_a_router_spreads_evenly_are_counted_to_the_byte() -> None:
    cases = [config_of(EXPERTS), config_of({**EXPERTS, **AGAIN})]
    shape = planned_switching()
    for counts in run_ranks(2, counted_evenly, cases):
        for config, real in zip(cases, counts, strict=True):
            assert step_messages(families.make("switching"), config, families.batch(), world_size=2) == real
            layout = Layout(dp=2, ep=2, micro=2, recompute="activation_checkpointing" in config)
            assert messages_inside(shape, layout) == {
                op: sent for op, sent in real.items() if not op.startswith("zero.")
            }


def planned_switching() -> Any:
    model, batch = families.make("switching"), families.batch(samples=1)
    return with_inside(
        shape_of(model, batch, dtype=torch.float32), model, batch, [Way(), Way(1, 2)], dtype=torch.float32
    )


def staged(rank: int, world_size: int, family: str, tp: int) -> tuple[families.Counts, int]:
    """(messages of a step's layers, bytes that went to other stages) of two stages of two blocks, two micro-batches."""
    from deepspeed.parallel.pipeline.hf import pipeline_of
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=tp, num_dp=1)
    net = pipeline_of(families.make(family, 4), num_stages=None, topology=topology)
    config = config_of({"tensor_parallel": {"autotp_size": tp}, "gradient_accumulation_steps": 2})
    engine = deepspeed.initialize(model=net, config=config)[0]
    ids = families.batch()["input_ids"]
    before = 0

    def step() -> None:
        nonlocal before
        before = engine._mail.bytes_sent
        engine.train_batch(iter([((ids,), ids)] * 2))

    try:
        return families.counted_step(step), engine._mail.bytes_sent - before
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("family", "tp"), [("llama", 2), pytest.param("mixtral", 2, marks=LONG), pytest.param("gpt2", 1, marks=LONG)]
)
def test_stages_send_what_is_planned_of_each(family: str, tp: int) -> None:
    model, batch = families.make(family, 4), families.batch(samples=1)
    shape = with_inside(
        shape_of(model, batch, dtype=torch.float32), model, batch, [Way(), Way(tp)], dtype=torch.float32
    )
    layout = Layout(pp=2, tp=tp, micro=2, accumulation=2)
    cluster = read_cluster({"devices_per_node": 2 * tp, "device": {"memory_gb": 1, "tflops": 1}})
    for rank, (counts, nbytes) in enumerate(run_ranks(2 * tp, staged, family, tp)):
        sent = messages_inside(shape, layout, stage=rank // tp)
        assert {op: each.times(2) for op, each in sent.items()} == counts
        assert evaluate(shape, cluster, layout).traffic["pipeline"] == nbytes


def test_a_way_that_the_shape_does_not_know_is_refused_by_name() -> None:
    bare = replace(planned("llama"), inside={})
    assert messages_inside(bare, Layout(dp=2)) == {}, "whoever shares nothing sends nothing"
    for layout, words in ((Layout(tp=2), 'LlamaForCausalLM as tp2: its shape does not know what its layers send, "cut 2, spread 1"'),
                          (Layout(dp=2, ep=2), 'as ep2: .* "cut 1, spread 2" is not among its ways: none')):  # fmt: skip
        with pytest.raises(DeepSpeedError, match=words) as caught:
            messages_inside(bare, layout)
        assert f"with_inside(shape, model, batch, [Way(tp={layout.tp}, ep={layout.ep})])" in str(caught.value)
    with pytest.raises(
        DeepSpeedError, match='"cut 4, spread 1, recomputed" is not among its ways: "cut 1, spread 1", '
    ):
        messages_inside(planned("llama"), Layout(tp=4, recompute=True))
    with pytest.raises(DeepSpeedError, match="cannot be divided as tp2, the engine refuses it: AutoTP not supported"):
        messages_inside(planned("untold"), Layout(tp=2))


def test_no_plan_offers_what_the_engine_refuses() -> None:
    cluster = read_cluster({"devices_per_node": 4, "device": {"memory_gb": 1, "tflops": 1}})
    for family, dim in REFUSED.items():
        offered = list(layouts(planned(family), cluster, 4))
        assert offered and all(getattr(layout, dim) == 1 for layout in offered)
    assert {layout.pp for layout in layouts(planned("t5"), cluster, 4)} == {1}, "two lists of blocks are no stages"
