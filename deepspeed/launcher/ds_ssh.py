"""`ds_ssh [-f hostfile] command...`: run a command on every host of a hostfile, with pdsh or, without it, ssh.

The words of the command reach the hosts' shells as they are, joined by blanks, as with ssh itself. Hosts are checked
like everywhere (`hostfile.is_host`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepspeed.launcher.arguments import HOSTFILE
from deepspeed.launcher.hostfile import read_hostfile
from deepspeed.launcher.starters.pdsh import Pdsh
from deepspeed.launcher.starters.ssh import Ssh, ssh_words
from deepspeed.utils.errors import DeepSpeedError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the largest exit code of the hosts, 0 without a hostfile, 1 without pdsh and ssh."""
    parser = argparse.ArgumentParser(prog="ds_ssh", description=__doc__)
    parser.add_argument("-f", "--hostfile", type=Path, default=HOSTFILE, help="default %(default)s")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    if not args.command:
        parser.error("no command is given")
    if not args.hostfile.is_file():
        print(f"ds_ssh: no hostfile at {args.hostfile}; nothing to do.")
        return 0
    try:
        hosts = list(read_hostfile(args.hostfile))
    except DeepSpeedError as error:
        print(f"ds_ssh: {error}", file=sys.stderr)
        return 2
    if Pdsh().detect():
        line = " ".join(args.command).replace("%", "%%")
        return subprocess.run(["pdsh", "-S", "-R", "ssh", "-w", ",".join(hosts), line]).returncode
    if not Ssh().detect():
        print("ds_ssh: neither pdsh nor ssh is installed.", file=sys.stderr)
        return 1
    return max(_over_ssh(hosts, " ".join(args.command)))


def _over_ssh(hosts: Sequence[str], line: str) -> list[int]:
    def run(host: str) -> int:
        done = subprocess.run([*ssh_words(host, None), line], capture_output=True, text=True)
        for text, stream in ((done.stdout, sys.stdout), (done.stderr, sys.stderr)):
            stream.write("".join(f"{host}: {part}\n" for part in text.splitlines()))
        return done.returncode

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(run, hosts))


if __name__ == "__main__":
    sys.exit(main())
