"""What counts as an objective before it is ever called."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsched.errors import ObjectiveError
from hpsched.objective import load_objective

SOURCE = """
import functools

def with_data(function):
    @functools.wraps(function)
    def wrapper(trial):
        return function(trial, 3)
    return wrapper

@with_data
def wrapped(trial, data):
    return data

class Objective:
    def __call__(self, trial, scale=1.0, *, seed=0):
        return scale

called = Objective()
partial = functools.partial(lambda trial, data: data, data=3)
any_of_them = lambda *args, **kwargs: 3
built_in = max
nothing = lambda: 3
more = lambda trial, data: 3
by_name = lambda *, trial: 3
more_by_name = lambda trial, *, data: 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "objectives_called_so.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("name", ["wrapped", "called", "partial", "any_of_them", "built_in"])
def test_what_takes_a_trial_is_an_objective(source: Path, name: str) -> None:
    assert callable(load_objective(f"{source}:{name}"))


@pytest.mark.parametrize("name", ["nothing", "more", "by_name", "more_by_name"])
def test_what_cannot_be_called_with_a_trial_alone_is_none(source: Path, name: str) -> None:
    with pytest.raises(ObjectiveError, match=r"with a trial alone .* `def objective\(trial\):`"):
        load_objective(f"{source}:{name}")
