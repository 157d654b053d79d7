"""torchrun's elastic agent, told of lost nodes by our launcher instead of waiting for a collective to time out.

`launcher.elastic` builds and runs it. torch's agent starts ranks again when one of its own fails or when a node wants to
join. A node whose network is cut fails nobody's sockets, so the ranks left behind would hang until the timeout of the
collective; the launcher's lease notices in seconds, and SIGUSR1 to this process says so.

Source: torch.distributed.elastic, SimpleElasticAgent's states (an unhealthy group is started again, as a failed one).
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent


class DSElasticAgent(LocalElasticAgent):
    """Runs a node's ranks; starts them again in a new world after a failure, a join, or `note_lost_node`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._node_is_lost = threading.Event()

    def note_lost_node(self) -> None:
        """Another node is gone: end this node's ranks, and meet again without it."""
        self._node_is_lost.set()

    def heed_signal(self, number: int = signal.SIGUSR1) -> None:
        """Take a signal for the loss of a node; main thread only."""
        signal.signal(number, lambda *_: self.note_lost_node())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and self._node_is_lost.is_set():
            result = RunResult(state=WorkerState.UNHEALTHY)
        self._node_is_lost.clear()
        return result
