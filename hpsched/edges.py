"""Where the best recipe lies at an end of what was searched: better ones may lie beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from optuna.study import StudyDirection

from hpsched.coordinates import Coordinates
from hpsched.ledger import Best, Run
from hpsched.present import number, rate_text
from hpsched.records import RecipeSpace
from hpsched.search import Search, of_study

#: A rate this near to an end of its range, as a factor, is at the end.
AT_END = 1.05
#: So is a weight decay or momentum this near, as a share of the range.
NEAR_END = 0.01
#: What such an end must be expected to gain over the range's middle, in noise between seeds, to be
#: worth a word. Proposals are cut off at the ends, so half of all studies name a momentum there; of
#: 28 momenta that did not matter in simulated studies, three were expected to gain as much.
GAIN = 0.75


def warnings(
    runs: Sequence[Run],
    directions: Sequence[StudyDirection],
    windows: Mapping[str, Coordinates],
    named: Best,
) -> Iterator[str]:
    """What to widen, and how, of the recipe that the study names as best.

    Args:
        runs: All trials.
        directions: The study's.
        windows: Context → where max_lr is searched.
        named: The best recipe.
    """
    space = next((run.recipe for run in runs if run.trial.number == named.number), None)
    if space is None:
        return
    if space.context_key in windows and "max_lr" in space.space:
        yield from _of_max_lr(space, windows[space.context_key], named)
    known = of_study([run.trial for run in runs], directions, space)
    if known is not None:
        yield from _of_others(space, known, named)


def _of_max_lr(space: RecipeSpace, where: Coordinates, named: Best) -> Iterator[str]:
    rate, (low, high, _) = named.recipe["max_lr"], space.space["max_lr"]
    if not low * AT_END < rate < high / AT_END:
        yield _at_end("max_lr", rate, low, high)
    elif where.evidence is not None:
        found = where.evidence.proposal
        meets = max(found.low, low) < min(found.high, high)  # else the whole range is searched
        if meets and (where.window[0] < found.low or where.window[1] > found.high):
            yield (
                f"good trials lie on the edge of max_lr's window ({_span(found.low, found.high)}): "
                f"widened to {_span(*where.window)}"
            )


def _of_others(space: RecipeSpace, known: Search, named: Best) -> Iterator[str]:
    """Of weight decay and, where the optimizer has one, momentum."""
    where = known.axes.where
    moving = () if where.momentum_name == "none" else ("base_momentum", "max_momentum")
    for field in ("weight_decay", *moving):
        if field not in known.axes.fields:
            continue
        low, high, _ = where.space_of(field)
        # Left to us, weight decay is searched in units of ours, from next to nothing on.
        ours = (low, high) != space.space[field][:2]
        share, gain = _place(known, named, field)
        beyond = share > 1 - NEAR_END or (share < NEAR_END and low > 0 and not ours)
        if beyond and gain >= GAIN:
            value = named.recipe[field]
            yield _at_default_end(value) if ours else _at_end(field, value, low, high)


def _place(known: Search, named: Best, field: str) -> tuple[float, float]:
    """Where in its range a value of the best lies, 0 to 1, and what it gains over the middle.

    The gain is what is expected of this field alone, in noise between seeds.
    """
    where = known.axes.where
    best, name = where.to_search(named.params), where.recipe.name(field)
    if best is None or known.belief is None:
        return 0.5, 0.0
    low, high, log = where.space_of(field)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    ends = [{**best, name: value} for value in (low, middle, high)]
    there, *across = known.axes.places([best, *ends])
    at = known.axes.fields.index(field)
    bottom, centre, top = (place[at] for place in across)
    # Not the place of the other recipe: that of its rate depends on the momentum, too.
    places = np.array([there, (*there[:at], centre, *there[at + 1 :])])
    mean, _ = known.belief(places - (known.axes.shift() if known.overfits else 0.0))
    gain = float(mean[1] - mean[0]) / known.belief.noise
    return (there[at] - bottom) / (top - bottom), gain


def _at_end(field: str, value: float, low: float, high: float) -> str:
    text = number if field.endswith("momentum") else rate_text
    return (
        f"the best {field} ({text(value)}) lies at the end of its range ({text(low)} to "
        f"{text(high)}): give suggest_onecycle a wider {field}, in a new study"
    )


def _at_default_end(weight_decay: float) -> str:
    further = f"weight_decay=({rate_text(weight_decay / 100)}, {rate_text(10 * weight_decay)})"
    return (
        f"the best weight_decay ({rate_text(weight_decay)}) lies at the upper end of what is "
        f"searched by default: give suggest_onecycle a range of its own, such as {further}, in a "
        "new study"
    )


def _span(low: float, high: float) -> str:
    return f"{rate_text(low)} to {rate_text(high)}"
