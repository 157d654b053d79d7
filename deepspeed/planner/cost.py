"""What a training step of one layout takes, part by part, from measured rates. Pure.

Read by the autotuner as the prior of its predictions (`autotuning.surrogate` corrects it by what trials measured), and by
`deepspeed doctor`. A step is operations over a rate, bytes over a rate, and calls times a latency:

    compute   forward and backward of the samples: operations / matrix rate, element-wise traffic / copy rate
    again     what is recomputed of them
    calls     what modules and the engine cost however few samples there are
    gather    parameters: after the update (ZeRO 1, 2), around their use in each micro-batch (ZeRO 3)
    reduce    gradients: once per step (ZeRO 0, 1), in each micro-batch (ZeRO 2, 3)
    update    states read and written where they rest; offloaded ones also travel

Invariant: monotone where the machine is: more samples, more bytes or a slower rate never predict a shorter step.
Sources: bytes of each stage from ZeRO (arXiv:1910.02054, section 7); overlap as a share of backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from deepspeed.memory.clocked import Clocked
from deepspeed.memory.messages import ALL_REDUCE, GATHER, NO_UNSHARDS, SCATTER, Messages, Unshards
from deepspeed.profiling.rates import Rates

Tier = Literal["device", "cpu", "nvme"]

EFFICIENCY = 0.7
"""Of the matrix rate that a model's own products reach."""
BEST_EFFICIENCY = 2.0
"""No model computes faster than so many times the rate, which was perhaps measured while the machine did something else."""
ELEMENTWISE_PASSES = 3.0
"""How often kept activations are read or written by what is no matrix product, forward and backward."""
LAUNCH_S = 1.5e-5
"""Of a module's call, forward and backward, on a device that computes while it is told what comes next."""
CALLS_PER_MODULE = 3.0
"""Of a model's module under an engine, on a host, in calls of the smallest module: attention and norms call many operations."""
ENGINE_CALLS_PER_MODULE = 2.6
"""What an engine adds to a clocked step on a host, and checkpoints once more, per module, in calls of the smallest one (measured on a
GPT-2 of three blocks, `benchmarks/autotuning.py --model gpt2`)."""
OVERLAP = 0.8
"""Of backward that can hide communication, where the processor does not have to move the bytes itself."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's step for one sample, and its states."""

    num_params: int
    flops: float
    """Forward and backward of a sample, without recomputation."""
    forward_flops: float
    activation_nbytes: float
    """Kept per sample between forward and backward."""
    num_modules: int = 0
    num_tensors: int = 0
    """Parameters that are updated, whatever their size."""
    param_itemsize: int = 4
    state_itemsize: int = 12
    """Master and moments, per parameter."""
    is_host: bool = False
    """Whether ranks compute on CPUs, which also move their messages."""
    clocked: Clocked | None = None
    """Its forward and backward as they were clocked here; without, they are predicted from operations and rates."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration, as far as it decides about time."""

    stage: int
    micro: int
    accumulation: int = 1
    ranks: int = 1
    """Over which ZeRO shards."""
    recompute: str = "none"
    states_on: Tier = "device"
    params_on: Tier = "device"
    messages: Mapping[str, Messages] | None = None
    """What ZeRO sends in a step by operation, as the estimator counted it; None: estimated from sizes."""
    unshards: Unshards = NO_UNSHARDS
    """Those of the all-gathers that are of parameters around their use."""
    bucket_numel: int = 8 << 20
    reuse_numel: int = 10**9
    prefetch_numel: int = 50_000_000
    quantized_weights: bool = False
    quantized_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of a step."""

    compute: float
    """Of the samples, forward and backward."""
    gather: float
    reduce: float
    update: float
    again: float = 0.0
    """Of the samples, recomputed."""
    calls: float = 0.0
    """Of modules and of the engine, however few samples there are."""
    hidden: float = 0.0
    """Communication behind backward."""
    inside: float = 0.0
    """What layers send to ranks that share them."""
    bubble: float = 0.0
    """Of a pipeline."""

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.busy + self.gather + self.reduce + self.update + self.inside + self.bubble - self.hidden

    @property
    def busy(self) -> float:
        """Of forward, backward and recomputation."""
        return self.compute + self.again + self.calls

    def costs(self) -> dict[str, float]:
        """Each part as the step's length has it: communication without what is hidden. They sum to the total."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if hidden := found.pop("hidden"):
            seen = 1 - hidden / (self.gather + self.reduce)
            found |= {"gather": seen * self.gather, "reduce": seen * self.reduce}
        return found

    def shares(self) -> dict[str, float]:
        """Each part of the total."""
        return {field.name: getattr(self, field.name) / self.total for field in dataclasses.fields(self)}


def step_parts(rates: Rates, work: Work, choice: Choice) -> Parts:
    """Seconds of one optimizer step."""
    busy = _compute(rates, work, choice)
    gather_s, reduce_s = _gather(rates, work, choice), _reduce(rates, work, choice)
    hideable = 0.0 if work.is_host else OVERLAP * busy.backward
    if choice.stage < 2 and choice.accumulation > 1:
        hideable /= choice.accumulation  # only the last backward has something to send
    return Parts(
        compute=busy.samples,
        again=busy.again,
        calls=busy.calls,
        gather=gather_s,
        reduce=reduce_s,
        update=_update(rates, work, choice),
        hidden=min(hideable, reduce_s + (gather_s if choice.stage == 3 and choice.prefetch_numel else 0.0)),
    )


class _Busy(NamedTuple):
    """Seconds of computing over the micro-batches of a step, and of its backward (with recomputation)."""

    samples: float
    again: float
    calls: float
    backward: float


def _compute(rates: Rates, work: Work, choice: Choice) -> _Busy:
    again = {"none": 0.0, "selective": 0.05, "full": 1.0}.get(choice.recompute, 0.0)
    if work.clocked is not None:
        return _clocked(rates, work, choice, again)
    rate = EFFICIENCY * rates.matmul_flops
    products = choice.micro * work.flops / rate
    elements = choice.micro * work.activation_nbytes * ELEMENTWISE_PASSES / rates.copy_nbytes_s
    again_s = again * (choice.micro * work.forward_flops / rate + elements / 2)
    call_s = CALLS_PER_MODULE * rates.launch_s if work.is_host and rates.launch_s else LAUNCH_S
    launches = work.num_modules * call_s * (1 + again / 2)
    micro_s = products + elements + again_s + launches
    found = (products + elements, again_s, launches, micro_s * (2 + again) / (3 + again))
    return _Busy(*(choice.accumulation * seconds for seconds in found))


def _clocked(rates: Rates, work: Work, choice: Choice, again: float) -> _Busy:
    """Of a model whose own forward and backward were clocked."""
    assert work.clocked is not None, "asked of clocked models only"
    least = BEST_EFFICIENCY * rates.matmul_flops
    own = work.clocked.at_least(work.forward_flops / least, (work.flops - work.forward_flops) / least)
    engine_s = ENGINE_CALLS_PER_MODULE * rates.launch_s * work.num_modules * (1 + again) if work.is_host else 0.0
    samples = choice.micro * (own.forward_sample_s + own.backward_sample_s)
    again_s = again * choice.micro * own.forward_sample_s
    calls = (1 + again) * own.forward_call_s + own.backward_call_s + engine_s
    backward = own.backward_s(choice.micro) + again * own.forward_s(choice.micro) + engine_s
    return _Busy(*(choice.accumulation * seconds for seconds in (samples, again_s, calls, backward)))


def _wire(rates: Rates, nbytes: float, calls: float, ranks: int) -> float:
    if ranks == 1:
        return 0.0
    return nbytes * (ranks - 1) / ranks / max(rates.wire_nbytes_s, 1.0) + calls * (
        rates.message_s or rates.wire_latency_s
    )


def _calls(work: Work, choice: Choice) -> float:
    """Messages to move the model once."""
    return max(1.0, work.num_params / max(1, choice.bucket_numel))


def _sent(rates: Rates, choice: Choice, *ops: str) -> float:
    """Of messages that were counted."""
    assert choice.messages is not None, "asked where they were counted"
    found = 0.0
    for op in ops:
        if sent := choice.messages.get(op):
            moved = sent.nbytes * (2 if op == ALL_REDUCE else 1) * (choice.ranks - 1) / choice.ranks
            each = (rates.sum_message_s if op == ALL_REDUCE else 0.0) or rates.message_s or rates.wire_latency_s
            found += moved / max(rates.wire_nbytes_s, 1.0) + sent.calls * each
    return found


def _unshard_more_s(rates: Rates, choice: Choice) -> float:
    """What an all-gather costs more where a module needs it: hooks, memory that comes and goes, ranks that stand still."""
    each = rates.message_s or rates.wire_latency_s
    prefetched = rates.unshard_s or each
    return max(0.0, (prefetched if choice.prefetch_numel else rates.unshard_late_s or prefetched) - each)


def _gather(rates: Rates, work: Work, choice: Choice) -> float:
    if choice.stage == 0:
        return 0.0
    nbytes = work.num_params * (1.03 if choice.quantized_weights and choice.stage == 3 else work.param_itemsize)
    per_micro = 1 if work.num_params <= choice.reuse_numel else 2
    if choice.messages is not None and not choice.quantized_weights:
        around = choice.unshards
        more_s = around.calls * _unshard_more_s(rates, choice) + around.params * rates.unshard_param_s
        gathered = _sent(rates, choice, GATHER) + more_s
    elif choice.stage < 3:
        gathered = _wire(rates, nbytes, _calls(work, choice), choice.ranks)
    else:
        calls = max(_calls(work, choice), work.num_modules / 8)
        gathered = choice.accumulation * per_micro * _wire(rates, nbytes, calls, choice.ranks)
    if choice.stage < 3 or choice.params_on == "device":
        return gathered
    rate = rates.disk_read_nbytes_s if choice.params_on == "nvme" else rates.host_nbytes_s
    return gathered + choice.accumulation * per_micro * nbytes / choice.ranks / (rate or rates.copy_nbytes_s)


def _reduce(rates: Rates, work: Work, choice: Choice) -> float:
    copies = choice.accumulation * 3 * work.num_params * work.param_itemsize / rates.copy_nbytes_s
    if choice.messages is not None and not choice.quantized_gradients:
        return _sent(rates, choice, SCATTER, ALL_REDUCE) + copies
    itemsize = 0.53 if choice.quantized_gradients else work.param_itemsize
    nbytes = work.num_params * itemsize * (2 if choice.stage == 0 else 1)
    times = choice.accumulation if choice.stage >= 2 else 1
    return times * _wire(rates, nbytes, _calls(work, choice), choice.ranks) + copies


def _update(rates: Rates, work: Work, choice: Choice) -> float:
    owned = work.num_params / (choice.ranks if choice.stage >= 1 else 1)
    touched = owned * (2 * work.state_itemsize + 2 * work.param_itemsize)
    calls = rates.update_s + work.num_tensors * rates.update_param_s
    if choice.states_on == "device":
        return calls + touched / rates.copy_nbytes_s
    if choice.states_on == "cpu":
        host = rates.host_nbytes_s or rates.copy_nbytes_s
        return calls + touched / min(host, rates.copy_nbytes_s) + 2 * owned * work.param_itemsize / host
    read, write = rates.disk_read_nbytes_s or 1e9, rates.disk_write_nbytes_s or 1e9
    return calls + owned * work.state_itemsize * (1 / read + 1 / write) + touched / rates.copy_nbytes_s
