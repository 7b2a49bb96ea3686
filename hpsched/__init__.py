"""hpsched: one-cycle training recipes, found by range tests and search, on top of Optuna.

``import hpsched`` stays light: a name's module (and with it torch) is imported on first use.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsched import schedules
    from hpsched.cycle import Cycle
    from hpsched.errors import HpschedError
    from hpsched.ledger import Best
    from hpsched.lr_curve import RangeTest
    from hpsched.pruner import CyclePruner
    from hpsched.range_test import lr_range_test, lr_range_tests
    from hpsched.sampler import OneCycleSampler
    from hpsched.study import best, confirm, create_study, open_study
    from hpsched.suggest import OneCycle, suggest_onecycle
    from hpsched.summary import Summary, summarise
    from hpsched.weight_decay import RangeTests

_HOME = {
    "Best": "ledger",
    "Cycle": "cycle",
    "CyclePruner": "pruner",
    "HpschedError": "errors",
    "OneCycle": "suggest",
    "OneCycleSampler": "sampler",
    "RangeTest": "lr_curve",
    "RangeTests": "weight_decay",
    "Summary": "summary",
    "best": "study",
    "confirm": "study",
    "create_study": "study",
    "lr_range_test": "range_test",
    "lr_range_tests": "range_test",
    "open_study": "study",
    "schedules": "",
    "suggest_onecycle": "suggest",
    "summarise": "summary",
}
__all__ = [
    "Best",
    "Cycle",
    "CyclePruner",
    "HpschedError",
    "OneCycle",
    "OneCycleSampler",
    "RangeTest",
    "RangeTests",
    "Summary",
    "best",
    "confirm",
    "create_study",
    "lr_range_test",
    "lr_range_tests",
    "open_study",
    "schedules",
    "suggest_onecycle",
    "summarise",
]
__version__ = metadata.version("hpsched")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpsched' has no attribute {name!r}")
    module = importlib.import_module(f"hpsched.{_HOME[name] or name}")
    value = getattr(module, name) if _HOME[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
