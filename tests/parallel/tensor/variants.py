"""Less usual ways to train with layers cut over ranks, for `test_variants.py`; each is compared with plain PyTorch in its own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.mesh import marks
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.parallel.tensor.models import batch, small
from tests.parallel.tensor.runs import compare_adapters, config, error, part, plain_step

Make = Callable[[], nn.Module]


def check(engine: Any, grads: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The reduced gradients are the parts of these."""
    num_cut = 0
    for name, param in engine.module.named_parameters():
        if name in grads and not name.endswith(("k_proj.bias", "key.bias")):
            assert error(deepspeed.utils.safe_get_full_grad(param), part(grads[name], param)) < tolerance, name
            num_cut += bool(marks.of(param).cuts)
    assert num_cut


def step_equals_plain(make: Make, inputs: dict[str, Tensor], asked: dict[str, Any]) -> None:
    """Loss, gradients and norm of one step."""
    equals_plain(make(), make(), inputs, asked)


def equals_plain(model: nn.Module, plain: nn.Module, inputs: dict[str, Tensor], asked: dict[str, Any]) -> None:
    """A step of an engine of `model` beside one of `plain` in plain PyTorch: loss, gradients and norm."""
    loss, grads, norm = plain_step(plain, inputs)
    engine, *_ = deepspeed.initialize(model=model, config=asked)
    own = engine(**inputs).loss
    engine.backward(own)
    check(engine, grads)
    engine.step()
    assert float(own.detach()) == pytest.approx(loss, rel=1e-6)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-6)
    engine.destroy()


def with_section(tp: int, stage: int, **section: Any) -> dict[str, Any]:
    """A configuration with more in `tensor_parallel`."""
    asked = config(tp, stage)
    asked["tensor_parallel"] |= section
    return asked


UNEVEN: dict[str, Any] = {
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "hidden_size": 40,
    "intermediate_size": 47,
    "vocab_size": 101,
}


def vocabulary(rank: int, world: int, stage: int, ignored: str) -> None:
    """A tied head cut over the vocabulary, with targets that are ignored: some, all but one, all of a sample."""
    inputs = batch(3, length=7)
    if ignored == "some":
        inputs["labels"][:, ::2] = -100
    elif ignored == "all but one":
        inputs["labels"][:] = -100
        inputs["labels"][1, 3] = 100
    else:
        inputs["labels"][:2] = -100
    changes = {**UNEVEN, "tie_word_embeddings": True}
    step_equals_plain(
        lambda: small("llama", **changes), inputs, with_section(world, stage, vocab_parallel_lm_head=True)
    )


def no_targets(rank: int, world: int, stage: int) -> None:
    """Not a single target: what plain PyTorch says, NaN, on every rank, and nobody waits."""
    inputs = batch(2)
    inputs["labels"][:] = -100
    changes = {**UNEVEN, "tie_word_embeddings": True}
    assert torch.isnan(small("llama", **changes)(**inputs).loss)
    engine, *_ = deepspeed.initialize(
        model=small("llama", **changes), config=with_section(world, stage, vocab_parallel_lm_head=True)
    )
    loss = engine(**inputs).loss
    assert torch.isnan(loss)
    engine.backward(loss)
    engine.step()
    engine.destroy()


def items_in_batch(rank: int, world: int, stage: int) -> None:
    """What the Trainer passes: the number of targets of the whole step; a shifted target by hand."""
    inputs = batch(3, length=9)
    inputs["labels"][0, :4] = -100
    inputs |= {"num_items_in_batch": torch.tensor(17)}
    step_equals_plain(lambda: small("llama", **UNEVEN), inputs, with_section(world, stage, vocab_parallel_lm_head=True))


def adapters(rank: int, world: int, stage: int) -> None:
    """LoRA on columns and rows whose sizes do not divide."""
    targets = ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")
    compare_adapters(rank, world, stage, targets, UNEVEN)


def family(rank: int, world: int, stage: int, name: str, changes: dict[str, Any]) -> None:
    """A family in one step."""
    step_equals_plain(lambda: small(name, **changes), batch(3, length=9), config(world, stage))


def clipped(rank: int, world: int, stage: int, section: dict[str, Any]) -> None:
    """Three clipped steps of AdamW with two groups of a client's; weights are the parts of plain PyTorch's."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        wide = [p for p in model.parameters() if p.dim() > 1]
        return [
            {"params": wide, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 3e-3},
        ]

    plain = small("qwen2", **UNEVEN)
    optimizer = torch.optim.AdamW(groups(plain), lr=1e-2, weight_decay=0.0)
    model = small("qwen2", **UNEVEN)
    asked = with_section(world, stage, **section) | {"gradient_clipping": 0.3}
    del asked["optimizer"]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.0), config=asked
    )
    for seed in range(3):
        plain(**batch(2, seed=seed)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        engine.backward(engine(**batch(2, seed=seed)).loss)
        engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
    whole = dict(plain.named_parameters())
    for name, param in engine.module.named_parameters():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding, which AdamW makes as large as any
            got = deepspeed.utils.safe_get_full_fp32_param(param)
            assert torch.allclose(got, part(whole[name].detach(), param), rtol=1e-4, atol=1e-5), name
    engine.destroy()


def frozen(rank: int, world: int, stage: int) -> None:
    """Only norms and the last block train."""

    def make() -> nn.Module:
        model = small("llama", **UNEVEN)
        for name, param in model.named_parameters():
            param.requires_grad_("norm" in name or "layers.1" in name)
        return model

    step_equals_plain(make, batch(3), config(world, stage))


def two_models(rank: int, world: int, stage: int) -> None:
    """A policy and a reference, both cut, one of them only evaluated, and a loss of both."""

    def total(policy: Any, reference: Any) -> Tensor:
        inputs = {"input_ids": batch(2)["input_ids"]}
        with torch.no_grad():
            base = reference(**inputs).logits
        return (policy(**inputs).logits - base).square().mean()

    def other() -> nn.Module:
        model = small("llama", **UNEVEN)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.25)
        return model

    plain = small("llama", **UNEVEN)
    total(plain, other()).backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    asked = {k: v for k, v in config(world, stage).items() if k != "optimizer"}
    reference, *_ = deepspeed.initialize(
        model=other(), config=asked if stage == 3 else {**asked, "zero_optimization": {"stage": 0}}
    )
    engine, *_ = deepspeed.initialize(model=small("llama", **UNEVEN), config=config(world, stage))
    reference.eval()
    engine.backward(total(engine, reference))
    check(engine, grads)
    engine.step()
    engine.destroy()
    reference.destroy()


def generates(rank: int, world: int, stage: int) -> None:
    """Tokens of a model that trains are those of the whole one."""
    prompt = batch(2, length=5)["input_ids"]
    expected = small("llama", **UNEVEN).eval().generate(prompt, max_new_tokens=6, do_sample=False)
    engine, *_ = deepspeed.initialize(model=small("llama", **UNEVEN), config=config(world, stage))
    engine.eval()
    found = engine.module.generate(prompt, max_new_tokens=6, do_sample=False, synced_gpus=stage == 3)
    assert torch.equal(found, expected)
    engine.train()
    engine.backward(engine(**batch(2)).loss)
    engine.step()
    engine.destroy()


def dropped(rank: int, world: int) -> None:
    """Blocks recomputed, with dropout on whole activations and ranks seeded alike: both ranks keep the same bits."""
    torch.manual_seed(7)
    model = small("llama", attention_dropout=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    engine, *_ = deepspeed.initialize(model=model, config=config(world, 1))
    for seed in range(3):
        engine.backward(engine(**batch(2, seed=seed)).loss)
        engine.step()
    for param in engine.module.parameters():
        if not marks.of(param).cuts:
            seen = [torch.empty_like(param) for _ in range(world)]
            torch.distributed.all_gather(seen, param.detach().clone())
            assert all(torch.equal(seen[0], other) for other in seen)
    engine.destroy()


def lengths(rank: int, world: int, stage: int) -> None:
    """Two tensor groups whose batches differ in size and length, and in accumulation."""
    tp = 2
    dp = world // tp
    own = [batch(2, length=5 + 3 * (rank // tp), seed=rank // tp + 10 * i) for i in range(2)]
    plain = small("llama", **UNEVEN)
    for d in range(dp):
        for i in range(2):
            (plain(**batch(2, length=5 + 3 * d, seed=d + 10 * i)).loss / (2 * dp)).backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    engine, *_ = deepspeed.initialize(
        model=small("llama", **UNEVEN), config=config(tp, stage, gradient_accumulation_steps=2)
    )
    for inputs in own:
        engine.backward(engine(**inputs).loss)
        if engine.is_gradient_accumulation_boundary():
            check(engine, grads)
        engine.step()
    engine.destroy()


def encoders(rank: int, world: int, name: str) -> None:
    """BERT and T5."""
    import transformers

    def make() -> nn.Module:
        torch.manual_seed(3)
        if name == "bert":
            return transformers.BertForMaskedLM(
                transformers.BertConfig(
                    vocab_size=96,
                    hidden_size=32,
                    intermediate_size=45,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=96,
                d_model=32,
                d_kv=8,
                d_ff=45,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )

    step_equals_plain(make, batch(2), config(world, 1))


class _Scale(nn.Module):
    """Values that only a constructor makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


def without_values(rank: int, world: int) -> None:
    """A model on meta that cannot get values is refused with the way out on every rank, and goes that way: `zero.Init`."""
    asked = config(world, 3)
    with torch.device("meta"):
        empty = small("llama")
        vars(empty.model)["_modules"]["norm"] = _Scale(32)
    deepspeed.tp_model_init(empty, tp_size=world, dtype=torch.float32)
    with pytest.raises(DeepSpeedConfigError, match=r"model\.norm\.scale has no values \(it is on .*\n.*zero\.Init\(\)"):
        deepspeed.initialize(model=empty, config=asked)
    plain = small("llama")
    with deepspeed.zero.Init(config_dict_or_path=asked):
        model = deepspeed.tp_model_init(small("llama"), tp_size=world, dtype=torch.float32)
    equals_plain(model, plain, batch(2), asked)
