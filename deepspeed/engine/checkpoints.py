"""The engine's checkpoint methods: what the run is made of, handed to `checkpoint`, and taken back from it.

A mixin of the engine. `save` and `load` there know flats, files and ranks; here are the parts that only the engine
knows: counters, schedule, loss scale, data loader, and when gradients and unsharded copies have to go.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import compat, export, rng
from deepspeed.checkpoint.background import Background, SaveTimes
from deepspeed.checkpoint.find import checkpoint_folder, latest_tag, open_checkpoint
from deepspeed.checkpoint.load import (
    Names,
    check_names,
    has_unquantized,
    load_optimizer,
    load_weights,
    pair_names,
    publish,
)
from deepspeed.checkpoint.manifest import FILE_NAME as MANIFEST
from deepspeed.checkpoint.names import GlobalNames
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.save import Save, SaveRequest
from deepspeed.checkpoint.source import Source
from deepspeed.checkpoint.staging import BLOCK, FEW, Staging
from deepspeed.checkpoint.subject import Subject
from deepspeed.checkpoint.zero_to_fp32 import state_dict_of
from deepspeed.comm.exchange import Pending
from deepspeed.comm.interrupts import HELD
from deepspeed.config import Config
from deepspeed.engine.accumulation import Accumulation
from deepspeed.engine.schedules import LEARNING_RATE, Schedules
from deepspeed.mesh import Mesh
from deepspeed.utils.errors import CheckpointError, DeepSpeedError, NotAvailableError
from deepspeed.utils.logging import log_dist, warn_once
from deepspeed.zero.access import GatheredParameters
from deepspeed.zero.build import Built
from deepspeed.zero.feedback import feedback_state, take_feedback
from deepspeed.zero.hooks import BackwardWatch
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.reduce import Reducer

RESERVED = ("ds_version", "ds_config")
"""Keys of the client state that `load_checkpoint` adds."""


class Checkpoints:
    """What an engine keeps between saves: staging memory, the save in flight, what the last one cost."""

    def __init__(self, config: Config) -> None:
        section = config.checkpoint
        self.is_async = bool(
            section.async_save
            or (section.writer is not None and section.writer.decoupled)
            or config.datastates_ckpt is not None
            or config.nebula.enabled
        )
        self.keep_last_n = section.keep_last_n or (
            config.nebula.num_of_version_in_retention if config.nebula.enabled else None
        )
        cache = config.datastates_ckpt.host_cache_size if config.datastates_ckpt is not None else None
        self._limit = section.staging_bytes or (int(cache * 2**30) if cache else None)
        self.background = Background()
        self.times = SaveTimes()
        self._staging = Staging(FEW)
        _warn_of_keys_without_effect(config)

    def staging_for(self, nbytes: int, ranks_on_node: int) -> Staging:
        """Blocks for a save of `nbytes` by this rank: all of it if asynchronous, within the limit."""
        if self.is_async:
            limit = self._limit or psutil.virtual_memory().available // (2 * ranks_on_node)
            self._staging.grow(min(nbytes, max(limit, FEW * BLOCK)) // BLOCK + 4)
        return self._staging


def _warn_of_keys_without_effect(config: Config) -> None:
    keys = []
    writer = config.checkpoint.writer
    if writer is not None:
        keys += [f"checkpoint.writer.{name}" for name in sorted(writer.model_fields_set - {"decoupled"})]
    if config.nebula.enabled:
        keys += [
            f"nebula.{name}"
            for name in sorted(config.nebula.model_fields_set - {"enabled", "num_of_version_in_retention"})
        ]
    if config.datastates_ckpt is not None:
        given = config.datastates_ckpt.model_fields_set | set(config.datastates_ckpt.model_extra or {})
        keys += [f"datastates_ckpt.{name}" for name in sorted(given - {"host_cache_size"})]
    if keys:
        warn_once(f"no effect on how checkpoints are written here: {', '.join(keys)}.")


class CheckpointedRun(Protocol):
    """What these methods need of an engine."""

    module: nn.Module
    mesh: Mesh
    watch: BackwardWatch
    accumulation: Accumulation
    zero_optimizer: ZeroOptimizer | None
    training_dataloader: Any  # a script's own may be anything that gives batches
    global_steps: int
    global_samples: int
    skipped_steps: int
    _config: Config
    _built: Built
    _reducer: Reducer
    _schedules: Schedules
    _checkpoints: Checkpoints

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per rank and micro-batch."""
        ...

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Parameters whose gradients are reduced sparse."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget this step's gradients."""
        ...

    def empty_partition_cache(self) -> None:
        """Reshard what is unsharded."""
        ...

    def _take_over_edits(self) -> None:
        """Have what the script changed about the model in its place."""
        ...


class CheckpointMethods:
    """Mixin of the engine."""

    def save_checkpoint(
        self: CheckpointedRun,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write weights, optimizer, schedule, counters, loader and random state to `save_dir/tag`, whole or not at all.

        tag: default "global_step<N>". client_state: numbers, strings, containers, tensors and arrays of the user's, given
        back by `load_checkpoint`. Writes `save_dir/latest` unless told not to. Collective. With `checkpoint.async_save`
        returns once the state is copied; `wait_for_checkpoint` says when it is durable.

        Returns True. Raises CheckpointError on every rank if any rank could not write its part; then the checkpoints that
        were there are untouched. Raises ValueError without `save_dir`.
        """
        with HELD:
            HELD.before_save()
            return _save(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    def wait_for_checkpoint(self: CheckpointedRun) -> SaveTimes:
        """Wait until the last asynchronous save is durable; what it cost. Raises its error on every rank."""
        engine = self
        engine._checkpoints.background.wait()
        return engine._checkpoints.times

    def load_checkpoint(
        self: CheckpointedRun,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Continue from a checkpoint of any ZeRO stage, world size, offload setting or precision.

        tag: default what `load_dir/latest` says; without that file nothing is loaded and (None, None) returned.
        load_module_strict: False keeps parameters that the checkpoint lacks, ignores those that the model lacks, and says so.
        load_module_only: weights alone; counters, schedule, optimizer and random state stay.
        custom_load_fn: called as `custom_load_fn(src=state_dict, dst=module)` instead of loading the weights.

        Returns the path of the model state and the client state. Collective. Raises CheckpointError on every rank.
        """
        engine = self
        engine._checkpoints.background.wait()
        ranks = Ranks(engine.mesh)
        what = f"load_checkpoint({str(load_dir)!r}, tag={tag!r})"
        chosen = {
            "tag": tag,
            "load_module_strict": bool(load_module_strict),
            "load_optimizer_states": bool(load_optimizer_states),
            "load_lr_scheduler_states": bool(load_lr_scheduler_states),
            "load_module_only": bool(load_module_only),
            "custom_load_fn": "given" if custom_load_fn is not None else None,
        }
        _check_load_arguments(ranks, load_dir, chosen)
        folder = _choose_folder(engine, ranks, what, Path(load_dir), tag)
        if folder is None:
            return None, None
        subject = _subject(engine)
        has_optimizer = engine.zero_optimizer is not None and load_optimizer_states and not load_module_only
        engine._take_over_edits()
        opened = ranks.together(what, lambda: _open(folder, subject))
        _, source, names, state = opened
        used = set().union(*ranks.all(names.used)) if engine.mesh.size("whole") > 1 else names.used
        if custom_load_fn is None and any(ranks.all(has_unquantized(names, source))):
            custom_load_fn = partial(_load_whole, strict=load_module_strict)
        else:
            is_strict = load_module_strict and custom_load_fn is None
            ranks.together(what, lambda: check_names(names, source, used, is_strict))
        _clear_for_load(engine)
        _load_values(engine, ranks, what, subject, opened, has_optimizer, custom_load_fn)
        is_same = _layout(engine.mesh) == _layout_of(source.about)
        if not load_module_only:
            # With other ranks, what is known best is where the data of the same data-parallel rank stood.
            number = ranks.rank if is_same else engine.mesh.rank("batch")
            own = ranks.together(what, lambda: source.rank_state(number)) or {}
            _load_rest(engine, source, state, own, has_optimizer, load_lr_scheduler_states)
        if not is_same:
            log_dist(f"{folder}: resharded {_said(_layout_of(source.about))} -> {_said(_layout(engine.mesh))}", [0])
        client = {**state.get("client_state", {}), "ds_version": source.about.get("deepspeed_version")}
        model_rank = engine.mesh.rank("model") if is_same else 0
        return str(folder / compat.model_file_name(int(source.about["zero_stage"]), 0, model_rank)), client

    # Weights alone. ------------------------------------------------------------------------------------------------

    def module_state_dict(
        self: CheckpointedRun,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """The model's state dict; sharded parameters are placeholders that name the cure when used."""
        engine = self
        state = engine.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, param in engine.module.named_parameters():
                if not param.requires_grad:
                    state.pop(prefix + name, None)
        return state

    def load_module_state_dict(
        self: CheckpointedRun,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = False,
    ) -> None:
        """Load `checkpoint["module"]`, a whole state dict that every rank has, into the model and the masters. Collective."""
        engine = self
        engine._take_over_edits()
        with _whole_module(engine):
            if custom_load_fn is not None:
                custom_load_fn(src=checkpoint["module"], dst=engine.module)
            else:
                engine.module.load_state_dict(checkpoint["module"], strict=strict)

    def _zero3_consolidated_16bit_state_dict(
        self: CheckpointedRun, exclude_frozen_parameters: bool = False
    ) -> dict[str, Tensor] | None:
        """The whole state dict on the CPU of rank 0, None elsewhere; one bucket whole at a time. Collective."""
        engine = self
        return export.consolidated_state_dict(_subject(engine), exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def save_16bit_model(
        self: CheckpointedRun,
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole weights in the model's dtype. Collective.

        A name that ends in ".safetensors" gives Hugging Face's layout: one file, or with more than 5 GB shards and an
        index; tensors go to disk one after the other. Any other name gives one file as torch.save writes it. Files appear
        whole or not at all. At stage 3 this needs `zero_optimization.stage3_gather_16bit_weights_on_model_save`, else
        nothing is written and False returned.
        """
        engine = self
        zero = engine._config.zero_optimization
        if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
            warn_once(
                "save_16bit_model wrote nothing: at ZeRO stage 3 it gathers the whole model on rank 0, which has to be allowed "
                "with zero_optimization.stage3_gather_16bit_weights_on_model_save = true."
            )
            return False
        engine._take_over_edits()
        _refuse_divided(engine, "save_16bit_model")
        export.save_weights(_subject(engine), Path(save_dir), save_filename, exclude_frozen_parameters)
        return True

    save_fp16_model = save_16bit_model


def _subject(engine: CheckpointedRun) -> Subject:
    return Subject(engine.module, engine._built, engine.zero_optimizer, engine.mesh)


def _refuse_divided(engine: CheckpointedRun, what: str) -> None:
    if _subject(engine).is_cut_unknown:
        raise NotAvailableError(
            f"{what}: the model is divided over {engine.mesh.size('model')} model-parallel ranks, of which none has it whole.\n"
            "  Use save_checkpoint, and put the weights together with `python -m deepspeed.checkpoint export`."
        )


def _check_arguments(ranks: Ranks, save_dir: Any, client_state: Any) -> None:
    """Raise on every rank where any rank gave what cannot be used: often only the first is given a client state."""
    wrong: tuple[type[Exception], str] | None = None
    if not save_dir:
        wrong = DeepSpeedError, f"save_checkpoint(save_dir={save_dir!r}): a folder is needed."
    elif client_state is not None and not isinstance(client_state, Mapping):
        text = f"client_state is a {type(client_state).__name__}; it has to be a dict.\n  Put the value under a name of its own."
        wrong = CheckpointError, text
    else:
        taken = [key for key in client_state or () if key in RESERVED]
        if taken:
            text = f"client_state[{taken[0]!r}]: load_checkpoint gives this key another meaning. Choose another name."
            wrong = KeyError, text
    _raise_first(ranks, wrong)


def _check_load_arguments(ranks: Ranks, load_dir: Any, chosen: Mapping[str, Any]) -> None:
    """Raise on every rank where ranks would load different things, and so wait for each other for ever."""
    wrong = (DeepSpeedError, f"load_checkpoint(load_dir={load_dir!r}): a folder is needed.") if not load_dir else None
    _raise_first(ranks, wrong)
    everyone = ranks.all(dict(chosen))
    for key in chosen:
        values = {rank: theirs[key] for rank, theirs in zip(ranks.members, everyone, strict=True)}
        if any(value != everyone[0][key] for value in values.values()):
            raise CheckpointError(
                f"load_checkpoint: ranks differ in {key}: {values}.\n  Every rank has to make the same call."
            )


def _raise_first(ranks: Ranks, wrong: tuple[type[Exception], str] | None) -> None:
    for rank, found in zip(ranks.members, ranks.all(wrong), strict=True):
        if found is not None:
            kind, text = found
            raise kind(text if ranks.world_size == 1 else f"[rank {rank}] {text}")


def _cure(folder: Path) -> str:
    """What a caller whose folder has no `latest` probably meant."""
    if (folder / MANIFEST).exists() or any(folder.glob("*_model_states.pt")):
        return f"It is a checkpoint itself: load_checkpoint({str(folder.parent)!r}, tag={folder.name!r})."
    tags = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    return f"Give tag=..., one of {', '.join(tags[-8:])}." if tags else "There is no checkpoint in it."


def _save(
    engine: CheckpointedRun,
    save_dir: str,
    tag: str | None,
    client_state: dict[str, Any] | None,
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See `save_checkpoint`."""
    begun = time.perf_counter()
    checkpoints: Checkpoints = engine._checkpoints
    checkpoints.background.wait()
    waited = time.perf_counter() - begun
    engine.watch.end()
    if engine._reducer.saw_backward:
        warn_once("save_checkpoint between the micro-batches of a step: the gradients so far are not saved.")
    ranks = Ranks(engine.mesh)
    _check_arguments(ranks, save_dir, client_state)
    engine._take_over_edits()
    tag = _agree_on_tag(engine, ranks, str(tag) if tag is not None else f"global_step{engine.global_steps}")

    def make_request() -> SaveRequest:
        loader = engine.training_dataloader
        return SaveRequest(
            folder=Path(save_dir).absolute(),  # written later, where the script may have gone elsewhere
            tag=tag,
            about=_about(engine),
            shared=_shared_state(engine, dict(client_state or {})),
            own=_own_state(engine, loader),
            save_latest=save_latest,
            exclude_frozen=exclude_frozen,
            keep_last_n=checkpoints.keep_last_n,
            is_node_local=engine._config.checkpoint.use_node_local_storage,
        )

    request = ranks.together(f"save_checkpoint({str(save_dir)!r}, tag={tag!r})", make_request)
    hosts = ranks.all(socket.gethostname())
    num_near = hosts.count(socket.gethostname())
    save = Save(_subject(engine), request, ranks, lambda nbytes: checkpoints.staging_for(nbytes, num_near))
    save.fill()
    times = checkpoints.times = SaveTimes(waited_ms=waited * 1e3, nbytes=save.nbytes)
    if checkpoints.is_async:
        times.blocked_ms = (time.perf_counter() - begun) * 1e3
        checkpoints.background.start(save, times, begun)
    else:
        save.commit()
        times.blocked_ms = times.total_ms = (time.perf_counter() - begun) * 1e3
    log_dist(f"checkpoint {request.tag}: training was blocked for {times.blocked_ms:.0f} ms", [0])
    return True


def _agree_on_tag(engine: CheckpointedRun, ranks: Ranks, tag: str) -> str:
    """The first rank's tag; what happens where others name another is `checkpoint.tag_validation`."""
    tags = ranks.all(tag)
    mode = engine._config.checkpoint.tag_validation
    if len(set(tags)) > 1 and mode != "Ignore":
        text = f"save_checkpoint: ranks name different tags: {dict(zip(ranks.members, tags, strict=True))}."
        if mode == "Fail":
            raise CheckpointError(f"{text}\n  Give every rank the same tag.")
        log_dist(f"{text} The first is used.", [0], 30)
    return tags[0]


def _about(engine: CheckpointedRun) -> dict[str, Any]:
    return {
        "deepspeed_version": sys.modules["deepspeed"].__version__,
        "torch_version": torch.__version__,
        "zero_stage": engine._config.zero_optimization.stage,
        "world_size": engine.mesh.size("job"),
        **({"model_parallel_size": engine.mesh.size("model")} if engine.mesh.size("model") > 1 else {}),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "bf16": engine._config.bf16.enabled,
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        **({"sparse": sorted(engine.sparse_tensor_module_names)} if engine.sparse_tensor_module_names else {}),
    }


def _shared_state(engine: CheckpointedRun, client_state: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"client_state": client_state}
    schedules = engine._schedules.state_dict()
    if LEARNING_RATE in schedules:
        state[LEARNING_RATE] = schedules.pop(LEARNING_RATE)
    if schedules:
        state["schedules"] = schedules
    if engine.zero_optimizer is not None:
        scale = engine.zero_optimizer.scale
        state["loss_scale"] = {"is_dynamic": scale.is_dynamic, **scale.state_dict()}
    return state


def _own_state(engine: CheckpointedRun, loader: Any) -> dict[str, Any]:
    """What is this rank's alone."""
    own: dict[str, Any] = {}
    if hasattr(loader, "state_dict"):
        own["loader"] = loader.state_dict()
    elif loader is not None:
        warn_once(
            f"save_checkpoint: a {type(loader).__name__} has no state_dict(), so where its data stands is not saved."
        )
    if errors := feedback_state(engine._reducer.gradients):
        own["feedback"] = errors
    reduction = engine.zero_optimizer.own_reduction if engine.zero_optimizer is not None else None
    return own if reduction is None else {**own, "compression": reduction.private_states()}


def _layout(mesh: Mesh) -> tuple[int, int]:
    """Data-parallel and model-parallel ranks of this run."""
    return mesh.size("average"), mesh.size("model")


def _layout_of(about: Mapping[str, Any]) -> tuple[int, int]:
    """The same of the run that wrote a checkpoint."""
    model = int(about.get("model_parallel_size", 1))
    return int(about["world_size"]) // model, model


def _said(layout: tuple[int, int]) -> str:
    data, model = layout
    return f"{data} ranks" if model == 1 else f"{data} x {model} ranks"


def _load_step(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:
        raise CheckpointError(
            f"{error}\n  The model is half loaded: load another checkpoint before using it."
        ) from error


class _Opened(NamedTuple):
    """A checkpoint, and how the model's names are paired with its own."""

    folder: Path
    source: Source
    names: Names
    state: dict[str, Any]


def _open(folder: Path, subject: Subject) -> _Opened:
    source = open_checkpoint(folder)
    return _Opened(folder, source, pair_names(subject, source), source.state())


def _choose_folder(engine: CheckpointedRun, ranks: Ranks, what: str, parent: Path, tag: str | None) -> Path | None:
    """The checkpoint's folder, as the first rank finds it; None, told, where no tag is given and `parent` names none."""
    if tag is None:
        tag = ranks.on_first(what, lambda: latest_tag(parent, engine._config.checkpoint.load_universal))
        if tag is None:
            cure = _cure(parent) if ranks.is_first else ""
            log_dist(f"{what}: no file {parent / 'latest'}, nothing is loaded. {cure}", [0], 30)
            return None
    return Path(ranks.on_first(what, lambda: str(checkpoint_folder(parent, str(tag)))))


def _load_values(
    engine: CheckpointedRun,
    ranks: Ranks,
    what: str,
    subject: Subject,
    opened: _Opened,
    has_optimizer: bool,
    custom_load_fn: Callable[..., Any] | None,
) -> None:
    """Weights and the optimizer's state. Collective; raises CheckpointError on every rank."""
    folder, source, names, state = opened
    published: list[Pending] = []
    if custom_load_fn is None:
        is_rounded = has_optimizer and not engine._config.zero_optimization.load_from_fp32_weights
        ranks.together(what, lambda: _load_step(lambda: load_weights(subject, source, names, is_rounded)))
        published = publish(subject)
    else:
        _load_custom(engine, custom_load_fn, source)
    try:
        if has_optimizer and "optimizer" not in state:
            log_dist(f"{folder} holds no optimizer state: it starts anew. Weights are loaded.", [0], 30)
        elif has_optimizer:
            ranks.together(what, lambda: _load_step(lambda: load_optimizer(subject, source, state, names)))
    finally:
        for pending in published:
            pending.wait()


def _clear_for_load(engine: CheckpointedRun) -> None:
    """Before memory is overwritten: no open backward, no gradients, no unsharded copies."""
    engine.watch.end()
    engine.zero_grad()
    engine.empty_partition_cache()
    engine.accumulation.set_micro_steps(0)


@contextmanager
def _whole_module(engine: CheckpointedRun) -> Iterator[None]:
    """The module whole and writable on every rank; what the first rank writes is kept, also in the masters."""
    with GatheredParameters(engine.module.parameters(), modifier_rank=0):
        yield
    for master in engine._built.masters:
        if not master.bucket.is_sharded:
            master.from_params()


def _load_whole(src: Mapping[str, Tensor], dst: nn.Module, strict: bool) -> None:
    """Whole weights into a module that may have quantized layers, which quantize them."""
    dst.load_state_dict(src, strict=strict)


def _load_custom(engine: CheckpointedRun, load: Callable[..., Any], source: Source) -> None:
    with _whole_module(engine):
        load(src=state_dict_of(source, None), dst=engine.module)


def _load_rest(
    engine: Any,
    source: Source,
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    has_optimizer: bool,
    has_schedule: bool,
) -> None:
    about = source.about
    engine.global_steps = int(about["global_steps"])
    engine.global_samples = int(about["global_samples"])
    engine.skipped_steps = int(about["skipped_steps"])
    saved = state.get("loss_scale")
    if has_optimizer and saved and saved["is_dynamic"] and engine.zero_optimizer.scale.is_dynamic:
        engine.zero_optimizer.scale.load_state_dict(saved)
    learning_rate = {LEARNING_RATE: state[LEARNING_RATE]} if has_schedule and LEARNING_RATE in state else {}
    engine._schedules.load_state_dict({**state.get("schedules", {}), **learning_rate})
    called, extras = GlobalNames(engine.module), state.get("module_extra", {})
    for prefix, module in engine.module.named_modules():
        if called(prefix) in extras and type(module).set_extra_state is not nn.Module.set_extra_state:
            module.set_extra_state(extras[called(prefix)])
    if hasattr(engine.training_dataloader, "load_state_dict") and "loader" in own:
        engine.training_dataloader.load_state_dict(own["loader"])
    same_ranks = _layout_of(about) == _layout(engine.mesh)
    if has_optimizer and engine.zero_optimizer.own_reduction is not None:
        if not same_ranks:
            log_dist("what compression had left out starts at zero: the number of ranks has changed.", [0])
        saved = own if same_ranks else source.rank_state(0) or {}
        engine.zero_optimizer.own_reduction.take_private_states(saved.get("compression", {}), is_own=same_ranks)
    if has_optimizer:
        found = take_feedback(engine._reducer.gradients, own.get("feedback", []) if same_ranks else [])
        if not found:
            why = "the checkpoint has none of these buckets" if same_ranks else "the number of ranks has changed"
            log_dist(f"LoCo: what quantised gradients had left out starts at zero: {why}.", [0])
    if has_optimizer and "rng" in own and same_ranks:
        rng.restore(own["rng"])
    elif has_optimizer and not same_ranks:
        log_dist("random generators are not restored: the number of ranks has changed.", [0])
    get_accelerator().synchronize()
