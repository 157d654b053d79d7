"""Which exchanges parameters and gradients move by, where the configuration asks for fewer bytes (ZeRO++).

Called by `assembly.assemble` and by the engine's builder; the exchanges are `comm`'s, who moves what is `zero`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from deepspeed.comm.exchange import Exchange
from deepspeed.comm.feedback import ErrorFeedback
from deepspeed.comm.quantized_exchanges import Hops, QuantizedReduction
from deepspeed.comm.sparse import SparseReduction
from deepspeed.config import Config
from deepspeed.mesh import Mesh
from deepspeed.utils.launch_env import discover
from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gather_exchanges import GatherExchanges


def make_gather_exchanges(config: Config) -> GatherExchanges:
    """How parameters are gathered."""
    zero = config.zero_optimization
    if zero.zeropp_loco_param is not None and not zero.zero_quantized_gradients:
        warn_once("zero_optimization.zeropp_loco_param has no effect: zero_quantized_gradients is not set.")
    if config.sparse_gradients and zero.stage > 0:
        warn_once(
            f"sparse_gradients = true has no effect: with zero_optimization.stage = {zero.stage} each rank gets its slice of a gradient, "
            "which is sent whole. Embeddings with sparse gradients train all the same."
        )
    if zero.stage < 3 and zero.zero_hpz_partition_size > 1:
        warn_once(
            f"zero_optimization.zero_hpz_partition_size = {zero.zero_hpz_partition_size} has no effect: with stage = {zero.stage} parameters "
            "are whole on every rank, so there is nothing to keep copies of."
        )
    if zero.stage < 3:
        return GatherExchanges()
    return GatherExchanges(
        quantizes_weights=zero.zero_quantized_weights,
        keeps_copy=zero.zero_hpz_partition_size > 1,
        quantizes_frozen=zero.zero_quantized_nontrainable_weights,
    )


def near_size(config: Config, num_ranks: int, tp: int, has_mpu: bool) -> int:
    """Ranks that are near each other among those that share parameters: what hpZ says, or, for the two hops of what is quantized
    alone, those of a node where they divide all; 1 where nothing asks. Layers are cut over `tp` neighbours."""
    zero = config.zero_optimization
    if zero.stage == 3 and zero.zero_hpz_partition_size > 1:
        return zero.zero_hpz_partition_size
    has_hops = zero.zero_quantized_gradients or (zero.stage == 3 and zero.zero_quantized_weights)
    if not has_hops or has_mpu or zero.mics_shard_size > 0:
        return 1
    ranks_of_node = max(1, discover(os.environ).local_size)
    if ranks_of_node % tp or num_ranks % ranks_of_node:
        return 1
    return ranks_of_node // tp


def gradient_exchange(
    config: Config, mesh: Mesh, exchange: Exchange, bucket: Bucket
) -> tuple[Exchange, Sequence[ErrorFeedback]]:
    """How one bucket's gradients are reduced between the ranks that share it: as they are, or quantised in two hops.

    Parameters that stay whole at stage 3 are small, vectors mostly, and reduced in full. Beside it, what is kept of its messages'
    errors. Collective at first use.
    """
    zero = config.zero_optimization
    if config.sparse_gradients and zero.stage == 0 and exchange.world_size > 1:
        return SparseReduction(exchange), ()
    is_small = zero.stage == 3 and not bucket.is_sharded
    if not zero.zero_quantized_gradients or exchange.world_size == 1 or is_small or bucket.over != "shard":
        return exchange, ()
    hops = mesh.shared("hops", lambda: _hops(mesh))
    loco = zero.zeropp_loco_param
    feedback: Callable[[], ErrorFeedback] | None = None
    if loco is not None:
        beta, reset_every = loco.err_beta, loco.reset_T
        feedback = lambda: ErrorFeedback(beta, reset_every)  # noqa: E731
    reduction = QuantizedReduction(exchange, hops, feedback=feedback)
    return reduction, reduction.feedback


def _hops(mesh: Mesh) -> Hops:
    if mesh.size("near") > 1:
        return Hops(mesh.group("near", "reduce"), mesh.group("far", "reduce"))
    return Hops(None, mesh.group("shard", "reduce"))
