"""`deepspeed.initialize` and `deepspeed.add_config_arguments`: the door of the training API."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from deepspeed import comm
from deepspeed.assembly import assemble
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.engine.pipeline import DualPipeVEngine, PipelineEngine
from deepspeed.parallel.pipeline.module import DualPipeVModule, PipelineModule
from deepspeed.parallel.tensor import requested
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.init import Init


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed`, `--deepspeed_config FILE` and their deprecated spellings to a parser; returns it."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", action="store_true", help="train with DeepSpeed (read by the script)")
    group.add_argument("--deepspeed_config", type=str, default=None, help="DeepSpeed configuration file (JSON)")
    group.add_argument("--deepscale", action="store_true", help="deprecated spelling of --deepspeed")
    group.add_argument("--deepscale_config", type=str, default=None, help="deprecated spelling of --deepspeed_config")
    return parser


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Put a model under ZeRO; returns (engine, optimizer, training_dataloader, lr_scheduler).

    args: a namespace whose `deepspeed_config` names the configuration, if `config` does not.
    model: an nn.Module on any device, or built under `zero.Init`. It is cast, moved and sharded in place.
    optimizer: a torch.optim.Optimizer over the model's parameters, or a callable that makes one from parameters;
        overrides the configuration's.
    model_parameters: tensors or parameter-group dicts; default all of the model's.
    training_data: a dataset; the third result is then a loader of this rank's share.
    lr_scheduler: an object built on `optimizer`, or a callable that takes the optimizer; overrides the configuration's.
    distributed_port: port of the rendezvous, if torch.distributed is not up and the environment names none.
    mpu: tells the data-parallel group, where other parallelism divides the ranks.
    mesh_param: (data parallel size, sequence parallel size), in place of `sequence_parallel_size` in the configuration.
    config (or config_params): dict, path to JSON or Hjson, or base64 of JSON.

    Collective. Starts torch.distributed if it is not up. Raises DeepSpeedConfigError (a ValueError and AssertionError)
    for a configuration that contradicts itself, the ranks or the model; RankMismatchError if ranks differ.
    """
    Init.suspend_all()
    assemble.check_model(model)
    _refuse_inner_pipelines(model)
    config = choose_config(args, config, config_params)
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    _check_local_rank(args)
    kind = PipelineEngine if isinstance(model, PipelineModule) else DeepSpeedEngine
    kind = DualPipeVEngine if isinstance(model, DualPipeVModule) else kind
    engine = kind(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_device=mesh_param,
    )
    return engine, engine.zero_optimizer, engine.training_dataloader, engine.lr_scheduler


def _refuse_inner_pipelines(model: Any) -> None:
    """A pipeline inside of another module, a LightningModule say, would be averaged over its stages like copies of one model."""
    for name, inner in model.named_modules():
        if isinstance(inner, PipelineModule) and inner is not model and inner.num_stages > 1:
            raise DeepSpeedConfigError(
                f"{name} of the {type(model).__name__} is a PipelineModule of {inner.num_stages} stages, whose ranks have different "
                "layers.\n  Give deepspeed.initialize the PipelineModule itself, and train by engine.train_batch()."
            )


def tp_model_init(
    model: nn.Module, tp_size: int = 1, dtype: Any = None, config: Any = None, **kwargs: Any
) -> nn.Module:
    """Have the next `initialize` cut a model's layers over `tp_size` ranks; 1 leaves it as it is. Returns the model.

    kwargs: tp_group, the ranks that share layers. Raises DeepSpeedConfigError where calls contradict each other.
    """
    requested.request(int(tp_size), dtype, kwargs.get("tp_group"))
    return model


def choose_config(args: Any, config: Any, config_params: Any = None) -> Any:
    """The one configuration given, by argument or by `args.deepspeed_config`. Raises if none is, or more than one."""
    from_args = getattr(args, "deepspeed_config", None)
    deprecated = getattr(args, "deepscale_config", None)
    if deprecated is not None:
        warn_once("--deepscale_config is the old spelling of --deepspeed_config.")
        from_args = from_args or deprecated
    sources = {"config=": config, "config_params=": config_params, f"--deepspeed_config {from_args}": from_args}
    given = {source: value for source, value in sources.items() if value is not None}
    if not given:
        raise DeepSpeedConfigError(
            "deepspeed.initialize got no configuration.\n"
            "  Pass config=<dict or path>, or --deepspeed_config <path> on the command line."
        )
    if len(given) > 1:
        raise DeepSpeedConfigError(
            f"deepspeed.initialize got two configurations: {' and '.join(given)}.\n  Give one of them."
        )
    return next(iter(given.values()))


def _check_local_rank(args: Any) -> None:
    given = getattr(args, "local_rank", None)
    actual = os.environ.get("LOCAL_RANK")
    if isinstance(given, int) and given >= 0 and actual is not None and given != int(actual):
        raise DeepSpeedConfigError(
            f"args.local_rank = {given}, but the environment says LOCAL_RANK = {actual}.\n"
            "  Start the script with one launcher, and do not set local_rank yourself."
        )
