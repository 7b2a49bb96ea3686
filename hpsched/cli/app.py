"""The Typer app, its global options, and what all commands share."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Annotated, Any, TextIO

import optuna
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from typer.core import TyperGroup

from hpsched.cli.completion import one_of, study_names
from hpsched.errors import UsageError
from hpsched.redaction import redact


@dataclass
class State:
    """Where output goes, and whether a traceback is wanted."""

    debug: bool = False
    out: Console = field(default_factory=Console)
    err: Console = field(default_factory=lambda: Console(stderr=True))


state = State()


class Group(TyperGroup):
    """A command group that says which value it refuses, and where that came from.

    Paragraphs of help flow: Typer leaves the line ends of all but the first as they are.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _let_flow(self)

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        """As Typer does; reads the options before the command."""
        with _naming_the_value():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        """As Typer does; reads the command and its options."""
        with _naming_the_value():
            return super().invoke(ctx)


def _let_flow(group: TyperGroup) -> None:
    for command in group.commands.values():
        paragraphs = (command.help or "").split("\n\n")
        command.help = "\n\n".join(" ".join(text.split()) for text in paragraphs) or None
        if isinstance(command, TyperGroup):
            _let_flow(command)


@contextmanager
def _naming_the_value() -> Iterator[None]:
    try:
        yield
    except typer.BadParameter as error:
        error.message += _refused(error)
        raise


def _refused(error: typer.BadParameter) -> str:
    """``: 'abc' (from HPSCHED_STUDY_CREATE_CYCLES)``, as far as the error does not say it."""
    parts = []
    with suppress(AttributeError, IndexError, KeyError):  # only pydantic's have the value
        value = error.__cause__.errors()[0]["input"]  # type: ignore[union-attr]
        parts.append(f": {redact(str(value))!r}")
    if variable := _variable(error):
        parts.append(f" (from {variable})")
    return "".join(parts)


def _variable(error: typer.BadParameter) -> str | None:
    """The environment variable that the refused value came from."""
    context, parameter = error.ctx, error.param
    if context is None or parameter is None or parameter.name is None:
        return None
    source = context.get_parameter_source(parameter.name)
    if source is None or source.name != "ENVIRONMENT":
        return None
    names = (parameter.envvar, f"{context.auto_envvar_prefix}_{parameter.name.upper()}")
    return next((name for name in names if isinstance(name, str) and os.environ.get(name)), None)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "HPSCHED",  # e.g. HPSCHED_STUDY_CREATE_CYCLES=20
    },
    help="One-cycle training recipes, found by range tests and search, on top of Optuna.",
    epilog="Start here: [bold]hpsched demo[/], then "
    "[bold]hpsched study create NAME --objective train:objective[/]. Any option can come from "
    "the environment, e.g. HPSCHED_STUDY_CREATE_CYCLES=20.",
)

#: An option; all of them have an environment variable, which the help of each does not repeat.
option = functools.partial(typer.Option, show_envvar=False)

Name = Annotated[
    str,
    typer.Argument(help="The study's name.", show_default=False, autocompletion=study_names),
]
NewName = Annotated[str, typer.Argument(help="The study's name.", show_default=False)]
Objective = Annotated[
    str,
    option(
        "--objective",
        "-o",
        envvar="HPSCHED_OBJECTIVE",
        show_envvar=True,
        help="The objective, as module:function or file.py:function.",
    ),
]
Direction = Annotated[
    str, option(help="minimize or maximize.", autocompletion=one_of("minimize", "maximize"))
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="HPSCHED_STORAGE",
        show_envvar=True,
        help="Database URL. Default: the one in the file that HPSCHED_STORAGE_FILE names, "
        "OPTUNA_STORAGE, or sqlite:///hpsched.db in this folder. Rather than a URL with a "
        "password, use the environment, the file or ~/.pgpass.",
        show_default=False,
    ),
]
Format = Annotated[
    str,
    option(
        "--format",
        "-f",
        help="table, json or yaml.",
        autocompletion=one_of("table", "json", "yaml"),
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        parts = [f"hpsched {metadata.version('hpsched')}", f"Optuna {optuna.__version__}"]
        try:
            parts.append(f"torch {metadata.version('torch')}")
        except metadata.PackageNotFoundError:
            parts.append("no torch")
        system = f"Python {platform.python_version()}, {platform.platform()}"
        typer.echo(", ".join([*parts, system]))
        raise typer.Exit


@app.callback()
def global_options(
    debug: Annotated[
        bool, option("--debug", envvar="HPSCHED_DEBUG", help="Show tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        option(
            "--version",
            callback=_version,
            is_eager=True,
            allow_from_autoenv=False,  # images set HPSCHED_VERSION to the version they hold
            help="Versions, and exit.",
        ),
    ] = False,
) -> None:
    """Set up logging and error handling for every command."""
    state.debug = debug
    state.out, state.err = _console(sys.stdout), _console(sys.stderr)
    _log_to(state.err)
    logging.getLogger("hpsched").setLevel(logging.DEBUG if debug else logging.INFO)
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.DEBUG if debug else optuna.logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: str(message)
    logging.captureWarnings(True)
    if not debug:
        for name in ("choreographer", "kaleido"):  # they log tracebacks and go on; errors we tell
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _console(stream: TextIO) -> Console:
    # Without a terminal Rich would wrap at 80 columns, which no log or pipe asks for.
    # Emoji: the user's `objs:ok` is not to be drawn as one.
    return Console(file=stream, width=None if stream.isatty() else 120, emoji=False)


def _log_to(console: Console) -> None:
    handler: logging.Handler = logging.StreamHandler(console.file)
    form = "%(asctime)s %(levelname)-7s %(message)s"
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        form = "%(message)s"
    logging.basicConfig(
        level=logging.WARNING, format=form, datefmt="%H:%M:%S", handlers=[handler], force=True
    )


def show(data: Any, format_: str, table: Callable[[], Any]) -> None:
    """Print ``data`` to stdout as json or yaml, or what ``table()`` makes.

    Raises:
        UsageError: An unknown format.
    """
    check_format(format_)
    if format_ == "table":
        state.out.print(table())
    elif format_ == "json":
        typer.echo(json.dumps(data, indent=2, default=str))
    else:
        import yaml

        typer.echo(
            yaml.safe_dump(json.loads(json.dumps(data, default=str)), sort_keys=False), nl=False
        )


def check_format(format_: str) -> None:
    """Refuse an unknown format, before the work whose result :func:`show` prints.

    Raises:
        UsageError: It is none of table, json and yaml.
    """
    if format_ not in ("table", "json", "yaml"):
        raise UsageError(f"--format {format_!r}: table, json or yaml.")


def hint(text: str) -> None:
    """Say something to the person, on stderr; ``text`` is Rich markup."""
    state.err.print(text, highlight=False, soft_wrap=True)


def command_text(command: str, storage: str | None) -> str:
    """``command`` as Rich markup, with the --storage it needs to find the same study."""
    return f"[bold cyan]{escape(with_storage(command, storage))}[/]"


def with_storage(command: str, storage: str | None) -> str:
    """``command`` with ``--storage URL`` when this call named one other than the default."""
    if storage in (None, os.environ.get("HPSCHED_STORAGE")):
        return command
    return f"{command} --storage {shlex.quote(redact(storage or ''))}"
