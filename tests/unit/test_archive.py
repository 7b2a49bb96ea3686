"""Export and import of a study: exact for whatever Optuna may hold, and all or nothing."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from generated_trials import facts, plain, studies
from hypothesis import HealthCheck, given, settings
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

import hpsched
from hpsched import archive, records
from hpsched.archive import export_json, export_study, import_study, read_archive
from hpsched.errors import StorageError, StudyExistsError, UsageError
from hpsched.records import WorkerRecord
from hpsched.study import live_workers, read_workers

SLOW_DRAWS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def stored(held: dict[str, Any], storage: str | None = None) -> optuna.Study:
    study = optuna.create_study(directions=held["directions"], storage=storage)
    study.add_trials(held["trials"])
    for key, value in held["user_attrs"].items():
        study.set_user_attr(key, value)
    for key, value in held["system_attrs"].items():
        study._storage.set_study_system_attr(study._study_id, key, value)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    """Four trials: finished, failed, running with a rung done, queued. Not to be changed."""
    url = f"sqlite:///{tmp_path_factory.mktemp('old')}/old.db"
    made = hpsched.create_study("toy", objective="a:b", storage=url, trials=9, seed=1)
    space = {"x": FloatDistribution(0, 1)}
    made.add_trial(create_trial(params={"x": 0.5}, distributions=space, value=1.0))
    made.add_trial(create_trial(state=TrialState.FAIL))
    made.enqueue_trial({"x": 0.25})
    made.ask(space).set_user_attr("hpsched:rung:0", {"value": 3.0})
    made.enqueue_trial({"x": 0.75}, user_attrs={records.CONFIRMS: 0})
    return made


def document(study: optuna.Study) -> dict[str, Any]:
    return json.loads(export_json(study))


def new(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new.db"


# -- exact -----------------------------------------------------------------------------------------


@given(studies())
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW_DRAWS)
def test_what_is_read_is_what_was_written(held: dict[str, Any]) -> None:
    study = stored(held)
    text = export_json(study)
    found = read_archive(text)
    assert found.directions == tuple(held["directions"])
    assert plain(found.user_attrs) == plain(held["user_attrs"])
    assert plain(found.system_attrs) == plain(held["system_attrs"])
    expected = [facts(trial) for trial in study.trials]
    for trial in expected:
        if trial["state"] == "RUNNING":
            trial["state"] = "WAITING"
    assert [facts(trial) for trial in found.trials] == expected


@given(studies())
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[*SLOW_DRAWS, HealthCheck.function_scoped_fixture],
)
def test_a_database_gives_back_what_was_imported(tmp_path: Path, held: dict[str, Any]) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    read = read_archive(export_json(stored(held)))
    name = f"s{len(optuna.get_all_study_names(url)) if (tmp_path / 'studies.db').exists() else 0}"
    there = import_study(read, name=name, storage=url)
    assert [facts(trial) for trial in there.trials] == [facts(trial) for trial in read.trials]
    assert plain(there.user_attrs) == plain(read.user_attrs)
    assert read_archive(export_json(there)).system_attrs.keys() == read.system_attrs.keys()


def test_it_is_strict_json_and_times_are_utc(tmp_path: Path) -> None:
    held = optuna.create_study()
    start = datetime(2026, 3, 4, 5, 6, 7, 89)
    trial = create_trial(value=math.inf, intermediate_values={3: math.nan})
    trial.datetime_start = start
    held.add_trial(trial)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    data = json.loads(export_json(held), parse_constant=refuse)["trials"][0]
    assert data["values"] == [{"$float": "inf"}]
    assert data["intermediate_values"] == {"3": {"$float": "nan"}}
    assert data["start"] == start.astimezone(UTC).isoformat()
    assert data["start"].endswith(".000089+00:00")


def test_a_negative_zero_keeps_its_sign(tmp_path: Path) -> None:
    held = optuna.create_study()
    held.add_trial(create_trial(value=-0.0, intermediate_values={0: -0.0}))
    read = read_archive(export_json(held))
    (trial,) = read.trials
    assert math.copysign(1, trial.value) == math.copysign(1, trial.intermediate_values[0]) == -1
    (stored,) = import_study(read, storage=new(tmp_path)).trials  # where SQLite may lose it
    assert (stored.value, stored.intermediate_values) == (0, {0: 0})


def test_equal_studies_give_equal_documents(study: optuna.Study, tmp_path: Path) -> None:
    there = import_study(read_archive(export_json(study)), storage=new(tmp_path))
    again = import_study(read_archive(export_json(there)), name="toy2", storage=new(tmp_path))
    assert document(again) == {**document(there), "name": "toy2"}


def test_metric_names_come_along(tmp_path: Path) -> None:
    study = optuna.create_study()
    study.set_metric_names(["error"])
    there = import_study(read_archive(export_json(study)), storage=new(tmp_path))
    assert there.metric_names == ["error"]


# -- what an import changes ------------------------------------------------------------------------


def test_a_running_trial_waits_with_what_it_has(study: optuna.Study, tmp_path: Path) -> None:
    assert document(study)["trials"][2]["state"] == "running"
    read = read_archive(export_json(study))
    assert read.requeued == (2,)
    there = import_study(read, storage=new(tmp_path))
    trial = there.ask({"x": FloatDistribution(0, 1)})
    assert (trial.number, trial.params) == (2, {"x": 0.25})
    assert trial.user_attrs == {"hpsched:rung:0": {"value": 3.0}}
    confirmation = there.ask({"x": FloatDistribution(0, 1)})
    assert confirmation.params == {"x": 0.75} and confirmation.user_attrs == {records.CONFIRMS: 0}


def test_workers_of_the_old_database_count_as_stopped(study: optuna.Study, tmp_path: Path) -> None:
    worker = WorkerRecord(host="h", pid=1, device="cpu", started=0, seen=1e12, state="running")
    data = document(study)
    data["user_attrs"][f"{records.WORKER}abc"] = worker.to_json()
    assert live_workers(read_workers(data["user_attrs"]), 0.0)
    there = import_study(read_archive(json.dumps(data)), storage=new(tmp_path))
    workers = read_workers(there.user_attrs)
    assert list(workers) == ["abc"] and not live_workers(workers, 0.0)


# -- all or nothing --------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_another_one_taken(study: optuna.Study, tmp_path: Path) -> None:
    read = read_archive(export_json(study))
    import_study(read, storage=new(tmp_path))
    with pytest.raises(StudyExistsError, match=r"'toy'.*--name"):
        import_study(read, storage=new(tmp_path))
    import_study(read, name="other", storage=new(tmp_path))
    assert optuna.get_all_study_names(new(tmp_path)) == ["toy", "other"]
    for bad in ("", "  ", "x" * 513):
        with pytest.raises(UsageError, match="--name"):
            import_study(read, name=bad, storage=new(tmp_path))


def test_a_name_taken_meanwhile_is_refused(study: optuna.Study, tmp_path: Path) -> None:
    read = read_archive(export_json(study))

    def be_faster(stored: int) -> None:
        if stored == 1:
            hpsched.create_study("toy", objective="c:d", storage=new(tmp_path))

    with pytest.raises(StudyExistsError, match="'toy'"):
        import_study(read, storage=new(tmp_path), on_progress=be_faster)
    assert optuna.get_all_study_names(new(tmp_path)) == ["toy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_import_cut_short_leaves_nothing(
    study: optuna.Study, tmp_path: Path, error: type[BaseException]
) -> None:
    def fail(stored: int) -> None:
        assert "toy" not in optuna.get_all_study_names(new(tmp_path))
        if stored == 2:
            raise error

    with pytest.raises(error):
        import_study(read_archive(export_json(study)), storage=new(tmp_path), on_progress=fail)
    assert optuna.get_all_study_names(new(tmp_path)) == []


def test_the_draft_of_a_killed_import_names_itself(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise sqlalchemy.exc.OperationalError("", {}, Exception("gone"))

    monkeypatch.setattr(archive, "_rename", die)
    monkeypatch.setattr(optuna.storages._CachedStorage, "delete_study", die)
    with pytest.raises(sqlalchemy.exc.OperationalError):
        import_study(read_archive(export_json(study)), storage=new(tmp_path))
    (name,) = optuna.get_all_study_names(new(tmp_path))
    assert name.startswith("toy (importing ")


def test_what_does_not_read_back_is_refused(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_archive(export_json(study))
    monkeypatch.setattr(archive, "backend_of", lambda held: _Forgetful(held._backend))
    with pytest.raises(StorageError, match="user_attrs of trial 2"):
        import_study(read, storage=new(tmp_path))
    monkeypatch.undo()
    assert optuna.get_all_study_names(new(tmp_path)) == []


class _Forgetful:
    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def get_all_trials(self, study_id: int, deepcopy: bool) -> list[Any]:
        found = self._backend.get_all_trials(study_id)
        for trial in found:
            trial.user_attrs.pop("hpsched:rung:0", None)
        return found


# -- what is no export -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("number,state\n", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "format='hpsched-study'"),
        ('{"name": "x", "trials": []}', "format='hpsched-study'"),
        ('{"format": "hpsched-study", "version": 2, "hpsched": "9.9"}', "version 2.*'9.9'"),
        ('{"format": "hpsched-study", "version": 1}', "trials: it is missing"),
    ],
)
def test_what_is_no_export(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_archive(text, "f.json")
    assert str(caught.value).startswith("f.json") and "\n" not in str(caught.value)


def test_a_document_cut_short_anywhere(study: optuna.Study) -> None:
    text = export_json(study).rstrip()
    for length in range(0, len(text), 97):
        with pytest.raises(UsageError, match="only a part of one"):
            read_archive(text[:length])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("number", 7, "number"),
        ("number", None, "number"),
        ("state", "flying", "state.*FLYING"),
        ("state", "complete", "datetime_complete"),
        ("values", "x", "values"),
        ("values", [True], "values.*True"),
        ("values", [1.0, 2.0], "values.*there are 2"),
        ("values", [{"$float": "x"}], "values"),
        ("params", {"x": 2.0}, "x"),
        ("params", [], "params"),
        ("distributions", {"x": "nonsense"}, "distributions"),
        ("distributions", {"x": "{}"}, "distributions"),
        ("distributions", {}, "x"),
        ("intermediate_values", {"one": 1.0}, "intermediate_values.*one"),
        ("intermediate_values", {"1": None}, "intermediate_values"),
        ("user_attrs", None, "user_attrs"),
        ("start", "2026-01-01T00:00:00", "start.*time zone"),
        ("start", "yesterday", "start.*yesterday"),
        ("start", None, "datetime_start"),
        ("end", 5, "end"),
    ],
)
def test_a_damaged_trial_is_named(study: optuna.Study, field: str, value: Any, said: str) -> None:
    data = document(study)
    at = 2 if value == "complete" else 0
    data["trials"][at][field] = value
    with pytest.raises(UsageError, match=f"f.json: trial {at}.*{said}") as caught:
        read_archive(json.dumps(data), "f.json")
    assert "export the study again" in str(caught.value)
    del data["trials"][at][field]
    with pytest.raises(UsageError, match=f"trial {at}: {field}: it is missing"):
        read_archive(json.dumps(data), "f.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", ""), ("name", 3), ("directions", []), ("directions", ["up"]), ("user_attrs", 1)],
)
def test_a_damaged_study_is_named(study: optuna.Study, field: str, value: Any) -> None:
    data = {**document(study), field: value}
    with pytest.raises(UsageError, match=f"f.json: {field}"):
        read_archive(json.dumps(data), "f.json")


def test_the_document_says_what_it_is(study: optuna.Study) -> None:
    data = export_study(study)
    assert (data["format"], data["version"]) == ("hpsched-study", 1)
    assert data["optuna"] == optuna.__version__ and data["hpsched"] == hpsched.__version__
