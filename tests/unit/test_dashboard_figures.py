"""The figures on the dashboard's study page: small, the search's own proposal, never in the way."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
import report_studies
from fake_training import FakeTraining
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

import hpsched
from hpsched import dashboard_figures as dashboard
from hpsched import evidence, records
from hpsched.present import rate_text
from hpsched.study import create_study, open_study
from hpsched.summary import Summary
from hpsched.worker import Worker

MINIMIZE = [StudyDirection.MINIMIZE]


def trials_of(summary: Summary) -> list[FrozenTrial]:
    return [run.trial for run in summary.runs]


def copied(summary: Summary) -> optuna.Study:
    """The study in a storage of its own: what is published must not leak into other tests."""
    study = report_studies.new_study(summary.name)
    study.add_trials([trial for trial in trials_of(summary) if trial.state.is_finished()])
    return study


def served(study: optuna.Study) -> Any:
    """What the real dashboard's page asks for."""
    environ: dict[str, Any] = {"PATH_INFO": f"/api/studies/{study._study_id}"}
    environ |= {"QUERY_STRING": "after=0", "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    said: list[str] = []
    body = optuna_dashboard.wsgi(study._storage)(environ, lambda status, *_: said.append(status))
    assert said == ["200 OK"]
    return json.loads(b"".join(body))


def shown(study: optuna.Study) -> dict[str, Any]:
    found = served(study)["plotly_graph_objects"]
    return {figure["id"]: json.loads(figure["graph_object"]) for figure in found}


# -- what is drawn ---------------------------------------------------------------------------------


def test_the_figure_says_what_the_search_uses() -> None:
    summary = report_studies.confirmed()
    (figure,) = dashboard.figures(trials_of(summary), MINIMIZE)
    recipe = next(run.recipe for run in summary.runs if run.recipe)
    known = evidence.of(trials_of(summary), recipe, MINIMIZE)
    assert known is not None and known.proposal != known.prior  # cycles have moved it
    assert f"around {rate_text(known.proposal.centre)}" in figure.layout.title.text
    assert figure.layout.height == dashboard.HEIGHT
    assert {trace.yaxis for trace in figure.data} <= {None, "y"}
    assert figure.layout.yaxis.domain == (0, 1) and figure.layout.yaxis2.domain is None


def test_each_context_has_its_own_and_says_which() -> None:
    drawn = dashboard.figures(trials_of(report_studies.mixed()), MINIMIZE)
    contexts = [figure.layout.title.subtitle.text.split("<br>")[0] for figure in drawn]
    assert sorted(contexts)[1] == "norm='batch'"
    assert "&lt;script&gt;" in sorted(contexts)[0] and len(contexts) == 2


def test_only_the_contexts_with_the_most_trials_are_shown() -> None:
    study = report_studies.new_study()

    def objective(trial: optuna.Trial) -> float:
        width = 0 if trial.number == 0 else (trial.number - 1) // 2 + 1
        recipe = hpsched.suggest_onecycle(trial, total_steps=300, context={"width": width})
        return recipe.run(FakeTraining(horizon=300))

    study.optimize(objective, n_trials=2 * dashboard.CONTEXTS + 1)
    drawn = dashboard.figures(study.trials, study.directions)
    subtitles = [figure.layout.title.subtitle.text for figure in drawn]
    assert [text.split("<br>")[0] for text in subtitles] == [
        f"width={k + 1}" for k in range(dashboard.CONTEXTS)
    ]


@pytest.mark.parametrize(("sweeps", "most"), [(3, 16_000), (30, 30_000)])
def test_figures_are_small(sweeps: int, most: int) -> None:
    sampler = hpsched.OneCycleSampler(seed=0, range_tests=sweeps)
    study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner())
    decays = {"weight_decays": [1e-4]}  # as many as are asked for, also where two agree
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, 900, range_test=decays).run(FakeTraining()),
        n_trials=sweeps,
    )
    assert len(evidence.sweeps(study.trials)) == sweeps
    (figure,) = dashboard.figures(study.trials, study.directions)
    assert len(figure.to_json()) < most


def test_thinning_keeps_the_ends_of_every_stretch() -> None:
    x = [*map(float, range(10)), None, *map(float, range(10, 20))]
    assert dashboard._kept(x, 1) == list(range(21))
    assert dashboard._kept(x, 6) == [0, 6, 9, 10, 11, 12, 18, 20]
    assert dashboard._kept([None], 6) == [0]


def test_without_evidence_there_is_no_figure() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert dashboard.publish(study) == 0
    assert shown(study) == {} and served(study)["note"]["body"] == ""


# -- what the dashboard serves ---------------------------------------------------------------------


def test_the_dashboard_serves_the_figures_and_a_note() -> None:
    study = copied(report_studies.mixed())
    assert dashboard.publish(study) == 2
    figures = shown(study)
    assert set(figures) == {"hpsched-range-test-0", "hpsched-range-test-1"}
    assert all("Search max_lr" in each["layout"]["title"]["text"] for each in figures.values())
    assert "hpsched study report mixed" in served(study)["note"]["body"]


def test_a_later_figure_takes_the_place_of_the_earlier() -> None:
    study, drawn = copied(report_studies.confirmed()), []
    few, all_ = study.trials[:1], study.trials
    for trials in (all_, few, all_):  # a long one, a shorter one over it, and the long one again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study, "get_trials", lambda *_, known=trials, **__: known)
            dashboard.publish(study)
        drawn.append(shown(study))
    assert [list(figures) for figures in drawn] == 3 * [["hpsched-range-test-0"]]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("body", ["# mine", ""], ids=["written", "deleted"])
def test_a_note_of_the_users_stays(body: str) -> None:
    study = copied(report_studies.confirmed())
    optuna_dashboard.save_note(study, "# mine")
    optuna_dashboard.save_note(study, body)
    dashboard.publish(study)
    assert served(study)["note"]["body"] == body


def test_a_name_cannot_leave_the_notes_code() -> None:
    text = dashboard.note("a `b`\n\n<script>alert(1)</script>")
    assert text.splitlines()[-1] == "    hpsched study report 'a `b` <script>alert(1)</script>'"


# -- when it is stored, and what becomes of failures -----------------------------------------------


def test_after_trials_that_brought_evidence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    study, published = copied(report_studies.confirmed()), []
    monkeypatch.setattr(dashboard, "publish", lambda study: published.append(1))
    for trial in study.trials:
        before = len(published)
        dashboard.publish_after(study, trial.number)
        brought = {records.RANGE_TEST, records.REFINES} & set(trial.user_attrs)
        assert len(published) - before == bool(brought)
    assert 3 <= len(published) < len(study.trials)


def test_not_without_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    study = copied(report_studies.confirmed())
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    dashboard.publish_after(study, 0)
    assert shown(study) == {}


@pytest.mark.parametrize(
    "store",
    [lambda study: dashboard.publish_after(study, 1), lambda s: dashboard.publish_all(s._storage)],
    ids=["worker", "dashboard"],
)
def test_a_storage_that_may_not_be_written_is_told_once(
    store: Callable[[optuna.Study], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = copied(report_studies.mixed())

    def refuse(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError from PermissionError("for table x; password=y")

    monkeypatch.setattr(study._storage, "set_study_system_attr", refuse)
    with caplog.at_level(logging.WARNING, "hpsched"):
        store(study)
    (line,) = [r.getMessage() for r in caplog.records if r.name == dashboard.logger.name]
    assert "for table x" in line and "password=***" in line


def test_one_bad_study_leaves_the_others_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = optuna.storages.InMemoryStorage()
    for name in ("bad", "good"):
        study = optuna.create_study(study_name=name, storage=held)
        study.add_trials(trials_of(report_studies.confirmed())[:4])
    publish = dashboard.publish
    monkeypatch.setattr(
        dashboard, "publish", lambda study: 1 / 0 if study.study_name == "bad" else publish(study)
    )
    with caplog.at_level(logging.WARNING, "hpsched"):
        dashboard.publish_in_background(held).join()
    assert "'bad': division by zero" in caplog.text
    assert len(shown(optuna.load_study(study_name="good", storage=held))) == 1


def test_a_worker_stores_them(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    create_study("fake", objective="nowhere:objective", storage=url, trials=2)
    Worker(open_study("fake", url, heartbeat=True), report_studies.objective).run()
    study = open_study("fake", url)
    dashboard_says = shown(study)["hpsched-range-test-0"]["layout"]["title"]["text"]
    (figure,) = dashboard.figures(study.trials, study.directions)
    assert dashboard_says == figure.layout.title.text
