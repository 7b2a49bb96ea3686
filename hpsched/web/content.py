"""What the live page says of a study: its summary → HTML sections and figures, of bounded size.

Pure functions. Sections are rendered here, not in the browser, so that one place escapes what
others wrote (study names, parameters, errors). Whatever there may be any number of is cut to a
fixed count, and the page says of how many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment
from optuna.trial import TrialState

from hpsched import report_figures
from hpsched.figure_data import ranked
from hpsched.figure_files import templates
from hpsched.ledger import Best, Candidate
from hpsched.present import capitalised, duration, mean_and_spread, number, rate_text
from hpsched.records import WorkerRecord
from hpsched.report_content import (
    NO_RESULT,
    YOURS,
    costs,
    headline,
    recipe_table,
    saved,
    several_objectives,
    trouble,
)
from hpsched.study import WORKER_GONE_SECONDS
from hpsched.summary import Summary

NOTES, WORKERS, ENDED, TOP, OWN = 12, 50, 8, 5, 12  # shown, at most
LETTERS = 400  # of a text that others wrote
#: In figures' JSON: plotly.js would set style attributes for it, which the policy refuses.
BOLD = (r"\u003cb\u003e", r"\u003c\u002fb\u003e")
LEFT_OUT = {"figure-parallel"}  # its colour bar has style attributes
SECTIONS = ("answer", "next_step", "notes", "recipe", "workers", "top", "costs")


# -- sections --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class State:
    """How a study stands: a word or two, a sentence, and a tone.

    Tones: ``live``, ``good``, ``wait`` (somebody has to do something), ``soft`` (nobody has to).
    """

    word: str
    why: str
    tone: str


def sections(summary: Summary, now: float) -> dict[str, str]:
    """Section → its HTML, of :data:`SECTIONS`; an empty text for one with nothing to say.

    Args:
        summary: The study's.
        now: The database's clock when it was read.
    """
    view = {
        "summary": summary,
        "headline": headline(summary),
        "state": state_of(summary),
        "workers": worker_rows(summary, now),
        "seen": max((worker.seen for worker in summary.workers.values()), default=None),
        "recipe": _recipe(summary),
        "top": _top(summary),
        "costs": list(costs(summary).items()),
        "saved": saved(summary),
        "NOTES": NOTES,
    }
    macros = _templates().get_template("sections.html.jinja").module
    return {name: str(getattr(macros, name)(view)).strip() for name in SECTIONS}


def card(study_id: int, name: str, summary: Summary | None, problem: str) -> str:
    """A study in the list, as HTML; without a summary, that it is being read or cannot be."""
    macros = _templates().get_template("sections.html.jinja").module
    state = state_of(summary) if summary else None
    view = {"id": study_id, "name": name, "summary": summary, "state": state, "problem": problem}
    return str(macros.card(view)).strip()  # type: ignore[attr-defined]


@cache
def _templates() -> Environment:
    made = templates("hpsched.web")
    said = {"mean_and_spread": mean_and_spread, "number": number, "rate": rate_text}
    made.filters |= {**said, "duration": duration, "short": short, "capitalised": capitalised}
    return made


def short(text: Any, letters: int = LETTERS) -> str:
    """``text`` in at most so many letters."""
    said = str(text)
    return said if len(said) <= letters else said[: letters - 1] + "…"


def state_of(summary: Summary) -> State:
    """How the study stands, and what to do about it."""
    best, busy = summary.best, [r for r in summary.runs if r.trial.state == TrialState.RUNNING]
    if summary.settings and not several_objectives(summary) and (why := trouble(summary)):
        return State(word="stuck", why=why, tone="wait")
    if summary.progress == 1.0:
        if best is None:
            return State(word="budget spent", why=NO_RESULT, tone="wait")
        if best.confirmed:
            why = "The answer is there. The code below is to be pasted; in a terminal:"
            return State(word="finished", why=why, tone="good")
        why = "The best value is of one seed, one of those it was chosen by: run it on fresh seeds."
        return State(word="not confirmed", why=why, tone="wait")
    if summary.settings is None:
        return _plain_state(summary, bool(busy))
    if not summary.live:
        why = "No worker is at work. Start one on each machine with a device:"
        if not summary.runs:
            return State(word="not started", why=why, tone="soft")
        return State(word="no worker", why=why, tone="wait")
    if all(worker.state == "paused" for worker in summary.live.values()):
        why = "All workers were told to pause: hpsched worker resume lets them go on. To watch:"
        return State(word="paused", why=why, tone="wait")
    if busy and all(run.confirms is not None for run in busy):
        why = "The best recipes are run again with fresh seeds. Nothing to do but wait; or watch:"
        return State(word="confirming", why=why, tone="live")
    why = "The search is running and the best may still change. In a terminal:"
    return State(word="searching", why=why, tone="live")


def _plain_state(summary: Summary, busy: bool) -> State:
    """Of a study that plain Optuna made: it has no budget and no workers of ours."""
    if summary.runs and not any(run.recipe for run in summary.runs):
        why = (
            "No trial of this study used hpsched.suggest_onecycle: the Optuna Dashboard shows it "
            "better. All the same:"
        )
        return State(word="plain Optuna", why=why, tone="soft")
    why = "Made with plain Optuna, so it goes on with study.optimize. To keep what there is:"
    word = "running" if busy else "standing still" if summary.runs else "not started"
    return State(word=word, why=why, tone="live" if busy else "soft")


def _recipe(summary: Summary) -> dict[str, Any] | None:
    """The report's table of the best recipe, cut to size."""
    best, made = summary.best, recipe_table(summary)
    if best is None or made is None:
        return None
    ours = [row for row in made["rows"] if row["searched"] != YOURS]
    yours = [row for row in made["rows"] if row["searched"] == YOURS]
    code = "\n".join(short(line) for line in made["code"].splitlines())
    return {"best": best, "rows": ours + yours[:OWN], "code": code, "verdict": _verdict(best)}


def _verdict(best: Best) -> str:
    """Whether the best beats the runner-up, in words."""
    up = best.runner_up
    if up is None:
        return "No other recipe has finished a full cycle."
    other = f"trial {up.number} ({mean_and_spread(up)})"
    if best.significant is None:
        return f"Runner-up: {other}. Too few fresh seeds to tell them apart."
    if best.significant:
        return f"Significantly better than the runner-up, {other} (Welch’s t-test, 5 %)."
    return f"Not significantly better than the runner-up, {other}: either will do."


def worker_rows(summary: Summary, now: float) -> dict[str, Any]:
    """Workers, those at work first, and how many more there are."""

    def place(entry: tuple[str, WorkerRecord]) -> tuple[bool, bool, float]:
        key, worker = entry
        return key not in summary.live, worker.state == "stopped", -worker.seen

    order = sorted(summary.workers.items(), key=place)
    there = [(key, worker) for key, worker in order if worker.state != "stopped"]
    ended = [(key, worker) for key, worker in order if worker.state == "stopped"]
    shown = [*there[:WORKERS], *ended[:ENDED]]
    rows = [_worker_row(worker, key in summary.live, now) for key, worker in shown]
    return {"rows": rows, "more": len(order) - len(shown)}


def _worker_row(worker: WorkerRecord, live: bool, now: float) -> dict[str, Any]:
    state, tone = worker.state, "live" if live else "soft"
    if not live and state != "stopped" and now - worker.seen >= WORKER_GONE_SECONDS:
        state, tone = "gone", "bad"
    doing = (worker.kind or "").replace("_", " ")
    if worker.kind == "rung":
        doing = f"rung {worker.rung}"
    return {"worker": worker, "state": state, "tone": tone, "doing": doing if live else ""}


def _top(summary: Summary) -> list[Candidate]:
    return ranked(summary)[:TOP]


# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as the page needs it.

    Attributes:
        id: Its name.
        group, heading: The part of the page that it stands in, and that part's heading.
        context: The context that it is of, or an empty text.
        caption, note: What one sees, and what to know about it.
        height: Pixels.
        wide: Whether it scrolls sideways on a narrow screen.
        json: Data and layout, as plotly.js takes them.
        digest: Changes with ``json``.
    """

    id: str
    group: str
    heading: str
    context: str
    caption: str
    note: str
    height: int
    wide: bool
    json: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the drawing itself."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "json"}


def make_figures(summary: Summary) -> list[Figure]:
    """The report's figures that have something to show, top to bottom."""
    return [
        _figure(group, drawn)
        for group in report_figures.groups(summary)
        for drawn in group["figures"]
        if drawn.id not in LEFT_OUT
    ]


def _figure(group: Mapping[str, Any], drawn: report_figures.Figure) -> Figure:
    text = drawn.json
    for bold in BOLD:
        text = text.replace(bold, "")
    return Figure(
        id=drawn.id.removeprefix("figure-"),
        group=group["id"],
        heading=group["title"],
        context=short(drawn.context, 120),
        caption=short(drawn.caption),
        note=short(drawn.note),
        height=drawn.height,
        wide=drawn.wide,
        json=text,
        digest=digest(text),
    )


def digest(text: str) -> str:
    """A short name that changes with ``text``."""
    return hashlib.blake2b(text.encode(), digest_size=9).hexdigest()
