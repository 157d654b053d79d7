"""Causal language models of Hugging Face are cut in one call, and train as they do whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deepspeed.parallel.pipeline.grid import PipelineParallelGrid
from deepspeed.parallel.pipeline.hf import pipeline_of
from deepspeed.parallel.pipeline.hf_folder import layers_in
from deepspeed.parallel.pipeline.hf_parts import layers_of
from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.pipeline.topology import ProcessTopology
from deepspeed.parallel.sequence.hf import UlyssesSPAttentionHF
from tests.harness import run_ranks
from tests.parallel.pipeline.models import LONG, config_of, joined, start, whole_weights

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "stablelm", "gpt_neox", "starcoder2", "granite", "gpt2", "gemma3_text",
    "gemma", "cohere", "opt", "phi",
)  # fmt: skip


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    extra = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "gemma": {"head_dim": 8},
        "gemma3_text": {"head_dim": 8, "sliding_window": 4},
        "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
        "gpt_neox": {"num_key_value_heads": None},
    }.get(family, {})
    settings = {k: v for k, v in {**SMALL, **extra, **more}.items() if v is not None}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings)).float()


@pytest.mark.parametrize("family", FAMILIES if LONG else ("gpt2", "opt", "granite", "cohere"))
def test_a_family_is_the_sum_of_its_layers(family: str) -> None:
    model = build(family)
    layers = layers_of(model)
    assert len(layers) >= 5


def token_batches(num: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        tokens = torch.randint(3, 64, (2, 9), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        yield (tokens, mask), torch.where(mask > 0, tokens, -100)


NO_DROPOUT: dict[str, Any] = dict.fromkeys(
    [
        "attention_dropout",
        "dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "residual_dropout",
        "embedding_dropout",
    ],
    0.0,
)
UNTIED = {**NO_DROPOUT, "tie_word_embeddings": False}


def _train(rank: int, world: int, families: list[str]) -> dict[str, Any]:
    found = {}
    for i, family in enumerate(families):
        module = pipeline_of(build(family, **(UNTIED if LONG else NO_DROPOUT)), num_stages=world)
        schedule = ("1f1b", "zb-h1", "gpipe", "zb-h2")[i % 4]
        engine = start(module, config_of((0, 3, 1, 2)[i % 4], accumulation=2, schedule=schedule, gradient_clipping=0))
        data = token_batches(4)
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found[family] = {"losses": losses, "weights": whole_weights(engine)}
        engine.destroy()
    return found


class Whole(NamedTuple):
    """What the model itself gives in one process; whether its head is its embedding."""

    losses: list[float]
    weights: dict[str, Tensor]
    is_tied: bool
    eval: float
    norm: float


def _train_whole(family: str, clip: float = 1e9, has_eval: bool = False) -> Whole:
    torch.set_num_threads(1)
    model = build(family, **(UNTIED if LONG and not has_eval else NO_DROPOUT)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, losses, norm, later = token_batches(6), [], 0.0, 0.0

    def loss_of(batch: Any) -> Tensor:
        (tokens, mask), labels = batch
        return model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    for _ in range(2):
        total = torch.zeros(())
        for _ in range(2):
            loss = loss_of(next(data))
            (loss / 2).backward()
            total = total + loss.detach()
        losses.append((total / 2).item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item() if has_eval else 0.0
        optimizer.step()
        optimizer.zero_grad()
    if has_eval:
        with torch.no_grad():
            later = sum(loss_of(batch).item() for batch in data) / 2
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return Whole(losses, {name: param.detach() for name, param in model.named_parameters()}, is_tied, later, norm)


def _in_model(name: str, weights: dict[str, Tensor]) -> str:
    """The model's name of a pipeline's parameter: block 0 of layer k is the model's block k - 1."""
    number, _, rest = name.partition(".")
    rest = rest.removeprefix("base.").removeprefix("whole.").removeprefix("ends.").removeprefix("front.base.")
    if number.isdigit():
        rest = re.sub(r"^(layers|h|decoder\.layers)\.0\.", rf"\1.{int(number) - 1}.", rest)
    if number == "tied_modules" and rest == "embed.weight":
        return next(n for n in weights if re.search(r"(embed_tokens|wte|embed_in)\.weight$", n))
    return min((n for n in weights if n == rest or n.endswith(f".{rest}")), key=len)


def test_cut_models_train_as_the_models_themselves_bit_for_bit() -> None:
    families = FAMILIES if LONG else ["llama"]
    found = run_ranks(2, _train, list(families), timeout=200)
    for family in families:
        losses, weights, is_tied, *_ = _train_whole(family)
        mine = [part[family] for part in found]
        assert mine[0]["losses"] == mine[1]["losses"], family
        assert mine[0]["losses"] == pytest.approx(losses, rel=1e-6) if is_tied else mine[0]["losses"] == losses, family
        cut = joined(mine)
        assert {_in_model(name, weights) for name in cut} == set(weights), family
        for name, value in cut.items():
            wanted = weights[_in_model(name, weights)]
            # The gradient of a tied weight is the sum of its stages' sums, in another order than one process' sum.
            assert torch.allclose(value, wanted, atol=2e-6) if is_tied else torch.equal(value, wanted), (family, name)


def _cut_whole(values: Any, parts: int, part: int) -> Any:
    """A rank's columns of whole sequences, of uneven lengths."""
    return tuple(value.tensor_split(parts, 1)[part] for value in values)


def _train_spread(rank: int, world: int, jobs: dict[str, Any]) -> dict[str, Any]:
    topology = ProcessTopology(["pipe", "data", "sequence"], [2, 1, world // 2])
    part = PipelineParallelGrid(topology).get_sequence_parallel_rank()
    found = {}
    for i, (family, model) in enumerate(jobs.items()):
        load = {"load": {"dtype": torch.float32}} if isinstance(model, str) else {}
        model = model if isinstance(model, str) else build(family, **model)
        module = pipeline_of(model, topology=topology, activation_checkpoint_interval=i % 2, **load)
        schedule = ("zb-h1", "1f1b")[i % 2]
        engine = start(module, config_of((1, 3, 2, 0)[i % 4], accumulation=2, schedule=schedule, gradient_clipping=0.5))
        data = (
            (
                _cut_whole(inputs, topology.get_dim("sequence"), part),
                *_cut_whole([labels], topology.get_dim("sequence"), part),
            )
            for inputs, labels in token_batches(6)
        )
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found[family] = {
            "losses": losses, "eval": engine.eval_batch(data).item(), "norm": engine.get_global_grad_norm(),
            "weights": whole_weights(engine),
        }  # fmt: skip
        engine.destroy()
        UlyssesSPAttentionHF.unregister()
    return found


def test_parts_of_sequences_in_stages_train_as_the_model_whole(tmp_path: Path) -> None:
    """Padded on the left, parts of 5 and 4 tokens of which some have no target."""
    families = [f for f in FAMILIES if f not in ("opt",)] if LONG else ["llama"]
    jobs: dict[str, Any] = dict.fromkeys(families, NO_DROPOUT)
    expected = {family: _train_whole(family, clip=0.5, has_eval=True) for family in families}
    build("llama", **NO_DROPOUT).save_pretrained(tmp_path)
    jobs["folder"], expected["folder"] = str(tmp_path), expected["llama"]
    found = run_ranks(4, _train_spread, jobs, timeout=400)
    for family, wanted in expected.items():
        mine = [part[family] for part in found]
        for part in mine:
            assert part["losses"] == pytest.approx(wanted.losses, rel=1e-5), family
            assert part["eval"] == pytest.approx(wanted.eval, rel=1e-5), family
            assert part["norm"] == pytest.approx(wanted.norm, rel=1e-5), family
        for name, value in joined(mine).items():
            assert torch.allclose(value, wanted.weights[_in_model(name, wanted.weights)], atol=5e-6), (family, name)


def _from_folder(rank: int, world: int, folders: dict[str, str]) -> dict[str, Any]:
    found = {}
    for family, folder in folders.items():
        module = pipeline_of(folder, num_stages=world, seed_layers=True, load={"dtype": torch.float32})
        held = sum(p.numel() for p in module.parameters())
        state = {name: param.detach().clone() for name, param in module.named_parameters()}
        engine = start(module, config_of(1, accumulation=2))
        data = token_batches(4)
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found[family] = {"losses": losses, "held": held, "state": state}
        engine.destroy()
    return found


def test_each_rank_reads_its_own_layers_from_a_folder(tmp_path: Path) -> None:
    families = FAMILIES if LONG else ("llama", "gemma3_text")
    folders, sizes = {}, {}
    for family in families:
        model = build(family, attention_dropout=0.0)
        model.save_pretrained(tmp_path / family, max_shard_size="20KB")
        folders[family], sizes[family] = str(tmp_path / family), sum(p.numel() for p in model.parameters())
    (whole,) = run_ranks(1, _from_folder, folders)
    found = run_ranks(2, _from_folder, folders)
    for family in families:
        mine = [part[family] for part in found]
        assert mine[0]["losses"] == mine[1]["losses"] == pytest.approx(whole[family]["losses"], rel=1e-6), family
        for part in mine:
            assert part["held"] < 0.8 * sizes[family], "not more than its own layers"
            for name, value in part["state"].items():
                assert torch.equal(value, whole[family]["state"][name]), (family, name)
        assert whole[family]["held"] == sizes[family]


def test_a_folder_without_a_layer_of_this_rank_says_which(tmp_path: Path) -> None:
    model = build("llama")
    weights = {name: value for name, value in model.state_dict().items() if ".layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    layers, _ = layers_in(str(tmp_path), {})
    assert layers[1].build() is not None
    with pytest.raises(LayerError, match=r"no weights model\.layers\.1\..* of block 1"):
        layers[2].build()
