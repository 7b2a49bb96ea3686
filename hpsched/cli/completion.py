"""What the shell offers for a value when Tab is pressed; never an error, nor a file made."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import typer


def one_of(*values: str) -> Callable[[str], list[str]]:
    """The completion of an option that takes one of these."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def sampler_names(incomplete: str) -> list[str]:
    """For ``--sampler``."""
    from hpsched.study import SAMPLERS

    return one_of(*SAMPLERS)(incomplete)


def study_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The studies in the storage that the line names so far; none if it cannot be read."""
    try:
        import optuna

        from hpsched.storage import open_storage

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = optuna.get_all_study_names(open_storage(ctx.params.get("storage")))
    except Exception:  # whatever it is, the command itself will say it
        return []
    return one_of(*sorted(names))(incomplete)
