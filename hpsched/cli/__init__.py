"""The command line: parse, call one library function, print.

Results go to stdout, everything else to stderr. Exit code 0: done; 1: it failed; 2: the call was
wrong; 130 and 143: interrupted. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import sys

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
    except Exception as error:
        text = f"{type(error).__name__}: {error} (unexpected: run it with --debug for a traceback)"
        sys.exit(_refuse(error, text, 1))


def _refuse(error: BaseException, text: str, code: int) -> int:
    if state.debug:
        raise error
    state.err.print(f"[bold red]Error:[/] {_plain(redact(text))}", highlight=False, soft_wrap=True)
    return code


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
