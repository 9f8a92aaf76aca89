"""A process that waits to be the next ServerApp, and the command that hands over to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anabranch.coordinator.supervision import handover, processes, standby, waiting
from anabranch.coordinator.supervision.config import CoordinatorConfig
from anabranch.coordinator.supervision.standby import COMMAND, Standby, folder_of

PATIENCE_S = 60.0

WORK = """
import json, os, sys, time
from pathlib import Path

def main():
    Path(os.environ["NOTES"]).open("a").write(json.dumps([os.getpid(), *sys.argv]) + "\\n")
    print("at work", flush=True)
    time.sleep(600)
"""
SLOW = "import os, time\nwhile not os.path.exists(os.environ['GO']):\n    time.sleep(0.02)\n"


class Waits(Standby):
    """Runs ``work.main`` of a test's folder, and loads ``slow`` until it may."""

    def _real(self) -> str:
        return str(self._folder.with_name("scripts") / COMMAND)

    def _arguments(self) -> list[str]:
        return [*super()._arguments()[:5], "work:main", "slow"]


class Site:
    """A folder with a standby in it.

    Args:
        home: Long enough that no socket could have its address.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        self.home, self.notes, self.go = home, home / "notes", home / "go"
        (home / "work.py").write_text(WORK)
        (home / "slow.py").write_text(SLOW)
        real = home / "scripts" / COMMAND
        real.parent.mkdir()
        real.write_text('#!/bin/sh\necho real "$@"\npwd\n')
        real.chmod(0o700)
        self.config = CoordinatorConfig(task="a.b:C", insecure=True, home=home)
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(home), *sys.path]),
            "NOTES": str(self.notes), "GO": str(self.go), processes.MARK: str(home),
        }  # fmt: skip
        self.standby = Waits(self.config, env)

    def call(self, *arguments: str) -> subprocess.Popen[str]:
        """What Flower does."""
        path = folder_of(self.home) / COMMAND
        return subprocess.Popen(
            [str(path), *arguments], stdout=subprocess.PIPE, text=True, cwd=self.home
        )

    def listens(self) -> bool:
        return (folder_of(self.home) / handover.SOCKET).exists()

    def noted(self) -> list[list[str]]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [json.loads(line) for line in lines]


def wait(what: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / ("long" * 30))
    yield made
    made.standby.end()


def test_what_is_called_while_it_loads_runs_in_it(site: Site) -> None:
    site.standby.tend()
    [pid] = site.standby.waits
    wait(site.listens)
    caller = site.call("--token", "a b", "--insecure")
    time.sleep(0.2)
    assert caller.poll() is None
    assert site.noted() == []
    site.go.touch()
    assert caller.communicate(timeout=PATIENCE_S)[0] == ""
    wait(site.noted)
    assert site.noted() == [[pid, COMMAND, "--token", "a b", "--insecure"]]
    assert site.standby.waits == []
    # Of a ServerApp that it starts itself Flower shows no output.
    wait((site.home / "serverapp.log").read_text)
    assert (site.home / "serverapp.log").read_text() == "at work\n"
    # One that works is none for a second call, and no successor is there before it is at work.
    site.standby.tend()
    assert site.call("x").communicate(timeout=PATIENCE_S)[0] == f"real x\n{site.home}\n"
    site.standby.tend(pid)
    [successor] = site.standby.waits
    assert successor != pid
    wait(site.listens)
    assert site.call("y").communicate(timeout=PATIENCE_S)[0] == ""
    wait(lambda: len(site.noted()) == 2)
    assert site.noted()[1] == [successor, COMMAND, "y"]


def test_without_anybody_who_waits_it_is_the_real_command(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.go.touch()
    site.standby.tend()
    [pid] = site.standby.waits
    wait(site.listens)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not site.standby.waits)
    assert site.call("--token", "t").communicate(timeout=PATIENCE_S)[0].startswith("real --token t")
    # It is started again, and not over and over.
    site.standby.tend()
    assert site.standby.waits == []
    monkeypatch.setattr(standby, "AGAIN_S", 0.0)
    site.standby.tend()
    assert site.standby.waits not in ([], [pid])


def test_one_that_is_gone_before_it_is_at_work_has_a_successor_at_once(site: Site) -> None:
    site.go.touch()
    site.standby.tend()
    [pid] = site.standby.waits
    wait(site.listens)
    site.call().communicate(timeout=PATIENCE_S)
    wait(site.noted)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: site.standby.tend() or site.standby.waits)
    assert site.standby.waits != [pid]


def test_its_folder_is_nobody_elses_and_goes_with_it(site: Site) -> None:
    site.standby.tend()
    [pid] = site.standby.waits
    folder = folder_of(site.home)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert processes.kill_marked(str(site.home), spare=[pid]) == []
    assert site.standby.waits == [pid]
    site.standby.end()
    assert not folder.exists()
    assert processes.marked(str(site.home)) == []


def test_there_is_none_where_none_is_wanted_or_none_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CoordinatorConfig(task="a.b:C", insecure=True, home=tmp_path, standby=False)
    none = Standby(config, {})
    none.tend()
    assert none.waits == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    config = CoordinatorConfig(task="a.b:C", insecure=True, home=tmp_path / "file")
    barred = Standby(config, {})
    barred.tend()
    barred.tend()
    assert barred.waits == []
    assert [record.message[:19] for record in caplog.records] == ["there is no standby"]
    barred.end()


def test_a_caller_that_waits_in_vain_cannot_be_taken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PATIENCE_S", 0.05)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(handover.SOCKET)
        server.listen()
        assert not handover.handed_over(str(tmp_path), ["a", "late"])
        # What is left of that call, half a line, and one who waits.
        for text in (b'["a", ', b'["b"]\n'):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(handover.SOCKET)
                peer.sendall(text)
                if text.endswith(b"\n"):
                    assert waiting._taken(server) == ["b"]
                    assert peer.recv(1) == handover.TAKEN
