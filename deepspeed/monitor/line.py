"""The progress line: what training did since the last line, for people. Pure.

    step 120 | loss 2.3456 | lr 1e-03 | norm 0.872 | 3.9k tokens/s | 0.081 TFLOP/s | MFU 41 % | device 0.61 GB (peak
    0.70) | wait: communication 8 % (3 to 8), offload 0 %

Rates, and shares of the wall time, are over all steps since the last line; the loss is the last step's. A model with
experts also has "experts: max/mean 1.31, dropped 0.40 %, auxiliary 1.02".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed.monitor.step import StepNumbers
from deepspeed.monitor.stretch import Stretch

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class RankNumbers:
    """What one rank tells the others for the line: its last loss, its time since the last line, its waits, its memory."""

    loss: float | None
    wall_s: float
    wait_comm_s: float
    device_nbytes: int
    device_peak_nbytes: int


def progress_line(
    steps: Stretch,
    ranks: Sequence[RankNumbers],
    times_ms: dict[str, float] | None = None,
    memory_by_kind: dict[str, int] | None = None,
) -> str:
    """The line for some steps of this rank, the last of which has just ended.

    `times_ms`: of `wall_clock_breakdown`, per step. `memory_by_kind`: of `memory_breakdown`, bytes.
    """
    last = steps.last
    assert last is not None, "a line is written when a step has ended"
    parts = [
        f"step {last.step}",
        f"loss {_loss(ranks)}",
        "lr " + ", ".join(f"{lr:.3g}" for lr in dict.fromkeys(last.lr)),
    ]
    if last.grad_norm is not None:
        parts.append(f"norm {last.grad_norm:.4g}")
    if last.loss_scale != 1.0:
        parts.append(f"scale {last.loss_scale:g}")
    if last.skipped:
        parts.append(f"skipped {last.skipped}")
    parts += _rates(steps, last) if steps.wall_s > 0 else []
    parts += [*_experts(last.experts or {}), _memory(last, ranks), _waits(steps, ranks), *_disk(steps)]
    if times_ms:
        parts.append(", ".join(f"{name} {ms:.1f} ms" for name, ms in times_ms.items()))
    if memory_by_kind:
        parts.append(", ".join(f"{kind} {nbytes / GB:.3g} GB" for kind, nbytes in memory_by_kind.items() if nbytes))
    return " | ".join(parts)


def _loss(ranks: Sequence[RankNumbers]) -> str:
    losses = [rank.loss for rank in ranks if rank.loss is not None]
    return f"{sum(losses) / len(losses):.4f}" if losses else "-"


def _rates(steps: Stretch, last: StepNumbers) -> list[str]:
    per_s = 1 / steps.wall_s
    parts = [f"{short(steps.tokens * per_s)} tokens/s" if steps.tokens else f"{short(steps.samples * per_s)} samples/s"]
    if steps.flops is not None:
        parts.append(f"{steps.flops * per_s / 1e12:.3g} TFLOP/s")
        if last.peak_flops:
            parts.append(f"MFU {steps.flops * per_s / last.peak_flops:.1%}".replace("%", " %"))
    return parts


def _experts(load: dict[str, float]) -> list[str]:
    """Of the last step."""
    words = {"max_over_mean": "max/mean {:.3g}", "dropped": "dropped {:.2%}", "auxiliary": "auxiliary {:.3g}"}
    told = [text.format(load[key]).replace("%", " %") for key, text in words.items() if key in load]
    return [f"experts: {', '.join(told)}"] if told else []


def _memory(last: StepNumbers, ranks: Sequence[RankNumbers]) -> str:
    """By tier; the device's and its peak are those of the rank with most. On CPUs the device's memory is the process's."""
    most = max((rank.device_nbytes for rank in ranks), default=0)
    peak = max((rank.device_peak_nbytes for rank in ranks), default=0)
    tiers = [f"{tier} {last.memory[tier] / GB:.3g} GB" for tier in ("cpu", "nvme") if last.memory.get(tier)]
    return ", ".join([f"device {most / GB:.3g} GB (peak {peak / GB:.3g})", *tiers])


def _waits(steps: Stretch, ranks: Sequence[RankNumbers]) -> str:
    shares = [rank.wait_comm_s / rank.wall_s for rank in ranks if rank.wall_s > 0]
    low, high = (min(shares), max(shares)) if shares else (0.0, 0.0)
    spread = f" ({low * 100:.0f} to {high * 100:.0f})" if f"{low:.0%}" != f"{high:.0%}" else ""
    own, offload = (
        waited_s / steps.wall_s if steps.wall_s > 0 else 0.0 for waited_s in (steps.wait_comm_s, steps.wait_offload_s)
    )
    return f"wait: communication {own * 100:.0f} %{spread}, offload {offload * 100:.0f} %"


def _disk(steps: Stretch) -> list[str]:
    """Per step: what went over the disk and how fast, and what of it was waited for."""
    read, written = (steps.offload_nbytes[op] / steps.num_steps for op in ("read", "write"))
    if not read + written:
        return []
    busy_s, compute_s = (steps.offload_s(kind) / steps.num_steps for kind in ("disk", "compute"))
    waited_s = steps.wait_offload_s / steps.num_steps
    rate = f" ({(read + written) / busy_s / GB:.2f} GB/s)" if busy_s > 0 else ""
    return [
        f"disk: read {read / GB:.3g} GB, wrote {written / GB:.3g} GB in {busy_s:.3g} s{rate}, waited {waited_s:.3g} s, "
        f"computed {compute_s:.3g} s"
    ]


def short(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
