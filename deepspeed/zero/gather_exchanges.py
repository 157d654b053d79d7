"""How parameters are gathered at stage 3 where the configuration asks for another way: quantised, with a copy near by.

Made by `assembly` from `zero_optimization`; read by `zero.build`, which gives each sharded bucket its exchanges. Pure but for
making exchanges.

    quantizes_weights   a step's gathers carry int8, in two hops where there are nodes; what a script sees of parameters (gather
                        contexts, exports) is exact
    keeps_copy          hpZ: the first gather after an update fills a copy among near ranks, later ones read that
    quantizes_frozen    parameters that do not train rest as int8, whatever gathers carry
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.comm.exchange import Exchange
from deepspeed.comm.quantized_exchanges import QuantizedGather
from deepspeed.comm.relay import Relay, RelayedExchange
from deepspeed.comm.secondary import SecondaryExchange


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherExchanges:
    """See the module's text."""

    quantizes_weights: bool = False
    keeps_copy: bool = False
    quantizes_frozen: bool = False

    def exchanges(
        self, plain: Exchange, near: Exchange | None, relay: Relay | None
    ) -> tuple[Exchange, Exchange | None]:
        """(exact gathers, a step's where they are others) of one bucket."""
        quantizes = self.quantizes_weights and plain.world_size > 1
        hops = plain if relay is None else RelayedExchange(plain, relay)
        gather: Exchange = QuantizedGather(hops) if quantizes else plain
        if self.keeps_copy and near is not None:
            gather = SecondaryExchange(gather, near)
        return (plain, gather) if quantizes else (gather, None)
