"""A study as one self-contained HTML page: answer, recipe, costs, figures.

The page holds plotly.js and asks no host for anything. Study names, parameters and error texts
were written by others: the template escapes them all, and figures are data, not code.
"""

from __future__ import annotations

import html
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.offline
from jinja2 import Environment, PackageLoader, StrictUndefined

from hpsched import evidence, figures, records
from hpsched.coordinates import Coordinates
from hpsched.errors import UsageError
from hpsched.evidence import Evidence
from hpsched.figure_data import ranked
from hpsched.figure_style import untitled
from hpsched.ledger import Best, Candidate, Cost, Run, optimizer_name
from hpsched.present import duration, mean_and_spread, number, rate_text, torch_snippet
from hpsched.records import RecipeSpace, SweepRecord
from hpsched.summary import Summary

TOP = 10  # recipes in the table
WIDE = ("slice", "parallel")  # figures that scroll sideways on a narrow screen
PACKAGES = ("hpsched", "optuna", "torch", "numpy", "plotly")


def write_report(summary: Summary, path: Path) -> Path:
    """Write the page to ``path``, and return it.

    Raises:
        UsageError: The file cannot be written.
    """
    text = render_report(summary)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"the report cannot be written to {str(path)!r} ({reason}): "
            "name a file in a folder that exists and is yours to write."
        ) from None
    return path


def render_report(summary: Summary) -> str:
    """The page as text; also of a study that is unfinished or empty."""
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            name=summary.name,
            headline=headline(summary),
            status=_status(summary),
            next_step=_next_step(summary),
            recipe=_recipe(summary),
            warnings=_warnings(summary),
            spent=_spent(summary),
            saved=_saved(summary),
            findings=_sentences(summary.findings),
            groups=list(_groups(summary)),
            top=_top(summary),
            settings=_settings(summary),
            versions=_versions(),
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
            plotlyjs=_plotlyjs(),
        )
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("hpsched")
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _plotlyjs() -> str:
    return str(plotly.offline.get_plotlyjs()).replace("</script", "<\\/script")


# -- the answer ------------------------------------------------------------------------------------


def headline(summary: Summary) -> str:
    """The answer in one sentence: how good the best recipe is, at what cost, and how sure."""
    if _several_objectives(summary):
        return "This study has several objectives: see study.best_trials for its Pareto front."
    cost = f"{number(summary.cost.cycles)} full cycles of training"
    if summary.best is None:
        return f"No recipe has finished a full cycle yet; {cost} have been spent so far."
    return f"{_result(summary.best)}, found at a cost of {cost}{_comparison(summary.best)}."


def _result(best: Best) -> str:
    if best.confirmed:
        seeds = "one fresh seed" if best.seeds == 1 else f"{best.seeds} fresh seeds"
        return f"The best recipe reaches {mean_and_spread(best)} over {seeds}"
    return f"The most promising recipe reached {number(best.mean)} with one seed, not yet confirmed"


def _comparison(best: Best) -> str:
    up = best.runner_up
    if up is None:
        return "; no other recipe has finished a full cycle"
    other = f"the runner-up (trial {up.number}: {mean_and_spread(up)})"
    if best.significant is None:
        return f"; too few seeds to tell whether it beats {other}"
    return f", and {'' if best.significant else 'not '}significantly better than {other}"


def _several_objectives(summary: Summary) -> bool:
    return any(run.trial.values and len(run.trial.values) > 1 for run in summary.runs)


def _status(summary: Summary) -> str:
    goal = "lower" if summary.direction == "minimize" else "higher"
    trials = sum(summary.states.values())
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary.states.items()))
    parts = [f"{goal} is better", f"{trials} trials ({states})" if trials else "no trials yet"]
    if summary.confirmations:
        parts.append(f"{summary.confirmations} confirmation runs")
    if summary.progress is not None:
        parts.append(f"{100 * summary.progress:.0f} % of the budget spent")
    if summary.eta:
        parts.append(f"about {duration(summary.eta)} to go")
    return " · ".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Step:
    why: str
    code: str


def _next_step(summary: Summary) -> _Step | None:
    """What the reader should run next; None when the answer is there."""
    best = summary.best
    if _several_objectives(summary) or (best and best.confirmed and _is_done(summary)):
        return None
    if best is None:
        why = "There is no finished full cycle: let the search run on."
    elif not best.confirmed and _is_done(summary):
        why = "Its value is of one seed, one of those it was chosen by: run it on fresh seeds."
    else:
        why = "The search is not finished: the best recipe may still change."
    return _Step(why=why, code=summary.next_command if summary.settings else _plain_code(best))


def _is_done(summary: Summary) -> bool:
    """Whether no worker has anything left to do; a plain study is done when it stands still."""
    if summary.settings:
        return "worker attach" not in summary.next_command and "--watch" not in summary.next_command
    return not {"running", "waiting"} & set(summary.states)


def _plain_code(best: Best | None) -> str:
    if best is None:
        return "study.optimize(objective, n_trials=20)"
    return "queued = hpsched.confirm(study)\nstudy.optimize(objective, n_trials=queued)"


def _sentences(texts: Sequence[str]) -> list[str]:
    return [f"{text[:1].upper()}{text[1:]}." for text in texts]


def _warnings(summary: Summary) -> list[str]:
    return [text[:1].upper() + text[1:] for text in summary.warnings]


# -- tables ----------------------------------------------------------------------------------------


def _recipe(summary: Summary) -> dict[str, Any] | None:
    best = summary.best
    run = next((r for r in summary.runs if best and r.trial.number == best.number), None)
    if best is None or run is None or run.recipe is None:
        return None
    window = summary.windows.get(run.recipe.context_key)
    rows = [_field_row(field, best, run.recipe, window) for field in records.FIELDS]
    fixed = {"final_div_factor": number(best.recipe["final_div_factor"]), "policy": best.policy}
    fixed["total_steps"] = f"{best.total_steps:,}" if best.total_steps else "not given"
    rows += [_row(name, value, "fixed") for name, value in fixed.items()]
    rows += [_row(name, _cell(value), "yours") for name, value in _own(run).items()]
    code = torch_snippet(best, optimizer_name(summary.runs))
    return {"trial": best.number, "rows": rows, "code": code}


def _field_row(
    field: str, best: Best, space: RecipeSpace, window: Coordinates | None
) -> dict[str, str]:
    searched = "fixed"
    if field in space.space:
        low, high, log = space.space[field]
        searched = f"{number(low)} to {number(high)}{', log scale' if log else ''}"
        if field == "max_lr" and window:
            low, high = window.window
            searched = f"about {number(low)} to {number(high)}, from {_source(window)}"
        elif field == "weight_decay" and window and window.uses_kappa:
            searched = "scaled to rate and steps"
    return _row(field, number(best.recipe[field]), searched)


def _source(window: Coordinates) -> str:
    """What max_lr's window follows from."""
    found = window.evidence
    if found is None:
        return "your range"
    refined = found.proposal != found.prior
    return "range tests and complete cycles" if refined else "range tests"


def _row(name: str, value: str, searched: str) -> dict[str, str]:
    return {"name": name, "value": value, "searched": searched}


def _own(run: Run) -> dict[str, Any]:
    """The user's own parameters of a trial."""
    ours = run.recipe.names if run.recipe else []
    return {name: value for name, value in run.trial.params.items() if name not in ours}


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _spent(summary: Summary) -> list[dict[str, str]]:
    search = Cost(
        steps=summary.search_cost.steps - summary.range_test_cost.steps,
        seconds=summary.search_cost.seconds - summary.range_test_cost.seconds,
        cycles=summary.search_cost.cycles - summary.range_test_cost.cycles,
    )
    parts = {
        "range tests": summary.range_test_cost,
        "search": search,
        "confirmations": summary.confirm_cost,
        "all": summary.cost,
    }
    return [
        {
            "on": on,
            "cycles": number(cost.cycles),
            "steps": f"{cost.steps:,}",
            "time": duration(cost.seconds),
        }
        for on, cost in parts.items()
    ]


def _saved(summary: Summary) -> str:
    if not summary.saved_cycles:
        return "Nothing has been pruned yet."
    return (
        f"Ending {summary.states.get('pruned', 0)} trials early saved "
        f"{number(summary.saved_cycles)} full cycles of training."
    )


def _top(summary: Summary) -> dict[str, Any] | None:
    chosen = ranked(summary)[:TOP]
    if not chosen:
        return None
    runs = {run.trial.number: run for run in summary.runs}
    own = list(dict.fromkeys(name for c in chosen for name in _own(runs[c.number])))
    heads = ["rank", "trial", "value", "seeds", "found with", *records.FIELDS, *own]
    rows = [[str(rank), *_top_row(c, own)] for rank, c in enumerate(chosen, 1)]
    note = (
        "Recipes with fresh seeds stand first, in the order of their means; the others in that of "
        "what the search expects of them, which is not that of the single values. "
        "Value: mean ± standard deviation over the fresh seeds, or the one value there is. "
        "Found with: the value of the run that recommended the recipe."
    )
    return {"heads": heads, "rows": rows, "note": note}


def _top_row(candidate: Candidate, own: list[str]) -> list[str]:
    fresh = len(candidate.fresh)
    return [
        str(candidate.number),
        mean_and_spread(candidate),
        f"{fresh} fresh" if fresh else "1",
        number(candidate.found),
        *(number(candidate.recipe[field]) for field in records.FIELDS),
        *(_cell(candidate.params.get(name, "–")) for name in own),
    ]


def _settings(summary: Summary) -> dict[str, str]:
    if summary.settings is None:
        return {}
    shown = {key: value for key, value in summary.settings.to_json().items() if value is not None}
    return {key: _cell(value) for key, value in shown.items()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": platform.python_version()}


# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A figure as the template needs it: its title stands above it as text, and wraps."""

    id: str
    caption: str
    note: str
    json: str
    height: int
    wide: bool
    context: str = ""


def _figure(name: str, figure: go.Figure, note: str, context: str = "") -> _Figure:
    caption = html.unescape(figure.layout.title.text or "")
    data = untitled(figure).to_json()
    for character in "<>&":  # nothing in a figure may end the script element that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    height = int(figure.layout.height or figure.layout.template.layout.height)
    return _Figure(
        id=f"figure-{name}",
        caption=caption.rstrip(".") + ".",
        note=note if figure.data else "",
        json=data,
        height=height,
        wide=bool(figure.data) and name in WIDE,
        context=context,
    )


def _groups(summary: Summary) -> Iterator[Mapping[str, Any]]:
    yield {
        "id": "range-test",
        "title": "Where the learning rate works",
        "figures": list(_range_tests(summary)),
    }
    best = summary.best
    if best and best.total_steps:
        made = figures.schedule_figure(best.recipe, best.total_steps, best.policy)
        note = "The best recipe's schedule; it is the one the pasted code follows."
        yield {
            "id": "schedule",
            "title": "The best schedule",
            "figures": [_figure("schedule", made, note)],
        }
    yield {"id": "search", "title": "How the search went", "figures": _search_figures(summary)}
    yield {"id": "space", "title": "Where good recipes lie", "figures": _space_figures(summary)}
    note = "Means over stretches of steps; runs of one seed each, in the order of their rank."
    drawn = _figure("curves", figures.curves_figure(summary), note)
    yield {"id": "curves", "title": "Learning curves", "figures": [drawn]}


def _range_tests(summary: Summary) -> Iterator[_Figure]:
    """By context: what the range tests say, and what complete cycles made of it."""
    contexts: dict[str, list[SweepRecord]] = {}
    for sweep in evidence.sweeps(run.trial for run in summary.runs):
        contexts.setdefault(sweep.context_key, []).append(sweep)
    if not contexts:
        yield _figure("range-test", figures.range_test_figure([], None), "")
    for index, (key, sweeps) in enumerate(contexts.items()):
        context = f"Context {key}" if key else ""
        where = summary.windows.get(key)
        found = where.evidence if where else None
        tests = [evidence.range_test(sweep) for sweep in sweeps]
        prior = found.prior if found else None
        drawn = figures.range_test_figure(tests, prior, _range_test_title(found))
        note = _range_test_note(summary, key, found)
        yield _figure(f"range-test-{index}", drawn, note, context)
        if where and found and found.runs:
            drawn = figures.refining_figure(found, maximise=summary.direction == "maximize")
            yield _figure(f"refining-{index}", drawn, _refining_note(summary, where, found))


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
    note = f"{reason[:1].upper()}{reason[1:]}. They cost {number(cost)} full cycles."
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
        f" put the standard recipe's best max_lr at {rate_text(found.proposal.centre)}, and with "
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


def _search_figures(summary: Summary) -> list[_Figure]:
    history = "Grey crosses: the value expected of pruned trials; far ones lie beyond the axis."
    rungs = "Each rung is a complete cycle; a bar tells what became of the trials that reached it."
    return [
        _figure("history", figures.history_figure(summary), history),
        _figure("rungs", figures.rungs_figure(summary), rungs),
    ]


def _space_figures(summary: Summary) -> list[_Figure]:
    slices = "Where a cloud shows no trend, that parameter hardly matters here."
    lines = "Values run from the lowest tried at the bottom to the highest at the top."
    return [
        _figure("slice", figures.slice_figure(summary), slices),
        _figure("parallel", figures.parallel_figure(summary), lines),
    ]
