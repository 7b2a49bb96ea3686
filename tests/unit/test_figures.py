"""What the figures show, by value: points, windows, axes, and words where there is nothing."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import report_studies

from hpsched import (
    evidence,
    figure_data,
    figure_files,
    figure_style,
    figures,
    lr_curve,
    proposal,
    range_test_data,
    records,
    refine,
    refining_figure,
    schedules,
)
from hpsched.errors import HpschedError, UsageError
from hpsched.figure_style import RED
from hpsched.present import number, rate_text
from hpsched.summary import Summary

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


def shapes(figure: go.Figure) -> dict[str, Any]:
    return {shape.name: shape for shape in figure.layout.shapes}


def shifted(by: float, **more: Any) -> lr_curve.RangeTest:
    """A sweep whose loss lies higher by as much."""
    return replace(sweep(), losses=tuple(loss + by for loss in sweep().losses), **more)


def strip(figure: go.Figure) -> dict[str, int]:
    """The rows of the rules: label → place."""
    axis = figure.layout[f"yaxis{trace(figure, 'rule').yaxis[1:]}"]
    return dict(zip(axis.ticktext, axis.tickvals, strict=True))


def test_range_test_shades_the_proposed_window_and_marks_its_centre_and_the_edge() -> None:
    tests = range_tests()
    found = proposal.pool(tests)
    drawn = shapes(figures.range_test_figure(tests, found))
    assert (drawn["window"].x0, drawn["window"].x1) == (found.low, found.high)
    assert drawn["centre"].x0 == drawn["centre"].x1 == found.centre
    assert drawn["diverges at"].x0 == found.lr_diverged


def test_range_test_labels_stand_at_the_exponent_that_a_log_axis_wants() -> None:
    found = proposal.pool(range_tests())
    labels = figures.range_test_figure(range_tests(), found).layout.annotations
    centre = next(a for a in labels if a.text.startswith("centre"))
    assert centre.x == pytest.approx(math.log10(found.centre))


def test_range_test_draws_each_step_and_the_smooth_curve_to_a_little_past_divergence() -> None:
    figure = figures.range_test_figure([sweep()], None)
    raw, smooth = trace(figure, "each step"), trace(figure, "smoothed")
    assert list(zip(raw.x, raw.y, strict=True)) == list(
        zip(sweep().lrs, sweep().losses, strict=True)
    )
    count = len(smooth.x)
    edge = sweep().lr_diverged
    assert edge is not None
    assert smooth.x[-1] <= range_test_data.PAST * edge < sweep().lrs[count]
    assert list(smooth.y) == pytest.approx(list(sweep().smoothed[:count]), rel=1e-5)


def test_two_sweeps_are_two_lines_and_three_a_median_in_a_band() -> None:
    tests = [shifted(0.0), shifted(0.1), shifted(0.5)]
    two = figures.range_test_figure(tests[:2], None)
    assert list(trace(two, "smoothed").x).count(None) == 1
    assert not any(t.name == "lowest to highest" for t in two.data)
    three = figures.range_test_figure(tests, None)
    median = trace(three, "median of 3 sweeps, smoothed")
    band = next(t for t in three.data if t.name == "lowest to highest" and t.fill)
    half = len(band.y) // 2
    assert list(median.y) == pytest.approx(list(tests[1].smoothed[:half]), rel=1e-4)
    assert list(band.y[:half]) == pytest.approx(list(tests[0].smoothed[:half]), rel=1e-4)
    assert list(band.y[half:][::-1]) == pytest.approx(list(tests[2].smoothed[:half]), rel=1e-4)


def test_curves_of_unlike_rates_are_compared_at_the_same_rates() -> None:
    coarse = range_test_data.Curve(np.array([1e-3, 1e-1, 1.0]), np.array([3.0, 1.0, 5.0]))
    fine = range_test_data.Curve(np.array([1e-2, 1e-1]), np.array([2.0, 2.0]))
    rates, levels = range_test_data.levels([coarse, fine])
    assert rates == pytest.approx([1e-2, 1e-1])  # ends half way between their ends
    assert levels[0] == pytest.approx([2.0, 1.0])  # straight in log rate
    assert levels[1] == pytest.approx([2.0, 2.0])


def test_sweeps_are_coloured_and_named_by_weight_decay() -> None:
    tests = [
        shifted(0.0, weight_decay=1e-4),
        shifted(0.2, weight_decay=1e-2),
        shifted(0.1, weight_decay=1e-4),
    ]
    figure = figures.range_test_figure(tests, None)
    named = {t.name: t.line.color for t in figure.data if t.showlegend and t.mode == "lines"}
    assert list(named) == ["weight decay 0.01", "weight decay 1e-4"]
    assert len(set(named.values())) == 2
    smooth = trace(figure, "weight decay 1e-4")
    assert list(smooth.x).count(None) == 1  # both sweeps in one trace, of one colour
    assert trace(figure, "weight decay 1e-4, each step").marker.color == smooth.line.color


def test_more_weight_decays_than_colours_keep_a_colour_each() -> None:
    tests = [shifted(i / 10, weight_decay=10.0**-i) for i in range(8)]
    figure = figures.range_test_figure(tests, None)
    colours = [t.line.color for t in figure.data if t.showlegend and t.mode == "lines"]
    assert len(colours) == len(set(colours)) == 8


def test_validation_is_dashed_and_other_metrics_get_panels_that_share_the_rates() -> None:
    points = [(step, 1.0 - step / 1000) for step in range(10, 81, 10)]
    test = shifted(
        0.0,
        validation={"acc<b>": [(s, v / 2) for s, v in points], "loss": [*points, (90, math.nan)]},
    )
    figure = figures.range_test_figure([test], None)
    loss, accuracy = (trace(figure, f"validation {name}") for name in ("loss", "acc&lt;b&gt;"))
    assert list(loss.x) == [test.lrs[step - 1] for step, _ in points]  # nothing for the NaN
    assert list(loss.y) == pytest.approx([value for _, value in points])
    assert loss.line.dash and accuracy.line.dash
    assert loss.line.color == trace(figure, "smoothed").line.color
    assert (loss.yaxis, accuracy.yaxis) == ("y", "y2")
    assert figure.layout.yaxis.title.text == "loss"
    assert figure.layout.yaxis2.title.text == "acc&lt;b&gt;"
    domains = [figure.layout[axis].domain for axis in ("yaxis3", "yaxis2", "yaxis")]
    ends = [end for domain in domains for end in domain]
    assert ends == sorted(ends)
    assert (ends[0], ends[-1]) == (0, 1)


def test_every_rule_has_a_row_with_the_median_and_a_tick_for_each_sweep() -> None:
    tests = range_tests()
    figure = figures.range_test_figure(tests, None)
    rows, shown, ticks = strip(figure), trace(figure, "rule"), trace(figure, "rule, each sweep")
    labels = {label: rule for rule, (label, _) in range_test_data.RULES.items()}
    assert set(labels) == set(rows) - {"<b>max_lr</b>"}
    for label, rule in labels.items():
        rates = [test.rules[rule] for test in tests]
        at = rows[label]
        assert sorted(x for x, y in zip(ticks.x, ticks.y, strict=True) if y == at) == sorted(rates)
        assert shown.x[at] == pytest.approx(10 ** statistics.median(map(math.log10, rates)))  # type: ignore[arg-type]
        assert label in shown.text[at]


def test_every_rule_of_a_range_test_is_drawn() -> None:
    assert set(sweep().rules) == {"suggestion", *range_test_data.RULES}


def test_the_interval_of_the_centre_is_a_bar_around_it() -> None:
    tests = range_tests()
    found = proposal.pool(tests)
    figure = figures.range_test_figure(tests, found)
    bar, window = trace(figure, "interval"), trace(figure, "window")
    assert tuple(bar.x) == found.interval
    assert tuple(window.x) == (found.low, found.high)
    assert bar.line.width > window.line.width
    assert set(bar.y) == set(window.y) == {strip(figure)["<b>max_lr</b>"]}


def test_values_keep_clear_of_the_marks_and_of_the_edges() -> None:
    figure = figures.range_test_figure(range_tests(), None)
    values, shown = trace(figure, "rate"), trace(figure, "rule, each sweep")
    low, high = (10**end for end in figure.layout.xaxis.range)
    for at, place, side in zip(values.x, values.y, values.textposition, strict=True):
        ticks = [x for x, y in zip(shown.x, shown.y, strict=True) if y == place]
        if side == "middle right":
            assert at >= max(ticks, default=at)
        else:
            assert at <= min(ticks, default=at)
        assert low < at < high


def test_an_explosion_does_not_squash_the_range_test() -> None:
    low, high = figures.range_test_figure([sweep()], None).layout.yaxis.range
    assert 0 < low < 0.35
    assert 2.3 < high < 4


def test_an_exploded_metric_does_not_squash_its_panel() -> None:
    points = [(step, 1e6 if sweep().lrs[step - 1] > 3 else 0.1) for step in range(10, 101, 10)]
    figure = figures.range_test_figure([shifted(0.0, validation={"error": points})], None)
    assert figure.layout.yaxis2.range[1] < 1


def test_a_linear_sweep_shows_no_empty_decades() -> None:
    lrs = tuple(1e-6 + i / 100 for i in range(100))
    losses = tuple(2.3 - lr for lr in lrs)
    figure = figures.range_test_figure([lr_curve.RangeTest(lrs=lrs, losses=losses)], None)
    assert figure.layout.xaxis.range[0] > -3


def test_range_test_pools_by_itself_without_a_proposal() -> None:
    test = sweep()
    found = proposal.pool([test])
    window = shapes(figures.range_test_figure([test], None))["window"]
    assert (window.x0, window.x1) == pytest.approx((found.low, found.high))


def test_a_flat_range_test_says_that_it_has_no_answer_and_why() -> None:
    flat = lr_curve.RangeTest(lrs=sweep().lrs, losses=tuple(2.3 for _ in range(100)))
    figure = figures.range_test_figure([flat], None)
    found = proposal.pool([flat])
    window = f"{rate_text(found.low)} to {rate_text(found.high)}"
    assert figure.layout.title.text == f"Not reliable: max_lr from {window}"
    assert [a.text for a in figure.layout.annotations] == [f"guess {rate_text(found.centre)}"]
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert "the loss never falls significantly" in said
    assert shapes(figure)["window"].fillcolor == figure_style.GREY
    assert not any(t.name == "rule" for t in figure.data)  # no rule found anything


def test_titles_fit_a_telephone() -> None:
    figure = figures.range_test_figure(range_tests(), None)
    assert len(figure.layout.title.text) <= 46
    lines = figure.layout.title.subtitle.text.split("<br>")
    assert max(map(len, lines)) <= figure_style.SUBTITLE_WIDTH


def test_a_page_with_words_of_its_own_takes_the_title_and_its_room_away() -> None:
    figure = figures.range_test_figure(range_tests(), None)
    height, top = figure.layout.height, figure.layout.margin.t
    panels = height - top - figure.layout.margin.b
    figure_style.untitled(figure)
    assert not figure.layout.title.text and not figure.layout.title.subtitle.text
    assert figure.layout.margin.t < top - figure_style.SUBTITLE_LINE
    assert figure.layout.height - figure.layout.margin.t - figure.layout.margin.b >= panels


@pytest.mark.parametrize("losses", [(), (math.nan,), (2.3, math.inf), (1e30,) * 3])
def test_a_range_test_that_broke_at_once_is_drawn(losses: tuple[float, ...]) -> None:
    test = lr_curve.RangeTest(lrs=(1e-6, 1e-5, 1e-4), losses=losses)
    assert figures.range_test_figure([test], None).to_json()
    assert figures.range_test_figure([test, sweep(), sweep(), sweep()], None).to_json()


def test_a_range_tests_own_figure_is_this_one() -> None:
    assert sweep().figure() == figures.range_test_figure([sweep()], None)


# -- complete cycles -------------------------------------------------------------------------------


def known(summary: Summary, context: int = 0) -> evidence.Evidence:
    found = list(summary.windows.values())[context].evidence
    assert found is not None
    return found


def made_of(*runs: refine.Run) -> evidence.Evidence:
    found = known(report_studies.confirmed())
    return replace(found, runs=runs, proposal=refine.refined(found.prior, runs))


@pytest.mark.parametrize(
    ("summary", "maximise"), [(report_studies.confirmed, False), (report_studies.maximised, True)]
)
def test_each_length_shows_what_train_returned_at_which_rate(summary: Any, maximise: bool) -> None:
    figure = figures.refining_figure(known(summary()), maximise)
    names = {0: "1/9 of the steps", 1: "1/3 of the steps", 2: "full length"}
    assert {t.name for t in figure.data} >= set(names.values())
    refining = [r for r in summary().runs if records.REFINES in r.trial.user_attrs]
    assert refining
    for rung, name in names.items():
        ran = [(r.trial.params["max_lr"], c.value) for r in refining for c in r.cycles[rung:][:1]]
        shown = trace(figure, name)
        assert list(zip(shown.x, shown.y, strict=True)) == sorted(ran)
        assert all(
            number(value, 4) in text
            for (_, value), text in zip(sorted(ran), shown.text, strict=True)
        )


def test_lengths_have_panels_of_their_own_the_shortest_first_and_the_belief_below() -> None:
    figure = figures.refining_figure(known(report_studies.confirmed()))
    shown = ["1/9 of the steps", "1/3 of the steps", "full length", "belief with these cycles"]
    axes = [figure.layout["yaxis" + (trace(figure, name).yaxis or "y")[1:]] for name in shown]
    ends = [end for axis in reversed(axes) for end in axis.domain]
    assert ends == sorted(ends) and len(set(ends)) == 8
    for name, axis in zip(shown[:3], axes, strict=False):
        values = trace(figure, name).y
        assert axis.title.text == name
        assert axis.range[0] < min(values) <= max(values) < axis.range[1]
        spread = max(values) - min(values)  # the refining trials give one full cycle only
        assert axis.range[1] - axis.range[0] < (1.5 * spread or 0.3 * abs(values[0]))


def test_symbols_and_colours_tell_lengths_apart_and_full_cycles_are_always_the_same() -> None:
    shares = (0.05, 0.1, 0.25, 1 / 3, 1.0)
    runs = [refine.Run(rate, share, 0.5) for share in shares for rate in (0.1, 0.2)]
    looks = [length.look for length in refining_figure.lengths(runs)]
    assert len(set(looks)) == len({colour for _, colour in looks}) == len(shares)
    assert looks[-1] == refining_figure.FULL
    assert refining_figure.FULL not in [x.look for x in refining_figure.lengths(runs[:-2])]


@pytest.mark.parametrize(
    ("share", "name"),
    [
        (1.0, "full length"),
        (1 / 9, "1/9 of the steps"),
        (67 / 600, "1/9 of the steps"),
        (0.4, "40 % of the steps"),
    ],
)
def test_lengths_are_named_as_people_say_them(share: float, name: str) -> None:
    assert refining_figure.length_name(share) == name


@pytest.mark.parametrize("maximise", [False, True])
def test_diverged_runs_are_crosses_on_the_edge_that_is_worst(maximise: bool) -> None:
    found = known(report_studies.mixed())
    lost = tuple(refine.Run(rate, 1 / 9, math.inf) for rate in (5.0, 8.0))
    figure = figures.refining_figure(dataclasses.replace(found, runs=found.runs + lost), maximise)
    crosses = trace(figure, "1/9 of the steps, diverged")
    assert list(crosses.x) == [5.0, 8.0]
    assert list(crosses.y) == [figure.layout.yaxis.range[0 if maximise else 1]] * 2
    assert (crosses.marker.symbol, crosses.marker.color) == ("x", RED)
    assert any(t.name == "diverged" for t in figure.data)  # in the legend
    calm = figures.refining_figure(known(report_studies.confirmed()))
    assert not any(t.name == "diverged" for t in calm.data)


def test_a_length_that_only_diverged_has_no_scale() -> None:
    runs = [refine.Run(rate, 1 / 9, math.inf) for rate in (3.0, 6.0)]
    figure = figures.refining_figure(made_of(*runs))
    assert list(trace(figure, "1/9 of the steps, diverged").x) == [3.0, 6.0]
    assert figure.layout.yaxis.showticklabels is False
    assert not any(t.name and t.name.startswith("value") for t in figure.data)


def test_the_belief_is_drawn_before_and_after_the_cycles() -> None:
    found = known(report_studies.confirmed())
    figure = figures.refining_figure(found)
    after, before = (
        trace(figure, f"belief {n}") for n in ("with these cycles", "from the range tests")
    )
    belief = refine.best_rate(found.prior, found.runs)
    peak = after.x[int(np.argmax(after.y))]
    assert peak == pytest.approx(2 ** belief.mu[belief.p.argmax()])
    assert before.x[int(np.argmax(before.y))] == pytest.approx(found.prior.centre)
    assert max(after.y) == 1 > max(before.y) > 0  # on one scale: what is surer is higher
    assert after.fill == "tozeroy" and before.fill is None
    seen = dict(zip(np.round(np.log2(after.x), 6), after.y, strict=True))
    for mu, p in zip(np.round(belief.mu, 6), belief.p / belief.p.max(), strict=True):
        assert seen.get(mu, 0.0) == pytest.approx(p, abs=0.01)


def test_the_refined_window_and_interval_and_the_range_tests_centre_are_drawn() -> None:
    found = known(report_studies.confirmed())
    figure = figures.refining_figure(found)
    drawn = shapes(figure)
    refined = found.proposal
    assert refined.centre != found.prior.centre
    assert (drawn["window"].x0, drawn["window"].x1) == (refined.low, refined.high)
    assert drawn["centre"].x0 == refined.centre
    assert drawn["range tests"].x0 == found.prior.centre
    assert (drawn["range tests"].line.color, drawn["range tests"].line.dash) == (
        figure_style.GREY,
        "dash",
    )
    assert tuple(trace(figure, "interval").x) == refined.interval
    assert tuple(trace(figure, "window").x) == (refined.low, refined.high)
    texts = [a.text for a in figure.layout.annotations]
    assert texts == [
        f"centre {rate_text(refined.centre)}",
        f"range tests {rate_text(found.prior.centre)}",
    ]
    assert len({a.yshift for a in figure.layout.annotations}) == 2


def test_every_run_and_window_is_within_the_axis_of_rates() -> None:
    mixed = report_studies.mixed()
    for found in (known(report_studies.confirmed()), known(mixed), known(mixed, 1)):
        low, high = (10**end for end in figures.refining_figure(found).layout.xaxis.range)
        must = [run.max_lr for run in found.runs]
        must += [edge for p in (found.prior, found.proposal) for edge in (p.low, p.high)]
        assert low < min(must) <= max(must) < high


@pytest.mark.parametrize("runs", [[], [refine.Run(0.1, 1 / 9, 0.5), refine.Run(0.1, 1.0, 0.2)]])
def test_without_cycles_to_compare_there_are_words(runs: list[refine.Run]) -> None:
    figure = figures.refining_figure(made_of(*runs))
    assert not figure.data
    assert figure.layout.annotations[0].text == "no two complete cycles of one length yet"


def test_the_title_of_complete_cycles_fits_a_telephone() -> None:
    figure = figures.refining_figure(known(report_studies.mixed(), 1))
    assert len(figure.layout.title.text) <= 46
    lines = figure.layout.title.subtitle.text.split("<br>")
    assert max(map(len, lines)) <= figure_style.SUBTITLE_WIDTH


# -- files -----------------------------------------------------------------------------------------


def test_a_page_asks_no_host_for_anything_and_fits_a_telephone(tmp_path: Path) -> None:
    figure = figures.range_test_figure([sweep()], None, title="a < b & c")
    figure_files.write_figure(figure, tmp_path / "lr.html")
    page = (tmp_path / "lr.html").read_text()
    assert "<title>a &lt; b &amp; c</title>" in page
    assert '<h1 id="title">a &lt; b &amp; c</h1>' in page
    said = re.search("<p>(.*)</p>", page)
    assert said and said[1] == figure_style.titles(figure)[1]  # nothing to be escaped there
    assert figure.layout.title.text == "a &lt; b &amp; c"  # the caller's is as it was
    assert 'name="viewport"' in page
    assert "default-src 'none'" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", page)


@pytest.mark.parametrize("name", ["lr.bmp", "lr", "lr.html.gz", "png"])
def test_other_suffixes_are_refused_with_those_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.html, \.png, \.svg or \.pdf"):
        figure_files.check_path(tmp_path / name)


def test_images_without_kaleido_say_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure_files.importlib.util, "find_spec", lambda name: None)
    figure_files.check_path(tmp_path / "lr.html")
    with pytest.raises(UsageError, match=r"pip install 'hpsched\[images\]'.*\.html"):
        figure_files.check_path(tmp_path / "lr.png")


def test_images_without_a_browser_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chromium = pytest.importorskip("choreographer.browsers.chromium")
    monkeypatch.setattr(chromium.Chromium, "find_browser", lambda **_: None)
    with pytest.raises(UsageError, match=r"finds none: install one.*plotly_get_chrome"):
        figure_files.check_path(tmp_path / "lr.svg")


def test_kaleidos_own_failure_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the browser closed", "and much more")

    monkeypatch.setattr(pytest.importorskip("kaleido"), "calc_fig_sync", broken)
    with pytest.raises(HpschedError, match=r"lr\.png \(RuntimeError: the browser closed\)"):
        figure_files.write_figure(sweep().figure(), tmp_path / "lr.png")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("suffix", "opening"), [(".png", b"\x89PNG"), (".svg", b"<svg"), (".pdf", b"%PDF")]
)
def test_images_are_written(suffix: str, opening: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"lr{suffix}"
    figure_files.check_path(path)
    figure_files.write_figure(sweep().figure(), path)
    assert path.read_bytes().startswith(opening)


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
    rates = [t for t in everything.data if t.name in schedules.GALLERY]
    assert [t.name for t in rates] == list(schedules.GALLERY)
    for name, (_, make) in schedules.GALLERY.items():
        made = make(100, 1.0)
        rate = trace(everything, name)
        if isinstance(made, schedules.OneCycleSchedules):
            momentum = trace(everything, f"{name}, momentum")
            assert list(momentum.y) == [made.momentum(step) for step in momentum.x]
            assert list(rate.y) == [made.lr(step) for step in rate.x]
        else:
            assert list(rate.y) == [made(step) for step in rate.x]
            assert all(t.name != f"{name}, momentum" for t in everything.data)
    two = figures.schedule_gallery(["cosine", "constant", "cosine"], total_steps=50, max_lr=2.0)
    assert [t.name for t in two.data] == ["cosine", "constant"]
    assert set(trace(two, "constant").y) == {2.0}


def test_a_few_schedules_lie_over_each_other_with_their_momenta() -> None:
    figure = figures.schedule_gallery(["one_cycle", "one_cycle_linear", "cosine"])
    names = ["one_cycle", "one_cycle, momentum", "one_cycle_linear", "one_cycle_linear, momentum"]
    assert [t.name for t in figure.data] == [*names, "cosine"]
    assert {t.yaxis for t in figure.data if "momentum" in t.name} == {"y2"}
    assert figure.layout.yaxis2.title.text == "momentum"


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
    lost = [r.trial for r in summary.runs if records.DIVERGED in r.trial.user_attrs]
    first = sum(records.cycles(trial)[-1].rung == 0 for trial in lost)
    assert trace(figure, "diverged").x[0] == first > 0
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
    axes = figure_data.axes(summary)
    lines = [t for t in figure.data if t.name == "full cycle"]
    drawn = [value for t in lines for value in [*t.y, None]]
    assert drawn.count(None) == summary.states["complete"]
    assert all(0 <= height <= 1 for height in drawn if height is not None)
    ours = figure.data[len(lines)]
    assert (ours.name, ours.line.color) == ("best recipe", RED)
    assert list(ours.y) == [axis.height(best.recipe[axis.name]) for axis in axes]
    assert figure.layout.xaxis.ticktext[0] == "max_lr"


def test_parallel_draws_the_better_the_stronger() -> None:
    summary = report_studies.confirmed()
    figure, axes = figures.parallel_figure(summary), figure_data.axes(summary)
    place = {colour: at for at, colour in enumerate(figure_style.RAMP)}
    shades = {}
    for line in (t for t in figure.data if t.name == "full cycle"):
        for at in range(0, len(line.y), len(axes) + 1):
            shades[tuple(line.y[at : at + len(axes)])] = place[line.line.color]
    full = sorted(figure_data.results(summary).full, key=lambda point: point.value)
    strength = [shades[tuple(a.height(p.params[a.name]) for a in axes)] for p in full]
    assert strength == sorted(strength, reverse=True)
    assert strength[0] > strength[-1]


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


# -- any number of trials --------------------------------------------------------------------------


def point(at: int, value: float, **params: float) -> figure_data.Point:
    return figure_data.Point(number=at, spent=float(at), value=value, params=params, text="")


@pytest.mark.parametrize("maximise", [False, True])
def test_of_many_results_the_best_the_latest_and_the_extremes_are_drawn(maximise: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(5_000)
    points = [point(i, float(v), x=float(-v), y=float(i % 77)) for i, v in enumerate(values)]
    kept = figure_data._sample(points, maximise)
    most = figure_data.MOST
    assert len(kept) == most
    assert [p.number for p in kept] == sorted(p.number for p in kept)
    best = sorted(range(5_000), reverse=maximise)[: most // 4]
    assert {p.value for p in kept} >= {float(v) for v in best}
    assert {p.number for p in kept} >= set(range(5_000 - most // 4, 5_000))
    assert {0.0, -4999.0} <= {p.params["x"] for p in kept}
    between = [p.number for p in kept if p.value not in best and p.number < 4_900]
    assert max(np.diff(between)) < 5 * 5_000 / most  # and the rest evenly
    assert figure_data._sample(points[:most], maximise) == points[:most]


def test_a_sample_says_of_how_many_it_is() -> None:
    assert figure_data.sample_text(report_studies.confirmed()) == ""
    summary = report_studies.large(2_000)
    found = figure_data.results(summary)
    assert min(len(found.full), len(found.short)) > figure_data.MOST
    said = figure_data.sample_text(summary)
    assert f"{figure_data.MOST} of {len(found.full):,} full cycles" in said
    assert f"{figure_data.MOST} of {len(found.short):,} pruned trials" in said
    figure = figures.history_figure(summary)
    assert len(trace(figure, "full cycle").x) == figure_data.MOST
    assert "full cycles" in figure.layout.title.subtitle.text
    line = trace(figure, "best so far, one seed")  # of all, not of the sample
    assert line.y[-1] == min(p.value for p in found.full)


@pytest.mark.parametrize("draw", STUDY_FIGURES)
def test_figures_stay_small_however_many_trials_there_are(draw: Any) -> None:
    assert len(draw(report_studies.large(2_000)).to_json()) < 1_000_000


def test_many_sweeps_are_drawn_with_some_of_their_steps() -> None:
    figure = figures.range_test_figure([shifted(i / 100) for i in range(64)], None)
    assert 750 < len(trace(figure, "each step").x) <= 1_500


def test_a_long_choice_leaves_room_for_the_plot() -> None:
    figure = figures.slice_figure(report_studies.mixed())
    assert max(map(len, figure.layout.xaxis7.ticktext)) < 60  # escaped, 20 letters before


# -- dark pages ------------------------------------------------------------------------------------


def colours_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*map(colours_in, value.values()), set())
    if isinstance(value, list | tuple):
        return set().union(*map(colours_in, value), set())
    return {value} if isinstance(value, str) and re.fullmatch("#[0-9A-Fa-f]{3,8}", value) else set()


@pytest.mark.parametrize(
    "draw",
    [
        *STUDY_FIGURES,
        lambda _: figures.range_test_figure(range_tests(), None),
        lambda s: figures.refining_figure(known(s)),
        lambda _: figures.schedule_gallery(),
    ],
)
def test_every_colour_of_a_figure_has_a_dark_one(draw: Any) -> None:
    used = colours_in(draw(report_studies.confirmed()).to_plotly_json())
    assert used and used <= set(figure_style.DARK)


def luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", ["INK", "GREY", "BLUE", "RED", "GREEN", "ORANGE", "SKY", "PINK"])
def test_dark_colours_stand_out_from_a_dark_page(name: str) -> None:
    dark = figure_style.DARK[getattr(figure_style, name)]
    paper = luminance(figure_style.DARK[figure_style.PAPER])
    assert (luminance(dark) + 0.05) / (paper + 0.05) > 4.5  # WCAG 2.2, section 1.4.3


# -- methods against each other --------------------------------------------------------------------

FAST = figure_data.Arm(
    "one-cycle", [10, 20, 30], [[0.9, 0.5, 0.3], [0.8, 0.4, 0.2], [0.8, 0.7, 0.4]]
)
SLOW = figure_data.Arm(
    "step<b>", [10, 20, 30, 60], [[0.9, 0.8, 0.7, 0.5], [0.9, 0.8, 0.7, math.nan]]
)


def test_an_arm_reaches_a_target_where_half_of_its_seeds_have() -> None:
    assert figure_data.reached(FAST, 0.5) == 20
    assert figure_data.reached(FAST, 0.35) == 30
    assert figure_data.reached(FAST, 0.1) == math.inf
    assert figure_data.reached(SLOW, 0.5) == math.inf  # one of two seeds never does
    assert figure_data.reached(SLOW, 0.6, maximise=True) == 10


def test_an_arms_median_is_missing_where_half_of_its_seeds_are() -> None:
    assert figure_data.median_curve(FAST) == pytest.approx([0.8, 0.5, 0.3])
    assert figure_data.median_curve(SLOW)[:3] == pytest.approx([0.9, 0.8, 0.7])
    assert math.isnan(figure_data.median_curve(SLOW)[3])


@pytest.mark.parametrize(
    ("steps", "values", "words"),
    [
        ([], [[]], "must rise"),
        ([2, 1], [[1, 2]], "must rise"),
        ([1, 2], [[1.0]], r"2 steps.*\[1\] values"),
        ([1, 2], [], "give each seed a value"),
    ],
)
def test_an_arm_that_cannot_be_drawn_is_refused(steps: Any, values: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        figure_data.Arm("cosine", steps, values)


def test_super_convergence_marks_where_each_arm_reaches_the_target() -> None:
    figure = figures.super_convergence_figure([FAST, SLOW], target=0.7)
    marks = [t for t in figure.data if t.name == "reached"]
    assert [(t.x[0], t.y[0]) for t in marks] == [(20, 0.7), (30, 0.7)]
    assert figure.layout.title.text == "one-cycle reaches 0.7 in 20 steps"
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert "others, step&lt;b&gt;: 30 (1.5 × as many). 2 to 3 seeds and their median." in said
    medians = [t for t in figure.data if t.showlegend is not False]
    assert [t.name for t in medians] == ["one-cycle", "step&lt;b&gt;"]
    assert list(medians[0].y) == pytest.approx([0.8, 0.5, 0.3])
    assert medians[1].y[-1] is None
    seeds = next(t for t in figure.data if t.name == "one-cycle" and t.showlegend is False)
    assert list(seeds.y) == [0.9, 0.5, 0.3, None, 0.8, 0.4, 0.2, None, 0.8, 0.7, 0.4]
    assert "<b>" not in str([t.name for t in figure.data])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (0.3, "reaches 0.3 in 30 steps The others never do."),
        (0.01, "one-cycle does not reach 0.01"),
        (None, "Validation error over optimizer steps"),
    ],
)
def test_super_convergence_says_who_does_not_arrive(target: float | None, words: str) -> None:
    figure = figures.super_convergence_figure([FAST, SLOW], target=target)
    assert words in f"{figure.layout.title.text} {figure.layout.title.subtitle.text}"


def test_super_convergence_without_arms_has_words() -> None:
    assert not figures.super_convergence_figure([]).data


def test_no_button_sends_a_chart_to_plotlys_cloud() -> None:
    figure = figures.schedule_gallery(["cosine"])
    assert "sendChartToCloud" in figure.layout.template.layout.modebar.remove
