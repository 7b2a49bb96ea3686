"""Who gets in: users, tokens, sessions and the slowing of guesses, with a clock of the test's."""

from __future__ import annotations

import ipaddress
import logging
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import TooManyRequests
from werkzeug.security import generate_password_hash

from hpsched.errors import UsageError
from hpsched.web import access as access_module
from hpsched.web import throttle
from hpsched.web.access import SESSION_SECONDS, Access, Account, Role, Users, decide, is_loopback
from hpsched.web.throttle import Throttle

PASSWORD, OTHER = "correct horse battery", "staple and some more"
TOKEN, EDITOR_TOKEN = "r" * 20, "e" * 40


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HPSCHED_TOKEN", "HPSCHED_EDITOR_TOKEN", "HPSCHED_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.fixture(scope="session")
def anna() -> str:
    """Anna's line, made once: hashing is slow on purpose."""
    return f"anna:editor:{generate_password_hash(PASSWORD)}\n"


@pytest.fixture
def users(tmp_path: Path, anna: str) -> Users:
    made = Users(tmp_path / "users")
    made.path.touch(mode=0o600)
    made.path.write_text(anna)
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(users: Users, clock: Clock) -> Access:
    tokens = (Account(role=Role.READER, secret=access_module._digest(TOKEN)),)
    return Access(users=users, tokens=tokens, clock=clock, throttle=Throttle(clock))


# -- the file of users -----------------------------------------------------------------------------


def test_the_file_holds_hashes_for_its_owner_alone(users: Users) -> None:
    users.add("bob.b@lab-1", PASSWORD, Role.READER)
    text = users.path.read_text()
    assert stat.S_IMODE(users.path.stat().st_mode) == 0o600
    assert PASSWORD not in text
    lines = [line.split(":", 2) for line in text.splitlines()]
    assert [line[:2] for line in lines] == [["anna", "editor"], ["bob.b@lab-1", "reader"]]
    assert all(line[2].startswith("scrypt:32768:8:1$") for line in lines)
    assert lines[0][2] != lines[1][2]  # salted
    assert [path.name for path in users.path.parent.iterdir()] == ["users"]  # no draft is left


def test_a_change_counts_at_once(users: Users, access: Access) -> None:
    elsewhere = Users(users.path)
    elsewhere.add("bob", OTHER, Role.READER)
    assert access.log_in("bob", OTHER, "10.0.0.1")
    elsewhere.add("bob", PASSWORD, Role.EDITOR, replace=True)
    assert access.log_in("bob", OTHER, "10.0.0.1") is None
    found = access.log_in("bob", PASSWORD, "10.0.0.1")
    assert found and found.role == Role.EDITOR
    elsewhere.remove("bob")
    assert access.log_in("bob", PASSWORD, "10.0.0.1") is None


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "ä", "a" * 65, "a\n", "../a"])
def test_odd_names_are_refused(users: Users, name: str) -> None:
    before = users.path.read_bytes()
    with pytest.raises(UsageError, match="is no user name"):
        users.add(name, PASSWORD, Role.READER)
    assert users.path.read_bytes() == before


def test_wrong_changes_are_refused(users: Users) -> None:
    before = users.path.read_bytes()
    with pytest.raises(UsageError, match="too short: 12"):
        users.add("bob", "elevenchars", Role.READER)
    with pytest.raises(UsageError, match=r"'anna'.*--replace"):
        users.add("anna", OTHER, Role.READER)
    with pytest.raises(UsageError, match=r"No user 'bob'.*there are: anna"):
        users.remove("bob")
    assert users.path.read_bytes() == before


@pytest.mark.parametrize(
    ("mode", "fine"),
    [(0o600, True), (0o400, True), (0o440, True), (0o644, False), (0o620, False), (0o604, False)],
)
def test_others_may_not_read_or_change_it(users: Users, mode: int, fine: bool) -> None:
    users.path.chmod(mode)
    if fine:
        assert list(Users(users.path).read()) == ["anna"]
        return
    with pytest.raises(UsageError, match=f"mode {mode:o}.*chmod 600"):
        Users(users.path).read()
    with pytest.raises(UsageError, match="chmod 600"):
        users.read()  # also one that it has read before


@pytest.mark.parametrize(
    "line",
    ["anna", "anna:reader", "anna:reader:", "anna:reader:plain password", "anna:admin:scrypt:1$a$b",
     "a b:reader:scrypt:1$a$b", "::", "anna:reader:scrypt$x"],
)  # fmt: skip
def test_lines_that_are_no_users_are_named(users: Users, line: str) -> None:
    users.path.write_text(f"# mine\n\n{line}\n")
    with pytest.raises(UsageError, match=r"users, line 3: not `name:role:hash`"):
        users.read()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Users(tmp_path / "none").read()
    with pytest.raises(UsageError, match="Is a directory"):
        Users(tmp_path).read()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(UsageError, match="not UTF-8"):
        Users(tmp_path / "binary").read()
    with pytest.raises(UsageError, match="Cannot open the folder"):
        Users(tmp_path / "none" / "users").add("anna", PASSWORD, Role.READER)


def test_a_link_stays_one(users: Users, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(users.path)
    Users(link).add("bob", PASSWORD, Role.READER)
    assert link.is_symlink() and list(users.read()) == ["anna", "bob"]


def test_a_file_that_goes_bad_lets_nobody_in(
    users: Users, access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    account = access.log_in("anna", PASSWORD, "10.0.0.1")
    assert account
    session = access.begin(account)
    users.path.write_text("anna:editor\n")
    caplog.clear()
    assert access.resume(session) is None
    assert access.log_in("anna", PASSWORD, "10.0.0.1") is None
    complaints = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(complaints) == 1 and "nobody gets in with a password" in complaints[0].getMessage()


# -- logging in ------------------------------------------------------------------------------------


def test_passwords_and_tokens(access: Access) -> None:
    anna = access.log_in("anna", PASSWORD, "10.0.0.1")
    assert anna and (anna.name, anna.role) == ("anna", Role.EDITOR)
    token = access.log_in("", TOKEN, "10.0.0.1")
    assert token and (token.name, token.role) == ("", Role.READER)
    for name, secret in (("anna", OTHER), ("anna", ""), ("Anna", PASSWORD), ("anna", TOKEN),
                         ("bob", PASSWORD)):  # fmt: skip
        assert access.log_in(name, secret, f"10.0.1.{len(secret)}") is None
    for secret in ("", PASSWORD, TOKEN[:-1], TOKEN + "r", "ä", "\ud800", anna.secret, token.secret):
        assert access.log_in("", secret, f"10.0.2.{len(secret)}") is None


def test_an_unknown_user_takes_as_long_as_a_known_one(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = access_module.check_password_hash

    def noting(hashed: str, password: str) -> bool:
        checked.append(hashed.rpartition("$")[0].partition("$")[0])
        return check(hashed, password)

    monkeypatch.setattr(access_module, "check_password_hash", noting)
    access.log_in("anna", OTHER, "10.0.0.1")
    access.log_in("nobody", OTHER, "10.0.0.1")
    assert checked == ["scrypt:32768:8:1"] * 2  # the same work


def test_secrets_stay_out_of_logs_and_reprs(
    access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    typed_into_the_wrong_field = "hunter2 hunter2"
    access.log_in(typed_into_the_wrong_field, "", "10.0.0.1")
    access.log_in("anna", OTHER, "10.0.0.2")
    access.log_in("", OTHER, "10.0.0.3")
    assert [record.getMessage() for record in caplog.records] == [
        "log-in refused from 10.0.0.1",
        "log-in refused as anna from 10.0.0.2",
        "log-in refused from 10.0.0.3",
    ]
    shown = repr(access) + repr(access.log_in("anna", PASSWORD, "10.0.0.4"))
    for secret in (access.key, "scrypt", access_module._digest(TOKEN)):
        assert secret not in shown


# -- sessions --------------------------------------------------------------------------------------


def test_a_session_ends_by_time(access: Access, clock: Clock) -> None:
    anna = access.log_in("anna", PASSWORD, "10.0.0.1")
    assert anna
    session = access.begin(anna)
    clock.now += SESSION_SECONDS - 1
    assert access.resume(session) == anna
    clock.now += 1
    assert access.resume(session) is None
    clock.now -= SESSION_SECONDS + 1  # from the future
    assert access.resume(session) is None


def test_a_session_ends_by_logging_out_and_no_other_does(access: Access, clock: Clock) -> None:
    anna = access.log_in("anna", PASSWORD, "10.0.0.1")
    assert anna
    one, other = access.begin(anna), access.begin(anna)
    access.end(one)
    assert access.resume(one) is None and access.resume(other) == anna
    clock.now += SESSION_SECONDS
    access.end(other)
    assert list(access._ended) == [other["id"]]  # what is over anyway is forgotten


def test_a_session_ends_with_its_user_or_password(access: Access, users: Users) -> None:
    users.add("bob", PASSWORD, Role.READER)
    anna, bob = (access.log_in(name, PASSWORD, "10.0.0.1") for name in ("anna", "bob"))
    assert anna and bob
    of_anna, of_bob = access.begin(anna), access.begin(bob)
    users.add("anna", OTHER, Role.EDITOR, replace=True)
    assert access.resume(of_anna) is None and access.resume(of_bob) == bob
    users.remove("bob")
    assert access.resume(of_bob) is None
    users.add("bob", PASSWORD, Role.READER)  # the same name, another user
    assert access.resume(of_bob) is None


def test_a_session_has_the_role_that_its_user_has_now(access: Access, users: Users) -> None:
    anna = access.log_in("anna", PASSWORD, "10.0.0.1")
    assert anna
    session = access.begin(anna)
    users.path.write_text(users.path.read_text().replace("anna:editor", "anna:reader"))
    now = access.resume(session)
    assert now and now.role == Role.READER


def test_a_session_of_a_token_ends_with_the_token_and_the_key(access: Access) -> None:
    account = access.log_in("", TOKEN, "10.0.0.1")
    assert account
    session = access.begin(account)
    assert access.resume(session) == account
    for other in (Access(tokens=(), key=access.key), Access(tokens=access.tokens)):
        other.clock = access.clock
        assert other.resume(session) is None
    restarted = Access(tokens=access.tokens, key=access.key, clock=access.clock)
    assert restarted.resume(session) == account


@given(st.dictionaries(st.sampled_from(["id", "mark", "since"]), st.just("x"), max_size=2))
def test_half_a_session_is_none(session: dict[str, str]) -> None:
    assert Access().resume(session) is None


# -- guesses ---------------------------------------------------------------------------------------


def test_delays_grow_and_are_forgotten(clock: Clock) -> None:
    slowed, waits = Throttle(clock), []
    for _ in range(20):
        waits.append(slowed.wait("10.0.0.1"))
        clock.now += waits[-1]
        slowed.failed("10.0.0.1")
    assert waits[:9] == [0, 0, 0, 0, 0, 1, 2, 4, 8]
    assert waits[-1] == throttle.LONGEST == max(waits)
    assert slowed.wait("10.0.0.2") == 0
    clock.now += throttle.FORGET + 1
    assert slowed.wait("10.0.0.1") == 0
    slowed.failed("10.0.0.1")
    assert slowed.wait("10.0.0.1") == 0  # counted from the start


def test_a_user_is_slowed_everywhere_but_at_a_first_try(clock: Clock) -> None:
    slowed = Throttle(clock)
    for number in range(100):  # from many addresses
        slowed.failed(f"10.0.{number}.1", "anna")
    assert slowed.wait("10.0.0.1", "anna") == throttle.LONGEST
    assert slowed.wait("10.0.0.1", "bob") == 0
    assert slowed.wait("192.0.2.1", "anna") == 0  # anna herself is not locked out
    slowed.failed("192.0.2.1", "anna")
    assert slowed.wait("192.0.2.1", "anna") == throttle.LONGEST


def test_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "REMEMBERED", 50)
    slowed = Throttle(clock)
    for number in range(500):
        slowed.failed(str(ipaddress.ip_address(number)), f"user{number}")
    assert len(slowed) == 50
    slowed.failed("10.0.0.1", "u" * 1_000_000)
    assert max(len(key[1]) for key in slowed._records) == 64


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("not an address", "not an address", True),
    ],
)
def test_addresses_of_one_machine_count_together(
    clock: Clock, one: str, other: str, same: bool
) -> None:
    slowed = Throttle(clock)
    for _ in range(throttle.FREE):
        slowed.failed(one)
    assert (slowed.wait(other) > 0) == same


def test_a_slowed_address_is_refused_even_the_right_password(access: Access, clock: Clock) -> None:
    for _ in range(throttle.FREE):
        assert access.log_in("anna", OTHER, "10.0.0.1") is None
    with pytest.raises(TooManyRequests, match="again in 1 s") as refused:
        access.log_in("anna", PASSWORD, "10.0.0.1")
    assert refused.value.retry_after == 1
    with pytest.raises(TooManyRequests):
        access.log_in("", TOKEN, "10.0.0.1")
    assert access.log_in("anna", PASSWORD, "10.0.0.2")
    clock.now += 1
    assert access.log_in("anna", PASSWORD, "10.0.0.1")
    assert access.log_in("anna", OTHER, "10.0.0.1") is None
    with pytest.raises(TooManyRequests, match="again in 2 s"):  # the log-in bought no new guesses
        access.log_in("anna", PASSWORD, "10.0.0.1")


# -- options and environment -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("LOCALHOST", True), ("0.0.0.0", False), ("::", False), ("192.168.1.2", False),
     ("example.org", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) == own


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "node-1", ""])
def test_others_need_a_log_in(host: str, users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"hpsched user add.*--users.*HPSCHED_TOKEN.*--insecure"):
        decide(host=host)
    with pytest.raises(UsageError, match="through a proxy"):
        decide(host="127.0.0.1", proxy=True)
    open_ = decide(host=host, insecure=True)
    assert open_.anyone and open_.anyone.role == Role.READER and open_.hosts is None
    closed = decide(host=host, users=users.path)
    assert closed.anyone is None and closed.users
    monkeypatch.setenv("HPSCHED_TOKEN", TOKEN)
    assert decide(host=host).anyone is None


def test_this_machine_needs_none_and_looks() -> None:
    found = decide(host="127.0.0.1")
    assert found.anyone and found.anyone.role == Role.READER
    assert found.hosts == {"localhost", "127.0.0.1", "::1"}
    writable = decide(host="127.0.0.1", writable=True)
    assert writable.anyone and writable.anyone.role == Role.EDITOR


@pytest.mark.parametrize("option", ["insecure", "writable"])
def test_a_log_in_and_its_opposite(users: Users, option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} is for a dashboard without log-in"):
        decide(host="127.0.0.1", users=users.path, **{option: True})


def test_tokens_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{EDITOR_TOKEN}\n")
    monkeypatch.setenv("HPSCHED_TOKEN", TOKEN)
    monkeypatch.setenv("HPSCHED_EDITOR_TOKEN_FILE", str(tmp_path / "token"))
    found = decide(host="0.0.0.0")
    for token, role in ((TOKEN, Role.READER), (EDITOR_TOKEN, Role.EDITOR)):
        account = found.log_in("", token, "10.0.0.1")
        assert account and account.role == role
    assert found.log_in("anna", PASSWORD, "10.0.0.1") is None


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HPSCHED_TOKEN", "short", "HPSCHED_TOKEN is too short: 20"),
        ("HPSCHED_EDITOR_TOKEN", " " * 30 + "x", "HPSCHED_EDITOR_TOKEN is too short: 20"),
        ("HPSCHED_SECRET_KEY", "x" * 31, "HPSCHED_SECRET_KEY is too short: 32"),
        (
            "HPSCHED_TOKEN_FILE",
            "/none/there",
            "Cannot read HPSCHED_TOKEN_FILE=/none/there: No such",
        ),
        ("HPSCHED_TOKEN_FILE", "/dev/null", "HPSCHED_TOKEN_FILE=/dev/null is too short"),
    ],
)
def test_secrets_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said):
        decide(host="127.0.0.1")


def test_a_key_of_the_environment_keeps_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(host="127.0.0.1").key != decide(host="127.0.0.1").key
    monkeypatch.setenv("HPSCHED_SECRET_KEY", "k" * 32)
    assert decide(host="127.0.0.1").key == "k" * 32
    assert decide(host="127.0.0.1").fingerprint == decide(host="127.0.0.1").fingerprint


def test_a_file_without_users_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.touch(mode=0o600)
    with pytest.raises(UsageError, match=r"No user in .*hpsched user add"):
        decide(host="0.0.0.0", users=path)
