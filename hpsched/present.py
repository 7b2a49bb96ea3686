"""How hpsched says things to people: numbers, times, and code to paste.

Used by the figures, the report and the command line, so that one value reads the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hpsched import schedules
from hpsched.ledger import Best, Candidate

_BETAS = ("Adam", "AdamW", "NAdam", "RAdam")  # cycle beta1
_KNOWN = ("SGD", "RMSprop", *_BETAS)  # optimizers of torch whose arguments we can write
_LARGEST, _SMALLEST = 1e6, 1e-4  # outside of these a number is written with an exponent


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, e.g. 0.0123, 1.5e-7, 12,300; ``–`` for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits}g}")
    if rounded and not _SMALLEST <= abs(rounded) < _LARGEST:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return f"{rounded:,.10f}".rstrip("0").rstrip(".")


def counted(count: int, noun: str) -> str:
    """``1 trial``, ``3 trials``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def capitalised(text: str) -> str:
    """The text with a capital letter, and else as it is."""
    return text[:1].upper() + text[1:]


def rate_text(value: float | None) -> str:
    """A rate or weight decay to two digits, as people write them: 1e-4, 0.05, 0; ``–`` for None."""
    if value is None or not 0 < value < 0.001:
        return number(value, 2)
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def guess_text(guess: Mapping[str, float]) -> str:
    """A study's first guess (``RecipeSpace.guess``) in words."""
    said = {"kappa": "κ", "max_lr": "max_lr ×"}  # times what range tests propose
    order = ("max_lr", "kappa", "weight_decay", *guess)
    named = [field for field in dict.fromkeys(order) if field in guess]
    return ", ".join(f"{said.get(field, field)} {number(guess[field], 2)}" for field in named)


def mean_and_spread(found: Candidate) -> str:
    """``mean ± spread``, both to the spread's second digit; the mean alone without a spread.

    A recipe that diverged on a fresh seed has an infinite mean: it reads ``diverged``.
    """
    if not math.isfinite(found.mean):
        return "diverged"
    spread = found.spread
    if not spread:
        return number(found.mean)
    places = max(0, 1 - math.floor(math.log10(spread)))
    if places > 9:
        return f"{number(found.mean)} ± {number(spread, 2)}"
    return f"{found.mean:,.{places}f} ± {spread:,.{places}f}"


def duration(seconds: float | None) -> str:
    """``seconds`` as its two largest units, e.g. ``4 min 12 s``; ``–`` for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{number(max(seconds, 0.0), 2)} s"
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        count, whole = divmod(whole, size)
        parts.append((count, name))
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count)


def torch_snippet(best: Best, optimizer: str = "SGD") -> str:
    """Python code that trains with the best recipe: optimizer arguments and OneCycleLR.

    Values are written in full, and ``pct_start`` as rounded to a whole step, so that torch takes
    the very steps that hpsched took (:func:`hpsched.schedules.rounded_pct_start`). A classic
    schedule is driven by LambdaLR and a function of hpsched's.

    Args:
        best: The recipe.
        optimizer: Class name in ``torch.optim``; any that is not known here counts as SGD.
    """
    recipe = best.recipe
    kind = optimizer if optimizer in _KNOWN else "SGD"
    values = {field: repr(float(value)) for field, value in recipe.items()}
    own = ", ".join(f"{name}={value!r}" for name, value in best.own.items())
    seeds = f"{best.seeds} {'fresh ' if best.confirmed else ''}seed{'s' if best.seeds > 1 else ''}"
    lines = [
        f"# hpsched, trial {best.number}: {mean_and_spread(best)} over {seeds}",
        *([f"# goes with your own {own}"] if own else []),
        "# other arguments, parameter groups: as in your train",
        *([] if best.total_steps else ["total_steps = ...  # optimizer steps of your run"]),
        f"optimizer = torch.optim.{kind}(",
        "    model.parameters(),",
        f"    lr={values['max_lr']},",
        f"    {_momentum(kind, values['max_momentum'])}",
        f"    weight_decay={values['weight_decay']},",
        ")",
        *_scheduler(best, values),
        ")  # call scheduler.step() after each optimizer.step()",
    ]
    return "\n".join(lines) + "\n"


def _momentum(kind: str, value: str) -> str:
    if kind in _BETAS:
        return f"betas=({value}, 0.999),"
    return f"momentum={value},"


def _scheduler(best: Best, values: dict[str, str]) -> list[str]:
    """The lines that make the scheduler, up to the closing bracket."""
    if best.policy.startswith(schedules.CLASSIC):
        name = best.policy.removeprefix(schedules.CLASSIC)
        steps = best.total_steps or "total_steps"
        return [
            "scheduler = torch.optim.lr_scheduler.LambdaLR(",
            f'    optimizer, hpsched.schedules.GALLERY["{name}"][1]({steps}, 1.0)',
        ]
    arguments = _one_cycle_arguments(best, values)
    return [
        "scheduler = torch.optim.lr_scheduler.OneCycleLR(",
        "    optimizer,",
        *(f"    {name}={value}," for name, value in arguments.items()),
    ]


def _one_cycle_arguments(best: Best, values: dict[str, str]) -> dict[str, str]:
    pct_start, steps = best.recipe["pct_start"], best.total_steps
    if steps:
        pct_start = schedules.rounded_pct_start(steps, pct_start, best.policy)
    linear = best.policy == "linear"
    return {
        "max_lr": values["max_lr"],
        "total_steps": str(steps) if steps else "total_steps",
        "pct_start": repr(float(pct_start)),
        "anneal_strategy": '"linear"' if linear else '"cos"',
        "three_phase": str(linear),
        "base_momentum": values["base_momentum"],
        "max_momentum": values["max_momentum"],
        "div_factor": values["div_factor"],
        "final_div_factor": values["final_div_factor"],
    }
