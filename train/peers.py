"""Connections between rank 0 and every other rank, besides those of the process groups.

The kernel closes a connection when its process ends for any reason, so rank 0 notices a dead rank
within milliseconds, and every other rank notices a dead rank 0. Messages are lines of JSON.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..parsing import parse_json

CONNECT_TIMEOUT = 5.0  # seconds for one address
LONGEST_LINE = 2**20  # bytes; a longer one is not a message of a rank
SIGNAL = -1  # in place of a rank: the number of a signal that this process received


@dataclass(frozen=True)
class Address:
    """What a rank tells the others about itself.

    Attributes:
        machine: identifies the machine and its process numbers (containers have their own).
        hosts: names and addresses of the machine; empty except for rank 0.
        port, token: where rank 0 listens, and what a connection must send first.
    """

    rank: int
    host: str
    machine: str
    pid: int
    hosts: tuple[str, ...] = ()
    port: int = 0
    token: str = ""


class Line:
    """One connection. It sends and receives JSON objects, and never blocks for long.

    Attributes:
        rank: at its other end; None until that is known.
    """

    def __init__(self, connection: socket.socket, rank: int | None = None):
        self.connection, self.rank = connection, rank
        connection.settimeout(CONNECT_TIMEOUT)
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. A closed connection is noticed by `receive`."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived.

        Raises:
            EOFError: the other process ended, or sent something else.
        """
        try:
            block = self.connection.recv(2**16)
        except OSError as error:
            raise EOFError from error
        *lines, self._received = (self._received + block).split(b"\n")
        try:
            messages = [parse_json(line) for line in lines]
        except ValueError as error:
            raise EOFError from error
        if not block or len(self._received) > LONGEST_LINE or not all(isinstance(m, dict) for m in messages):
            raise EOFError
        return messages


class Peers:
    """The connections of one rank: rank 0 has one to every rank, the others have one to rank 0.

    Signals that this process receives arrive here too, so that they are noticed while the main
    thread is blocked in a collective: `signal_fd` is for `signal.set_wakeup_fd`.
    """

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        self.lines: dict[int, Line] = {}
        self._server = _listen(size) if rank == 0 and size > 1 else None
        self._token = secrets.token_hex(16)
        if self._server:
            self._selector.register(self._server, selectors.EVENT_READ)

    @property
    def signal_fd(self) -> int:
        return self._wakeup.fileno()

    def address(self) -> Address:
        """Return what the other ranks must know to call `connect`."""
        own = Address(self._rank, socket.gethostname(), _machine(), os.getpid())
        if self._server is None:
            return own
        return Address(own.rank, own.host, own.machine, own.pid, _hosts(), self._server.getsockname()[1], self._token)

    def connect(self, main: Address) -> None:
        """Connect to rank 0.

        Raises:
            ConnectionError: it cannot be reached at any of its addresses.
        """
        for host in (os.environ.get("MASTER_ADDR", ""), "127.0.0.1", *main.hosts):
            if not host or (host == "127.0.0.1" and main.machine != _machine()):
                continue
            with contextlib.suppress(OSError, EOFError):
                line = Line(socket.create_connection((host, main.port), timeout=CONNECT_TIMEOUT), rank=0)
                line.send({"token": main.token, "rank": self._rank})
                while not (messages := line.receive()):
                    continue
                if messages[0] == {"welcome": main.token}:  # what follows are states, which come again
                    self._keep(line)
                    self._selector.register(line.connection, selectors.EVENT_READ, line)
                    return
                line.connection.close()
        raise ConnectionError(
            f"rank {self._rank} cannot connect to rank 0 at {', '.join(main.hosts)}, port {main.port}"
        )

    def wait(self, seconds: float) -> list[tuple[int, dict[str, Any] | int | None]]:
        """Wait for messages. Returns (rank, message), (rank, None) if it ended, or (SIGNAL, n)."""
        found: list[tuple[int, dict[str, Any] | int | None]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._signals:
                found += [(SIGNAL, number) for number in self._signals.recv(64) if number]
            elif key.fileobj is self._server:
                self._accept()
            elif key.data.rank is None:
                self._welcome(key.data)
            else:
                found += self._read(key.data)
        return found

    def wake(self) -> None:
        """Let `wait` return at once in the thread that calls it."""
        with contextlib.suppress(BlockingIOError):  # full of signals, which do the same
            self._wakeup.send(b"\0")  # no signal has the number 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message over every connection."""
        for line in self.lines.values():
            line.send(message)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._wakeup.close()

    def _read(self, line: Line) -> list[tuple[int, dict[str, Any] | int | None]]:
        assert line.rank is not None
        try:
            return [(line.rank, message) for message in line.receive()]
        except EOFError:
            self._drop(line)
            if self.lines.get(line.rank) is not line:
                return []  # the rank has connected again
            del self.lines[line.rank]
            return [(line.rank, None)]

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            line = Line(self._server.accept()[0])
            self._selector.register(line.connection, selectors.EVENT_READ, line)

    def _welcome(self, line: Line) -> None:
        """Read the first message of a connection, and keep it if it comes from a rank."""
        try:
            hello, *_ = line.receive()
            rank = int(hello["rank"])
            is_known = secrets.compare_digest(str(hello["token"]), self._token) and 0 < rank < self._size
        except (EOFError, LookupError, TypeError, ValueError, OverflowError):
            is_known = False
        if not is_known:
            self._drop(line)
            return
        line.rank = rank
        self._keep(line)
        line.send({"welcome": self._token})

    def _keep(self, line: Line) -> None:
        """Use a connection for its rank, in place of an earlier one of the same rank."""
        assert line.rank is not None
        self.lines[line.rank] = line

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line.connection)
        line.connection.close()


def _listen(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=size)
    return socket.create_server(("", 0), backlog=size)


def _hosts() -> tuple[str, ...]:
    """Return the name and the addresses of this machine, those of its network interfaces last."""
    families = (socket.AF_INET, socket.AF_INET6)
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families]
    own = [entry.address for entry in entries if not entry.address.startswith(("127.", "::1", "fe80"))]
    return (socket.gethostname(), *own)


def _machine() -> str:
    """Return a name of this machine, or of the container if that has its own process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
