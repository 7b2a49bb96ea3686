"""What the live page answers with: of bounded size, escaped, there at once, and honest."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optuna
import pytest
import report_studies
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

import hpsched
from hpsched import edges, records, report_figures
from hpsched.ledger import Run
from hpsched.present import rate_text
from hpsched.records import WorkerRecord
from hpsched.summary import Summary, summarise
from hpsched.web import content, snapshots
from hpsched.web.snapshots import Snapshots

HOSTILE = report_studies.HOSTILE


# -- bounded ---------------------------------------------------------------------------------------


def numbered(run: Run, number: int) -> Run:
    trial = copy.copy(run.trial)
    trial.number = number
    return dataclasses.replace(run, trial=trial)


def large(trials: int) -> Summary:
    """A summary with so many trials, made of copies of those of a real study."""
    made = report_studies.mixed()
    search = [run for run in made.runs if run.confirms is None]
    runs = tuple(numbered(search[n % len(search)], n) for n in range(trials))
    return dataclasses.replace(made, runs=runs, states={"complete": trials})


def worker(pid: int, seen: float, state: str = "running") -> WorkerRecord:
    return WorkerRecord(
        host="<b>" * 100, pid=pid, device="cuda:0", started=0.0, seen=seen, state=state
    )


@pytest.mark.parametrize("trials", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_size_does_not_grow_with_trials(trials: int) -> None:
    summary = large(trials)
    said, drawn = content.sections(summary, 0.0), content.make_figures(summary)
    assert sum(map(len, said.values())) < 30_000
    assert sum(len(figure.json) for figure in drawn) < 1_500_000
    slices = next(figure for figure in drawn if figure.id == "slice")
    assert "Shown: 300 of " in slices.note
    best = report_studies.mixed().best
    assert best and f"trial {best.number}:" in slices.json
    assert not any("b>" in json.dumps(json.loads(figure.json)) for figure in drawn)


def test_the_size_does_not_grow_with_workers_warnings_and_contexts() -> None:
    made = report_studies.mixed()
    workers = {str(n): worker(n, seen=n, state="stopped" if n % 2 else "idle") for n in range(4000)}
    live = {key: one for key, one in workers.items() if one.seen > 3_940 and one.state == "idle"}
    summary = dataclasses.replace(
        made, workers=workers, live=live, warnings=tuple(["<i>" * 1000] * 5000)
    )
    said = content.sections(summary, now=4_000.0)
    assert sum(map(len, said.values())) < 80_000
    assert said["workers"].count("<tr") - 1 == content.WORKERS + content.ENDED
    assert f"and {4000 - content.WORKERS - content.ENDED} more" in said["workers"]
    assert said["workers"].count('<span class="pill bad">gone</span>') == content.WORKERS - 29
    assert said["notes"].count("&lt;i&gt;&lt;i&gt;…</li>") == content.NOTES
    assert "and 4988 more" in said["notes"]
    sweeps = [run for run in made.runs if run.sweep]
    many = [in_context(numbered(sweeps[0], n), f"context {n}") for n in range(40)]
    drawn = content.make_figures(dataclasses.replace(made, runs=tuple(many)))
    assert sum(figure.id.startswith("range-test") for figure in drawn) == report_figures.CONTEXTS


def in_context(run: Run, name: str) -> Run:
    assert run.sweep
    sweep = dataclasses.replace(run.sweep, name=name, context_key=name)
    trial = copy.copy(run.trial)
    trial.user_attrs = {**trial.user_attrs, records.RANGE_TEST: sweep.to_json()}
    return dataclasses.replace(run, trial=trial, sweep=sweep)


# -- what a study's page says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [report_studies.mixed, report_studies.empty, report_studies.confirmed]
)
def test_nothing_that_others_wrote_becomes_markup(make: Callable[[], Summary]) -> None:
    made = make()
    said = [*content.sections(made, 0.0).values(), content.card(3, HOSTILE, made, HOSTILE)]
    for text in said:
        assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;" in said[-1]


def test_the_answer_comes_first() -> None:
    made = report_studies.confirmed()
    said = content.sections(made, 0.0)
    assert made.best is not None
    assert f"{made.best.mean:.4f} ± " in said["answer"] and "2 fresh seeds" in said["answer"]
    assert "OneCycleLR" in said["recipe"] and "either will do" in said["recipe"]
    assert "full cycles" in said["costs"] and "of device time" in said["costs"]
    assert [figure.group for figure in content.make_figures(made)] == [
        *["range-test", "range-test", "schedule", "search", "search", "space", "curves"]
    ]


def state(made: Summary, **changes: Any) -> content.State:
    return content.state_of(dataclasses.replace(made, **changes))


def test_the_state_says_what_to_do() -> None:
    made, some = report_studies.confirmed(), {"a": worker(1, 0.0)}
    assert made.settings is None
    assert state(made).word == "standing still"
    ours = records.Settings(objective="a:b", seed=0, cycles=9.0)
    assert state(made, settings=ours, progress=1.0).word == "finished"
    assert state(made, settings=ours, progress=1.0, best=None).word == "budget spent"
    assert state(made, settings=ours, progress=0.4).word == "no worker"
    assert state(made, settings=ours, progress=0.4, live=some).word == "searching"
    paused = {"a": worker(1, 0.0, "paused")}
    assert state(made, settings=ours, progress=0.4, live=paused).word == "paused"
    assert state(made, settings=ours, progress=0.0, runs=()).word == "not started"
    single = report_studies.maximised()
    assert state(single, settings=ours, progress=1.0).word == "not confirmed"


# -- snapshots -------------------------------------------------------------------------------------


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.01)
    return found


class Watched(InMemoryStorage):
    """Optuna's storage, which counts who reads it, and can be made slow."""

    def __init__(self) -> None:
        super().__init__()
        self.lists, self.readings, self.reading, self.most = 0, 0, 0, 0
        self.open = threading.Event()
        self.open.set()

    def get_all_studies(self) -> Any:
        self.open.wait()
        self.lists += 1
        return super().get_all_studies()

    def get_all_trials(self, *args: Any, **more: Any) -> list[FrozenTrial]:
        self.reading += 1
        self.most = max(self.most, self.reading)
        self.readings += 1
        time.sleep(0.001)
        found = super().get_all_trials(*args, **more)
        self.reading -= 1
        return found


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(snapshots, "PACE", 0.02)
    monkeypatch.setattr(snapshots, "LISTED_PACE", 0.02)
    return Watched()


@pytest.fixture
def kept(storage: Watched) -> Iterator[Snapshots]:
    made = Snapshots(storage)
    yield made
    storage.open.set()
    made.close()


def data(kept: Snapshots, study: optuna.Study) -> dict[str, Any]:
    """What the page of a study is told, once there is something."""

    def told() -> dict[str, Any] | None:
        answer = kept.study(study._study_id)
        there = answer and (answer.data["sections"] or answer.data["problem"])
        return answer.data if answer and there else None

    return dict(until(told))


def copied(made: Summary, storage: InMemoryStorage, **more: Any) -> optuna.Study:
    study = optuna.create_study(study_name=made.name, storage=storage, **more)
    study.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
    return study


def test_an_answer_is_there_before_the_database_is(storage: Watched, kept: Snapshots) -> None:
    study = copied(report_studies.confirmed(), storage)
    storage.open.clear()
    assert kept.studies().data["reading"]
    first = kept.study(study._study_id)
    assert first and first.data["reading"] and first.age is None
    storage.open.set()
    assert "± " in data(kept, study)["sections"]["answer"]
    answer = kept.study(study._study_id)
    assert answer and answer.age is not None and answer.taken is not None
    assert abs(answer.taken - time.time()) < 3600


@pytest.mark.parametrize(
    "make",
    [
        lambda storage: optuna.create_study(study_name=HOSTILE, storage=storage),
        lambda storage: copied(report_studies.mixed(), storage),
        lambda storage: plain(storage),
        lambda storage: plain(storage, directions=["minimize", "maximize"]),
    ],
    ids=["empty", "no settings", "plain Optuna", "two objectives"],
)
def test_any_study_has_a_page(
    storage: Watched, kept: Snapshots, make: Callable[[Watched], optuna.Study]
) -> None:
    study = make(storage)
    told = data(kept, study)
    assert told["problem"] == "" and told["name"] == study.study_name
    assert told["sections"]["answer"] and told["sections"]["next_step"]
    card = until(lambda: next(iter(kept.studies().data["cards"])))
    assert "<script" not in card
    json.dumps(told, allow_nan=False)


def plain(storage: Watched, **more: Any) -> optuna.Study:
    study = optuna.create_study(study_name="plain", storage=storage, **more)
    wanted = len(study.directions)
    study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * wanted, n_trials=3)
    return study


def test_a_study_that_cannot_be_read_says_so_and_others_go_on(
    storage: Watched, kept: Snapshots
) -> None:
    broken = optuna.create_study(study_name="broken", storage=storage)
    broken.set_user_attr(records.SETTINGS, {"objective": 7})
    good = copied(report_studies.confirmed(), storage)
    told = data(kept, broken)
    assert "does not hold a readable Settings" in told["problem"] and not told["sections"]
    assert data(kept, good)["problem"] == ""
    until(lambda: any("readable Settings" in card for card in kept.studies().data["cards"]))


def test_a_deleted_study_vanishes(storage: Watched, kept: Snapshots) -> None:
    study, other = plain(storage), copied(report_studies.confirmed(), storage)
    data(kept, study)
    optuna.delete_study(study_name="plain", storage=storage)
    until(lambda: kept.study(study._study_id) is None)
    assert data(kept, other)["sections"]
    until(lambda: len(kept.studies().data["cards"]) == 1)


def test_what_changes_shows(storage: Watched, kept: Snapshots) -> None:
    study = optuna.create_study(study_name="growing", storage=storage)
    assert "no trials yet" in data(kept, study)["sections"]["answer"]
    study.optimize(lambda trial: 1.0, n_trials=1)
    until(lambda: "1 complete" in data(kept, study)["sections"]["answer"])


def test_equal_data_while_nothing_changes(storage: Watched, kept: Snapshots) -> None:
    study = copied(report_studies.confirmed(), storage)
    until(lambda: data(kept, study)["figures"])
    first, readings = data(kept, study), storage.readings
    until(lambda: kept.study(study._study_id) and storage.readings > readings + 8)
    assert data(kept, study) == first


def test_nobody_reads_what_nobody_watches(
    storage: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    kept = Snapshots(storage, ticks=lambda: now[0])
    study = plain(storage)
    data(kept, study)
    now[0] += 5
    kept.study(study._study_id)
    before = storage.lists
    until(lambda: kept.study(study._study_id) and storage.lists > before - 1)
    looked, pause = threading.Event(), kept._pause

    def nothing_to_do() -> float | None:
        looked.set()
        return pause()

    def after_a_look(later: float) -> tuple[int, int]:
        with kept._changed:
            now[0] += later
            looked.clear()
            kept._changed.notify_all()
        assert looked.wait(60)
        return storage.lists, storage.readings

    monkeypatch.setattr(kept, "_pause", nothing_to_do)
    once = after_a_look(snapshots.WATCHED + 1)  # the tab was closed
    assert after_a_look(60) == once
    readings = storage.readings
    answer = kept.study(study._study_id)  # opened again: the last there is, and its age
    assert answer and answer.data["sections"] and answer.age and answer.age > 60
    until(lambda: storage.readings > readings)
    kept.close()


def test_one_reading_at_a_time_for_any_number_of_readers(storage: Watched, kept: Snapshots) -> None:
    studies = [plain_named(storage, f"study {n}") for n in range(4)]
    until(lambda: all(data(kept, study) for study in studies))
    readers = [
        threading.Thread(
            target=lambda: [kept.study(s._study_id) for _ in range(200) for s in studies]
        )
        for _ in range(8)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    until(lambda: kept.studies() and storage.readings > 20)
    assert storage.most == 1


def plain_named(storage: Watched, name: str) -> optuna.Study:
    return optuna.create_study(study_name=name, storage=storage)


# -- what a summary warns of -----------------------------------------------------------------------


def test_the_saved_time_is_that_of_full_cycles() -> None:
    made = report_studies.confirmed()
    times = [run.full.seconds for run in made.runs if run.full]
    assert made.saved_cycles > 0
    assert made.saved_seconds == pytest.approx(made.saved_cycles * np.mean(times))
    assert report_studies.empty().saved_seconds is None
    assert made.to_json()["saved_seconds"] == made.saved_seconds


def test_a_best_rate_at_the_end_of_the_range_is_a_warning() -> None:
    study = report_studies.new_study("narrow")

    def objective(trial: optuna.Trial) -> float:
        import hpsched

        train = report_studies.FakeTraining(best_lr=3.0, horizon=900)
        recipe = hpsched.suggest_onecycle(trial, total_steps=900, max_lr=(1e-4, 0.2))
        return recipe.run(train)

    study.optimize(objective, n_trials=8)
    warned = [text for text in summarise(study).warnings if "end of its range" in text]
    best = summarise(study).best
    assert best is not None
    assert bool(warned) == (best.recipe["max_lr"] >= 0.2 / 1.05)
    assert warned and "(1e-4 to 0.2)" in warned[0]


def test_a_window_that_widened_is_a_warning() -> None:
    made = report_studies.confirmed()
    assert made.best is not None and made.best.runner_up is not None
    key, where = next(iter(made.windows.items()))
    assert where.evidence is not None
    low, high = where.evidence.proposal.low, where.evidence.proposal.high
    same = {key: dataclasses.replace(where, window=(low, high))}
    told = made.runs, [StudyDirection.MINIMIZE]
    assert list(edges.warnings(*told, same, made.best)) == []
    wider = {key: dataclasses.replace(where, window=(low, 2 * high))}
    (text,) = edges.warnings(*told, wider, made.best)
    assert rate_text(2 * high) in text and rate_text(high) in text and "widened" in text


def searched(better: Callable[[hpsched.Cycle], float], **ranges: Any) -> Summary:
    """Thirty recipes at random, of a training whose error is less by ``better(cycle)``."""
    base = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(base, seed=0))
    train = report_studies.FakeTraining(horizon=900)

    def objective(trial: optuna.Trial) -> float:
        recipe = hpsched.suggest_onecycle(trial, total_steps=900, rungs=1, **ranges)
        return recipe.run(lambda cycle: train(cycle) - better(cycle))

    study.optimize(objective, n_trials=30)
    return summarise(study)


def ended_at(made: Summary, field: str, value: float) -> list[str]:
    """What the study warns of when its best recipe has this value."""
    assert made.best is not None
    params, recipe = ({**all_, field: value} for all_ in (made.best.params, made.best.recipe))
    best = dataclasses.replace(made.best, params=params, recipe=recipe)
    warned = edges.warnings(made.runs, [StudyDirection.MINIMIZE], {}, best)
    return [text for text in warned if text.startswith(f"the best {field} (")]


def decays(cycle: hpsched.Cycle) -> float:
    """The more weight decay the better, about 0.1 a decade, at any rate and momentum."""
    return 0.05 * math.log(cycle.weight_decay * cycle.max_lr / (1 - cycle.base_momentum))


@pytest.mark.parametrize(
    ("field", "better", "ranges", "end", "span"),
    [
        ("max_momentum", lambda c: 5 * c.max_momentum, {}, 0.98, "0.9 to 0.98"),
        ("max_momentum", lambda c: -5 * c.max_momentum, {}, 0.9, "0.9 to 0.98"),
        ("base_momentum", lambda c: -3 * c.base_momentum, {}, 0.75, "0.75 to 0.9"),
        ("weight_decay", decays, {"weight_decay": (1e-5, 1e-3)}, 1e-3, "1e-5 to 0.001"),
        ("weight_decay", lambda c: -decays(c), {"weight_decay": (1e-3, 0.1)}, 1e-3, "0.001 to 0.1"),
    ],
)
def test_a_best_value_at_the_end_of_its_range_is_a_warning(
    field: str,
    better: Callable[[hpsched.Cycle], float],
    ranges: dict[str, Any],
    end: float,
    span: str,
) -> None:
    made = searched(better, **ranges)
    (text,) = ended_at(made, field, end)
    assert text == (
        f"the best {field} ({rate_text(end)}) lies at the end of its range ({span}): "
        f"give suggest_onecycle a wider {field}, in a new study"
    )
    low, high, log = next(run.recipe for run in made.runs if run.recipe).space[field]
    inner = (low * high) ** 0.5 if log else (low + high) / 2
    assert ended_at(made, field, inner) == []  # not at the end
    assert ended_at(made, field, low + high - end) == []  # at the other one, where it loses


def test_of_the_default_weight_decays_only_the_upper_end_is_one() -> None:
    made = searched(decays)
    assert made.best is not None
    recipe = made.best.recipe
    unit = 900 * recipe["max_lr"] / (1 - recipe["base_momentum"])
    (text,) = ended_at(made, "weight_decay", 5.0 / unit)
    assert "at the upper end of what is searched by default" in text
    assert f"such as weight_decay=({rate_text(0.05 / unit)}, {rate_text(50 / unit)})" in text
    assert ended_at(made, "weight_decay", 2.0 / unit) == []
    # Next to no weight decay is as good as none: there is nothing beyond.
    assert ended_at(searched(lambda c: -decays(c)), "weight_decay", 0.01 / unit) == []


@pytest.mark.parametrize(
    ("field", "end"), [("max_momentum", 0.98), ("max_momentum", 0.9), ("base_momentum", 0.75)]
)
def test_an_end_that_gains_nothing_is_no_warning(field: str, end: float) -> None:
    assert ended_at(searched(lambda cycle: 0.0), field, end) == []


def test_momenta_from_zero_on_have_nothing_below() -> None:
    made = searched(lambda c: -c.base_momentum, base_momentum=(0.0, 0.9))
    assert ended_at(made, "base_momentum", 0.0) == []


def test_a_momentum_that_the_optimizer_does_not_have_is_no_warning() -> None:
    made = searched(lambda c: 5 * c.max_momentum)
    assert ended_at(made, "max_momentum", 0.98)
    runs = tuple(dataclasses.replace(r, trial=without_momentum(r.trial)) for r in made.runs)
    assert ended_at(dataclasses.replace(made, runs=runs), "max_momentum", 0.98) == []


def without_momentum(trial: FrozenTrial) -> FrozenTrial:
    trial = copy.deepcopy(trial)
    if records.RANGE_TEST in trial.user_attrs:
        trial.user_attrs[records.RANGE_TEST]["momentum_name"] = "none"
    return trial
