"""What notebooks show: run by a real kernel, and the HTML itself."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import nbformat
import optuna
import pytest
import report_studies
from nbclient import NotebookClient

import hpsched
from hpsched import evidence, notebook
from hpsched.errors import UsageError
from hpsched.lr_curve import RangeTest
from hpsched.present import mean_and_spread, number, rate_text
from hpsched.suggest import OneCycle
from hpsched.weight_decay import RangeTests

SWEEP = [10 ** (-6 + 7 * i / 99) for i in range(100)]
CELLS = (
    "import optuna, hpsched; from hpsched.lr_curve import RangeTest\n"
    "optuna.logging.set_verbosity(optuna.logging.ERROR)\n"
    "lrs = [10 ** (-6 + 7 * i / 99) for i in range(100)]\n"
    "test = RangeTest(lrs=lrs, losses=[2.3 - 2 / (1 + (0.1 / lr) ** 2) for lr in lrs])\n"
    "test",
    "hpsched.RangeTests(tests=[test])",
    "hpsched.suggest_onecycle(optuna.trial.FixedTrial(dict(max_lr=0.2, div_factor=10.0, "
    "pct_start=0.3, base_momentum=0.8, max_momentum=0.95, weight_decay=1e-4)), total_steps=300)",
    "study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))\n"
    "suggest = lambda trial: hpsched.suggest_onecycle(trial, total_steps=300)\n"
    "objective = lambda trial: suggest(trial).to_dict()['max_lr']\n"
    "study.optimize(objective, n_trials=3)\n"
    "hpsched.best(study)",
    "hpsched.summarise(study)",
    "hpsched.summarise(study).figure('slice')",
)


class Shown(HTMLParser):
    """Tags, attributes and text of a piece of HTML; refuses what is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        ElementTree.fromstring(source)  # well formed, so it can end nothing of the notebook's
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def sweep(**more: Any) -> RangeTest:
    losses = tuple(2.3 - 2 / (1 + (0.1 / lr) ** 2) for lr in SWEEP)
    return RangeTest(lrs=tuple(SWEEP), losses=losses, **more)


def sweeps_of(summary: hpsched.Summary) -> tuple[RangeTest, ...]:
    return tuple(evidence.range_test(run.sweep) for run in summary.runs if run.sweep)


def fixed() -> OneCycle:
    best = report_studies.confirmed().best
    assert best is not None
    return hpsched.suggest_onecycle(optuna.trial.FixedTrial(best.params), total_steps=900)


def everything() -> list[Any]:
    summary = report_studies.confirmed()
    studies = [summary, report_studies.mixed(), report_studies.empty(), report_studies.maximised()]
    return [
        *sweeps_of(summary),
        RangeTests(tests=sweeps_of(summary)),
        fixed(),
        summary.best,
        *studies,
    ]


@pytest.mark.slow
def test_a_kernel_shows_tables_and_figures() -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    *tables, figure = [cell.outputs[-1].data for cell in book.cells]
    words = ("range test", "range tests", "One-cycle recipe", "Best recipe", "full cycles")
    for shown, word in zip(tables, words, strict=True):
        assert word in Shown(shown["text/html"]).text
        assert "text/plain" in shown
    assert "application/vnd.plotly.v1+json" in figure or "text/html" in figure


@pytest.mark.parametrize("index", range(9))
def test_what_is_shown_is_small_whole_and_asks_for_nothing(index: int) -> None:
    shown = Shown(everything()[index]._repr_html_())
    assert {tag for tag, _ in shown.tags} <= {
        "div", "table", "tr", "th", "td", "figure", "svg", "rect", "polyline", "line", "text",
        "figcaption",
    }  # fmt: skip
    assert not {"href", "src", "onload", "onclick"} & {key for _, a in shown.tags for key in a}
    assert len(everything()[index]._repr_html_()) < 20_000
    for tag, attrs in shown.tags:
        style = attrs.get("style") or ""
        assert tag not in ("td", "th", "table") or "background:transparent" in style
        assert tag not in ("td", "th", "table") or "color:inherit" in style
        assert tag != "svg" or attrs.get("aria-label")


def test_each_of_them_is_looked_at() -> None:
    assert len(everything()) == 9


def test_a_range_test_tells_its_answer_and_why() -> None:
    test = sweeps_of(report_studies.confirmed())[0]
    text = Shown(test._repr_html_()).text
    assert f"max_lr {rate_text(test.suggestion)}" in text
    assert test.window is not None
    assert f"window {rate_text(test.window[0])} to {rate_text(test.window[1])}" in text
    assert test.reason in text and "reliable yes" in text


def test_a_range_test_without_an_answer_is_shown_too() -> None:
    flat = RangeTest(lrs=tuple(SWEEP), losses=(2.3,) * 100)
    text = Shown(flat._repr_html_()).text
    assert "max_lr –" in text and "reliable no" in text
    broken = RangeTest(lrs=(1e-3, 1e-2), losses=())
    assert "0 of 2" in Shown(broken._repr_html_()).text


def test_range_tests_are_told_by_weight_decay() -> None:
    tests = RangeTests(tests=(sweep(weight_decay=1e-3), sweep(weight_decay=1e-4)))
    text = Shown(tests._repr_html_()).text
    assert tests.reason in text
    assert "weight decay sweeps suggest diverge at 0.001 1" in text


def test_a_recipe_shows_its_values_and_its_schedule() -> None:
    recipe = fixed()
    shown = Shown(recipe._repr_html_())
    for name, value in recipe.to_dict().items():
        said = number(value, 4) if isinstance(value, float) else value
        assert f"{name} {said}" in shown.text
    assert [tag for tag, _ in shown.tags].count("polyline") == 2


def test_showing_the_recipe_of_a_running_trial_suggests_nothing() -> None:
    trial = report_studies.new_study().ask()
    recipe = hpsched.suggest_onecycle(trial, div_factor=10.0)
    shown = Shown(recipe._repr_html_())
    assert trial.params == {}
    assert "div_factor 10" in shown.text and "max_lr" not in shown.text
    assert "suggested when it is first read" in shown.text
    assert recipe.max_lr > 0
    assert f"max_lr {number(recipe.max_lr, 4)}" in Shown(recipe._repr_html_()).text


def test_a_fixed_trial_that_lacks_a_value_is_shown_without_it() -> None:
    recipe = hpsched.suggest_onecycle(optuna.trial.FixedTrial({"div_factor": 7.0}))
    assert "One-cycle recipe" in Shown(recipe._repr_html_()).text


def test_the_best_recipe_says_how_good_and_how_sure() -> None:
    best = report_studies.confirmed().best
    assert best is not None and best.runner_up is not None
    text = Shown(best._repr_html_()).text
    assert f"value {mean_and_spread(best)} (2 fresh seeds)" in text
    assert f"trial {best.runner_up.number}: {mean_and_spread(best.runner_up)}" in text
    assert f"max_lr {number(best.recipe['max_lr'], 4)}" in text


def test_a_study_with_hostile_text_is_only_text() -> None:
    for summary in (report_studies.mixed(), report_studies.empty()):
        shown = Shown(summary._repr_html_())
        assert "script" not in {tag for tag, _ in shown.tags}
        assert report_studies.HOSTILE.split(">")[0] in shown.text


@pytest.mark.parametrize(
    "name", ["history", "rungs", "slice", "parallel", "curves", "schedule", "range_test"]
)
def test_a_summary_has_every_figure_of_the_study(name: str) -> None:
    assert report_studies.confirmed().figure(name).data
    assert not report_studies.empty().figure(name).data  # words instead


def test_a_figure_that_there_is_not_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'pie': there are history, rungs"):
        report_studies.empty().figure("pie")


def test_a_range_tests_html_needs_neither_plotly_nor_torch() -> None:
    code = (
        "import sys; from hpsched.lr_curve import RangeTest; "
        "RangeTest(lrs=(1e-3, 1e-2), losses=(1.0, 0.5))._repr_html_(); "
        "print(sorted({'plotly', 'torch', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_curves_stay_inside_their_drawing() -> None:
    for thing in everything():
        for tag, attrs in Shown(thing._repr_html_()).tags:
            if tag == "polyline":
                places = [tuple(map(float, p.split(","))) for p in (attrs["points"] or "").split()]
                assert places and len(places) <= notebook.POINTS + 1
                assert all(
                    0 <= x <= notebook.WIDTH and 0 <= y <= notebook.HEIGHT for x, y in places
                )
