"""Optuna's official suites for samplers, run on the package as OptunaHub loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import optunahub
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

PACKAGE = Path(__file__).resolve().parents[1]
package = optunahub.load_local_module(
    f"{PACKAGE.parent.name}/{PACKAGE.name}", registry_root=str(PACKAGE.parents[1])
)


class TestOneCycleSampler(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # The relative suite wants a sampler that is past its random start-up after one trial.
        def make() -> BaseSampler:
            base = optuna.samplers.TPESampler(n_startup_trials=0, multivariate=True)
            return package.OneCycleSampler(base)

        return make
