"""Run a function on several gloo ranks, or in one fresh process, from inside a pytest test.

Tests call `run_ranks` and `run_alone`; `conftest.py` ends the pools with the session. Uses torch and multiprocessing
only, nothing of the package under test.

Starting a process that imports torch costs seconds, a test costs milliseconds. So there is one pool of processes per
world size, forked from a server that has torch imported (about 0.1 s per pool instead of 3 s spawned), joined in a
gloo process group once and reused by every test of the session:

    test process  --(function by name, arguments)-->  rank 0, rank 1, ...
                  <--(result | exception, stack)----
                  --(check)----------------------->   only once every rank has returned
                  <--(leaks found)-----------------

Each process group of gloo has a thread that polls, and groups that a mesh makes live as long as the process: pools
that have lain idle the longest are ended when all of them together hold more than KEPT_GROUPS.

Invariant: a pool that is reused is as good as new. After each call every rank looks for process groups, threads and
environment variables that the call left, and what it finds fails the test. A pool in which a rank raised, died, leaked
or timed out is killed, because its other ranks may wait in a collective for ever, and the next call starts another.

Time limits count what the ranks had: wall time less what their main threads stood ready for a core that others used. A rank that
hangs stands ready for none, so on a machine of much load hangs are found as soon, and slow runs are not taken for one.

Workers never outlive the tests: in each a thread waits for the end of the test process, and the server ends with the
last of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist

GRACE_S = 1.0
"""How long the other ranks may still report after one has failed."""
START_S = 60.0
"""How long a pool may take to come up."""
MOST_LOAD = 20.0
"""How many times as long as its limit a call may take where others use the cores."""
THREAD_GRACE_S = 1.0
"""How long a thread started in a call may take to end after it."""
KEPT_GROUPS = 256
"""How many process groups, counted on every rank, the pools of this process may hold between calls."""

PRELOAD = ["pytest", "numpy", "pydantic", "torch", "torch.distributed"]
DISTRIBUTED_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LIBRARY_ENV = ("PYTEST_", "PYTORCH_NVML_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")
"""Prefixes of variables that pytest, torch.compile and the import of the package set for the life of a process."""
SHARED_GROUP = re.compile(
    r"[a-z_+]+\.(activations|activations_back|build|checkpoint|control|gather|gradients|gradients_back|late|late_failure|late_loss|norm|reduce|relay|script|tensor|tokens)"
)
"""Descriptions of the groups that a mesh makes: dims and purpose."""
LIBRARY_THREADS = ("tqdm_monitor", "ThreadPoolExecutor-", "wandb-", "Otel", "Dummy-")
"""Prefixes of threads that tqdm, torch.compile, wandb and autograd (for a device) keep for the life of a process. Ours have names of their own."""


class RanksFailedError(Exception):
    """Ranks raised, died or timed out. `rank_exceptions` has the exception of each, by rank, with its own type."""

    def __init__(self, message: str, rank_exceptions: Mapping[int, BaseException]) -> None:
        super().__init__(message)
        self.rank_exceptions = dict(rank_exceptions)


class LeakError(AssertionError):
    """A call left a process group, a thread or a changed environment variable behind."""


class UnpicklableError(Exception):
    """Stands for an exception of a rank that cannot travel between processes; its text has the type."""


class Outcome(NamedTuple):
    """What one rank sends back: `payload` is the result, or the exception where `is_error`."""

    is_error: bool
    payload: bytes
    text: str = ""


def run_ranks(
    world_size: int, fn: Callable[..., Any], /, *args: Any, timeout: float = 60.0, device: str = "cpu", **kwargs: Any
) -> list[Any]:
    """Call `fn(rank, world_size, *args, **kwargs)` on every rank of a gloo group; the results in rank order.

    With `device="sim"` ranks have a simulated device each (tests/device), and the group's backend is the device's.

    `fn` is a module-level function. Arguments and results are anything torch.save takes; they are copied. Each rank
    starts with the same seed, one torch thread, and the environment a launcher would set.

    Raises RanksFailedError with every failing rank's traceback where a rank raises, dies, leaks, or is not done after
    `timeout` seconds; then the pool is killed, which costs the next call about 0.3 s. To test an error that all ranks
    raise, use `pytest.raises` inside `fn`: that keeps the pool. Seconds that ranks wait for a core are not counted.
    """
    __tracebackhide__ = True
    pool = _pools.pop((world_size, device), None) or Pool(world_size, device=device)
    try:
        results = pool.call(fn, args, kwargs, timeout)
        pool.check_leaks()
    except BaseException:
        pool.kill()
        raise
    _pools[world_size, device] = pool  # the last of them, which is the latest used
    _end_idle_pools()
    return results


def run_alone(fn: Callable[..., Any], /, *args: Any, timeout: float = 60.0, **kwargs: Any) -> Any:
    """Call `fn(*args, **kwargs)` in a fresh process without a process group or its environment variables."""
    __tracebackhide__ = True
    pool = Pool(1, is_distributed=False)
    try:
        return pool.call(fn, args, kwargs, timeout)[0]
    finally:
        pool.kill()


def _end_idle_pools() -> None:
    """Kill the pools that were not used for the longest until the others hold no more than KEPT_GROUPS."""
    while sum(pool.groups for pool in _pools.values()) > KEPT_GROUPS:
        _pools.pop(next(iter(_pools))).kill()


def close_pools() -> None:
    """Kill every pool; called at the end of the session."""
    while _pools:
        _pools.popitem()[1].kill()


def free_port() -> int:
    """A TCP port of this machine that nobody uses now, and that no connection is given before somebody binds it: below the
    range in which the kernel looks for one, where gloo of other tests takes dozens."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(low // 2, low)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def changed_environment(before: Mapping[str, str]) -> list[str]:
    """The variables that differ now from `before`, those of libraries aside."""
    changed = {k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}
    return sorted(k for k in changed if not k.startswith(LIBRARY_ENV))


# ---------------------------------------------------------------------------------------------- the test process's side


@dataclass(frozen=True)
class Worker:
    """One rank as the test process sees it. `stack_file` is where the rank writes its stack when asked."""

    process: BaseProcess
    connection: Connection
    stack_file: Path

    def stack(self) -> str:
        """Where the threads of the rank are now, as faulthandler prints it; empty for a dead process."""
        if self.process.pid is None or not self.process.is_alive():
            return ""
        before = len(self.stack_file.read_text())
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 5 * GRACE_S
        dump = ""
        while time.monotonic() < deadline:
            time.sleep(0.05)
            dump, seen = self.stack_file.read_text()[before:], dump
            if dump and dump == seen:  # the dump is several writes
                break
        return dump


class Limit:
    """The time that a call has, counted as the module says."""

    def __init__(self, workers: list[Worker], seconds: float) -> None:
        self._workers = workers
        self._restart(seconds)

    def left_s(self) -> float:
        """At most 0 once it is over."""
        elapsed = time.monotonic() - self._start
        stood = self._stood_ready_s() - self._stood
        return self._seconds - max(elapsed - stood, elapsed / MOST_LOAD)

    def shorten(self, seconds: float) -> None:
        """No more than so much from now on."""
        if self.left_s() > seconds:
            self._restart(seconds)

    def _restart(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds
        self._stood = self._stood_ready_s()

    def _stood_ready_s(self) -> float:
        """How long the main threads of the ranks, and of this process, which hears of them, have waited for a core so far."""
        return stood_ready_s("self") + sum(stood_ready_s(worker.process.pid) for worker in self._workers)


_ended: list[Any] = []


def end_group(group: Any) -> None:
    """End a process group of this test's.

    torch before 2.8 (its pull request 154976) lets go of a group under the GIL and waits for gloo's threads, of which one may want
    the GIL to let go of the last message. There the object is kept until the process ends.
    """
    dist.destroy_process_group(group)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        _ended.append(group)


def stood_ready_s(pid: int | str | None) -> float:
    """How long a process's main thread has waited for a core; 0 for a dead process, and where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0


class Pool:
    """`world_size` processes, one call at a time."""

    def __init__(self, world_size: int, *, is_distributed: bool = True, device: str = "cpu") -> None:
        self.world_size = world_size
        self.device = device
        self.is_distributed = is_distributed
        self.groups = 0
        """The process groups on all its ranks after the last call."""
        if device != "cpu":
            import_module(f"tests.device.{device}").prepare()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        port = free_port()
        self.workers = [self._start(rank, port) for rank in range(world_size)]
        try:
            self._collect(self._send_all(b"start"), START_S)
        except BaseException:
            self.kill()
            raise

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> list[Any]:
        """Run one function on every rank and wait for all of them."""
        __tracebackhide__ = True
        if "<" in fn.__qualname__:
            raise ValueError(f"{fn.__qualname__} is not a module-level function; a worker finds it by its name.")
        request = _dump((fn.__module__, fn.__qualname__, args, kwargs))
        outcomes = self._collect(self._send_all(pickle.dumps((sys.path, request))), timeout)
        return [_load(outcome.payload) for outcome in outcomes]

    def check_leaks(self) -> None:
        """Have every rank look for what the last call left, and count the groups it has."""
        __tracebackhide__ = True
        outcomes = self._collect(self._send_all(b"check"), START_S)
        self.groups = sum(_load(outcome.payload) for outcome in outcomes)

    def kill(self) -> None:
        """End the processes at once, wherever they are."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        self._folder.cleanup()

    def _start(self, rank: int, port: int) -> Worker:
        ours, theirs = _context.Pipe()
        stack_file = Path(self._folder.name, f"stack{rank}")
        stack_file.touch()
        env = _rank_environment(rank, self.world_size, port) if self.is_distributed else None
        process = _context.Process(target=_worker, args=(theirs, str(stack_file), env, self.device), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours, stack_file)

    def _send_all(self, message: bytes) -> dict[int, Worker]:
        for worker in self.workers:
            with contextlib.suppress(BrokenPipeError):  # a dead rank: `_collect` says so
                worker.connection.send_bytes(message)
        return dict(enumerate(self.workers))

    def _collect(self, waiting: dict[int, Worker], timeout: float) -> list[Outcome]:
        """One outcome of every rank; after the first failure the others have GRACE_S."""
        __tracebackhide__ = True
        outcomes: dict[int, Outcome] = {}
        limit = Limit(self.workers, timeout)
        failed = False
        while waiting and (left := limit.left_s()) > 0:
            by_connection: dict[Any, int] = {worker.connection: rank for rank, worker in waiting.items()}
            for ready in wait(list(by_connection), left):
                rank = by_connection[ready]
                outcomes[rank] = _receive(waiting.pop(rank))
                if outcomes[rank].is_error and not failed:
                    failed = True
                    limit.shorten(GRACE_S)
        if failed or waiting:
            raise _failure(outcomes, waiting, None if failed else timeout)
        return [outcomes[rank] for rank in range(self.world_size)]


def _receive(worker: Worker) -> Outcome:
    try:
        return Outcome(*pickle.loads(worker.connection.recv_bytes()))
    except (EOFError, ConnectionResetError):
        worker.process.join(GRACE_S)
        error = ChildProcessError(f"the process ended with exit code {worker.process.exitcode}")
        return Outcome(True, pickle.dumps(error), f"{type(error).__name__}: {error}\n")


def _failure(outcomes: Mapping[int, Outcome], waiting: Mapping[int, Worker], timeout: float | None) -> RanksFailedError:
    """The error of a call: tracebacks of the ranks that failed, stacks of those still running."""
    exceptions = {rank: pickle.loads(o.payload) for rank, o in sorted(outcomes.items()) if o.is_error}
    parts = [f"---- rank {rank} failed ----\n{outcomes[rank].text}" for rank in exceptions]
    for rank, worker in sorted(waiting.items()):
        parts.append(f"---- rank {rank} was still running, at ----\n{worker.stack()}")
        if timeout is not None:
            exceptions[rank] = TimeoutError(f"rank {rank} was not done after {timeout:g} s")
    summary = ", ".join(f"rank {rank}: {type(error).__name__}" for rank, error in exceptions.items())
    return RanksFailedError(f"{summary}\n" + "\n".join(parts), exceptions)


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    named = {"RANK": rank, "WORLD_SIZE": world_size, **local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in named.items()}


# ------------------------------------------------------------------------------------------------- the workers' side


def _worker(connection: Connection, stack_file: str, env: dict[str, str] | None, device: str) -> None:
    """The life of one rank: join the process group, then answer messages until the test process hangs up."""
    _die_with_parent()
    with open(stack_file, "ab", buffering=0) as stacks:
        for name in DISTRIBUTED_ENV:
            os.environ.pop(name, None)
        os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu") if device == "cpu" else device
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with contextlib.suppress(EOFError):
            _serve(connection, env, device, stacks)
    os._exit(0)  # no interpreter shutdown: it would wait for threads a test left


def _serve(connection: Connection, env: dict[str, str] | None, device: str, stacks: IO[bytes]) -> None:
    rank = () if env is None else (int(env["RANK"]), int(env["WORLD_SIZE"]))
    baseline: Baseline | None = None
    while True:
        message = connection.recv_bytes()
        _show_stack_on_signal(stacks)
        if message == b"start":
            outcome = _attempt(_join_group, env, device)
        elif message == b"check":
            assert baseline is not None, "a check follows a call"
            outcome = _attempt(baseline.check)
        else:
            baseline = Baseline.now()
            outcome = _attempt(_execute, message, rank)
        connection.send_bytes(pickle.dumps(tuple(outcome)))


def _show_stack_on_signal(stacks: IO[bytes]) -> None:
    """Have SIGUSR1 write the stack; anew before each call, because Lightning's Trainer takes the signal for itself and leaves
    the default behind, which ends the process."""
    faulthandler.unregister(signal.SIGUSR1)
    # All threads: whichever the kernel gives the signal to, one of gloo's or torch's own even, the main one is shown.
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)


def _join_group(env: dict[str, str] | None, device: str) -> None:
    if device != "cpu":
        import_module(f"tests.device.{device}").install()
        torch.accelerator.set_device_index(0 if env is None else int(env["LOCAL_RANK"]))
    if env is not None:
        os.environ.update(env)
        dist.init_process_group("gloo" if device == "cpu" else device)
    gc.freeze()  # what is imported by now is never garbage; collecting after each call stays cheap


def _execute(message: bytes, rank: tuple[int, ...]) -> Any:
    sys.path[:], request = pickle.loads(message)
    module, name, args, kwargs = _load(request)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # libraries change it (Accelerate on CPUs), and the last bits of gradients with it
    return getattr(import_module(module), name)(*rank, *args, **kwargs)


def _attempt(step: Callable[..., Any], *args: Any) -> Outcome:
    """The outcome of `step(*args)`, whatever it raises."""
    try:
        return Outcome(False, _dump(step(*args)))
    except BaseException as error:
        return Outcome(True, _dump_exception(error), traceback.format_exc())


@dataclass(frozen=True)
class Baseline:
    """What a process had before a call, to find what the call left."""

    environment: dict[str, str]
    threads: frozenset[int | None]
    groups: tuple[Any, ...]
    dtype: torch.dtype

    @classmethod
    def now(cls) -> Baseline:
        """The state of this process."""
        threads = frozenset(t.ident for t in threading.enumerate())
        return cls(dict(os.environ), threads, _process_groups(), torch.get_default_dtype())

    def check(self) -> int:
        """How many process groups there are. Raise LeakError for groups, threads and environment variables made since."""
        gc.collect()
        groups = _process_groups()
        leaks = [
            f"process group {dist.get_process_group_ranks(g)} {g.group_desc}" for g in groups if g not in self.groups
        ]
        leaks += ["an ended process group that was there before"] if set(self.groups) - set(groups) else []
        leaks += [f"environment variable {name}" for name in changed_environment(self.environment)]
        leaks += [f"thread {name}" for name in self._new_threads()]
        leaks += [] if torch.get_default_dtype() == self.dtype else [f"default dtype {torch.get_default_dtype()}"]
        if leaks:
            raise LeakError(f"the test left behind: {', '.join(leaks)}")
        return len(dist.distributed_c10d._world.pg_map)

    def _new_threads(self) -> list[str]:
        deadline = time.monotonic() + THREAD_GRACE_S
        while names := [t.name for t in threading.enumerate() if self._is_leak(t)]:
            if time.monotonic() > deadline:
                return names
            time.sleep(0.01)
        return []

    def _is_leak(self, thread: threading.Thread) -> bool:
        return thread.ident not in self.threads and not thread.name.startswith(LIBRARY_THREADS)


def _process_groups() -> tuple[Any, ...]:
    """The groups there are, but for those that all engines share and that live as long as the default group."""
    return tuple(group for group in dist.distributed_c10d._world.pg_map if not SHARED_GROUP.fullmatch(group.group_desc))


def _die_with_parent() -> None:
    """End this process when the test process does, however that ends and wherever this one waits.

    A thread, because PR_SET_PDEATHSIG would wait for the fork server, which lives as long as any of its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _dump_exception(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(UnpicklableError(f"{type(error).__name__}: {error}"))
    return data


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)
_pools: dict[tuple[int, str], Pool] = {}
