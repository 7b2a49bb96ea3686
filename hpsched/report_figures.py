"""The figures of a report, each with the words that stand above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from hpsched import evidence, figures, records
from hpsched.coordinates import Coordinates
from hpsched.evidence import Evidence
from hpsched.figure_data import sample_text
from hpsched.figure_files import figure_json, height
from hpsched.figure_style import titles, untitled
from hpsched.ledger import Run
from hpsched.present import capitalised, number, rate_text
from hpsched.records import SweepRecord
from hpsched.summary import Summary

WIDE = ("slice", "parallel")  # figures that scroll sideways on a narrow screen
CONTEXTS = 6  # whose range tests are drawn, at most


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as a page needs it: its title stands above it as text, and wraps.

    Attributes:
        id: Its name.
        caption, note: What one sees, and what to know about it.
        json: Data and layout, as plotly.js takes them; safe within a script element.
        height: Pixels.
        wide: Whether it scrolls sideways on a narrow screen.
        is_empty: Whether it only says that there is nothing to draw yet.
        context: The context that it is of, or an empty text.
    """

    id: str
    caption: str
    note: str
    json: str
    height: int
    wide: bool
    is_empty: bool
    context: str = ""


def page_figure(name: str, figure: go.Figure, note: str, context: str = "") -> Figure:
    """The figure without its title, which becomes the caption."""
    caption, _ = titles(figure)
    plain = untitled(figure)
    return Figure(
        id=f"figure-{name}",
        caption=caption.rstrip(".") + ".",
        note=note if figure.data else "",
        json=figure_json(plain),
        height=height(plain),
        wide=bool(figure.data) and name in WIDE,
        is_empty=not figure.data,
        context=context,
    )


def groups(summary: Summary) -> Iterator[Mapping[str, Any]]:
    """The sections of figures that have something to show: ``id``, ``title``, and ``figures``."""
    for group in _all_groups(summary):
        drawn = [figure for figure in group["figures"] if not figure.is_empty]
        if drawn:
            yield {**group, "figures": drawn}


def _all_groups(summary: Summary) -> Iterator[Mapping[str, Any]]:
    title = "Where the learning rate works"
    if len(summary.windows) > CONTEXTS:
        title += f": {CONTEXTS} of {len(summary.windows)} contexts, those with the most trials"
    yield {"id": "range-test", "title": title, "figures": list(_range_tests(summary))}
    best = summary.best
    if best and best.total_steps:
        made = figures.schedule_figure(best.recipe, best.total_steps, best.policy)
        note = "The best recipe's schedule; it is the one the pasted code follows."
        yield {
            "id": "schedule",
            "title": "The best schedule",
            "figures": [page_figure("schedule", made, note)],
        }
    yield {"id": "search", "title": "How the search went", "figures": _search_figures(summary)}
    yield {"id": "space", "title": "Where good recipes lie", "figures": _space_figures(summary)}
    note = "Means over stretches of steps; runs of one seed each, in the order of their rank."
    drawn = page_figure("curves", figures.curves_figure(summary), note)
    yield {"id": "curves", "title": "Learning curves", "figures": [drawn]}


def _range_tests(summary: Summary) -> Iterator[Figure]:
    """By context: what the range tests say, and what complete cycles made of it."""
    contexts: dict[str, list[SweepRecord]] = {}
    for sweep in evidence.sweeps(run.trial for run in summary.runs):
        contexts.setdefault(sweep.context_key, []).append(sweep)
    for index, (key, sweeps) in enumerate(_most_tried(summary, contexts)):
        context = f"Context {key}" if key else ""
        where = summary.windows.get(key)
        found = where.evidence if where else None
        tests = [evidence.range_test(sweep) for sweep in sweeps]
        prior = found.prior if found else None
        drawn = figures.range_test_figure(tests, prior, _range_test_title(found))
        note = _range_test_note(summary, key, found)
        yield page_figure(f"range-test-{index}", drawn, note, context)
        if where and found and found.runs:
            drawn = figures.refining_figure(found, maximise=summary.direction == "maximize")
            yield page_figure(f"refining-{index}", drawn, _refining_note(summary, where, found))


def _most_tried(
    summary: Summary, contexts: Mapping[str, list[SweepRecord]]
) -> list[tuple[str, list[SweepRecord]]]:
    """The contexts with the most trials, in the order in which they came."""
    tried = Counter(run.recipe.context_key for run in summary.runs if run.recipe)
    chosen = sorted(contexts, key=lambda key: -tried[key])[:CONTEXTS]
    return [(key, sweeps) for key, sweeps in contexts.items() if key in chosen]


def _range_test_title(found: Evidence | None) -> str | None:
    """None leaves it to the figure, whose own title says to search there."""
    if found is None or found.proposal == found.prior or not found.prior.reliable:
        return None
    window = f"{rate_text(found.prior.low)} to {rate_text(found.prior.high)}"
    return f"The range tests say: max_lr from {window}, around {rate_text(found.prior.centre)}"


def _range_test_note(summary: Summary, key: str, found: Evidence | None) -> str:
    """How sure the range tests are, what they cost, and what follows without cycles of its own."""
    if found is None:
        return ""
    cost = _cost_in(summary, key, lambda run: [run.sweep.name] if run.sweep else [])
    reason = found.prior.reason
    note = f"{capitalised(reason)}. They cost {number(cost)} full cycles."
    if found.runs:
        return note
    if found.proposal != found.prior:
        centre = rate_text(found.proposal.centre)
        note += f" Complete cycles of other contexts move the centre to {centre}."
    return note + _moved(summary.windows[key], found)


def _refining_note(summary: Summary, where: Coordinates, found: Evidence) -> str:
    """What the refining cycles made of the range tests, at what cost."""
    key = where.recipe.context_key
    cost = _cost_in(summary, key, _refining_cycles)
    low, high = found.proposal.interval
    centre = rate_text(found.prior.centre)
    said = f"had said {centre}" if found.prior.reliable else "had no clear answer"
    note = f"{len(found.runs)} complete cycles at the cost of {number(cost)} full ones"
    if found.proposal == found.prior:
        return f"{note} say no more than the range tests yet."
    note += (
        f" put the first recipe's best max_lr at {rate_text(found.proposal.centre)}, and with "
        f"90 % certainty between {rate_text(low)} and {rate_text(high)}; the range tests {said}. "
        "That shorter cycles like higher rates is counted in. Other momenta and weight decays may "
        "like another rate."
    )
    return note + _moved(where, found)


def _refining_cycles(run: Run) -> list[str]:
    return [cycle.name for cycle in run.cycles if records.REFINES in run.trial.user_attrs]


def _cost_in(summary: Summary, key: str, names: Callable[[Run], list[str]]) -> float:
    """What the runs of ``train`` of these names cost in a context, in full cycles, each once."""
    ours = [run for run in summary.runs if run.recipe and run.recipe.context_key == key]
    costs = {name: run.parts()[name].cycles for run in ours for name in names(run)}
    return sum(costs.values())


def _moved(where: Coordinates, found: Evidence) -> str:
    """A sentence when the window has widened towards good trials at its edge."""
    shown, (low, high) = found.proposal, where.window
    if low >= shown.low and high <= shown.high:  # the user's own range may be narrower
        return ""
    return f" The search has since moved on to {rate_text(low)} to {rate_text(high)}."


def _search_figures(summary: Summary) -> list[Figure]:
    history = "Grey crosses: the value expected of pruned trials; far ones lie beyond the axis."
    rungs = "Each rung is a complete cycle; a bar tells what became of the trials that reached it."
    drawn = figures.history_figure(summary)
    return [
        page_figure("history", drawn, f"{history} {sample_text(summary)}".strip()),
        page_figure("rungs", figures.rungs_figure(summary), rungs),
    ]


def _space_figures(summary: Summary) -> list[Figure]:
    slices = "Where a cloud shows no trend, that parameter hardly matters here."
    slices += f" {sample_text(summary, ('full', 'short'))}"
    lines = "Values run from the lowest tried at the bottom to the highest at the top."
    lines += f" {sample_text(summary, ['full'])}"
    return [
        page_figure("slice", figures.slice_figure(summary), slices.strip()),
        page_figure("parallel", figures.parallel_figure(summary), lines.strip()),
    ]
