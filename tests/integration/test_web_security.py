"""The dashboard's gate: every route and method of both applications, with and without a log-in.

First inside this process, with a clock of the test's, then the real server as users start it.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import optuna
import optuna_dashboard
import pytest
from flask import Flask
from flask.testing import FlaskClient
from typer.testing import CliRunner
from werkzeug.security import generate_password_hash
from werkzeug.test import TestResponse

from hpsched.cli import app as command_line
from hpsched.errors import UsageError
from hpsched.storage import backend_of, open_storage
from hpsched.web import access as access_module
from hpsched.web import app as app_module
from hpsched.web.access import SESSION_SECONDS, Access, Account, Role, Users
from hpsched.web.app import HEADERS, PUBLIC_FILES, create_app
from hpsched.web.server import Tls, address_of
from hpsched.web.throttle import FREE, Throttle
from tests.fleet import environment

NAME = "secret-study"  # what nobody may see
PASSWORD, WRONG = "correct horse battery", "wrong horse battery"
TOKEN, EDITOR_TOKEN = "reader-token-4a0fb7rrrrrrrr", "editor-token-9c1de2eeeeeeee"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT",
           "PROPFIND", "QUERY", "FOO")  # fmt: skip
SITE = "http://localhost"
HERE = {"Origin": SITE}
PAGE = {"Accept": "text/html,application/xhtml+xml"}


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def hashed() -> str:
    return generate_password_hash(PASSWORD, "scrypt:1024:8:1")  # the tests need not wait for it


@pytest.fixture
def users(tmp_path: Path, hashed: str) -> Users:
    path = tmp_path / "users"
    path.touch(mode=0o600)
    path.write_text(f"anna:editor:{hashed}\nbob:reader:{hashed}\n")
    return Users(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one study of one trial, and a note."""
    path = tmp_path_factory.mktemp("template") / "studies.db"
    storage = open_storage(f"sqlite:///{path}", create=True)
    study = optuna.create_study(study_name=NAME, storage=storage)
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"mine": "secret-value"}))
    optuna_dashboard.save_note(study, "secret-note")
    backend_of(storage).engine.dispose()  # type: ignore[attr-defined]  # all is in the file
    return path


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(template, tmp_path / "studies.db"))


def contents(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return list(connection.iterdump())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(users: Users, clock: Clock) -> Access:
    tokens = tuple(
        Account(role=role, secret=access_module._digest(token))
        for token, role in ((TOKEN, Role.READER), (EDITOR_TOKEN, Role.EDITOR))
    )
    return Access(users=users, tokens=tokens, clock=clock, throttle=Throttle(clock))


def application(database: Path, access: Access, **how: Any) -> Flask:
    return create_app(open_storage(f"sqlite:///{database}"), access, **how)


@pytest.fixture
def app(database: Path, access: Access) -> Flask:
    return application(database, access)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def logged_in(app: Flask, name: str) -> FlaskClient:
    client = app.test_client()
    form = {"name": name, "secret": PASSWORD}
    assert client.post("/hpsched/login", data=form, headers=HERE).status_code == 303
    return client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def routes(app: Flask, database: Path) -> list[str]:
    """A path for every route of both applications, and some that are none."""
    ours = [rule.rule for rule in app.url_map.iter_rules()]
    theirs = [route.rule for route in optuna_dashboard.wsgi(f"sqlite:///{database}").routes]
    assert len(ours) >= 10 and len(theirs) >= 25
    filled = {re.sub(r"<[^>]*(\(.*\))?[^>]*>", _example, rule) for rule in (*ours, *theirs)}
    assert not any("<" in path for path in filled)
    return sorted(
        filled | {"/", "/nowhere", "/hpsched/nowhere", "/hpsched/static/live.js", "/dashboard/"}
    )


def _example(found: re.Match[str]) -> str:
    return "/studies/1" if ":re:(/" in found[0] else "bundle.js" if "filename" in found[0] else "1"


def is_closed(answer: TestResponse) -> bool:
    """Whether an answer gives nothing away but the way to the log-in page."""
    if answer.status_code == 303:
        return urlsplit(answer.headers["Location"]).path == "/hpsched/login"
    return answer.status_code == 401 and (b"Log in first" in answer.data or not answer.data)


# -- without a log-in ------------------------------------------------------------------------------


def test_without_a_log_in_only_the_log_in_page_answers(
    app: Flask, client: FlaskClient, database: Path
) -> None:
    before = contents(database)
    codes: dict[str, set[int]] = {}
    for path in routes(app, database):
        for method in METHODS:
            for headers in ({}, PAGE, HERE, {**PAGE, **HERE}):
                answer = client.open(path, method=method, headers=headers)
                assert NAME.encode() not in answer.data and b"secret-" not in answer.data
                if path == "/hpsched/login":
                    codes.setdefault(method, set()).add(answer.status_code)
                else:
                    assert is_closed(answer), (method, path, answer.status)
    # Wrong (there is no password in it), or not from this page, and soon too often.
    assert codes.pop("POST") <= {401, 403, 429}
    assert codes.pop("GET") == codes.pop("HEAD") == {200}
    assert set.union(*codes.values()) == {401, 405} and len(codes) == len(METHODS) - 3
    assert contents(database) == before


def test_the_log_in_pages_files_answer_and_no_others(app: Flask, client: FlaskClient) -> None:
    folder = Path(app_module.__file__).parent / "static"
    there = {path.name for path in folder.iterdir()}
    assert there >= PUBLIC_FILES
    for name in there:
        status = client.get(f"/hpsched/static/{name}").status_code
        assert status == (200 if name in PUBLIC_FILES else 401), name
    page = client.get("/hpsched/login").get_data(as_text=True)
    named = set(re.findall(r'(?:src|href)="/hpsched/static/([^"]+)"', page))
    assert named == PUBLIC_FILES  # the page has its style, and needs nothing else


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong-token-wrong-token"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic YW5uYTpjb3JyZWN0IGhvcnNlIGJhdHRlcnk="},
        {"Authorization": TOKEN},
        {"X-HTTP-Method-Override": "DELETE"},
        {"X-Original-URL": "/hpsched/login", "X-Rewrite-URL": "/hpsched/login"},
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-User": "anna", "Remote-User": "anna"},
        {"X-Forwarded-Prefix": "/hpsched/login"},
        {"Cookie": "session=anna; hpsched=anna"},
    ],
    ids=lambda headers: next(iter(headers)),
)  # fmt: skip
def test_headers_open_nothing(client: FlaskClient, headers: dict[str, str]) -> None:
    for path in ("/api/studies", "/hpsched/", "/dashboard", "/csv/1"):
        assert client.get(path, headers=headers).status_code == 401


def test_a_cookie_must_be_signed_with_the_key(
    app: Flask, database: Path, access: Access, users: Users, clock: Clock
) -> None:
    other = Access(users=users, tokens=access.tokens, clock=clock)
    forger = logged_in(application(database, other), "anna")
    (cookie,) = forger._cookies.values()  # type: ignore[union-attr]
    client = app.test_client()
    client.set_cookie(f"hpsched-{access.fingerprint}", cookie.value)
    assert client.get("/api/studies").status_code == 401
    # One that the same key signed, for a session that never began:
    signer = app.session_interface.get_signing_serializer(app)  # type: ignore[attr-defined]
    for forged in ({}, {"mark": "x", "id": "x", "since": clock.now}, {"name": "anna"}):
        client.set_cookie(f"hpsched-{access.fingerprint}", signer.dumps(forged))
        assert client.get("/api/studies").status_code == 401


# -- roles -----------------------------------------------------------------------------------------


def test_a_readers_writes_are_refused_whatever_the_route(app: Flask, database: Path) -> None:
    by_cookie, by_token = logged_in(app, "bob"), app.test_client()
    before, tried = contents(database), 0
    for path in routes(app, database):
        if path == "/hpsched/logout":
            continue
        for method in set(METHODS) - {"GET", "HEAD"}:
            for client, headers in ((by_cookie, HERE), (by_token, bearer(TOKEN))):
                if path == "/hpsched/login" and method == "POST":
                    continue
                answer = client.open(path, method=method, headers=headers, json={"study_name": "x"})
                allowed = method in ("POST", "PUT", "PATCH", "DELETE")
                assert answer.status_code == (403 if allowed else 405), (method, path)
                tried += 1
    assert tried > 500 and contents(database) == before


def test_a_reader_sees_both_applications(app: Flask) -> None:
    for client, headers in ((logged_in(app, "bob"), {}), (app.test_client(), bearer(TOKEN))):
        studies = client.get("/api/studies", headers=headers).get_json()["study_summaries"]
        assert [study["study_name"] for study in studies] == [NAME]
        assert b"secret-value" in client.get("/csv/1", headers=headers).data
        assert client.get("/hpsched/", headers=headers).status_code == 200
        assert client.get("/hpsched/studies/1", headers=headers).status_code == 200
        assert client.head("/dashboard/studies/1", headers=headers).status_code == 200
        assert client.get("/nowhere", headers=headers).status_code == 404


@pytest.mark.parametrize("way", ["cookie", "token"])
def test_an_editors_writes_go_through(app: Flask, database: Path, way: str) -> None:
    client, headers = logged_in(app, "anna"), HERE
    if way == "token":
        client, headers = app.test_client(), bearer(EDITOR_TOKEN)

    def write(method: str, path: str, **body: Any) -> int:
        return client.open(path, method=method, json=body, headers=headers).status_code

    assert write("PUT", "/api/studies/1/note", body="by an editor", version=2) == 204
    assert any("by an editor" in line for line in contents(database))
    assert write("POST", "/api/studies", study_name="other", directions=["minimize"]) == 201
    assert write("POST", "/api/studies/1/rename", study_name="renamed") == 201
    assert write("DELETE", "/api/studies/2") == 204
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("renamed",)]


def test_without_log_in_everyone_looks_or_everyone_writes(database: Path) -> None:
    path, note = "/api/studies/1/note", {"body": "by anyone", "version": 2}
    for role, status in ((Role.READER, 403), (Role.EDITOR, 204)):
        client = application(database, Access(anyone=Account(role=role))).test_client()
        assert client.get("/api/studies").status_code == 200
        assert client.put(path, json=note, headers=HERE).status_code == status
        assert client.put(path, json=note).status_code == 403  # not from a page of ours
        assert client.get("/hpsched/login").status_code == 303
        assert "Log out" not in client.get("/hpsched/").get_data(as_text=True)


@pytest.mark.parametrize(
    ("host", "fine"),
    [("localhost:8080", True), ("127.0.0.1", True), ("[::1]:8080", True), ("LOCALHOST", True),
     ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil:8080", False),
     ("evil@localhost.x", False), ("[::1", False), ("", False), ("x y", False)],
)  # fmt: skip
def test_names_that_others_chose_for_this_machine(database: Path, host: str, fine: bool) -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "::1"})
    access = Access(anyone=Account(role=Role.EDITOR), hosts=hosts)
    client = application(database, access).test_client()
    origin = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/studies", headers={"Host": host}).status_code == (200 if fine else 403)
    note = {"body": "rebound", "version": 2}
    answer = client.put("/api/studies/1/note", json=note, headers=origin)
    assert answer.status_code == (204 if fine else 403)


# -- requests forged by other pages ----------------------------------------------------------------

FOREIGN = [
    {},
    {"Origin": "null"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://localhost:81"},
    {"Origin": "https://localhost"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": SITE},
    {"Sec-Fetch-Site": "none", "Origin": SITE},
    {"Referer": f"{SITE}/dashboard"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_another_page_can_change_nothing(
    app: Flask, database: Path, headers: dict[str, str]
) -> None:
    anna, before = logged_in(app, "anna"), contents(database)
    for method, path in (("DELETE", "/api/studies/1"), ("PUT", "/api/studies/1/note"),
                         ("POST", "/api/studies"), ("POST", "/hpsched/logout")):  # fmt: skip
        assert anna.open(path, method=method, json={}, headers=headers).status_code == 403
    assert contents(database) == before
    assert anna.get("/api/studies").status_code == 200  # still logged in
    form = {"name": "bob", "secret": PASSWORD}
    stranger = app.test_client()
    assert stranger.post("/hpsched/login", data=form, headers=headers).status_code == 403
    assert stranger.get("/api/studies").status_code == 401


def test_the_page_itself_can(app: Flask) -> None:
    for headers in (HERE, {"Sec-Fetch-Site": "same-origin"}):
        anna = logged_in(app, "anna")
        assert anna.put("/api/studies/9/note", headers=headers, json={}).status_code == 400
        assert anna.post("/hpsched/logout", headers=headers).status_code == 303


# -- log-in ----------------------------------------------------------------------------------------


def test_log_in_leads_to_the_page_that_was_wanted(app: Flask, client: FlaskClient) -> None:
    away = client.get("/dashboard/studies/1?x=1", headers=PAGE)
    page = client.get(away.headers["Location"])
    assert 'name="next" value="/dashboard/studies/1?x=1"' in page.get_data(as_text=True)
    form = {"name": "bob", "secret": PASSWORD, "next": "/dashboard/studies/1?x=1"}
    back = client.post("/hpsched/login", data=form, headers=HERE)
    assert (back.status_code, back.headers["Location"]) == (303, "/dashboard/studies/1?x=1")
    assert client.get("/hpsched/login").status_code == 303  # nothing to do here any more
    assert "bob · reader" in client.get("/hpsched/").get_data(as_text=True)


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "/\\evil.example", "\\\\evil.example", "https://evil.example",
     "/\t/evil.example", "/\n/evil.example", "evil.example", "javascript:alert(1)", "",
     "/a\\..\\b", " /", "/x\r\nX: y"],
)  # fmt: skip
def test_log_in_leads_nowhere_else(client: FlaskClient, target: str) -> None:
    form = {"name": "bob", "secret": PASSWORD, "next": target}
    back = client.post("/hpsched/login", data=form, headers=HERE)
    assert (back.status_code, back.headers["Location"]) == (303, "/")


def test_what_is_typed_comes_back_as_text(client: FlaskClient) -> None:
    evil = '"><script>alert(1)</script>'
    form = {"name": evil, "secret": evil, "next": evil}
    answer = client.post("/hpsched/login", data=form, headers=HERE)
    page = answer.get_data(as_text=True)
    assert answer.status_code == 401 and "User name or password is wrong." in page
    assert evil not in page and "&lt;script&gt;" in page
    assert page.count("alert(1)") == 2  # name and next: the password does not come back


def test_a_token_in_the_form(app: Flask, client: FlaskClient) -> None:
    form = {"name": "", "secret": EDITOR_TOKEN}
    assert client.post("/hpsched/login", data=form, headers=HERE).status_code == 303
    assert "token · editor" in client.get("/hpsched/").get_data(as_text=True)
    assert client.put("/api/studies/9/note", headers=HERE, json={}).status_code == 400


@pytest.mark.parametrize(
    ("without", "label"),
    [("", "Password or token"), ("tokens", "Password"), ("users", "Token")],
)
def test_the_form_asks_for_what_there_is(
    database: Path, access: Access, without: str, label: str
) -> None:
    if without:
        setattr(access, without, None if without == "users" else ())
    page = application(database, access).test_client().get("/hpsched/login").get_data(as_text=True)
    assert f'<label for="secret">{label}</label>' in page
    assert ('<label for="name">' in page) == (without != "users")
    assert ("none for a token" in page) == (not without)
    assert 'autocomplete="current-password"' in page and "<script>" not in page


def test_wrong_passwords_are_slowed_and_lock_nobody_else_out(
    app: Flask, client: FlaskClient, clock: Clock
) -> None:
    def tried(secret: str, address: str) -> TestResponse:
        form = {"name": "anna", "secret": secret}
        place = {"REMOTE_ADDR": address}
        return client.post("/hpsched/login", data=form, headers=HERE, environ_base=place)

    assert [tried(WRONG, "10.0.0.1").status_code for _ in range(FREE)] == [401] * FREE
    slowed = tried(PASSWORD, "10.0.0.1")
    assert (slowed.status_code, slowed.headers["Retry-After"]) == (429, "1")
    assert "Try again in 1 s." in slowed.get_data(as_text=True)
    by_token = client.get(
        "/api/studies", headers=bearer(TOKEN), environ_base={"REMOTE_ADDR": "10.0.0.1"}
    )
    assert (by_token.status_code, by_token.headers["Retry-After"]) == (429, "1")
    assert tried(PASSWORD, "10.0.0.2").status_code == 303
    clock.now += 1
    client = app.test_client()
    assert tried(WRONG, "10.0.0.1").status_code == 401
    assert tried(WRONG, "10.0.0.1").headers["Retry-After"] == "2"
    clock.now += 2
    assert tried(PASSWORD, "10.0.0.1").status_code == 303


def test_guessed_tokens_are_slowed(client: FlaskClient) -> None:
    guesses = [client.get("/api/studies", headers=bearer("x" * 20 + str(n))) for n in range(9)]
    assert [guess.status_code for guess in guesses] == [401] * FREE + [429] * (9 - FREE)


def test_forms_are_small(client: FlaskClient) -> None:
    form = {"name": "anna", "secret": "x" * 20_000}
    assert client.post("/hpsched/login", data=form, headers=HERE).status_code == 413
    huge = {"CONTENT_LENGTH": str(2**30)}
    answer = client.post("/api/studies", headers=bearer(EDITOR_TOKEN), environ_overrides=huge)
    assert answer.status_code == 413


# -- sessions --------------------------------------------------------------------------------------


def test_the_cookie(database: Path, access: Access) -> None:
    app = application(database, access)
    form = {"name": "bob", "secret": PASSWORD}
    for site, secure in (("http://localhost", False), ("https://localhost", True)):
        answer = app.test_client().post(
            "/hpsched/login", data=form, headers={"Origin": site}, base_url=site
        )
        cookie = answer.headers["Set-Cookie"]
        assert cookie.startswith(f"hpsched-{access.fingerprint}=")
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Path=/" in cookie
        assert ("Secure" in cookie) == secure and "Expires=" in cookie
        assert "Domain" not in cookie


def test_a_session_ends_by_time(app: Flask, clock: Clock) -> None:
    bob = logged_in(app, "bob")
    clock.now += SESSION_SECONDS - 1
    assert bob.get("/api/studies").status_code == 200
    clock.now += 1
    assert bob.get("/api/studies").status_code == 401
    assert bob.get("/hpsched/", headers=PAGE).status_code == 303


def test_a_session_ends_by_logging_out_for_copies_of_its_cookie_too(app: Flask) -> None:
    bob, elsewhere, copy = logged_in(app, "bob"), logged_in(app, "bob"), app.test_client()
    (cookie,) = bob._cookies.values()  # type: ignore[union-attr]
    copy.set_cookie(cookie.key, cookie.value)
    assert copy.get("/api/studies").status_code == 200
    out = bob.post("/hpsched/logout", headers=HERE)
    assert (out.status_code, out.headers["Location"]) == (303, "/hpsched/login")
    assert bob.get("/api/studies").status_code == copy.get("/api/studies").status_code == 401
    assert elsewhere.get("/api/studies").status_code == 200


def test_a_session_ends_with_its_user(app: Flask, users: Users) -> None:
    anna, bob = logged_in(app, "anna"), logged_in(app, "bob")
    Users(users.path).add("bob", WRONG, Role.READER, replace=True)
    assert bob.get("/api/studies").status_code == 401
    Users(users.path).remove("anna")
    assert anna.delete("/api/studies/1", headers=HERE).status_code == 401


# -- headers ---------------------------------------------------------------------------------------


def test_every_answer_has_the_headers(app: Flask, database: Path) -> None:
    anna, stranger = logged_in(app, "anna"), app.test_client()
    for path in routes(app, database):
        if path == "/hpsched/logout":
            continue
        for method in ("GET", "HEAD", "PUT", "OPTIONS", "FOO"):
            for client in (anna, stranger):
                answer = client.open(path, method=method, headers=HERE)
                for name in HEADERS:
                    assert answer.headers[name], (name, method, path)
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
                assert not re.search(r"https?:|\*", policy)  # no other host
                if not path.startswith("/dashboard"):
                    assert "unsafe" not in policy
                else:
                    assert "script-src 'self' 'unsafe-inline'" not in policy
                kept = answer.headers["Cache-Control"]
                assert kept == "no-store" or kept.startswith("private, "), (path, kept)
                assert "Access-Control-Allow-Origin" not in answer.headers
                assert "Strict-Transport-Security" not in answer.headers
    secure = stranger.get("/nowhere", base_url="https://localhost")
    assert secure.headers["Strict-Transport-Security"] == "max-age=2592000"
    for path in ("/api/studies", "/dashboard", "/csv/1", "/hpsched/"):
        assert anna.get(path).headers["Cache-Control"] == "no-store"


def test_an_error_of_the_server_has_them_too(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    anna = logged_in(app, "anna")
    monkeypatch.setitem(app.view_functions, "hpsched.index", lambda: 1 / 0)
    answer = anna.get("/hpsched/", headers=PAGE)
    assert answer.status_code == 500 and answer.headers["X-Frame-Options"] == "DENY"
    assert b"ZeroDivisionError" not in answer.data and "ZeroDivisionError" in caplog.text


# -- the two applications --------------------------------------------------------------------------


def test_they_are_linked(app: Flask) -> None:
    anna = logged_in(app, "anna")
    page = anna.get("/dashboard/studies/1").get_data(as_text=True)
    assert '<a href="/hpsched/here"' in page
    targets = {
        "/studies/1/trials": "studies/1",
        "/studies/1": "studies/1",
        "/": "",
        "/studies/x": "",
    }
    for shown, target in targets.items():
        to = anna.get("/hpsched/here", headers={"Referer": f"{SITE}/dashboard{shown}?a=studies/7"})
        assert to.headers["Location"] == f"/hpsched/{target}"
    assert anna.get("/hpsched/here").headers["Location"] == "/hpsched/"
    assert 'href="/dashboard/studies/1"' in anna.get("/hpsched/studies/1").get_data(as_text=True)


def test_the_optuna_dashboard_is_served_as_it_is_installed(app: Flask) -> None:
    anna = logged_in(app, "anna")
    installed = Path(optuna_dashboard.__file__).parent
    assert anna.get("/static/bundle.js").data == (installed / "public" / "bundle.js").read_bytes()
    zipped = anna.get("/static/bundle.js", headers={"Accept-Encoding": "gzip"})
    assert zipped.data == (installed / "public" / "bundle.js.gz").read_bytes()
    again = {"If-Modified-Since": zipped.headers["Last-Modified"], "Accept-Encoding": "gzip"}
    assert anna.get("/static/bundle.js", headers=again).status_code == 304
    page = anna.get("/dashboard").get_data(as_text=True)
    assert re.sub(r"<nav .*</nav>\n", "", page) == (installed / "index.html").read_text()


def test_under_a_prefix(database: Path, access: Access) -> None:
    app = application(database, access, prefix="/search")
    anna = app.test_client()
    away = anna.get("/search/dashboard/studies/1", headers=PAGE)
    assert away.headers["Location"] == "/search/hpsched/login?next=/dashboard/studies/1"
    form = {"name": "anna", "secret": PASSWORD, "next": "/dashboard/studies/1"}
    back = anna.post("/search/hpsched/login", data=form, headers=HERE)
    assert back.headers["Location"] == "/search/dashboard/studies/1"
    assert "Path=/search" in back.headers["Set-Cookie"]
    page = anna.get("/search/dashboard/studies/1").get_data(as_text=True)
    addresses = re.findall(r'(?:src|href)="(/[^"]*)', page)
    assert addresses and all(address.startswith("/search/") for address in addresses)
    script = anna.get("/search/static/bundle.js", headers={"Accept-Encoding": "gzip"})
    assert script.headers["Content-Encoding"] == "gzip"
    text = gzip.decompress(script.data).decode()
    assert '"/search/dashboard"' in text and '"/dashboard"' not in text
    assert "${this.baseURL}/search/api/" in text and "${this.baseURL}/api/" not in text
    assert "`/search/csv/" in text and "`/csv/" not in text
    again = {"If-None-Match": script.headers["ETag"]}
    assert anna.get("/search/static/bundle.js", headers=again).status_code == 304
    assert anna.get("/search/incompatible-rdb-schema").headers["Location"] == "/search/dashboard"
    for path in ("/search/hpsched/", "/search/hpsched/studies/1"):
        ours = re.findall(
            r'(?:src|href|action|data-\w+)="(/[^"]*)', anna.get(path).get_data(as_text=True)
        )
        assert ours and all(address.startswith("/search/") for address in ours), ours
    # Where the proxy takes the prefix off, what it asks for has none; the gate is the same.
    stranger = app.test_client()
    assert stranger.get("/hpsched/login").status_code == 200
    assert stranger.get("/api/studies").status_code == 401
    assert stranger.get("/searchapi/studies").status_code == 401


def test_a_dashboard_that_keeps_its_addresses_elsewhere_is_not_served_under_a_prefix(
    database: Path, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"of another version": "{}/of another version"}
    monkeypatch.setattr("hpsched.web.optuna_side._ADDRESSES", known)
    with pytest.raises(UsageError, match=r"--prefix: .*host name of its own"):
        application(database, access, prefix="/search")
    application(database, access)  # without a prefix nothing is looked for


def test_behind_a_proxy(database: Path, access: Access) -> None:
    said = {
        "X-Forwarded-For": "9.9.9.9, 10.0.0.7",  # the last is the proxy's word
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "dashboard.example",
        "Origin": "https://dashboard.example",
    }
    form = {"name": "anna", "secret": PASSWORD}
    with_proxy = application(database, access, proxy=True).test_client()
    answer = with_proxy.post("/hpsched/login", data=form, headers=said)
    assert answer.status_code == 303 and "Secure" in answer.headers["Set-Cookie"]
    assert "Strict-Transport-Security" in answer.headers
    wrong = {**form, "secret": WRONG}
    for _ in range(FREE):
        assert with_proxy.post("/hpsched/logout", headers=said).status_code in (303, 401)
        assert with_proxy.post("/hpsched/login", data=wrong, headers=said).status_code == 401
    assert with_proxy.post("/hpsched/login", data=form, headers=said).status_code == 429
    other = {**said, "X-Forwarded-For": "9.9.9.9, 10.0.0.8"}
    assert with_proxy.post("/hpsched/login", data=form, headers=other).status_code == 303
    without = application(database, access).test_client()  # then nobody's word counts
    refused = without.post("/hpsched/login", data=form, headers=said)
    assert refused.status_code == 403 and "Strict-Transport-Security" not in refused.headers


# -- the real server -------------------------------------------------------------------------------


@dataclass
class Server:
    """``hpsched dashboard`` as a process."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    tls: ssl.SSLContext | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def ask(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """The answer to a request that is sent as it stands, without any tidying."""
        place = urlsplit(self.url)
        assert place.hostname
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(place.hostname, place.port, context=self.tls)
        else:
            connection = http.client.HTTPConnection(place.hostname, place.port)
        with closing(connection):
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read().decode(errors="replace")

    def log_in(self, name: str, secret: str, **headers: str) -> tuple[int, dict[str, str], str]:
        place = urlsplit(self.url)
        headers = {"Origin": f"{place.scheme}://{place.netloc}", **headers}
        form = f"name={name}&secret={secret.replace(' ', '+')}"
        return self.ask("POST", f"{place.path}hpsched/login", form,
                        Content_Type="application/x-www-form-urlencoded", **headers)  # fmt: skip


@contextmanager
def running(folder: Path, *arguments: str, **env: str) -> Iterator[Server]:
    log = folder / "log.txt"
    command = [sys.executable, "-m", "hpsched", "dashboard", "--port", "0", *arguments]
    with log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, text=True, cwd=folder, env=environment(**env)
        )
    try:
        while not (found := re.search(r"Dashboard on (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
        yield Server(found[1], process, log)
    finally:
        process.kill()
        process.wait()


TRICKS = [
    "//api/studies", "///api/studies", "/./api/studies", "/api/../api/studies", "/api/studies/",
    "/%2e%2e/api/studies", "/%2e/api/studies", "/api%2fstudies", "/api//studies", "/API/studies",
    "/Api/Studies", "/api/studies?next=/hpsched/login", "/api/studies#/hpsched/login",
    "/hpsched/login/../../api/studies", "/hpsched/login/%2e%2e/%2e%2e/api/studies",
    "/hpsched/static/../../api/studies", "/hpsched/static/style.css/../../../api/studies",
    "/hpsched/static/style.css%2f..%2f..%2f..%2fapi%2fstudies", "/hpsched/static/style.css%00/api",
    "/hpsched/static/%2e%2e/templates/base.html.jinja", "/hpsched/static/../access.py",
    "/hpsched/login/", "/hpsched/login;/api/studies", "/hpsched//login", "/HPSCHED/login",
    "/api/studies;/hpsched/login", "/\\api/studies", "/api\\studies", "/api/studies%20",
    "/api/studies%0a", "/dashboard%ff", "/%ef%bd%84ashboard", "http://localhost/api/studies",
    "/dashboard/../hpsched/static/style.css", "/hpsched/static//style.css/..", "*",
]  # fmt: skip


def test_the_real_server_lets_nobody_through_without_a_log_in(
    database: Path, users: Users, tmp_path: Path
) -> None:
    storage, before = f"sqlite:///{database}", contents(database)
    arguments = ("--storage", storage, "--users", str(users.path))
    with running(
        tmp_path, *arguments, HPSCHED_TOKEN=TOKEN, HPSCHED_EDITOR_TOKEN=EDITOR_TOKEN
    ) as server:
        for path in TRICKS:
            for method in ("GET", "POST", "DELETE", "OPTIONS", "FOO"):
                status, headers, body = server.ask(method, path)
                assert "secret-" not in body and "study_summaries" not in body
                assert "hpsched.web" not in body and "{%" not in body  # no file of ours
                assert status in (303, 400, 401, 403, 405), (method, path, status)
        assert server.ask("GET", "/hpsched/static/style.css")[0] == 200
        assert server.ask("GET", "/api/studies", SCRIPT_NAME="/hpsched/login")[0] == 401
        status, _, body = server.ask("GET", "/api/studies", Authorization=f"Bearer {TOKEN}")
        assert status == 200 and NAME in body
        assert server.ask("DELETE", "/api/studies/1", Authorization=f"Bearer {TOKEN}")[0] == 403
        assert contents(database) == before

        assert server.log_in("anna", WRONG)[0] == server.log_in("mallory", WRONG)[0] == 401
        assert server.log_in("anna", TOKEN)[0] == 401
        status, headers, _ = server.log_in("anna", PASSWORD)
        assert status == 303
        cookie = headers["Set-Cookie"].partition(";")[0]
        place = urlsplit(server.url)
        here = {"Cookie": cookie, "Origin": f"{place.scheme}://{place.netloc}"}
        assert server.ask("DELETE", "/api/studies/1", Cookie=cookie)[0] == 403
        assert server.ask("DELETE", "/api/studies/1", **here)[0] == 204
        assert NAME not in server.ask("GET", "/api/studies", **here)[2]
        Users(users.path).remove("anna")
        assert server.ask("GET", "/api/studies", **here)[0] == 401

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 143
        said = server.log.read_text()
    assert "Log-in: users of" in said and "and tokens" in said
    assert "log-in refused as anna from 127.0.0.1" in said and "mallory" not in said
    for secret in (PASSWORD, WRONG, TOKEN, EDITOR_TOKEN, "scrypt", cookie.partition("=")[2]):
        assert secret not in said
    assert "Traceback" not in said


def test_the_real_server_with_tls(database: Path, users: Users, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=hpsched-test", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    arguments = ("--storage", f"sqlite:///{database}", "--users", str(users.path),
                 "--certfile", str(certificate), "--keyfile", str(key))  # fmt: skip
    with running(tmp_path, *arguments) as server:
        assert server.url.startswith("https://127.0.0.1:")
        server.tls = ssl.create_default_context(cafile=certificate)
        status, headers, _ = server.ask("GET", "/hpsched/login")
        assert status == 200 and headers["Strict-Transport-Security"] == "max-age=2592000"
        status, headers, _ = server.log_in("bob", PASSWORD)
        assert status == 303 and "Secure" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert NAME in server.ask("GET", "/api/studies", Cookie=cookie)[2]
        server.tls = ssl.create_default_context()  # which does not know this certificate
        with pytest.raises(ssl.SSLCertVerificationError):
            server.ask("GET", "/hpsched/login")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 130


# -- what cannot be started ------------------------------------------------------------------------


def refused(*arguments: str, **env: str) -> str:
    """The one message of a call that is wrong."""
    done = CliRunner().invoke(command_line, ["dashboard", *arguments], env=env)
    assert isinstance(done.exception, UsageError), done.output
    return str(done.exception)


def test_calls_that_are_refused(database: Path, users: Users, tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{database}")
    assert "--insecure lets everyone in" in refused(*storage, "--host", "0.0.0.0")
    assert "through a proxy" in refused(*storage, "--proxy")
    assert "roles decide" in refused(*storage, "--writable", "--users", str(users.path))
    assert "Cannot read the users" in refused(*storage, "--users", "none")
    assert "HPSCHED_TOKEN is too short" in refused(*storage, HPSCHED_TOKEN="x")
    for prefix in ("search", "/a b", "/a/../b", '/"', "//a", "/.", "/a?b"):
        assert f"--prefix {prefix!r}" in refused(*storage, "--prefix", prefix)
    assert "There is no database" in refused("--storage", f"sqlite:///{tmp_path}/none.db")
    assert "--keyfile needs --certfile" in refused(*storage, "--keyfile", "key.pem")
    assert "No such file" in refused(*storage, "--certfile", f"{tmp_path}/none.pem")
    (tmp_path / "no.pem").write_text("no certificate")
    assert "Both have to be PEM files" in refused(*storage, "--certfile", f"{tmp_path}/no.pem")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = str(held.getsockname()[1])
        assert f"127.0.0.1:{port}: Address already in use" in refused(*storage, "--port", port)
    elsewhere = refused(*storage, "--insecure", "--host", "192.0.2.1")  # an address for examples
    assert "Cannot listen on 192.0.2.1:8080" in elsewhere and "another --port or" in elsewhere


def test_packages_that_are_missing(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    said = refused("--storage", f"sqlite:///{database}")
    assert "no optuna_dashboard" in said and "pip install 'hpsched[dashboard]'" in said


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (("127.0.0.1", 8080), "http://127.0.0.1:8080/search/"),
        (("::1", 8080, 0, 0), "http://[::1]:8080/search/"),
        (("0.0.0.0", 80), f"http://{socket.gethostname()}:80/search/"),
        (("::", 80, 0, 0), f"http://{socket.gethostname()}:80/search/"),
    ],
)
def test_the_address_to_open(name: tuple[Any, ...], url: str) -> None:
    held: Any = SimpleNamespace(getsockname=lambda: name)
    assert address_of(held, None, "/search") == url
    tls = Tls(certificate=Path("x"), key=Path("x"))
    assert address_of(held, tls, "/search") == url.replace("http:", "https:")


def test_a_key_with_a_password_is_refused_without_a_question(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=x",
         "-passout", "pass:abcdef", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="the key without a password"):
        Tls(certificate=certificate, key=key).check()


def test_users_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "users"

    def user(*arguments: str, password: str = "") -> tuple[int, str]:
        done = CliRunner().invoke(
            command_line, ["user", *arguments], input=password, env={"HPSCHED_USERS": str(path)}
        )
        return done.exit_code, done.stdout + str(done.exception or "")

    assert user("add", "anna", "--role", "editor", password=f"{PASSWORD}\n") == (0, "")
    assert user("add", "bob", password=PASSWORD) == (0, "")
    assert "too short" in user("add", "eve", password="short\n")[1]
    assert "too short" in user("add", "eve")[1]  # nothing on standard input
    assert "--role 'root'" in user("add", "eve", "--role", "root", password=PASSWORD)[1]
    assert "--replace" in user("add", "anna", password=PASSWORD)[1]
    assert json.loads(user("list", "-f", "json")[1]) == [
        {"name": "anna", "role": "editor"},
        {"name": "bob", "role": "reader"},
    ]
    assert user("remove", "bob") == (0, "")
    assert "bob" not in user("list")[1] and "anna" in user("list")[1]
    found = Access(users=Users(path)).log_in("anna", PASSWORD, "10.0.0.1")
    assert found and found.role == Role.EDITOR
