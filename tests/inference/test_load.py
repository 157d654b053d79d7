"""Models on the meta device get their weights from whatever holds them, each rank its part; what is damaged loads nothing."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.checkpoint.boxes import box_of
from deepspeed.inference.weights import SafetensorsFiles
from deepspeed.mesh import mesh as mesh_module
from deepspeed.quant.linear import QuantizedWeight
from deepspeed.quant.spec import Spec
from deepspeed.utils.errors import CheckpointError, DeepSpeedConfigError, DeepSpeedError
from tests.harness import run_ranks
from tests.inference.families import build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")


def on_meta(family: str, **changes: Any) -> Any:
    """The family's model without values."""
    with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
        return build(family, **changes)


def same_words(engine: Any, plain: Any) -> bool:
    """Logits bit for bit, and greedy words."""
    batch = prompts("left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    return torch.equal(logits_of(engine, batch), logits_of(plain, batch)) and torch.equal(
        engine.generate(**batch, **options), plain.generate(**batch, **options)
    )


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "t5"])
def test_a_sharded_hugging_face_folder_fills_a_meta_model(family: str, tmp_path: Path) -> None:
    plain = build(family)
    plain.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    engine = deepspeed.init_inference(on_meta(family), dtype="fp32", checkpoint=str(tmp_path))
    assert same_words(engine, plain)


def test_files_json_files_and_dicts_of_torch_files_and_a_base_models_weights(tmp_path: Path) -> None:
    plain = build("llama", tie_word_embeddings=True)
    state = plain.state_dict()
    names = list(state)
    for index in range(2):
        torch.save({name: state[name] for name in names[index::2]}, tmp_path / f"part_{index}.bin")
    form = {"type": "ds_model", "checkpoints": ["part_0.bin", "part_1.bin"], "version": 1.0}
    (tmp_path / "model.json").write_text(json.dumps(form))
    torch.save({"module": plain.model.state_dict()}, tmp_path / "base.pt")
    ways: list[dict[str, Any]] = [
        {"checkpoint": str(tmp_path / "model.json")},
        {"checkpoint": form, "base_dir": str(tmp_path)},
        {"ckpt_config": {"checkpoint_dir": "model.json", "base_dir": str(tmp_path)}},
        {"checkpoint": "base.pt", "base_dir": str(tmp_path)},
    ]
    for given in ways:
        engine = deepspeed.init_inference(on_meta("llama", tie_word_embeddings=True), dtype="fp32", **given)
        assert same_words(engine, plain), given
    other = build("llama", tie_word_embeddings=True)
    for param in other.parameters():
        param.data.zero_()
    assert same_words(deepspeed.init_inference(other, dtype="fp32", **ways[0]), plain)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_transposed_layers_are_saved_quantized_and_read_again(dtype: str, tmp_path: Path) -> None:
    saved = deepspeed.init_inference(build("gpt2"), dtype=dtype, save_mp_checkpoint_path=str(tmp_path))
    engine = deepspeed.init_inference(on_meta("gpt2"), dtype=dtype, checkpoint=str(tmp_path))
    assert torch.allclose(logits_of(engine, prompts()), logits_of(saved, prompts()), rtol=1e-5, atol=1e-5)


def test_an_index_and_parts_of_one_rank_by_any_names_are_read(tmp_path: Path) -> None:
    plain = build("llama")
    plain.save_pretrained(tmp_path / "folder", max_shard_size="40KB")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    assert same_words(deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(index)), plain)
    state = plain.state_dict()
    names = list(state)
    for file, some in (("common.pt", names[::2]), ("own.pt", names[1::2])):
        torch.save({name: state[name] for name in some}, tmp_path / file)
    form = {"type": "ds_model", "checkpoints": {"non_tp": ["common.pt"], "tp": ["own.pt"]}, "base_dir": str(tmp_path)}
    assert same_words(deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=form), plain)


def train_and_save(rank: int, world_size: int, folder: str, stage: int) -> Any:
    """One step at a stage; the weights after it."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    batch = prompts()
    engine.backward(engine(**batch, labels=batch["input_ids"]).loss)
    engine.step()
    engine.save_checkpoint(folder)
    state = engine._consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    return state if rank == 0 else None


@pytest.mark.parametrize("stage", [1, 2, 3] if os.environ.get("DS_TEST_LONG") else [3])
def test_a_training_checkpoint_is_a_model_to_run(stage: int, tmp_path: Path) -> None:
    state = run_ranks(2, train_and_save, str(tmp_path), stage, timeout=300)[0]
    plain = build("llama")
    plain.load_state_dict(state)
    engine = deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path))
    assert same_words(engine, plain)


def test_a_run_of_the_original_without_zero_in_low_precision_has_masters_beside_its_state(tmp_path: Path) -> None:
    plain = build("llama").bfloat16()
    masters = [param.detach().float() + 1e-4 for param in plain.parameters()]
    state = {"state": {}, "param_groups": [{"params": list(range(len(masters))), "lr": 0.01}]}
    content = {
        "module": plain.state_dict(),
        "buffer_names": [],
        "optimizer": {"cur_scale": 1.0, "cur_iter": 2, "optimizer_state_dict": state, "fp32_groups": [masters]},
        "param_shapes": [{name: param.shape for name, param in plain.named_parameters()}],
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    (tmp_path / "t").mkdir()
    torch.save(content, tmp_path / "t" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("t")
    engine = deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path))
    for found, master in zip(engine.parameters(), masters, strict=True):
        assert torch.equal(found, master)
    flat = content | {"optimizer": {"optimizer_state_dict": state, "fp32_groups_flat": [torch.zeros(3)]}}
    torch.save(flat, tmp_path / "t" / "mp_rank_00_model_states.pt")
    engine = deepspeed.init_inference(on_meta("llama"), dtype="bf16", checkpoint=str(tmp_path))
    for found, param in zip(engine.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, param)


def write_as_the_original(state: dict[str, Any], folder: Path) -> None:
    """Parts of two ranks as DeepSpeed 0.19.8 cuts them: embeddings and norms whole among them, the head by its inputs."""
    folder.mkdir()
    files: dict[str, dict[str, Any]] = {f"tp_0{rank}_0{index}.pt": {} for index in range(2) for rank in range(2)}
    for number, (name, value) in enumerate(state.items()):
        is_row = any(piece in name for piece in ("o_proj", "down_proj", "lm_head"))
        is_cut = is_row or "_proj" in name
        for rank in range(2):
            part = value.chunk(2, int(is_row))[rank] if is_cut else value
            files[f"tp_0{rank}_0{number % 2}.pt"][name] = part.clone()
    for file, content in files.items():
        torch.save(content, folder / file)
    torch.save({}, folder / "non-tp.pt")
    form = {"type": "ds_model", "base_dir": str(folder), "version": 1.0, "parallelization": "tp", "tp_size": 2}
    form |= {"dtype": "float32", "checkpoints": {"non_tp": ["non-tp.pt"], "tp": list(files)}}
    (folder / "ds_inference_config.json").write_text(json.dumps(form))


def over_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Parts from a whole checkpoint, saved as parts, and loaded again; quantized on the way."""
    plain, found = build("mixtral"), {}
    batch, size = prompts("left"), {"tp_size": world_size}
    users = sum(mesh.num_users for mesh in mesh_module._meshes.values())
    read: list[int] = []
    before = SafetensorsFiles.read

    def watched(self: Any, name: str, box: Any, dtype: Any = None) -> Any:
        values = before(self, name, box, dtype)
        read.append(values.nbytes)
        return values

    SafetensorsFiles.read = watched  # type: ignore[method-assign]
    parts = deepspeed.init_inference(
        on_meta("llama"), dtype="fp32", tp=size, checkpoint=f"{folder}/llama", save_mp_checkpoint_path=f"{folder}/parts"
    )
    SafetensorsFiles.read = before  # type: ignore[method-assign]
    whole = build("llama")
    cut = sum(p.nbytes for p in whole.parameters() if p.dim() > 1) - whole.get_input_embeddings().weight.nbytes
    found["most read"] = (sum(read) - sum(p.nbytes for p in whole.parameters()) + cut) / cut
    found["llama"] = float((logits_of(parts, batch) - logits_of(whole, batch)).abs().max())
    again = deepspeed.init_inference(on_meta("llama"), dtype="fp32", tp=size, checkpoint=f"{folder}/parts")
    found["again"] = torch.equal(logits_of(again, batch), logits_of(parts, batch))
    mixtral = deepspeed.init_inference(on_meta("mixtral"), dtype="fp32", tp=size, checkpoint=f"{folder}/mixtral")
    found["mixtral"] = float((logits_of(mixtral, batch) - logits_of(plain, batch)).abs().max())
    eight = deepspeed.init_inference(
        on_meta("llama"), dtype="int8", tp=size, checkpoint=f"{folder}/llama", save_mp_checkpoint_path=f"{folder}/eight"
    )
    same = deepspeed.init_inference(on_meta("llama"), dtype="int8", tp=size, checkpoint=f"{folder}/eight")
    found["int8"] = float((logits_of(same, batch) - logits_of(eight, batch)).abs().max())
    with pytest.raises(DeepSpeedConfigError, match="was saved for tp_size = 2, and this run has 1"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=f"{folder}/parts")
    if rank == 0:
        write_as_the_original(whole.state_dict(), Path(folder) / "original")
    torch.distributed.barrier()
    theirs = deepspeed.init_inference(on_meta("llama"), dtype="fp32", tp=size, checkpoint=f"{folder}/original")
    found["original"] = float((logits_of(theirs, batch) - logits_of(whole, batch)).abs().max())
    torch.distributed.barrier()
    if rank == 1:
        (Path(folder) / "original" / "tp_01_01.pt").unlink()
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=r"names .*tp_01_01.pt, which is missing; nothing was loaded"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", tp=size, checkpoint=f"{folder}/original")
    if rank == 1:
        (Path(folder) / "llama" / "model.safetensors").rename(Path(folder) / "llama" / "gone")
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="holds no weights"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", tp=size, checkpoint=f"{folder}/llama")
    for engine in (parts, again, mixtral, eight, same, theirs):
        engine.destroy()
    assert sum(mesh.num_users for mesh in mesh_module._meshes.values()) == users, "what was refused holds no mesh"
    return found


def test_ranks_read_their_parts_and_save_them(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        build(family).save_pretrained(tmp_path / family)
    for found in run_ranks(2, over_ranks, str(tmp_path), timeout=300):
        assert found["most read"] < 0.67 and found["again"]
        assert max(found["llama"], found["mixtral"], found["original"]) < 1e-5 and found["int8"] < 1e-4


def test_int8_while_loading_is_int8_after_loading(tmp_path: Path) -> None:
    plain = build("llama", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    model = on_meta("llama", tie_word_embeddings=True)
    loaded = deepspeed.init_inference(model, dtype="int4", checkpoint=str(tmp_path))
    after = deepspeed.init_inference(copy.deepcopy(plain), dtype="int4")
    assert torch.equal(logits_of(loaded, prompts()), logits_of(after, prompts()))


def test_what_is_damaged_or_does_not_fit_loads_nothing(tmp_path: Path) -> None:
    plain = build("llama")
    plain.save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    good = shard.read_bytes()

    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        model = on_meta("llama", **changes)
        with pytest.raises(error, match=words):
            deepspeed.init_inference(model, dtype="fp32", checkpoint=str(tmp_path))
        assert all(param.is_meta for param in model.parameters())

    shard.write_bytes(struct.pack("<Q", 1 << 60) + good[8:])
    refused(CheckpointError, "its header claims 1152921504606846976 bytes")
    shard.write_bytes(good.replace(b'"F32"', b'"F64"', 1))
    refused(CheckpointError, r"is F64\[.*which is not the .* bytes its header gives it")
    shard.write_bytes(good[:-4])
    refused(CheckpointError, "it is cut off or damaged")
    shard.write_bytes(good)
    refused(CheckpointError, r"is \[64, 48\] in .*, and \[32, 48\] in LlamaForCausalLM", intermediate_size=32)
    refused(CheckpointError, "lacks 9 tensors of LlamaForCausalLM: model.layers.2", num_hidden_layers=3)
    shard.unlink()
    refused(CheckpointError, f"lacks {shard.name}, which its model.safetensors.index.json names")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(CheckpointError, "model.safetensors.index.json has no weight_map of names to files")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(CheckpointError, match="it is damaged, or not what torch.save writes"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path / "text.pt"))
    parts = {"tp_size": "two", "checkpoints": {"non_tp": ["a.pt"], "tp": ["b.pt"]}}
    with pytest.raises(DeepSpeedConfigError, match="has tp_size = 'two', which is no whole number"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=parts)
    with pytest.raises(DeepSpeedConfigError, match="was saved for tp_size = 2, and this run has 1"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint={**parts, "tp_size": "2"})
    with pytest.raises(CheckpointError, match="there is no checkpoint .*nowhere, and no model of that name"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path / "nowhere"))
    megatron = {"type": "Megatron", "checkpoints": ["a.pt", "b.pt"]}
    with pytest.raises(DeepSpeedConfigError, match="files of type 'Megatron' are parts of ranks"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=megatron)
    with pytest.raises(DeepSpeedConfigError, match="computed, not stored, and were made on the meta device"):
        with torch.device("meta"):
            own = nn.Sequential(nn.Linear(2, 2))
            own.register_buffer("table", torch.zeros(2), persistent=False)
        torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), tmp_path / "own.pt")
        deepspeed.init_inference(own, dtype="fp32", checkpoint=str(tmp_path / "own.pt"))


def test_a_torch_file_of_before_1_6_is_read_whole_and_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    plain, path = build("llama"), tmp_path / "pytorch_model.bin"
    torch.save(plain.state_dict(), path, _use_new_zipfile_serialization=False)
    assert same_words(deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path)), plain)
    sparse = {name: value.to_sparse() if value.dim() == 2 else value for name, value in plain.state_dict().items()}
    for content, words in (
        ([1, 2], "pytorch_model.bin holds a list, and no state dict"),
        (sparse, "model.embed_tokens.weight in .* is a tensor of torch's kind torch.sparse_coo"),
        (plain, "holds pickled objects of torch.nn.modules"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words):
            deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path))
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is empty"):
        deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint=str(tmp_path))
    for files in ([], None, [3], {"non_tp": []}):
        with pytest.raises(DeepSpeedConfigError, match="which is no list of file names"):
            deepspeed.init_inference(on_meta("llama"), dtype="fp32", checkpoint={"checkpoints": files})


def test_values_that_would_be_lost_or_mean_something_else_are_refused(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in build("llama").state_dict().items()}

    def refused(words: str, dtype: str = "fp32", **changed: torch.Tensor) -> None:
        save_file({**state, **changed}, path)
        model = on_meta("llama", tie_word_embeddings="lm_head.weight" in changed)
        with pytest.raises(DeepSpeedError, match=words):
            deepspeed.init_inference(model, dtype=dtype, checkpoint=str(tmp_path))

    head = {"lm_head.weight": state["lm_head.weight"]}
    refused(
        "model.embed_tokens.weight and lm_head.weight are one parameter of LlamaForCausalLM, and two that differ",
        **head,
    )
    name = "model.layers.1.mlp.up_proj.weight"
    refused(f"{name} holds int8 in .*, and {name} has numbers with fractions", **{name: state[name].to(torch.int8)})
    refused("layers.1.mlp.up_proj: a weight .* holds NaN or infinity", "int8", **{name: state[name] / 0})
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path)
    engine = deepspeed.init_inference(
        on_meta("llama", tie_word_embeddings=True), dtype="fp32", checkpoint=str(tmp_path)
    )
    assert torch.equal(engine.module.lm_head.weight, state["lm_head.weight"])


def test_pieces_of_a_part_are_the_part_and_quantized_what_it_is_quantized(tmp_path: Path) -> None:
    whole = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    pytest.importorskip("safetensors.torch").save_file({"w": whole}, tmp_path / "w.safetensors")
    weights = SafetensorsFiles([tmp_path / "w.safetensors"], "w")
    for box in (None, box_of([96, 256], {1: [(64, 128), (192, 256)]}), box_of([96, 256], {0: [(3, 40), (64, 90)]})):
        part = weights.read("w", box)
        for numel in (64, 1024, 1 << 20, 1 << 22):  # the last: more than is read ahead
            assert torch.equal(torch.cat([piece.clone() for piece in weights.pieces("w", box, numel)]), part.view(-1))
        for bits in (8, 4):
            spec = Spec(num_bits=bits, group_size=64)
            found = QuantizedWeight.of_pieces(part.shape, torch.float32, weights.pieces("w", box, 1024), spec)
            assert torch.equal(found.whole(), QuantizedWeight(part.float(), spec).whole())
