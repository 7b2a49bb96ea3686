"""The report page: what it says, that it is safe to open, and that it needs no network."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import plotly.offline
import pytest
import report_studies
import torch
from rich.console import Console

import hpsched
from hpsched import figure_data, records, schedules
from hpsched.cli.screen import status_screen
from hpsched.doctor import examine
from hpsched.errors import UsageError
from hpsched.evidence import Evidence
from hpsched.ledger import Candidate
from hpsched.present import duration, mean_and_spread, number, rate_text, torch_snippet
from hpsched.records import Settings
from hpsched.report import (
    headline,
    is_markdown,
    render_markdown,
    render_report,
    write_report,
)
from hpsched.report import markdown as markdown_env
from hpsched.report_content import settings
from hpsched.report_figures import groups
from hpsched.study import create_study
from hpsched.summary import Summary, summarise

LARGEST = 5_000_000  # bytes
SUMMARIES = [
    report_studies.confirmed,
    report_studies.maximised,
    report_studies.empty,
    report_studies.mixed,
]


class Page(HTMLParser):
    """The parsed page: its tags, its visible text, and what it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@cache
def source(summary: Callable[[], Summary]) -> str:
    return render_report(summary())


@cache
def page(summary: Callable[[], Summary]) -> Page:
    return Page(source(summary))


# -- what it says ----------------------------------------------------------------------------------


def test_the_headline_is_the_answer() -> None:
    summary = report_studies.confirmed()
    best = summary.best
    assert best is not None
    said = headline(summary)
    assert said.startswith(f"The best recipe reaches {mean_and_spread(best)} over 2 fresh seeds")
    assert f"{number(summary.cost.cycles)} full cycles" in said
    assert ("not significantly" in said) is (best.significant is False)
    assert said in page(report_studies.confirmed).text


@pytest.mark.parametrize(
    ("significant", "words"),
    [(True, ", and significantly better"), (False, "not significantly"), (None, "too few seeds")],
)
def test_the_headline_says_how_sure_it_is(significant: bool | None, words: str) -> None:
    summary = report_studies.confirmed()
    assert summary.best is not None
    assert words in headline(replace(summary, best=replace(summary.best, significant=significant)))


def test_the_recipe_and_its_code_are_on_the_page() -> None:
    best = report_studies.confirmed().best
    assert best is not None
    text = page(report_studies.confirmed).text
    for field in ("max_lr", "div_factor", "pct_start", "base_momentum", "weight_decay"):
        assert f"{field} {number(best.recipe[field])}" in text
    assert " ".join(torch_snippet(best).split()) in text


def test_costs_and_savings_are_on_the_page() -> None:
    summary = report_studies.confirmed()
    text = page(report_studies.confirmed).text
    assert f"range tests {number(summary.range_test_cost.cycles)} 200" in text
    assert f"confirmations 4 {4 * report_studies.STEPS:,}" in text
    assert f"all {number(summary.cost.cycles)} {summary.cost.steps:,}" in text
    assert f"saved {number(summary.saved_cycles)} full cycles" in text


@pytest.mark.parametrize(
    ("top", "seeds", "done", "recipes", "runs"),
    [
        (2, 2, 4, "2", "2"),
        (3, 3, 4, "asked 3, run 2", "asked 3, run 2"),
        (2, 2, 3, "2", "asked 2, run 1 to 2"),
        (2, 3, 0, "asked 2, run 0", "asked 3, run 0"),
    ],
    ids=["as asked", "a smaller budget", "unequal", "none"],
)
def test_the_settings_say_what_was_confirmed(
    top: int, seeds: int, done: int, recipes: str, runs: str
) -> None:
    made = report_studies.confirmed()
    kept = [run for run in made.runs if run.confirms is None]
    kept += [run for run in made.runs if run.confirms is not None][:done]
    asked = Settings(objective="a:b", seed=0, trials=12, confirm_top=top, confirm_seeds=seeds)
    over = replace(made, runs=tuple(kept), settings=asked, progress=1.0)
    assert (said := settings(over))["confirm_top"] == recipes
    assert said["confirm_seeds"] == runs and said["trials"] == "12"
    unfinished = settings(replace(over, progress=0.9))
    assert (unfinished["confirm_top"], unfinished["confirm_seeds"]) == (str(top), str(seeds))


def test_an_empty_study_says_what_to_run() -> None:
    text = page(report_studies.empty).text
    assert "No recipe has finished a full cycle yet" in text
    assert "study.optimize(objective, n_trials=20)" in text


def test_a_study_that_only_failed_says_to_mend_the_objective() -> None:
    study = report_studies.new_study("broken one")
    study.optimize(lambda trial: 1 / 0, n_trials=2, catch=(ZeroDivisionError,))
    text = Page(render_report(summarise(study))).text
    assert "Every trial has failed so far: mend the objective first" in text
    assert "hpsched doctor --study 'broken one'" in text
    assert "2 trials failed" in text
    assert "Warnings" in text and "To know before using it" not in text  # there is no recipe
    assert "## Warnings" in render_markdown(summarise(study))


def test_a_report_without_anything_to_draw_has_no_plots() -> None:
    text = source(report_studies.empty)
    assert "<figure" not in text and "The figures need" not in text
    assert not list(groups(report_studies.empty()))
    assert len(text) < 50_000  # without plotly.js


def test_a_budget_spent_on_short_cycles_is_called_too_small(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = create_study("short", objective="math:sqrt", storage=storage, timeout=1e-6)
    study.optimize(report_studies.objective, n_trials=1)
    text = Page(render_report(summarise(study))).text
    assert "The budget is spent and no recipe has finished a full cycle: find out why" in text
    assert "hpsched doctor --study short" in text
    (found,) = [f for f in examine(storage, study="short") if not f.ok]
    assert (found.what, "create another study with a larger one" in found.detail) == (
        "trials",
        True,
    )
    for asked in (hpsched.best, hpsched.confirm):
        with pytest.raises(UsageError, match=r"create another study with a larger budget.*doctor"):
            asked(study)


def test_an_unfinished_study_names_the_command_that_goes_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = create_study("unfinished", objective="train:objective", storage=storage, cycles=50)
    for why in ("There is no finished full cycle", "The search is not finished"):
        study.optimize(report_studies.objective, n_trials=2)
        text = Page(render_report(summarise(study))).text
        assert why in text
        assert "hpsched worker attach unfinished" in text
        assert "cycles 50" in text
        assert "% of the budget spent" in text


def test_a_study_with_one_seed_names_confirm() -> None:
    text = page(report_studies.maximised).text
    assert "with one seed, not yet confirmed" in text
    assert "hpsched.confirm(study)" in text
    assert "higher is better" in text


def test_each_context_has_its_range_test() -> None:
    ids = [attrs["id"] for tag, attrs in page(report_studies.mixed).tags if "id" in attrs]
    assert "figure-range-test-0" in ids
    assert "figure-range-test-1" in ids
    assert "Context norm='batch'" in page(report_studies.mixed).text


def drawn(name: str, summary: Summary) -> Any:
    """The data of the page's figure of this name."""
    found = re.search(rf'id="figure-{name}-data">(.*?)</script>', render_report(summary), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def note(name: str, summary: Summary) -> str:
    """All that is said above the page's figure of this name."""
    found = re.search(
        rf'<figcaption id="figure-{name}-caption">(.*?)</figcaption>', render_report(summary)
    )
    assert found is not None
    return re.sub("<[^>]+>", "", found[1])


def known(summary: Summary) -> Evidence:
    found = summary.windows[""].evidence
    assert found is not None
    return found


def changed(summary: Summary, **more: Any) -> Summary:
    """The summary with other coordinates."""
    return replace(summary, windows={"": replace(summary.windows[""], **more)})


def test_the_range_test_figure_shows_what_the_range_tests_alone_say() -> None:
    summary = report_studies.confirmed()
    found = known(summary)
    assert found.prior.centre != found.proposal.centre
    shapes = {shape["name"]: shape for shape in drawn("range-test-0", summary)["layout"]["shapes"]}
    assert shapes["window"]["x0"] == pytest.approx(found.prior.low)
    assert shapes["window"]["x1"] == pytest.approx(found.prior.high)
    said = note("range-test-0", summary)
    assert said.startswith("The range tests say: max_lr from")
    assert f"around {rate_text(found.prior.centre)}." in said
    assert "other seeds would move the centre" in said
    assert "They cost 0.222 full cycles." in said  # two sweeps of 100 steps of 900


@pytest.mark.parametrize("made", [report_studies.confirmed, report_studies.maximised])
def test_the_complete_cycles_stand_below_with_what_they_cost(made: Callable[[], Summary]) -> None:
    summary = made()
    found = known(summary)
    ids = [a["id"] for _, a in page(made).tags if a.get("class") == "plotly-graph-div"]
    assert ids[ids.index("figure-range-test-0") + 1] == "figure-refining-0"
    cycles = [c for r in summary.runs if records.REFINES in r.trial.user_attrs for c in r.cycles]
    cost = number(sum(c.steps for c in cycles) / report_studies.STEPS)
    said = note("refining-0", summary)
    assert f"{len(cycles)} complete cycles at the cost of {cost} full ones" in said
    assert f"best max_lr at {rate_text(found.proposal.centre)}" in said
    low, high = map(rate_text, found.proposal.interval)
    assert f"90 % certainty between {low} and {high}" in said
    assert "moved on" not in said
    better = "higher" if summary.direction == "maximize" else "lower"
    names = [trace.get("name") for trace in drawn("refining-0", summary)["data"]]
    assert f"value ({better} is better)" in names


def test_each_context_says_what_its_own_range_tests_and_cycles_cost() -> None:
    summary = report_studies.mixed()
    contexts = dict.fromkeys(run.sweep.context_key for run in summary.runs if run.sweep)
    assert len(contexts) == 2
    for index, key in enumerate(contexts):
        ours = [r for r in summary.runs if r.recipe and r.recipe.context_key == key]
        steps = {r.sweep.name: r.sweep.steps for r in ours if r.sweep}
        again = [c.steps for r in ours if records.REFINES in r.trial.user_attrs for c in r.cycles]
        swept, refined = (number(sum(some) / 900) for some in (steps.values(), again))
        assert f"They cost {swept} full" in note(f"range-test-{index}", summary)
        assert f"at the cost of {refined} full" in note(f"refining-{index}", summary)


def test_a_window_that_widened_is_told() -> None:
    summary = report_studies.confirmed()
    low, high = summary.windows[""].window
    wider = changed(summary, window=(low / 4, high))
    said = f"The search has since moved on to {rate_text(low / 4)} to {rate_text(high)}."
    assert said in note("refining-0", wider)
    assert f"; searched is {rate_text(low / 4)} … {rate_text(high)}" in screen(wider)
    assert "searched is" not in screen(summary)


def test_without_cycles_of_its_own_a_context_says_where_its_centre_comes_from() -> None:
    summary = report_studies.confirmed()
    found = known(summary)
    moved = replace(found, runs=(), proposal=found.prior.moved(0.5))
    moved_summary = changed(
        summary, evidence=moved, window=(moved.proposal.low, moved.proposal.high)
    )
    centre = rate_text(moved.proposal.centre)
    said = note("range-test-0", moved_summary)
    assert f"Complete cycles of other contexts move the centre to {centre}." in said
    assert 'id="figure-refining-0"' not in render_report(moved_summary)
    assert "cycles of other contexts" in screen(moved_summary)


def test_without_cycles_the_range_tests_alone_are_told() -> None:
    summary = report_studies.confirmed()
    alone = replace(known(summary), runs=(), proposal=known(summary).prior)
    alone_summary = changed(
        summary,
        evidence=alone,
        window=(alone.prior.low, alone.prior.high),
        centre=alone.prior.centre,
    )
    said = note("range-test-0", alone_summary)
    assert said.startswith("Search max_lr from")
    assert "moved on" not in said and "other contexts" not in said
    assert 'id="figure-refining-0"' not in render_report(alone_summary)
    low, high, centre = map(rate_text, (alone.prior.low, alone.prior.high, alone.prior.centre))
    assert f"max_lr {low} … {high}, centre {centre} " in screen(alone_summary)


def test_evidence_that_is_missing_leaves_the_sweeps_to_speak() -> None:
    summary = replace(report_studies.confirmed(), windows={})
    assert note("range-test-0", summary).startswith("Search max_lr from")


def test_the_recipe_names_where_the_window_comes_from() -> None:
    summary = report_studies.confirmed()
    low, high = map(number, summary.windows[""].window)
    text = page(report_studies.confirmed).text
    assert f"{low} to {high}, from range tests and complete cycles" in text
    ours = Page(render_report(changed(summary, evidence=None))).text
    assert f"{low} to {high}, from your range" in ours


def screen(summary: Summary) -> str:
    """What ``hpsched study status`` prints."""
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(status_screen(summary))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_status_tells_range_tests_and_complete_cycles_apart() -> None:
    found = known(report_studies.confirmed())
    tested, refined = (
        f"{rate_text(p.low)} … {rate_text(p.high)}" for p in (found.prior, found.proposal)
    )
    centre = rate_text(found.proposal.centre)
    said = f"max_lr range tests say {tested}, complete cycles {refined}, centre {centre} rung"
    assert said in screen(report_studies.confirmed())


def test_several_objectives_are_left_to_optuna() -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=hpsched.OneCycleSampler())
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=1)
    assert "study.best_trials" in Page(render_report(summarise(study))).text


# -- that it is safe, whole and well formed --------------------------------------------------------


@pytest.mark.parametrize("summary", SUMMARIES)
def test_nothing_on_the_page_asks_a_host(summary: Callable[[], Summary]) -> None:
    loads = [
        attrs[key]
        for _, attrs in page(summary).tags
        for key in ("src", "href", "srcset", "action", "data", "poster", "background")
        if key in attrs
    ]
    assert loads == ["data:,"]
    assert not re.search(r"@import|url\(", source(summary).split("</style>")[0])
    policy = next(a["content"] for _, a in page(summary).tags if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.parametrize("summary", [report_studies.empty, report_studies.mixed])
def test_hostile_text_stays_text(summary: Callable[[], Summary]) -> None:
    assert "img" not in {tag for tag, _ in page(summary).tags}
    assert '<script>alert("name")' not in source(summary)
    scripts = [attrs.get("type") for tag, attrs in page(summary).tags if tag == "script"]
    drawn = bool(list(groups(summary())))
    assert scripts.count(None) == drawn  # our own few lines; plotly.js is packed, the rest is data
    assert report_studies.HOSTILE in page(summary).text


@pytest.mark.parametrize("summary", SUMMARIES)
def test_every_figure_has_a_caption_and_readable_data(summary: Callable[[], Summary]) -> None:
    captions = {a["id"] for tag, a in page(summary).tags if tag == "figcaption"}
    plots = [a["id"] for _, a in page(summary).tags if a.get("class") == "plotly-graph-div"]
    assert len(plots) == sum(len(group["figures"]) for group in groups(summary()))
    assert len(plots) >= 6 or summary is report_studies.empty
    for plot in plots:
        assert f"{plot}-caption" in captions
        found = re.search(rf'id="{plot}-data">(.*?)</script>', source(summary), re.DOTALL)
        assert found is not None
        assert set(json.loads(found[1])) >= {"data", "layout"}


@pytest.mark.parametrize("summary", SUMMARIES)
def test_the_page_is_structured(summary: Callable[[], Summary]) -> None:
    tags = page(summary).tags
    assert [tag for tag, _ in tags].count("h1") == 1
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs}
    assert labels <= set(ids)


def test_the_file_is_written_and_not_too_large(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert write_report(report_studies.confirmed(), path) == path
    assert 1_000_000 < path.stat().st_size < 3_000_000
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_the_packed_plotly_is_plotly() -> None:
    packed = re.search(r'id="plotly-gz">(.*?)</script>', source(report_studies.maximised))
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed[1])).decode() == plotly.offline.get_plotlyjs()


@pytest.mark.slow
def test_the_report_of_ten_thousand_trials_stays_under_five_megabytes(tmp_path: Path) -> None:
    summary = report_studies.large()
    assert sum(summary.states.values()) == 10_000
    path = write_report(summary, tmp_path / "report.html")
    assert path.stat().st_size < LARGEST
    assert write_report(summary, tmp_path / "report.md").stat().st_size < 20_000
    text = Page(path.read_text(encoding="utf-8")).text
    for kind, points in (("full cycles", "full"), ("pruned trials", "short")):
        count = len(getattr(figure_data.results(summary), points))
        assert f"{figure_data.MOST} of {count:,} {kind}" in text


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file or directory.*name a file"):
        write_report(report_studies.empty(), tmp_path / "missing" / "report.html")


# -- Markdown --------------------------------------------------------------------------------------


@cache
def markdown(summary: Callable[[], Summary]) -> str:
    return render_markdown(summary())


@pytest.mark.parametrize("summary", SUMMARIES)
def test_markdown_says_what_the_page_says(summary: Callable[[], Summary]) -> None:
    text, words = markdown(summary), page(summary).text
    heads = set(re.findall(r"^## (.*)$", text, re.MULTILINE))
    assert {head for head in heads if head not in words} == set()
    assert f"all | {number(summary().cost.cycles)} | {summary().cost.steps:,} |" in text
    named = summary().best
    if named is not None:
        assert torch_snippet(named) in text
        assert f"| `max_lr` | {number(named.recipe['max_lr'])} |" in text


def test_markdown_opens_with_the_answer() -> None:
    said = headline(report_studies.confirmed())
    assert markdown(report_studies.confirmed).splitlines()[2] == f"**{said}**"


@pytest.mark.parametrize("summary", SUMMARIES)
def test_markdown_has_whole_tables_and_fences(summary: Callable[[], Summary]) -> None:
    text = markdown(summary)
    assert text.count("\n```") % 2 == 0
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table
    assert "\n\n\n" not in text
    assert text.endswith(".\n")


@pytest.mark.parametrize("summary", [report_studies.empty, report_studies.mixed])
def test_hostile_text_stays_text_in_markdown(summary: Callable[[], Summary]) -> None:
    outside = re.sub(r"```.*?```|`[^`\n]+`", "", markdown(summary), flags=re.DOTALL)
    assert "<" not in outside
    assert "&lt;script" in outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("# x\n- y", r"\# x - y"),
        ("[a](b) ![c](d)", r"\[a\](b) !\[c\](d)"),
        ("max_lr *x* `y` _z_", r"max_lr \*x\* \`y\` \_z\_"),
        ("<b> & </b>", r"&lt;b\> &amp; &lt;/b\>"),
    ],
)
def test_nothing_in_a_text_starts_markdown(text: str, shown: str) -> None:
    assert markdown_env().from_string("{{ it }}").render(it=text) == shown


def test_code_in_markdown_is_fenced_by_more_backticks_than_it_has() -> None:
    env = markdown_env()
    assert env.from_string("{{ it | code }}").render(it="a`b``c|d\ne") == r"``` a`b``c\|d e ```"
    fenced = env.from_string("{{ it | fenced('sh') }}").render(it="x\n```\ny\n")
    assert fenced == "````sh\nx\n```\ny\n````"


@pytest.mark.parametrize(
    ("path", "format_", "wanted"),
    [("r.md", None, True), ("r.MARKDOWN", None, True), ("r.html", None, False), ("-", None, True),
     ("-", "html", False), ("r.html", "md", True), ("r", None, False)],
)  # fmt: skip
def test_the_suffix_says_what_is_written(path: str, format_: str | None, wanted: bool) -> None:
    assert is_markdown(Path(path), format_) is wanted


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'pdf': html or md"):
        is_markdown(Path("r.html"), "pdf")


# -- numbers, times and code -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (123_456.0, "123,000"),
        (12, "12"),
        (10_000.0, "10,000"),
        (3.14159e-5, "3.14e-5"),
        (1e-8, "1e-8"),
        (2.5e7, "2.5e7"),
        (0.0, "0"),
        (-0.01234, "-0.0123"),
        (float("inf"), "inf"),
        (None, "–"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.123, "0.12 s"),
        (9.99, "10 s"),
        (59.6, "1 min"),
        (252, "4 min 12 s"),
        (3600, "1 h"),
        (7_325, "2 h 2 min"),
        (90_061, "1 d 1 h"),
        (None, "–"),
    ],
)
def test_times_are_in_their_two_largest_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.1034, 0.1012), "0.1023 ± 0.0016"),
        ((91.25, 92.75), "92.0 ± 1.1"),
        ((1200.0, 1500.0), "1,350 ± 212"),
        ((0.5,), "0.5"),
        ((0.5, 0.5), "0.5"),
        ((0.1, float("inf")), "diverged"),
        ((0.1, 0.1 + 1e-13), "0.1 ± 7.1e-14"),
    ],
)
def test_a_mean_has_the_digits_that_its_spread_leaves(values: tuple[float, ...], text: str) -> None:
    found = Candidate(
        number=0, params={}, recipe={}, policy="cosine", total_steps=1, found=0.0, fresh=values
    )
    assert mean_and_spread(found) == text


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "AdamW", "NAdam", "os.system('x')"])
@pytest.mark.parametrize("policy", ["cosine", "linear"])
def test_the_pasted_code_trains_with_the_very_schedule(
    tmp_path: Path, optimizer: str, policy: str
) -> None:
    best = report_studies.confirmed().best
    assert best is not None
    best = replace(best, policy=policy)
    code = tmp_path / "pasted.py"
    code.write_text(torch_snippet(best, optimizer), encoding="utf-8")
    model = torch.nn.Linear(1, 1)
    made = runpy.run_path(str(code), {"torch": torch, "model": model})
    group = made["optimizer"].param_groups[0]
    expected = schedules.one_cycle(
        report_studies.STEPS,
        **{k: v for k, v in best.recipe.items() if k != "weight_decay"},
        policy=policy,
    )
    assert group["weight_decay"] == best.recipe["weight_decay"]
    for step in range(report_studies.STEPS):
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        assert group["lr"] == pytest.approx(expected.lr(step), rel=1e-6, abs=1e-12)
        assert momentum == pytest.approx(expected.momentum(step), rel=1e-6)
        made["optimizer"].step()
        if step < report_studies.STEPS - 1:
            made["scheduler"].step()


def test_without_total_steps_the_code_asks_for_them() -> None:
    best = report_studies.confirmed().best
    assert best is not None
    code = torch_snippet(replace(best, total_steps=None))
    assert "total_steps = ...  #" in code
    assert "total_steps=total_steps," in code


@pytest.mark.parametrize("name", ["report.pdf", "report.txt"])
def test_a_suffix_that_names_no_report_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end its name with \.html or \.md"):
        is_markdown(tmp_path / name)
    assert is_markdown(tmp_path / name, "md")
    assert [is_markdown(Path(p)) for p in ("-", "a.md", "a.HTML")] == [True, True, False]
