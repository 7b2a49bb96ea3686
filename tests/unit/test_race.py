"""The benchmark's machinery: virtual time, what a race costs, what the rows say, resuming."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from fake_training import FakeTraining
from hypothesis import given, settings
from hypothesis import strategies as st

import hpsched
from studies.bench import command, rows, summary
from studies.bench.methods import EXPERT, METHODS, WIDE
from studies.bench.race import CHECKPOINTS, Clock, Race, scored
from studies.bench.rows import Job, Results
from studies.bench.summary import Target, at, cost_to, interval, mean, target
from studies.bench.tasks import TASKS

STEPS = 90
RECIPE = {
    "max_lr": 0.3,
    "weight_decay": 1e-3,
    "div_factor": 25.0,
    "pct_start": 0.3,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
}


# ------------------------------------------------------------------ the clock


def simulate(*durations: list[float]) -> list[tuple[float, int, int]]:
    """(time, worker, step) as a worker for each list spends its entries in turn."""
    clock, log = Clock(), []
    lists = iter(enumerate(durations))

    def work() -> None:
        worker, mine = next(lists)
        log.append((clock.now, worker, 0))
        for step, steps in enumerate(mine, start=1):
            clock.spend(steps)
            log.append((clock.now, worker, step))

    clock.run(len(durations), work)
    return log


def test_results_arrive_in_order_of_virtual_time() -> None:
    assert simulate([5.0, 1.0], [2.0, 2.0, 2.5]) == [
        (0, 0, 0),
        (0, 1, 0),
        (2, 1, 1),
        (4, 1, 2),
        (5, 0, 1),
        (6, 0, 2),
        (6.5, 1, 3),
    ]


def test_ties_go_to_who_asked_first() -> None:
    assert simulate([3.0, 3.0], [1.0, 2.0], [3.0]) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (1, 1, 1),
        (3, 0, 1),  # asked at 0, first
        (3, 2, 1),
        (3, 1, 2),  # asked at 1
        (6, 0, 2),
    ]


def test_one_worker_has_the_sum() -> None:
    assert [when for when, _, _ in simulate([1.0, 0.0, 2.5])] == [0, 1, 1, 3.5]


def test_a_clock_without_workers_runs_for_the_caller() -> None:
    clock = Clock()
    clock.spend(3.0)
    clock.spend(0.5)
    assert clock.now == 3.5


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_every_worker_gets_its_time_and_time_never_goes_back(durations: list[list[int]]) -> None:
    log = simulate(*[[float(steps) for steps in mine] for mine in durations])
    times = [when for when, _, _ in log]
    assert times == sorted(times)
    for worker, mine in enumerate(durations):
        own = [when for when, who, _ in log if who == worker]
        assert own == [0, *np.cumsum(mine)]
    assert log == simulate(*[[float(steps) for steps in mine] for mine in durations])


def test_only_one_worker_runs_at_a_time() -> None:
    clock, busy, most = Clock(), [0], [0]

    def work() -> None:
        for _ in range(20):
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            busy[0] -= 1
            clock.spend(1.0)

    clock.run(4, work)
    assert most == [1] and clock.now == 20


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_error_of_one_worker_is_raised_and_the_others_finish(failing: int) -> None:
    clock, done, numbers = Clock(), [], iter(range(4))

    def work() -> None:
        number = next(numbers)
        for step in range(3):
            clock.spend(1.0 + number)
            if number == failing and step == 1:
                raise ValueError(f"worker {number}")
        done.append(number)

    before = threading.active_count()
    with pytest.raises(ValueError, match=f"worker {failing}"):
        clock.run(4, work)
    assert done == [number for number in range(4) if number != failing]
    assert threading.active_count() == before


def test_of_several_errors_the_first_is_raised() -> None:
    clock, numbers = Clock(), iter(range(3))

    def work() -> None:
        number = next(numbers)
        clock.spend(3.0 - number)
        raise ValueError(f"worker {number}")

    with pytest.raises(ValueError, match="worker 2"):
        clock.run(3, work)


def test_a_second_round_of_workers_begins_when_the_first_has_ended() -> None:
    clock = Clock()
    clock.run(2, lambda: clock.spend(5.0))
    clock.run(2, lambda: clock.spend(1.0))
    assert clock.now == 6


# ------------------------------------------------------------------ a task that takes no time


@dataclass
class Tiny:
    """What a race needs of a task: a fake training run of 90 steps."""

    name: str = "tiny"
    total_steps: int = STEPS
    optimizer: str = "sgd"
    training: FakeTraining = field(default_factory=lambda: FakeTraining(horizon=STEPS))
    seeds: list[int] = field(default_factory=list)

    def validated(
        self, cycle: hpsched.Cycle, look: Callable[[int, Callable[[], float]], None] | None = None
    ) -> float:
        self.seeds.append(cycle.seed)
        if look is None:
            return self.training(cycle)
        schedule = cycle.schedule(_Optimizer(cycle.max_lr))
        for step in range(1, cycle.total_steps + 1):
            schedule.step(1.0)
            look(step, lambda step=step: 1 / step)  # type: ignore[misc]
        return 0.5

    def tested(self, cycle: hpsched.Cycle) -> float:
        return 1 + self.validated(cycle)


class _Optimizer:
    def __init__(self, lr: float) -> None:
        self.param_groups = [{"lr": lr, "momentum": 0.9}]


def race(budget: float = 3.0, workers: int = 1, seed: int = 0, steps: int = STEPS) -> Race:
    task: Any = Tiny(
        total_steps=steps, training=FakeTraining(best_lr=0.3, horizon=steps, noise=0.002)
    )
    return Race(task, seed, budget, workers)


# ------------------------------------------------------------------ what a race costs


def test_full_and_shorter_runs_cost_their_steps() -> None:
    one = race()
    one.train(RECIPE)
    assert (one.spent, one.runs, one.clock.now, one.cost) == (STEPS, 1, STEPS, 1.0)
    one.train(RECIPE, share=1 / 3)
    assert (one.spent, one.runs, one.clock.now) == (STEPS + 30, 2, STEPS + 30)
    assert not one.over
    one.train(RECIPE, share=1.0)
    one.train(RECIPE, share=2 / 3)
    assert one.cost == 3.0 and one.over


def test_a_range_test_costs_its_steps() -> None:
    one = race()
    sweeps = hpsched.suggest.find_lr(one.cycle, num_iter=80, end_lr=1e3, replicates=2, seed=0)
    taken = sum(len(sweep.losses) for sweep in sweeps)
    assert one.spent == taken and one.runs == 2
    assert taken < 2 * 80  # they diverged before the end


def test_a_run_that_diverges_costs_what_it_took_and_scores_inf() -> None:
    one = race()
    assert one.train({**RECIPE, "max_lr": 50.0}) == math.inf
    assert 0 < one.spent < STEPS and one.clock.now == one.spent


def test_a_run_that_is_stopped_costs_what_it_took() -> None:
    one, seen = race(), []

    def watch(step: int, score: float) -> None:
        seen.append((step, score, one.spent, one.clock.now))
        if step >= 30:
            raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        one.train(RECIPE, watch=watch)
    assert seen == [(step, 1 / step, step, step) for step in (10, 20, 30)]
    assert one.spent == one.clock.now == 30


def test_a_run_is_watched_at_each_checkpoint_but_the_last() -> None:
    for share, steps in ((1.0, 90), (1 / 2, 45), (1 / 9, 10)):
        one, seen = race(), []
        one.train(RECIPE, share=share, watch=lambda step, score, seen=seen: seen.append(step))  # type: ignore[misc]
        assert seen == [math.ceil(k * steps / CHECKPOINTS) for k in range(1, CHECKPOINTS)]
        assert one.spent == one.clock.now == steps


def test_no_two_runs_have_the_same_seed() -> None:
    races = [race(seed=seed) for seed in range(3)]
    for one in races:
        for _ in range(3):
            one.train(RECIPE)
    seeds = [seed for one in races for seed in one.task.seeds]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 9
    races[0].train(RECIPE, seed=7)
    assert races[0].task.seeds[-1] == 7  # type: ignore[attr-defined]


def test_an_error_in_training_still_costs() -> None:
    one = race()
    one.task.training.fail_on = lambda cycle: cycle.total_steps == 30  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="on fire"):
        one.train(RECIPE, share=1 / 3)
    one.train(RECIPE)
    assert one.runs == 2 and one.spent == STEPS


def test_four_workers_spend_as_much_in_a_quarter_of_the_time() -> None:
    times = {}
    for workers in (1, 4):
        one = race(budget=8, workers=workers)

        def work(one: Race = one) -> None:
            while not one.over:
                one.train(RECIPE)
                one.name({**RECIPE, "max_lr": 1.0 / one.runs})

        one.work(work)
        times[workers] = one.clock.now / STEPS
        costs = [cost for cost, _, _ in one.named]
        when = [time for _, time, _ in one.named]
        assert costs == sorted(costs) and when == sorted(when)
        if workers == 1:
            assert costs == when == [1, 2, 3, 4, 5, 6, 7, 8]
        else:
            assert set(when) == {1.0, 2.0} and costs[0] == 4  # what is under way is paid for
            assert one.cost == 8
    assert times == {1: 8, 4: 2}


def test_workers_whose_runs_differ_in_length_overlap() -> None:
    one, shares = race(workers=2), iter([1.0, 1 / 3])
    log = []

    def work() -> None:
        share = next(shares)
        for _ in range(round(1 / share)):
            one.train(RECIPE, share=share)
            log.append((one.clock.now, share))

    one.work(work)
    assert log == [(30, 1 / 3), (60, 1 / 3), (90, 1.0), (90, 1 / 3)]
    assert one.cost == 2 and one.clock.now == STEPS


# ------------------------------------------------------------------ what is named


def test_a_name_is_kept_with_its_cost_when_it_changes() -> None:
    one, other = race(), {**RECIPE, "max_lr": 0.1}
    one.name(None)
    one.name(RECIPE)
    one.train(RECIPE)
    one.name(dict(RECIPE))  # the same
    one.name(other)
    one.train(RECIPE, share=1 / 3)
    one.name(None)
    one.name(RECIPE)
    assert one.named == [(0, 0, RECIPE), (1, 1, other), (4 / 3, 4 / 3, RECIPE)]
    other["max_lr"] = 9.0
    assert one.named[1][2]["max_lr"] == 0.1


def test_scored_runs_each_seed_and_calls_divergence_inf() -> None:
    task: Any = Tiny()
    good = scored(task, RECIPE, range(5, 8))
    assert task.seeds == [5, 6, 7] and all(1 < score < 1.2 for score in good)
    assert scored(task, RECIPE, range(5, 8)) == good
    assert scored(task, {**RECIPE, "max_lr": 50.0}, range(2)) == [math.inf] * 2


@pytest.mark.parametrize("name", ["hpsched", "hpsched-no-rungs", "tpe-wide", "hyperband-expert"])
@pytest.mark.parametrize("workers", [1, 4])
def test_methods_keep_the_budget_and_name_as_they_go(name: str, workers: int) -> None:
    one = race(budget=6, workers=workers, steps=180)
    METHODS[name](one)
    assert 6 - 1 <= one.cost <= 6 + workers
    assert one.cost == one.spent / 180
    costs, times, recipes = map(list, zip(*one.named, strict=True))
    assert costs == sorted(costs) and times == sorted(times)
    assert all(recipe.keys() >= WIDE.keys() for recipe in recipes)
    if workers == 1:
        assert costs == pytest.approx(times)
        assert one.clock.now == one.spent
    else:
        assert one.clock.now < 0.6 * one.spent
    again = race(budget=6, workers=workers, steps=180)
    METHODS[name](again)
    assert again.named == one.named and again.spent == one.spent


def test_hpsched_names_after_range_test_and_short_cycles_already() -> None:
    one = race(budget=4, steps=180)
    METHODS["hpsched"](one)
    first, *_ = one.named
    assert 0 < first[0] < 0.5  # before anything was run in full
    assert abs(math.log2(first[2]["max_lr"] / 0.3)) < 2.5
    assert one.named[-1][0] > 1


@pytest.mark.parametrize("name", ["oracle-rate", "oracle-rate-and-decay"])
def test_the_oracles_know_the_best_rate_and_pay_nothing(name: str) -> None:
    one = race()
    METHODS[name](one)
    ((cost, _, recipe),) = one.named
    assert cost == one.spent == 0
    assert abs(math.log2(recipe["max_lr"] / 0.3)) < 0.75
    # The planted best is κ = 0.3: a weight decay of 1.7e-3 here, 1e-4 as people leave it.
    assert recipe["weight_decay"] == pytest.approx(1e-4 if name == "oracle-rate" else 1e-3)
    assert not set(one.task.seeds) & {*range(1_000_000, 1_000_005), one.next_seed()}  # type: ignore[attr-defined]


# ------------------------------------------------------------------ what the rows say


def row(*named: tuple[float, float | list[float | None]], budget: float = 40, **more: Any) -> Any:
    """(cost, score or scores) of each recipe that was named."""
    entries = [
        {
            "cost": cost,
            "time": cost / 4,
            "scores": scores if isinstance(scores, list) else [scores] * 3,
        }
        for cost, scores in named
    ]
    return {"method": "hyperband-wide", "budget": budget, "named": entries, **more}


WANTED = Target(level=0.2, tolerance=0.05)


@pytest.mark.parametrize(
    ("named", "cost"),
    [
        ([], math.inf),
        ([(1, 0.9), (2, 0.5)], math.inf),  # never
        ([(1, 0.9), (5, 0.2), (9, 0.1)], 5),  # and stays
        ([(1, 0.2), (3, 0.3), (7, 0.24)], 7),  # loses it again
        ([(1, 0.2), (3, 0.3)], math.inf),
        ([(1, 0.2), (3, [0.1, None, 0.1])], math.inf),  # diverged on a fresh seed
        ([(1, [0.1, None, 0.1]), (3, [0.1, 0.2, 0.3])], 3),
        ([(4, 0.25)], 4),  # just
        ([(4, 0.2501)], math.inf),
        ([(4, 0.2), (40.8, 0.9)], math.inf),  # a little over the budget counts
        ([(4, 0.2), (40.9, 0.9)], 4),  # what came later does not
        ([(41, 0.2)], math.inf),
    ],
)
def test_cost_to_the_target(named: list[Any], cost: float) -> None:
    assert cost_to(row(*named), WANTED) == cost
    assert cost_to(row(*named), WANTED, "time") == cost / 4


def test_scores_at_a_budget() -> None:
    found = row((1, 0.9), (2.5, 0.5), (7, 0.1))
    assert at(found, 0.99) is None
    assert at(found, 1) == [0.9] * 3
    assert at(found, 2.49) == [0.9] * 3
    assert at(found, 2.5) == [0.5] * 3
    assert at(found, 100) == [0.1] * 3
    assert at(row(), 5) is None


def test_mean_of_a_diverged_score_is_inf() -> None:
    assert mean([0.1, 0.3]) == pytest.approx(0.2)
    assert mean([0.1, None, 0.3]) == math.inf


def test_the_target_is_the_middle_of_what_its_method_named_in_time() -> None:
    found = [
        row((1, 0.9), (39, [0.1, 0.2, 0.3]), (41, 0.0)),  # 0.2, apart by 0.1
        row((40, [0.3, 0.3, 0.6])),  # 0.4, by 0.173
        row((20, [0.5, 0.5, 0.5])),  # 0.5, by 0
        row((20, [0.1, None, 0.1])),  # inf: none
        row((50, 0.0)),  # too late
        row((5, 0.0), method="hpsched"),
    ]
    wanted = target(found)
    assert wanted.level == pytest.approx(0.45)
    assert wanted.tolerance == pytest.approx(0.1)
    assert wanted.met(0.5499) and not wanted.met(0.5501) and not wanted.met(math.inf)


def test_races_are_compared_in_pairs_of_the_same_task_and_seed() -> None:
    """Theirs costs 8, misses, and is as dear as ours in a race that both miss."""

    def race_of(method: str, seed: int, cost: float, score: float = 0.2) -> Any:
        return row((cost, score), method=method, seed=seed, task="t", workers=1)

    def compared(races: list[Any]) -> Any:
        return summary._times_ours(summary._costs(races, "tpe-wide", WANTED)[1])

    rivals = [race_of("tpe-wide", 0, 8), race_of("tpe-wide", 1, 8, 0.9), race_of("tpe-wide", 2, 8)]
    ours = [race_of("hpsched", 0, 2), race_of("hpsched", 1, 2), race_of("hpsched", 3, 2)]
    missed = [race_of("tpe-wide", 4, 8, 0.9), race_of("hpsched", 4, 2, 0.9)]
    found = compared([*rivals, *ours, *missed])
    assert (found["races"], found["ours_cheaper"], found["ours_dearer"]) == (3, 2, 0)
    assert found["times"] == 4  # of 4, infinity and 1
    assert found["interval"] == [1, None]
    assert found["p"] == pytest.approx(0.5)
    alone = compared(rivals)
    assert (alone["races"], alone["times"], alone["p"]) == (0, None, 1)


def test_recipes_named_at_equal_budgets_are_compared_in_pairs() -> None:
    def named(method: str, seed: int, score: float) -> Any:
        return row((5, score), (30, 0.0), method=method, seed=seed, task="t", workers=1)

    ours = [named("hpsched", seed, 0.2) for seed in range(6)]
    rivals = [named("tpe-wide", seed, 0.1 if seed == 5 else 0.3) for seed in range(7)]
    found = summary._quality([*ours, *rivals], "tpe-wide", WANTED, 10)
    assert (found["ours_better"], found["ours_worse"]) == (5, 1)
    assert found["p"] == pytest.approx(14 / 64)
    later = summary._quality([*ours, *rivals], "tpe-wide", WANTED, 40)
    assert (later["ours_better"], later["ours_worse"], later["p"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("better", "worse", "p", "said"),
    [
        (6, 0, 0.03, "better recipes in 1 and worse ones in 0 with"),
        (0, 6, 0.03, "better recipes in 0 and worse ones in 1 with"),
        (5, 1, 0.2, "better recipes in 0 and worse ones in 0 with"),
    ],
)
def test_what_is_clear_at_equal_budgets_is_counted(
    better: int, worse: int, p: float, said: str
) -> None:
    quality = {"10": {"ours_better": better, "ours_worse": worse, "p": p}}
    cell = {"t": {"seeds": 6, "quality": quality}}
    few = {"t": {"seeds": 5, "quality": quality}}
    line = command._clear({"methods": {"hpsched": cell, "gp-wide": few, "tpe-wide": cell}}, "10")
    assert "of 1 pairs" in line and said in line
    assert line.endswith(": tpe-wide on t.") == (worse == 6)


def test_the_interval_covers_and_narrows() -> None:
    assert interval([3.0] * 10) == (3, 3)
    rng = np.random.default_rng(0)
    low, high = interval(rng.normal(5, 1, 30).tolist())
    assert low < 5 < high
    near = interval(rng.normal(5, 1, 3000).tolist())
    assert near[1] - near[0] < 0.3 * (high - low)
    assert interval([1.0, 2.0, math.inf])[1] == math.inf  # a race that never got there
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])
    covered = sum(
        low <= 0 <= high
        for low, high in (interval(rng.normal(0, 1, 25).tolist()) for _ in range(20))
    )
    assert covered >= 16


def test_the_interval_is_about_that_of_the_order_statistics() -> None:
    """Of a median of 99, 95 % lies between the 40th and the 60th value (binomial quantiles)."""
    low, high = interval([float(value) for value in range(1, 100)])
    assert low == pytest.approx(40, abs=2) and high == pytest.approx(60, abs=2)


# ------------------------------------------------------------------ resuming


def fake_job(job: Job) -> rows.Row:
    return {
        **job._asdict(),
        "rules": rows.fingerprint() if job.method.startswith("hpsched") else None,
        "named": [],
    }


JOBS = [
    Job(task, method, seed, 1, 4.0)
    for task in ("tiny@1", "tiny@2")
    for method in ("hpsched", "tpe-wide")
    for seed in (0, 1)
]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setattr(rows, "run_job", fake_job)
    return Results(tmp_path / "results")


def go(results: Results, jobs: list[Job] = JOBS) -> tuple[int, list[Job]]:
    """How many were there, and the jobs that ran."""
    done: list[Job] = []
    there = results.run(jobs, 2, lambda row: done.append(rows.key(row)))
    return there, sorted(done)


def test_only_what_is_missing_is_run(results: Results) -> None:
    assert go(results, JOBS[:3]) == (0, sorted(JOBS[:3]))
    assert go(results) == (3, sorted(JOBS[3:]))
    assert go(results) == (8, [])
    assert sorted(path.name for path in results.folder.iterdir()) == [
        "tiny@1.jsonl",
        "tiny@2.jsonl",
    ]
    assert sorted(map(rows.key, results)) == sorted(JOBS)


@pytest.mark.parametrize("field", ["seed", "workers", "budget"])
def test_another_seed_budget_or_number_of_workers_is_another_race(
    results: Results, field: str
) -> None:
    go(results, JOBS[:1])
    other = JOBS[0]._replace(**{field: 3})
    assert go(results, [other]) == (0, [other])


def test_rows_of_other_code_are_run_again_if_they_are_ours(results: Results) -> None:
    go(results)
    for path in results.folder.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{**one, "rules": "old"} if one["rules"] else one for one in lines]
        path.write_text("".join(json.dumps(one) + "\n" for one in old))
    assert {one["method"] for one in results.current()} == {"tpe-wide"}
    there, ran = go(results)
    assert there == 4 and {job.method for job in ran} == {"hpsched"}
    every = len(results.current(["old"]))
    for rules in (["old", rows.fingerprint()], [rows.fingerprint(), "old"]):
        found = results.current(rules)  # of both, one row for each race: that of the first
        assert len(found) == every
        assert {one["rules"] for one in found if one["method"] == "hpsched"} == {rules[0]}


def cut(results: Results) -> None:
    """As an interruption leaves the file: half of the last row, without its end."""
    path = results.folder / "tiny@1.jsonl"
    path.write_text(path.read_text()[:-30])


def test_a_cut_last_line_is_left_out_and_its_race_runs_again(results: Results) -> None:
    go(results)
    cut(results)
    assert len(list(results)) == 7
    there, ran = go(results)
    assert there == 7 and len(ran) == 1 and ran[0].task == "tiny@1"


def test_what_ran_after_a_cut_line_is_kept(results: Results) -> None:
    go(results)
    cut(results)
    go(results)
    assert go(results) == (8, [])


def test_the_fingerprint_is_that_of_the_searching_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in Path(hpsched.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_text("one")
    monkeypatch.setattr(hpsched, "__file__", str(tmp_path / "__init__.py"))
    before = rows.fingerprint.__wrapped__()
    (tmp_path / "report.py").write_text("two")
    (tmp_path / "figures.py").write_text("two")
    assert rows.fingerprint.__wrapped__() == before
    (tmp_path / "search.py").write_text("two")
    assert rows.fingerprint.__wrapped__() != before


# ------------------------------------------------------------------ real races


TASK = "digits-mlp-sgd@100"


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("method", ["hpsched", "tpe-wide", "hyperband-wide"])
def test_a_real_race(method: str, workers: int) -> None:
    one = Race(TASKS[TASK], 0, 3.0, workers)
    METHODS[method](one)
    assert 2.5 <= one.cost <= 3 + workers
    assert one.named and one.named[-1][0] <= one.cost
    assert one.clock.now <= one.spent and (workers == 1) == (one.clock.now == one.spent)
    assert 0 < one.seconds < 60
    recipe = one.named[-1][2]
    for name, (low, high, _) in WIDE.items():
        assert low <= recipe[name] <= high or method == "hpsched"
    scores = scored(TASKS[TASK], recipe, range(2))
    assert all(0 <= score <= 1 or math.isinf(score) for score in scores)
    if method == "hpsched":
        assert max(scores) < 0.25
        assert EXPERT["sgd"].keys() <= recipe.keys()


def test_a_real_row(tmp_path: Path) -> None:
    job = Job(TASK, "hpsched", 1, 1, 1.5)
    found: list[rows.Row] = []
    assert Results(tmp_path).run([job], 1, found.append) == 0
    (one,) = Results(tmp_path)
    assert one == found[0] and rows.key(one) == job
    assert one["rules"] == rows.fingerprint()
    assert all(len(named["scores"]) == len(rows.FRESH_SEEDS) for named in one["named"])
    assert 1.2 <= one["cost"] <= 2.5 and one["training"] <= one["wall"]
    assert summary.at(one, 3) is not None
