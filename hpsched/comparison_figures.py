"""Ways to train, or studies, against each other → plotly figures."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from hpsched.figure_data import Arm, median_curve, minimises, reached, robust_range
from hpsched.figure_style import (
    COLOURS,
    GREY,
    add_line,
    add_marks,
    empty,
    log_ticks,
    mark,
    shortened,
    styled,
    subtitled,
)
from hpsched.ledger import best_so_far
from hpsched.present import capitalised, mean_and_spread, number
from hpsched.summary import Summary

HISTORIES = "Line: the best single run so far. Square: the best recipe on fresh seeds, mean ± sd."
UNLIKE = 8  # times the cost of another study, from which on costs are drawn on a log scale
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def super_convergence_figure(
    arms: Sequence[Arm],
    *,
    metric: str = "validation error",
    target: float | None = None,
    maximise: bool = False,
    title: str | None = None,
) -> go.Figure:
    """A validation metric against optimizer steps, for several ways to train.

    Each arm is a thick line, the median over its seeds, and a thin line for each seed. A diamond
    marks where half of its seeds have reached the target.

    >>> one_cycle = Arm("one-cycle", [100, 200, 300], [[0.9, 0.5, 0.3], [0.8, 0.6, 0.4]])
    >>> constant = Arm("constant", [100, 200, 300], [[0.9, 0.7, 0.6], [0.9, 0.8, 0.6]])
    >>> super_convergence_figure([one_cycle, constant], target=0.6).show()  # doctest: +SKIP

    Args:
        arms: What is compared; the first is the one that the title is about.
        metric: What was measured.
        target: A value of the metric that each arm is to reach; None: no mark.
        maximise: Whether higher values of the metric are better.
        title: Instead of a sentence that says what one sees.
    """
    if not arms:
        return empty(title or "Super-convergence", "no training run to compare yet")
    places = {} if target is None else {arm.name: reached(arm, target, maximise) for arm in arms}
    said = title or _title(arms, places, metric, target)
    figure = styled(go.Figure(), said, height=480, hovermode="closest")
    for index, arm in enumerate(arms):
        look = {"dash": DASHES[index // len(COLOURS) % len(DASHES)]}
        _draw_arm(figure, arm, COLOURS[index % len(COLOURS)], look)
    if target is not None:
        _draw_target(figure, arms, places, target)
    figure.update_xaxes(title_text="optimizer step", rangemode="tozero")
    better = "higher" if maximise else "lower"
    figure.update_yaxes(title_text=f"{html.escape(metric)} ({better} is better)")
    return subtitled(figure, f"{_others(arms, places)}{_seeds(arms)}.")


def _title(arms: Sequence[Arm], places: dict[str, float], metric: str, target: float | None) -> str:
    if target is None:
        return f"{capitalised(metric)} over optimizer steps"
    first, name = places[arms[0].name], arms[0].name
    if not math.isfinite(first):
        return f"{name} does not reach {number(target)}"
    return f"{name} reaches {number(target)} in {first:,.0f} steps"


def _others(arms: Sequence[Arm], places: dict[str, float]) -> str:
    """When the fastest of the other arms is there."""
    first, *others = [places[arm.name] for arm in arms if arm.name in places] or [math.inf]
    if not others or not math.isfinite(first):
        return ""
    if not math.isfinite(least := min(others)):
        return "The others never do. "
    name = next(arm.name for arm in arms[1:] if places[arm.name] == least)
    return (
        f"The fastest of the others, {name}: {least:,.0f} ({number(least / first, 2)} × as many). "
    )


def _seeds(arms: Sequence[Arm]) -> str:
    counts = sorted({len(arm.values) for arm in arms})
    if counts == [1]:
        return "One seed each"
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds and their median"


def _draw_arm(figure: go.Figure, arm: Arm, colour: str, look: dict[str, Any]) -> None:
    name = html.escape(arm.name)
    place = {"legendgroup": name}
    steps = [*arm.steps, None]
    if len(arm.values) > 1:
        x = steps * len(arm.values)
        y = [
            v if v is not None and math.isfinite(v) else None
            for r in arm.values
            for v in (*r, None)
        ]
        thin = {"line": {"width": 1, **look}, "opacity": 0.4, "hoverinfo": "skip"}
        add_line(figure, x[:-1], y[:-1], name, colour, showlegend=False, **thin, **place)
    medians = [value if math.isfinite(value) else None for value in median_curve(arm)]
    hover = f"{name}<br>step %{{x:,}}: %{{y:.4g}}<extra></extra>"
    add_line(figure, arm.steps, medians, name, colour, line=look, hovertemplate=hover, **place)


def _draw_target(
    figure: go.Figure, arms: Sequence[Arm], places: dict[str, float], target: float
) -> None:
    line, text = {"color": GREY, "dash": "dash", "width": 1.5}, f"target {number(target)}"
    look = {"annotation_text": text, "annotation_position": "bottom left"}
    figure.add_hline(y=target, line=line, annotation_font={"size": 12, "color": GREY}, **look)
    for arm, colour in zip(arms, COLOURS * len(arms), strict=False):
        step = places[arm.name]
        if math.isfinite(step):
            text = (
                f"<b>{html.escape(arm.name)}</b> reaches {number(target)} after {step:,.0f} steps"
            )
            drawn = {"text": [text], "showlegend": False, "legendgroup": html.escape(arm.name)}
            add_marks(figure, [step], [target], "reached", mark("diamond", colour, 12), **drawn)


# -- studies against each other --------------------------------------------------------------------


def histories_figure(summaries: Sequence[Summary]) -> go.Figure:
    """Best single run so far of each study against what it had spent, and its best on fresh seeds.

    Args:
        summaries: Studies of one direction and one objective each, whose values compare.
    """
    shown = [(s, best_so_far(s.runs, minimises(s))) for s in summaries]
    if not any(steps for _, steps in shown):
        return empty("Searches against each other", "no finished full cycle yet")
    figure = styled(go.Figure(), "Best so far of each study, by what it had spent", height=460)
    values: list[float] = []
    for (summary, steps), colour in zip(shown, COLOURS * len(shown), strict=False):
        if steps:
            _draw_history(figure, summary, steps, colour)
            values += [steps[-1][1], *_draw_best(figure, summary, colour)]
    firsts = [steps[0][1] for _, steps in shown if steps]
    figure.update_xaxes(title_text="spent so far (full cycles)", rangemode="tozero")
    costs = [s.cost.cycles for s, steps in shown if steps]
    if max(costs) > UNLIKE * min(costs):
        ticks = log_ticks(min(steps[0][0] for _, steps in shown if steps), max(costs), 8)
        figure.update_xaxes(title_text="spent so far (full cycles, log scale)", **ticks)
    better = "lower" if minimises(summaries[0]) else "higher"
    wanted = robust_range([*firsts, *values], values)
    figure.update_yaxes(title_text=f"value ({better} is better)", range=wanted)
    return subtitled(figure, HISTORIES)


def _draw_history(
    figure: go.Figure, summary: Summary, steps: Sequence[tuple[float, float]], colour: str
) -> None:
    name = shortened(summary.name, 40)
    x, y = zip(*steps, (summary.cost.cycles, steps[-1][1]), strict=True)
    hover = f"{name}<br>%{{y:.4g}} after %{{x:.3g}} full cycles<extra></extra>"
    step = {"shape": "hv", "width": 2.5}
    add_line(figure, x, y, name, colour, line=step, legendgroup=name, hovertemplate=hover)


def _draw_best(figure: go.Figure, summary: Summary, colour: str) -> list[float]:
    """The best recipe on fresh seeds, right of the line; returns the ends of its bar."""
    best = summary.best
    if best is None or not best.fresh or not math.isfinite(best.mean):
        return []
    spread, name = best.spread or 0.0, shortened(summary.name, 40)
    text = f"<b>{name}</b>: {mean_and_spread(best)}<br>trial {best.number}, {best.seeds} seeds"
    bar = {"type": "data", "array": [spread], "color": colour, "thickness": 2}
    drawn = {"text": [text], "error_y": bar, "legendgroup": name, "showlegend": False}
    at = [1.02 * summary.cost.cycles]
    add_marks(figure, at, [best.mean], "fresh seeds", mark("square", colour, 11), **drawn)
    return [best.mean - spread, best.mean + spread]
