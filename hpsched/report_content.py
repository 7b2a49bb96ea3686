"""What a report says in words and tables; its HTML and Markdown pages show the same."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from optuna.trial import TrialState

from hpsched import records
from hpsched.coordinates import Coordinates
from hpsched.figure_data import cell_text, ranked
from hpsched.ledger import (
    FRUITLESS,
    Best,
    Candidate,
    Cost,
    Run,
    fruitless,
    latest_failed,
    optimizer_name,
)
from hpsched.present import duration, guess_text, mean_and_spread, number, torch_snippet
from hpsched.records import RecipeSpace
from hpsched.summary import Summary

TOP = 10  # recipes in the table
YOURS = "yours"  # what is said of the user's own parameters
NO_RESULT = "The budget is spent and no recipe has finished a full cycle: find out why."
PACKAGES = ("hpsched", "optuna", "torch", "numpy", "plotly")


# -- the answer ------------------------------------------------------------------------------------


def headline(summary: Summary) -> str:
    """The answer in one sentence: how good the best recipe is, at what cost, and how sure."""
    if several_objectives(summary):
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


def several_objectives(summary: Summary) -> bool:
    """Whether the study has no single best recipe."""
    return any(run.trial.values and len(run.trial.values) > 1 for run in summary.runs)


def status(summary: Summary) -> str:
    """How far the study is, in a line."""
    goal = "lower" if summary.direction == "minimize" else "higher"
    trials = sum(summary.states.values())
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(summary.states.items()))
    parts = [f"{goal} is better", f"{trials:,} trials ({states})" if trials else "no trials yet"]
    if summary.confirmations:
        parts.append(f"{summary.confirmations} confirmation runs")
    if summary.progress is not None:
        parts.append(f"{100 * summary.progress:.0f} % of the budget spent")
    if summary.eta:
        parts.append(f"about {duration(summary.eta)} to go")
    return " · ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to do next: the command or code, and why."""

    why: str
    code: str


def next_step(summary: Summary) -> Step | None:
    """What the reader should run next; None when the answer is there."""
    best = summary.best
    if several_objectives(summary):
        return None
    if why := trouble(summary):
        return Step(why=why, code=f"hpsched doctor --study {shlex.quote(summary.name)}")
    if best and best.confirmed and _is_done(summary):
        return None
    if best is None and summary.progress == 1.0:
        why = NO_RESULT
    elif best is None:
        why = "There is no finished full cycle: let the search run on."
    elif not best.confirmed and _is_done(summary):
        why = "Its value is of one seed, one of those it was chosen by: run it on fresh seeds."
    else:
        why = "The search is not finished: the best recipe may still change."
    return Step(why=why, code=summary.next_command if summary.settings else _plain_code(best))


def trouble(summary: Summary) -> str | None:
    """Why the study cannot go on as it is, which `hpsched doctor` tells more of; None where it can.

    None, too, while somebody is at work: the next trial may do better.
    """
    at_work = summary.live if summary.settings else "running" in summary.states or summary.best
    if at_work:
        return None
    if failed := latest_failed(summary.runs):
        every = set(summary.states) <= {"fail", "waiting"}
        which = "Every trial has failed so far" if every else f"The last {failed} trials failed"
        return f"{which}: mend the objective first; the last reason is below."
    if fruitless(summary.runs):
        return f"No run has given a finite result: {FRUITLESS}."
    return None


def _is_done(summary: Summary) -> bool:
    """Whether no worker has anything left to do; a plain study is done when it stands still."""
    if summary.settings:
        return "worker attach" not in summary.next_command and "--watch" not in summary.next_command
    return not {"running", "waiting"} & set(summary.states)


def _plain_code(best: Best | None) -> str:
    if best is None:
        return "study.optimize(objective, n_trials=20)"
    return "queued = hpsched.confirm(study)\nstudy.optimize(objective, n_trials=queued)"


# -- tables ----------------------------------------------------------------------------------------


def recipe_table(summary: Summary) -> dict[str, Any] | None:
    """The best recipe: its trial, a row for each value, and code to paste; None without one."""
    best = summary.best
    run = next((r for r in summary.runs if best and r.trial.number == best.number), None)
    if best is None or run is None or run.recipe is None:
        return None
    window = summary.windows.get(run.recipe.context_key)
    rows = [_field_row(field, best, run.recipe, window) for field in records.FIELDS]
    fixed = {"final_div_factor": number(best.recipe["final_div_factor"]), "policy": best.policy}
    fixed["total_steps"] = f"{best.total_steps:,}" if best.total_steps else "not given"
    rows += [_row(name, value, "fixed") for name, value in fixed.items()]
    rows += [_row(name, cell_text(value), YOURS) for name, value in own_params(run).items()]
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


def own_params(run: Run) -> dict[str, Any]:
    """The user's own parameters of a trial."""
    ours = run.recipe.names if run.recipe else []
    return {name: value for name, value in run.trial.params.items() if name not in ours}


def costs(summary: Summary) -> dict[str, Cost]:
    """What was spent on what; the last is the sum."""
    search = Cost(
        steps=summary.search_cost.steps - summary.range_test_cost.steps,
        seconds=summary.search_cost.seconds - summary.range_test_cost.seconds,
        cycles=summary.search_cost.cycles - summary.range_test_cost.cycles,
    )
    return {
        "range tests": summary.range_test_cost,
        "search": search,
        "confirmations": summary.confirm_cost,
        "all": summary.cost,
    }


def spent(summary: Summary) -> list[list[str]]:
    """:func:`costs` as a table, a row each."""
    return [
        [on, number(cost.cycles), f"{cost.steps:,}", duration(cost.seconds)]
        for on, cost in costs(summary).items()
    ]


def saved(summary: Summary) -> str:
    """What ending trials early saved, in a sentence."""
    pruned = summary.states.get("pruned", 0)
    trials = f"{pruned:,} trial{'s' * (pruned != 1)}"
    if not pruned:
        return "Nothing has been pruned yet."
    if not summary.saved_cycles:
        return f"Ending {trials} early has saved nothing so far."
    cycles = f"{number(summary.saved_cycles)} full cycles of training"
    took = (
        f", about {duration(summary.saved_seconds)} of device time" if summary.saved_seconds else ""
    )
    return f"Ending {trials} early saved {cycles}{took}."


def top_recipes(summary: Summary) -> dict[str, Any] | None:
    """The best recipes as a table with a note; None without a finished full cycle."""
    chosen = ranked(summary)[:TOP]
    if not chosen:
        return None
    runs = {run.trial.number: run for run in summary.runs}
    own = list(dict.fromkeys(name for c in chosen for name in own_params(runs[c.number])))
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
        *(cell_text(candidate.params.get(name, "–")) for name in own),
    ]


def settings(summary: Summary) -> dict[str, str]:
    """The study's settings as text, and what came of those that a small budget cuts.

    None of a study made with plain Optuna.
    """
    if summary.settings is None:
        return {}
    shown = {key: value for key, value in summary.settings.to_json().items() if value is not None}
    said = {key: cell_text(value) for key, value in shown.items()}
    if summary.settings.first_guess is not None:
        said["first_guess"] = guess_text(summary.settings.first_guess)
    run = _confirmed(summary.runs) if summary.progress == 1.0 else {}
    differ = {key: count for key, count in run.items() if count != said[key]}
    return said | {key: f"asked {said[key]}, run {count}" for key, count in differ.items()}


def _confirmed(runs: Sequence[Run]) -> dict[str, str]:
    """How many recipes were confirmed, and with how many fresh seeds each, by their settings."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    again = Counter(r.confirms for r in runs if r.confirms is not None and r.trial.state in done)
    seeds = sorted(set(again.values())) or [0]
    each = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    return {"confirm_top": str(len(again)), "confirm_seeds": each}


def versions() -> dict[str, str]:
    """The versions that make the report."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": platform.python_version()}
