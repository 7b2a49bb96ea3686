"""What a process asks of its databases: statements, transactions, connections taken from pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import Pool


@dataclass
class Statements:
    """Counts over all engines and threads of this process.

    Attributes:
        texts: SQL → how often it was sent.
        transactions: How many were begun; each costs a round trip to begin and one to end.
        checkouts: Connections taken from a pool.
    """

    texts: Counter[str] = field(default_factory=Counter)
    transactions: int = 0
    checkouts: int = 0

    @property
    def total(self) -> int:
        """Statements, without those that begin and end transactions."""
        return self.texts.total()

    def clear(self) -> None:
        self.texts.clear()
        self.transactions = self.checkouts = 0


@contextmanager
def counted() -> Iterator[Statements]:
    """Count what is sent inside the block."""
    found = Statements()

    def sent(_connection: Any, _cursor: Any, text: str, *_more: Any) -> None:
        if not text.startswith("BEGIN"):  # which we send ourselves on SQLite
            found.texts[text] += 1

    def began(_connection: Connection) -> None:
        found.transactions += 1

    def taken(*_: Any) -> None:
        found.checkouts += 1

    hooks = [
        (Engine, "before_cursor_execute", sent),
        (Engine, "begin", began),
        (Pool, "checkout", taken),
    ]
    for of, name, hook in hooks:
        sqlalchemy.event.listen(of, name, hook)
    try:
        yield found
    finally:
        for of, name, hook in hooks:
            sqlalchemy.event.remove(of, name, hook)
