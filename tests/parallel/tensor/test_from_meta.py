"""A model on the meta device gets its values while it is cut: those of the whole model, which no rank ever has."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.memory.measure import measure_peak
from deepspeed.module_inject.layers import GatherReplacedLayerParams
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.from_meta import fill
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_ranks
from tests.parallel.tensor.families import FAMILIES
from tests.parallel.tensor.models import LONG, batch, small
from tests.parallel.tensor.runs import config, plain_step
from tests.parallel.tensor.variants import check, equals_plain

transformers = pytest.importorskip("transformers")

LARGER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32}


def on_meta(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return small(family, **changes)


def whole(family: str, seed: int = 7, **changes: Any) -> nn.Module:
    """What one process makes of a model on meta."""
    model = on_meta(family, **changes)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


def keep(param: nn.Parameter) -> None:
    """In place of a cut."""


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": "none", "head_dim": "none"}
MODELS = {name: FAMILIES[name] for name in ("llama", "mixtral", "gpt_neox", "opt", "gemma3", "deepseek_v3")}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {**GPT2, "tie_word_embeddings": False}), *MODELS.values()]
    + [pytest.param(*model, marks=LONG) for name, model in FAMILIES.items() if name not in MODELS],
)
def test_values_are_those_of_a_model_that_is_initialised_whole(family: str, changes: dict[str, Any]) -> None:
    want = whole(family, **changes).state_dict()
    model = on_meta(family, **changes)
    finished: list[nn.Parameter] = []
    torch.manual_seed(7)
    fill(model, finished.append)
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, want[name])]
    assert len(finished) == len(set(finished)) == len(list(model.parameters()))
    buffers = dict(small(family, **changes).named_buffers())
    assert not [name for name, value in model.named_buffers() if not torch.equal(value, buffers[name])]


def test_plain_modules_draw_what_their_constructors_draw() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(7, 8, padding_idx=0), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.MultiheadAttention(6, 2)
        )

    torch.manual_seed(2)
    want = make().state_dict()
    with torch.device("meta"):
        model = make()
    torch.manual_seed(2)
    fill(model, keep)
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, want[name])]


def test_a_parameter_that_two_modules_have_is_the_first_s_and_stays_one() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
    kept = next(model.parameters())
    torch.manual_seed(0)
    fill(model, keep)
    assert all(param is kept for module in model for param in module.parameters())
    torch.manual_seed(0)
    assert torch.equal(kept, nn.Embedding(9, 4, padding_idx=1).weight)


class Bare(nn.Module):
    """Has values that only its constructor makes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def _adapted() -> nn.Module:
    linear = nn.Linear(2, 2)
    linear.base_layer = nn.Linear(2, 2)
    return linear


def _hooked() -> nn.Module:
    linear = nn.Linear(2, 2)
    linear.weight.register_hook(lambda grad: grad)
    return linear


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Bare, r"the parameter 1\.scale has no values .*Bare\.reset_parameters.*\n.*zero\.Init\(\)"),
        (_adapted, r"has adapters, and no values"),
        (_hooked, r"1\.weight has no values .*, and hooks, which would be lost"),
        (lambda: nn.GRU(3, 2), r"1\.weight_ih_l0 has no values .*, and weak references to it, which would be lost"),
    ],
)
def test_what_nothing_gives_a_value_is_refused_before_anything_is_changed(make: Any, words: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), make())
    with pytest.raises(DeepSpeedConfigError, match=words):
        fill(model, keep)
    assert all(param.is_meta for param in model.parameters())


def half_empty(rank: int, world: int) -> None:
    model = small("llama")
    model.lm_head = nn.Linear(32, 96, bias=False, device="meta")
    with pytest.raises(
        DeepSpeedConfigError, match=r"lm_head\.weight has no values .* has: layers are cut of all or of none"
    ):
        deepspeed.initialize(model=model, config=config(world))


def test_a_model_that_has_some_values_is_refused_on_every_rank() -> None:
    run_ranks(2, half_empty)


def trains(rank: int, world: int, stage: int, family: str, changes: dict[str, Any]) -> None:
    """A step of parts equals one of the whole; ranks need not have one seed."""
    plain, inputs = whole(family, **changes), batch(2)
    model = deepspeed.tp_model_init(on_meta(family, **changes), tp_size=world, dtype=torch.float32)
    torch.manual_seed(7 + rank)
    equals_plain(model, plain, inputs, config(world, stage))


@pytest.mark.parametrize(
    ("ranks", "stage", "name"),
    [
        (2, 3, "llama"),
        (3, 1, "llama, tied"),
        pytest.param(4, 0, "gpt_neox", marks=LONG),
        pytest.param(3, 2, "mixtral", marks=LONG),
        pytest.param(2, 1, "gemma3", marks=LONG),
    ],
)
def test_a_model_that_was_on_meta_trains_as_the_whole_one(ranks: int, stage: int, name: str) -> None:
    run_ranks(ranks, trains, stage, *FAMILIES[name])


class _CutError(Exception):
    """The layers are cut; what comes then is not looked at."""


def peak(rank: int, world: int) -> tuple[float, float]:
    """The largest memory of a rank in parts of the model, and what its part and the largest parameter are."""
    sizes = [param.numel() for param in on_meta("llama", **LARGER).parameters()]
    engines: list[Any] = []

    def build() -> None:
        model = deepspeed.tp_model_init(on_meta("llama", **LARGER), tp_size=world, dtype=torch.float32)
        torch.manual_seed(7)
        with patch("deepspeed.engine.build.build", side_effect=_CutError), pytest.raises(_CutError):
            engines.append(deepspeed.initialize(model=model, config=config(world)))
        engines.append(model)

    # All have one seed, so that nothing has to travel: the end of a message that gloo's thread lets go of last is not in the record.
    with patch.object(TensorGroup, "broadcast_", lambda self, values: None):
        found = measure_peak(build).allocated_nbytes / 4
    part = sum(param.numel() for param in engines[0].parameters())
    return found / sum(sizes), (part + 2 * max(sizes)) / sum(sizes)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG)])
def test_no_rank_has_more_than_its_part_and_a_parameter(ranks: int) -> None:
    for found, most in run_ranks(ranks, peak):
        assert found < most, (found, most)


def loads(rank: int, world: int, folder: str, stage: int) -> None:
    """A checkpoint, and files of whole tensors, go into the parts."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    saved, *_ = deepspeed.initialize(model=small("llama"), config=config(world, stage))
    saved.backward(saved(**batch(2)).loss)
    saved.step()
    saved.save_checkpoint(folder, tag="one")
    want = [float(saved(**batch(2, seed=s)).loss.detach()) for s in (1, 2)]
    saved.destroy()
    engine, *_ = deepspeed.initialize(model=on_meta("llama"), config=config(world, stage))
    engine.load_checkpoint(folder, tag="one")
    assert [float(engine(**batch(2, seed=s)).loss.detach()) for s in (1, 2)] == want
    engine.destroy()

    file = f"{folder}/model-{rank}.safetensors"
    save_file(small("llama").state_dict(), file)
    loss, grads, _ = plain_step(small("llama"), batch(2))
    engine, *_ = deepspeed.initialize(model=on_meta("llama"), config=config(world, stage))
    with safe_open(file, "pt") as values, torch.no_grad():
        for name, param in engine.module.named_parameters():
            with (
                deepspeed.zero.GatheredParameters([param], modifier_rank=0),
                GatherReplacedLayerParams([param], engine.module),
            ):
                param.copy_(values.get_tensor(name))
    own = engine(**batch(2)).loss
    engine.backward(own)
    check(engine, grads)
    assert float(own.detach()) == pytest.approx(loss, rel=1e-6)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_checkpoints_and_files_of_whole_tensors_load_into_it(tmp_path: Path, stage: int) -> None:
    run_ranks(2, loads, str(tmp_path), stage)
