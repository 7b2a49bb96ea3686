"""Is one-cycle better here, by how much, and how sure? A study per schedule, and their verdict.

Every schedule is an *arm*: a study of its own with the same objective, budget and seed, whose
recipes follow that schedule whatever the objective asks for. Its search is the one that every
study has: range tests, complete cycles of growing length, confirmations. When it is over, the
recipe that it names runs with fresh seeds, the same in all arms, and only those count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from hpsched import ledger, records, schedules
from hpsched.errors import StudyExistsError, UsageError
from hpsched.ledger import SIGNIFICANCE, Run
from hpsched.storage import exclusive
from hpsched.study import create_study, read_settings

ONE_CYCLE = "one_cycle"
#: What people call schedules that the gallery names otherwise.
ALIASES = {"step": "multi_factor"}
POWER_UNITS = (1.96 + 0.84) ** 2  # (z of 5 % two-sided + z of 80 % power)²
MOST_SEEDS = 1000  # more would not be run by anybody


# -- arms ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One schedule, as far as its study has come.

    Attributes:
        schedule: Name in :data:`hpsched.schedules.GALLERY`.
        study: Name of its study.
        trial: The trial whose recipe is compared; None before the search is over.
        recipe: Field → value of that recipe.
        scores: Seed → value of its run with that seed; None where it diverged.
        cost: Full-cycle equivalents of everything, the search included.
    """

    schedule: str
    study: str
    trial: int | None = None
    recipe: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[int, float | None] = field(default_factory=dict)
    cost: float = 0.0

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that did not diverge; None without any."""
        known = self._known
        return statistics.fmean(known) if known else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over these seeds (n − 1); None with fewer than two."""
        known = self._known
        return statistics.stdev(known) if len(known) > 1 else None

    @property
    def diverged(self) -> int:
        """How many seeds diverged."""
        return len(self.scores) - len(self._known)

    @property
    def _known(self) -> list[float]:
        return [score for score in self.scores.values() if score is not None]


def arm_names(others: Sequence[str]) -> list[str]:
    """One-cycle and these, by the gallery's names, each once.

    Raises:
        UsageError: A schedule that is not there, or none to compare with.
    """
    known = schedules.classics()
    names = [ALIASES.get(name, name) for name in others if name != ONE_CYCLE]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"schedule {unknown[0]!r} is unknown: choose from {', '.join([*ALIASES, *known])}."
        )
    if not names:
        raise UsageError("no schedule to compare with: name one, e.g. cosine,step,constant.")
    return [ONE_CYCLE, *dict.fromkeys(names)]


def open_arms(
    name: str,
    others: Sequence[str],
    *,
    objective: str,
    cycles: float,
    seed: int = 0,
    direction: str = "minimize",
    storage: str | None = None,
) -> dict[str, Study]:
    """Schedule → its study, made where it is not there yet.

    Args:
        name: Of the comparison; the studies are NAME-SCHEDULE.
        others: Schedules to compare one-cycle with; names of :func:`hpsched.schedules.classics`,
            or ``step``.
        objective: As in :func:`hpsched.create_study`.
        cycles: Budget of each search, in full-cycle equivalents.
        seed: All runs' seeds follow from it.
        direction: ``minimize`` or ``maximize``.
        storage: URL; see :func:`hpsched.storage.resolve_url`.

    Raises:
        UsageError: A setting that cannot be right.
        StudyExistsError: A study of that name has other settings.
        StorageError: The database cannot be used.
    """
    wanted: dict[str, Any] = {"objective": objective, "cycles": cycles, "seed": seed}
    arms = {}
    for schedule in arm_names(others):
        policy = None if schedule == ONE_CYCLE else schedules.CLASSIC + schedule
        study = create_study(
            f"{name}-{schedule}", **wanted, direction=direction, storage=storage, policy=policy,
            skip_if_exists=True,
        )  # fmt: skip
        _check_same(study, {**wanted, "policy": policy}, direction)
        arms[schedule] = study
    return arms


def _check_same(study: Study, wanted: Mapping[str, Any], direction: str) -> None:
    settings = read_settings(study)
    kept = {key: getattr(settings, key) for key in wanted}
    kept["direction"] = study.direction.name.lower()
    for key, value in {**wanted, "direction": direction}.items():
        if kept[key] != value:
            raise StudyExistsError(
                f"study {study.study_name!r} exists with {key}={kept[key]!r}, and {value!r} was "
                "asked for: repeat the first call's options to go on with it, or choose another "
                "name."
            )


# -- fresh seeds -----------------------------------------------------------------------------------


def queue_seeds(study: Study, seeds: int) -> int:
    """Queue the named recipe's runs with the paired seeds that it has not run with yet.

    Nothing is queued while the search goes on, here or on other nodes.

    Returns:
        How many were queued.
    """
    with exclusive(study._storage, study.study_name):
        settings = read_settings(study)
        runs = ledger.read_runs(study.get_trials(deepcopy=False))
        number = _named(runs, study.direction)
        active = (TrialState.RUNNING, TrialState.WAITING)
        if number is None or settings is None or any(r.trial.state in active for r in runs):
            return 0
        there = _scores(runs)
        wanted = [records.derive_seed(settings.seed, "paired", k) for k in range(seeds)]
        missing = [seed for seed in wanted if seed not in there]
        params = dict(runs[number].trial.params)
        for seed in missing:
            attrs = {records.CONFIRMS: number, records.SEED: seed}
            study.enqueue_trial(params, user_attrs=attrs)
        return len(missing)


def read_arm(schedule: str, study: Study) -> Arm:
    """What the arm's study says by now."""
    runs = ledger.read_runs(study.get_trials(deepcopy=False))
    number = _named(runs, study.direction)
    recipe = runs[number].values if number is not None else None
    return Arm(
        schedule=schedule,
        study=study.study_name,
        trial=number,
        recipe=recipe or {},
        scores=_scores(runs),
        cost=ledger.total_cost(runs).cycles,
    )


def _named(runs: Sequence[Run], direction: StudyDirection) -> int | None:
    """The trial whose recipe is compared: the best, as it was when its seeds were first queued."""
    paired = [run.confirms for run in runs if records.SEED in run.trial.user_attrs]
    if paired:
        return paired[0]
    ranked = ledger.rank(runs, direction)
    return ranked[0].number if ranked else None


def _scores(runs: Sequence[Run]) -> dict[int, float | None]:
    """Seed → score of the paired runs that have ended, in the order of the seeds' queue."""
    return {
        int(run.trial.user_attrs[records.SEED]): run.full.value if run.full else None
        for run in runs
        if records.SEED in run.trial.user_attrs
        and run.trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    }


# -- verdict ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One-cycle against another schedule, over paired seeds.

    Attributes:
        against: The other schedule.
        seeds: Pairs of runs.
        gain: Mean by which one-cycle is better (negative: worse), in the objective's unit; None
            without pairs, or where runs diverged.
        low, high: 95 % interval of the gain (paired t); None where it has none.
        p: Two-sided p value, corrected for the number of comparisons (Holm); None without pairs.
            Paired t-test; where runs diverged or the pairs do not vary, a sign test.
        diverged: How many runs diverged: one-cycle's, the other's.
        seeds_needed: About how many seeds would decide it if the difference is what it seems; None
            where it is decided, or where a thousand would not.
    """

    against: str
    seeds: int
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    diverged: tuple[int, int] = (0, 0)
    wins: int = 0
    losses: int = 0
    seeds_needed: int | None = None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``not decided``: what one-cycle is."""
        if self.p is None or self.p >= SIGNIFICANCE:
            return "not decided"
        ahead = self.gain if self.gain is not None else self.wins - self.losses
        return "better" if ahead > 0 else "worse"


def differences(arms: Sequence[Arm], direction: StudyDirection) -> list[Difference]:
    """One-cycle, the first of the arms, against each of the others."""
    sign = 1 if direction == StudyDirection.MINIMIZE else -1
    first, *others = arms
    found = [_difference(first, other, sign) for other in others]
    corrected = holm([one.p for one in found])
    return [_planned(replace(d, p=p)) for d, p in zip(found, corrected, strict=True)]


def _difference(ours: Arm, other: Arm, sign: int) -> Difference:
    both = [seed for seed in ours.scores if seed in other.scores]
    pairs = [(ours.scores[seed], other.scores[seed]) for seed in both]
    diverged = sum(a is None for a, _ in pairs), sum(b is None for _, b in pairs)
    gains = [_gain(a, b, sign) for a, b in pairs]
    made = Difference(
        against=other.schedule,
        seeds=len(pairs),
        diverged=diverged,
        wins=sum(gain > 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
    )
    if len(pairs) < 2:
        return made
    if any(diverged):
        return replace(made, p=_sign_test(made))
    mean = statistics.fmean(gains)
    if len(set(gains)) == 1:
        return replace(made, gain=mean, low=mean, high=mean, p=_sign_test(made))
    from scipy import stats

    test = stats.ttest_1samp(gains, 0.0)
    low, high = test.confidence_interval(1 - SIGNIFICANCE)
    return replace(made, gain=mean, low=float(low), high=float(high), p=float(test.pvalue))


def _gain(ours: float | None, theirs: float | None, sign: int) -> float:
    """By how much ours is better; a run that diverged is worse than any that did not."""
    if ours is not None and theirs is not None:
        return sign * (theirs - ours)
    return 0.0 if ours is theirs else math.copysign(math.inf, -1.0 if ours is None else 1.0)


def _sign_test(found: Difference) -> float:
    from scipy import stats

    decided = found.wins + found.losses
    return float(stats.binomtest(found.wins, decided).pvalue) if decided else 1.0


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number; None stays None and counts for nothing.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    worst = 0.0
    for rank, (p, i) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        corrected[i] = worst
    return corrected


def _planned(found: Difference) -> Difference:
    """With the number of seeds that would decide it, at 80 % power."""
    if found.gain is None or found.low is None or not found.gain or found.verdict != "not decided":
        return found
    from scipy import stats

    error = (found.gain - found.low) / float(stats.t.ppf(1 - SIGNIFICANCE / 2, found.seeds - 1))
    needed = max(math.ceil(POWER_UNITS * found.seeds * (error / found.gain) ** 2), found.seeds + 1)
    return replace(found, seeds_needed=needed) if needed <= MOST_SEEDS else found
