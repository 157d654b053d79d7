"""One node's part of an elastic job: torchrun's agent, as a child of the node's launcher.

    python -m deepspeed.launcher.elastic --nodes=1:2 --ranks=4 --meet=host:port [--local_rank_at=N] -- command...

The agents of all nodes meet in a c10d store at `--meet`, form a world of as many nodes as are there, and start the
ranks; when one fails, leaves or joins, all ranks are started again in a world of the new size, and the script resumes
from its last checkpoint. Of the launcher's modules, this one alone imports torch, in a process of its own.

Invariant: a rank ends with this process, however that ends (`tether`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed.launcher.control import address_towards, split_address

MAX_RESTARTS = 100
MONITOR_S = 0.5
JOIN_S = 600
"""How long a node waits for the fewest nodes."""
LAST_CALL_S = 5
"""How long a world with the fewest nodes waits for more."""
KEEP_ALIVE_S = 2
"""Between two signs of life of a node to the others; three missed ones, and it is out."""


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deepspeed.launcher.elastic", allow_abbrev=False)
    parser.add_argument("--nodes", required=True, metavar="MIN:MAX")
    parser.add_argument("--ranks", required=True, type=int)
    parser.add_argument("--meet", required=True, metavar="HOST:PORT")
    parser.add_argument("--log_dir", type=Path)
    parser.add_argument(
        "--local_rank_at", type=int, default=0, help="where in the command to put --local_rank=N; 0: none"
    )
    parser.add_argument("command", nargs="+")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run this node's ranks until the job is over; the exit code."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from deepspeed.elasticity.agent import DSElasticAgent

    parsed = _parse(args)
    # Otherwise all worlds of a job meet at the store of the first world's rank 0, which may be on the node that is lost.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    host, _ = split_address(parsed.meet)
    least, _, most = parsed.nodes.partition(":")
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=parsed.meet,
        run_id=os.environ.get("ELASTIC_RUN_ID", "123456789"),
        min_nodes=int(least),
        max_nodes=int(most),
        local_addr=address_towards(host),
        join_timeout=JOIN_S,
        last_call_timeout=LAST_CALL_S,
        keep_alive_interval=KEEP_ALIVE_S,
        keep_alive_max_attempt=3,
    )
    tether = [sys.executable, "-u", "-m", "deepspeed.launcher.tether", str(os.getpid()), str(parsed.local_rank_at)]
    words = [*tether, *parsed.command]
    spec = WorkerSpec(
        role="default",
        local_world_size=parsed.ranks,
        entrypoint=words[0],
        args=tuple(words[1:]),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=MAX_RESTARTS,
        monitor_interval=MONITOR_S,
        local_addr=address_towards(host),
    )
    logs = DefaultLogsSpecs(log_dir=str(parsed.log_dir), redirects=Std.ALL) if parsed.log_dir else DefaultLogsSpecs()
    agent = DSElasticAgent(spec, logs)
    agent.heed_signal()
    result = agent.run()
    if not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    print(f"local rank {first.local_rank} failed too often: exit code {first.exitcode}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 256 + first.exitcode


if __name__ == "__main__":
    sys.exit(main())
