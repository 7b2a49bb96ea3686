"""Passwords in arguments, which every user of a machine sees in its list of processes.

The process starts itself anew without them, before anything that takes time is imported: a URL
given as ``--storage`` moves to HPSCHED_STORAGE, which the user alone can read, and which processes
it starts inherit. Uses nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpsched.redaction import redact

_ADVICE = (
    "The password in --storage could be read by every user of this machine; it was taken out of "
    "the list of processes. Rather set HPSCHED_STORAGE (the commands named below expect that), "
    "HPSCHED_STORAGE_FILE, or use ~/.pgpass: see docs/database.md.\n"
)


def is_program() -> bool:
    """Whether this process is the ``hpsched`` command, not one that imports its code."""
    main = Path(__file__).parents[1] / "__main__.py"
    return Path(sys.argv[0]).name == "hpsched" or sys.argv[0] == str(main)


def hide_passwords() -> None:
    """Start this process anew without the passwords in its arguments; returns if there are none."""
    given = sys.argv[1:]
    kept, url = without_passwords(given)
    if kept == given or sys.orig_argv[-len(given) :] != given:
        return
    environment = dict(os.environ)
    if url is not None:
        environment["HPSCHED_STORAGE"] = url
        sys.stderr.write(_ADVICE)
        sys.stderr.flush()
    own = sys.orig_argv[: -len(given)]
    os.execve(sys.executable, [*own, *kept], environment)


def without_passwords(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without passwords, and the --storage URL that had one and was taken out.

    A password anywhere else is a mistake, which the command will refuse; it becomes ``***``.
    """
    kept: list[str] = []
    last: list[str] = []  # the last --storage counts, and its place does not matter
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":  # what follows is no option
            kept += [argument, *rest]
        elif argument == "--storage":
            last = [argument, *[value for value in [next(rest, None)] if value is not None]]
        elif argument.startswith("--storage="):
            last = [argument]
        else:
            kept.append(redact(argument) if "://" in argument else argument)
    url = last[-1].removeprefix("--storage=") if last else ""
    if redact(url) != url:
        return kept, url
    if [*kept, *last] == arguments or all(redact(each) == each for each in arguments):
        return arguments, None
    return [*kept, *last], None
