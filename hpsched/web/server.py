"""The dashboard's server: gunicorn, started from here, with one process that answers.

The process that was started keeps the port, starts the one that answers, and starts it anew should
it die. Databases are opened in the latter alone: connections do not survive a fork.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError
from gunicorn.glogging import Logger

from hpsched.errors import HpschedError, UsageError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("hpsched.dashboard")

THREADS = 16
GRACE_SECONDS = 10  # for requests in progress, when the server is told to end
HANGS_SECONDS = 120  # without a sign of life, after which the process that answers is replaced


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files for https: the certificate (with its chain) and its key, PEM, without a password."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Load both once.

        Raises:
            UsageError: One cannot be read, has a password, or does not go with the other.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An empty password rather than a question on the terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"Cannot use the certificate {self.certificate} with the key {self.key}: "
                f"{reason.rstrip('.')}. Both have to be PEM files, readable, of one pair, and the "
                "key without a password."
            ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that what is printed next is true.

    Args:
        host: Name or address.
        port: Port; 0 for any that is free.

    Raises:
        UsageError: It cannot listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(128)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another --port or --host."
        ) from None
    return made


def address_of(held: socket.socket, tls: Tls | None, prefix: str = "") -> str:
    """The URL to open; where it listens on all addresses, this machine's own name."""
    host, port = held.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = socket.gethostname()
    elif address.version == 6:
        host = f"[{host}]"
    return f"{'https' if tls else 'http'}://{host}:{port}{prefix}/"


def serve(held: socket.socket, make_app: Callable[[], WSGIApplication], tls: Tls | None) -> None:
    """Answer requests until told to end; exits with 130 (Ctrl-C), 143 (SIGTERM) or 1.

    Args:
        held: From :func:`listen`.
        make_app: Makes the application, in the process that answers.
        tls: For https.
    """
    settings: dict[str, Any] = {
        "bind": f"fd://{held.detach()}",
        "worker_class": "gthread",
        "workers": 1,  # wrong passwords and ended sessions are remembered by one
        "threads": THREADS,
        "timeout": HANGS_SECONDS,
        "graceful_timeout": GRACE_SECONDS,
        "logger_class": _Log,
        "proc_name": "hpsched dashboard",
        # What a proxy says is read in one place, by werkzeug, and only when there is one.
        "forwarded_allow_ips": "",
        "secure_scheme_headers": {},
    }
    if tls:
        settings |= {"certfile": str(tls.certificate), "keyfile": str(tls.key)}
    _Arbiter(_Application(make_app, settings)).run()


class _Application(BaseApplication):  # type: ignore[misc]
    def __init__(self, make_app: Callable[[], WSGIApplication], settings: dict[str, Any]) -> None:
        self._make_app, self._settings = make_app, settings
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)
        if "control_socket_disable" in self.cfg.settings:  # a way in that nobody asked for
            self.cfg.set("control_socket_disable", True)

    def load(self) -> WSGIApplication:
        try:
            return self._make_app()
        except HpschedError as error:
            raise AppImportError(f"Error: {error}") from None  # printed, and the server ends


class _Arbiter(Arbiter):  # type: ignore[misc]
    """Gunicorn's main process, with the exit codes of all hpsched commands."""

    _code = 0

    def handle_int(self) -> None:
        self._code = 130
        super().handle_int()

    def handle_term(self) -> None:
        self._code = 143
        super().handle_term()

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        try:
            super().halt(reason, exit_status)
        except SystemExit:
            sys.exit(self._code or min(exit_status, 1))


class _Log(Logger):  # type: ignore[misc]
    """What gunicorn has to say goes where all of hpsched's log does; it notes no requests."""

    def setup(self, cfg: Any) -> None:
        self.error_log.setLevel(logging.WARNING)
        self.error_log.propagate = True
