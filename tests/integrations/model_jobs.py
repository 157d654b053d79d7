"""Jobs with Transformers' models under `zero.Init` and ZeRO stage 3, without the Trainer's help or beyond its loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import deepspeed
from tests.integrations.common import VOCAB, ByteDataset, byte_windows
from tests.integrations.trainer_jobs import arguments, curve, make_trainer


def own_config(stage: int, precision: str = "fp32") -> dict[str, Any]:
    """A configuration without "auto", for loops of the user's own."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "eps": 1e-6, "weight_decay": 0.0}},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 40,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def full_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """The whole state dict on rank 0."""
    return engine._zero3_consolidated_16bit_state_dict()


def own_loop(rank: int, world_size: int, model_folder: str, precision: str, num_steps: int) -> dict[str, Any]:
    """`HfDeepSpeedConfig`, `from_pretrained` under zero.Init, `deepspeed.initialize`, a loop; what came of it."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = own_config(3, precision)
    keep = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sharded = [p.numel() for p in model.parameters() if hasattr(p, "ds_id")]
    found: dict[str, Any] = {
        "all_sharded": len(sharded) == len(list(model.parameters())) and set(sharded) == {0},
        "marked": all(getattr(p, "_is_hf_initialized", False) for p in model.parameters()),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "inv_freq": model.model.rotary_emb.inv_freq.clone(),
        "dtypes": {p.dtype for p in model.parameters()},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    found["loaded"] = full_weights(engine)
    losses = []
    for step in range(num_steps):
        batch = byte_windows(2, offset=4 * step + 2 * rank)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    found["losses"] = losses
    engine.eval()
    with torch.no_grad():
        prompt = byte_windows(2)[:, :8]
        found["generated"] = engine.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        uneven = prompt[: 1 + rank]
        found["uneven"] = engine.module.generate(
            uneven,
            attention_mask=torch.ones_like(uneven),
            max_new_tokens=4 + 4 * rank,
            do_sample=False,
            pad_token_id=0,
            synced_gpus=True,
        )
    found["weights"] = full_weights(engine)
    del keep
    return found


def plain_loop(model_folder: str, precision: str, num_steps: int) -> dict[str, Any]:
    """The same in plain PyTorch on one process, on the joined batches of two ranks."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        batch = byte_windows(4, offset=4 * step)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    prompt = byte_windows(2)[:, :8]
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return {
        "losses": losses,
        "generated": generated,
        "weights": model.state_dict(),
        "inv_freq": model.model.rotary_emb.inv_freq,
    }


def resize(rank: int, world_size: int, model_folder: str, folder: str) -> dict[str, Any]:
    """`resize_token_embeddings` on a sharded model, one training step and a save."""
    args = arguments(folder, _trainer_config(), max_steps=2)
    trainer = make_trainer(model_folder, args)
    model = trainer.model
    with deepspeed.zero.GatheredParameters(model.get_input_embeddings().weight):
        before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
    with deepspeed.zero.GatheredParameters(model.get_input_embeddings().weight):
        after = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    trainer.save_model(folder)
    return {
        "kept": torch.equal(before, after[:VOCAB]),
        "shape": tuple(after.shape),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "losses": curve(trainer),
    }


def _trainer_config() -> dict[str, Any]:
    from tests.integrations.common import ADAMW, ds_config

    return ds_config(3, optimizer=ADAMW)


def from_scratch(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A model that is initialised, not loaded, under zero.Init: dtypes, missing weights, initial scale."""
    from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(own_config(3))
    # The classifier head is not in the folder: Transformers initialises what is missing inside of a gather.
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=3)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        score = model.score.weight.detach().clone()
    other = [torch.zeros_like(score) for _ in range(world_size)]
    dist.all_gather(other, score)
    embedding = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    del keep
    return {
        "equal": all(torch.equal(score, o) for o in other),
        "std": score.std().item(),
        "shape": tuple(score.shape),
        "embedding": tuple(embedding.ds_shape),
    }


def masked_config() -> Any:
    """A BERT whose head is tied to its embedding and has a bias of its own."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )


def masked(rank: int, world_size: int, model_folder: str) -> dict[str, Any]:
    """An encoder with a tied head and a bias, loaded under zero.Init, and two steps of it."""
    from transformers import AutoModelForMaskedLM
    from transformers.integrations import HfDeepSpeedConfig

    config = own_config(3)
    keep = HfDeepSpeedConfig(config)
    engine, *_ = deepspeed.initialize(model=AutoModelForMaskedLM.from_pretrained(model_folder).eval(), config=config)
    engine.eval()
    losses = []
    for _ in range(2):
        loss = engine(input_ids=byte_windows(2), labels=byte_windows(2)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    del keep
    return {"losses": losses}


def plain_masked(model_folder: str) -> list[float]:
    """The losses of `masked` in plain PyTorch."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(model_folder).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-6, weight_decay=0.0)
    losses = []
    for _ in range(2):
        loss = model(input_ids=byte_windows(2), labels=byte_windows(2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def speech_config() -> Any:
    """A Wav2Vec2 of two layers, without dropout."""
    from transformers import Wav2Vec2Config

    no_noise = dict.fromkeys(
        "hidden_dropout attention_dropout feat_proj_dropout activation_dropout final_dropout layerdrop".split(), 0.0
    )
    return Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 32),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        **no_noise,
    )


def speech_batch() -> dict[str, torch.Tensor]:
    """Two sounds and their labels."""
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(2, 1600, generator=generator)
    return {"input_values": sound, "labels": torch.randint(1, 32, (2, 5), generator=generator)}


def speech(rank: int, world_size: int) -> dict[str, Any]:
    """Wav2Vec2: `weight_norm` replaces a sharded parameter, and the new ones are registered as external."""
    from transformers import Wav2Vec2ForCTC
    from transformers.integrations import HfDeepSpeedConfig

    config = own_config(3)
    keep = HfDeepSpeedConfig(config)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Wav2Vec2ForCTC(speech_config())
    conv = model.wav2vec2.encoder.pos_conv_embed
    engine, *_ = deepspeed.initialize(model=model, config=config)
    loaded = full_weights(engine)
    losses = []
    for _ in range(4):
        loss = engine(**speech_batch()).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    external = [param.ds_numel for _, param in conv.ds_external_parameters()]
    del keep
    return {"losses": losses, "initial": loaded, "weights": full_weights(engine), "external": external}


def plain_speech(initial: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same in plain PyTorch, from the same weights."""
    from transformers import Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(speech_config())
    model.load_state_dict(initial)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-6, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = model(**speech_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": model.state_dict()}


def evaluate_only(rank: int, world_size: int, model_folder: str, folder: str) -> dict[str, Any]:
    """A Trainer that never trains, at stage 3: evaluation of a sharded model, with the optimizer's section there."""
    trainer = make_trainer(model_folder, arguments(folder, _trainer_config()))
    found = trainer.evaluate()
    again = trainer.predict(ByteDataset(8))
    return {"loss": found["eval_loss"], "shape": again.predictions.shape}
