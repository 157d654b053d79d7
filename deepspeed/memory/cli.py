"""`deepspeed estimate MODEL`: what a run will need, before there is a machine for it.

Called by the launcher's command. MODEL is a Hugging Face config.json (or the folder it is in), built on the meta device, or
`file.py:function` / `package.module:function`, where the function returns a model or (model, batch).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.config import read_config
from deepspeed.memory.html import write_page
from deepspeed.memory.options import Limits, Survey, survey
from deepspeed.utils.arguments import amount, whole
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError
from deepspeed.zero.policy import Tier

GIB = 2**30


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed estimate",
        description="Predict the peak memory of a rank for every ZeRO stage, offload and recomputation.",
    )
    made.add_argument("model", help="a Hugging Face config.json or its folder; or file.py:function, module:function")
    made.add_argument("-c", "--config", help="the DeepSpeed configuration (JSON); default: AdamW in bf16, stage 0")
    made.add_argument(
        "-n",
        "--ranks",
        type=whole,
        default=1,
        help="all ranks, also those that share layers or sequences (%(default)s)",
    )
    made.add_argument("-b", "--batch", type=whole, help="samples per rank; default: the configuration's, else 1")
    made.add_argument("-s", "--seq", type=whole, default=1024, help="tokens per sample (%(default)s)")
    made.add_argument("--device", default="cuda", help="what ranks compute on: cuda, cpu, ... (%(default)s)")
    made.add_argument("-m", "--device-memory", type=amount, metavar="GIB", help="memory of a device, to say what fits")
    made.add_argument("--host-memory", type=amount, metavar="GIB", help="main memory a rank may use")
    made.add_argument("--html", type=Path, help="write a page with a chart")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        result = run(args)
        if args.html:  # before anything is printed: whoever reads may stop
            write_page(result, args.html)
            print(f"page: {args.html}", file=sys.stderr)
    except DeepSpeedError as error:
        print(f"deepspeed estimate: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(result), indent=2) if args.json else as_text(result))
    return 0


def run(args: argparse.Namespace) -> Survey:
    """The survey that the arguments ask for."""
    config: dict[str, Any] = read_config(args.config) if args.config else {"bf16": {"enabled": True}}
    size = args.batch or config.get("train_micro_batch_size_per_gpu") or 1
    config = {**config, "train_micro_batch_size_per_gpu": size}
    config.pop("train_batch_size", None)
    model, batch = build(args.model, int(size), args.seq)
    limits = Limits(
        int(args.device_memory * GIB) if args.device_memory else None,
        int(args.host_memory * GIB) if args.host_memory else None,
    )
    return survey(model, config, batch, world_size=args.ranks, limits=limits, device_type=args.device)


def build(source: str, size: int, seq: int) -> tuple[nn.Module, Any]:
    """A model and a micro-batch for it. Raises DeepSpeedError where there is none, or not of these."""
    path = Path(source)
    config = path / "config.json" if path.is_dir() else path
    if config.is_file() and config.suffix == ".json":
        return from_hugging_face(config, size, seq)
    place, _, name = source.rpartition(":")
    if not place:
        raise DeepSpeedError(
            f"{source} is neither a Hugging Face config.json (or a folder with one) nor file.py:function.\n"
            "  Check the path, or name a function that returns the model."
        )
    function = _function(place, name)
    with torch.device("meta"):
        made = function()
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return made
    if not isinstance(made, nn.Module):
        raise DeepSpeedError(
            f"{source} returned a {type(made).__name__}.\n  Return an nn.Module, or (nn.Module, batch)."
        )
    tokens = torch.zeros(size, seq, dtype=torch.int64, device="meta")
    return made, (tokens, tokens)


def _function(place: str, name: str) -> Callable[[], Any]:
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise DeepSpeedError(f"the file {place} does not exist.\n  Check the path.")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(place).resolve().parent))
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise DeepSpeedError(f"the module {place} cannot be imported: {error}.\n  Check its name.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DeepSpeedError(f"{place} has no function {name!r}.\n  Name one that returns a model, or (model, batch).")
    return function


def from_hugging_face(path: Path, size: int, seq: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a Hugging Face configuration, without weights, and a batch of tokens with labels. Raises DeepSpeedError where it
    describes none."""
    try:
        import transformers
    except ImportError as error:
        raise NotAvailableError(
            f"{path} is a Hugging Face configuration, and transformers is not installed.\n"
            "  pip install transformers, or name a function that builds the model (file.py:function)."
        ) from error
    settings = read_settings(path)
    if "model_type" not in settings:
        raise DeepSpeedError(
            f"{path} has no model_type, so it is no model's configuration.\n  Give a model's config.json."
        )
    with _told(path):
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq > longest:
        raise DeepSpeedError(f"--seq {seq} is longer than the model's {longest} positions.\n  Give at most {longest}.")
    architecture = next(iter(settings.get("architectures") or ()), None)
    kind = getattr(transformers, architecture or "", None)
    with _told(path), torch.device("meta"):
        model = kind(config) if kind is not None else transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    tokens = torch.zeros(size, seq, dtype=torch.int64, device="meta")
    return model, {"input_ids": tokens, "labels": tokens}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DeepSpeedError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeepSpeedError(f"{path} is not JSON: {error}.\n  Give a model's config.json.") from None
    if not isinstance(found, dict):
        raise DeepSpeedError(f"{path} holds a {type(found).__name__}, not an object.\n  Give a model's config.json.")
    return found


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """While entered, what Transformers raises is an error about `path`."""
    try:
        yield
    except Exception as error:  # values of any key, looked at anywhere in a model
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise DeepSpeedError(
            f"{path}: Transformers makes no model of it: {said}\n  Correct its values, or give file.py:function."
        ) from error


def as_text(result: Survey) -> str:
    """A table of all options, and what to change."""
    limits = result.limits
    lines = [
        f"{result.model_name}: {result.num_params / 1e6:,.1f}M parameters, batch {result.batch} per rank, "
        f"{result.world_size} ranks on {result.device_type}",
        *{note for option in result.options for note in option.estimate.notes},
        "",
        f"  {'stage':5} {'offload':26} {'recompute':10} {'device':>10} {'+rounding':>10} {'host':>10} {'nvme':>10}  peak in",
    ]
    for option in result.options:
        found = option.estimate
        mark = ">" if option.is_current else " "
        fits = (
            ""
            if limits.device_nbytes is None and limits.host_nbytes is None
            else ("  fits" if limits.allow(found) else "")
        )
        sizes = (found.peak_nbytes, found.allowance_nbytes, found.on(Tier.CPU), found.on(Tier.NVME))
        lines.append(
            f"{mark} {option.stage:<5} {option.offload:26} {option.recompute:10} "
            + " ".join(f"{gib(size):>10}" for size in sizes)
            + f"  {found.phase}{fits}"
        )
    return "\n".join([*lines, "", advice_text(result)])


def advice_text(result: Survey) -> str:
    """What to change, in a sentence or two."""
    advice = result.advice
    assert advice is not None, "a survey ends with advice"
    if result.limits.device_nbytes is None:
        return "Give --device-memory to be told what to change."
    room = f"{result.limits.device_nbytes / GIB:g} GiB"
    if not advice.changes:
        return f"The configuration (>) fits {room}."
    changes = "\n".join(f"  {key}: {json.dumps(value)}" for key, value in advice.changes.items())
    peak = gib(advice.option.estimate.peak_nbytes + advice.option.estimate.allowance_nbytes)
    if advice.fits:
        return f"The configuration (>) does not fit {room}. The smallest change that does, with {peak}:\n{changes}"
    return f"Nothing fits {room}, not even one sample. The least is {peak}, with\n{changes}\nUse more ranks."


def gib(nbytes: int) -> str:
    """Bytes for people."""
    if not nbytes:
        return "-"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def as_json(result: Survey) -> dict[str, Any]:
    """All figures, in bytes."""
    assert result.advice is not None, "a survey ends with advice"
    return {
        "model": result.model_name,
        "num_params": result.num_params,
        "world_size": result.world_size,
        "options": [
            {
                "stage": option.stage,
                "offload": option.offload,
                "recompute": option.recompute,
                "is_current": option.is_current,
                "fits": result.limits.allow(option.estimate),
                "device_nbytes": option.estimate.peak_nbytes,
                "allowance_nbytes": option.estimate.allowance_nbytes,
                "host_nbytes": option.estimate.on(Tier.CPU),
                "nvme_nbytes": option.estimate.on(Tier.NVME),
                "peak_in": option.estimate.phase,
                "by_kind": option.estimate.by_kind,
            }
            for option in result.options
        ],
        "advice": {"fits": result.advice.fits, "changes": result.advice.changes},
    }
