"""The Keras callbacks inside the real ``model.fit``, on the torch backend."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from framework_runs import assert_learned, search

from hpsched import schedules
from hpsched.cycle import Cycle, execute
from hpsched.errors import TrainingError, UsageError
from hpsched.schedules import OneCycleSchedules

os.environ["KERAS_BACKEND"] = "torch"  # before the first import of keras

pytestmark = [
    pytest.mark.frameworks,
    # Keras reads its variables through NumPy in a way that NumPy is to give up.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/frameworks/keras.md").read_text()
BATCHES = 7  # an epoch

_random = np.random.default_rng(1)
X = _random.standard_normal((BATCHES * 16, 8)).astype("float32")
Y = (X @ _random.standard_normal((8, 3))).argmax(1)


def make_cycle(steps: int = 20, kind: Any = "rung", max_lr: float = 0.1, **options: Any) -> Cycle:
    pair = schedules.one_cycle(steps, max_lr=max_lr)
    if kind == "range_test":
        sweep = schedules.range_test(steps, max_lr * 1e-6, max_lr)
        pair = OneCycleSchedules(sweep, schedules.constant(0.85))
    return Cycle(
        values={"max_lr": max_lr, "max_momentum": 0.95, "weight_decay": 0.0},
        schedules=pair,
        total_steps=steps,
        seed=0,
        kind=kind,
        name="a-run",
        **options,
    )


def make_optimizer(name: str = "SGD", lr: float = 0.1, **options: Any) -> Any:
    import keras

    if name == "SGD":
        return keras.optimizers.SGD(lr, momentum=0.9, **options)
    return getattr(keras.optimizers, name)(lr, **options)


def make_model(optimizer: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def fit(model: Any, callback: Any, **options: Any) -> Any:
    defaults = {"epochs": 100, "batch_size": 16, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, callbacks=[callback], **{**defaults, **options})


@contextmanager
def recorded(optimizer: Any) -> Iterator[list[tuple[float, float]]]:
    """Rate, and momentum or beta_1, at every step that the optimizer takes."""
    used: list[tuple[float, float]] = []
    update = optimizer._backend_update_step

    def keep(grads: Any, variables: Any, learning_rate: Any) -> None:
        momentum = getattr(optimizer, "beta_1", None) or optimizer.momentum
        used.append((float(learning_rate), momentum))
        update(grads, variables, learning_rate)

    optimizer._backend_update_step = keep
    yield used


def expected(pair: OneCycleSchedules, steps: int) -> list[Any]:
    """Keras keeps rates in float32."""
    return [(pytest.approx(pair.lr(step), rel=1e-6), pair.momentum(step)) for step in range(steps)]


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    import keras

    keras.mixed_precision.set_global_policy(f"mixed_{request.param}")
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("precision", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Nadam"])
@pytest.mark.parametrize("accumulate", [None, 3])
def test_the_optimizer_used_exactly_the_schedule(
    accumulate: int | None, name: str, kind: Any, precision: str
) -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(20, kind)
    optimizer = make_optimizer(name, gradient_accumulation_steps=accumulate)
    model = make_model(optimizer)
    assert model.layers[0].compute_dtype == precision
    with recorded(optimizer) as used:
        fit(model, OneCycleCallback(cycle))
    assert used == expected(cycle.schedules, 20)
    assert cycle.steps == len(cycle.losses()) == int(optimizer.iterations) == 20
    assert cycle.should_stop == (kind == "range_test")
    assert cycle.driver is not None
    assert cycle.driver.momentum_name == ("momentum" if name == "SGD" else "beta1")


def test_the_losses_are_those_of_the_steps_not_the_means_of_the_epoch() -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(14, "range_test", max_lr=1e-9)  # weights stay: a batch's loss is its own
    model = make_model(make_optimizer("SGD", 1e-9))
    fit(model, OneCycleCallback(cycle), validation_data=(X, Y))
    own = [
        model.evaluate(X[i * 16 : i * 16 + 16], Y[i * 16 : i * 16 + 16], verbose=0)[0]
        for i in range(BATCHES)
    ]
    assert cycle.losses() == pytest.approx(own * 2, rel=1e-5)

    doubled = make_cycle(7, "range_test", max_lr=1e-9)
    optimizer = make_optimizer("SGD", 1e-9, gradient_accumulation_steps=2)
    fit(make_model(optimizer), OneCycleCallback(doubled))
    pairs = [(own * 2)[i : i + 2] for i in range(0, 14, 2)]
    assert doubled.losses() == pytest.approx([sum(pair) / 2 for pair in pairs], rel=1e-5)


@pytest.mark.parametrize("precision", ["float16"], indirect=True)
def test_steps_that_loss_scaling_skips_count(precision: str) -> None:
    import keras

    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(20)
    inner = make_optimizer()
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**24)
    with recorded(inner) as used:
        fit(make_model(scaled), OneCycleCallback(cycle))
    assert cycle.steps == 20
    every = expected(cycle.schedules, 20)
    steps = [every.index(pair) for pair in used]
    assert steps == sorted(set(steps))
    assert 5 < len(steps) < 20


def test_two_fits_make_one_cycle() -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(14)
    optimizer = make_optimizer(gradient_accumulation_steps=2)
    model, callback = make_model(optimizer), OneCycleCallback(cycle)
    with recorded(optimizer) as used:
        with pytest.raises(TrainingError, match=r"after 3 of the cycle's 14 .*epochs="):
            fit(model, callback, epochs=1)
        fit(model, callback, epochs=3)
    assert used == expected(cycle.schedules, 14)


# ------------------------------------------------------------------ in a study


def train(cycle: Cycle) -> float:
    import keras

    from hpsched.integrations.keras import OneCycleCallback

    optimizer = keras.optimizers.AdamW(cycle.max_lr, weight_decay=cycle.weight_decay)
    model = make_model(optimizer)
    fit(model, OneCycleCallback(cycle))
    return 1 - model.evaluate(X, Y, verbose=0, return_dict=True)["accuracy"]


def test_a_small_study() -> None:
    assert_learned(search(train))


def test_a_sweep_ends_when_it_has_seen_enough() -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(100, "range_test", max_lr=1e4)
    history = fit(make_model(make_optimizer()), OneCycleCallback(cycle))
    assert cycle.stopped == "the sweep has diverged"
    assert 20 < cycle.steps < 100
    assert len(history.epoch) == math.ceil(cycle.steps / BATCHES)


def test_divergence_ends_the_run_at_once() -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle, ends = make_cycle(200, max_lr=1e6), []

    def train(cycle: Cycle) -> float:
        history = fit(make_model(make_optimizer("SGD", 1e6)), OneCycleCallback(cycle))
        ends.append(len(history.epoch))
        return 0.0

    outcome = execute(cycle, train)
    assert outcome.diverged is not None
    assert outcome.steps <= 60
    assert ends == [math.ceil(outcome.steps / BATCHES)]


def test_the_epoch_in_hand_is_validated_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(10)
    model = make_model(make_optimizer())
    history = fit(model, OneCycleCallback(cycle), validation_data=(X, Y), epochs=3, verbose=2)
    assert history.epoch == [0, 1]
    assert set(history.history) == {"accuracy", "loss", "val_accuracy", "val_loss"}
    shown = capsys.readouterr().out
    assert "Epoch 2/3" in shown
    assert shown.count("val_loss") == 2


# ------------------------------------------------------------------ alone


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_one_cycle_alone(name: str) -> None:
    from hpsched.integrations.keras import OneCycle

    optimizer = make_optimizer(name, 0.77, gradient_accumulation_steps=2)
    callback = OneCycle(0.1, 14, mom_min=0.8, mom_max=0.9, phase_1_pct=0.4, div_factor=10.0)
    pair = schedules.one_cycle(
        14, max_lr=0.1, div_factor=10, pct_start=0.4, base_momentum=0.8, max_momentum=0.9
    )
    with recorded(optimizer) as used:
        fit(make_model(optimizer), callback, epochs=4)
    assert used == expected(pair, 14)
    assert max(used)[0] == pytest.approx(0.1, rel=1e-6)


def test_one_cycle_alone_begins_anew_with_each_fit_and_stays_at_its_end() -> None:
    from hpsched.integrations.keras import OneCycle

    optimizer = make_optimizer()
    model, callback = make_model(optimizer), OneCycle(0.1, 7)
    with recorded(optimizer) as used:
        fit(model, callback, epochs=1)
        fit(model, callback, epochs=2)
    every = expected(schedules.one_cycle(7, max_lr=0.1), 14)
    assert used == every[:7] + every
    assert used[-1] == every[6]


def test_where_it_differs_from_the_original_callback() -> None:
    """The second phase is the same; the original's first is a step longer, and misses lr_max."""
    ours = schedules.one_cycle(100, max_lr=1.0)
    original = schedules.keras_one_cycle(100, 1.0)
    assert [ours.lr(0), ours.lr(99)] == pytest.approx([original.lr(0), original.lr(99)])
    below, apart = re.findall(r"([\d.]+) % (?:less with|of `lr_max` at any of) 100 steps", PAGE)
    missed = 1 - max(original.lr(t) for t in range(100))
    assert float(below) == pytest.approx(100 * missed, abs=0.005)
    assert max(ours.lr(t) for t in range(100)) == 1.0
    after = range(30, 100)
    assert [ours.lr(t) for t in after] == pytest.approx([original.lr(t) for t in after])
    assert [ours.momentum(t) for t in after] == pytest.approx([original.momentum(t) for t in after])
    found = max(abs(ours.lr(t) - original.lr(t)) for t in range(100))
    assert float(apart) == pytest.approx(100 * found, abs=0.05)


# ------------------------------------------------------------------ wrong use


def test_a_learning_rate_schedule_is_refused() -> None:
    import keras

    from hpsched.integrations.keras import OneCycle, OneCycleCallback

    for callback in (OneCycleCallback(make_cycle()), OneCycle(0.1, 20)):
        decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
        with pytest.raises(UsageError, match=r"SGD.*learning_rate=cycle\.max_lr"):
            fit(make_model(keras.optimizers.SGD(decay)), callback)


def test_momentum_bounds_for_an_optimizer_without_momentum() -> None:
    import keras

    from hpsched.integrations.keras import OneCycleCallback

    cycle = make_cycle(explicit_momentum=True)
    with pytest.raises(UsageError, match="neither momentum nor betas"):
        fit(make_model(keras.optimizers.Adagrad(0.1)), OneCycleCallback(cycle))


def test_a_loss_that_is_broken_from_the_start() -> None:
    from hpsched.integrations.keras import OneCycleCallback

    model = make_model(make_optimizer())
    model.compile(make_optimizer(), lambda y, p: p.sum() * math.nan)
    with pytest.raises(TrainingError, match="no learning rate mends that"):
        fit(model, OneCycleCallback(make_cycle()))


def test_without_keras_or_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    from hpsched.integrations import keras as ours

    with monkeypatch.context() as patch:
        patch.setattr(keras.config, "backend", lambda: "jax")
        with pytest.raises(ImportError, match=r"'jax'.*KERAS_BACKEND=torch"):
            importlib.reload(ours)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "keras", None)
        with pytest.raises(ImportError, match=r"pip install 'hpsched\[keras\]'"):
            importlib.reload(ours)
    done = subprocess.run(
        [sys.executable, "-c", "import hpsched.integrations.keras"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Keras needs tensorflow, its backend: set KERAS_BACKEND=")
