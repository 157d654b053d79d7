"""What `gpu.py` measures, each row in a process of its own: `python benchmarks/gpu_rows.py KIND SIZE ENGINE` prints one line of JSON.

    train      tokens/s, peak memory and share of the matrix rate of a GPT in bf16 with fp32 masters
    kernels    optimizers, quantisation and signs in GB/s, beside torch and beside what the device copies
    generate   tokens/s of one sequence, Hugging Face's model beside `init_inference`

Runs under the original DeepSpeed's interpreter too (engines that are named so), which has only to know torch and deepspeed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))

SIZES = {
    "tiny": (64, 2, 2, 64),
    "125M": (768, 12, 12, 1024),
    "1.3B": (2048, 24, 16, 1024),
    "2.7B": (2560, 32, 32, 1024),
    "6.7B": (4096, 32, 32, 1024),
    "10B": (4096, 48, 32, 1024),
    "20B": (6144, 44, 48, 1024),
}
"""Width, layers, heads, tokens per sample."""

CPU: dict[str, Any] = {"device": "cpu", "pin_memory": True}
ZERO: dict[str, dict[str, Any]] = {
    "zero 0": {"stage": 0},
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3},
    "zero 2, optimizer on cpu": {"stage": 2, "offload_optimizer": CPU},
    "zero 3, all on cpu": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
"""`zero_optimization` of an engine's name, without the word "original"."""

FSDP2, ORIGINAL = "fsdp2", "original "
WARM, STEPS = 3, 10
SAMPLES = 4
OUTSIDE_BLOCKS = 2
"""The embedding and the output layer, in units of vocabulary x width."""


def device() -> torch.device:
    """This machine's accelerator."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Of one call, after some that are not counted."""
    from deepspeed.accelerator import get_accelerator

    for _ in range(WARM):
        call()
    get_accelerator().synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    get_accelerator().synchronize()
    return (time.perf_counter() - start) / rounds


# Training. -------------------------------------------------------------------------------------------------------------


def make_model(size: str) -> tuple[nn.Module, tuple[Tensor, Tensor], int]:
    """A GPT in fp32 whose blocks are recomputed from 1.3B on, a batch on the device, and tokens per sample."""
    from model import Gpt, GptConfig

    width, layers, heads, seq = SIZES[size]
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=width, layers=layers, heads=heads, seq=seq))
    if width >= SIZES["1.3B"][0]:
        _recompute(model)
    tokens = torch.randint(256, (SAMPLES, seq + 1), device=device())
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), seq


def _recompute(model: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    for block in model.get_submodule("blocks").children():
        forward = block.forward
        block.forward = lambda *args, _forward=forward: checkpoint(_forward, *args, use_reentrant=False)


def fsdp2_step(model: nn.Module) -> Callable[[Any], None]:
    """A step of FSDP2 in bf16 with fp32 masters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model.to(device())
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Any) -> None:
        model(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(model: nn.Module, zero: dict[str, Any], is_original: bool) -> Callable[[Any], None]:
    """A step of the engine of whichever `deepspeed` is installed, in bf16 with fp32 masters."""
    import deepspeed

    optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-4}}
    if is_original and "offload_optimizer" not in zero:
        optimizer["params"]["torch_adam"] = True  # its fused Adam wants nvcc
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": optimizer,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch: Any) -> None:
        engine.backward(engine(*batch))
        engine.step()

    return step


def train(size: str, engine: str) -> dict[str, Any]:
    """Tokens/s, peak GiB on the device, and TFLOP/s by 6 x parameters x tokens (without what is recomputed)."""
    from deepspeed.accelerator import get_accelerator

    dist.init_process_group(get_accelerator().communication_backend_name())
    model, batch, seq = make_model(size)
    numel = sum(param.numel() for param in model.parameters())
    zero = ZERO.get(engine.removeprefix(ORIGINAL))
    step = fsdp2_step(model) if zero is None else engine_step(model, zero, engine.startswith(ORIGINAL))
    for _ in range(WARM):
        step(batch)
    get_accelerator().reset_peak_memory_stats()
    once = seconds(lambda: step(batch), STEPS)
    rate = SAMPLES * seq / once
    return {
        "parameters": numel,
        "tokens_per_s": rate,
        "tflops": 6 * numel * rate / 1e12,
        "peak_gib": get_accelerator().max_memory_allocated() / 2**30,
    }


# Kernels. --------------------------------------------------------------------------------------------------------------


def optimizer_rates(numel: int) -> dict[str, float]:
    """GB/s of one fp32 step: Adam reads four tensors and writes three, Lion reads three and writes two."""
    from deepspeed.optim import FusedAdam, FusedLamb, FusedLion

    found = {}
    makers: dict[str, tuple[Callable[[Any], Any], int]] = {
        "adam": (lambda p: FusedAdam(p, lr=1e-4), 7),
        "adam, torch fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), 7),
        "lamb": (lambda p: FusedLamb(p, lr=1e-4), 7),
        "lion": (lambda p: FusedLion(p, lr=1e-4), 5),
    }
    for name, (make, passes) in makers.items():
        params = [nn.Parameter(torch.randn(numel // 64, device=device())) for _ in range(64)]
        for param in params:
            param.grad = torch.randn_like(param)
        found[name] = passes * 4 * numel / seconds(make(params).step, STEPS) / 1e9
    return found


def codec_rates(numel: int) -> dict[str, float]:
    """GB/s of floating-point input or output."""
    from deepspeed.kernels.reference import quantize as formats
    from deepspeed.kernels.reference import signs
    from deepspeed.kernels.table import pick

    found = {}
    x = torch.randn(numel, device=device(), dtype=torch.bfloat16)
    for num_bits in (8, 4):
        for own, place in ((pick, ""), (lambda name, _: getattr(formats, name), ", torch")):
            quantize, dequantize = (own(name, device().type) for name in ("quantize", "dequantize"))
            packed = quantize(x, 128, num_bits, symmetric=True)
            once = seconds(lambda: quantize(x, 128, num_bits, symmetric=True), STEPS)  # noqa: B023
            found[f"quantize int{num_bits}{place}"] = x.nbytes / once / 1e9
            once = seconds(lambda: dequantize(packed, num_bits, torch.bfloat16), STEPS)  # noqa: B023
            found[f"dequantize int{num_bits}{place}"] = x.nbytes / once / 1e9
    values, error = torch.randn(numel, device=device()), torch.zeros(numel, device=device())
    for own, place in ((pick, ""), (lambda name, _: getattr(signs, name), ", torch")):
        compress = own("compress_signs", device().type)
        found[f"1-bit with feedback{place}"] = values.nbytes / seconds(lambda: compress(values, error), STEPS) / 1e9  # noqa: B023
    return found


def product_rates(numel: int) -> dict[str, float]:
    """GB/s of the weight as it rests, for one row; without a kernel the weight is made whole first."""
    from deepspeed.quant.linear import QuantizedLinear, QuantizedWeight
    from deepspeed.quant.spec import Spec

    found = {}
    weight = torch.randn(numel // 1024, 1024, device=device(), dtype=torch.bfloat16)
    x = torch.randn(1, 1024, device=device(), dtype=torch.bfloat16)
    with torch.no_grad():
        for num_bits in (8, 4):
            layer = QuantizedLinear(QuantizedWeight(weight, Spec(num_bits=num_bits)), None)
            parts = [part for part in layer.quantized.parts if part is not None]
            nbytes = sum(part.nbytes for part in parts)
            found[f"product int{num_bits}"] = nbytes / seconds(lambda: layer(x), STEPS) / 1e9  # noqa: B023
    return found


def kernels(size: str, _: str) -> dict[str, Any]:
    """What the device copies and multiplies, then every kernel, in GB/s."""
    numel = 1 << (20 if size == "tiny" else 28)
    x = torch.randn(numel, device=device())
    y = torch.empty_like(x)
    side = 256 if size == "tiny" else 8192
    a = torch.randn(side, side, device=device(), dtype=torch.bfloat16)
    copied = 2 * x.nbytes / seconds(lambda: y.copy_(x), STEPS) / 1e9
    multiplied = 2 * side**3 / seconds(lambda: a @ a, STEPS) / 1e12
    return {
        "copy_gb_per_s": copied,
        "matrix_tflops": multiplied,
        "gb_per_s": {**optimizer_rates(numel), **codec_rates(numel), **product_rates(numel)},
    }


# Generation. -----------------------------------------------------------------------------------------------------------


def generate(size: str, engine: str) -> dict[str, Any]:
    """Tokens/s of 64 new tokens after 32, one sequence, a Llama of that width."""
    import transformers

    import deepspeed

    width, layers, heads, _ = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width, vocab_size=32000
    )  # fmt: skip
    with device():
        model: Any = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if engine != "hugging face":
        model = deepspeed.init_inference(model, dtype=engine)
    prompt = torch.randint(5, 32000, (1, 32), device=device())
    num_new = 8 if size == "tiny" else 64

    def run() -> Any:
        return model.generate(prompt, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)

    return {"tokens_per_s": num_new / seconds(run, 2)}


KINDS: dict[str, Callable[[str, str], dict[str, Any]]] = {"train": train, "kernels": kernels, "generate": generate}

if __name__ == "__main__":
    kind, size, engine = sys.argv[1:]
    print(json.dumps(KINDS[kind](size, engine)))
