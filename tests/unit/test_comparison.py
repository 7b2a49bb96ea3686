"""Several studies against each other: who is better, whether that is certain, what is doubtful."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import report_studies
from fake_training import FakeTraining
from scipy import stats

import hpsched
from hpsched import comparison, figures, records
from hpsched.compare import Arm, differences, holm
from hpsched.comparison import comparable, compare, welch
from hpsched.errors import UsageError
from hpsched.ledger import best_so_far
from hpsched.present import mean_and_spread, number
from hpsched.report import render, render_comparison, write_report
from hpsched.summary import Summary, summarise


@cache
def other(name: str = "wide|`resnet`", seed: int = 1, seeds: int = 3) -> Summary:
    """A study of the same training, confirmed on ``seeds`` fresh seeds."""
    study = optuna.create_study(
        study_name=name, sampler=hpsched.OneCycleSampler(seed=seed), pruner=hpsched.CyclePruner()
    )
    train = FakeTraining(horizon=report_studies.STEPS)

    def objective(trial: optuna.Trial) -> float:
        return hpsched.suggest_onecycle(trial, total_steps=report_studies.STEPS).run(train)

    study.optimize(objective, n_trials=6)
    if seeds:
        study.optimize(objective, n_trials=hpsched.confirm(study, top=1, seeds=seeds))
    return summarise(study)


def told(summary: Summary, *fresh: float, **more: Any) -> Summary:
    """The study with other values on fresh seeds."""
    assert summary.best is not None
    return replace(summary, best=replace(summary.best, fresh=fresh), **more)


def confirmed_on(
    summary: Summary, scores: dict[int, float | None], queued: bool = False, **more: Any
) -> Summary:
    """The study with its best recipe's runs on these fresh seeds; None is one that diverged."""
    best = summary.best
    assert best is not None
    model = next(run for run in summary.runs if run.confirms == best.number and run.full)
    assert model.full is not None
    runs = []
    for seed, value in scores.items():
        trial = copy.copy(model.trial)
        trial.user_attrs = {records.CONFIRMS: best.number}
        trial.user_attrs |= {records.SEED: seed} if queued else {}
        trial.user_attrs |= {records.DIVERGED: "it is infinite"} if value is None else {}
        cycle = replace(model.full, seed=seed, value=value)
        runs.append(replace(model, trial=trial, cycles=(cycle,)))
    fresh = tuple(math.inf if value is None else value for value in scores.values())
    others = [run for run in summary.runs if run.confirms != best.number]
    return replace(summary, runs=(*others, *runs), best=replace(best, fresh=fresh), **more)


def worse() -> Summary:
    return told(other(), 0.301, 0.302, 0.303)


def test_a_difference_that_seeds_do_not_explain_is_significant() -> None:
    best = report_studies.confirmed()
    found = compare([worse(), best])
    (pair,) = found.pairs
    assert (pair.better, pair.worse) == (best.name, worse().name)
    assert best.best is not None
    p = stats.ttest_ind(best.best.fresh, (0.301, 0.302, 0.303), equal_var=False).pvalue
    assert pair.p == pytest.approx(p) and p < 0.05
    assert pair.verdict == "significant"
    assert found.headline.startswith(f"{best.name} has the best mean: {mean_and_spread(best.best)}")
    assert f"; significantly better than {worse().name}." in found.headline


def test_a_difference_within_the_seeds_is_not() -> None:
    near = told(other(), 0.05, 0.10, 0.13)
    found = compare([report_studies.confirmed(), near])
    assert found.pairs[0].verdict.startswith("not significant")
    assert "; not significantly better than" in found.headline


def test_with_higher_is_better_the_higher_mean_wins() -> None:
    low, high = (told(s, *v, direction="maximize") for s, v in (
        (report_studies.confirmed(), (0.6, 0.61)), (other(), (0.8, 0.81)),
    ))  # fmt: skip
    found = compare([low, high])
    assert (found.pairs[0].better, found.pairs[0].worse) == (high.name, low.name)
    assert found.headline.startswith(f"{high.name} has the best mean")


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("fresh", [(0.2,), (0.1, 0.2, 0.3)])
def test_equal_means_are_called_equal(fresh: tuple[float, ...], direction: str) -> None:
    first, second = (
        told(s, *values, direction=direction)
        for s, values in ((report_studies.confirmed(), fresh), (other("b"), fresh[::-1]))
    )
    worst = 9.0 if direction == "minimize" else -9.0
    third = told(other("c"), worst, worst + 0.1, direction=direction)
    found = compare([first, second])
    assert found.pairs[0].equal and not found.pairs[0].difference
    assert found.headline == "digits and b are equal: the same best mean, 0.2."
    assert "| digits (equal) | b (equal) | 0 |" in render([first, second], as_markdown=True)
    headline = compare([first, second, third]).headline
    assert headline.startswith("digits and b are equal") and "better than b" not in headline
    assert ("significantly better than c" in headline) == (len(fresh) > 1)
    assert [pair.equal for pair in compare([first, second, third]).pairs] == [True, False, False]


def test_equal_means_on_the_same_seeds_are_equal_unless_one_diverged_more_often() -> None:
    scores: dict[int, float | None] = {7: 0.3, 8: 0.1, 9: 0.2}
    turned: dict[int, float | None] = {7: 0.1, 8: 0.2, 9: 0.3}
    (pair,) = compare(arms(scores, turned)).pairs
    assert pair.paired and pair.equal and pair.difference == 0
    (pair,) = compare(arms({**scores, 7: None}, {**scores, 7: None, 8: None})).pairs
    assert not pair.equal and pair.better == "digits"  # both means are infinite
    assert "equal" not in compare(arms(OURS, THEIRS)).headline


OURS: dict[int, float | None] = {7: 0.30, 8: 0.50, 9: 0.10, 10: 0.40}
THEIRS: dict[int, float | None] = {10: 0.43, 9: 0.12, 8: 0.54, 7: 0.33}


def arms(
    ours: dict[int, float | None], theirs: dict[int, float | None], **more: Any
) -> list[Summary]:
    """Two studies as ``hpsched compare`` leaves them."""
    first = confirmed_on(report_studies.confirmed(), ours, queued=True, **more)
    second = confirmed_on(other("cosine"), theirs, queued=True, **more)
    return [first, second]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_studies_on_the_same_seeds_are_compared_as_hpsched_compare_does(direction: str) -> None:
    """The spread between seeds is ten times the difference: Welch's test would see nothing."""
    both = arms(OURS, THEIRS, direction=direction)
    found = compare(both)
    (pair,) = found.pairs
    read = [
        Arm(schedule=s.name, study=s.name, scores=v)
        for s, v in zip(both, (OURS, THEIRS), strict=True)
    ]
    (expected,) = differences(read, optuna.study.StudyDirection[direction.upper()])
    assert expected.gain is not None and expected.low is not None and expected.high is not None
    turned = sorted((abs(expected.low), abs(expected.high)))
    assert (pair.p, pair.difference) == pytest.approx((expected.p, abs(expected.gain)))
    assert [pair.low, pair.high] == pytest.approx(turned)
    assert pair.better == (both[0] if direction == "minimize" else both[1]).name
    assert pair.paired and pair.verdict == "significant"
    assert f"; significantly better than {pair.worse}." in found.headline
    assert not any("same seeds" in warning for warning in found.warnings)
    text = render(both, as_markdown=True)
    assert f"\\[{number(pair.low)}, {number(pair.high)}\\] | paired |" in text


def test_confirmations_on_the_same_seeds_are_paired_whoever_queued_them() -> None:
    both = confirmed_on(report_studies.confirmed(), OURS), confirmed_on(other("b"), THEIRS)
    assert compare(both).pairs[0].paired


def test_only_the_seeds_that_compare_queued_count() -> None:
    """A search confirms on seeds of its own, which differ between the studies."""
    both = arms(OURS, THEIRS)
    own = [confirmed_on(s, {seed: 9.0}) for s, seed in zip(both, (50, 51), strict=True)]
    mixed = [
        replace(s, runs=(*more.runs, *s.runs), best=replace(s.best, fresh=(9.0, *s.best.fresh)))
        for s, more in zip(both, own, strict=True)
        if s.best
    ]
    assert compare(mixed).pairs == compare(both).pairs
    assert compare(mixed).results == compare(both).results
    assert "over 4 fresh seeds" in compare(mixed).headline


def test_where_paired_runs_diverged_the_signs_decide() -> None:
    ours: dict[int, float | None] = {seed: 0.3 for seed in range(10)}
    theirs: dict[int, float | None] = {**dict.fromkeys(range(9), 0.4), 9: 0.2}
    found = compare(arms({**ours, 9: None}, theirs))
    (pair,) = found.pairs
    assert (pair.better, pair.worse) == ("digits", "cosine")
    assert pair.p == pytest.approx(stats.binomtest(9, 10).pvalue) and pair.low is None
    assert found.headline.startswith("cosine has the best mean")
    assert found.headline.endswith("; on most seeds digits is better.")


@pytest.mark.parametrize(
    ("first", "second"),
    [((0.1,), (0.2, 0.3)), ((), ()), ((0.1, 0.2), (0.3, float("inf"))), ((0.1, 0.1), (0.1, 0.1))],
)
def test_there_is_no_test_where_it_could_not_tell(first: Any, second: Any) -> None:
    assert welch(first, second) is None


def test_one_fresh_seed_is_too_few_to_tell() -> None:
    found = compare([report_studies.confirmed(), told(other(), 0.3)])
    assert found.pairs[0].p is None
    assert found.pairs[0].verdict.startswith("not known")
    assert "too few seeds to tell" in found.headline


def test_studies_of_other_directions_are_not_set_against_each_other() -> None:
    found = compare([report_studies.confirmed(), replace(report_studies.maximised(), name="m")])
    assert not comparable(found.studies)
    assert found.pairs == []
    assert "do not compare" in found.headline
    assert "digits minimizes, m maximizes" in found.warnings[0]
    assert "histories" not in render_comparison(found.studies)


def test_a_study_without_fresh_seeds_or_results_is_said_to_be() -> None:
    found = compare([other("single", seeds=0), report_studies.empty()])
    assert found.pairs == []
    assert found.headline == (
        f"Nothing is certain yet: single, {report_studies.HOSTILE} ran no recipe on fresh seeds."
    )
    said = " ".join(found.warnings)
    assert "single has one seed only" in said and "(hpsched study confirm single, or" in said
    assert f"{report_studies.HOSTILE} has not finished a full cycle yet." in said
    assert "none: one run's value" in found.results[0]


def test_studies_that_never_finished_a_cycle_say_so() -> None:
    two = [report_studies.empty(), replace(report_studies.empty(), name="b")]
    assert compare(two).headline == "No study has finished a full cycle yet."
    assert "no finished full cycle yet" in str(figures.histories_figure(two).layout.annotations)


def test_several_objectives_are_left_to_optuna() -> None:
    study = optuna.create_study(study_name="two", directions=["minimize"] * 2)
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=1)
    found = compare([summarise(study), report_studies.confirmed()])
    assert "do not compare" in found.headline
    assert any("study.best_trials" in warning for warning in found.warnings)


def test_an_unfinished_study_tells_how_far_it_is() -> None:
    found = compare([replace(report_studies.confirmed(), progress=0.4), worse()])
    assert "digits has spent 40 % of its budget so far." in found.warnings


def test_cycles_of_other_lengths_and_shared_seeds_are_warned_of() -> None:
    first = report_studies.confirmed()
    same = replace(first, name="same")
    assert first.best is not None and same.best is not None
    longer = replace(worse(), best=replace(same.best, total_steps=1_800))
    assert any("digits 900" in w and "1,800" in w for w in compare([first, longer]).warnings)
    partly = confirmed_on(first, {0: 0.1, 1: 0.2}), confirmed_on(same, {0: 0.1, 1: 0.2, 2: 0.3})
    shared = [w for w in compare(partly).warnings if "same seeds" in w]
    assert len(shared) == 1 and "2 of the same seeds" in shared[0]
    assert not compare(partly).pairs[0].paired
    assert not any("same seeds" in w for w in compare([first, worse()]).warnings)


def test_of_three_studies_each_pair_has_to_be_surer() -> None:
    first, second = told(report_studies.confirmed(), 0.1, 0.2, 0.3), told(other(), 0.3, 0.4, 0.5)
    third = replace(told(other(), 0.32, 0.45, 0.5), name="third")
    alone = [compare(two).pairs[0].p for two in itertools.combinations([first, second, third], 2)]
    found = compare([first, second, third])
    assert [pair.p for pair in found.pairs] == holm(alone)
    sure = found.pairs[1]  # of the first and the third
    assert alone[1] and sure.p and alone[1] < 0.05 < sure.p
    assert sure.verdict.startswith("not significant")
    assert "; not significantly better than" in found.headline


def test_tables_show_costs_and_recipes_side_by_side() -> None:
    first, second = report_studies.confirmed(), worse()
    found = compare([first, second])
    for row, summary in zip(found.results, (first, second), strict=True):
        cells = dict(zip(comparison.RESULTS, row, strict=True))
        assert cells["study"] == summary.name
        assert cells["cycles spent"] == number(summary.cost.cycles)
        assert cells["steps spent"] == f"{summary.cost.steps:,}"
    recipes = {name: values for name, *values in found.recipes}
    assert first.best is not None and second.best is not None
    rates = [number(b.recipe["max_lr"]) for b in (first.best, second.best)]
    assert recipes["max_lr"] == rates
    assert recipes["policy"] == ["cosine", "cosine"]


def test_histories_lie_over_each_other() -> None:
    both = [report_studies.confirmed(), worse()]
    figure = figures.histories_figure(both)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 2
    for line, summary in zip(lines, both, strict=True):
        steps = best_so_far(summary.runs, minimise=True)
        assert list(zip(line.x, line.y, strict=True))[:-1] == steps
        assert line.x[-1] == summary.cost.cycles
    squares = [trace for trace in figure.data if trace.name == "fresh seeds"]
    assert [s.y[0] for s in squares] == [s.best.mean for s in both if s.best]
    assert len({line.line.color for line in lines}) == 2


def test_fewer_than_two_studies_or_one_twice_are_refused() -> None:
    with pytest.raises(UsageError, match="needs two studies"):
        compare([worse()])
    with pytest.raises(UsageError, match="'digits' is named twice"):
        compare([report_studies.confirmed()] * 2)


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_both_kinds_of_page_say_the_same(suffix: str, tmp_path: Path) -> None:
    both = [report_studies.confirmed(), worse(), report_studies.empty()]
    text = write_report(both, tmp_path / f"compare{suffix}").read_text(encoding="utf-8")
    found = compare(both)
    assert "<script>alert(" not in text
    assert "significantly better than" in text
    assert number(found.pairs[0].difference) in text
    for row in found.results:
        assert row[1] in text and row[5] in text


def test_one_study_is_its_report() -> None:
    assert "hpsched report: digits" in render([report_studies.confirmed()])


def test_names_do_not_break_a_markdown_table() -> None:
    text = render([report_studies.confirmed(), worse()], as_markdown=True)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1
