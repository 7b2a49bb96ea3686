"""A network between workers and their database that can be cut, at a chosen statement if need be.

What is sent while it is cut is neither lost nor refused: it arrives when the network is mended, if
both ends have waited for so long, as TCP would have it.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Trap:
    """Holds up one connection at the first statement that matches ``pattern``.

    Attributes:
        answer: Hold the answer to the COMMIT after it rather than the statement itself.
        caught: Set when something is held.
    """

    pattern: re.Pattern[bytes]
    answer: bool = False
    caught: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)
    _deliver: bool = False

    def hold(self) -> bool:
        """Wait for the release; whether to deliver what is held."""
        self.caught.set()
        self._released.wait()
        return self._deliver

    def release(self, *, deliver: bool) -> None:
        """Let it go on, or drop what is held and close the connection."""
        self._deliver = deliver
        self._released.set()


class Proxy:
    """Stands between ``address``, where it listens, and ``target``."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._connected = threading.Event()
        self._connected.set()
        self._trap: Trap | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing passes from now on, in either direction."""
        self._connected.clear()

    def mend(self) -> None:
        """End the cut."""
        self._connected.set()

    def trap(self, pattern: bytes, *, answer: bool = False) -> Trap:
        """Set a trap; it catches once."""
        self._trap = Trap(re.compile(pattern), answer)
        return self._trap

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._connected.wait()
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        awaited: list[Trap] = []
        for pump in (self._to_server, self._to_client):
            threading.Thread(target=pump, args=(client, server, awaited), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket, awaited: list[Trap]) -> None:
        mine: Trap | None = None
        with _closing(client, server):
            while data := client.recv(1 << 16):
                self._connected.wait()
                mine = mine or self._sprung(data)
                if mine and not mine.answer:
                    if not mine.hold():
                        return
                    mine = None
                elif mine and b"COMMIT" in data:
                    awaited.append(mine)
                    mine = None
                server.sendall(data)

    def _to_client(self, client: socket.socket, server: socket.socket, awaited: list[Trap]) -> None:
        with _closing(client, server):
            while data := server.recv(1 << 16):
                self._connected.wait()
                if awaited and not awaited.pop().hold():
                    return
                client.sendall(data)

    def _sprung(self, data: bytes) -> Trap | None:
        with self._lock:
            trap = self._trap
            if trap is None or not trap.pattern.search(data):
                return None
            self._trap = None
            return trap


@contextmanager
def _closing(*ends: socket.socket) -> Iterator[None]:
    """Close both ends when either is gone."""
    try:
        with suppress(OSError):
            yield
    finally:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
