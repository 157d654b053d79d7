"""What a sharded parameter answers, and how it refuses the rest."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import deepspeed
from deepspeed.utils.errors import ShardError
from deepspeed.zero import ZeroParamStatus
from tests.harness import run_ranks
from tests.zero.sharded import sharded_engine, step, storages

Use = Callable[[Any], Any]

USES: dict[str, Use] = {
    "addition": lambda p: p + 1,
    "comparison": lambda p: p == p,
    "in-place": lambda p: p.data.add_(1),
    "copy_": lambda p: p.copy_(torch.zeros(16, 16)),
    "linear": lambda p: F.linear(torch.ones(1, 16), p),
    "linear on detached": lambda p: F.linear(torch.ones(1, 16), p.detach()),
    "index": lambda p: p[0],
    "item": lambda p: p.item(),
    "len": lambda p: len(p),
    "bool": lambda p: bool(p),
    "iteration": lambda p: list(p),
    "float": lambda p: p.float(),
    "clone": lambda p: p.clone(),
    "cpu": lambda p: p.cpu(),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "stack": lambda p: torch.stack([p, p]),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "assignment": lambda p: setattr(p, "data", torch.zeros(16, 16)),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
    "safetensors": lambda p: safetensors.torch.save({"p": p.detach()}),
    "padding": lambda p: F.pad(p.data, (0, 1)),
    "initialiser": lambda p: nn.init.zeros_(p),
}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    with sharded_engine(rank, world_size) as engine:
        param = engine.module.blocks[0][0].weight
        said = {}
        with torch.no_grad():
            for name, use in USES.items():
                try:
                    use(param)
                    said[name] = "(nothing)"
                except ShardError as error:
                    said[name] = str(error)
        with pytest.raises(ShardError, match="deepcopy"):
            copy.deepcopy(engine.module)
        with pytest.raises(ShardError, match=r"blocks\.0\.0\.bias|blocks\.0\.0\.weight"):
            torch.save(engine.module.state_dict(), io.BytesIO())
        return said


def test_every_use_of_a_sharded_parameter_outside_a_forward_is_refused_with_the_cure() -> None:
    for rank, said in enumerate(run_ranks(2, refusals)):
        for name, text in said.items():
            assert text.startswith(f"[rank {rank}]: blocks.0.0.weight is sharded and cannot be used in"), (name, text)
            assert "full shape (16, 16), this rank holds" in text
            assert "of 256 elements" in text
            assert "with deepspeed.zero.GatheredParameters([param])" in text
            assert "save_16bit_model" in text


def answers(rank: int, world_size: int) -> dict[str, Any]:
    with sharded_engine(rank, world_size) as engine:
        param = engine.module.blocks[0][0].weight
        param.ds_active_sub_modules.clear()
        state = engine.module.state_dict()
        with pytest.raises(ShardError):
            state["blocks.0.0.weight"].sum()
        param.data = F.pad(param.data, (0, 0), "constant", 0)  # by nothing, as Transformers ties a decoder with a bias
        found = {
            "numel": param.numel(),
            "shape": tuple(param.shape),
            "size": tuple(param.size()),
            "dtype": param.dtype,
            "device": param.device.type,
            "requires_grad": param.requires_grad,
            "is_leaf": param.is_leaf,
            "is_parameter": isinstance(param, nn.Parameter),
            "grad": param.grad,
            "is_floating_point": param.is_floating_point() and torch.is_floating_point(param),
            "ds_shape": tuple(param.ds_shape),
            "ds_numel": param.ds_numel,
            "ds_status": param.ds_status,
            "ds_persist": param.ds_persist,
            "ds_process_group": param.ds_process_group is not None,
            "local": (param.ds_tensor.numel(), param.ds_tensor.dim(), param.partition_numel()),
            "distinct_ids": len({p.ds_id for p in engine.module.parameters()}),
            "names": list(state) == [name for name, _ in engine.module.named_parameters()],
            "repr": repr(param),
            "like": {
                (*of(param).shape, of(param).dtype)
                for of in (torch.zeros_like, torch.ones_like, torch.randn_like, torch.empty_like)
            },
            "full like": float(torch.full_like(param, 0.5).sum()),
        }
        param.all_gather()
        found["gathered"] = (param.ds_status, tuple(param.shape), tuple(param.detach().clone().shape))
        param.partition()
        found["partitioned"] = (param.ds_status, param.numel())
        return found


def test_questions_about_a_sharded_parameter_are_answered() -> None:
    found = run_ranks(2, answers)
    local = [answer.pop("local") for answer in found]
    assert sum(numel for numel, _, _ in local) == 256
    assert all(numel == counted and dim == 1 for numel, dim, counted in local)
    here = [answer.pop("repr") for answer in found]
    assert here[0] == f"ShardedParameter(blocks.0.0.weight, shape=(16, 16), here={local[0][0]})"
    assert found[0] == {
        "like": {(16, 16, torch.float32)},
        "full like": 128.0,
        "numel": 0,
        "shape": (0,),
        "size": (0,),
        "dtype": torch.float32,
        "device": "cpu",
        "requires_grad": True,
        "is_leaf": True,
        "is_parameter": True,
        "grad": None,
        "is_floating_point": True,
        "ds_shape": (16, 16),
        "ds_numel": 256,
        "ds_status": ZeroParamStatus.NOT_AVAILABLE,
        "ds_persist": False,
        "ds_process_group": True,
        "distinct_ids": 14,
        "names": True,
        "gathered": (ZeroParamStatus.AVAILABLE, (16, 16), (16, 16)),
        "partitioned": (ZeroParamStatus.NOT_AVAILABLE, 0),
    }


def persistent(rank: int, world_size: int) -> list[tuple[bool, int, int, bool]]:
    with sharded_engine(rank, world_size, zero={"stage3_param_persistence_threshold": 16}) as engine:
        bias = engine.module.blocks[0][0].bias
        bias.ds_active_sub_modules.clear()
        with deepspeed.zero.GatheredParameters(bias):
            copied = copy.deepcopy(bias)
        loaded = pickle.loads(pickle.dumps(bias))
        assert torch.equal(loaded, bias)
        return [
            bias.ds_persist,
            bias.numel(),
            bias.ds_numel,
            type(copied) is nn.Parameter,
            type(loaded) is nn.Parameter,
        ]


def test_a_persistent_parameter_is_whole_and_has_the_same_attributes() -> None:
    assert run_ranks(2, persistent)[0] == [True, 16, 16, True, True]


def identity(rank: int, world_size: int) -> list[bool]:
    checks = []
    with sharded_engine(rank, world_size) as engine:
        module = engine.module
        before = dict(module.named_parameters())
        for param in before.values():
            param._is_hf_initialized = True
        step(engine, rank, world_size)
        with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            checks += [module.get_parameter(name) is param for name, param in before.items()]
        step(engine, rank, world_size)
        checks += [param._is_hf_initialized for param in module.parameters()]
        checks += [module.get_parameter(name) is param for name, param in before.items()]
    return [*checks, *(module.get_parameter(name) is param for name, param in before.items())]


def test_a_parameter_is_one_object_for_life_and_keeps_custom_attributes() -> None:
    assert all(run_ranks(2, identity)[0])


def pickled_at(rank: int, world_size: int, stage: int, folder: str) -> bool:
    with sharded_engine(rank, world_size, stage) as engine:
        path = Path(folder, f"{rank}.pt")
        torch.save(list(engine.module.parameters()), path)
        loaded = torch.load(path, weights_only=False)
        copied = copy.deepcopy(engine.module)
        pairs = zip(loaded, copied.parameters(), engine.module.parameters(), strict=True)
        return all(torch.equal(a, c) and torch.equal(b, c) and type(b) is nn.Parameter for a, b, c in pairs)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replicated_parameters_are_pickled_and_copied_as_ever(stage: int, tmp_path: Path) -> None:
    assert all(run_ranks(2, pickled_at, stage, str(tmp_path)))


def live_after_a_step(rank: int, world_size: int) -> tuple[int, int, list[int]]:
    with sharded_engine(rank, world_size) as engine:
        step(engine, rank, world_size)
        step(engine, rank, world_size)
        fulls = [bucket.full for bucket in engine._built.sharded]
        mine = {full.untyped_storage().data_ptr() for full in fulls} - {0}
        return (
            engine.memory_by_kind()["unsharded"],
            len(mine & set(storages())),
            [f.untyped_storage().nbytes() for f in fulls],
        )


def test_no_unsharded_bytes_stay_alive_after_a_step_of_stage_3() -> None:
    for counted, found, nbytes in run_ranks(2, live_after_a_step):
        assert counted == found == sum(nbytes) == 0
        assert nbytes


def converted(rank: int, world_size: int) -> None:
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2}):
        model = nn.Linear(4, 4)
    weight = model.weight
    assert model.to(dtype=torch.float32).weight is weight and model.cpu().weight is weight
    assert model.half().weight is weight and weight.dtype == torch.float32
    for refused in (weight.float, weight.cpu, lambda: setattr(weight, "data", torch.zeros(4, 4))):
        with pytest.raises(ShardError):
            refused()
    with deepspeed.zero.GatheredParameters(weight):
        assert weight.shape == (4, 4)


def test_converting_a_module_leaves_sharded_parameters_as_they_are() -> None:
    run_ranks(2, converted)


def identities(rank: int, world_size: int, stage: int) -> None:
    from safetensors.torch import storage_ptr, storage_size

    with sharded_engine(rank, world_size, stage, name="gpt_tied") as engine:
        named = dict(engine.module.named_parameters(remove_duplicate=False))
        taken = engine.module.state_dict()
        before = engine._gatherer.num_agreements if engine._gatherer else 0
        for ask in (
            lambda p: p.untyped_storage().data_ptr(),
            lambda p: p.storage().data_ptr(),
            lambda p: p.data_ptr(),
            lambda p: (storage_ptr(p), p.data_ptr()),
        ):
            for first, one in named.items():
                for second, other in named.items():
                    alike = ask(one) == ask(other)
                    if one is other:
                        assert alike and ask(taken[first]) == ask(taken[second]) == ask(one), (first, second)
                    elif stage == 3:
                        assert not alike, (first, second)
        for param in named.values():
            assert storage_size(param) >= deepspeed.zero.param.full_numel(param) * param.element_size()
            assert not param._is_view() and param.device == engine.device
        assert (engine._gatherer.num_agreements if engine._gatherer else 0) == before
        if stage == 3:
            with pytest.raises(ShardError, match=r"storage\(\).resize_"):
                next(iter(named.values())).untyped_storage().resize_(0)


@pytest.mark.parametrize("stage", [0, 3])
def test_which_memory_a_parameter_is_can_be_asked_without_gathering(stage: int) -> None:
    run_ranks(2, identities, stage)
