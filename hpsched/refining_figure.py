"""Complete cycles → plotly figure: what they scored at which max_lr, and what that says of it.

Top to bottom, over one axis of rates: a panel for each length of cycle, the shortest first, each
with a scale of its own (short cycles score worse, and what counts is the shape), and a strip with
the belief about the best max_lr of a full cycle, before these runs and after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from hpsched import range_test_data
from hpsched.evidence import Evidence
from hpsched.figure_style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    add_line,
    add_marks,
    empty,
    mark,
    styled,
    subtitled,
)
from hpsched.present import capitalised, number, rate_text
from hpsched.proposal import Proposal
from hpsched.rate_panels import (
    draw_bars,
    draw_rate,
    draw_window,
    scale_rates,
    stack,
    trust,
    update_axis,
)
from hpsched.refine import Belief, Run, best_rate

FULL = ("circle", BLUE)  # symbol and colour of full cycles, as in the other figures
#: Of the shorter ones, the longest first, and of any more.
LOOKS = (("diamond", ORANGE), ("square", PINK), ("triangle-up", SKY), ("pentagon", INK))
PANEL, STRIP = 120, 96  # pixels
TAIL = 0.01  # of the belief on each side that may lie off the axis
BAR = -0.2  # where the bars lie, in heights of the curve
FAINT = 0.003  # heights of the curve, from which on it is drawn
SMALL = {"size": 11}


class Length(NamedTuple):
    """The runs of one length: ``scored`` and ``diverged`` hold rates, ``values`` their results."""

    name: str
    look: tuple[str, str]
    scored: list[float]
    values: list[float]
    diverged: list[float]


def refining_figure(found: Evidence, maximise: bool = False, title: str | None = None) -> go.Figure:
    """What complete cycles scored at which max_lr, and the belief that follows.

    Args:
        found: The evidence of one context.
        maximise: Whether higher values are better.
        title: Instead of a sentence that says what one sees.
    """
    if not found.runs or found.proposal == found.prior:
        return empty(title or "Complete cycles", "no two complete cycles of one length yet")
    shown = lengths(found.runs, maximise)
    before, after = best_rate(found.prior, ()), best_rate(found.prior, found.runs)
    figure = styled(go.Figure(), title or _title(found), hovermode="closest")
    axes = stack(figure, [*[PANEL] * len(shown), STRIP])
    scale_rates(figure, *rate_range(found, after), "max_lr")
    draw_window(figure, found.proposal)
    tested = {"color": GREY, "dash": "dash"}
    draw_rate(figure, "range tests", found.prior.centre, tested, row=1)
    _explain(figure, shown, maximise)
    for length, axis in zip(shown, axes, strict=False):
        _draw_length(figure, length, axis, maximise)
    _draw_belief(figure, found.proposal, before, after, axes[-1])
    return subtitled(figure, f"{capitalised(found.proposal.reason)}.")


def _title(found: Evidence) -> str:
    window = range_test_data.span(found.proposal.low, found.proposal.high)
    return f"Complete cycles: max_lr {window}"


# ------------------------------------------------------------------ what is shown


def lengths(runs: Sequence[Run], maximise: bool = False) -> list[Length]:
    """The runs by length, the shortest first, with the values that ``train`` returned."""
    sign = -1.0 if maximise else 1.0
    short = sorted({run.share for run in runs} - {1.0}, reverse=True)
    looks = {share: LOOKS[min(at, len(LOOKS) - 1)] for at, share in enumerate(short)} | {1.0: FULL}
    found = []
    for share in sorted({run.share for run in runs}):
        same = [run for run in runs if run.share == share]
        scored = sorted(run for run in same if math.isfinite(run.score))
        rates, values = [run.max_lr for run in scored], [sign * run.score for run in scored]
        diverged = [run.max_lr for run in same if run not in scored]
        found.append(Length(length_name(share), looks[share], rates, values, diverged))
    return found


def length_name(share: float) -> str:
    """``full length``, ``1/9 of the steps``, or a percentage when it is no simple fraction."""
    parts = 1 / share
    if round(parts) == 1:
        return "full length"
    if abs(parts - round(parts)) < 0.05 * parts:
        return f"1/{round(parts)} of the steps"
    return f"{100 * share:.0f} % of the steps"


def rate_range(found: Evidence, after: Belief) -> tuple[float, float]:
    """Where a cycle ran, the belief says something, or was to be searched, and a little more."""
    ends = [rate for shown in (found.prior, found.proposal) for rate in (shown.low, shown.high)]
    ends += [run.max_lr for run in found.runs] + [after.quantile(TAIL), after.quantile(1 - TAIL)]
    room = (max(ends) / min(ends)) ** 0.03
    return min(ends) / room, max(ends) * room


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values span; anything when there are none."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.2 * (high - low) or 0.1 * abs(low) or 1.0
    return low - margin, high + margin


# ------------------------------------------------------------------ drawing


def _draw_length(figure: go.Figure, length: Length, axis: str, maximise: bool) -> None:
    """One panel: a mark for each run, and on the bad side's edge one for each that diverged."""
    symbol, colour = length.look
    low, high = value_range(length.values)
    ticks = {"nticks": 5, "showticklabels": bool(length.values), "tickfont": SMALL}
    update_axis(figure, axis, title=_small(length.name), range=[low, high], **ticks)
    place = {"yaxis": axis, "showlegend": False}
    line = {"width": 1, "dash": "dot"}
    add_line(figure, length.scored, length.values, "", colour, line=line, hoverinfo="skip", **place)
    said = [_hover(length.name, *run) for run in zip(length.scored, length.values, strict=True)]
    marker = mark(symbol, colour, 10)
    add_marks(figure, length.scored, length.values, length.name, marker, text=said, **place)
    edges = [low if maximise else high] * len(length.diverged)
    said = [_hover(length.name, rate, None) for rate in length.diverged]
    drawn = {"text": said, "cliponaxis": False, **place}
    name = f"{length.name}, diverged"
    add_marks(figure, length.diverged, edges, name, mark("x", RED, 10), **drawn)


def _small(text: str) -> dict[str, Any]:
    return {"text": text, "font": SMALL}


def _hover(name: str, rate: float, value: float | None) -> str:
    result = "diverged" if value is None else number(value, 4)
    return f"<b>{result}</b><br>max_lr {rate_text(rate)}, {name}"


def _draw_belief(
    figure: go.Figure, shown: Proposal, before: Belief, after: Belief, axis: str
) -> None:
    """The belief before the runs as a grey line, after them as a filled curve over its bars."""
    top = float(max(before.p.max(), after.p.max()))
    look = {"title": _small("best max_lr"), "showticklabels": False}
    update_axis(figure, axis, **look, range=[2 * BAR, 1.1], ticks="", showgrid=False)
    drawn: dict[str, Any] = {"yaxis": axis, "hoverinfo": "skip"}
    rates, heights = _curve(before, top)
    grey = {"width": 1.5, "dash": "dash"}
    add_line(figure, rates, heights, "belief from the range tests", GREY, line=grey, **drawn)
    rates, heights = _curve(after, top)
    drawn |= {"fill": "tozeroy", "fillcolor": f"rgba{_rgba(trust(shown), 0.3)}"}
    add_line(figure, rates, heights, "belief with these cycles", trust(shown), **drawn)
    draw_bars(figure, shown, axis, BAR)


def _curve(belief: Belief, top: float) -> tuple[list[float], list[float]]:
    seen = belief.p > FAINT * top
    return (2 ** belief.mu[seen]).tolist(), (belief.p[seen] / top).tolist()


def _rgba(colour: str, opacity: float) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), opacity)


def _explain(figure: go.Figure, shown: Sequence[Length], maximise: bool) -> None:
    """What the legend says of the marks: which values are good, and which runs diverged."""
    better = f"value ({'higher' if maximise else 'lower'} is better)"
    entries = [(better, mark("circle", GREY, 9), any(one.values for one in shown))]
    entries += [("diverged", mark("x", RED, 9), any(one.diverged for one in shown))]
    for name, marker, used in entries:
        if used:
            add_marks(figure, [None], [None], name, marker, hoverinfo="skip")
