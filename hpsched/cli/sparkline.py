"""Curves in a line of text, and what was seen of the runs in hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from hpsched.fleet import seconds_left
from hpsched.records import WorkerRecord

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.-=+*#"  # where a terminal knows ASCII only
SEEN = 256  # records of a run that are kept, at most


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """``values`` as at most ``width`` blocks from lowest to highest; those not finite are left out.

    A longer curve is shown by the means of its stretches.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or width < 1:
        return ""
    count = min(width, len(known))
    edges = [place * len(known) // count for place in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = PLAIN if plain else BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def steps_line(
    points: Sequence[tuple[float, float]], end: float, width: int, plain: bool = False
) -> str:
    """A curve of steps (place, value) from its first place to ``end``, evenly along it."""
    if not points or width < 1:
        return ""
    start, found, at = points[0][0], [], 0
    for column in range(width):
        place = start + (end - start) * (column + 1) / width
        while at + 1 < len(points) and points[at + 1][0] <= place:
            at += 1
        found.append(points[at][1])
    return sparkline(found, width, plain)


class Seen:
    """What workers said of their runs in hand, look by look: a study holds the last word only."""

    def __init__(self) -> None:
        self._records: dict[str, list[WorkerRecord]] = {}

    def look(self, key: str, record: WorkerRecord) -> None:
        """Take in what the worker ``key`` says now."""
        known = self._records.setdefault(key, [])
        if known and _run(known[-1]) != _run(record):
            known.clear()
        if not known or known[-1].step != record.step:
            known.append(record)
        if len(known) > SEEN:  # keep the first and every other one
            del known[1::2]

    def losses(self, key: str) -> list[float]:
        """Losses of the run in hand, the earliest first."""
        return [r.loss for r in self._records.get(key, ()) if r.loss is not None]

    def left(self, key: str) -> float | None:
        """Seconds until the run in hand ends, at the pace seen; None: not known yet."""
        known = self._records.get(key, [])
        return seconds_left(known[0], known[-1]) if known else None


def _run(record: WorkerRecord) -> tuple[object, ...]:
    return record.trial, record.kind, record.rung, record.total_steps
