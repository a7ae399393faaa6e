"""Two hosts on one machine: Linux namespaces with a network between them. Needs root.

Each host has its own name, network, process numbers, ``/run``, sshd and munged. They share all
files except the folder ``FOLDER/local``.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
SSH_CONFIG = """Host *
    IdentityFile /etc/ssh/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""
SSHD_CONFIG = """HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin yes
StrictModes no
"""
SET_UP = """set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/{name} {folder}/local
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd /run/munge
install -m 400 {folder}/munge.key /run/munge/key
chown -R munge: /run/munge
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
/usr/sbin/sshd
setpriv --reuid munge --regid munge --clear-groups munged --key-file /run/munge/key \
    --seed-file /run/munge/seed --log-file /run/munge/log --pid-file /run/munge/pid
"""


@dataclass(frozen=True)
class Host:
    """A host. ``init`` is its first process: if that ends, so do all others."""

    name: str
    address: str
    init: int

    def start(self, *command: object, log: Path | None = None, **environment: object) -> subprocess.Popen[str]:
        """Start a command on this host. Its output goes to a file, or else to a pipe."""
        variables = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HOME": "/root"}
        variables |= {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["nsenter", "--all", f"--target={self.init}", f"--wdns={ROOT}", *map(str, command)],
            env=variables | {name: str(value) for name, value in environment.items()},
            stdin=subprocess.DEVNULL,
            stdout=log.open("a") if log else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: object, timeout: float = 60, **environment: object) -> str:
        """Run a command to its end and return its output."""
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=timeout)
        if process.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, command))}: status {process.returncode}: {output}")
        return output

    def processes(self, text: str) -> list[int]:
        """Return the processes of this host whose command line contains a text, oldest first."""
        found = self.start("pgrep", "--full", text)
        return [int(line) for line in found.communicate()[0].split()]


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Start the hosts ``node1`` and ``node2``. At the end, all their processes end."""
    addresses = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    _make_keys(folder)
    for name in (*addresses, "local"):
        (folder / name).mkdir()
    with ExitStack() as stack:
        hosts = [Host(name, address, stack.enter_context(_namespaces())) for name, address in addresses.items()]
        ends = [["eth0", "netns", str(host.init)] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host in hosts:
            host.run("bash", "-c", SET_UP.format(name=host.name, address=host.address, folder=folder))
        yield hosts


@contextmanager
def _namespaces() -> Iterator[int]:
    """Context with new namespaces. Yields their first process, which only waits."""
    options = ["--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    parent = subprocess.Popen(["unshare", *options, "bash", "-c", "sleep infinity & wait"])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    try:
        (init,) = wait_for(lambda: children.read_text().split(), "unshare starts no process")
        wait_for(lambda: Path(f"/proc/{init}/comm").read_text() == "bash\n", "bash did not start")
        yield int(init)
    finally:
        parent.kill()
        parent.wait()


def _make_keys(folder: Path) -> None:
    ssh = folder / "ssh"
    ssh.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "key"], check=True)
    (ssh / "ssh_config").write_text(SSH_CONFIG)
    (ssh / "sshd_config").write_text(SSHD_CONFIG)
    (folder / "munge.key").write_bytes(secrets.token_bytes(64))


def wait_for(condition: Callable[[], Any], failure: str, timeout: float = 60.0) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(failure)
