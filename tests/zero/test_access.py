"""Whole values for users: gather contexts, external parameters, and the `safe_*` functions at every stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils.errors import ShardError, TrainingStateError
from deepspeed.zero import GatheredParameters, ZeroParamStatus
from tests.engine.runs import EPS, LR, engine_of, make_config, small_units
from tests.harness import run_ranks
from tests.models import build, make_batches, to_dtype, total_loss
from tests.zero.sharded import ROWS, backward, sharded_engine, step, whole_values

STAGES = (0, 1, 2, 3)


def changes(rank: int, world_size: int) -> dict[str, Any]:
    with sharded_engine(rank, world_size, bf16={"enabled": True}) as engine:
        weight, bias = engine.module.head.weight, engine.module.head.bias
        found: dict[str, Any] = {}
        with GatheredParameters([weight, bias]):
            found["inside"] = (weight.numel(), tuple(bias.shape), weight.ds_status, type(weight).__name__)
            before = weight.detach().clone()
            weight.data.add_(1)
        with GatheredParameters(weight):
            found["discarded"] = torch.equal(weight, before)
        with GatheredParameters(weight, modifier_rank=1):
            if rank == 1:
                weight.data.fill_(3.0)
        with GatheredParameters(p for p in [weight, weight]):
            found["kept"] = bool((weight == 3.0).all())
        found["master"] = bool((deepspeed.utils.safe_get_full_fp32_param(weight) == 3.0).all())
        with GatheredParameters((bias,), modifier_rank=0):
            bias.data = torch.full((4,), float(2 - rank), dtype=bias.dtype)
        with GatheredParameters(bias):
            found["assigned"] = bias.tolist()
        with pytest.raises(ShardError, match=r"head.bias was given data of shape \(5,\); its shape is \(4,\)"):
            with GatheredParameters(bias, modifier_rank=0):
                bias.data = torch.zeros(5)
        return found


def test_a_gather_context_reads_and_keeps_what_the_modifier_rank_changed() -> None:
    for found in run_ranks(2, changes):
        assert found == {
            "inside": (64, (4,), ZeroParamStatus.AVAILABLE, "ZeroParameter"),
            "discarded": True,
            "kept": True,
            "master": True,
            "assigned": [2.0] * 4,
        }


def shapes_of_use(rank: int, world_size: int) -> None:
    with sharded_engine(rank, world_size) as engine:
        weight, bias = engine.module.head.weight, engine.module.head.bias
        plain, buffer = nn.Parameter(torch.full((2,), float(rank))), torch.full((2,), float(rank))
        with GatheredParameters([]), GatheredParameters([], modifier_rank=0):
            pass
        with GatheredParameters([plain, weight, buffer, weight], modifier_rank=0):
            assert weight.numel() == 64
        assert plain[0] == buffer[0] == rank, "what is not sharded is left alone"
        with GatheredParameters(weight):
            with GatheredParameters([weight, bias], modifier_rank=0):
                weight.data.fill_(5.0)
            assert weight.numel() == 64, "the outer context still holds it"
        assert weight.numel() == 0
        with GatheredParameters(weight, enabled=False), pytest.raises(ShardError):
            weight + 1
        with pytest.raises(ZeroDivisionError), GatheredParameters(weight, modifier_rank=0):
            raise ZeroDivisionError
        assert weight.numel() == 0
        with GatheredParameters(engine.module.parameters()):
            copied = copy.deepcopy(engine.module)
        values = whole_values(engine.module)
        for name, param in copied.named_parameters():
            assert type(param) is nn.Parameter
            assert not hasattr(param, "ds_id")
            assert torch.equal(param, values[name])
        head = engine.module.head
        with GatheredParameters([weight, bias], modifier_rank=0):
            head.weight = nn.Parameter(torch.zeros(6, 16))
        assert weight.numel() == 0
        assert head.weight.shape == (6, 16)
        head.weight = weight


def test_a_gather_context_takes_any_mixture_of_tensors_and_nests() -> None:
    run_ranks(2, shapes_of_use)


def test_plain_models_may_be_gathered_without_any_engine() -> None:
    layer = nn.Linear(2, 2)
    with GatheredParameters(layer.parameters(), modifier_rank=0, fwd_module=layer):
        layer.weight.data.zero_()
    assert not layer.weight.any()


def test_external_parameters_want_a_module_and_a_parameter() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="the first argument is a str, not an nn.Module"):
        deepspeed.zero.register_external_parameter("layer", layer.weight)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the second argument is a Tensor, not an nn.Parameter"):
        deepspeed.zero.register_external_parameter(layer, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="was not registered with Linear"):
        deepspeed.zero.unregister_external_parameter(layer, layer.weight)
    deepspeed.zero.register_external_parameter(layer, layer.weight)
    deepspeed.zero.unregister_external_parameter(layer, layer.weight)


def external(rank: int, world_size: int) -> bool:
    with sharded_engine(rank, world_size, name="outside_use") as engine:
        model = engine.module
        deepspeed.zero.register_external_parameter(model.borrower, model.lender.weight)
        first = step(engine, rank, world_size)
        return bool(step(engine, rank, world_size) < first)


def test_a_registered_external_parameter_trains() -> None:
    assert all(run_ranks(2, external))


def full_values(rank: int, world_size: int, stage: int) -> dict[str, dict[str, Tensor]]:
    """Everything the getters give around one step, and what setters change."""
    utils = deepspeed.utils
    with sharded_engine(rank, world_size, stage) as engine:
        named = dict(engine.module.named_parameters())
        backward(engine, rank, world_size)
        grads = {n: utils.safe_get_full_grad(p).clone() for n, p in named.items()}
        engine.step()
        masters = {n: utils.safe_get_full_fp32_param(p).clone() for n, p in named.items()}
        moments = {n: utils.safe_get_full_optimizer_state(p, "exp_avg").clone() for n, p in named.items()}
        written = {}
        for name, param in named.items():
            value = torch.arange(param.ds_numel if stage == 3 else param.numel(), dtype=torch.float32)
            value = value.view(masters[name].shape)
            utils.safe_set_full_fp32_param(param, value)
            utils.safe_set_full_optimizer_state(param, value + 1, "exp_avg_sq")
            ok = torch.equal(utils.safe_get_full_fp32_param(param), value)
            ok &= torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg_sq"), value + 1)
            written[name] = torch.tensor(ok)
        backward(engine, rank, world_size)
        utils.safe_update_full_grad_vectorized(list(named.values()), lambda grad, param: grad * 0 + 2)
        for name, param in named.items():
            written[name] &= bool((utils.safe_get_full_grad(param) == 2).all())
            utils.safe_set_full_grad(param, torch.zeros_like(masters[name]))
            written[name] &= not utils.safe_get_full_grad(param).any()
        engine.step()
        written["norm"] = torch.tensor(engine.get_global_grad_norm() == 0)
        return {"grads": grads, "masters": masters, "moments": moments, "written": written}


def oracle_values() -> dict[str, dict[str, Tensor]]:
    model = build("mlp")
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, eps=EPS)
    total_loss(model(*batch)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
    return {"grads": grads, "masters": {n: p.detach() for n, p in model.named_parameters()}, "moments": moments}


@pytest.mark.parametrize("stage", STAGES)
def test_full_masters_states_and_gradients_are_those_of_plain_pytorch_and_can_be_set(stage: int) -> None:
    expected = oracle_values()
    for found in run_ranks(2, full_values, stage):
        for kind, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-6)
        assert all(found["written"].values()), found["written"]


def local_values(rank: int, world_size: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    utils = deepspeed.utils
    with sharded_engine(rank, world_size) as engine:
        named = dict(engine.module.named_parameters())
        backward(engine, rank, world_size)
        found = {}
        grads = {name: utils.safe_get_local_grad(param).clone() for name, param in named.items()}
        for name, param in named.items():
            utils.safe_set_local_grad(param, grads[name] * 2)
            assert torch.equal(utils.safe_get_local_grad(param), grads[name] * 2)
            utils.safe_set_local_grad(param, grads[name])
        engine.step()
        for name, param in named.items():
            master = utils.safe_get_local_fp32_param(param).clone()
            moment = utils.safe_get_local_optimizer_state(param, "exp_avg").clone()
            utils.safe_set_local_fp32_param(param, master + 1)
            utils.safe_set_local_optimizer_state(param, moment + 1, "exp_avg")
            assert torch.equal(utils.safe_get_local_fp32_param(param), master + 1)
            assert torch.equal(utils.safe_get_local_optimizer_state(param, "exp_avg"), moment + 1)
            found[name] = (grads[name], master, moment)
        return found


def test_the_local_values_of_all_ranks_together_are_the_full_ones() -> None:
    expected = oracle_values()
    per_rank = run_ranks(2, local_values)
    for i, kind in enumerate(("grads", "masters", "moments")):
        for name, value in expected[kind].items():
            joined = torch.cat([found[name][i] for found in per_rank])
            torch.testing.assert_close(joined, value.flatten(), rtol=1e-4, atol=1e-6)


def misuse(rank: int, world_size: int) -> None:
    with sharded_engine(rank, world_size, stage=2) as engine:
        bias = engine.module.head.bias
        with pytest.raises(ShardError, match="sharded by ZeRO stage 3; this one is whole"):
            deepspeed.utils.safe_get_local_fp32_param(bias)
        with pytest.raises(ShardError, match=r"value has 3 elements, the parameter \(4,\) has 4"):
            deepspeed.utils.safe_set_full_fp32_param(bias, torch.zeros(3))
    stray = nn.Parameter(torch.zeros(1))
    assert deepspeed.utils.safe_get_full_fp32_param(stray) is None
    assert deepspeed.utils.safe_get_full_grad(stray) is None


def test_misused_accessors_say_what_is_wrong() -> None:
    run_ranks(2, misuse)


def gradient_after_step(
    rank: int, world_size: int, stage: int, precision: str, offload: str = "", optimizer: str = "AdamW"
) -> None:
    section = {"enabled": True, **({"initial_scale_power": 8} if precision == "fp16" else {})}
    zero = {"offload_optimizer": {"device": offload}} if offload else {}
    config = make_config(stage, micro=2, clip=0.01, zero=zero, **({precision: section} if precision else {}))
    model = build("mlp")
    batch = to_dtype(make_batches(model, num_steps=1, accumulation=1, samples=2)[0][0], DTYPES[precision])
    theirs = torch.optim.SGD(model.parameters(), lr=LR) if optimizer == "SGD" else None
    with engine_of(model, config, optimizer=theirs) as engine:
        named = dict(model.named_parameters())
        engine.backward(total_loss(engine(*batch)))
        before = {name: deepspeed.utils.safe_get_full_grad(param).clone() for name, param in named.items()}
        norm = torch.stack([g.norm() for g in before.values()]).norm().item()
        engine.step()
        assert engine.was_step_applied() and engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-3)
        for name, param in named.items():
            torch.testing.assert_close(deepspeed.utils.safe_get_full_grad(param), before[name], rtol=1e-5, atol=1e-7)
        engine.backward(total_loss(engine(*batch)))
        engine.step()


DTYPES = {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", ["", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_can_be_read_until_the_next_backward_unscaled_and_unclipped(stage: int, precision: str) -> None:
    run_ranks(2, gradient_after_step, stage, precision)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_rest_in_main_memory_are_read_unclipped_too(stage: int, optimizer: str) -> None:
    run_ranks(2, gradient_after_step, stage, "", "cpu", optimizer)


def values_set_between_steps(rank: int, world_size: int, stage: int, precision: str, offload: bool) -> None:
    where = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    config = make_config(stage, micro=2, zero=where, **({precision: {"enabled": True}} if precision else {}))
    model = build("mlp")
    batch = to_dtype(make_batches(model, num_steps=1, accumulation=1, samples=2)[0][0], DTYPES[precision])
    with engine_of(model, config) as engine:
        expected = {}
        for name, param in model.named_parameters():
            expected[name] = torch.linspace(-1, 1, deepspeed.utils.safe_get_full_fp32_param(param).numel())
            deepspeed.utils.safe_set_full_fp32_param(param, expected[name])
        with GatheredParameters(model.parameters()):
            for name, param in model.named_parameters():
                assert torch.equal(param.detach().flatten(), expected[name].to(param.dtype)), name
        plain = build("mlp").to(DTYPES[precision])
        plain.load_state_dict({name: expected[name].view(value.shape) for name, value in plain.state_dict().items()})
        torch.testing.assert_close(total_loss(engine(*batch)), total_loss(plain(*batch)))


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        *((stage, precision, False) for stage in STAGES for precision in ("", "bf16")),
        (2, "bf16", True),
        (3, "bf16", True),
    ],
)
def test_a_master_that_was_set_is_what_the_next_forward_uses(stage: int, precision: str, offload: bool) -> None:
    run_ranks(2, values_set_between_steps, stage, precision, offload)


def kept_views(rank: int, world_size: int) -> None:
    with sharded_engine(rank, world_size) as engine:
        weight = engine.module.head.weight
        state, made = {}, None
        batch = make_batches(engine.module, num_steps=1, accumulation=1, samples=2)[0][0]
        loss = total_loss(engine(*batch))
        with GatheredParameters(weight):
            numbers = weight.detach().numpy().copy()  # the array that is dropped here has pinned the memory down
        with GatheredParameters(engine.module.parameters()):
            expected = {name: param.clone() for name, param in engine.module.named_parameters()}
            assert numbers.tolist() == weight.tolist()
            state = engine.module.state_dict()
            made = nn.Parameter(weight)
            assert isinstance(made, nn.Parameter) and not hasattr(made, "ds_id") and torch.equal(made, weight)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert torch.equal(made, expected["head.weight"]) and type(copy.deepcopy(made)) is nn.Parameter
        with pytest.raises(ShardError, match=r"head.weight is sharded and cannot be used in 'nn.Parameter"):
            nn.Parameter(weight)
        engine.backward(loss)
        engine.step()
        assert all(torch.equal(state[name], value) for name, value in expected.items()), "what was kept is a copy"
        with GatheredParameters(weight):
            assert not torch.equal(weight, expected["head.weight"])


def test_views_taken_inside_a_gather_outlive_it() -> None:
    run_ranks(2, kept_views)


class PairUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(4, 4)
        self.total = (
            torch.dot(self.pair.weight[0], self.pair.bias)
            + torch.nn.functional.linear(torch.ones(1, 4), self.pair.weight, self.pair.bias).sum()
        )


def two_of_one_bucket(rank: int, world_size: int) -> None:
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2}):
        assert torch.isfinite(PairUser().total)


def test_one_call_may_use_two_parameters_of_a_sharded_bucket() -> None:
    run_ranks(2, two_of_one_bucket)


def set_and_evaluate(rank: int, world_size: int, stage: int, threshold: int) -> None:
    utils = deepspeed.utils
    plain = build("mlp")
    ((batch,),) = make_batches(plain, num_steps=1, accumulation=1, samples=ROWS)
    zero = {"stage3_param_persistence_threshold": threshold}
    with sharded_engine(rank, world_size, stage, zero=zero) as engine, torch.no_grad():
        engine(*batch)  # at stage 3, parameters stay whole for the next use
        for param, target in zip(engine.module.parameters(), plain.parameters(), strict=True):
            target.mul_(0.5)
            utils.safe_set_full_fp32_param(param, target)
        torch.testing.assert_close(engine(*batch), plain(*batch))


@pytest.mark.parametrize(("stage", "threshold"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 10**6)])
def test_a_weight_that_was_set_is_whole_in_the_next_forward(stage: int, threshold: int) -> None:
    run_ranks(2, set_and_evaluate, stage, threshold)


def ask_for_what_is_not_there(rank: int, world_size: int) -> None:
    """The parameter lies on one rank alone; the other must not wait for it."""
    with sharded_engine(rank, world_size, stage=2) as engine:
        bias = engine.module.head.bias
        with pytest.raises(KeyError, match=r"head.bias has no optimizer state 'exp_avg'"):
            deepspeed.utils.safe_get_full_optimizer_state(bias, "exp_avg")
        with pytest.raises(KeyError, match=r"head.bias has no optimizer state 'exp_avg'"):
            deepspeed.utils.safe_set_full_optimizer_state(bias, torch.ones(bias.shape), "exp_avg")
        step(engine, rank, world_size)
        with pytest.raises(KeyError, match=r"'momentum'.*exp_avg"):
            deepspeed.utils.safe_get_full_optimizer_state(bias, "momentum")
        engine.offload_states()
        with pytest.raises(TrainingStateError, match="put away"):
            deepspeed.utils.safe_get_full_fp32_param(bias)
        with pytest.raises(TrainingStateError, match="put away"):
            deepspeed.utils.safe_set_full_fp32_param(bias, torch.ones(bias.shape))


def test_asking_for_a_state_that_is_not_there_is_an_error_on_every_rank() -> None:
    run_ranks(2, ask_for_what_is_not_there)


class Penalised(nn.Module):
    """A model, and a module beside it that is told after `initialize` that it uses the model's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.outer(self.inner(x)).pow(2).mean()
        with deepspeed.zero.GatheredParameters(self.inner.weight, fwd_module=self):
            weight = self.inner.weight
            loss = loss + (weight @ weight.T - torch.eye(8)).pow(2).mean()
        return loss


def penalised(rank: int, world_size: int, stage: int) -> None:
    torch.manual_seed(0)
    model = Penalised()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    config = make_config(
        stage,
        micro=4,
        optimizer={"type": "SGD", "params": {"lr": 0.1}},
        zero={"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    )
    with small_units(), engine_of(model, config) as engine:
        for i in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            plain(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(x))
            engine.step()
        for name, value in whole_values(engine.module).items():
            torch.testing.assert_close(value, plain.get_parameter(name).detach())
        deepspeed.zero.register_external_parameter(model.outer, model.inner.weight)
        assert model.outer(model.inner(torch.ones(1, 8))).requires_grad
        deepspeed.zero.unregister_external_parameter(model.outer, model.inner.weight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_registered_after_initialize_are_whole_around_the_module(stage: int, world_size: int) -> None:
    run_ranks(world_size, penalised, stage)


class Borrower(nn.Module):
    """Multiplies by a weight of another module that it is not told of when it is built, as AdaLoRA's penalty does."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.full((8, 8), 0.1))
        self.lent: list[nn.Parameter] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.lent:
            x = torch.tanh(x @ self.own + nn.functional.linear(x, weight))
        return x


def _borrowing() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.second, model.borrower = nn.Linear(8, 8), nn.Linear(8, 8), Borrower()
    model.forward = lambda x: model.borrower(model.second(model.first(x))).pow(2).mean()  # type: ignore[method-assign]
    return model


def lends(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """Two weights are registered, one between the steps; one is written inside of a gather for the borrower; one is taken back."""
    model, plain = _borrowing(), _borrowing()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = make_config(stage, micro=4, optimizer={"type": "SGD", "params": {"lr": 0.1}}, zero=zero)
    config |= {"bf16": {"enabled": dtype is torch.bfloat16}}
    with small_units(), engine_of(model, config) as engine:
        for i in range(6):
            if i in (0, 2):
                layer = "first" if i else "second"
                engine.module.borrower.lent.append(getattr(engine.module, layer).weight)
                plain.borrower.lent.append(getattr(plain, layer).weight)
                deepspeed.zero.register_external_parameter(engine.module.borrower, engine.module.borrower.lent[-1])
            if i == 3:
                lent = engine.module.borrower.lent
                with deepspeed.zero.GatheredParameters(lent, modifier_rank=0, fwd_module=engine.module.borrower):
                    if rank == 0 or stage < 3:
                        for weight in lent:
                            weight.data.mul_(0.5)
                for weight in plain.borrower.lent:
                    weight.data.mul_(0.5)
            if i == 5:
                deepspeed.zero.unregister_external_parameter(engine.module.borrower, engine.module.borrower.lent.pop())
                plain.borrower.lent.pop()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            plain(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(x.to(dtype)))
            engine.step()
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {}
        for name, value in whole_values(engine.module).items():
            wanted = plain.get_parameter(name).detach().to(value.dtype)
            torch.testing.assert_close(value, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_lent_between_steps_train_as_in_plain_pytorch(stage: int, world_size: int, dtype: torch.dtype) -> None:
    run_ranks(world_size, lends, stage, dtype)
