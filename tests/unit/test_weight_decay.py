"""Weight decay and rate, chosen together: by values, then by curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpsched
from hpsched.errors import UsageError
from hpsched.lr_curve import RangeTest
from hpsched.weight_decay import RangeTests, Tolerance, choose, tolerance


def chosen(*found: tuple[float, float, float, float]) -> float:
    return choose([Tolerance(*one) for one in found])[0]


def test_the_largest_of_equals() -> None:
    assert chosen((1e-3, 1.0, 0.5, 0.1), (1e-4, 1.0, 0.5, 0.1), (0.0, 1.0, 0.5, 0.1)) == 1e-3


def test_one_that_tolerates_less_is_out_from_half_an_octave_on() -> None:
    assert chosen((1e-3, 0.70, 0.5, 0.1), (1e-4, 1.0, 0.5, 0.1)) == 1e-4
    assert chosen((1e-3, 0.71, 0.5, 0.1), (1e-4, 1.0, 0.5, 0.1)) == 1e-3


def test_one_whose_loss_is_worse_by_more_than_noise_is_out() -> None:
    assert chosen((1e-3, 1.0, 0.65, 0.1), (1e-4, 1.0, 0.5, 0.1)) == 1e-4
    assert chosen((1e-3, 1.0, 0.59, 0.1), (1e-4, 1.0, 0.5, 0.1)) == 1e-3
    assert chosen((1e-3, 1.0, 0.65, 0.2), (1e-4, 1.0, 0.5, 0.1)) == 1e-3  # its own noise counts


def test_a_low_loss_at_a_low_rate_does_not_count() -> None:
    assert chosen((1e-3, 1.0, 0.5, 0.01), (0.0, 0.1, 0.2, 0.01)) == 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_neither_order_nor_the_losses_zero_and_unit_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = [
        Tolerance(10.0**-k, *np.exp(rng.normal(0, 0.4, 2)), abs(rng.normal(0, 0.2)))
        for k in range(5)
    ]
    decay = choose(found)[0]
    assert choose([found[k] for k in rng.permutation(5)])[0] == decay
    moved = [one._replace(lowest=3 * one.lowest - 7, noise=3 * one.noise) for one in found]
    assert choose(moved)[0] == decay


def test_the_reason_has_the_numbers() -> None:
    _, reason = choose([Tolerance(1e-3, 0.8, 0.52, 0.1), Tolerance(1e-4, 1.0, 0.5, 0.03)], "loss")
    assert reason == (
        "weight decay 0.001 is the largest that tolerates the highest rate (0.8, half an octave or "
        "less below the 1 of 0.0001) and reaches as low a loss (0.52, within noise (0.1) of the "
        "0.5 of 0.0001)"
    )
    assert choose([Tolerance(1e-3, 0.8, 0.52, 0.1)])[1] == (
        "weight decay 0.001 is the largest that tolerates the highest rate (0.8) and reaches as "
        "low a loss (0.52)"
    )


def curve(
    weight_decay: float, *, edge: float = 1.0, low: float = 0.5, noise: float = 0.01, seed: int = 0
) -> RangeTest:
    """Falls from 2 to ``low`` between 1e-3 and edge / 3, and explodes at ``edge``."""
    lrs = np.geomspace(1e-6, 10, 100)
    fall = np.clip((np.log10(lrs) + 3) / (np.log10(edge / 3) + 3), 0, 1)
    loss = 2 + (low - 2) * fall + np.where(lrs > edge, 50 * (lrs / edge - 1), 0)
    loss += np.random.default_rng(seed).normal(0, noise, 100)
    return RangeTest(lrs=tuple(lrs), losses=tuple(loss), weight_decay=weight_decay, seed=seed)


def flat(weight_decay: float) -> RangeTest:
    return RangeTest(lrs=tuple(np.geomspace(1e-6, 10, 100)), losses=(1.0,) * 100,
                     weight_decay=weight_decay)  # fmt: skip


def test_what_a_curve_tolerates() -> None:
    found = tolerance(1e-4, [curve(1e-4, seed=k) for k in range(3)], validated=False)
    assert found.weight_decay == 1e-4
    assert found.stable == pytest.approx(1.0, rel=0.3)
    assert found.lowest == pytest.approx(0.5, abs=0.05)
    assert found.noise == pytest.approx(0.01, rel=0.6)


def test_replicates_that_differ_make_more_noise() -> None:
    tests = [curve(1e-4, low=low) for low in (0.3, 0.7)]
    assert tolerance(1e-4, tests, validated=False).noise == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("tests", "decay"),
    [
        ([curve(1e-2, edge=0.1), curve(1e-3), curve(1e-4), curve(0.0)], 1e-3),
        ([curve(1e-3, low=1.2), curve(1e-4), curve(0.0)], 1e-4),
        ([flat(1e-3), curve(1e-4), curve(0.0)], 1e-4),
        ([curve(0.0)], 0.0),
        ([curve(1e-3, seed=1), curve(1e-3, seed=2), curve(0.0, seed=1), curve(0.0, seed=2)], 1e-3),
    ],
    ids=["edge", "loss", "unreliable", "one", "replicates"],
)
def test_choice_by_curves(tests: list[RangeTest], decay: float) -> None:
    found = RangeTests(tests=tuple(tests))
    assert found.weight_decay == decay, found.reason
    assert found.proposal.replicates == len(found.by_weight_decay[decay])
    assert found.proposal.reliable
    assert f"weight decay {decay:g} is the largest" in found.reason
    assert repr(found) == f"<RangeTests of {len(tests)} sweeps: {found.reason}>"


def test_without_a_reliable_sweep_there_is_no_choice() -> None:
    found = RangeTests(tests=[flat(1e-3), flat(0.0)])  # type: ignore[arg-type]
    assert found.weight_decay is None
    assert found.reason.startswith("none of 2 sweeps shows what it tolerates: the loss never falls")
    assert found.proposal.replicates == 2
    assert not found.proposal.reliable


def test_validation_losses_decide_where_they_are_measured() -> None:
    """The training loss is lowest without weight decay, the validation loss with it."""

    def both(weight_decay: float, train: float, valid: float) -> RangeTest:
        measured = curve(weight_decay, low=valid).losses
        test = curve(weight_decay, low=train)
        return hpsched.RangeTest(
            lrs=test.lrs,
            losses=test.losses,
            weight_decay=weight_decay,
            validation={"loss": list(enumerate(measured, start=1))},
        )

    tests: Any = [both(1e-3, 0.7, 0.8), both(0.0, 0.3, 1.2)]
    found = RangeTests(tests=tests)
    assert found.weight_decay == 1e-3
    assert "as low a validation loss" in found.reason
    tests[0] = curve(1e-3, low=0.7)  # not measured everywhere: not comparable
    assert RangeTests(tests=tests).weight_decay == 0.0


def test_no_tests() -> None:
    with pytest.raises(UsageError, match="no range tests"):
        RangeTests(tests=())
