"""Flower's processes, kept private: own ports, own FLWR_HOME, no calls home, ended by process id.

The app bundle that ``flwr run`` asks for is one ``pyproject.toml`` that names modules of the
installed package; no code travels.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from anabranch.wire.plan import Scalar

PRIVATE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No telemetry, no update check, no installs at run time."""

SERVER_APP = "anabranch.coordinator.app:app"
CLIENT_APP = "anabranch.client.deployed:app"


class FlowerError(RuntimeError):
    """A Flower process or run that failed; the message names its log."""


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """An address of this machine at which a server that listens on ``host`` answers."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def environment(home: Path, port: int) -> dict[str, str]:
    """This process's environment with Flower made private."""
    # Flower starts its helpers by bare name: they must be found without an activated environment.
    scripts = str(Path(sys.executable).parent)
    private = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
    }
    return {**os.environ, **PRIVATE_ENVIRONMENT, **private}


def command(name: str) -> str:
    """The path of a console script that stands beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def write_bundle(
    folder: Path,
    run_config: dict[str, Scalar],
    server_app: str = SERVER_APP,
    client_app: str = CLIENT_APP,
) -> Path:
    """Write the app bundle Flower asks for: one ``pyproject.toml``, no code.

    Args:
        folder: Made when missing.
        run_config: Defaults of the run configuration.
        server_app: ``module:attribute`` of the ServerApp.
        client_app: ``module:attribute`` of the ClientApp.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = {
        "project": {
            "name": "anabranch-federation",
            "version": "1.0.0",
            "description": "A federation of the installed package anabranch",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "anabranch",
                    "components": {"serverapp": server_app, "clientapp": client_app},
                    "config": run_config,
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project))
    return folder


@contextmanager
def process(
    arguments: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process group that lives as long as the block; its output goes to a file."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def wait_for_port(
    port: int,
    child: subprocess.Popen[bytes],
    log: Path,
    timeout_s: float = 60,
    host: str = "127.0.0.1",
) -> None:
    """Wait until a server answers on a port of this machine.

    Raises:
        FlowerError: It ended, or did not answer in time.
    """
    assert isinstance(child.args, list)
    name = Path(child.args[0]).name
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if child.poll() is not None:
            raise FlowerError(f"{name} ended with code {child.returncode}; see {log}")
        try:
            socket.create_connection((reachable(host), port), timeout=1).close()
        except OSError:
            pass
        else:
            return
        time.sleep(0.1)
    raise FlowerError(f"{name} does not answer on port {port}; see {log}")


def flwr(
    arguments: list[str],
    env: dict[str, str],
    alive: Callable[[], bool] = lambda: True,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Call the ``flwr`` command and read its JSON answer.

    Args:
        arguments: Its own.
        env: Its environment.
        alive: Whether there is somebody to answer: without, it would try again for ever.
        timeout_s: Seconds that it may take.

    Raises:
        FlowerError: It failed, took too long, or printed no JSON.
    """
    done = _finished([command("flwr"), *arguments, "--format", "json"], env, alive, timeout_s)
    begin = done.stdout.find("{")
    if done.returncode or begin < 0:
        raise FlowerError(
            f"flwr {arguments[0]} failed: {(done.stdout + done.stderr).strip()[-800:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout[begin:])
    if not answer.get("success", True):  # with exit code 0
        raise FlowerError(f"flwr {arguments[0]} failed: {str(answer.get('error-message')).strip()}")
    return answer


def _finished(
    arguments: list[str], env: dict[str, str], alive: Callable[[], bool], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    end = time.monotonic() + timeout_s
    with subprocess.Popen(
        arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while True:
            try:
                out, err = child.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                late = time.monotonic() >= end
                if late or not alive():
                    child.kill()
                    why = f"took more than {timeout_s:g} s" if late else "has no SuperLink any more"
                    raise FlowerError(f"flwr {arguments[1]} {why}") from None
                continue
            return subprocess.CompletedProcess(arguments, child.returncode, out, err)


def wait_for_run(
    run_id: str,
    link: str,
    env: dict[str, str],
    log: Path,
    timeout_s: float,
    on_poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Follow a run's log until the run has finished, then ask how it ended.

    ``flwr run --stream`` exits 0 on failed runs too, and each ``flwr list`` costs most of a second
    of one core: so the log stream tells when, and one listing tells how.

    Args:
        run_id: The run.
        link: Name of the connection in FLWR_HOME's configuration.
        env: The environment of ``flwr``.
        log: File for the run's log.
        timeout_s: Seconds to wait.
        on_poll: Called about five times a second.

    Raises:
        FlowerError: The run failed or outlasted the timeout.
    """
    end = time.monotonic() + timeout_s
    with process([command("flwr"), "log", run_id, link, "--stream"], log, env) as stream:
        while stream.poll() is None and time.monotonic() < end:
            on_poll()
            time.sleep(0.2)
    while True:
        rows = flwr(["list", link], env)["runs"]
        row: dict[str, Any] = next(row for row in rows if str(row["run-id"]) == run_id)
        if row["status"] == "finished:completed":
            return row
        if row["status"].startswith("finished"):
            details = row["status-details"]
            raise FlowerError(f"Flower run {run_id} ended as {row['status']}: {details}; see {log}")
        if time.monotonic() >= end:
            raise FlowerError(
                f"Flower run {run_id} did not finish within {timeout_s:g} s; see {log}"
            )
        time.sleep(1)
