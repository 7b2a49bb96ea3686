"""What the terminal shows, at any width, and what is left of it in logs."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_studies
from rich.console import Console
from rich.markup import escape

from hpsched.cli.fleet_screen import node_table
from hpsched.cli.lr_find import verdict
from hpsched.cli.screen import (
    RunLine,
    best_table,
    doing,
    is_live,
    progress_line,
    status_line,
    status_screen,
)
from hpsched.cli.sparkline import BLOCKS, PLAIN, SEEN, Seen, sparkline, steps_line
from hpsched.cycle import Progress
from hpsched.devices import Device
from hpsched.fleet import Slot
from hpsched.ledger import as_they_ended
from hpsched.lr_curve import RangeTest
from hpsched.present import number
from hpsched.proposal import pool
from hpsched.records import Settings, WorkerRecord
from hpsched.summary import Summary

NOW = 1_800_000_000.0
WIDTHS = [40, 60, 80, 120, 200]


def record(step: int = 290, **more: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "host": "gpu-node-7", "pid": 4711, "device": "cuda:0", "started": NOW - 1000,
        "seen": NOW - 40 + step / 10, "state": "running", "trial": 12, "kind": "rung", "rung": 1,
        "step": step, "total_steps": 300, "lr": 0.123, "loss": 2.3 / (1 + step / 50), "done": 4,
    }  # fmt: skip
    return WorkerRecord(**{**fields, **more})


def busy() -> Summary:
    """A study with a budget and two workers at work."""
    return replace(
        report_studies.mixed(),
        live={"a": record(), "b": record(host="x" * 60, device="cpu", kind=None, state="idle")},
        progress=0.42,
        eta=4000.0,
        settings=Settings(objective="a:b", seed=1, cycles=20.0),
        next_command="hpsched study status mixed --watch",
    )


def printed(what: Any, width: int = 200, **console: Any) -> str:
    out = io.StringIO()
    Console(width=width, file=out, **{"force_terminal": False, **console}).print(what)
    return out.getvalue()


def test_the_best_recipe_comes_with_a_command_that_names_its_study() -> None:
    best = report_studies.maximised().best
    assert best is not None
    hint = best.hint.replace("digits", "'[b]mine[/b]'")  # quoted, it must not be taken for markup
    assert "`hpsched study confirm '[b]mine[/b]'`" in printed(best_table(replace(best, hint=hint)))


# -- curves ----------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_to_the_highest_block() -> None:
    assert sparkline(range(8), 8) == BLOCKS
    assert sparkline([3.0, 1.0, 2.0], 9) == "█▁▅"
    assert sparkline(range(7), 7, plain=True) == PLAIN


def test_a_long_curve_is_shown_by_means_over_its_whole_length() -> None:
    values = [1.0] * 500 + [0.0] * 500
    assert sparkline(values, 10) == "█" * 5 + "▁" * 5


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [([], 10, ""), ([1.0], 0, ""), ([math.nan, math.inf], 5, ""), ([2.0, 2.0], 5, "▁▁"),
     ([1.0, math.nan, 2.0], 5, "▁█")],
)  # fmt: skip
def test_there_is_no_curve_that_breaks_a_sparkline(
    values: list[float], width: int, drawn: str
) -> None:
    assert sparkline(values, width) == drawn


def test_steps_keep_their_level_until_the_next() -> None:
    assert steps_line([(0.0, 8.0), (5.0, 1.0)], 10.0, 10) == "████▁▁▁▁▁▁"
    assert steps_line([], 1.0, 10) == ""


def test_what_was_seen_of_a_run_goes_when_the_next_begins() -> None:
    seen = Seen()
    for step in (10, 20, 20, 30):
        seen.look("w", record(step))
    assert seen.losses("w") == [record(step).loss for step in (10, 20, 30)]
    assert seen.left("w") == pytest.approx(27.0)  # 10 steps a second
    seen.look("w", record(5, rung=2))
    assert seen.losses("w") == [record(5).loss]
    assert seen.left("w") is None
    assert seen.losses("nobody") == []


def test_a_long_run_is_remembered_from_its_start_within_bounds() -> None:
    seen = Seen()
    for step in range(2_000):
        seen.look("w", record(step))
    losses = seen.losses("w")
    assert SEEN // 2 <= len(losses) <= SEEN
    assert losses[0] == record(0).loss
    assert losses == sorted(losses, reverse=True)


# -- status ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "summary", [busy, report_studies.confirmed, report_studies.empty, report_studies.maximised]
)
def test_the_screen_fits_any_width(summary: Callable[[], Summary], width: int) -> None:
    for line in printed(status_screen(summary(), NOW), width).splitlines():
        assert len(line) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_the_answer_is_whole_at_any_width(width: int) -> None:
    said = " ".join(printed(status_screen(busy(), NOW), width).split())
    states = busy().states
    assert f"{states['complete']} completed, 1 failed, {states['pruned']} pruned" in said
    assert f"best {number(busy().best.mean)}" in said  # type: ignore[union-attr]
    assert "42 % about 1 h 6 min left" in said
    assert "11 s ago" in said  # the heartbeat
    assert "trial 12, rung 1," in said
    assert "Next: hpsched study status mixed --watch" in said
    for rung in busy().rungs:
        assert f"{rung.rung} {rung.steps:,} {rung.reached} {rung.pruned}" in said


@pytest.mark.parametrize(
    ("order", "more", "said"),
    [
        (None, {}, "trial 12, rung 1, step 290/300"),
        ("pause", {}, "trial 12, rung 1, step 290/300, pauses after it"),
        ("drain", {"kind": None}, "trial 12, running, drains after it"),
        ("stop", {}, "trial 12, rung 1, step 290/300, told to stop"),
        ("pause", {"trial": None, "state": "idle"}, "idle, told to pause"),
        ("pause", {"trial": None, "state": "paused"}, "paused"),
        ("drain", {"trial": None, "state": "paused"}, "paused, told to drain"),
        ("drain", {"trial": None, "state": "stopped"}, "stopped"),
    ],
)
def test_a_worker_shows_what_it_was_told(
    order: str | None, more: dict[str, Any], said: str
) -> None:
    assert doing(record(**more), order) == said
    if order == "pause" and not more:
        assert said in printed(status_screen(busy(), NOW, orders={"a": order}))


def test_wide_screens_show_the_curve_and_the_time_left_of_a_run() -> None:
    seen = Seen()
    for step in range(10, 300, 10):
        seen.look("a", record(step))
    wide = printed(status_screen(busy(), NOW, seen), 120)
    row = next(line for line in wide.splitlines() if "gpu-node-7" in line)
    assert sparkline(seen.losses("a"), 12) in row
    assert " 1 s " in row  # 10 steps at 10 a second
    assert "curve" not in printed(status_screen(busy(), NOW, seen), 80)


def test_the_best_so_far_is_drawn_over_what_was_spent() -> None:
    summary = report_studies.mixed()  # whose first full run is not its best
    said = printed(status_screen(summary, NOW), 80)
    row = next(line for line in said.splitlines() if line.startswith("so far"))
    first, curve, last = row.split()[2:]
    found = [(spent, r.full.value) for r, spent in as_they_ended(summary.runs)
             if r.full and r.full.value is not None and r.confirms is None]  # fmt: skip
    best = min(value for _, value in found)
    assert (first, last) == (number(found[0][1]), number(best))
    place = next(spent for spent, value in found if value == best)
    share = (place - found[0][0]) / (summary.cost.cycles - found[0][0])
    assert curve.count("▁") == pytest.approx((1 - share) * len(curve), abs=1)


def test_a_window_without_a_clear_range_test_says_so() -> None:
    summary = report_studies.mixed()
    where, *_ = summary.windows.values()
    prior = where.evidence.prior  # type: ignore[union-attr]
    for reliable in (True, False):
        prior = replace(prior, reliable=reliable)
        alone = replace(where.evidence, prior=prior, proposal=prior, runs=())  # type: ignore[type-var]
        shown = printed(
            status_screen(replace(summary, windows={"": replace(where, evidence=alone)}))
        )
        assert ("range tests have no clear answer; searched is " in shown) == (not reliable)


def test_a_bar_tells_the_pruned_from_those_that_went_on() -> None:
    said = printed(status_screen(busy(), NOW), 120)
    rows = [line for line in said.splitlines() if "█" in line and "so far" not in line]
    assert len(rows) == len(busy().rungs)
    for row, rung in zip(rows, busy().rungs, strict=True):
        share = rung.pruned / rung.reached
        assert row.count("░") / (row.count("░") + row.count("█")) == pytest.approx(share, abs=0.1)


def test_text_from_a_study_is_no_markup() -> None:
    summary = replace(busy(), name="[red]x[/]", warnings=("[bold]w[/] failed",))
    said = printed(status_screen(summary, NOW))
    assert "[red]x[/]" in said and "[bold]w[/] failed" in said


def test_no_colour_is_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[36m" in printed(status_screen(busy(), NOW), force_terminal=True, no_color=False)
    monkeypatch.setenv("NO_COLOR", "1")
    said = printed(status_screen(busy(), NOW), force_terminal=True)
    assert not any(f"\x1b[{colour}m" in said for colour in range(30, 38))


def test_a_terminal_that_knows_ascii_only_gets_that() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(width=100, file=out, force_terminal=False)
    console.print(status_screen(report_studies.mixed(), NOW))
    out.seek(0)
    said = out.read()
    row = next(line for line in said.splitlines() if line.startswith("so far"))
    assert set(row.split()[3]) <= set(PLAIN)


def test_the_line_for_logs_says_it_all() -> None:
    said = status_line(busy())
    best = busy().best
    assert best is not None
    spent, value = number(busy().cost.cycles), number(best.found)
    assert said.startswith(f"42 %, 14 trials, {spent} full cycles spent, best {value}")
    assert said.endswith("2 workers, about 1 h 6 min left")
    assert "no full cycle yet" in status_line(report_studies.empty())


# -- workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_a_node_of_workers_fits_any_width(width: int) -> None:
    slots = [
        Slot(
            name=f"cuda:{i}",
            device=Device(label=f"cuda:{i}", visible=str(i)),
            log=Path("x.log"),
            record=record(),
        )
        for i in range(3)
    ]
    said = printed(node_table(slots, width), width)
    assert all(len(line) <= width for line in said.splitlines())
    assert said.count("rung 1") == 3
    assert "…" not in said
    assert ("curve" in said) is (width >= 110)


def test_a_node_shows_the_losses_it_has_seen_and_the_last_sign_of_life() -> None:
    seen = Seen()
    slot = Slot(name="cpu", device=Device(label="cpu", visible=""), log=Path("x.log"))
    for step in (10, 100, 290):
        slot.record = record(step, seen=time.time() - 75)
        said = printed(node_table([slot], 120, seen))
    assert sparkline([record(step).loss or 0.0 for step in (10, 100, 290)], 12) in said
    assert "1 min ago" in said


# -- the run in hand -------------------------------------------------------------------------------


def progress(step: int, loss: float | None = 1.0, rung: int = 1) -> Progress:
    return Progress(kind="rung", rung=rung, step=step, total_steps=300, lr=0.1, loss=loss)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_run_in_hand_is_one_line(width: int) -> None:
    line = RunLine()
    for step in range(0, 200, 10):
        line.show("trial 123456: ", progress(step, loss=2.0 - step / 100))
    said = printed(line, width).splitlines()
    assert len(said) == 1 and len(said[0]) <= width
    if width >= 80:
        assert "190/300 steps, rate 0.1, loss 0.1" in said[0]
    assert ("█" in said[0]) is (width >= 120)


def test_the_line_of_a_run_starts_again_with_the_next() -> None:
    line = RunLine()
    for step in (0, 100, 200):
        line.show("trial 1: ", progress(step, loss=3.0 - step / 100))
    line.show("trial 1: ", progress(10, loss=0.5, rung=2))
    assert "loss 0.5 ▁" in printed(line, 120)


def test_before_the_first_run_there_is_nothing_to_show() -> None:
    assert printed(RunLine()) == ""


def test_logs_get_no_line() -> None:
    out = io.StringIO()
    with progress_line(Console(file=out, force_terminal=False)) as draw:
        draw("trial 1: ", progress(1))
    assert out.getvalue() == ""


def test_a_dumb_terminal_is_no_place_for_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_live(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(Console(file=io.StringIO(), force_terminal=True))


# -- the verdict of lr-find ------------------------------------------------------------------------


def swept(seed: int, end: float = 10.0, depth: float = 2.0) -> RangeTest:
    """A sweep whose loss falls by ``depth`` about a rate of 0.1 and explodes beyond 3."""
    rng, lrs = np.random.default_rng(seed), np.geomspace(1e-6, end, 100).tolist()
    fall = [2.3 - depth / (1 + (0.1 / lr) ** 2) + 0.02 * rng.normal() for lr in lrs]
    losses = [30.0 if lr > 3 and depth else loss for lr, loss in zip(lrs, fall, strict=True)]
    return RangeTest(lrs=tuple(lrs), losses=tuple(losses))


def test_one_sweeps_complaint_is_not_the_verdict() -> None:
    tests = [swept(0), swept(1), swept(2, end=0.1)]
    found = pool(tests)
    assert found.reliable
    assert list(verdict(tests, found)) == [
        "Reliable together, but not every sweep alone:",
        f"  sweep 3: {tests[2].reason}",
    ]
    assert "raise end_lr from 0.1" in tests[2].reason
    assert list(verdict(tests[:2], pool(tests[:2]))) == []


def test_an_unreliable_verdict_is_the_pooled_one_and_is_not_said_again() -> None:
    flat = [swept(seed, depth=0) for seed in range(2)]
    found = pool(flat)
    assert not found.reliable and flat[0].reason in found.reason
    assert list(verdict(flat, found)) == [f"[yellow]Not reliable:[/] {escape(found.reason)}"]
    mixed = [*flat, swept(2, end=1e-4), swept(3, end=1e-3, depth=0)]
    found = replace(pool(mixed), reason="the replicates disagree")
    first, *others = verdict(mixed, found)
    assert first == "[yellow]Not reliable:[/] the replicates disagree"
    assert [line.split(":")[0] for line in others] == ["  sweeps 1, 2, 3, 4"]
