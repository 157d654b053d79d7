"""The arguments of save_checkpoint and load_checkpoint, what they return, and what other libraries' helpers find."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

import deepspeed
from deepspeed.checkpoint.__main__ import main
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.engine.checkpoints import _cure
from deepspeed.engine.data import DeepSpeedDataLoader
from deepspeed.utils.errors import CheckpointError
from tests.checkpoint.runs import batches_of, config_of, resume, save_and_go_on, train
from tests.engine.runs import engine_of, whole_weights
from tests.harness import run_ranks
from tests.models import build


class Grown(nn.Module):
    """The plain model with a part more, or a part less."""

    def __init__(self, has_more: bool) -> None:
        super().__init__()
        self.inner = build("mlp")
        if has_more:
            self.extra = nn.Linear(3, 3)


def _load_other(rank: int, world_size: int, folder: Path, saves_more: bool) -> tuple[str, bool, int]:
    with engine_of(Grown(saves_more), config_of(2, world_size)) as engine:
        engine.save_checkpoint(str(folder))
    model = Grown(not saves_more)
    before = [p.detach().clone() for p in model.parameters()] if not saves_more else []
    with engine_of(model, config_of(3, world_size)) as engine:
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(str(folder))
        engine.load_checkpoint(str(folder), load_module_strict=False)
        batches = batches_of(model.inner, 1)
        weights = whole_weights(engine)
    kept = not before or torch.equal(weights.get("extra.weight", before[-2]), before[-2])
    return str(caught.value), kept, len(batches)


@pytest.mark.parametrize("saves_more", [True, False])
def test_added_and_removed_parameters_are_an_error_or_a_report(tmp_path: Path, saves_more: bool) -> None:
    text, kept, _ = run_ranks(2, _load_other, tmp_path, saves_more)[0]
    assert ("Not in the model, and ignored" if saves_more else "Not in the checkpoint, and unchanged") in text
    assert "extra.weight" in text
    assert "load_module_strict=False loads what fits" in text
    assert kept


def _train_after_growth(rank: int, world_size: int, folder: Path) -> int:
    """Save with trained states, load into a model with a parameter more, and train that."""
    old, new = build("mlp"), build("mlp")
    with engine_of(old, config_of(1, world_size)) as engine:
        train(engine, batches_of(old, 2), rank, world_size)
        engine.save_checkpoint(str(folder))
    new.blocks[1][0].register_parameter("scale", nn.Parameter(torch.ones(16)))
    with engine_of(new, config_of(1, world_size)) as engine:
        engine.load_checkpoint(str(folder), load_module_strict=False)
        train(engine, batches_of(new, 2), rank, world_size)
        return engine.global_steps


def test_a_grown_model_trains_on(tmp_path: Path) -> None:
    assert run_ranks(2, _train_after_growth, tmp_path) == [4, 4]


def _with_groups(rank: int, world_size: int, folder: Path, loads: bool) -> list[tuple[float, int]]:
    model = build("mlp")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0, "lr": 1e-4}]
    config = config_of(2, world_size)
    del config["scheduler"]
    if loads:
        groups = [{"params": rest}, {"params": decayed}]
    with engine_of(model, config, model_parameters=groups) as engine:
        if loads:
            engine.load_checkpoint(str(folder))
        else:
            train(engine, batches_of(model, 2), rank, world_size)
            engine.save_checkpoint(str(folder))
        return [(group["weight_decay"], group["lr"]) for group in engine.optimizer.param_groups]


def test_groups_may_change_their_order(tmp_path: Path) -> None:
    saved = run_ranks(2, _with_groups, tmp_path, False)[0]
    assert run_ranks(2, _with_groups, tmp_path, True)[0] == saved[::-1]


def _load_parts(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    model = build("mlp")
    found: dict[str, Any] = {}
    with engine_of(model, config_of(1, world_size)) as engine:
        found["nothing"] = engine.load_checkpoint(str(folder / "empty"))
        engine.load_checkpoint(str(folder), load_module_only=True)
        found["module_only"] = (engine.global_steps, len(engine.optimizer.state))
        engine.load_checkpoint(str(folder), load_optimizer_states=False, load_lr_scheduler_states=False)
        found["no_optimizer"] = (
            engine.global_steps,
            len(engine.optimizer.state),
            engine.lr_scheduler.last_batch_iteration,
        )
        with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere\. There are: global_step3"):
            engine.load_checkpoint(str(folder), tag="nowhere")
        with pytest.raises(ValueError, match="a folder is needed"):
            engine.save_checkpoint("")
        with pytest.raises(CheckpointError, match=r"client_state\.model is a .*Mlp"):
            engine.save_checkpoint(str(folder), tag="x", client_state={"model": model})
        with pytest.raises(CheckpointError, match="not the name of a folder below"):
            engine.save_checkpoint(str(folder), tag="../x")
        engine.load_checkpoint(str(folder), custom_load_fn=lambda src, dst: dst.load_state_dict(src))
        found["custom"] = whole_weights(engine)
    config = config_of(3, world_size)
    del config["optimizer"], config["scheduler"]
    with engine_of(build("mlp"), config) as engine:  # an engine that only evaluates
        engine.load_checkpoint(str(folder), load_optimizer_states=False)
        found["evaluation"] = engine._zero3_consolidated_16bit_state_dict()
    return found


def test_parts_of_a_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    saved = run_ranks(2, save_and_go_on, tmp_path, 2)[0]
    found = run_ranks(2, _load_parts, tmp_path)[0]
    assert found["nothing"] == (None, None)
    assert found["module_only"] == (0, 0)
    assert found["no_optimizer"] == (3, 0, -1)
    for key in ("custom", "evaluation"):
        assert all(torch.equal(found[key][name], value) for name, value in saved.weights.items()), key
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _change_optimizer(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """What kinds of state an engine has, by optimizer, that loaded a checkpoint of AdamW and went on for a step."""
    makers = {
        "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
        "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-3),
        "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
        "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    }
    found = {}
    for name, make in makers.items():
        model = build("mlp")
        config = {**config_of(2, world_size), "zero_allow_untested_optimizer": True}
        config.pop("optimizer")
        batches = batches_of(model, 2)
        with engine_of(model, config, optimizer=make(list(model.parameters()))) as engine:
            if name == "AdamW":
                train(engine, batches[:1], rank, world_size)
                engine.save_checkpoint(str(folder))
            engine.load_checkpoint(str(folder))
            train(engine, batches[1:], rank, world_size)
            found[name] = sorted({key for state in engine.optimizer.optimizer.state.values() for key in state})
    return found


def test_an_optimizer_of_another_class_takes_the_state_over_or_starts_anew(tmp_path: Path) -> None:
    assert run_ranks(2, _change_optimizer, tmp_path)[0] == {
        "AdamW": ["exp_avg", "exp_avg_sq", "step"],
        "Adam": ["exp_avg", "exp_avg_sq", "step"],
        "Adagrad": ["step", "sum"],
        "NAdam": ["exp_avg", "exp_avg_sq", "mu_product", "step"],
        "SGD": ["momentum_buffer"],
    }


class SumsFromTheStart(torch.optim.Optimizer):
    """Adagrad as torch 2.6 has it: the constructor makes the sums, and a step expects them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"] = torch.full_like(param, 0.25)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Each number by its own sum."""
        for group in self.param_groups:
            for param in group["params"]:
                total = self.state[param]["sum"].addcmul_(param.grad, param.grad)
                param.addcdiv_(param.grad, total.sqrt(), value=-group["lr"])


def _start_anew(rank: int, world_size: int, folder: Path, stage: int, tier: str) -> list[dict[str, Any]]:
    """Weights after a step with the checkpoint of another class: its states tried, and not even looked at."""
    config = {**config_of(stage, world_size), "zero_allow_untested_optimizer": True}
    del config["scheduler"]
    found = []
    for loads in (None, True, False):
        model = build("mlp")
        batches = batches_of(model, 1)
        if loads is not None:
            config.pop("optimizer", None)
            if tier != "none":
                config["zero_optimization"]["offload_optimizer"] = {"device": tier, "nvme_path": str(folder / "nvme")}
        optimizer = None if loads is None else SumsFromTheStart(list(model.parameters()))
        with engine_of(model, config, optimizer=optimizer) as engine:
            if loads is not None:
                engine.load_checkpoint(str(folder), load_optimizer_states=loads)
            train(engine, batches, rank, world_size)
            if loads is None:
                engine.save_checkpoint(str(folder))
            found.append(whole_weights(engine))
    return found


@pytest.mark.parametrize(("stage", "tier"), [(0, "none"), (2, "none"), (2, "cpu"), (3, "nvme")])
def test_states_that_a_constructor_makes_are_there_after_another_class_s_checkpoint(
    stage: int, tier: str, tmp_path: Path
) -> None:
    before, tried, fresh = run_ranks(2, _start_anew, tmp_path, stage, tier)[0]
    assert [name for name, value in fresh.items() if not torch.equal(tried[name], value)] == []
    assert [name for name, value in before.items() if torch.equal(tried[name], value)] == []


def _call_wrongly(rank: int, world_size: int, folder: Path) -> list[str]:
    """Calls that are wrong on one rank; the words that this rank gets."""

    class Broken(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("no state")

    words = []

    def collect(call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except (ValueError, KeyError) as error:
            words.append(str(error))

    with engine_of(build("mlp"), config_of(1, world_size)) as engine:
        is_last = rank == world_size - 1
        save, load = engine.save_checkpoint, engine.load_checkpoint
        collect(save, "" if is_last else str(folder))
        collect(save, str(folder), client_state=[1] if is_last else None)
        collect(save, str(folder), client_state={"ds_version": 1} if is_last else {})
        collect(save, str(folder), tag=" blank ")
        collect(save, str(folder), tag="a/.b")
        save(str(folder), tag="good")
        collect(load, "" if is_last else str(folder))
        collect(load, str(folder), tag="good" if is_last else None)
        collect(load, str(folder), load_optimizer_states=is_last)
        if is_last:
            engine.lr_scheduler = Broken(torch.optim.SGD([torch.zeros(1)]))
        collect(save, str(folder), tag="bad")
    return words


def test_a_wrong_call_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, last = run_ranks(2, _call_wrongly, tmp_path)
    assert first == last
    expected = [
        "[rank 1] save_checkpoint(save_dir=''): a folder is needed",
        "[rank 1] client_state is a list; it has to be a dict",
        "[rank 1] client_state['ds_version']: load_checkpoint gives this key another meaning",
        "tag ' blank ' begins with a dot or has blanks at its ends",
        "tag 'a/.b' begins with a dot",
        "[rank 1] load_checkpoint(load_dir=''): a folder is needed",
        "ranks differ in tag: {0: None, 1: 'good'}",
        "ranks differ in load_optimizer_states: {0: False, 1: True}",
        "[rank 1] RuntimeError: no state",
    ]
    assert len(first) == len(expected)
    for words, found in zip(expected, first, strict=True):
        assert words in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "latest", "zero_to_fp32.py"]


def test_a_folder_that_is_itself_a_checkpoint_gets_the_right_call(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "manifest.json").touch()
    assert _cure(tmp_path / "tag") == f"It is a checkpoint itself: load_checkpoint({str(tmp_path)!r}, tag='tag')."
    assert _cure(tmp_path) == "Give tag=..., one of tag."


def test_what_loading_returns(tmp_path: Path) -> None:
    run_ranks(2, save_and_go_on, tmp_path, 3)
    path, client = run_ranks(2, resume, tmp_path, 3)[0].loaded
    assert path == str(tmp_path / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert client is not None
    assert client["step"] == 3
    assert client["tensor"].tolist() == [0, 1, 2]
    assert client["ds_version"] == deepspeed.__version__


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_can_be_left_out(tmp_path: Path, stage: int) -> None:
    run_ranks(2, _save_without_frozen, tmp_path, stage)
    state = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert "blocks.0.0.weight" in state
    assert "blocks.1.0.weight" not in state
    run_ranks(2, resume, tmp_path, stage, "frozen", load={"load_module_strict": False})


def _save_without_frozen(rank: int, world_size: int, folder: Path, stage: int) -> None:
    model = build("frozen")
    with engine_of(model, config_of(stage, world_size)) as engine:
        train(engine, batches_of(model, 3), rank, world_size)
        engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)


@pytest.mark.parametrize(
    ("stage", "extra"), [(0, {}), (2, {"bf16": {"enabled": True}}), (3, {"bf16": {"enabled": True}})]
)
def test_helpers_of_other_libraries_find_their_files(tmp_path: Path, stage: int, extra: dict[str, Any]) -> None:
    """What Lightning's converter and Transformers' tests do, step by step."""
    run_ranks(2, save_and_go_on, tmp_path, stage, **extra)
    folder = tmp_path / (tmp_path / "latest").read_text()
    tools = deepspeed.utils.zero_to_fp32
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step3"]
    assert (tmp_path / "zero_to_fp32.py").exists()
    if stage:
        files = tools.get_optim_files(folder)
        assert [Path(file).name for file in files] == [
            f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)
        ]
        assert torch.load(files[0], weights_only=True)["optimizer_state_dict"]["zero_stage"] == stage
    model = torch.load(tools.get_model_state_file(folder, stage), weights_only=True)
    assert (
        Path(tools.get_model_state_file(folder, stage)).name
        == ("zero_pp_rank_0_" if stage == 3 else "") + "mp_rank_00_model_states.pt"
    )
    assert {"module", "param_shapes", "ds_version", "global_steps", "dp_world_size", "step", "tensor"} <= model.keys()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("is_safe", [True, False])
def test_consolidation_writes_hugging_faces_layout(tmp_path: Path, stage: int, is_safe: bool) -> None:
    from safetensors.torch import load_file

    saved = run_ranks(2, save_and_go_on, tmp_path / "ckpt", stage, "gpt_tied", bf16={"enabled": True})[0]
    tools = deepspeed.utils.zero_to_fp32
    tools.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "ckpt", tmp_path / "out", "8KB", is_safe)
    shards = sorted((tmp_path / "out").glob("*.safetensors" if is_safe else "*.bin"))
    assert len(shards) > 2
    assert (tmp_path / "out" / f"{'model.safetensors' if is_safe else 'pytorch_model.bin'}.index.json").exists()
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= load_file(shard) if is_safe else torch.load(shard, weights_only=True)
    for name, value in saved.weights.items():
        if name in state:
            assert torch.equal(state[name], value.float()), name
    assert saved.weights.keys() - state.keys() <= ({"head.weight"} if is_safe else set())
    lazy = tools.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ckpt", lazy_mode=True)
    assert torch.equal(lazy["head.weight"].contiguous(), saved.weights["head.weight"])
    model = tools.load_state_dict_from_zero_checkpoint(build("gpt_tied"), tmp_path / "ckpt")
    assert torch.equal(model.state_dict()["head.weight"], saved.weights["head.weight"])
    # What loaders would take before, or beside, the new files must not stay.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "config.json").touch()
    for size, expected in (("0", {shards[0].name[: shards[0].name.index("-0")] + shards[0].suffix}), ("8KB", names)):
        tools.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "ckpt", tmp_path / "out", size, is_safe)
        assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"config.json"}


def test_consolidation_says_what_is_missing(tmp_path: Path) -> None:
    tools = deepspeed.utils.zero_to_fp32
    with pytest.raises(ValueError, match="has no file 'latest'"):
        tools.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        tools.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "nowhere")


def _export(rank: int, world_size: int, folder: Path, name: str) -> bool:
    config = config_of(3, world_size, zero={"stage3_gather_16bit_weights_on_model_save": True}, bf16={"enabled": True})
    with engine_of(build("gpt_tied"), config) as engine:
        return bool(engine.save_16bit_model(str(folder), name))


def test_the_live_model_is_exported_as_safetensors_and_as_a_torch_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert run_ranks(2, _export, tmp_path, "model.safetensors") == [True, True]
    assert run_ranks(2, _export, tmp_path, "pytorch_model.bin") == [True, True]
    whole, safe = (
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True),
        load_file(tmp_path / "model.safetensors"),
    )
    assert all(torch.equal(whole[name], value) and value.dtype == torch.bfloat16 for name, value in safe.items())
    assert len(whole) == len(safe) + 1  # a tied weight has one name in safetensors


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, save_and_go_on, tmp_path / "a", 2)
    run_ranks(1, save_and_go_on, tmp_path / "b", 0, num_before=2)

    def status(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        return caught.value.code

    assert status("inspect", str(tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("blocks.0.0.weight", "optim.exp_avg", "world_size: 2", "global_steps: 3"))
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN, "the process is the caller's"
    assert status("diff", str(tmp_path / "a"), str(tmp_path / "a" / "global_step3")) == 0
    assert status("diff", str(tmp_path / "a"), str(tmp_path / "b")) == 1
    printed = capsys.readouterr().out
    assert "elements differ, by at most" in printed
    assert "world_size: 2 and 1" in printed
    assert status("inspect", str(tmp_path)) == 2
    ds_to_universal(
        ["--input_folder", str(tmp_path / "a" / "global_step3"), "--output_folder", str(tmp_path / "a" / "u")]
    )
    assert "Nothing had to be converted" in capsys.readouterr().out
    assert (tmp_path / "a" / "latest_universal").read_text() == "u"
    run_ranks(3, resume, tmp_path / "a", 3, checkpoint={"load_universal": True})


class Numbers(torch.utils.data.Dataset[Tensor]):
    """Samples that say which they are."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Samples without an index, drawn as they come."""

    def __iter__(self) -> Any:
        return (torch.tensor(i + torch.rand(()).item()) for i in range(50))


def test_workers_go_on_where_they_stopped() -> None:
    def loader() -> DeepSpeedDataLoader:
        torch.manual_seed(1)
        return DeepSpeedDataLoader(Augmented(), 5, num_local_io_workers=2)

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == whole[3:]


class Augmented(Numbers):
    """Samples with noise of the worker that makes them."""

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(())


def _read_on(
    rank: int, world_size: int, folder: Path, kind: str, stops_at: int | None
) -> tuple[list[Any], list[float]]:
    """14 batches of 3.x epochs, in one go (None), or the first `stops_at` and then, in another engine, the rest."""
    torch.manual_seed(3)
    np.random.seed(3)
    seen: list[Any] = []
    draws: list[float] = []
    config = config_of(1, world_size)
    kwargs = {"data_sampler": RandomSampler(Numbers())} if kind == "sampler" else {}
    dataset: Any = Stream() if kind == "stream" else Numbers()
    for part, limit in enumerate([14] if stops_at is None else [stops_at, 14]):
        if part:
            torch.manual_seed(99)
        with engine_of(build("mlp"), config) as engine:
            engine.training_dataloader = engine.deepspeed_io(dataset, 5, **kwargs)
            loader = deepspeed.utils.RepeatingLoader(engine.training_dataloader)
            if part:
                engine.load_checkpoint(str(folder))
            while len(seen) < limit:
                seen.append(next(loader).tolist())
                draws.append(torch.rand(()).item() + np.random.rand())
            if stops_at is not None and not part:
                engine.save_checkpoint(str(folder))
    return seen, draws


@pytest.mark.parametrize("kind", ["plain", "sampler", "stream"])
@pytest.mark.parametrize("stops_at", [2, 5, 7])
def test_data_and_random_numbers_go_on_where_they_stopped(tmp_path: Path, kind: str, stops_at: int) -> None:
    whole = run_ranks(2, _read_on, tmp_path, kind, None)
    assert run_ranks(2, _read_on, tmp_path, kind, stops_at) == whole
