"""A network for some workers, with one wire to the database, which can be pulled (Linux, as root).

Unlike behind a proxy, TCP itself sees that nothing arrives: its own limits are at work.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HOST, GUEST = "10.203.7.1", "10.203.7.2"


@dataclass(frozen=True)
class Network:
    """What is joined to the host by one wire.

    Attributes:
        name: Of the namespace, and of the host's end of the wire.
        host: The database's address from in there.
    """

    name: str
    host: str = HOST

    @property
    def command(self) -> tuple[str, ...]:
        """Put before a command, runs it in there."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Pull the wire."""
        _ip("link", "set", self.name, "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("link", "set", self.name, "up")


@contextmanager
def network() -> Iterator[Network]:
    """A namespace joined to this one by a wire."""
    name = f"hpf{os.getpid()}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", name, "type", "veth", "peer", "name", "wire", "netns", name)
        _ip("addr", "add", f"{HOST}/30", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "addr", "add", f"{GUEST}/30", "dev", "wire")
        _ip("-n", name, "link", "set", "wire", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield Network(name)
    finally:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
