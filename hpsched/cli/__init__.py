"""The command line: parse, call one library function, print.

Results go to stdout, everything else to stderr. Exit code 0: done; 1: it failed; 2: the call was
wrong; 130 and 143: interrupted. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from typing import Any

from hpsched.cli.argv import hide_passwords, is_program

if is_program():  # before the imports below, which take a second
    hide_passwords()

import optuna
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from hpsched.cli import (  # noqa: F401 (they register with the app)
    compare,
    demo,
    lr_find,
    orders,
    studies,
    tools,
    web,
    workers,
)
from hpsched.cli.app import app, state
from hpsched.errors import HpschedError
from hpsched.redaction import redact
from hpsched.storage import remedy_for

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit."""
    _redact_logs()
    try:
        app()
    except HpschedError as error:
        sys.exit(_refuse(error, str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        reason = _one_line(getattr(cause, "orig", None) or cause)
        remedy = remedy_for(reason) or "Try again, or see `hpsched doctor`."
        text = f"The database failed: {reason}. {remedy}"
        sys.exit(_refuse(error, text, 1))
    except Exception as error:
        text = f"{type(error).__name__}: {error} (unexpected: run it with --debug for a traceback)"
        sys.exit(_refuse(error, text, 1))


def _redact_logs() -> None:
    """Whatever is logged, by the user's code as well, is free of passwords."""
    make = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(Exception):  # a wrong call of the user's, which logging itself reports
            record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)))
        return record

    logging.setLogRecordFactory(make_redacted)


def _refuse(error: BaseException, text: str, code: int) -> int:
    if state.debug:
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    notes = [] if state.debug else getattr(error, "__notes__", [])
    lines = "\n".join([text, *notes])
    state.err.print(f"[bold red]Error:[/] {escape(redact(lines))}", highlight=False, soft_wrap=True)
    return code


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
