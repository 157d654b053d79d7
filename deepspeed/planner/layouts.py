"""Layouts of a model over a cluster: which there are, and what each needs, sends and takes. Pure.

A layout says how many ranks each dim has, how a batch is cut, and how ZeRO shards. Of each:

    memory   parameters, gradients and states by ZeRO; activations of the micro-batches that are alive; buffers
    bytes    what a rank sends and receives in a step, by who it shares with
    bubble   of the pipeline, by the schedule's own lists, simulated
    time     stages with their tensor, sequence and expert traffic, the bubble, what of ZeRO's traffic does not hide, the update

Invariant: the dims' sizes multiply to the ranks, micro x accumulation x data-parallel ranks = the batch.
Sources: Megatron-LM (arXiv:2104.04473) for what tensor and pipeline parallelism send, Ulysses (2309.14509), ZeRO (1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepspeed.memory.inside import Inside, Way
from deepspeed.memory.messages import Messages, summed
from deepspeed.memory.shape import ModelShape
from deepspeed.mesh.shape import DEGREES
from deepspeed.parallel.sequence.messages import RING, Attends, of_attention, of_inputs
from deepspeed.planner.cluster import GB, Cluster
from deepspeed.planner.cost import EFFICIENCY, ELEMENTWISE_PASSES
from deepspeed.utils.errors import DeepSpeedError

RESERVED_GB = 1.0
"""The device's context, libraries, fragmentation."""
BUCKET_NBYTES = 3 * (8 << 20)
"""Elements of flat buffers that ZeRO borrows."""
GRADIENT_PASSES = 4
"""How often the bytes of a rank's gradients go through memory in a micro-batch: written by a product, read, and added to what is there."""
TOKENS = "moe.tokens"
"""Rows that leave a rank; its own do not count."""
CUT_SHARE = 0.7
"""Of what a block keeps, the part inside of cut layers, which tensor-parallel ranks share; the rest is whole on each."""


@dataclass(frozen=True, kw_only=True, order=True)
class Layout:
    """How ranks, batch and states are divided."""

    pp: int = 1
    dp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    stage: int = 0
    micro: int = 1
    accumulation: int = 1
    recompute: bool = False
    offload: bool = False
    """Optimizer states on the host."""

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.pp * self.dp * self.sp * self.tp

    @property
    def name(self) -> str:
        """As tables write it: dims of more than one rank, then the rest."""
        dims = " ".join(f"{key}{getattr(self, key)}" for key in DEGREES if getattr(self, key) > 1)
        more = f"{' recompute' if self.recompute else ''}{' offload' if self.offload else ''}"
        return f"{dims or 'one rank'} zero{self.stage} {self.micro}x{self.accumulation}{more}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a layout comes to. Bytes, seconds; per rank where it says nothing else."""

    layout: Layout
    memory: dict[str, float]
    """Bytes by kind, of the rank that needs most."""
    host_nbytes: float
    traffic: dict[str, float]
    """Bytes that a rank sends in a step, by who it shares with."""
    compute_s: float
    """Of the busiest rank, traffic inside of layers included."""
    bubble_s: float
    exposed_s: float
    """ZeRO's traffic that does not hide behind backward."""
    update_s: float
    forward_s: float
    """Of one micro-batch at one stage."""
    backward_s: float
    hop_s: float
    turns: float = 1.0
    """Of how many ranks that compute one has its turn: the others' are shorter where some wait."""

    @property
    def device_nbytes(self) -> float:
        """Peak of a device."""
        return sum(self.memory.values())

    def fits(self, cluster: Cluster) -> bool:
        """Whether a device, and where states rest on hosts a device's part of one, has room for it."""
        host = cluster.host.memory_gb * GB / cluster.devices_per_node
        return self.device_nbytes <= cluster.device.memory_gb * GB and self.host_nbytes <= host

    @property
    def step_s(self) -> float:
        """Of a step."""
        return self.compute_s + self.bubble_s + self.exposed_s + self.update_s

    @property
    def bubble(self) -> float:
        """The share of the pipeline's time in which ranks wait."""
        return self.bubble_s / (self.compute_s + self.bubble_s) if self.bubble_s else 0.0

    def cost(self, cluster: Cluster, steps: int = 1) -> float:
        """Money for so many steps."""
        return steps * self.step_s / 3600 * self.layout.num_ranks * cluster.price_per_device_hour


def layouts(shape: ModelShape, cluster: Cluster, batch: int) -> Iterator[Layout]:
    """Every layout of `batch` samples per step that divides evenly, and that the engine runs where the shape knows what layers send."""
    known = shape.inside
    for base in divisions(shape, cluster):
        names = {Way(base.tp).name(), Way(1, base.ep).name()}
        if batch % base.dp == 0 and (not known or names <= known.keys()):
            yield from _with_batches(base, batch // base.dp)


def ways_of(shape: ModelShape, cluster: Cluster) -> list[Way]:
    """In which layers may be shared over a cluster's ranks."""
    return sorted({way for base in divisions(shape, cluster) for way in (Way(base.tp), Way(1, base.ep))})


def divisions(shape: ModelShape, cluster: Cluster) -> Iterator[Layout]:
    """Every way to divide the ranks that goes evenly, with a batch of one."""
    ranks = cluster.num_devices
    for tp in _divisors(cluster.devices_per_node):
        if tp > 1 and (not shape.num_heads or shape.num_heads % tp or shape.num_kv_heads % tp):
            continue
        for pp in _divisors(ranks // tp):
            if pp > _most_stages(shape):
                break
            for sp in _divisors(cluster.devices_per_node // tp):
                if not _may_cut_sequences(shape, tp, sp) or ranks % (tp * pp * sp):
                    continue
                dp = ranks // (tp * pp * sp)
                for ep in _divisors(min(dp * sp, shape.num_experts)) if shape.num_experts else [1]:
                    if (dp * sp) % ep == shape.num_experts % ep == 0:
                        yield Layout(pp=pp, dp=dp, sp=sp, tp=tp, ep=ep)


def check_divides(shape: ModelShape, layout: Layout) -> None:
    """A layout that a user asks for cuts the model where it can be cut. Raises DeepSpeedError; layers over ranks are `with_inside`'s to refuse."""
    most = _most_stages(shape)
    if layout.pp > most:
        raise DeepSpeedError(
            f"layout pp{layout.pp}: {shape.name} has {shape.num_blocks} blocks in {shape.num_stacks} list(s), which make at most {most} stage(s).\n"
            "  Use fewer."
        )
    if not _may_cut_sequences(shape, layout.tp, layout.sp):
        raise DeepSpeedError(
            f"layout sp{layout.sp}: the sequences of {shape.name} cannot be divided over {layout.sp} ranks, each of which has a part of its "
            f"{shape.num_heads // layout.tp} heads.\n  Use fewer, or leave sp out."
        )
    if layout.ep > 1 and ((layout.dp * layout.sp) % layout.ep or shape.num_experts % layout.ep):
        raise DeepSpeedError(
            f"layout ep{layout.ep} does not divide {shape.num_experts} experts, or dp x sp = {layout.dp * layout.sp} ranks.\n  Use another."
        )


def _most_stages(shape: ModelShape) -> int:
    return shape.num_blocks if shape.num_stacks == 1 else 1


def _may_cut_sequences(shape: ModelShape, tp: int, sp: int) -> bool:
    return sp == 1 or bool(shape.cuts_sequences and shape.num_heads and (shape.num_heads // tp) % sp == 0)


def _with_batches(base: Layout, samples: int) -> Iterator[Layout]:
    stages = (0, 1, 2, 3) if base.dp * base.sp > 1 else (0,)
    for micro in (size for size in (1, 2, 4, 8, 16, 32, 64) if samples % size == 0):
        for stage in stages:
            for recompute in (False, True):
                yield replace(base, stage=stage, micro=micro, accumulation=samples // micro, recompute=recompute)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def evaluate(shape: ModelShape, cluster: Cluster, layout: Layout) -> Plan:
    """What a layout needs and takes, with the pipeline's bubble by formula (1F1B).

    Ranks that take turns on processors have them while others wait, so that a bubble costs what it exceeds the turns by, and what a message
    between stages takes is work that they do.
    """
    blocks = -(-shape.num_blocks // layout.pp)
    forward_s, backward_s, inside = _stage_seconds(shape, cluster, layout)
    hop_nbytes = shape.boundary_nbytes * layout.micro / layout.sp if layout.pp > 1 else 0.0
    stride = layout.num_ranks // layout.pp
    hop_s = hop_nbytes / cluster.wire_nbytes_s(2, stride) + cluster.latency_s(2) if layout.pp > 1 else 0.0
    per_micro, turns = forward_s + backward_s, cluster.turns
    list_s = (layout.accumulation + layout.pp - 1) * per_micro / turns + 2 * (layout.pp - 1) * hop_s
    sent_s = 2 * hop_s * (layout.pp - 1) / layout.pp if turns > 1 else 0.0
    compute_s = layout.accumulation * (per_micro + sent_s)
    bubble_s = max(0.0, list_s - compute_s) if layout.pp > 1 else 0.0
    gathered, reduced = _zero_traffic(shape, layout, blocks)
    exposed_s = _exposed(shape, cluster, layout, gathered, reduced, backward_s)
    memory, host = memory_of(shape, layout)
    return Plan(
        layout=layout,
        memory=memory,
        host_nbytes=host,
        traffic={
            **inside,
            "pipeline": min(layout.pp - 1, 2) * hop_nbytes * layout.accumulation,
            "gather": gathered,
            "reduce": reduced,
        },
        compute_s=compute_s,
        bubble_s=bubble_s,
        exposed_s=exposed_s,
        update_s=_update_s(shape, cluster, layout, blocks),
        forward_s=forward_s,
        backward_s=backward_s,
        hop_s=hop_s,
        turns=turns,
    )


def rank_params(shape: ModelShape, layout: Layout, blocks: int) -> float:
    """Parameters of the rank with most, before ZeRO."""
    cut = shape.block_cut_params - shape.block_expert_params
    whole = shape.block_params - shape.block_cut_params
    block = whole + cut / layout.tp + shape.block_expert_params / layout.ep / layout.tp
    last = shape.outer_params - shape.first_params
    outer = shape.outer_params if layout.pp == 1 else max(shape.first_params, last)
    return blocks * block + outer / layout.tp


def stage_work(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """(operations, kept bytes) of a micro-batch of the busiest rank, forward and backward.

    With stages, what is around the blocks is taken for balanced by the partition, as far as whole blocks allow.
    """
    blocks = -(-shape.num_blocks // layout.pp)
    per_rank = layout.micro / (layout.tp * layout.sp)
    flops = max(blocks * shape.block_flops * per_rank, shape.num_blocks * shape.block_flops * per_rank / layout.pp
                + shape.outer_flops * per_rank / layout.pp)  # fmt: skip
    inside = (1 - CUT_SHARE) + CUT_SHARE / layout.tp
    outer_kept = shape.outer_kept_nbytes * layout.micro / layout.sp if layout.pp == 1 else 0.0
    return flops, blocks * shape.block_kept_nbytes * layout.micro / layout.sp * inside + outer_kept


class Sent(NamedTuple):
    """What layers of one rank send in one micro-batch, forward and backward, to those it shares them with."""

    nbytes: float
    calls: float
    ranks: int
    stride: int
    """How far apart these are."""


def messages_inside(shape: ModelShape, layout: Layout, stage: int | None = None) -> dict[str, Messages]:
    """Messages that layers send in one micro-batch, by operation, as `comm.recorder` counts them. `stage`: of the pipeline; None: of
    the whole model's. Raises DeepSpeedError for a way of sharing layers that the shape does not know.
    """
    blocks = -(-shape.num_blocks // layout.pp)
    cut, spread = (_sent_in(shape, way, layout.recompute) for way in (Way(layout.tp), Way(1, layout.ep)))
    scale = layout.micro / layout.sp
    found: dict[str, list[float]] = {}

    def add(sent: Mapping[str, Sequence[float]], times: float, scale: float, *, of_experts: bool) -> None:
        for op, (calls, size) in sent.items():
            if op.startswith("moe.") == of_experts:
                before = found.get(op, (0.0, 0.0))
                found[op] = [before[0] + times * calls, before[1] + times * scale * size]

    for inside, of_experts in ((cut, False), (spread, True)):
        add(inside.block, blocks, scale, of_experts=of_experts)
        add(inside.fixed, blocks, 1, of_experts=of_experts)
        if stage in (None, 0):
            add(inside.first, 1, scale, of_experts=of_experts)
        if stage in (None, layout.pp - 1):
            add(inside.last, 1, scale, of_experts=of_experts)
    sent = {op: Messages(round(calls), round(nbytes)) for op, (calls, nbytes) in found.items() if round(calls)}
    return sent | _of_sequences(shape, layout, blocks, cut)


def _sent_in(shape: ModelShape, way: Way, recompute: bool) -> Inside:
    """What layers send in a way. One rank that shares nothing sends nothing, whatever the shape knows."""
    known = shape.inside.get(way.name(recompute))
    if known is not None:
        return known
    if way == Way():
        return Inside()
    why = shape.refused.get(way.name())
    if why is not None:
        raise DeepSpeedError(f"{shape.name} cannot be divided as {way.words}, the engine refuses it: {why}")
    others = ", ".join(f'"{name}"' for name in shape.inside) or "none"
    raise DeepSpeedError(
        f'{shape.name} as {way.words}: its shape does not know what its layers send, "{way.name(recompute)}" is not among its ways: {others}.\n'
        f"  Make it with deepspeed.memory.shape.with_inside(shape, model, batch, [Way(tp={way.tp}, ep={way.ep})])."
    )


def _of_sequences(shape: ModelShape, layout: Layout, blocks: int, cut: Inside) -> dict[str, Messages]:
    """What ranks send that have a part of each sequence. Where no attention was seen, it is one per block over all heads."""
    if layout.sp == 1:
        return {}
    seen = [(Attends(*at), rings) for at, rings in cut.attends]
    if not seen:
        heads, keys = shape.num_heads // layout.tp, max(1, shape.num_kv_heads // layout.tp)
        width = round(shape.boundary_nbytes / max(1, shape.num_heads) / shape.itemsize / layout.sp)
        seen = [(Attends(1, heads, keys, layout.sp, width, width, shape.itemsize), False)]
    sent: list[tuple[str, int]] = []
    for number, (at, rings) in enumerate(seen):
        own = at._replace(samples=layout.micro, tokens=-(-at.tokens // layout.sp))
        forward, backward = of_attention(own, layout.sp, can_ring=rings)
        sent += [*forward, *backward, *(forward if number < cut.num_again else ())] * blocks
    tokens = -(-seen[0][0].tokens // layout.sp)
    return summed(sent + of_inputs(layout.micro, tokens, layout.sp, shape.input_rows))


_DIM_OF = {"tensor": "tensor", "sequence": "sequence", "moe": "experts"}
"""Who shares what operations of a name's first part move."""


def sent_inside(shape: ModelShape, layout: Layout) -> dict[str, Sent]:
    """By dim, of the stage that sends most. Bytes as rings and pairs of ranks move them."""
    found: dict[str, Sent] = {}
    stages: Sequence[int | None] = (0, layout.pp - 1) if layout.pp > 1 else (None,)
    for stage in stages:
        of_stage = moved_inside(messages_inside(shape, layout, stage), layout)
        found = {dim: max(found.get(dim, sent), sent) for dim, sent in of_stage.items()}
    return found


def moved_inside(messages: Mapping[str, Messages], layout: Layout) -> dict[str, Sent]:
    """Messages of layers by dim, as rings and pairs of ranks move them; others, ZeRO's, are left out."""
    groups = {"tensor": (layout.tp, 1), "sequence": (layout.sp, layout.tp), "experts": (layout.ep, layout.tp)}
    found = {dim: Sent(0.0, 0.0, *group) for dim, group in groups.items() if group[0] > 1}
    for op, sent in messages.items():
        dim = _DIM_OF.get(op.partition(".")[0], "")
        if dim in found:
            before, (ranks, _) = found[dim], groups[dim]
            share = 1.0 if op in (RING, TOKENS) else (ranks - 1) / ranks * (2 if op.endswith("all_reduce") else 1)
            found[dim] = before._replace(nbytes=before.nbytes + share * sent.nbytes, calls=before.calls + sent.calls)
    return found


def _stage_seconds(shape: ModelShape, cluster: Cluster, layout: Layout) -> tuple[float, float, dict[str, float]]:
    """(forward, backward) of a micro-batch at a stage, and bytes inside of layers in a step."""
    flops, kept = stage_work(shape, layout)
    products = flops / (EFFICIENCY * cluster.device.tflops * 1e12)
    elements = ELEMENTWISE_PASSES * kept / (cluster.device.memory_gb_s * GB)
    sent = sent_inside(shape, layout)
    wires = sum(
        s.nbytes / cluster.wire_nbytes_s(s.ranks, s.stride) + s.calls * cluster.inside_s(s.ranks) for s in sent.values()
    )
    again = 1.0 if layout.recompute else 0.0
    modules = (shape.num_blocks * shape.block_modules + shape.outer_modules) / layout.pp
    computed = products + elements + modules * cluster.device.call_us * 1e-6
    if any(s.calls for s in sent.values()):
        wires += cluster.links.wait * (1 + again / 3) * computed
    forward_s = computed / 3 + wires / 2
    params = rank_params(shape, layout, -(-shape.num_blocks // layout.pp))
    gradients = GRADIENT_PASSES * params * shape.itemsize / (cluster.device.memory_gb_s * GB)
    backward_s = 2 * computed / 3 + wires / 2 + gradients + again * computed / 3
    return forward_s, backward_s, {dim: s.nbytes * layout.accumulation for dim, s in sent.items()}


def _zero_traffic(shape: ModelShape, layout: Layout, blocks: int) -> tuple[float, float]:
    """(gathered, reduced) bytes of a rank in a step."""
    ranks = layout.dp * layout.sp
    if ranks == 1:
        return 0.0, 0.0
    nbytes = rank_params(shape, layout, blocks) * shape.itemsize * (ranks - 1) / ranks
    if layout.stage == 0:
        return 0.0, 2 * nbytes
    times = layout.accumulation if layout.stage >= 2 else 1
    return nbytes * (2 * layout.accumulation if layout.stage == 3 else 1), nbytes * times


def _exposed(
    shape: ModelShape, cluster: Cluster, layout: Layout, gathered: float, reduced: float, backward_s: float
) -> float:
    ranks = layout.dp * layout.sp
    if ranks == 1:
        return 0.0
    wire = cluster.wire_nbytes_s(ranks, layout.tp)
    latency = cluster.latency_s(ranks)
    if layout.stage == 3:  # prefetched and reduced beside the whole computation
        calls = 3 * layout.accumulation * -(-shape.num_blocks // layout.pp)  # each block's, twice gathered
        spent = (gathered + reduced) / wire + latency * calls
        return max(0.0, spent - cluster.links.overlap * layout.accumulation * 1.5 * backward_s)
    times = layout.accumulation if layout.stage == 2 else 1
    hidden = cluster.links.overlap * backward_s * times
    return max(0.0, reduced / wire - hidden) + gathered / wire + latency * (1 + times if layout.stage else 1)


def _update_s(shape: ModelShape, cluster: Cluster, layout: Layout, blocks: int) -> float:
    owned = rank_params(shape, layout, blocks) / (layout.dp * layout.sp if layout.stage else 1)
    rate = (cluster.host.link_gb_s if layout.offload else cluster.device.memory_gb_s) * GB
    return owned * (2 * 12 + 2 * shape.itemsize) / rate


def memory_of(shape: ModelShape, layout: Layout) -> tuple[dict[str, float], float]:
    """(device by kind, host) bytes of the rank that needs most."""
    blocks = -(-shape.num_blocks // layout.pp)
    params = rank_params(shape, layout, blocks)
    ranks = layout.dp * layout.sp
    itemsize = shape.itemsize
    states = params * 12 / (ranks if layout.stage >= 1 else 1)
    alive = min(layout.pp, layout.accumulation)
    inside = (1 - CUT_SHARE) + CUT_SHARE / layout.tp
    kept = shape.block_kept_nbytes * layout.micro / layout.sp * inside
    if layout.recompute:
        boundary = shape.boundary_nbytes * layout.micro / layout.sp
        activations = alive * blocks * boundary + kept
    else:
        activations = alive * blocks * kept
    if layout.pp == 1:
        activations += shape.outer_kept_nbytes * layout.micro / layout.sp
    live = 0.0
    if layout.stage == 3:
        live = 2 * itemsize * (shape.block_params + shape.outer_params / 2) / layout.tp
    return {
        "parameters": params * itemsize / (ranks if layout.stage == 3 else 1),
        "unsharded parameters": live,
        "gradients": params * itemsize / (ranks if layout.stage >= 2 else 1),
        "optimizer states": 0.0 if layout.offload else states,
        "activations": activations,
        "buffers": BUCKET_NBYTES * itemsize + RESERVED_GB * GB,
    }, states if layout.offload else 0.0
