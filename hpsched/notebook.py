"""What range tests, recipes and studies look like in a notebook: small tables with a drawing.

Plain HTML and SVG in the notebook's own colours, light or dark: no script, nothing to load, so that
it also shows where notebooks are only read. The interactive figures are ``.figure()``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hpsched import records
from hpsched.present import duration, mean_and_spread, number, rate_text

if TYPE_CHECKING:
    from hpsched.ledger import Best, Candidate
    from hpsched.lr_curve import RangeTest
    from hpsched.suggest import OneCycle
    from hpsched.summary import Summary
    from hpsched.weight_decay import RangeTests

WIDTH, HEIGHT = 320, 110  # of a drawing, in pixels
POINTS = 160  # of a drawn curve, at most
BLUE, ORANGE, GREEN = "#2e86c8", "#d98a1f", "#2b9d78"  # legible on white and on black
Curve = tuple[Sequence[float], Sequence[float]]


# -- what is shown ---------------------------------------------------------------------------------


def range_test_html(test: RangeTest) -> str:
    """A learning-rate range test: what it says, and its curve."""
    rows = {
        "max_lr": rate_text(test.suggestion),
        "window": _window(test.window),
        "diverges at": rate_text(test.lr_diverged),
        "reliable": "yes" if test.reliable else "no",
        "why": test.reason,
        "steps": f"{len(test.losses)} of {len(test.lrs)}",
    }
    return _card("Learning-rate range test", rows, _loss_drawing([test], test.window))


def range_tests_html(tests: RangeTests) -> str:
    """Several range tests: what they say together, by weight decay, and their curves."""
    found = tests.proposal
    rows = {
        "max_lr": rate_text(found.centre) if found.reliable else "no clear answer",
        "window": _window((found.low, found.high)),
        "weight decay": rate_text(tests.weight_decay),
        "why": f"{found.reason}; {tests.reason}" if len(tests.by_weight_decay) > 1
        else found.reason,
    }  # fmt: skip
    heads = ["weight decay", "sweeps", "suggest", "diverge at"]
    by_decay = [
        [
            rate_text(decay),
            str(len(some)),
            ", ".join(rate_text(t.suggestion) for t in some),
            ", ".join(rate_text(t.lr_diverged) for t in some),
        ]
        for decay, some in tests.by_weight_decay.items()
    ]
    drawing = _loss_drawing(tests.tests, (found.low, found.high))
    return _card("Learning-rate range tests", rows, drawing, _table(heads, by_decay))


def one_cycle_html(recipe: OneCycle) -> str:
    """A recipe: its values as far as they are known, and its schedule.

    Showing it draws nothing: in a running trial the values not yet read are not suggested.
    """
    values = recipe.known()
    rows = {name: _value(value) for name, value in values.items()}
    missing = "The rest is suggested when it is first read, or by run()."
    note = "" if set(records.FIELDS) <= set(values) else missing
    return _card("One-cycle recipe", rows, _cycle_drawing(values), note)


def best_html(best: Best) -> str:
    """The recipe that a study names as best: how good, how sure, its values and its schedule."""
    sure = {None: "not known: too few seeds", True: "significant at 5 %", False: "not significant"}
    up = best.runner_up
    rows = {
        "value": _over_seeds(best),
        "trial": str(best.number),
        **({"runner-up": f"trial {up.number}: {_over_seeds(up)}"} if up else {}),
        **({"difference": sure[best.significant]} if up else {}),
        **{name: _value(best.recipe[name]) for name in (*records.FIELDS, "final_div_factor")},
        "policy": best.policy,
        **{name: _value(value) for name, value in best.own.items()},
    }
    drawn = {**best.recipe, "policy": best.policy}
    return _card("Best recipe", rows, _cycle_drawing(drawn, best.total_steps), best.hint)


def summary_html(summary: Summary) -> str:
    """A study at a glance: the answer, costs, warnings, and the best value over what was spent."""
    from hpsched.report_content import headline, status

    window = [w.window for w in summary.windows.values()]
    rows = {
        "study": summary.name,
        "answer": headline(summary),
        "so far": status(summary),
        "spent": f"{number(summary.cost.cycles)} full cycles, {summary.cost.steps:,} steps, "
        f"{duration(summary.cost.seconds)} of training",
        **({"max_lr": _window(window[0])} if len(window) == 1 else {}),
        **{f"warning {i}": text for i, text in enumerate(summary.warnings, 1)},
        **({"next": summary.next_command} if summary.next_command else {}),
    }
    return _card("Study", rows, _history_drawing(summary))


# -- parts -----------------------------------------------------------------------------------------


def _card(title: str, rows: Mapping[str, str], drawing: str, below: str = "") -> str:
    """A table of names and values with a drawing beside it; ``below`` is HTML of ours or text."""
    cells = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:600;white-space:nowrap">{_text(name)}</th>'
        f'<td style="{_CELL};overflow-wrap:anywhere">{_text(value)}</td></tr>'
        for name, value in rows.items()
    )
    under = below if below.startswith("<table") else f"<div>{_text(below)}</div>" if below else ""
    return (
        '<div style="max-width:72em">'
        f'<div style="font-weight:600;margin:.2em 0">{_text(title)}</div>'
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
        f'<table style="border-collapse:collapse;max-width:36em;min-width:0;{_PLAIN}">{cells}'
        f"</table>{drawing}"
        f"</div>{under}</div>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col" style="{_CELL};font-weight:600">{_text(h)}</th>' for h in heads)
    body = "".join(
        f"<tr>{''.join(f'<td style={chr(34)}{_CELL}{chr(34)}>{_text(c)}</td>' for c in row)}</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse;{_PLAIN}"><tr>{top}</tr>{body}</table>'


_PLAIN = "background:transparent;color:inherit;margin:.2em 0"
_CELL = (
    "text-align:left;vertical-align:top;padding:.15em .8em .15em 0;background:transparent;"
    "border:0;border-bottom:1px solid rgba(128,128,128,.35);color:inherit"
)


def _text(value: str) -> str:
    return html.escape(str(value))


def _value(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)


def _window(ends: tuple[float, float] | None) -> str:
    return "–" if ends is None else f"{rate_text(ends[0])} to {rate_text(ends[1])}"


def _over_seeds(found: Candidate) -> str:
    kind = "fresh seed" if found.fresh else "seed, not confirmed"
    return f"{mean_and_spread(found)} ({found.seeds} {kind}{'s' * (found.seeds > 1)})"


# -- drawings --------------------------------------------------------------------------------------


def _loss_drawing(tests: Sequence[RangeTest], window: tuple[float, float] | None) -> str:
    """Smoothed losses over log rate, to a little past divergence, and the window."""
    curves = []
    for test in tests[:12]:
        stop = 1.5 * (test.lr_diverged or math.inf)
        pairs = zip(test.lrs, test.smoothed.tolist(), strict=False)
        known = [(lr, loss) for lr, loss in pairs if lr <= stop]
        if len(known) > 1:
            curves.append(([math.log10(lr) for lr, _ in known], [loss for _, loss in known]))
    if not curves:
        return ""
    first, last = min(x[0] for x, _ in curves), max(x[-1] for x, _ in curves)
    shade = None if window is None else (math.log10(window[0]), math.log10(window[1]))
    ends = (rate_text(10**first), rate_text(10**last))
    return _drawing("loss over learning rate (log scale)", curves, ends, shade=shade)


def _cycle_drawing(values: Mapping[str, Any], total_steps: int | None = None) -> str:
    """Learning rate and momentum over the steps of a run, each on a scale of its own."""
    from hpsched import schedules

    needed = ("max_lr", "div_factor", "pct_start", "base_momentum", "max_momentum")
    if not all(name in values for name in needed):
        return ""
    steps = total_steps or 1000
    made = schedules.follow(
        steps,
        **{name: values[name] for name in (*needed, "final_div_factor")},
        policy=values["policy"],
    )
    places = sorted({round(i * (steps - 1) / POINTS) for i in range(POINTS + 1)})
    curves = [(places, [schedule(step) for step in places]) for schedule in made]
    ends = ("step 0", f"{steps - 1:,}" if total_steps else "the last")
    return _drawing("learning rate (blue) and momentum (orange)", curves, ends, apart=True)


def _history_drawing(summary: Summary) -> str:
    """The best single run over what was spent."""
    from hpsched.ledger import best_so_far

    points = best_so_far(summary.runs, summary.direction == "minimize")
    if not points:
        return ""
    corners = [points[0]]
    for (_, before), (spent, value) in pairwise(points):
        corners += [(spent, before), (spent, value)]
    corners.append((max(summary.cost.cycles, points[-1][0]), points[-1][1]))
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    ends = (f"{number(xs[0])} cycles", number(xs[-1]))
    better = "lower" if summary.direction == "minimize" else "higher"
    return _drawing(
        f"best single run over full cycles spent ({better} is better)", [(xs, ys)], ends
    )


def _drawing(
    title: str,
    curves: Sequence[Curve],
    ends: tuple[str, str],
    *,
    shade: tuple[float, float] | None = None,
    apart: bool = False,
) -> str:
    """Curves over one axis as SVG; ``apart``: each on its own scale of values."""
    left = min(min(x) for x, _ in curves)
    right = max(max(x) for x, _ in curves)
    every = [y for _, ys in curves for y in ys]
    box = ""
    if shade is not None:
        a, b = (min(max(_place(v, left, right), 0), WIDTH) for v in shade)
        box = (
            f'<rect x="{a:.1f}" y="0" width="{b - a:.1f}" height="{HEIGHT}" fill="{GREEN}" '
            'fill-opacity=".2"/>'
        )
    colours = (BLUE, ORANGE) if apart else (BLUE,)
    lines = ""
    for index, (x, y) in enumerate(curves):
        low, high = (min(y), max(y)) if apart else (min(every), max(every))
        lines += _line(x, y, (left, right), (low, high), colours[index % len(colours)])
    label = f'font-size="11" fill="currentColor" y="{HEIGHT + 13}"'
    return (
        f'<figure style="margin:0"><svg role="img" aria-label="{_text(title)}" width="{WIDTH}" '
        f'height="{HEIGHT + 18}" viewBox="-2 -4 {WIDTH + 4} {HEIGHT + 22}" '
        f'style="max-width:100%;height:auto;color:inherit">{box}{lines}'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}" stroke="currentColor" '
        f'stroke-opacity=".4"/><text {label} x="0">{_text(ends[0])}</text>'
        f'<text {label} x="{WIDTH}" text-anchor="end">{_text(ends[1])}</text></svg>'
        f'<figcaption style="font-size:.85em;opacity:.8">{_text(title)}</figcaption></figure>'
    )


def _line(
    x: Sequence[float],
    y: Sequence[float],
    across: tuple[float, float],
    up: tuple[float, float],
    colour: str,
) -> str:
    kept = range(0, len(x), math.ceil(len(x) / POINTS))
    places = " ".join(
        f"{_place(x[i], *across):.1f},{HEIGHT - _place(y[i], *up, HEIGHT - 4) - 2:.1f}"
        for i in kept
        if math.isfinite(y[i])
    )
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def _place(value: float, low: float, high: float, size: float = WIDTH) -> float:
    return size * (value - low) / (high - low) if high > low else size / 2
