"""The live page's routes: GET only, conditional answers, nothing inline, no other host."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import optuna
import plotly.offline
import pytest
import report_studies
from flask import Flask
from flask.testing import FlaskClient
from optuna.storages import InMemoryStorage
from werkzeug.test import TestResponse

from hpsched.web.live import make_blueprint


class Page(HTMLParser):
    """A page's tags, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def studies() -> InMemoryStorage:
    """A real study, and an empty one whose name is code."""
    storage = InMemoryStorage()
    made = report_studies.mixed()
    study = optuna.create_study(study_name="real", storage=storage)
    study.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
    optuna.create_study(study_name=report_studies.HOSTILE, storage=storage)
    return storage


@pytest.fixture(scope="module")
def client(studies: InMemoryStorage) -> Iterator[FlaskClient]:
    app, blueprint = Flask(__name__), make_blueprint(studies)
    app.register_blueprint(blueprint, url_prefix="/hpsched")
    yield app.test_client()
    blueprint.snapshots.close()  # type: ignore[attr-defined]


def settled(client: FlaskClient, path: str, part: str) -> TestResponse:
    """The state, once this part of it is there."""
    limit = time.monotonic() + 60
    while not (answer := client.get(path)).get_json().get(part):
        assert time.monotonic() < limit, answer.get_json()
        time.sleep(0.05)
    return answer


def identity(study: str, storage: InMemoryStorage) -> int:
    return storage.get_study_id_from_name(study)


@pytest.mark.parametrize("name", ["real", report_studies.HOSTILE, None])
def test_a_page_has_nothing_inline_and_names_no_other_host(
    client: FlaskClient, studies: InMemoryStorage, name: str | None
) -> None:
    path = f"/hpsched/studies/{identity(name, studies)}" if name else "/hpsched/"
    settled(
        client,
        f"{path}/state.json" if name else "/hpsched/state.json",
        "cards" if not name else "sections",
    )
    text = client.get(path).text
    for tag, attrs in Page(text).tags:
        assert "style" not in attrs and tag != "style"
        assert not [key for key in attrs if key.startswith("on")]
        assert tag != "script" or (attrs.get("src") or "").startswith("/hpsched/")
        for key in ("src", "href", "action"):
            where = attrs.get(key) or ""
            assert "//" not in where, (tag, where)
    if name == report_studies.HOSTILE:
        assert "&lt;script&gt;" in text


def test_unchanged_means_304_with_its_age(client: FlaskClient, studies: InMemoryStorage) -> None:
    path = f"/hpsched/studies/{identity('real', studies)}/state.json"
    first = settled(client, path, "figures")
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and again.data == b""
    assert again.headers["ETag"] == first.headers["ETag"]
    assert float(again.headers["Hpsched-Age"]) >= 0 and float(again.headers["Hpsched-Taken"]) > 0
    assert "private" in first.headers["Cache-Control"]
    other = client.get(path, headers={"If-None-Match": '"another"'})
    assert other.status_code == 200 and other.get_json()["name"] == "real"


def test_every_figure_of_the_state_is_there(client: FlaskClient, studies: InMemoryStorage) -> None:
    base = f"/hpsched/studies/{identity('real', studies)}"
    state = settled(client, f"{base}/state.json", "figures").get_json()
    assert {one["group"] for one in state["figures"]} >= {"range-test", "search", "space"}
    for one in state["figures"]:
        answer = client.get(f"{base}/figures/{one['id']}.json")
        assert answer.headers["ETag"] == f'"{one["digest"]}"'
        drawn: dict[str, Any] = answer.get_json()
        assert drawn["data"] and drawn["layout"] and one["caption"] and one["height"] > 100
    assert client.get(f"{base}/figures/other.json").status_code == 404


def test_answers_are_zipped_where_that_is_understood(
    client: FlaskClient, studies: InMemoryStorage
) -> None:
    path = f"/hpsched/studies/{identity('real', studies)}/state.json"
    plain = settled(client, path, "figures").data
    zipped = client.get(path, headers={"Accept-Encoding": "gzip"})
    assert zipped.headers["Content-Encoding"] == "gzip" and len(zipped.data) < len(plain) / 2
    assert gzip.decompress(zipped.data)[:10] == plain[:10]
    script = client.get("/hpsched/plotly.js")
    assert gzip.decompress(script.data).decode() == plotly.offline.get_plotlyjs()
    assert "immutable" in script.headers["Cache-Control"]


def test_what_is_not_there_is_404_and_nothing_can_be_changed(
    client: FlaskClient, studies: InMemoryStorage
) -> None:
    settled(client, "/hpsched/state.json", "cards")
    for path in ("studies/999", "studies/999/state.json", "studies/-1", "studies/real", "x"):
        assert client.get(f"/hpsched/{path}").status_code == 404, path
    for path in ("", "state.json", f"studies/{identity('real', studies)}"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert client.open(f"/hpsched/{path}", method=method).status_code == 405
