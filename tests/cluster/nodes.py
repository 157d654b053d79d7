"""A cluster on one machine: "nodes" with their own network, host name, process ids and sshd.

Each node is a set of Linux namespaces held by an init process. The nodes' network interfaces meet in a bridge that has a
namespace of its own, so the machine's own network, host name, /etc/hosts and ssh keys stay as they are:

    switch:  bridge -- v0, v1, v2        head 10.77.0.1 (the launcher)    a 10.77.0.2    b 10.77.0.3

A cut network is an interface set down in the switch: nothing is told to either side. A node that dies is its init
process killed: the kernel ends everything in it. However the process that built a cluster ends, nothing of it is left: a
leash waits for that, in a process of its own, and kills what runs in the cluster's networks. Needs root, iproute2, util-linux and OpenSSH; `why_not` says what is
missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SSHD = "/usr/sbin/sshd"
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", SSHD)
SERVICES = ("sshd", "munged", "slurmd", "slurmctld", "slurmscriptd", "slurmstepd", "bash", "sleep")
"""What runs on a node whether or not a job does."""

INIT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mkdir -p /root/.ssh
mount --bind "$2/ssh" /root/.ssh
for f in /root/.bashrc /root/.bash_profile /root/.profile; do [ ! -e $f ] || mount --bind /dev/null $f; done
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
ip link set lo up
trap : CHLD TERM
echo ready > "$2/$1.ready"
while :; do sleep 1000 & wait; done
"""
LEASH = """
import os, signal, sys
networks = []
for line in sys.stdin:
    if line == "done\\n":
        sys.exit()
    networks.append(line.strip())
for entry in filter(str.isdecimal, os.listdir("/proc")):
    try:
        if os.readlink(f"/proc/{entry}/ns/net") in networks:
            os.kill(int(entry), signal.SIGKILL)
    except OSError:
        pass
"""
SSHD_CONFIG = """
HostKey {folder}/host_{name}
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
AuthorizedKeysFile {folder}/ssh/id_ed25519.pub
"""


def why_not(*programs: str) -> str | None:
    """Why no cluster can be built here; None if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [name for name in (*PROGRAMS, *programs) if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (make test-cluster installs them)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else "namespaces are not allowed here"


class Node:
    """One machine of the cluster."""

    def __init__(self, name: str, address: str, folder: Path, *, own_pids: bool) -> None:
        self.name = name
        self.address = address
        self.own_pids = own_pids
        pids = ["--pid", "--fork", "--mount-proc", "--kill-child=KILL"] if own_pids else []
        command = ["unshare", "--net", "--mount", "--uts", *pids, "bash", "-c", INIT, "init", name, str(folder)]
        self.holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        _until(lambda: (folder / f"{name}.ready").exists() or self.holder.poll() is not None)
        assert self.holder.poll() is None, f"node {name} did not start"
        self.pid = _child_of(self.holder.pid) if own_pids else self.holder.pid

    def enter(self, *command: str, cwd: Path = REPOSITORY) -> list[str]:
        """A command, run on this node."""
        pids = ["-p"] if self.own_pids else []
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", *pids, "--", "env", "-C", str(cwd), *command]

    def run(self, *command: str, timeout: float = 30, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it must succeed."""
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=timeout, **more)
        assert done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """Start a command. On a node with ids of its own, the process returned is nsenter."""
        return subprocess.Popen(self.enter(*command), text=True, stdin=subprocess.DEVNULL, **more)

    def processes(self, but: Sequence[str] = SERVICES) -> dict[int, str]:
        """Process id -> command line of what runs on this node, services aside; ids as this machine sees them."""
        kind = "pid" if self.own_pids else "net"
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / kind) != os.readlink(f"/proc/{self.pid}/ns/{kind}"):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                    continue
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if Path(words[0].decode().lstrip(": ").split(":")[0].strip()).name not in but:
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace")
        return found

    def is_alive(self) -> bool:
        """Whether it has not been killed."""
        return self.holder.poll() is None

    def kill(self) -> None:
        """The machine dies."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.holder.kill()
        self.holder.wait()


class Cluster:
    """A head node, where launchers run, and compute nodes."""

    def __init__(self, folder: Path, names: Sequence[str] = ("a", "b")) -> None:
        self.folder = folder
        self._leash = subprocess.Popen(
            [sys.executable, "-c", LEASH], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        self._switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        _until(lambda: _has_own_network(self._switch.pid))
        self._leash_network(self._switch.pid)
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        everyone = ["head", *names]
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(everyone, start=1)}
        hosts = [f"{address} {name}" for name, address in addresses.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        (folder / "ssh").mkdir()
        _make_key(folder / "ssh" / "id_ed25519")
        (folder / "ssh" / "config").write_text("Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n")
        self.nodes = {}
        for name in everyone:
            self.nodes[name] = Node(name, addresses[name], folder, own_pids=name != "head")
            self._leash_network(self.nodes[name].pid)
            self.connect(name)
        for name in names:
            self.start_sshd(name)

    @property
    def head(self) -> Node:
        """Where launchers run."""
        return self.nodes["head"]

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def _leash_network(self, pid: int) -> None:
        """Put whatever will run in this process's network on the leash."""
        assert self._leash.stdin is not None
        self._leash.stdin.write(os.readlink(f"/proc/{pid}/ns/net") + "\n")
        self._leash.stdin.flush()

    def _in_switch(self, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._switch.pid), "-n", "--", *command], check=True, capture_output=True)

    def connect(self, name: str) -> None:
        """Give a node its interface."""
        node, port = self.nodes[name], f"v-{name}"
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        self._in_switch("ip", "link", "set", port, "master", "bridge", "up")
        node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")

    def cut(self, name: str) -> None:
        """Cut a node's network; nobody is told."""
        self._in_switch("ip", "link", "set", f"v-{name}", "down")

    def mend(self, name: str) -> None:
        """Bring it back."""
        self._in_switch("ip", "link", "set", f"v-{name}", "up")

    def start_sshd(self, name: str) -> None:
        """Start a node's sshd, with a host key of its own."""
        key = self.folder / f"host_{name}"
        if not key.exists():
            _make_key(key)
        config = self.folder / f"sshd_{name}"
        config.write_text(SSHD_CONFIG.format(folder=self.folder, name=name))
        self.nodes[name].run(SSHD, "-f", str(config), "-E", str(self.folder / f"sshd_{name}.log"))

    def hostfile(self, **slots: int) -> str:
        """Write a hostfile; its path."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
        return str(path)

    def leftovers(self) -> dict[str, dict[int, str]]:
        """What still runs on the nodes, services aside."""
        return {name: left for name, node in self.nodes.items() if node.is_alive() and (left := node.processes())}

    def close(self) -> None:
        """End all of it."""
        for node in self.nodes.values():
            for pid in node.processes(but=()) if node.is_alive() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.kill()
        self._switch.kill()
        self._switch.wait()
        self._leash.communicate("done\n")


@contextlib.contextmanager
def cluster(folder: Path, names: Sequence[str] = ("a", "b")) -> Iterator[Cluster]:
    """A cluster while the context is open."""
    made = Cluster(folder, names)
    try:
        yield made
    finally:
        made.close()


def environment(**more: str) -> Mapping[str, str]:
    """For launchers: this checkout, the CPU, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER", "LOCAL_", "SLURM"))}
    own = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**kept, **own, **root, **more}


def deepspeed(*arguments: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", *arguments]


def _until(condition: Any, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _child_of(pid: int) -> int:
    assert _until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _has_own_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
