"""Every federation of a folder that was started by way of the API, each kept at work.

Each has a supervisor of its own, in a process: ``anabranch coordinator up`` on a configuration that
is written here. What is to be at work stands in the federations' stores, so that this process may
die at any moment: the kernel ends its supervisors with it, and the next one starts them again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from anabranch.coordinator import logs
from anabranch.coordinator.federation import FEDERATION_FILE, load_federation
from anabranch.coordinator.rounds.service import Service, end, service
from anabranch.coordinator.store import Store, StoreError, open_store
from anabranch.coordinator.store.config import JOURNAL_URL
from anabranch.coordinator.supervision import lease, processes
from anabranch.coordinator.supervision.backoff import Backoff
from anabranch.coordinator.supervision.config import CONFIG_FILE, FleetConfig
from anabranch.coordinator.supervision.supervisor import Exit

log = logging.getLogger("anabranch.coordinator.up")

TICK_S = 0.1
"""Seconds between two looks at the processes."""
LOOK_S = 1.0
"""Seconds between two looks for federations that were started."""
RETRY_S = 30.0
"""Seconds until a store that could not be opened is tried again."""
LOG_FILE = "up.log"
"""What a federation's supervisor says, in its folder; JSON lines."""
LASTED_S = 60.0
"""Seconds at work after which a supervisor's death is not one more in a row."""


@dataclass
class _Known:
    """A federation, as its configuration was at a moment.

    Attributes:
        stamp: When it was changed.
        store: Its store; None where it could not be opened.
        again_s: When that is tried again, in monotonic seconds.
    """

    stamp: int
    store: Store | None = None
    again_s: float = 0.0


@dataclass
class _AtWork:
    """A federation's supervisor.

    Attributes:
        now: What it was started for.
        backoff: Deaths in a row.
        child: Its process; None until the next start.
        since_s: When that was, or will be, in monotonic seconds.
        read: How much of its log was told.
        said: The last line of it.
    """

    now: Service
    backoff: Backoff
    child: subprocess.Popen[bytes] | None = None
    since_s: float = 0.0
    read: int = 0
    said: str = ""


class Fleet:
    """Keeps every started federation of a folder at work.

    Args:
        folder: Holds a folder of each federation.
        config: How they are run.
        command: Runs one of them, given its configuration's file and ``--log-format json``.
    """

    def __init__(self, folder: Path, config: FleetConfig, command: Sequence[str]) -> None:
        self._folder, self._config, self._command = folder, config, list(command)
        self._known: dict[str, _Known] = {}
        self._work: dict[str, _AtWork] = {}
        self._stops = 0

    def run(self) -> Exit:
        """Work until it is told to stop.

        Raises:
            ValueError: There is no such folder, or another ``up`` works on it.
        """
        if not self._folder.is_dir():
            raise ValueError(f"{self._folder}: is no folder; make it")
        with lease.alone(self._folder), self._signals():
            looked_s = float("-inf")
            try:
                while not self._stops:
                    if time.monotonic() - looked_s >= LOOK_S:
                        self._look()
                        looked_s = time.monotonic()
                    self._tend()
                    time.sleep(TICK_S)
                self._rest()
            finally:
                for one in self._work.values():
                    if one.child is not None and one.child.poll() is None:
                        one.child.kill()
                        one.child.wait()
                for known in self._known.values():
                    if known.store is not None:
                        known.store.close()
        log.info("stopped; what was started goes on with the next up", extra={"event": "stopped"})
        return Exit.STOPPED

    def _look(self) -> None:
        """See which federations are to be at work."""
        for path in sorted(self._folder.glob(f"*/{FEDERATION_FILE}")):
            name = path.parent.name
            if name in self._work:
                continue
            try:
                store = self._store(path)
                now = service(store) if store is not None else None
            except StoreError as error:
                log.error("%s: its store does not answer: %s", name, error)
                continue
            if now is not None and now.started:
                self._work[name] = _AtWork(now, Backoff(self._config.restart))

    def _tend(self) -> None:
        """Start supervisors, pass on what they say, and see which have ended."""
        for name, one in list(self._work.items()):
            if one.child is None:
                if time.monotonic() >= one.since_s:
                    try:
                        self._start(name, one)
                    except OSError as error:  # no room, or its folder is gone
                        self._again(name, one, f"{name} cannot be started: {error}")
                continue
            code = one.child.poll()
            self._pass_on(name, one)
            if code is not None:
                self._ended(name, one, code)

    def _start(self, name: str, one: _AtWork) -> None:
        folder = self._folder / name
        try:
            config = self._config.of(folder, one.now.port, one.now.task)
        except ValueError as error:
            self._end(name, one, str(error))
            return
        file = config.home / CONFIG_FILE
        config.home.mkdir(exist_ok=True)
        file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
        arguments = [*self._command, str(file), "--log-format", "json"]
        path = folder / LOG_FILE
        one.read = path.stat().st_size if path.exists() else 0
        one.child = processes.start(arguments, path, {**os.environ})
        one.since_s = time.monotonic()
        self._tell("supervising", f"{name} is kept at work on port {one.now.port}", name)

    def _ended(self, name: str, one: _AtWork, code: int) -> None:
        one.child = None
        if self._stops:
            return
        if code in (Exit.DONE, Exit.FAILED, 2):
            self._end(name, one, one.said or processes.how(code))
            return
        # Killed, or told to stop by somebody who does not know of us.
        if time.monotonic() - one.since_s > LASTED_S:
            one.backoff = Backoff(self._config.restart)
        self._again(name, one, f"{name}: its supervisor {processes.how(code)}")

    def _again(self, name: str, one: _AtWork, told: str) -> None:
        """Start it again, later and later, and then not at all."""
        one.backoff = one.backoff.after(one.backoff.gained)
        if one.backoff.gives_up:
            self._end(name, one, f"{told}; it did so {one.backoff.failures} times in a row")
            return
        one.since_s = time.monotonic() + one.backoff.wait_s
        self._tell("supervisor-died", f"{told}; it is started again", name, logging.ERROR)

    def _end(self, name: str, one: _AtWork, why: str) -> None:
        """It is not to be at work any more."""
        try:
            store = self._store(self._folder / name / FEDERATION_FILE)
            if store is not None:
                end(store, one.now, why)
        except StoreError as error:
            # It is started again, ends again, and is noted then.
            log.error("%s: its store does not answer: %s", name, error)
        del self._work[name]
        self._tell("rests", f"{name} is at rest: {why}", name)

    def _rest(self) -> None:
        """End every supervisor, each with its round as it should be."""
        for one in self._work.values():
            if one.child is not None and one.child.poll() is None:
                one.child.terminate()
        while any(one.child is not None for one in self._work.values()) and self._stops < 3:
            for one in self._work.values():
                one.since_s = float("inf")
            self._tend()
            time.sleep(TICK_S)

    def _pass_on(self, name: str, one: _AtWork) -> None:
        """Tell what a supervisor told since."""
        path = self._folder / name / LOG_FILE
        if not path.exists():  # its folder was taken away
            return
        with path.open("rb") as file:
            file.seek(one.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                one.read += len(line)
                if text := line.decode(errors="replace").strip():
                    row = _row(text)
                    one.said = str(row.pop("message", ""))
                    level = logging.getLevelName(str(row.get("level", "error")).upper())
                    fields = {key: row[key] for key in logs.FIELDS if key in row}
                    log.log(
                        level if isinstance(level, int) else logging.ERROR, "%s: %s", name,
                        one.said, extra={"federation": name, **fields},
                    )  # fmt: skip

    def _store(self, path: Path) -> Store | None:
        """A federation's store, opened once; None where it cannot be, and the log says why."""
        if not path.exists():
            return None
        name, stamp = path.parent.name, path.stat().st_mtime_ns
        known = self._known.get(name)
        failed = known is not None and known.store is None and time.monotonic() >= known.again_s
        if known is None or known.stamp != stamp or failed:
            if known is not None and known.store is not None:
                known.store.close()
            self._known[name] = known = _Known(stamp, again_s=time.monotonic() + RETRY_S)
            try:
                config = load_federation(path.parent)
                if config.store.url != JOURNAL_URL:
                    known.store = open_store(
                        config.store, path.parent, federation=config.name, run=config.run,
                        durable=config.durable,
                    )  # fmt: skip
            except (ValueError, FileNotFoundError) as error:
                log.error("%s is left out: %s", name, error, extra={"federation": name})
        return known.store

    def _tell(self, event: str, told: str, name: str, level: int = logging.INFO) -> None:
        log.log(level, told, extra={"event": event, "federation": name})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop it; the third one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stops += 1

        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, stop) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def _row(text: str) -> dict[str, Any]:
    """A line of a supervisor's log: JSON, or what it said before it had one."""
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else {"message": text.removeprefix("error: ")}
