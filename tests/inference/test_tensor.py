"""Over tensor-parallel ranks a model says what Hugging Face's says in one process; what cannot be is refused on all ranks."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.inference import tensor
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.policies import HFGPT2LayerPolicy
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.refusal import CutRefusedError, Why
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.harness import run_ranks
from tests.inference.families import FAMILIES, build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")

IS_LONG = bool(os.environ.get("DS_TEST_LONG"))
QUICK = ["llama", "bloom", "t5", "qwen3_next", "gpt2", "falcon", "gpt_bigcode", "mpt"]
TESTED = FAMILIES if IS_LONG else QUICK
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def says_the_same(rank: int, world_size: int, families: list[str]) -> dict[str, str]:
    """By family, what differs from the whole model; every rank starts from other weights than the first, which count."""
    found = {}
    for family in families:
        plain = build(family)
        model = copy.deepcopy(plain)
        if rank:
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(1.0)
        engine = deepspeed.init_inference(model, dtype=torch.float32, tensor_parallel={"tp_size": world_size})
        assert engine.mp_world_size == world_size
        for padded in ("alone", "left", "right"):
            batch = prompts(padded)
            worst = float((logits_of(engine, batch) - logits_of(plain, batch)).abs().max())
            if worst > 1e-5 or not torch.equal(engine.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY)):
                found[f"{family}, {padded}"] = f"{worst:.1e}"
        engine.destroy()
    return found


@pytest.mark.parametrize("num_ranks", [2, 3] if IS_LONG else [2])
def test_families_have_the_logits_and_the_words_of_hugging_face(num_ranks: int) -> None:
    tested = [family for family in TESTED if (family, num_ranks) != ("codegen", 3)]  # whose four stripes do not divide
    assert run_ranks(num_ranks, says_the_same, tested, timeout=500) == [{}] * num_ranks


def other_ways(rank: int, world_size: int) -> dict[str, Any]:
    """A policy, a group, sampling, and quantized weights."""
    found: dict[str, Any] = {}
    batch = prompts("left")
    plain = build("t5")
    block = type(plain.encoder.block[0])
    policy = {block: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")}
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32", mp_size=world_size, injection_policy=policy)
    found["policy"] = torch.equal(engine.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    found["cut"] = tuple(engine.module.encoder.block[0].layer[0].SelfAttention.q.weight.shape)

    gpt2 = build("gpt2", n_embd=40, n_head=5)
    policy = {type(gpt2.transformer.h[0]): HFGPT2LayerPolicy}
    parts = deepspeed.init_inference(copy.deepcopy(gpt2), dtype="fp32", mp_size=world_size, injection_policy=policy)
    found["gpt2"] = torch.equal(parts.generate(**batch, **GREEDY), gpt2.generate(**batch, **GREEDY))
    found["gpt2 cut"] = tuple(parts.module.transformer.h[0].attn.c_attn.weight.shape)
    gpt2 = build("gpt2", n_embd=192, n_head=3, n_inner=256)  # groups of a part are those of the whole
    alone = deepspeed.init_inference(copy.deepcopy(gpt2), dtype="int8")
    parts = deepspeed.init_inference(gpt2, dtype="int8", tensor_parallel={"tp_size": world_size})
    worst = (logits_of(parts, batch) - logits_of(alone, batch)).abs().max() / logits_of(alone, batch).abs().max()
    found["gpt2 int8"] = float(worst), type(parts.module.transformer.h[0].mlp.c_proj).__name__

    llama = deepspeed.init_inference(build("llama"), dtype="fp32", tp={"tp_group": dist.group.WORLD})
    torch.manual_seed(rank)
    found["sampled"] = llama.generate(**batch, max_new_tokens=6, do_sample=True).tolist()

    for dtype in ("int8", "int4"):
        tied = build("llama", tie_word_embeddings=True, hidden_size=192, intermediate_size=256)
        alone = deepspeed.init_inference(copy.deepcopy(tied), dtype=dtype)
        parts = deepspeed.init_inference(tied, dtype=dtype, tensor_parallel={"tp_size": world_size})
        worst = (logits_of(parts, batch) - logits_of(alone, batch)).abs().max() / logits_of(alone, batch).abs().max()
        found[dtype] = float(worst)
        found[f"{dtype} layer"] = type(parts.module.model.layers[0].mlp.down_proj).__name__
    return found


def test_policies_groups_sampling_and_quantized_weights_over_ranks() -> None:
    first, second = run_ranks(2, other_ways, timeout=300)
    assert first["policy"] and second["policy"] and first["cut"] == (24, 48)
    assert first["gpt2"] and second["gpt2"] and (first["gpt2 cut"], second["gpt2 cut"]) == ((40, 72), (40, 48))
    assert max(first["gpt2 int8"][0], second["gpt2 int8"][0]) < 1e-3 and first["gpt2 int8"][1] == "QuantizedRow"
    assert first["sampled"] == second["sampled"]
    assert first["int8 layer"] == "QuantizedRow" and max(first["int8"], second["int8"]) < 1e-3
    assert max(first["int4"], second["int4"]) < 1e-3


def refused(rank: int, world_size: int) -> None:
    """Each on every rank, and nothing was changed."""
    model = build("llama")
    with pytest.raises(ValueError, match="tp_size = 3, but the job has 2 ranks"):
        deepspeed.init_inference(model, dtype="fp32", tensor_parallel={"tp_size": 3})
    with pytest.raises(ValueError, match="tp_size = 4, but the group that was given has 2 ranks"):
        deepspeed.init_inference(model, dtype="fp32", tp={"tp_size": 4, "tp_group": dist.group.WORLD})
    with pytest.raises(DeepSpeedConfigError, match="finds nothing to cut in Linear"):
        deepspeed.init_inference(nn.Linear(4, 4), dtype="fp32", tensor_parallel={"tp_size": 2})
    norm = {type(model.model.layers[0]): "input_layernorm"}
    with pytest.raises(DeepSpeedConfigError, match="none of which is a linear layer that can be cut"):
        deepspeed.init_inference(model, dtype="fp32", tp={"tp_size": 2}, injection_policy=norm)
    one_head = build("llama", num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(DeepSpeedConfigError, match="has 1 attention heads, which cannot be split over"):
        deepspeed.init_inference(one_head, dtype="fp32", tensor_parallel={"tp_size": 2})
    assert model.model.layers[0].mlp.up_proj.weight.shape == (64, 48)
    engine = deepspeed.init_inference(model, dtype="fp32", tensor_parallel={"tp_size": 2})
    with pytest.raises(DeepSpeedConfigError, match="is cut over ranks already"):
        deepspeed.init_inference(model, dtype="fp32", tensor_parallel={"tp_size": 2})
    with pytest.raises(DeepSpeedError, match="cut over 2 ranks would write this rank's part"):
        engine.save_pretrained("not_made")
    with pytest.raises(
        DeepSpeedError, match="resize_token_embeddings of a LlamaForCausalLM whose layers are cut over 2 ranks"
    ):
        engine.resize_token_embeddings(104)
    with pytest.raises(AssertionError, match="Data inconsistency within the TP group"):
        engine(torch.tensor([[rank + 2, 3]]))
    quantized = deepspeed.init_inference(build("llama", tie_word_embeddings=True), dtype="int8", tp={"tp_size": 2})
    for one in (engine, quantized):
        for wrong in (-1, 96, -100):
            with pytest.raises(
                IndexError, match=f"id {wrong} is outside of an embedding of 96 rows, which is cut over"
            ):
                one(torch.tensor([[3, wrong]]))
    gpt2 = build("gpt2")
    gpt2.config.model_type = "fsmt"
    with pytest.raises(DeepSpeedConfigError, match=r"'fsmt', has layers that cannot be told.*\n  Run it on one rank"):
        deepspeed.init_inference(gpt2, dtype="fp32", tensor_parallel={"tp_size": 2})
    replaced = build("llama")
    replaced.model.layers[1].mlp.down_proj.forward = lambda x: x
    with pytest.raises(DeepSpeedConfigError, match="down_proj is a Linear whose forward was replaced"):
        deepspeed.init_inference(replaced, dtype="fp32", tensor_parallel={"tp_size": 2})
    monkey = pytest.MonkeyPatch()
    if rank == 1:
        monkey.setattr(tensor, "decide", _refuse)
    with pytest.raises(DeepSpeedConfigError, match="a norm" if rank == 1 else r"\[rank 1 of 2\] a norm\n  Run it"):
        deepspeed.init_inference(build("llama"), dtype="fp32", tensor_parallel={"tp_size": 2})
    monkey.undo()


def _refuse(*args: Any) -> Any:
    raise CutRefusedError(Why.NORM, "a norm", "Run it on one rank.")


def test_what_cannot_be_cut_is_refused_on_every_rank() -> None:
    run_ranks(2, refused, timeout=300)


@pytest.mark.parametrize("why", Why)
def test_the_way_out_of_a_refusal_follows_from_its_kind(why: Why, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise CutRefusedError(why, "a layer, refused in any words.", "Give tensor_parallel.partition_config.")

    monkeypatch.setattr(tensor, "draw", refuse)
    ranks = tensor.Ranks(TensorGroup(None, 0, 2))
    with pytest.raises(DeepSpeedConfigError, match=r"a layer, refused in any words\.\n  .* on one") as caught:
        tensor.decide(build("llama"), DeepSpeedInferenceConfig(), ranks)
    assert caught.value.why is why  # type: ignore[attr-defined]
    assert "partition_config" not in str(pickle.loads(pickle.dumps(caught.value)))


def encoders() -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Models of sound, pictures and shared layers, each with what it is called with."""
    import transformers

    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}
    sound = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    yield (
        transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=96, **sizes, **sound, **places)),
        {"input_values": torch.randn(2, 800)},
    )
    layers = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    yield transformers.ConvNextForImageClassification(layers), {"pixel_values": torch.randn(2, 3, 32, 32)}
    shared = transformers.AlbertConfig(vocab_size=96, embedding_size=24, **sizes)
    yield transformers.AlbertForMaskedLM(shared), {"input_ids": torch.randint(2, 96, (2, 7))}


def encoders_over_ranks(rank: int, world_size: int) -> None:
    for model, given in encoders():
        plain = copy.deepcopy(model.eval())
        engine = deepspeed.init_inference(model, dtype="fp32", tp={"tp_size": world_size})
        with torch.no_grad():
            assert (engine(**given).logits - plain(**given).logits).abs().max() < 1e-5
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True
    )  # whose own fast path reads weights and calls no layer
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 32)
    engine = deepspeed.init_inference(copy.deepcopy(encoder), dtype="fp32", tp={"tp_size": world_size})
    with torch.no_grad():
        assert (engine(x) - encoder(x)).abs().max() < 1e-5
    assert engine.module.layers[0].linear1.weight.shape == (32, 32)


def test_sound_pictures_and_shared_layers_are_cut() -> None:
    run_ranks(2, encoders_over_ranks)
