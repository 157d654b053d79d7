"""TCP ports on this machine: is one free, find one, keep one. Used by `comm` and by the launcher; imports no torch."""

from __future__ import annotations

import socket


def is_free(port: int) -> bool:
    """Whether this process could listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: TIME_WAIT is no obstacle
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def reserve_port(port: int) -> socket.socket | None:
    """Keep a port, 0 for any, from other callers of this function for as long as the socket is open; None if taken.

    torch.distributed can listen on a kept port: two sockets may share one if both say SO_REUSEADDR and only one
    listens. A caller who finds the port bound at all takes it for taken, so two launchers started at the same moment
    do not send their ranks to the same port.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return None
        port = probe.getsockname()[1]
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        kept.bind(("", port))
    except OSError:
        kept.close()
        return None
    return kept
