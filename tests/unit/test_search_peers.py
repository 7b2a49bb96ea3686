"""Search methods of other packages: what a race sees of them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from hpsched.errors import UsageError
from studies.bench.methods import EXPERT, METHODS
from studies.bench.race import Race, scored
from studies.bench.search_peers import PACKAGES, PEERS, Unsearched, default
from studies.bench.tasks import TASKS

TASK = TASKS["digits-mlp-sgd@100"]
SEARCHES = ["neps-priorband", "smac-expert", "smac-hyperband-expert"]
CONTROLS = ["prodigy", "schedule-free"]
BENCH = Path(__file__).parents[2] / "studies" / "bench"

bench = pytest.mark.bench


def run(name: str, task: str = TASK.name, budget: float = 1.5) -> Race:
    race = Race(TASKS[task], 0, budget)
    PEERS[name](race)
    return race


# ------------------------------------------------------------------ with the packages


@bench
@pytest.mark.parametrize("name", SEARCHES)
def test_search_names_recipes_in_range_and_pays(name: str) -> None:
    race = run(name)
    assert 1.5 <= race.cost <= 2.5
    assert [cost for cost, _, _ in race.named] == sorted(cost for cost, _, _ in race.named)
    for _, _, recipe in race.named:
        assert recipe.keys() == EXPERT["sgd"].keys()
        for field, (low, high, _) in EXPERT["sgd"].items():
            assert low <= recipe[field] <= high, field
    assert torch.get_default_dtype() is torch.float32


@bench
@pytest.mark.parametrize("name", ["neps-priorband", "smac-expert"])
def test_search_repeats_with_its_seed(name: str) -> None:
    assert run(name).named == run(name).named


@bench
def test_priorband_trains_complete_cycles_of_three_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    train = Race.train
    monkeypatch.setattr(
        Race, "train", lambda race, recipe, share: lengths.append(share) or train(race, recipe)
    )
    run("neps-priorband", budget=14)
    assert lengths[:13] == [1 / 9] * 9 + [1 / 3] * 3 + [1.0]


@bench
@pytest.mark.parametrize("name", SEARCHES)
def test_search_outlives_runs_that_diverge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mostly_diverging(race: Race, recipe: object, **options: object) -> float:
        race.runs += 1
        race.spent += race.task.total_steps
        return 0.5 if race.runs % 3 == 0 else float("inf")

    monkeypatch.setattr(Race, "train", mostly_diverging)
    race = run(name, budget=14)
    assert race.runs == 14
    assert race.named


@bench
@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("task", [TASK.name, "friedman-bnmlp-adamw@200"])
def test_control_is_one_run_and_learns(name: str, task: str) -> None:
    race = run(name, task)
    assert (race.cost, race.runs, len(race.named)) == (1.0, 1, 1)
    assert isinstance(race.task, Unsearched)
    cost, _, recipe = race.named[0]
    (score,) = scored(race.task, recipe, range(7, 8))
    assert cost == 1.0
    assert score < 0.2


@bench
def test_versions() -> None:
    files = (BENCH / f"requirements-search{part}.txt" for part in ("", "-no-deps"))
    lines = (line for file in files for line in file.read_text().splitlines())
    pins = {r.name: r for line in lines if line and line[0] != "#" and (r := Requirement(line))}
    assert pins.keys() >= set(PACKAGES.values())
    for name, pin in pins.items():
        assert version(name) in pin.specifier, name


# ------------------------------------------------------------------ without the packages


def test_names() -> None:
    assert PEERS.keys() == PACKAGES.keys()
    assert not PEERS.keys() & METHODS.keys()


def test_defaults_lie_in_the_experts_ranges() -> None:
    for task in TASKS.values():
        recipe = default(task)
        for field, (low, high, _) in EXPERT[task.optimizer].items():
            assert low <= recipe[field] <= high, (task.name, field)


@pytest.mark.parametrize("name", PEERS)
def test_one_worker(name: str) -> None:
    with pytest.raises(UsageError, match="2 workers"):
        PEERS[name](Race(TASK, 0, 2.0, workers=2))


def test_peers_are_imported_only_when_called() -> None:
    program = (
        "import sys; import studies.bench.search_peers; "
        "sys.exit(bool({'neps', 'smac', 'prodigyopt', 'schedulefree'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=BENCH.parents[1]).returncode == 0


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("neps-priorband", "neps"),
        ("smac-expert", "smac"),
        ("prodigy", "prodigyopt"),
        ("schedule-free", "schedulefree"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"requirements-search\.txt"):
        run(name)
