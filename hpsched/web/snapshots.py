"""What the live page answers with: the last that is known of each study, made in the background.

To read a large study takes seconds, and a database may be away; a page must answer at once all the
same. So requests touch no database: they note what is being looked at and get the last snapshot,
which says how old it is. One thread reads the studies that somebody looks at, one at a time, and
rests when nobody does.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import BaseStorage

from hpsched.errors import HpschedError
from hpsched.storage import clock, is_away, plain
from hpsched.summary import Summary, summarise
from hpsched.web import content

logger = logging.getLogger("hpsched.web")

PACE = 2.0  # seconds from the end of one reading to the next, at least
LISTED_PACE = 15.0  # the same for studies that are only seen in the list
REST = 2.0  # times what a reading took: the share of a core that watching may cost is a third
FIGURES_REST = 4.0  # times what the figures took, which are drawn anew less often
WATCHED = 15.0  # seconds after its last request that a page counts as being looked at
FORGOTTEN = 900.0  # seconds after which what only a study's page shows is dropped
FRESH = 4.0  # seconds for which a list of studies that is due says that one is not there
CARDS = 60  # studies in the list, the newest ones


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a page is told.

    Attributes:
        data: Plain values, for JSON: ``problem`` (what is wrong, or an empty text), ``reading``
            (whether there is nothing yet) and the contents. Equal data mean that nothing changed.
        age: Seconds since the database was read, or None.
        taken: The database's clock at that moment, or None.
    """

    data: dict[str, Any]
    age: float | None = None
    taken: float | None = None


@dataclass
class _Kept:
    """What is known of a study."""

    id: int
    name: str
    asked: float = -float("inf")  # when its page last was, on the monotonic clock
    due: float = 0.0
    problem: str = ""
    read: float | None = None
    taken: float | None = None
    card: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    figures: dict[str, content.Figure] = field(default_factory=dict)
    drawn: Hashable = None  # what the figures show
    redraw: float = 0.0  # when they may be drawn again


class Snapshots:
    """The last that is known of every study of a storage.

    Args:
        storage: The studies'; read from one thread of its own.
        ticks: A monotonic clock.
    """

    def __init__(
        self, storage: BaseStorage, *, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._ticks = ticks
        self._changed = threading.Condition()
        self._studies: dict[int, _Kept] = {}
        self._listed: float | None = None
        self._list_due = 0.0
        self._list_asked = -float("inf")
        self._problem = ""
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- what pages ask ----------------------------------------------------------------------------

    def studies(self) -> Answer:
        """The list of studies, the newest first."""
        with self._changed:
            self._list_asked = self._ticks()
            self._wake()
            shown = self._shown()
            data = {
                "problem": self._problem,
                "reading": self._listed is None,
                "cards": [
                    kept.card or content.card(kept.id, kept.name, None, kept.problem)
                    for kept in shown
                ],
                "more": len(self._studies) - len(shown),
            }
            return Answer(data=data, age=self._age(self._listed))

    def study(self, study_id: int) -> Answer | None:
        """A study's page; None when there is no such study (any more)."""
        with self._changed:
            kept = self._ask(study_id)
            if kept is None:
                return None if self._is_listed() else self._nothing_yet()
            data = {
                "problem": self._problem or kept.problem,
                "reading": not kept.sections,
                "name": kept.name,
                "sections": dict(kept.sections),
                "figures": [figure.to_json() for figure in kept.figures.values()],
            }
            return Answer(data=data, age=self._age(kept.read), taken=kept.taken)

    def figure(self, study_id: int, name: str) -> content.Figure | None:
        """A figure of a study's page, or None."""
        with self._changed:
            kept = self._ask(study_id)
            return kept.figures.get(name) if kept else None

    def close(self) -> None:
        """End the thread, when what it reads has been read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread:
            thread.join()

    def _ask(self, study_id: int) -> _Kept | None:
        kept = self._studies.get(study_id)
        if kept:
            kept.asked = self._ticks()
        elif not self._is_listed():
            self._list_asked = self._ticks()
        self._wake()
        return kept

    def _is_listed(self) -> bool:
        """Whether the list is new enough to say that a study is not there."""
        known = self._listed is not None and not self._problem
        return known and self._ticks() < self._list_due + FRESH

    def _nothing_yet(self) -> Answer:
        data = {"problem": self._problem, "reading": True, "name": "", "sections": {}}
        return Answer(data={**data, "figures": []})

    def _age(self, since: float | None) -> float | None:
        return None if since is None else max(0.0, self._ticks() - since)

    def _shown(self) -> list[_Kept]:
        newest = sorted(self._studies.values(), key=lambda kept: -kept.id)
        return newest[:CARDS]

    def _wake(self) -> None:
        # Not before the first request: a server may fork its workers after this was made.
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- the thread that reads ---------------------------------------------------------------------

    def _run(self) -> None:
        while job := self._wait_for_job():
            job()

    def _wait_for_job(self) -> Callable[[], None] | None:
        """The next job when it is due; None when there will be no more."""
        with self._changed:
            while not self._closed:
                if job := self._next_job():
                    return job
                self._changed.wait(self._pause())
        return None

    def _next_job(self) -> Callable[[], None] | None:
        """What to read now: the list, then pages being looked at, then what the list shows."""
        now = self._ticks()
        if not self._is_watched():
            return None
        if now >= self._list_due:
            return self._read_list
        if self._problem:
            return None  # the list tells when the database is back
        due = [kept for kept in self._wanted() if now >= self._due(kept)]
        if not due:
            return None
        kept = min(due, key=lambda one: (not self._has_viewer(one), one.due))
        return lambda: self._read(kept)

    def _pause(self) -> float | None:
        """Seconds until the next job falls due; None while nobody looks."""
        if not self._is_watched():
            return None
        dues = [self._list_due]
        if not self._problem:
            dues += [self._due(kept) for kept in self._wanted()]
        return max(0.01, min(dues) - self._ticks())

    def _is_watched(self) -> bool:
        seen = max([self._list_asked, *(kept.asked for kept in self._studies.values())])
        return self._ticks() - seen < WATCHED

    def _has_viewer(self, kept: _Kept) -> bool:
        return self._ticks() - kept.asked < WATCHED

    def _wanted(self) -> list[_Kept]:
        listed = self._shown() if self._ticks() - self._list_asked < WATCHED else []
        pages = [kept for kept in self._studies.values() if self._has_viewer(kept)]
        return list({kept.id: kept for kept in (*pages, *listed)}.values())

    def _due(self, kept: _Kept) -> float:
        if self._has_viewer(kept) and not kept.sections and not kept.problem:
            return 0.0  # the list knew it; its page has been opened now
        slower = 0.0 if self._has_viewer(kept) or kept.read is None else LISTED_PACE
        return kept.due + slower

    def _read_list(self) -> None:
        problem, found, began = "", None, self._ticks()
        try:
            found = {s._study_id: s.study_name for s in self._storage.get_all_studies()}
        except Exception as error:
            problem = _problem(error)
        with self._changed:
            now = self._ticks()
            self._problem = problem
            # It reads every study's attributes, and the Optuna Dashboard keeps figures in them.
            self._list_due = now + max(PACE, REST * (now - began))
            if found is None:
                return
            self._listed = now
            known = self._studies
            self._studies = {
                key: known.get(key) or _Kept(id=key, name=name) for key, name in found.items()
            }

    def _read(self, kept: _Kept) -> None:
        """Read a study, and keep what its pages show."""
        began, page, outage = self._ticks(), self._has_viewer(kept), ""
        changes: dict[str, Any] = {}
        try:
            changes = {"problem": "", **self._contents(kept, page)}
        except Exception as error:
            if is_away(error):
                outage = _problem(error)
            else:
                changes = {"problem": _problem(error), "card": ""}
        with self._changed:
            self._problem = self._problem or outage
            for name, value in changes.items():
                setattr(kept, name, value)
            if not page and self._ticks() - kept.asked > FORGOTTEN:
                kept.sections, kept.figures, kept.drawn = {}, {}, None
            took = self._ticks() - began
            kept.due = self._ticks() + max(PACE, REST * took)

    def _contents(self, kept: _Kept, page: bool) -> dict[str, Any]:
        study = optuna.load_study(study_name=kept.name, storage=self._storage)
        if study._study_id != kept.id:
            raise KeyError(kept.name)  # deleted and made again: the list will tell
        read, taken = self._ticks(), clock(self._storage)()
        summary = summarise(study, taken)
        found: dict[str, Any] = {"read": read, "taken": taken}
        found["card"] = content.card(kept.id, kept.name, summary, "")
        if page:
            found["sections"] = content.sections(summary, taken)
            found |= self._drawings(kept, summary)
        return found

    def _drawings(self, kept: _Kept, summary: Summary) -> dict[str, Any]:
        """The figures, if they show anything new and were not drawn just now."""
        began, shows = self._ticks(), _shown_in_figures(summary)
        if shows == kept.drawn or began < kept.redraw:
            return {}
        made = {figure.id: figure for figure in content.make_figures(summary)}
        ended = self._ticks()
        return {
            "figures": made,
            "drawn": shows,
            "redraw": ended + FIGURES_REST * (ended - began),
        }


def _problem(error: Exception) -> str:
    """What is wrong, in a sentence for the page; what nobody foresaw goes to the log as well."""
    if is_away(error):
        return f"The database is away: {plain(error)}. This page tries again by itself."
    if isinstance(error, HpschedError):
        return str(error)
    logger.exception("reading a study")
    return f"This cannot be read ({type(error).__name__}: {plain(error)}); see the server's log."


def _shown_in_figures(summary: Summary) -> Hashable:
    """What the figures depend on: results, not the progress of runs in hand."""
    results = tuple(
        (run.trial.state, len(run.cycles), run.sweep is not None, run.diverged is not None)
        for run in summary.runs
    )
    return hash((results, summary.best.number if summary.best else None))


def to_json(data: dict[str, Any]) -> bytes:
    """The answer's data as JSON text."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
