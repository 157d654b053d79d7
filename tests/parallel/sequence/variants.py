"""Less usual ways to train with parts of sequences, for `test_variants.py`; each is compared with plain PyTorch in its own process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence import tile_model
from tests.parallel.sequence import runs

Batch = dict[str, Tensor]


def part_with_labels(batch: Batch, rank: int, size: int) -> Batch:
    """A rank's part, with labels as the whole sequence has them."""
    return {name: tensor.tensor_split(size, dim=-1)[rank].contiguous() for name, tensor in batch.items()}


def start(model: nn.Module, size: int, config: dict[str, Any], core: str = "sdpa") -> Any:
    """An engine whose ranks share sequences."""
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, core, size, micro_batch_size=1)
    return deepspeed.initialize(model=model, mpu=mpu, config=config)[0]


def stop(engine: Any) -> None:
    """What a registration leaves is taken away."""
    if engine is not None:
        engine.destroy()
    UlyssesSPAttentionHF.unregister()
    parallel_state_sp.destroy_sequence_parallel()


def check(engine: Any, gradients: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The reduced gradients are these."""
    found = {name: grad for name, grad in runs.gradients_of(engine).items() if name in gradients}
    assert runs.ratio(found, gradients) == pytest.approx(1.0, abs=tolerance)
    assert runs.largest_error(found, gradients) < tolerance


def without_key_bias(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of key biases drop out of a softmax: zero but for rounding, which has no relative error."""
    return {name: grad for name, grad in gradients.items() if not name.endswith(("k_proj.bias", "key.bias"))}


def plain_labels(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """What the model's own loss says of whole sequences."""
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapted(model: nn.Module) -> nn.Module:
    """With adapters on columns and rows."""
    import peft

    torch.manual_seed(0)
    asked = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    return peft.get_peft_model(model, asked)


def everything_at_once(rank: int, world: int, stage: int, heads: int, kv: int, kind: str, length: int) -> None:
    """Odd lengths, three samples, tiles, every block recomputed, tied embeddings, by the model's own labels."""
    args = {"heads": heads, "kv": kv, "tie_word_embeddings": True}
    batch = runs.batch_of(kind, length, 3)
    _, gradients = plain_labels(runs.tiny_model(**args), [batch])
    model = tile_model(runs.tiny_model(**args), mlp_tokens=5, loss_tokens=3)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = None
    try:
        engine = start(model, world, runs.config_of(stage))
        engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def adapters(rank: int, world: int, stage: int) -> None:
    batch = runs.batch_of("packed", 17, 2)
    _, gradients = plain_labels(adapted(runs.tiny_model(heads=5, kv=5)), [batch])
    engine = None
    try:
        engine = start(adapted(runs.tiny_model(heads=5, kv=5)), world, runs.config_of(stage))
        engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def accumulate(rank: int, world: int, stage: int) -> None:
    """Two micro-batches of other lengths, of which one has most of its targets on one rank."""
    batches = [runs.batch_of("plain", 17, 2), runs.batch_of("padded", 13, 3, seed=9)]
    batches[1]["labels"][:, 3:] = -100
    _, gradients = plain_labels(runs.tiny_model(), batches)
    engine = None
    try:
        engine = start(runs.tiny_model(), world, runs.config_of(stage, gradient_accumulation_steps=2))
        for batch in batches:
            engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
            last = engine.is_gradient_accumulation_boundary()
            if last:
                check(engine, gradients)
            engine.step()
    finally:
        stop(engine)


def clipped(rank: int, world: int, stage: int) -> None:
    """Norms and weights after clipped steps are plain PyTorch's."""
    plain = runs.tiny_model(heads=3, kv=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    engine, batches, norms = None, [runs.batch_of("packed", 19, 3, seed=s) for s in range(3)], []
    for batch in batches:
        plain(**batch).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    config = runs.config_of(stage, gradient_clipping=0.1)
    config["optimizer"]["params"]["lr"] = 0.5
    try:
        engine = start(runs.tiny_model(heads=3, kv=3), world, config)
        for batch, norm in zip(batches, norms, strict=True):
            engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
            engine.step()
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
        for (name, want), param in zip(plain.named_parameters(), engine.module.parameters(), strict=True):
            got = deepspeed.utils.safe_get_full_fp32_param(param)
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name
    finally:
        stop(engine)


def half_precision(rank: int, world: int, stage: int) -> None:
    """Uneven heads in bf16, with parameters and optimizer in main memory: as near to plain fp32 as plain bf16 is."""
    batch = runs.batch_of("packed", 23, 3)
    args = {"heads": 5, "kv": 5}
    _, gradients = plain_labels(runs.tiny_model(**args), [batch])
    _, low = plain_labels(runs.tiny_model(**args).bfloat16(), [batch])
    told = runs.config_of(stage, bf16={"enabled": True})
    told["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    told["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0}}
    engine = None
    try:
        engine = start(runs.tiny_model(**args), world, told)
        engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
        found = {n: g.float() for n, g in runs.gradients_of(engine).items()}
        worst = runs.largest_error({n: g.float() for n, g in low.items()}, gradients)
        assert runs.largest_error(found, gradients) < 2 * worst
        assert runs.ratio(found, gradients) == pytest.approx(1.0, abs=0.01)
        engine.step()
    finally:
        stop(engine)


def positions_of_one_row(rank: int, world: int, stage: int) -> None:
    """Position ids [1, s] beside a batch of three, as scripts write them; inputs_embeds in place of tokens."""
    batch = runs.batch_of("plain", 15, 3)
    _, gradients = plain_labels(runs.tiny_model(kv=1), [batch])
    batch["position_ids"] = batch["position_ids"][:1]
    engine = None
    try:
        engine = start(runs.tiny_model(kv=1), world, runs.config_of(stage))
        engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def embedded(rank: int, world: int, stage: int) -> None:
    """inputs_embeds in place of tokens."""
    batch = runs.batch_of("packed", 15, 2)
    make = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 15, 32, generator=make)

    def of(values: Batch, x: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in values.items() if k != "input_ids"} | {"inputs_embeds": x}

    _, gradients = plain_labels(runs.tiny_model(), [of(batch, embeds)])
    engine = None
    try:
        engine = start(runs.tiny_model(), world, runs.config_of(stage))
        part = of(part_with_labels(batch, rank, world), embeds.tensor_split(world, dim=1)[rank])
        engine.backward(engine(**part).loss)
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def two_forwards(rank: int, world: int, stage: int) -> None:
    """Two forwards of other lengths and one backward, as preference losses have them."""
    one, two = runs.batch_of("packed", 17, 2), runs.batch_of("left", 12, 3, seed=8)

    def total(model: Any, first: Batch, second: Batch) -> Tensor:
        return model(**first).logits.square().sum() - 0.5 * model(**second).logits.square().sum()

    def bare(batch: Batch) -> Batch:
        return {k: v for k, v in batch.items() if k != "labels"}

    plain = runs.tiny_model()
    total(plain, bare(one), bare(two)).backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    engine = None
    try:
        engine = start(runs.tiny_model(), world, runs.config_of(stage, sequence_parallel_loss="local"))
        engine.backward(
            total(
                engine,
                bare(part_with_labels(one, rank, world)),
                bare(part_with_labels(two, rank, world)),
            )
            * world
        )
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def no_targets(rank: int, world: int, stage: int) -> None:
    """A batch without a single target, gathered as the Trainer does: nothing is learnt, nobody waits."""
    batch = runs.batch_of("plain", 16, 2)
    batch["labels"][:] = -100
    assert torch.isnan(runs.tiny_model()(**batch).loss)
    engine = None
    try:
        engine = start(runs.tiny_model(), world, runs.config_of(stage))
        loss = engine(**part_with_labels(batch, rank, world)).loss
        assert torch.isnan(loss)
        engine.backward(loss)
        engine.step()
    finally:
        stop(engine)


def targets_on_one_rank(rank: int, world: int, stage: int, recipe: str) -> None:
    """All targets of the sequence are on the last rank."""
    batch = runs.batch_of("plain", 17, 3)
    batch["labels"][:, :14] = -100
    _, gradients = runs.plain(runs.tiny_model(), [batch])
    engine = None
    try:
        engine = start(runs.tiny_model(), world, runs.config_of(stage))
        group = parallel_state_sp.get_sequence_parallel_group()
        part = runs.cut(batch, rank, world) if recipe != "labels" else part_with_labels(batch, rank, world)
        engine.backward(runs.own_loss(engine, part, recipe, group))
        check(engine, gradients)
        engine.step()
    finally:
        stop(engine)


def other_kinds(rank: int, world: int, kind: str, more: dict[str, Any]) -> None:
    """Another family."""
    batch = runs.batch_of("plain" if kind == "opt" else "packed", 17, 2)
    args = {"model_type": kind, **more}
    _, gradients = plain_labels(runs.tiny_model(**args), [batch])
    engine = None
    try:
        engine = start(runs.tiny_model(**args), world, runs.config_of(2))
        engine.backward(engine(**part_with_labels(batch, rank, world)).loss)
        check(engine, without_key_bias(gradients))
        engine.step()
    finally:
        stop(engine)


def encoder(rank: int, world: int) -> None:
    """An encoder sees all tokens of a sequence, not those before only."""
    from transformers import BertConfig, BertForMaskedLM

    def model() -> nn.Module:
        torch.manual_seed(1)
        return BertForMaskedLM(
            BertConfig(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "position_ids": torch.arange(16).expand(2, -1), "attention_mask": torch.ones_like(ids)}
    plain = model()
    F.cross_entropy(plain(**batch).logits.flatten(0, 1), ids.flatten()).backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    engine = None
    try:
        engine = start(model(), world, runs.config_of(1, sequence_parallel_loss="local"))
        part = part_with_labels(batch, rank, world)
        loss = F.cross_entropy(engine(**part).logits.flatten(0, 1), part["input_ids"].flatten())
        engine.backward(loss)
        check(engine, without_key_bias(gradients))
        engine.step()
    finally:
        stop(engine)
