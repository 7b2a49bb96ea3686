"""Who may do what on the dashboard: roles, users, tokens.

===========  ===========================================================================
``reader``   looks: GET and HEAD
``editor``   also changes what the Optuna Dashboard can change: notes, names, deleting
===========  ===========================================================================

Users stand in a file, one a line, ``name:role:hash``, kept by ``hpsched user``; a change counts at
once. Tokens come from HPSCHED_TOKEN (reader) and HPSCHED_EDITOR_TOKEN (editor). With neither,
nobody logs in, and everyone who reaches the port has the same role.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from werkzeug.exceptions import TooManyRequests
from werkzeug.security import check_password_hash, generate_password_hash

from hpsched.errors import UsageError
from hpsched.web.throttle import Throttle

logger = logging.getLogger("hpsched.dashboard")

SHORTEST_PASSWORD = 12
SHORTEST_TOKEN = 20
SHORTEST_KEY = 32
SESSION_SECONDS = 12 * 3600
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKENS = {"HPSCHED_TOKEN": "reader", "HPSCHED_EDITOR_TOKEN": "editor"}
_KEY = "HPSCHED_SECRET_KEY"
#: Checked where there is no such user, so that both take equally long.
_NOBODY = "scrypt:32768:8:1$hpsched$" + 128 * "0"
_hashing = threading.Semaphore(2)  # each takes 32 MB


class Role(StrEnum):
    """What one may do."""

    READER = "reader"
    EDITOR = "editor"


@dataclass(frozen=True, kw_only=True)
class Account:
    """Someone who may log in, or everyone where nobody does.

    Attributes:
        name: The user's; empty for a token.
        role: What it may do.
        secret: The password's hash, or a digest of the token.
    """

    name: str = ""
    role: Role
    secret: str = field(default="", repr=False)


# -- users -----------------------------------------------------------------------------------------


class Users:
    """The file of users, read again whenever it has changed.

    Args:
        path: The file. It must not be readable by everyone on the machine.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._accounts: dict[str, Account] = {}

    def read(self) -> dict[str, Account]:
        """Name → account.

        Raises:
            UsageError: The file is missing, readable by all, or has a line that is no user.
        """
        try:
            with self.path.open(encoding="utf-8") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_mode)
                if seen != self._seen:
                    _check_mode(self.path, stat.st_mode)
                    self._accounts = dict(_parse(self.path, file.read()))
                    self._seen = seen
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(
                f"Cannot read the users in {self.path}: {reason}. Make the file with "
                "`hpsched user add NAME --users FILE`."
            ) from None
        return self._accounts

    def add(self, name: str, password: str, role: Role, *, replace: bool = False) -> None:
        """Store a user; the file is made if there is none.

        Raises:
            UsageError: The name is taken or has odd letters; the password is too short.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no user name: use up to 64 of A-Z a-z 0-9 . _ @ -, a letter or digit "
                "first."
            )
        if len(password) < SHORTEST_PASSWORD:
            raise UsageError(f"The password is too short: {SHORTEST_PASSWORD} characters or more.")
        with self._changing() as accounts:
            if name in accounts and not replace:
                raise UsageError(
                    f"There is a user {name!r}: --replace sets password and role anew."
                )
            secret = generate_password_hash(password)
            accounts[name] = Account(name=name, role=role, secret=secret)

    def remove(self, name: str) -> None:
        """Take a user out of the file, which ends the user's sessions.

        Raises:
            UsageError: There is no such user.
        """
        with self._changing() as accounts:
            if name not in accounts:
                known = ", ".join(accounts) or "none"
                raise UsageError(f"No user {name!r} in {self.path}; there are: {known}.")
            del accounts[name]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Account]]:
        target = self.path.resolve()
        try:
            folder = os.open(target.parent, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"Cannot open the folder of {self.path}: {error.strerror}.") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of two changes at once, neither is lost
            accounts = dict(self.read()) if target.exists() else {}
            yield accounts
            _write(target, accounts)
        except OSError as error:
            raise UsageError(f"Cannot write {self.path}: {error.strerror}.") from None
        finally:
            os.close(folder)


def _check_mode(path: Path, mode: int) -> None:
    # A group may read it: that is how Kubernetes hands a secret to a process that is not root.
    if mode & 0o027:
        raise UsageError(
            f"{path} has mode {mode & 0o777:o}, so that others can read or change who may log in: "
            f"chmod 600 {path}"
        )


def _parse(path: Path, text: str) -> Iterator[tuple[str, Account]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, role, secret = (*line.strip().split(":", 2), "", "")[:3]
        # Of a hash that werkzeug does not know, checking would fail at each log-in.
        if not (_NAME.fullmatch(name) and role in list(Role) and secret.count("$") == 2):
            raise UsageError(
                f"{path}, line {number}: not `name:role:hash` with role reader or editor. Use "
                "`hpsched user add`."
            )
        yield name, Account(name=name, role=Role(role), secret=secret)


def _write(path: Path, accounts: Mapping[str, Account]) -> None:
    """All of it or nothing, for the owner's eyes only."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{a.name}:{a.role}:{a.secret}\n" for a in accounts.values())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


# -- access ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Access:
    """Decides who someone is.

    Attributes:
        users: The file of users, if there is one.
        tokens: The accounts of tokens.
        anyone: Everyone's account, where nobody logs in.
        hosts: Names under which the server may be asked, against a web page elsewhere whose name
            is made to point at this machine (DNS rebinding); None for any.
        key: Signs sessions.
        clock: Seconds since 1970, for sessions.
        throttle: Slows wrong passwords and tokens.
    """

    users: Users | None = None
    tokens: tuple[Account, ...] = ()
    anyone: Account | None = None
    hosts: frozenset[str] | None = None
    key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    clock: Callable[[], float] = time.time
    throttle: Throttle = field(default_factory=lambda: Throttle(time.monotonic))
    _ended: dict[str, float] = field(default_factory=dict, repr=False)  # sessions → when they began
    _complained: bool = False

    @property
    def fingerprint(self) -> str:
        """Tells keys apart, and gives none away."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    # Who someone is

    def log_in(self, name: str, secret: str, address: str) -> Account | None:
        """The account of a user and password, or of a token (then without a name).

        Raises:
            TooManyRequests: It was wrong too often; the error says when to try again.
        """
        with _hashing if name else nullcontext():
            self._slow(address, name)
            found = self._of_password(name, secret) if name else self._of_token(secret)
        if found is None:
            self.throttle.failed(address, name)
            # Other names stay out of the log: some are passwords, typed into the wrong field.
            whom = f" as {name}" if name in self._users() else ""
            logger.warning("log-in refused%s from %s", whom, address)
        return found

    def _slow(self, address: str, name: str) -> None:
        if (wait := math.ceil(self.throttle.wait(address, name))) > 0:
            raise TooManyRequests(f"Wrong too often. Try again in {wait} s.", retry_after=wait)

    def _of_password(self, name: str, password: str) -> Account | None:
        found = self._users().get(name)
        right = check_password_hash(found.secret if found else _NOBODY, password)
        return found if right else None

    def _of_token(self, token: str) -> Account | None:
        digest = _digest(token)
        same = [a for a in self.tokens if hmac.compare_digest(a.secret, digest)]
        return same[-1] if same else None

    def _users(self) -> Mapping[str, Account]:
        """Nobody, while the file cannot be read; the log says so once."""
        try:
            found = self.users.read() if self.users else {}
            self._complained = False
        except UsageError as error:
            if not self._complained:
                logger.error("nobody gets in with a password: %s", error)
            self._complained = True
            return {}
        return found

    # Sessions, as what a signed cookie holds

    def begin(self, account: Account) -> dict[str, Any]:
        """A new session of the account."""
        return {"id": secrets.token_hex(16), "mark": self._mark(account), "since": self.clock()}

    def resume(self, session: Mapping[str, Any]) -> Account | None:
        """The session's account, unless it is over: too old, ended, or the account changed."""
        try:
            id_, mark, since = session["id"], session["mark"], session["since"]
        except KeyError:
            return None
        if id_ in self._ended or not 0 <= self.clock() - since < SESSION_SECONDS:
            return None
        accounts = (*self.tokens, *self._users().values())
        return next((a for a in accounts if hmac.compare_digest(self._mark(a), mark)), None)

    def end(self, session: Mapping[str, Any]) -> None:
        """End a session for good: a copy of its cookie is worth nothing from now on."""
        oldest = self.clock() - SESSION_SECONDS
        kept = {id_: since for id_, since in self._ended.items() if since > oldest}
        self._ended = kept | {session["id"]: session["since"]}

    def _mark(self, account: Account) -> str:
        """Stands for the account in a session, and not after a change of its password."""
        text = f"{account.name}:{account.secret}"
        return hmac.new(self.key.encode(), text.encode(), hashlib.sha256).hexdigest()


def decide(
    *,
    host: str,
    users: Path | None = None,
    insecure: bool = False,
    writable: bool = False,
    proxy: bool = False,
) -> Access:
    """Who gets in, from options and the environment.

    Args:
        host: Address that the server will listen on.
        users: File of users.
        insecure: Let everyone in who reaches an address that is not this machine's own.
        writable: Without log-in, let everyone change things.
        proxy: A reverse proxy passes on requests from elsewhere.

    Raises:
        UsageError: Others could get in without a log-in; a token, key or file that cannot be used.
    """
    file = Users(users) if users else None
    if file and not file.read():
        raise UsageError(f"No user in {users}: hpsched user add NAME --users {users}")
    tokens = tuple(_tokens())
    key = _secret(_KEY, SHORTEST_KEY) or secrets.token_hex(32)
    if file or tokens:
        if writable or insecure:
            given = "--writable" if writable else "--insecure"
            raise UsageError(f"{given} is for a dashboard without log-in: here roles decide.")
        return Access(users=file, tokens=tokens, key=key)
    local = is_loopback(host) and not proxy
    if not local and not insecure:
        whom = "through a proxy" if proxy else f"on {host}"
        raise UsageError(
            f"Others could reach the dashboard {whom} without a log-in. Make a user (hpsched user "
            "add NAME --users FILE) and give --users FILE, or set HPSCHED_TOKEN to a long random "
            "text; --insecure lets everyone in."
        )
    anyone = Account(role=Role.EDITOR if writable else Role.READER)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if local else None
    return Access(anyone=anyone, hosts=hosts, key=key)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tokens() -> Iterator[Account]:
    for variable, role in _TOKENS.items():
        if token := _secret(variable, SHORTEST_TOKEN):
            yield Account(role=Role(role), secret=_digest(token))


def _secret(variable: str, shortest: int) -> str:
    """A secret from a variable, or from the file that ``<variable>_FILE`` names."""
    text, source = os.environ.get(variable, ""), variable
    if path := not text and os.environ.get(f"{variable}_FILE"):
        source = f"{variable}_FILE={path}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(f"Cannot read {source}: {reason}.") from None
    text = text.strip()
    if (text or path) and len(text) < shortest:
        raise UsageError(
            f"{source} is too short: {shortest} characters or more, such as those that "
            "`openssl rand -hex 32` prints."
        )
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
