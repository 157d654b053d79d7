"""Many estimates side by side, and the smallest change of a configuration that makes it fit.

Called by `deepspeed estimate` and the HTML page. The choices are a table (`CHOICES`): ZeRO stage, what is offloaded,
what recomputes. Each has a price, a rough order of how much it slows a step down; the smallest change is the cheapest
combination that fits, and where none does, half of the micro-batch at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deepspeed.activation.blocks import find_blocks
from deepspeed.config import load_config, read_config
from deepspeed.memory.estimator import Estimate, Estimator
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.zero.policy import Tier

STAGES = {0: 0.0, 1: 0.1, 2: 0.2, 3: 2.0}
"""ZeRO stage, and its price."""

RECOMPUTE = {"none": 0.0, "selective": 1.0, "full": 3.0}
"""What blocks recompute, and its price."""

_CPU: Mapping[str, Any] = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Offload:
    """Where states and parameters rest: the sections that say so, the lowest stage that can, the price."""

    label: str
    sections: Mapping[str, Any]
    min_stage: int
    price: float


def offloads(nvme_path: str) -> list[Offload]:
    """The choices of tier."""
    nvme = {"device": "nvme", "nvme_path": nvme_path, "pin_memory": True}
    return [
        Offload("none", {}, 0, 0.0),
        Offload("states on cpu", {"offload_optimizer": dict(_CPU)}, 1, 6.0),
        Offload("states, parameters on cpu", {"offload_optimizer": dict(_CPU), "offload_param": dict(_CPU)}, 3, 8.0),
        Offload("states on nvme", {"offload_optimizer": nvme, "offload_param": dict(_CPU)}, 3, 12.0),
    ]


@dataclass
class Option:
    """One combination: what to set, its price, its estimate."""

    stage: int
    offload: str
    recompute: str
    config: dict[str, Any]
    price: float
    estimate: Estimate
    is_current: bool = False

    @property
    def label(self) -> str:
        """As tables write it."""
        return f"stage {self.stage}, offload {self.offload}, recompute {self.recompute}"


@dataclass
class Limits:
    """What there is: bytes on a rank's device, and of its node's main memory that one rank may use. None: any."""

    device_nbytes: int | None = None
    host_nbytes: int | None = None

    def allow(self, estimate: Estimate) -> bool:
        """Whether an estimate fits, with its allowance for the allocator."""
        device = estimate.peak_nbytes + estimate.allowance_nbytes
        return (self.device_nbytes is None or device <= self.device_nbytes) and (
            self.host_nbytes is None or estimate.on(Tier.CPU) <= self.host_nbytes
        )


@dataclass
class Survey:
    """All options of a model on so many ranks, the configuration's own among them, and what to change."""

    model_name: str
    num_params: int
    batch: str
    world_size: int
    device_type: str
    limits: Limits
    options: list[Option] = field(default_factory=list)
    advice: Advice | None = None

    @property
    def current(self) -> Option:
        """The configuration's own option."""
        return next(option for option in self.options if option.is_current)


@dataclass
class Advice:
    """The smallest change that makes a configuration fit."""

    option: Option
    changes: dict[str, Any]
    """Dotted keys and their new values; empty if nothing has to change."""
    fits: bool


def survey(
    model: nn.Module,
    config: Any,
    batch: Any,
    *,
    world_size: int = 1,
    limits: Limits | None = None,
    nvme_path: str = "/local_nvme",
    **options: Any,
) -> Survey:
    """Estimate every stage x offload x recomputation of a configuration. Arguments as of `estimate`."""
    given = read_config(config)
    estimator = Estimator(model, batch, **options)
    own = load_config(given)
    tiers = offloads(nvme_path)
    own_offload = _own_offload(own, tiers)
    result = Survey(
        type(model).__name__,
        sum(param.numel() for param in model.parameters()),
        _describe(batch),
        world_size,
        estimator.device_type,
        limits or Limits(),
    )
    own_recompute = own.activation_checkpointing.recompute
    recomputes: dict[str, float] = RECOMPUTE if find_blocks(model) else {own_recompute: 0.0}
    for stage, tier, recompute in itertools.product(STAGES, tiers, recomputes):
        is_current = (stage, tier.label, recompute) == (own.zero_optimization.stage, own_offload, own_recompute)
        if stage < tier.min_stage:
            continue
        changed = given if is_current else changed_config(given, stage, tier.sections, recompute)
        try:
            found = estimator.estimate(changed, world_size=world_size)
        except DeepSpeedConfigError:
            if is_current:
                raise
            continue  # a combination that this configuration's other keys forbid
        price = STAGES[stage] + tier.price + recomputes[recompute]
        result.options.append(Option(stage, tier.label, recompute, changed, price, found, is_current))
    if not any(option.is_current for option in result.options):  # an offload that the table does not have
        found = estimator.estimate(given, world_size=world_size)
        stage = own.zero_optimization.stage
        result.options.append(Option(stage, "as configured", own_recompute, given, STAGES[stage], found, True))
    result.advice = advise(result, lambda smaller: Estimator(model, smaller, **options), batch)
    return result


def changed_config(given: Mapping[str, Any], stage: int, sections: Mapping[str, Any], recompute: str) -> dict[str, Any]:
    """A configuration with another stage, offload and recomputation; everything else stays."""
    config = copy.deepcopy(dict(given))
    zero = {k: v for k, v in dict(config.get("zero_optimization", {})).items() if not k.startswith("offload_")}
    config["zero_optimization"] = {**zero, "stage": stage, **copy.deepcopy(dict(sections))}
    section = dict(config.get("activation_checkpointing", {}))
    section.pop("memory_budget_gb", None)
    if recompute != "none" or "recompute" in section:
        section["recompute"] = recompute
    if section:
        config["activation_checkpointing"] = section
    return config


def _own_offload(config: Any, tiers: list[Offload]) -> str:
    zero = config.zero_optimization
    devices = tuple(
        "none" if section is None else section.device or "none"
        for section in (zero.offload_optimizer, zero.offload_param)
    )
    for tier in tiers:
        theirs = tuple(
            tier.sections.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
        )
        if theirs == devices:
            return tier.label
    return "as configured"


def advise(result: Survey, smaller: Callable[[Any], Estimator], batch: Any) -> Advice:
    """The cheapest option that fits; the present one if it does; half the micro-batch where none does."""
    current, limits = result.current, result.limits
    if limits.allow(current.estimate):
        return Advice(current, {}, True)
    fitting = [option for option in result.options if limits.allow(option.estimate)]
    if fitting:
        best = min(fitting, key=lambda option: _cost_of_change(current, option))
        return Advice(best, _difference(current.config, best.config), True)
    least = min(result.options, key=lambda option: option.estimate.peak_nbytes)
    size = _leading(batch)
    while size > 1:
        size //= 2
        estimator = smaller(_first_rows(batch, size))
        for option in sorted(result.options, key=lambda option: option.price):
            changed = {**option.config, "train_micro_batch_size_per_gpu": size}
            changed.pop("train_batch_size", None)
            found = estimator.estimate(changed, world_size=result.world_size)
            if limits.allow(found):
                best = Option(option.stage, option.offload, option.recompute, changed, option.price, found)
                return Advice(best, _difference(current.config, changed), True)
    return Advice(least, _difference(current.config, least.config), False)


def _cost_of_change(current: Option, option: Option) -> float:
    """How much slower a step becomes, and half a point for each thing that changes."""
    changes = (
        (current.stage != option.stage) + (current.offload != option.offload) + (current.recompute != option.recompute)
    )
    return max(0.0, option.price - current.price) + 0.5 * changes


def _leading(batch: Any) -> int:
    sizes: list[int] = []
    tree_map_only(Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.dim() else 1), batch)
    return min(sizes, default=1)


def _first_rows(batch: Any, count: int) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[:count] if tensor.dim() else tensor, batch)


def _describe(batch: Any) -> str:
    shapes: list[str] = []
    tree_map_only(Tensor, lambda tensor: shapes.append("x".join(map(str, tensor.shape)) or "scalar"), batch)
    return ", ".join(dict.fromkeys(shapes))


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of `after` that differ, and keys of `before` that are gone (None)."""
    found: dict[str, Any] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(new, Mapping) and (isinstance(old, Mapping) or old is None):
            found |= _difference(old or {}, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = new
    return found
