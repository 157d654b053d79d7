"""`deepspeed estimate MODEL --inference`: what a model that only runs will need on each rank, before there is a machine for it.

Called by the launcher's command; calls what `init_inference` calls, on a copy of the model without values: the same cast, cut over absent ranks
and quantization. Cache and working memory are those of one forward over a prompt, traced on fake tensors.

    weights    parameters and buffers, quantized ones with their scales; experts divided over the ranks that share them
    cache      keys and values of one token, of all layers that keep them; times tokens and sequences
    working    the highest sum of a forward's own tensors, the cache left out, and of the weight that is made whole for a product

Invariant: weights and cache are to the byte what an engine holds; working memory leaves out what kernels take for themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.initialize import read_inference_config
from deepspeed.inference.prepare import cast, own_dtype
from deepspeed.inference.quantize_layers import quantize
from deepspeed.inference.tensor import Ranks, cut, decide
from deepspeed.kernels.native_products import MAX_ROWS
from deepspeed.memory.cli import build, gib
from deepspeed.memory.layers import AbsentRanks
from deepspeed.memory.trace import Recorder, Trace, What, fake_copy, own_memory
from deepspeed.parallel.expert import attach, hugging_face, listed
from deepspeed.quant.linear import QuantizedLinear
from deepspeed.quant.replace import Around
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.logging import warn_once


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate:
    """Bytes of one rank, the first, whose parts are the largest."""

    num_params: int
    """Of the whole model."""
    weights_nbytes: int
    cache_nbytes_per_token: int
    """Of one sequence."""
    cache_nbytes: int
    """Of all tokens of all sequences, without room to grow."""
    working_nbytes: int | None
    """Of a forward over the prompts; None where the model looks at values, as experts' routers do."""
    tp_size: int
    ep_size: int

    @property
    def nbytes(self) -> int:
        """All together."""
        return self.weights_nbytes + self.cache_nbytes + (self.working_nbytes or 0)


def estimate_inference(
    model: nn.Module, config: Any = None, *, batch: int = 1, tokens: int = 1024, **keywords: Any
) -> InferenceEstimate:
    """What `init_inference(model, config, **keywords)` and a prompt of [batch, tokens] take of a rank. The model, which takes token ids, is not
    changed, and may be on meta.

    Raises DeepSpeedConfigError for what `init_inference` refuses by shapes and settings alone.
    """
    settings = read_inference_config(config, keywords)
    if settings.zero.stage == 3:
        raise DeepSpeedConfigError(
            "zero.stage = 3 streams weights, whose bytes depend on what is read ahead, and is not predicted for models that run.\n"
            "  Leave zero out; what stays at once is bounded by zero.stage3_max_live_parameters."
        )
    num_params = sum(param.numel() for param in model.parameters())
    made = _on_meta(model)
    cast(made, own_dtype(made) if settings.dtype is torch.int8 else settings.dtype)
    tp_size = settings.tensor_parallel.tp_size if settings.tensor_parallel.enabled else 1
    if tp_size > 1:
        ranks = Ranks(AbsentRanks(tp_size))
        cut(made, ranks, decide(made, settings, ranks))
    ep_size = _ep_size(settings)
    experts = set(_experts_of(made, ep_size)) if ep_size > 1 else set()
    traced = _trace(made, batch, tokens)
    cached = _cache_by_config(made, settings) if traced is None else traced.cache_nbytes(settings) // (batch * tokens)
    quantize(made, settings, Around())
    working = None if traced is None else traced.working_nbytes(_wholes(made))
    weights = sum(_unique_nbytes(made, experts, ep_size))
    return InferenceEstimate(
        num_params=num_params, weights_nbytes=weights, cache_nbytes_per_token=cached,
        cache_nbytes=cached * batch * tokens, working_nbytes=working, tp_size=tp_size, ep_size=ep_size,
    )  # fmt: skip


def _on_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def _ep_size(settings: DeepSpeedInferenceConfig) -> int:
    given = settings.moe.ep_size
    sizes = set(given) if isinstance(given, tuple) else {given}
    if len(sizes) > 1:
        raise DeepSpeedConfigError(f"moe.ep_size = {given}: use one size for all layers, or 1.")
    size = sizes.pop()
    return size if settings.moe.enabled else 1


def _experts_of(model: nn.Module, ep_size: int) -> Iterator[int]:
    """Identities of the parameters that are divided over `ep_size` ranks. Raises DeepSpeedConfigError where there are none."""
    settings = ExpertParallelConfig(enabled=True, autoep_size=ep_size)
    fused, blocks = hugging_face.find(model, settings), listed.find(model, settings)
    holders = [*fused.values(), *(block.experts for block in blocks.values())]
    holders += [layer.experts for _, layer in attach.expert_layers(model) if layer.ep_size == 1]
    if not holders:
        raise DeepSpeedConfigError(
            f"moe.ep_size = {ep_size}, but {type(model).__name__} has no layers with experts.\n  Leave moe.ep_size out."
        )
    hugging_face.check(model, fused, ep_size, "moe.ep_size")
    listed.check(blocks, ep_size)
    return (id(param) for holder in holders for param in holder.parameters())


def _unique_nbytes(model: nn.Module, experts: set[int], ep_size: int) -> Iterator[int]:
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        yield tensor.nbytes // (ep_size if id(tensor) in experts else 1)


def _wholes(model: nn.Module) -> dict[str, int]:
    """By the name of a layer, bytes of its quantized weight when a product has it whole; negative where only many rows have."""
    found = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLinear):
            weight = layer.quantized
            nbytes = weight.rows * weight.width * weight.dtype.itemsize
            found[name.removesuffix(".product")] = -nbytes if layer.is_compiled else nbytes
    return found


@dataclass(frozen=True)
class _Traced:
    """A forward over a prompt, on fake tensors."""

    trace: Trace
    rows: dict[int, int]
    """By the identity of a module, the most rows that it was called with."""
    cached: list[Tensor]

    def cache_nbytes(self, settings: DeepSpeedInferenceConfig) -> int:
        """Keys and values as the settings keep them."""
        return sum(_as_kept(tensor, settings) for tensor in self.cached)

    def working_nbytes(self, wholes: dict[str, int]) -> int:
        """The highest sum of what is live beside the cache, a layer's whole weight while the layer runs."""
        names = {id(module): name for name, module in self.trace.model.named_modules()}
        stack, most = [0], 0
        for event, live in zip(self.trace.events, own_memory(self.trace), strict=True):
            if event.what is What.ENTER:
                module = self.trace.modules[event.number]
                nbytes = wholes.get(names[id(module)], 0)
                is_taken = nbytes > 0 or self.rows.get(id(module), 0) > MAX_ROWS
                stack.append(abs(nbytes) if is_taken else 0)
            elif event.what is What.LEAVE:
                stack.pop()
            most = max(most, live + stack[-1])
        return most - sum(tensor.nbytes for tensor in self.cached)


def _trace(model: nn.Module, batch: int, tokens: int) -> _Traced | None:
    """None where the model looks at values, as routers of experts do."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    recorder = Recorder(fake)
    rows: dict[int, int] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim():
            rows[id(module)] = max(rows.get(id(module), 0), inputs[0].numel() // inputs[0].shape[-1])

    for module in fake.modules():
        module.register_forward_pre_hook(note)
    generates: Any = getattr(fake, "can_generate", None)
    is_decoder = hasattr(getattr(fake, "config", None), "use_cache") and generates is not None and generates()
    arguments: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1} if is_decoder else {}
    try:
        with mode, recorder, torch.no_grad():
            prompt = torch.zeros(batch, tokens, dtype=torch.int64, device="cpu")
            recorder.see(prompt)
            output = fake(prompt, **arguments)
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn_once(f"working memory is not predicted: {type(model).__name__} does not run without values ({reason}).")
        return None
    finally:
        recorder.detach()
    return _Traced(recorder.trace, rows, list(_cached(getattr(output, "past_key_values", None))))


def _cached(cache: Any) -> Iterator[Tensor]:
    for layer in getattr(cache, "layers", ()):
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, Tensor):
                yield tensor


def _as_kept(tensor: Tensor, settings: DeepSpeedInferenceConfig) -> int:
    if settings.kv_cache.dtype != "int8":
        return tensor.nbytes
    return tensor.numel() + tensor.numel() // tensor.shape[-1] * 4


def _cache_by_config(model: nn.Module, settings: DeepSpeedInferenceConfig) -> int:
    """By the configuration's numbers, where a forward cannot be traced."""
    whole = getattr(model, "config", None)
    if whole is None:
        return 0
    config = whole.get_text_config(decoder=True)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    tp_size = settings.tensor_parallel.tp_size if settings.tensor_parallel.enabled else 1
    here = -(-shared // tp_size)
    per_head = dim + 4 if settings.kv_cache.dtype == "int8" else dim * own_dtype(model).itemsize
    return int(2 * config.num_hidden_layers * here * per_head)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed estimate --inference", description="Predict the memory of a rank that runs a model."
    )
    made.add_argument("model", help="a Hugging Face config.json or its folder; or file.py:function, module:function")
    made.add_argument("--inference", action="store_true", help="a model that runs, not one that trains")
    made.add_argument("-c", "--config", help="init_inference's configuration (JSON)")
    made.add_argument("--dtype", help="as init_inference's: fp32, bf16, fp16, int8, int4")
    made.add_argument("--tp", type=int, help="tensor_parallel.tp_size")
    made.add_argument("--ep", type=int, help="moe.ep_size")
    made.add_argument("-b", "--batch", type=int, default=1, help="sequences at once (%(default)s)")
    made.add_argument("-s", "--seq", type=int, default=1024, help="tokens of each (%(default)s)")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = parser().parse_args(arguments)
    given = {
        "dtype": args.dtype,
        "tensor_parallel": {"tp_size": args.tp} if args.tp else None,
        "moe": {"ep_size": args.ep} if args.ep else None,
    }
    try:
        model, _ = build(args.model, args.batch, args.seq)
        keywords = {key: value for key, value in given.items() if value is not None}
        found = estimate_inference(model, args.config, batch=args.batch, tokens=args.seq, **keywords)
    except DeepSpeedError as error:
        print(f"deepspeed estimate: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**asdict(found), "nbytes": found.nbytes}, indent=2) if args.json else as_text(model, found, args))
    return 0


def as_text(model: nn.Module, found: InferenceEstimate, args: argparse.Namespace) -> str:
    """The figures for people."""
    working = "not predicted" if found.working_nbytes is None else gib(found.working_nbytes)
    return "\n".join(
        [
            f"{type(model).__name__}: {found.num_params / 1e6:,.1f}M parameters, each rank of tp_size {found.tp_size}, ep_size {found.ep_size}",
            f"  weights   {gib(found.weights_nbytes):>12}",
            f"  cache     {gib(found.cache_nbytes):>12}  {found.cache_nbytes_per_token:,} bytes a token, {args.batch} x {args.seq} tokens",
            f"  working   {working:>12}",
            f"  together  {gib(found.nbytes):>12}",
        ]
    )
