"""The command line: parse, call one library function, print.

Results go to stdout, everything else to stderr. Exit code 0: done; 1: it failed; 2: the call was
wrong; 130 and 143: interrupted. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import sys
import traceback

import optuna
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from hpsched.cli import (  # noqa: F401 (they register with the app)
    demo,
    lr_find,
    studies,
    tools,
    workers,
)
from hpsched.cli.app import app, state
from hpsched.errors import HpschedError
from hpsched.storage import redact

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except HpschedError as error:
        sys.exit(_refuse(error, str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = getattr(error, "orig", None) or error.__cause__ or error
        text = f"The database failed: {_one_line(reason)}. Try again, or see `hpsched doctor`."
        sys.exit(_refuse(error, text, 1))
    except Exception as error:
        text = f"{type(error).__name__}: {error} (unexpected: run it with --debug for a traceback)"
        sys.exit(_refuse(error, text, 1))


def _refuse(error: BaseException, text: str, code: int) -> int:
    if state.debug:
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    notes = [] if state.debug else getattr(error, "__notes__", [])
    lines = "\n".join([text, *notes])
    state.err.print(f"[bold red]Error:[/] {escape(redact(lines))}", highlight=False, soft_wrap=True)
    return code


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
