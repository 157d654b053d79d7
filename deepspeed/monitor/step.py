"""One training step in numbers: what was counted and timed, and what follows from it. Pure.

The engine's step monitor fills a `StepNumbers` per optimizer step; the record, the events and the progress line are
views of it. All times are of this rank; tokens and samples are of all data-parallel ranks together, operations of one
rank.

Throughput is by the wall clock from the end of the last step to the end of this one, data loading and whatever the script
does in between included, because that is what training gets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNumbers:
    """A step. None is what is not known."""

    step: int
    samples: int
    """Global samples so far."""
    time: float
    """Seconds since 1970 at its end."""
    step_s: float
    """Wall time since the end of the last step."""
    loss: float | None
    """Mean over this rank's micro-batches of what `engine.backward` got."""
    lr: list[float]
    grad_norm: float | None
    """Before clipping."""
    loss_scale: float
    skipped: int
    """Steps skipped so far, because gradients overflowed."""
    step_samples: int
    """Samples of this step, all ranks."""
    step_tokens: int | None
    """Tokens of this step, all ranks; None where no input is a batch of token numbers."""
    flops: float | None
    """Model operations of this step on this rank: forward and backward, without recomputation."""
    peak_flops: float | None
    """Operations per second that this rank's device can do."""
    forward_s: float | None = None
    backward_s: float | None = None
    update_s: float | None = None
    wait_comm_s: float = 0.0
    wait_offload_s: float = 0.0
    offload_s: dict[str, float] = field(default_factory=dict)
    """Seconds of "disk" at work, overlapped or not, and of "compute" in the step of offloaded shards."""
    offload_nbytes: dict[str, int] = field(default_factory=dict)
    """Bytes by operation: "read" and "write" of the disk."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes in use by tier, and the peaks: device, device_peak, cpu, nvme."""
    comm_nbytes: dict[str, int] = field(default_factory=dict)
    """Message bytes by operation."""
    experts: dict[str, float] | None = None
    """Of all ranks' tokens: max_over_mean (of the layer with the most uneven experts), mean_max_over_mean (over layers),
    dropped (share of choices), auxiliary (mean over layers); see `engine.expert_load`."""

    @property
    def samples_per_s(self) -> float:
        """Global samples per second."""
        return self.step_samples / self.step_s if self.step_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Global tokens per second."""
        return self.step_tokens / self.step_s if self.step_tokens is not None and self.step_s > 0 else None

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s of this rank."""
        return self.flops / self.step_s / 1e12 if self.flops and self.step_s > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model operations per second over what the device can do (PaLM, arXiv:2204.02311, appendix B)."""
        return self.tflops * 1e12 / self.peak_flops if self.tflops is not None and self.peak_flops else None

    def as_record(self) -> dict[str, Any]:
        """The fields of a "step" line of the record."""
        # dataclasses.asdict copies every value, which takes longer than writing the line.
        known = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        derived = {
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": self.tokens_per_s,
            "tflops": self.tflops,
            "mfu": self.mfu,
        }
        return known | {key: value for key, value in derived.items() if value is not None}

    def as_events(self) -> list[tuple[str, Any, int]]:
        """The events of a step: first the names the original has, then ours."""
        values = {
            "train_loss": self.loss,
            "lr": self.lr[0] if self.lr else None,
            "loss_scale": self.loss_scale if self.loss_scale != 1.0 else None,
            "grad_norm": self.grad_norm,
            "step_time_ms": self.step_s * 1e3,
            "samples_per_second": self.samples_per_s,
            "tokens_per_second": self.tokens_per_s,
            "tflops": self.tflops,
            "mfu": self.mfu,
            "wait_communication_ms": self.wait_comm_s * 1e3,
            "wait_offload_ms": self.wait_offload_s * 1e3,
            **{f"expert_{name}": value for name, value in (self.experts or {}).items()},
            **{f"memory_gb_{tier}": nbytes / 1e9 for tier, nbytes in self.memory.items()},
        }
        return [(f"Train/Samples/{name}", value, self.samples) for name, value in values.items() if value is not None]


_FIELDS = tuple(f.name for f in fields(StepNumbers))
