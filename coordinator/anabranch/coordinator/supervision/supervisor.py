"""Start a federation's SuperLink and its run, watch both, and start again what dies.

A new run goes on from the store with the round that was under way: what was admitted stays, and
only clients whose update is missing are asked. Everything that it does could be done again: killed
at any moment, the next ``up`` ends what is left of this one and goes on.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

from anabranch.coordinator import logs
from anabranch.coordinator.federation import FederationConfig, load_federation
from anabranch.coordinator.flower import FlowerError
from anabranch.coordinator.rounds.control import Want, ask, ends, heeded
from anabranch.coordinator.store import Store, StoreError, open_store
from anabranch.coordinator.supervision import lease, processes
from anabranch.coordinator.supervision.backoff import Backoff
from anabranch.coordinator.supervision.config import CoordinatorConfig
from anabranch.coordinator.supervision.standby import Standby
from anabranch.coordinator.supervision.superlink import SuperLink
from anabranch.coordinator.supervision.watch import Watch

log = logging.getLogger("anabranch.coordinator.up")

TICK_S = 0.1
"""Seconds between two looks at the processes."""
LOOK_S = 0.5
"""Seconds between two looks at the store."""
TELL_S = 30.0
"""Seconds without news after which it says what it waits for."""
FATE_S = 15.0
"""Seconds between two questions to Flower, what became of a run that does not begin."""
HEED_S = 15.0
"""Seconds that a run which merges nothing has to end, after SIGTERM."""


class Exit(IntEnum):
    """How ``anabranch coordinator up`` ends."""

    DONE = 0
    """Every round is over, or nothing more may be begun."""
    FAILED = 1
    """What died was started too often without a gain."""
    STOPPED = 4
    """It was told to stop: nothing is lost, and ``up`` goes on."""


class _DiedError(Exception):
    """A process is gone, and why."""

    def __init__(self, event: str, told: str, *, known: bool = False) -> None:
        super().__init__(told)
        self.event, self.known = event, known


class Supervisor:
    """One federation kept at work.

    Args:
        config: What to run.
        log_format: How its processes log.
        link: Makes the SuperLink, of a configuration and further environment.
        standby: Makes the process that waits to be the next ServerApp, of a configuration and the
            SuperLink's environment.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        log_format: logs.LogFormat = "text",
        link: Callable[[CoordinatorConfig, dict[str, str]], SuperLink] = SuperLink,
        standby: Callable[[CoordinatorConfig, dict[str, str]], Standby] = Standby,
    ) -> None:
        self._config = config
        self._mark = str(config.federation.resolve())
        environ = {processes.MARK: self._mark, logs.VARIABLE: log_format}
        self._link = link(config, environ)
        self._standby = standby(config, self._link.env)
        self._run: str | None = None
        self._stops = 0
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._told_s = time.monotonic()

    def run(self, preflight: Callable[[], None] = lambda: None) -> Exit:
        """Work until every round is over, or it is told to stop, or nothing helps.

        Args:
            preflight: Called before anything begins, while the standby loads; raises where it
                should not begin.

        Raises:
            ValueError: The federation's folder is not sound, or another ``up`` works on it.
        """
        config = load_federation(self._config.federation)
        with lease.alone(self._config.federation), self._signals():
            if left := processes.kill_marked(self._mark):
                self._tell("cleared", f"ended {len(left)} processes of an earlier coordinator")
            try:
                self._standby.tend()
                preflight()
                with closing(_opened(config, self._config.federation)) as store:
                    self._watch = Watch(config, store)
                    self._backoff = Backoff(self._config.restart, gained=self._watch.gained)
                    return self._work(config, store)
            finally:
                self._link.stop(5.0)
                processes.kill_marked(self._mark)
                self._standby.end()
                for helper in self._helpers:
                    helper.wait()

    def _work(self, config: FederationConfig, store: Store) -> Exit:
        while True:
            try:
                if self._watch.complete:
                    self._tell("done", f"all {config.rounds} rounds are over")
                    return Exit.DONE
                if self._watch.now.round is None and (want := ends(store)) is not None:
                    heeded(store)
                    self._tell("ended", f"no further round is begun: the operator asked to {want}")
                    return Exit.DONE
                self._begin()
                ended = self._follow(store)
            except (_DiedError, FlowerError, StoreError) as error:
                event, told = "flower-failed", str(error)
                if isinstance(error, StoreError):
                    event = "no-store"
                elif isinstance(error, _DiedError):
                    event = error.event
                    if not error.known:
                        told += f"; {self._last_words(event)}"
                if self._stops:
                    self._tell("stopped", f"stopped: {told}")
                    return Exit.STOPPED
                if not self._again(event, told):
                    return Exit.FAILED
                continue
            if ended is not None:
                return ended

    def _last_words(self, event: str) -> str:
        # Without a standby the ServerApp's go to Flower alone.
        if event == "serverapp-died" and (words := self._standby.last_words()):
            return f"{self._standby.log} ends: {words}"
        return f"{self._link.log} ends: {self._link.last_words() or 'with nothing'}"

    def _begin(self) -> None:
        """Have a SuperLink and a run on it.

        Raises:
            FlowerError: They do not begin.
        """
        if (why := self._link.died()) is not None:
            if self._link.pid is not None:
                self._tell("superlink-starting", f"the SuperLink {why}; it is started again")
                # What it left talks to nobody.
                processes.kill_marked(self._mark, spare=self._standby.waits)
            began = time.monotonic()
            self._link.start()
            self._timed("superlink", f"the SuperLink answers at {self._link.address}", began)
            for name in self._link.register():
                self._tell("registered", f"the node with the key {name} may join", client=name)
        before, self._run = self._run, None
        if self._stops:
            return
        began = time.monotonic()
        self._run = self._link.submit()
        self._timed("submitted", f"Flower run {self._run} is submitted", began)
        if before is not None:
            self._helpers.append(self._link.forget(before))
        self._await_serverapp(self._run)

    def _await_serverapp(self, run: str) -> None:
        """Wait until a run's ServerApp is at work.

        Raises:
            _DiedError: It does not come, or the SuperLink is gone.
        """
        began = asked = time.monotonic()
        while self._lease()[0] is None:
            self._check_link()
            self._standby.tend()
            now = time.monotonic()
            if now - asked > FATE_S:
                # Flower gives up a ServerApp whose process takes long to load.
                fate, asked = self._link.fate(run), now
                if self._lease()[0] is None and fate.startswith("finished"):
                    raise _DiedError("serverapp-died", f"the ServerApp did not begin ({fate})")
            if now - began > self._config.start_s:
                raise _DiedError("serverapp-died", "the ServerApp did not begin in time")
            if now - self._told_s >= TELL_S:
                self._tell("waits", f"Flower run {run} waits for its ServerApp to load")
            if self._stops:
                return
            time.sleep(TICK_S)
        self._timed("serverapp", "the ServerApp runs", began)

    def _follow(self, store: Store) -> Exit | None:
        """Watch a run until it ends well; None where another one is to go on.

        Raises:
            _DiedError: Something died.
            StoreError: It ended, and whether well the store does not say now.
        """
        looked_s = asked_s = 0.0
        while True:
            self._check_link()
            now = time.monotonic()
            if now - looked_s >= LOOK_S:
                self._report()
                looked_s = now
            current, alive = self._lease()
            self._standby.tend(current.pid if current is not None and alive else None)
            if not alive:
                break
            if self._stops and not asked_s:
                asked_s = now
                try:
                    ask(store, Want.STOP, "coordinator up")
                except StoreError as error:  # it is ended below
                    self._tell("no-store", str(error), level=logging.ERROR)
            if asked_s and now - asked_s > self._patience_s():
                self._tell("stopping", "the run does not end by itself; it is ended")
                break
            time.sleep(TICK_S)
        self._report()
        if self._stops:
            where = self._watch.now
            rest = "" if where.round is None else f"; round {where.round} goes on with the next up"
            self._tell("stopped", f"stopped after {where.done} of {where.rounds} rounds{rest}")
            return Exit.STOPPED
        if current is None:
            raise _DiedError("serverapp-died", "another run took its place and is gone", known=True)
        if current.ended == "done":
            self._look()
            if self._watch.complete:
                return None
            why = self._watch.now.last or "the run ended"
            self._tell("ended", f"no further round is begun: {why}")
            return Exit.DONE
        known = current.ended is not None
        why = current.ended or f"process {current.pid} was killed"
        raise _DiedError("serverapp-died", f"the ServerApp died: {why}", known=known)

    def _again(self, event: str, told: str) -> bool:
        """Tell of a death, and wait for the next start; False when there were too many."""
        self._tell(event, told, level=logging.ERROR)
        self._report()
        self._backoff = self._backoff.after(self._watch.gained)
        if self._backoff.gives_up:
            self._tell(
                "gave-up",
                f"{self._backoff.failures} starts in a row came to nothing; mend what the log "
                "says and call up again: what was admitted is kept",
                level=logging.ERROR,
            )
            return False
        if wait_s := self._backoff.wait_s:
            self._tell("waiting", f"the next start is in {wait_s:g} s")
            end = time.monotonic() + wait_s
            while time.monotonic() < end and not self._stops:
                time.sleep(TICK_S)
        return True

    def _check_link(self) -> None:
        """See that the SuperLink lives.

        Raises:
            _DiedError: It is gone.
        """
        self._helpers = [helper for helper in self._helpers if helper.poll() is None]
        if (why := self._link.died()) is None:
            return
        # Its ServerApp would go on for a while, and talk to nobody.
        processes.kill_marked(self._mark, spare=self._standby.waits)
        self._run = None
        raise _DiedError("superlink-died", f"the SuperLink {why}")

    def _lease(self) -> tuple[lease.Lease | None, bool]:
        """That of the run under way, once it has one, and whether its holder lives.

        Another run of this SuperLink's that holds it is the one under way from now on.
        """
        current, alive = lease.look(self._config.federation)
        if current is None or self._run is None:
            return None, False
        if current.run == self._run:
            return current, alive
        if not alive or current.pid not in processes.marked(self._mark):
            return None, False
        # Submitted before the last SuperLink died, and begun by this one: as good as ours.
        self._tell("taken-over", f"Flower run {current.run} is at work already, and goes on")
        self._helpers.append(self._link.forget(self._run))
        self._run = current.run
        return current, alive

    def _patience_s(self) -> float:
        merging = self._watch.now.state in ("merging", "gating")
        return self._config.stop_s if merging else HEED_S

    def _look(self) -> None:
        """Tell what is new in the store.

        Raises:
            StoreError: It does not answer.
        """
        for one in self._watch.look():
            self._tell(one.event, one.told, **one.about)

    def _report(self) -> None:
        try:
            self._look()
        except StoreError as error:  # the ServerApp waits for it, and says so when it gives up
            if time.monotonic() - self._told_s >= TELL_S:
                self._tell("no-store", f"the store does not answer: {error}", level=logging.ERROR)
            return
        if time.monotonic() - self._told_s >= TELL_S:
            self._tell("waits", self._waits_for())

    def _waits_for(self) -> str:
        now = self._watch.now
        if now.want == Want.PAUSE.value:
            return "the operator pauses it"
        if now.round is None:
            return "between rounds: it waits for clients to join, or to score the adapter"
        missing = [name for name in now.asked if name not in now.admitted]
        if now.state == "collecting" and missing:
            return f"round {now.round} waits for {', '.join(missing[:20])}"
        return f"round {now.round} is {now.state}"

    def _timed(self, event: str, told: str, began: float) -> None:
        seconds = round(time.monotonic() - began, 3)
        self._tell(event, f"{told}, after {seconds:.1f} s", seconds=seconds)

    def _tell(self, event: str, told: str, *, level: int = logging.INFO, **about: Any) -> None:
        self._told_s = time.monotonic()
        log.log(level, told, extra={"event": event, **about})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop it; the third one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            if self._stops > 2:
                raise KeyboardInterrupt

        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, stop) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def _opened(config: FederationConfig, folder: Path) -> Store:
    return open_store(
        config.store, folder, federation=config.name, run=config.run, durable=config.durable
    )
