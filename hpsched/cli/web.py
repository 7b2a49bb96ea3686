"""``hpsched dashboard`` and ``hpsched user …``: the web page, and who may see it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import Format, Storage, app, hint, option, show
from hpsched.errors import UsageError

if TYPE_CHECKING:
    from hpsched.web.access import Access, Users

user_app = typer.Typer(no_args_is_help=True, help="Who may log in to the dashboard.")
app.add_typer(user_app, name="user")

UsersFile = Annotated[
    Path,
    typer.Option(
        "--users",
        envvar="HPSCHED_USERS",
        show_envvar=True,
        help="The file of users; it holds hashes of their passwords.",
        show_default=False,
    ),
]
UserName = Annotated[str, typer.Argument(help="The user's name.", show_default=False)]


@app.command(epilog="Example: hpsched dashboard --port 8080")
def dashboard(
    storage: Storage = None,
    host: Annotated[str, option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, option(help="Port to listen on; 0 takes a free one.", min=0, max=65_535)
    ] = 8080,
    users: Annotated[
        Path | None,
        typer.Option(
            envvar="HPSCHED_USERS",
            show_envvar=True,
            help="Log-in for the users in this file (hpsched user add). HPSCHED_TOKEN and "
            "HPSCHED_EDITOR_TOKEN are tokens to log in with, besides or instead.",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool, option("--insecure", help="Let everyone in who reaches the port, without a log-in.")
    ] = False,
    writable: Annotated[
        bool, option("--writable", help="Without a log-in, let everyone change and delete things.")
    ] = False,
    certfile: Annotated[
        Path | None, option(help="TLS: the certificate with its chain, PEM.", show_default=False)
    ] = None,
    keyfile: Annotated[
        Path | None,
        option(help="TLS: the key, PEM. Default: in the certificate's file.", show_default=False),
    ] = None,
    proxy: Annotated[
        bool,
        option("--proxy", help="One reverse proxy is in front: believe its X-Forwarded headers."),
    ] = False,
    prefix: Annotated[
        str, option(help="Path that all addresses begin with, such as /search.", show_default=False)
    ] = "",
) -> None:
    """Start the dashboard: hpsched's live page and the Optuna Dashboard beside it.

    On this machine alone it needs no log-in, and then nobody can change anything with it. To be
    reached by others, it wants --users or a token.
    """
    server, access_of = _installed()
    checked = _checked_prefix(prefix)
    access = access_of.decide(
        host=host, users=users, insecure=insecure, writable=writable, proxy=proxy
    )
    tls = None
    if certfile or keyfile:
        if certfile is None:
            raise UsageError("--keyfile needs --certfile, the certificate that the key is of.")
        tls = server.Tls(certificate=certfile, key=keyfile or certfile)
        tls.check()
    _check_storage(storage, checked)
    from hpsched.dashboard_figures import publish_in_background
    from hpsched.storage import open_storage
    from hpsched.web.app import create_app  # takes a while, and has to be there for what follows

    held = server.listen(host, port)
    hint(f"Dashboard on {escape(server.address_of(held, tls, checked))} (Ctrl-C ends it)")
    hint(_who(access))
    if not (tls or proxy or access.anyone or access_of.is_loopback(host)):
        hint(
            "[yellow]No TLS:[/] passwords cross the network in the clear. Give --certfile and "
            "--keyfile, or put a proxy with TLS in front."
        )

    def make_app() -> Any:
        opened = open_storage(storage)
        made = create_app(opened, access, prefix=checked, proxy=proxy)
        publish_in_background(opened)
        return made

    server.serve(held, make_app, tls)


def _installed() -> tuple[Any, Any]:
    try:
        import flask  # noqa: F401
        import optuna_dashboard  # noqa: F401

        from hpsched.web import access, server
    except ImportError as error:
        raise UsageError(
            f"The dashboard's packages are not all installed (no {error.name}): "
            "pip install 'hpsched[dashboard]'."
        ) from None
    return server, access


def _checked_prefix(prefix: str) -> str:
    found = prefix.rstrip("/")
    if found and not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", found):
        raise UsageError(
            f"--prefix {prefix!r}: a path such as /search, of letters, digits and . _ ~ -."
        )
    return found


def _check_storage(storage: str | None, prefix: str) -> None:
    """What can be wrong is said before the server starts, whose own process opens it again."""
    from optuna.storages import InMemoryStorage

    from hpsched.storage import backend_of, open_storage
    from hpsched.web.optuna_side import OptunaDashboard

    backend_of(open_storage(storage)).engine.dispose()  # type: ignore[attr-defined]
    OptunaDashboard(InMemoryStorage(), prefix)


def _who(access: Access) -> str:
    if access.anyone is None:
        ways = [
            f"users of {escape(str(access.users.path))}" if access.users else "",
            "tokens" if access.tokens else "",
        ]
        return f"Log-in: {' and '.join(filter(None, ways))}. Readers look, editors also change."
    may = "change and delete studies" if access.anyone.role == "editor" else "look, not change"
    if access.hosts is not None:
        return f"No log-in: whoever uses this machine may {may}."
    return f"[bold red]No log-in:[/] whoever reaches the port may {may}."


# -- users -----------------------------------------------------------------------------------------


@user_app.command(epilog="Example: hpsched user add anna --role editor --users dashboard-users")
def add(
    name: UserName,
    users: UsersFile,
    role: Annotated[str, option(help="reader looks; editor also changes.")] = "reader",
    replace: Annotated[
        bool, option("--replace", help="Set password and role of a user there is.")
    ] = False,
) -> None:
    """Let a user log in. The password is asked for, or is the first line of standard input."""
    from hpsched.web.access import Role

    if role not in list(Role):
        raise UsageError(f"--role {role!r}: reader or editor.")
    _users(users).add(name, _password(), Role(role), replace=replace)
    hint(f"{escape(name)} may log in as {role}, from now on.")


@user_app.command(epilog="Example: hpsched user remove anna --users dashboard-users")
def remove(name: UserName, users: UsersFile) -> None:
    """Let a user no longer log in; it ends the user's sessions, too."""
    _users(users).remove(name)
    hint(f"{escape(name)} may no longer log in.")


@user_app.command("list", epilog="Example: hpsched user list --users dashboard-users")
def list_(users: UsersFile, format: Format = "table") -> None:
    """Who may log in, and as what."""
    rows = [{"name": a.name, "role": a.role.value} for a in _users(users).read().values()]

    def table() -> Table:
        made = Table("name", "role", box=box.SIMPLE, pad_edge=False)
        for row in rows:
            made.add_row(escape(row["name"]), row["role"])
        return made

    show(rows, format, table)


def _users(path: Path) -> Users:
    _, access = _installed()
    made: Users = access.Users(path)
    return made


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    import getpass

    first = getpass.getpass("Password: ")
    if getpass.getpass("The same again: ") != first:
        raise UsageError("The two passwords differ: nothing was stored.")
    return first
