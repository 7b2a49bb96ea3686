"""Wrong passwords are slowed: by the address they come from, and by the user they are for.

An address that has not failed lately always has a first try, so that nobody who guesses at a user
from elsewhere locks that user out. Memory is bounded, and time comes from outside.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FREE = 5  # failures that cost nothing
LONGEST = 900.0  # seconds to wait, at most
FORGET = 3600.0  # seconds without a failure, after which there was none
REMEMBERED = 10_000  # addresses and users, at most


@dataclass(frozen=True)
class _Record:
    failures: int
    last: float

    @property
    def free_at(self) -> float:
        over = self.failures - FREE
        return self.last + min(2.0 ** min(over, 30), LONGEST) if over >= 0 else self.last


class Throttle:
    """Counts failures, and says how long to wait before the next try.

    Args:
        clock: Seconds that never go backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: OrderedDict[tuple[str, str], _Record] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def wait(self, address: str, user: str = "") -> float:
        """Seconds until the next try may be made: 1, 2, 4 … after the fifth failure."""
        with self._lock:
            now = self._clock()
            known = [self._recent(key, now) for key in _keys(address, user)]
            if known[0] is None:
                return 0.0
            return max(0.0, *(record.free_at - now for record in known if record))

    def failed(self, address: str, user: str = "") -> None:
        """Count a failure. Nothing takes it back: one's own log-in buys no new guesses."""
        with self._lock:
            now = self._clock()
            for key in _keys(address, user):
                before = self._recent(key, now)
                self._records[key] = _Record(before.failures + 1 if before else 1, now)
                self._records.move_to_end(key)
            while len(self._records) > REMEMBERED:
                self._records.popitem(last=False)

    def _recent(self, key: tuple[str, str], now: float) -> _Record | None:
        found = self._records.get(key)
        return found if found and now - found.last <= FORGET else None


def _keys(address: str, user: str) -> list[tuple[str, str]]:
    return [("address", _network(address)), *([("user", user[:64])] if user else [])]


def _network(address: str) -> str:
    """What one machine may choose its addresses from: of IPv6, the network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
