"""What the figures show, by value: points, windows, axes, and words where there is nothing."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import pytest
import report_studies

from hpsched import evidence, figure_data, figure_style, figures, lr_curve, schedules
from hpsched.errors import UsageError
from hpsched.figure_style import RED
from hpsched.present import number

STUDY_FIGURES = [
    figures.history_figure,
    figures.rungs_figure,
    figures.slice_figure,
    figures.parallel_figure,
    figures.curves_figure,
]


def trace(figure: go.Figure, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def range_tests() -> list[lr_curve.RangeTest]:
    return [evidence.range_test(r.sweep) for r in report_studies.confirmed().runs if r.sweep]


def sweep(*, explodes_to: float = 1e30) -> lr_curve.RangeTest:
    lrs = [10 ** (-6 + 7 * i / 99) for i in range(100)]
    losses = [2.3 - 2 / (1 + (0.1 / lr) ** 2) for lr in lrs]
    return lr_curve.RangeTest(
        lrs=tuple(lrs),
        losses=tuple(explodes_to if lr > 3 else v for lr, v in zip(lrs, losses, strict=True)),
    )


# -- range test ------------------------------------------------------------------------------------


def test_range_test_shades_the_proposed_window_and_marks_its_centre_and_the_edge() -> None:
    tests = range_tests()
    proposal = lr_curve.pool(tests)
    shapes = {s.name: s for s in figures.range_test_figure(tests, proposal).layout.shapes}
    assert (shapes["window"].x0, shapes["window"].x1) == (proposal.low, proposal.high)
    assert shapes["centre"].x0 == shapes["centre"].x1 == proposal.centre
    assert shapes["diverges at"].x0 == proposal.lr_diverged


def test_range_test_labels_stand_at_the_exponent_that_a_log_axis_wants() -> None:
    proposal = lr_curve.pool(range_tests())
    labels = figures.range_test_figure(range_tests(), proposal).layout.annotations
    centre = next(a for a in labels if a.text.startswith("centre"))
    assert centre.x == pytest.approx(math.log10(proposal.centre))


def test_range_test_draws_every_replicate_raw_and_smoothed() -> None:
    tests = range_tests()
    figure = figures.range_test_figure(tests, None)
    for index, test in enumerate(tests, 1):
        raw = trace(figure, f"replicate {index}, each step")
        smooth = trace(figure, f"replicate {index}, smoothed")
        assert list(raw.y) == list(test.losses[: len(test.smoothed)])
        assert list(smooth.x) == list(test.lrs[: len(test.smoothed)])
        assert list(smooth.y) == pytest.approx(list(test.smoothed))
    minima = [t.x[0] for t in figure.data if t.name == "minimum"]
    assert minima == [test.lr_minimum for test in tests]


def test_an_explosion_does_not_squash_the_range_test() -> None:
    low, high = figures.range_test_figure([sweep()], None).layout.yaxis.range
    assert 0 < low < 0.35
    assert 2.3 < high < 4


def test_range_test_pools_by_itself_without_a_proposal() -> None:
    test = sweep()
    window = next(
        s for s in figures.range_test_figure([test], None).layout.shapes if s.name == "window"
    )
    assert (window.x0, window.x1) == pytest.approx(test.window)


def test_a_flat_range_test_says_that_it_has_no_answer() -> None:
    flat = lr_curve.RangeTest(lrs=sweep().lrs, losses=tuple(2.3 for _ in range(100)))
    assert "without a clear answer" in figures.range_test_figure([flat], None).layout.title.text


@pytest.mark.parametrize("losses", [(), (math.nan,), (2.3, math.inf), (1e30,) * 3])
def test_a_range_test_that_broke_at_once_is_drawn(losses: tuple[float, ...]) -> None:
    test = lr_curve.RangeTest(lrs=(1e-6, 1e-5, 1e-4), losses=losses)
    assert figures.range_test_figure([test], None).to_json()


def test_a_range_tests_own_figure_is_this_one() -> None:
    assert sweep().figure() == figures.range_test_figure([sweep()], None)


# -- schedules -------------------------------------------------------------------------------------


def test_schedule_draws_rate_and_momentum_of_the_recipe() -> None:
    best = report_studies.confirmed().best
    assert best is not None
    figure = figures.schedule_figure(best.recipe, 900, best.policy)
    made = schedules.one_cycle(
        900, **{k: v for k, v in best.recipe.items() if k != "weight_decay"}, policy=best.policy
    )
    rate, momentum = trace(figure, "learning rate"), trace(figure, "momentum")
    assert list(rate.y) == [made.lr(step) for step in rate.x]
    assert list(momentum.y) == [made.momentum(step) for step in momentum.x]
    assert max(rate.y) == best.recipe["max_lr"]
    assert (rate.x[0], rate.x[-1]) == (0, 899)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 100_001])
def test_schedule_of_any_length_keeps_its_peak(total_steps: int) -> None:
    recipe = {"max_lr": 0.3, "pct_start": 0.31}
    rate = trace(figures.schedule_figure(recipe, total_steps), "learning rate")
    assert max(rate.y) == 0.3
    assert len(rate.x) <= 601


def test_gallery_shows_all_schedules_or_those_named() -> None:
    everything = figures.schedule_gallery(total_steps=100)
    assert [t.name for t in everything.data] == list(schedules.GALLERY)
    two = figures.schedule_gallery(["cosine", "constant", "cosine"], total_steps=50, max_lr=2.0)
    assert [t.name for t in two.data] == ["cosine", "constant"]
    assert set(trace(two, "constant").y) == {2.0}


def test_gallery_shows_the_momentum_of_a_single_one_cycle_schedule() -> None:
    names = [t.name for t in figures.schedule_gallery(["one_cycle"]).data]
    assert names == ["learning rate", "momentum"]


def test_gallery_names_the_schedules_there_are() -> None:
    with pytest.raises(UsageError, match=r"cosin: there are one_cycle, .*cosine"):
        figures.schedule_gallery(["cosin"])


# -- studies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", STUDY_FIGURES)
def test_an_empty_study_gives_words_instead_of_axes(draw: Any) -> None:
    figure = draw(report_studies.empty())
    assert not figure.data
    assert figure.layout.annotations[0].text.startswith("no ")
    assert figure.layout.annotations[0].text.endswith(" yet")


@pytest.mark.parametrize("draw", STUDY_FIGURES)
def test_text_from_a_study_is_escaped(draw: Any) -> None:
    drawn = str(draw(report_studies.mixed()).to_dict())
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert "norm<b>" not in drawn


def test_hostile_choices_are_shown_as_the_text_they_are() -> None:
    drawn = str(figures.slice_figure(report_studies.mixed()).to_dict())
    assert "&lt;script&gt;" in drawn
    assert "norm&lt;b&gt;" in drawn


def test_history_shows_each_full_cycle_at_what_had_been_spent_by_then() -> None:
    summary = report_studies.confirmed()
    figure = figures.history_figure(summary)
    found = [r for r in summary.runs if r.full and r.confirms is None]
    shown = trace(figure, "full cycle")
    assert list(shown.y) == [r.full.value for r in found if r.full]
    first = found[0].trial.number
    spent = sum(c.cycles for r in summary.runs[: first + 1] for c in r.parts().values())
    assert shown.x[0] == pytest.approx(spent)
    assert list(shown.x) == sorted(shown.x)
    assert shown.x[-1] <= summary.cost.cycles


def test_history_draws_the_best_so_far_and_the_confirmed_means() -> None:
    summary = report_studies.confirmed()
    figure, best = figures.history_figure(summary), summary.best
    assert best is not None and best.runner_up is not None
    line = trace(figure, "best so far, one seed")
    assert list(line.y) == sorted(line.y, reverse=True)
    assert line.x[-1] == pytest.approx(summary.cost.cycles)
    confirmed = trace(figure, "confirmed, mean ± sd")
    assert list(confirmed.y) == [best.mean, best.runner_up.mean]
    assert list(confirmed.error_y.array) == [best.spread, best.runner_up.spread]
    assert len(trace(figure, "fresh seed").y) == 4


def test_history_of_a_study_to_maximise_climbs() -> None:
    figure = figures.history_figure(report_studies.maximised())
    line = trace(figure, "best so far, one seed")
    assert list(line.y) == sorted(line.y)
    assert "higher is better" in figure.layout.yaxis.title.text


def test_hovering_a_pruned_trial_tells_what_it_really_had() -> None:
    summary = report_studies.confirmed()
    shown = trace(figures.history_figure(summary), "pruned (expected value)")
    pruned = [r for r in summary.runs if r.trial.state.name == "PRUNED"]
    assert len(shown.text) == len(pruned)
    last = pruned[0].cycles[-1]
    assert f"{number(last.value, 4)} after a cycle of {last.steps:,} steps" in shown.text[0]


def test_far_pruned_trials_do_not_squash_the_full_cycles() -> None:
    def point(value: float) -> figure_data.Point:
        return figure_data.Point(number=0, spent=0.0, value=value, params={}, text="")

    found = figure_data.Results(
        full=[point(v) for v in (0.10, 0.11, 0.13)],
        short=[point(v) for v in (0.12, 0.14, 0.15, 0.16, 90.0)],
        again=[],
    )
    low, high = figure_data.value_range(found, report_studies.confirmed()) or (0, 0)
    assert low < 0.10
    assert 0.16 < high < 1


def test_rungs_count_what_became_of_every_trial() -> None:
    summary = report_studies.mixed()
    figure = figures.rungs_figure(summary)
    for index, rung in enumerate(summary.rungs):
        assert sum(bar.x[index] for bar in figure.data) == rung.reached
    assert trace(figure, "diverged").x[0] == 2
    assert trace(figure, "finished").x[-1] == summary.states["complete"]
    assert "100 steps" in figure.data[0].y[0]


def test_slice_marks_the_best_recipe_on_each_parameter() -> None:
    summary = report_studies.confirmed()
    figure, best = figures.slice_figure(summary), summary.best
    assert best is not None
    stars = [t for t in figure.data if t.name == "best recipe"]
    assert [t.x[0] for t in stars] == [best.recipe[a.name] for a in figure_data.axes(summary)]
    assert {t.y[0] for t in stars} == {best.mean}
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.title.text == "max_lr (log scale)"
    assert figure.layout.xaxis3.type == "linear"


def test_slice_takes_the_users_own_parameters_in() -> None:
    figure = figures.slice_figure(report_studies.mixed())
    titles = [figure.layout[f"xaxis{i}"].title.text for i in (7, 8)]
    assert titles == ["norm&lt;b&gt;", "layers"]
    assert figure.layout.xaxis7.type == "category"


def test_parallel_draws_each_full_cycle_and_the_best_on_top() -> None:
    summary = report_studies.confirmed()
    figure, best = figures.parallel_figure(summary), summary.best
    assert best is not None
    lines = [t for t in figure.data if t.name.startswith("trial")]
    assert len(lines) == summary.states["complete"]
    assert lines[-1].name == f"trial {best.number}"
    assert lines[-1].line.color == RED
    assert all(0 <= height <= 1 for t in lines for height in t.y)
    assert figure.layout.xaxis.ticktext[0] == "max_lr"


def test_parallel_places_log_parameters_by_their_logarithm() -> None:
    axis = figure_data.Axis(name="max_lr", log=True, values=(0.01, 0.1, 1.0), categorical=False)
    assert axis.height(0.1) == pytest.approx(0.5)
    assert axis.ticks()[0] == (0.0, "0.01")
    assert axis.ticks()[-1] == (1.0, "1")


def test_curves_show_the_best_full_cycles_loss_first() -> None:
    summary = report_studies.confirmed()
    figure = figures.curves_figure(summary, top=2)
    assert summary.best is not None and summary.best.runner_up is not None
    names = [f"trial {summary.best.number}", f"trial {summary.best.runner_up.number}"]
    assert [t.name for t in figure.data] == names * 2
    full = summary.runs[summary.best.number].full
    assert full is not None
    assert list(figure.data[0].y) == [value for _, value in full.curves["loss"]]
    assert figure.layout.yaxis.title.text == "training loss"
    assert figure.layout.yaxis2.title.text == "val&lt;error&gt;"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-6, 10.0, [1e-6, 1e-4, 1e-2, 1.0]),
        (0.02, 1.0, [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]),
        (0.21, 0.22, [0.21, 0.22]),
        (0.3, 0.3, [0.3, 0.3]),
    ],
)
def test_log_axes_have_a_few_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert figure_style.round_numbers(low, high) == expected


def test_no_button_sends_a_chart_to_plotlys_cloud() -> None:
    figure = figures.schedule_gallery(["cosine"])
    assert "sendChartToCloud" in figure.layout.template.layout.modebar.remove
