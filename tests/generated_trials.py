"""Hypothesis strategies for trials as Optuna may store them, and what makes two of them equal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


def unsigned(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[float]:
    """Without -0.0, which comes back as 0.0 from a column of SQLite."""
    return numbers.map(lambda number: number + 0.0)


FINITE = unsigned(st.floats(allow_nan=False, allow_infinity=False))
NUMBERS = unsigned(st.floats(allow_nan=False))  # a value may be infinite
TEXT = st.text(max_size=12)
# MySQL takes names for one that differ in case, accents or spaces at the end only.
KEYS = st.sampled_from(["a", "b", "$float", "c:d/e", "größe", "学習率", "constraints", "😀"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.just("$float") | TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
ATTRS = st.dictionaries(KEYS, JSON, max_size=4)
# Not a time that the clocks show twice, nor one before computers did.
TIMES = st.datetimes(datetime(1990, 1, 1), datetime(2037, 12, 31)).filter(lambda t: t.hour > 4)
CHOICES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | TEXT


def _is_one_of(value: Any, others: Iterable[Any]) -> bool:
    return any(value == other or (value != value and other != other) for other in others)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Any, BaseDistribution]:
    """A value and the distribution that it is from."""
    kind = draw(st.sampled_from(["float", "log", "step", "int", "categorical"]))
    if kind == "int":
        low, value, high = sorted(draw(st.tuples(*3 * [st.integers(-(2**31), 2**31)])))
        return value, IntDistribution(low, high)
    if kind == "log":
        low, value, high = sorted(draw(st.tuples(*3 * [st.floats(1e-12, 1e12)])))
        return value, FloatDistribution(low, high, log=True)
    if kind == "step":
        steps = draw(st.integers(0, 20))
        return 0.5 + 0.25 * steps, FloatDistribution(0.5, 5.5, step=0.25)
    if kind == "float":
        low, value, high = sorted(draw(st.tuples(*3 * [FINITE])))
        return value, FloatDistribution(low, high)
    choices: list[Any] = []
    for choice in draw(st.lists(CHOICES, min_size=1, max_size=4)):
        if not _is_one_of(choice, choices):  # Optuna would store the first of two equal ones
            choices.append(choice)
    return draw(st.sampled_from(choices)), CategoricalDistribution(choices)


@st.composite
def trials(draw: st.DrawFn, objectives: int = 1) -> FrozenTrial:
    state = draw(st.sampled_from(TrialState))
    values = None
    if state == TrialState.COMPLETE or (state == TrialState.PRUNED and draw(st.booleans())):
        values = draw(st.lists(NUMBERS, min_size=objectives, max_size=objectives))
    # By name, one kind each: Optuna refuses a parameter that is now a number, now a category.
    names = draw(st.lists(KEYS, max_size=3, unique=True))
    found = {f"{name}{draw(st.integers(0, 10**9))}": draw(parameters()) for name in names}
    return FrozenTrial(
        number=0,
        state=state,
        value=None,
        values=values,
        datetime_start=None if state == TrialState.WAITING else draw(TIMES),
        datetime_complete=draw(TIMES) if state.is_finished() else None,
        params={name: value for name, (value, _) in found.items()},
        distributions={name: space for name, (_, space) in found.items()},
        user_attrs=draw(ATTRS),
        system_attrs=draw(ATTRS),
        intermediate_values=draw(
            st.dictionaries(st.integers(0, 2**31 - 1), unsigned(st.floats()), max_size=4)
        ),
        trial_id=-1,
    )


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """Directions, trials, user and system attributes."""
    directions = draw(
        st.lists(
            st.sampled_from([StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]),
            min_size=1,
            max_size=3,
        )
    )
    return {
        "directions": directions,
        "trials": draw(st.lists(trials(len(directions)), max_size=4)),
        "user_attrs": draw(ATTRS),
        "system_attrs": draw(ATTRS),
    }


def plain(value: Any) -> Any:
    """``value`` so that == tells nan from other numbers, -0.0 from 0.0, True from 1, 1 from 1.0."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return (type(value).__name__, repr(value))


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """Everything of a trial but its id, comparable; times to the microsecond."""
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": plain(trial.values),
        "params": list(plain(trial.params).items()),
        "distributions": [(n, repr(space)) for n, space in trial.distributions.items()],
        "intermediate": plain(trial.intermediate_values),
        "user_attrs": plain(trial.user_attrs),
        "system_attrs": plain(trial.system_attrs),
        "times": (trial.datetime_start, trial.datetime_complete),
    }
