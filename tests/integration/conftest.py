"""Real databases, each fresh per test: a SQLite file, a private PostgreSQL, MariaDB."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.servers import Postgres, private_postgres
from tests.fleet import MARIADB_SERVER, Fleet, database

# -- databases -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with private_postgres() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as url:
        yield url


@pytest.fixture
def mariadb_url() -> Iterator[str]:
    with database(MARIADB_SERVER) as url:
        yield url


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def storage_url(request: pytest.FixtureRequest) -> str:
    """A fresh database of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path, storage_url: str) -> Iterator[Fleet]:
    """A fleet on each database."""
    held = Fleet(tmp_path, storage_url)
    yield held
    held.end()


@pytest.fixture
def sqlite_fleet(tmp_path: Path, sqlite_url: str) -> Iterator[Fleet]:
    held = Fleet(tmp_path, sqlite_url)
    yield held
    held.end()


@pytest.fixture
def postgres_fleet(tmp_path: Path, postgres_url: str) -> Iterator[Fleet]:
    held = Fleet(tmp_path, postgres_url)
    yield held
    held.end()
