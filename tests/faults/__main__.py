"""``python -m tests.faults SCENARIO``: see --help."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna

from tests.faults import scenarios
from tests.faults.crew import Result
from tests.faults.namespace import network
from tests.faults.servers import private_postgres
from tests.fleet import MARIADB_SERVER, database

Given = argparse.Namespace


def kill(given: Given) -> Iterator[Result]:
    with private_postgres() as server:
        yield scenarios.kill(server, kills=given.kills, **_common(given))


def suspend(given: Given) -> Iterator[Result]:
    with private_postgres() as server:
        yield scenarios.suspend(server, times=given.times, **_common(given))


def terminate(given: Given) -> Iterator[Result]:
    with private_postgres() as server:
        for phase in given.phases or scenarios.PHASES:
            yield scenarios.terminate(server, phase=phase, seed=given.seed, grace=given.grace)


def restart(given: Given) -> Iterator[Result]:
    with private_postgres() as server:
        yield scenarios.restart(server, times=given.times, **_common(given))


def outage(given: Given) -> Iterator[Result]:
    with private_postgres() as server:
        yield scenarios.outage(server, seconds=given.seconds, **_common(given))


def cut(given: Given) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(network()) if given.namespace else None
        listen = f"127.0.0.1,{wire.host}" if wire else "127.0.0.1"
        yield scenarios.cut(
            stack.enter_context(private_postgres(listen=listen)),
            seconds=given.seconds,
            everyone=given.everyone,
            network=wire,
            **_common(given),
        )


def disk_full(given: Given) -> Iterator[Result]:
    yield scenarios.disk_full(times=given.times, **_common(given))


def crowd(given: Given) -> Iterator[Result]:
    with private_postgres(connections=given.connections) as server:
        yield scenarios.crowd(server, workers=given.workers, seed=given.seed)


def backends(given: Given) -> Iterator[Result]:
    with (
        tempfile.TemporaryDirectory() as folder,
        private_postgres() as server,
        server.database() as postgres,
        database(MARIADB_SERVER) as mariadb,
    ):
        for url in (f"sqlite:///{Path(folder) / 'studies.db'}", postgres, mariadb):
            yield scenarios.backend(url, workers=given.workers, seed=given.seed)


def _common(given: Given) -> dict[str, int]:
    return {"workers": given.workers, "seed": given.seed, "grace": given.grace}


#: The whole list, with the numbers that it is asked to bear.
ALL = (
    "kill --kills 100",
    "kill --kills 20 --workers 1",
    "restart --times 20",
    "restart --times 20 --workers 1",
    "outage --seconds 30",
    "cut --seconds 60 --grace 120",
    "cut --seconds 100 --grace 30",
    "cut --seconds 100 --grace 30 --everyone",
    "suspend --times 20",
    "suspend --times 5 --workers 1",
    "terminate",
    "disk-full --times 5",
    "disk-full --times 5 --workers 1",
    "crowd",
    "backends",
)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    whole.add_argument("--output", type=Path, help="append each result as a line of JSON")
    scenario = whole.add_subparsers(dest="scenario", required=True)

    def add(function: Callable[[Given], Iterator[Result]], about: object, **options: Any) -> Any:
        words = (about.__doc__ or "").partition("\n")[0]
        own = scenario.add_parser(function.__name__.replace("_", "-"), help=words)
        own.set_defaults(function=function)
        for option, default in {"seed": 1, "workers": 4, "grace": 5, **options}.items():
            own.add_argument(f"--{option}", type=type(default), default=default)
        return own

    add(kill, scenarios.kill, kills=100)
    add(restart, scenarios.restart, times=20)
    add(outage, scenarios.outage, seconds=30.0)
    each = add(cut, scenarios.cut, workers=2, seconds=60.0, grace=120)
    each.add_argument("--everyone", action="store_true", help="all workers, rather than one")
    each.add_argument("--namespace", action="store_true", help="pull a wire, rather than a proxy")
    add(suspend, scenarios.suspend, times=20)
    each = add(terminate, scenarios.terminate)
    each.add_argument("--phases", nargs="+", choices=scenarios.PHASES)
    add(disk_full, scenarios.disk_full, times=5)
    add(crowd, scenarios.crowd, workers=200, connections=100)
    add(backends, scenarios.backend)
    scenario.add_parser("all", help="all of them").set_defaults(function=None)
    return whole


def show(result: Result, output: Path | None) -> None:
    states = ", ".join(f"{count} {state}" for state, count in sorted(result.states.items()))
    figures = "".join(f"; {name} {value}" for name, value in result.figures.items())
    verdict = "exact" if result.exact else "NOT EXACT"
    print(f"{result.scenario:10} {result.injected:45} {states:34} {verdict:9} {result.seconds:6} s")
    if figures:
        print(f"{'':10} {figures[2:]}")
    for what in result.differences:
        print(f"{'':10} - {what}")
    sys.stdout.flush()
    if output:
        with output.open("a") as file:
            file.write(result.to_json() + "\n")


def main() -> int:
    given = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and workers end with us
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("hpsched").setLevel(logging.ERROR)
    runs = [given] if given.function else [parser().parse_args(line.split()) for line in ALL]
    exact = True
    for each in runs:
        for result in each.function(each):
            show(result, given.output)
            exact = exact and result.exact
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
