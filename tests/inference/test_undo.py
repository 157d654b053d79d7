"""Whatever fails inside of init_inference, on whatever rank: the model is as it was, and every rank has the error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.inference import engine as engine_module
from deepspeed.inference import undo
from deepspeed.quant import replace
from deepspeed.quant.linear import NotFiniteError, QuantizedWeight
from deepspeed.utils.errors import CheckpointError, DeepSpeedError
from tests.harness import run_alone, run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")


def noted(model: nn.Module) -> dict[str, Any]:
    """What a script can see of a model."""
    found: dict[str, Any] = {
        name: (id(module), type(module), set(vars(module)), list(module._modules), list(module._forward_hooks))
        for name, module in model.named_modules()
    }
    for name, param in model.named_parameters():
        values = None if param.is_meta else param.detach().clone()
        found[f"{name}, values"] = (id(param), param.dtype, param.shape, param.requires_grad, set(vars(param)), values)
    return found


def is_same(now: Any, then: Any) -> bool:
    if isinstance(then, Tensor):
        return torch.equal(now.nan_to_num(), then.nan_to_num())
    if isinstance(then, (tuple, dict)):
        parts = zip(now.values(), then.values(), strict=True) if isinstance(then, dict) else zip(now, then, strict=True)
        return len(now) == len(then) and all(is_same(*pair) for pair in parts)
    return bool(now == then)


def assert_stays(model: nn.Module, error: type[Exception], words: str, **asked: Any) -> None:
    hook = model.register_forward_hook(lambda module, args, output: None)
    before = noted(model)
    with pytest.raises(error, match=words):
        deepspeed.init_inference(model, **asked)
    assert is_same(noted(model), before)
    hook.remove()
    assert not model._forward_hooks and not hasattr(model, "ds_autotp_parsed")


def with_nan() -> Any:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    return model


def fails(after: int = 0) -> Callable[..., Any]:
    """A function that fails at a call, as memory does that is full."""
    calls = iter(range(1000))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise RuntimeError("can't allocate memory")
        return QuantizedWeight(*args, **kwargs)

    return fail


def fails_behind(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which does what it does and fails at its end."""

    def fail(*args: Any) -> Any:
        step(*args)
        raise RuntimeError("can't allocate memory")

    return fail


def test_a_value_that_cannot_be_quantized_in_the_last_layer() -> None:
    assert_stays(with_nan(), NotFiniteError, "down_proj: a weight .* holds NaN", dtype="int8")
    assert_stays(with_nan().bfloat16(), NotFiniteError, "down_proj: a weight .* holds NaN", dtype="int4")


def test_memory_that_ends_while_weights_are_quantized_or_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replace, "QuantizedWeight", fails(after=5))
    assert_stays(build("llama", tie_word_embeddings=True), RuntimeError, "allocate", dtype="int8")
    monkeypatch.undo()
    for step in ("place", "cast"):
        monkeypatch.setattr(engine_module.prepare, step, fails_behind(getattr(engine_module.prepare, step)))
        assert_stays(build("llama"), RuntimeError, "allocate", dtype="bf16")
        monkeypatch.undo()
    monkeypatch.setattr(engine_module, "save", fails())
    assert_stays(build("llama"), RuntimeError, "allocate", dtype="int4")


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_file_that_ends_while_it_is_read(on_meta: bool, dtype: str, tmp_path: Path, monkeypatch: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    if on_meta:
        with torch.device("meta"):
            model = type(build("llama"))(build("llama").config)
    else:
        model = build("llama")
    real = engine_module.open_weights

    def cut_short(*args: Any) -> Any:
        weights = real(*args)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return weights

    monkeypatch.setattr(engine_module, "open_weights", cut_short)
    assert_stays(model, CheckpointError, "was cut off while it was read", dtype=dtype, checkpoint=str(tmp_path))


def to_a_bad_disk(folder: str) -> None:
    rest = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0}}
    assert_stays(build("llama"), Exception, "file", dtype="fp32", zero=rest)
    assert_stays(
        with_nan(), NotFiniteError, "down_proj", dtype="int8", zero={"stage": 3, "offload_param": {"device": "cpu"}}
    )


def test_a_disk_that_cannot_be_written_to_and_values_at_rest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_alone(to_a_bad_disk, str(tmp_path / "file"))


def on_one_rank(rank: int, world_size: int) -> None:
    words = "down_proj: a weight .* holds NaN"
    assert_stays(with_nan() if rank == 0 else build("llama"), DeepSpeedError, words, dtype="int8", tp={"tp_size": 2})
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(engine_module, "save", fails())
        assert_stays(build("llama"), Exception, "allocate", dtype="int8", tp={"tp_size": 2})
    missing = {"checkpoint": "nowhere"} if rank == 1 else {}
    assert_stays(build("llama"), DeepSpeedError, "there is no checkpoint nowhere", zero={"stage": 3}, **missing)
    kinds = "fp32" if rank else "bf16"
    assert_stays(
        build("llama"),
        DeepSpeedError,
        r"\[rank 1 of 2\] dtype = fp32, and the first rank has bf16",
        dtype=kinds,
        mp_size=2,
    )
    fewer = build("llama", num_hidden_layers=2 - rank)
    assert_stays(
        fewer,
        DeepSpeedError,
        r"\[rank 1 of 2\] the model = .*and the first rank has",
        dtype="fp32",
        zero={"stage": 3},
    )
    model = build("llama")
    plain = build("llama")
    engine = deepspeed.init_inference(model, dtype="fp32", tp={"tp_size": 2})
    assert (engine(**prompts()).logits - plain(**prompts()).logits).abs().max() < 1e-5


def test_an_error_of_one_rank_is_everybodys() -> None:
    run_ranks(2, on_one_rank, timeout=120)


def short_on_one(rank: int, world_size: int) -> None:
    before = noted(model := build("llama"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine_module, "save", fails())
        if rank == 1:
            patched.setattr(undo, "_available", lambda: 0)
        with pytest.raises(RuntimeError, match="allocate"):
            deepspeed.init_inference(model, dtype="int8", tp={"tp_size": 2})
    assert not is_same(noted(model), before), "no rank puts back what another cannot"


def test_a_rank_without_room_has_all_leave_the_new_values() -> None:
    run_ranks(2, short_on_one)


def test_where_memory_is_short_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    nbytes = sum(param.nbytes for param in model.parameters())
    monkeypatch.setattr(undo, "_available", lambda: nbytes)
    assert not undo.has_room(model)
    with torch.device("meta"):
        assert undo.has_room(type(model)(model.config))
