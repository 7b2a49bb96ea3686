"""A study at a glance: what ``status``, the report and the dashboard show, read once."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import edges, evidence, records
from hpsched.coordinates import Coordinates, coordinates
from hpsched.ledger import (
    FRUITLESS,
    Best,
    Cost,
    Run,
    best_json,
    best_of,
    confirmations_planned,
    fruitless,
    is_over,
    latest_failed,
    read_runs,
    total_cost,
)
from hpsched.present import counted
from hpsched.prestage import RANGE_TEST_SHARE, cycles_for_another
from hpsched.records import Settings, SweepRecord, WorkerRecord
from hpsched.search import of_study
from hpsched.storage import clock
from hpsched.study import WORKER_GONE_SECONDS, live_workers, read_settings, read_workers

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Of the noise between seeds: what the next recipe must be expected to gain to be worth its cost.
SETTLED = 0.05


@dataclass(frozen=True, kw_only=True)
class RungCount:
    """How many trials reached a rung, are at it now, and were pruned after it."""

    rung: int
    steps: int
    reached: int
    pruned: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study at a glance: everything ``status``, the report and the dashboard show.

    Attributes:
        name, direction, settings: The study's.
        states: Trial state → number of search trials.
        runs: All trials with their records.
        rungs: Counts by rung, shortest first.
        windows: Context → where its range tests point.
        cost, search_cost, range_test_cost, confirm_cost: What was spent, in all and on what.
        saved_cycles: Full cycles that pruned and diverged trials did not run; 0 while no trial has
            run in full, as nothing was gained by ending the others.
        saved_seconds: About what these would have taken on a device, at the pace of full cycles;
            None before one has finished.
        confirmations: Finished confirmation runs.
        workers: Id → who is at work or was.
        live: Those of them that are at work now.
        best: The best recipe so far, or None.
        progress: Share of the budget spent, 0 to 1; None without settings.
        eta: Seconds the rest of the budget takes at the pace so far, or None.
        findings: Why the best is the best, what short cycles are worth, whether to search on.
        warnings: What the user should know.
        next_command: What to do next.
    """

    name: str
    direction: str
    settings: Settings | None
    states: dict[str, int]
    runs: tuple[Run, ...]
    rungs: tuple[RungCount, ...]
    windows: dict[str, Coordinates]
    cost: Cost
    search_cost: Cost
    range_test_cost: Cost
    confirm_cost: Cost
    saved_cycles: float
    saved_seconds: float | None
    confirmations: int
    workers: dict[str, WorkerRecord]
    live: dict[str, WorkerRecord]
    best: Best | None
    progress: float | None
    eta: float | None
    findings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    next_command: str = ""

    def figure(self, name: str = "history") -> go.Figure:
        """One of the study's figures, by name (needs plotly).

        Args:
            name: ``history``, ``rungs``, ``slice``, ``parallel``, ``curves``, ``schedule`` (of the
                best recipe), or ``range_test`` (of the first context).

        Raises:
            UsageError: No such figure.
        """
        from hpsched.figures import study_figure

        return study_figure(self, name)

    def _repr_html_(self) -> str:
        """In a notebook: a table and the search's history."""
        from hpsched.notebook import summary_html

        return summary_html(self)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values, for scripts (without the single trials)."""
        left_out = {"runs", "windows", "settings", "best", "workers", "live", "rungs"}
        data = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out
        }
        data |= {key: asdict(data[key]) for key in data if isinstance(data[key], Cost)}
        return {
            **data,
            "settings": self.settings.to_json() if self.settings else None,
            "rungs": [asdict(rung) for rung in self.rungs],
            "windows": {
                context: {"centre": w.centre, "low": w.window[0], "high": w.window[1]}
                for context, w in self.windows.items()
            },
            "workers": {key: worker.to_json() for key, worker in self.workers.items()},
            "best": best_json(self.best) if self.best else None,
        }


def summarise(study: Study, now: float | None = None) -> Summary:
    """Read the study once, and say how it stands."""
    now = clock(study._storage)() if now is None else now
    trials = study.get_trials(deepcopy=False)
    runs = read_runs(trials)
    settings = read_settings(study)
    search = [run for run in runs if run.confirms is None]
    workers = read_workers(study.user_attrs)
    live = live_workers(workers, now)
    single = len(study.directions) == 1
    named = best_of(runs, study.direction, study.study_name) if single else None
    windows = _windows(trials, runs, study.directions)
    cost = total_cost(runs)
    over = is_over(settings, runs, study.directions[0], now)  # confirmations may need less
    saved = _saved_cycles(search)
    progress = _progress(settings, runs, now)
    if progress is not None:
        progress = 1.0 if over else min(progress, 0.99)
    return Summary(
        name=study.study_name,
        direction=study.directions[0].name.lower(),
        settings=settings,
        states=dict(Counter(run.trial.state.name.lower() for run in search)),
        runs=tuple(runs),
        rungs=_rung_counts(search),
        windows=windows,
        cost=cost,
        search_cost=total_cost(search),
        range_test_cost=_sweep_cost(runs),
        confirm_cost=total_cost(run for run in runs if run.confirms is not None),
        saved_cycles=saved,
        saved_seconds=_saved_seconds(runs, saved),
        confirmations=sum(
            run.confirms is not None and run.trial.state.is_finished() for run in runs
        ),
        workers=workers,
        live=live,
        best=named,
        progress=progress,
        eta=_eta(settings, runs, progress, len(live), now),
        findings=tuple(_findings(runs, study.directions, settings, named, over)),
        warnings=tuple(_warnings(runs, study.directions, windows, workers, settings, named, now)),
        next_command=_next_command(study, settings, live, over, named, _stuck(runs)),
    )


def _windows(
    trials: Sequence[FrozenTrial], runs: Sequence[Run], directions: Sequence[StudyDirection]
) -> dict[str, Coordinates]:
    recipes = {run.recipe.context_key: run.recipe for run in runs if run.recipe}
    return {
        key: coordinates(trials, recipe, directions)
        for key, recipe in recipes.items()
        if evidence.of_context(trials, key)
    }


def _rung_counts(search: Sequence[Run]) -> tuple[RungCount, ...]:
    steps: dict[int, int] = {}
    reached: Counter[int] = Counter()
    pruned: Counter[int] = Counter()
    for run in search:
        for cycle in run.cycles:
            planned = dict(run.recipe.rungs) if run.recipe else {}  # a diverged one took fewer
            steps[cycle.rung] = max(planned.get(cycle.rung, cycle.steps), steps.get(cycle.rung, 0))
            reached[cycle.rung] += 1
        if run.trial.state == TrialState.PRUNED and run.cycles:
            pruned[run.cycles[-1].rung] += 1
    return tuple(
        RungCount(rung=rung, steps=steps[rung], reached=reached[rung], pruned=pruned[rung])
        for rung in sorted(steps)
    )


def _sweep_cost(runs: Sequence[Run]) -> Cost:
    parts: dict[str, Cost] = {}
    for run in runs:
        if run.sweep:
            parts[run.sweep.name] = run.parts()[run.sweep.name]
    return sum(parts.values(), Cost())


def _saved_cycles(search: Sequence[Run]) -> float:
    """What it would have cost to run every pruned recipe in full, less what was spent on it."""
    if not any(run.full for run in search):
        return 0.0
    pruned = [
        run
        for run in search
        if run.trial.state == TrialState.PRUNED
        and records.OUT_OF_MEMORY not in run.trial.user_attrs
    ]
    return sum(max(0.0, 1.0 - sum(c.steps / c.total_steps for c in run.cycles)) for run in pruned)


def _saved_seconds(runs: Iterable[Run], saved_cycles: float) -> float | None:
    """The saved cycles at the pace of those that ran in full: short ones carry fixed costs too."""
    times = [run.full.seconds for run in runs if run.full]
    return saved_cycles * statistics.fmean(times) if times else None


def _progress(settings: Settings | None, runs: Sequence[Run], now: float) -> float | None:
    if settings is None:
        return None
    done = sum(run.confirms is not None and run.trial.state.is_finished() for run in runs)
    if settings.cycles is not None:
        return min(1.0, total_cost(runs).cycles / settings.cycles)
    if settings.trials is not None:
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        searched = sum(r.confirms is None and r.trial.state in finished for r in runs)
        return min(1.0, (searched + done) / (settings.trials + confirmations_planned(settings)))
    assert settings.timeout is not None
    starts = _starts(runs)
    return min(1.0, (now - min(starts)) / settings.timeout) if starts else 0.0


def _eta(
    settings: Settings | None,
    runs: Sequence[Run],
    progress: float | None,
    live: int,
    now: float,
) -> float | None:
    """Seconds until the budget is spent, at the pace of the runs so far; None: nobody can say.

    Times in which nobody worked do not count, so it takes live workers.
    """
    if settings is None or not progress or progress >= 1:
        return None
    if settings.timeout is not None:
        return max(0.0, settings.timeout - (now - min(_starts(runs))))
    if not live:
        return None
    queued = sum(run.confirms is not None and not run.trial.state.is_finished() for run in runs)
    if settings.cycles is not None:
        spent = total_cost(runs)
        left = max(settings.cycles - spent.cycles, queued)
        return left * spent.seconds / spent.cycles / live if spent.cycles else None
    assert settings.trials is not None
    took = [run.trial.duration.total_seconds() for run in runs if run.trial.duration]
    planned = settings.trials + confirmations_planned(settings)
    left = max((1 - progress) * planned, queued)
    return left * statistics.fmean(took) / live if took else None


def _starts(runs: Sequence[Run]) -> list[float]:
    return [run.trial.datetime_start.timestamp() for run in runs if run.trial.datetime_start]


def _warnings(
    runs: Sequence[Run],
    directions: Sequence[StudyDirection],
    windows: Mapping[str, Coordinates],
    workers: Mapping[str, WorkerRecord],
    settings: Settings | None,
    named: Best | None,
    now: float,
) -> Iterable[str]:
    for run in runs:
        yield from run.broken
    yield from _failure_warnings(runs)
    if settings is not None:
        yield from _plain_warnings(runs)
    if fruitless(runs):
        at_work = live_workers(workers, now)  # the next trial may still give one
        remedy = "look at what train returns" if at_work else FRUITLESS
        yield f"no run has given a finite result yet: {remedy}"
    yield from _range_test_warnings([run.trial for run in runs], windows, settings)
    if named:
        yield from edges.warnings(runs, directions, windows, named)
    for worker in workers.values():
        silent = now - worker.seen
        if worker.state == "running" and silent >= WORKER_GONE_SECONDS:
            yield (
                f"worker {worker.host}:{worker.pid} has been silent for {silent / 60:.0f} min; "
                "its trial goes back to the queue when another worker asks"
            )
    if named and named.significant is False:
        yield "the best recipe is not significantly better than the runner-up: either will do"


def _range_test_warnings(
    trials: Sequence[FrozenTrial], windows: Mapping[str, Coordinates], settings: Settings | None
) -> Iterable[str]:
    for key, where in windows.items():
        own = evidence.of_context(trials, key)
        if doubt := evidence.doubt(own):
            room = _no_room(trials, own, where.recipe.total_steps, settings)
            yield f"range test{f' ({key})' if key else ''}: {doubt}{room}"


def _no_room(
    trials: Sequence[FrozenTrial],
    own: Sequence[SweepRecord],
    total_steps: int | None,
    settings: Settings | None,
) -> str:
    """What helps where the budget keeps a context from another range test; empty otherwise."""
    budget = settings and (settings.cycles or settings.trials)
    if not (settings and budget and total_steps) or len(own) >= settings.range_tests:
        return ""
    needed = cycles_for_another(trials, own, total_steps)
    if needed <= budget:
        return ""
    option = f"--{'cycles' if settings.cycles else 'trials'} {needed}"
    return (
        f". The study's budget has no room for another range test ({100 * RANGE_TEST_SHARE:.0f} % "
        f"of it at most); a new study with {option} has"
    )


def _findings(
    runs: Sequence[Run],
    directions: Sequence[StudyDirection],
    settings: Settings | None,
    named: Best | None,
    over: bool,
) -> Iterable[str]:
    if settings is not None and settings.base_sampler != "hpsched":
        return
    known = of_study([run.trial for run in runs], directions)
    if known is None:
        return
    if named is not None:
        yield from _why(runs, directions[0], named)
    if known.overfits:
        yield (
            "longer cycles score worse than short ones of the same recipe, which is overfitting: "
            "trials run in full, with more weight decay or, where that is fixed, at lower rates; "
            "fewer steps may do"
        )
    elif not known.trusts_rungs:
        yield "short cycles do not rank like full ones here: trials run in full"
    outlook = known.outlook(np.random.default_rng(0))
    if outlook is not None and not fruitless(runs):
        where = ", in a new study that begins --like this one" if over else ""
        verdict = "hardly pays" if outlook < SETTLED else f"may pay{where}"
        yield (
            f"the next recipe is expected to gain {outlook:.2g} of the noise between seeds: "
            f"more search {verdict}"
        )


def _why(runs: Sequence[Run], direction: StudyDirection, named: Best) -> Iterable[str]:
    """What the best was named for, where its own result does not say it."""
    if named.confirmed:
        seeds = "1 fresh seed" if named.seeds == 1 else f"{named.seeds} fresh seeds"
        yield f"trial {named.number} is named for its mean over {seeds}"
        return
    sign = 1 if direction == StudyDirection.MINIMIZE else -1
    fulls = {r.trial.number: r.full for r in runs if r.confirms is None}
    found = {n: full.value for n, full in fulls.items() if full and full.value is not None}
    luckiest = min(found, key=lambda number: sign * found[number], default=named.number)
    if luckiest != named.number:
        yield (
            f"trial {named.number} is named for what all results together let expect of it; trial "
            f"{luckiest} had the better single run ({found[luckiest]:.4g}), most of it luck"
        )


def _plain_warnings(runs: Sequence[Run]) -> Iterable[str]:
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    plain = [run.trial for run in runs if run.recipe is None and run.trial.state in ended]
    if plain:
        yield (
            f"{counted(len(plain), 'trial')}, the last of them trial {plain[-1].number}, never "
            "called hpsched.suggest_onecycle: no recipe is searched there, and each counts as a "
            "full run"
        )


def _failure_warnings(runs: Sequence[Run]) -> Iterable[str]:
    failed = [run.trial for run in runs if run.trial.state == TrialState.FAIL]
    if failed:
        reason = failed[-1].user_attrs.get(records.ERROR, "no reason was stored")
        yield (
            f"{counted(len(failed), 'trial')} failed; the last, trial {failed[-1].number}: {reason}"
        )
    lost = [run.trial for run in runs if records.OUT_OF_MEMORY in run.trial.user_attrs]
    if lost:
        reason = lost[-1].user_attrs[records.OUT_OF_MEMORY]
        yield (
            f"{counted(len(lost), 'trial')} ran out of memory; "
            f"the last, trial {lost[-1].number}: {reason}. "
            "Use a smaller batch, or fewer workers per device (--per-device)"
        )


def _stuck(runs: Sequence[Run]) -> bool:
    """Whether workers would give up: the latest trials all failed, or none was finite."""
    return latest_failed(runs) > 0 or fruitless(runs)


def _next_command(
    study: Study,
    settings: Settings | None,
    live: Mapping[str, WorkerRecord],
    over: bool,
    named: Best | None,
    stuck: bool,
) -> str:
    name = shlex.quote(study.study_name)
    if settings is None or len(study.directions) > 1:
        return f"hpsched study report {name}"
    if stuck and not live:
        return f"hpsched doctor --study {name}"
    if not over:
        return f"hpsched study status {name} --watch" if live else f"hpsched worker attach {name}"
    if named is None:
        return f"hpsched doctor --study {name}"
    return (
        f"hpsched study best {name} --format torch"
        if named.confirmed
        else f"hpsched study confirm {name}"
    )
