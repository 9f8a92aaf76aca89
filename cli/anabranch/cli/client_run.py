"""``anabranch client run``: take part in a federation without a SuperNode, until it is over."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import stdout
from anabranch.cli.remote import Api, Cert, Name

if TYPE_CHECKING:
    from anabranch.wire.plan import Scalar

REFUSED, STOPPED = 5, 4
"""Exit codes: the one update was refused; told to stop, and it goes on with the next start."""


def run_command(
    federation: Name,
    cert: Cert,
    task: Annotated[
        str, typer.Option(metavar="MODULE:CLASS", envvar="ANABRANCH_TASK", help="What trains.")
    ],
    task_params: Annotated[
        str, typer.Option(metavar="JSON", help="The task's parameters, a JSON object.")
    ] = "{}",
    partition: Annotated[
        int, typer.Option(min=0, help="Which part of the task's data is here.")
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            envvar="ANABRANCH_STATE",
            help="Folder for finished updates and what they left out; by default `state` in "
            "--cert's.",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            envvar="ANABRANCH_KEYS",
            help="Folder with coordinator.pub and NAME.key, where the federation is signed.",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Do what is asked now, if anything is, and end.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.05, metavar="SECONDS", help="Between two looks for an order.")
    ] = 5.0,
    api: Api = None,
    as_json: Annotated[bool, typer.Option("--json", help="What happens as JSON lines.")] = False,
) -> None:
    """Join a federation, train when a round asks, upload, and go on until it is over.

    A finished update is on disk before it is uploaded: started again, the same bytes go on where
    they were cut off, and nothing is trained twice. While the coordinator is away it waits.

    Ends with 0: the federation is over (or, with --once, all is done that is asked); 1: an order is
    not to be trusted, or training failed; 4: told to stop, by SIGTERM or Ctrl-C; 5: refused; 6:
    with --once, not reached.
    """
    from filelock import FileLock, Timeout

    from anabranch.client.api.credentials import Credentials
    from anabranch.client.api.line import Line
    from anabranch.client.api.taking_part import (
        Ended,
        Manner,
        StoppedError,
        TakingPart,
        file_prefix,
    )
    from anabranch.client.lone import LoneNode

    credentials = Credentials(cert)
    name = str(credentials.about["name"])
    folder = state or cert / "state"
    config: dict[str, Scalar] = {
        "task": task, "task-params": _object(task_params), "partition-id": partition,
        "client": name, "state": str(folder),
    }  # fmt: skip
    if keys is not None:
        config["keys"] = str(keys)
    node = LoneNode(config)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(folder / f"{file_prefix(federation)}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: another `client run` takes part in {federation} with it; end that one, or "
            "give another --state"
        ) from None
    manner = Manner(every_s=every, once=once)
    address = api or str(credentials.about["address"])
    try:
        with _stopping() as stop, Line(credentials, address) as line:
            if not once:
                node.load()
            part = TakingPart(
                line, federation, name, node, folder, _teller(federation, as_json), manner, stop
            )
            ended = part.run()
    except StoppedError:
        _teller(federation, as_json)(
            "stopped", f"stopped; {federation} still counts on {name}, who goes on when started "
            "again, or leaves by `anabranch client join --leave`", {},
        )  # fmt: skip
        raise typer.Exit(STOPPED) from None
    finally:
        lock.release()
    if ended is Ended.REFUSED:
        raise typer.Exit(REFUSED)


def _object(text: str) -> str:
    """A JSON object's text, checked."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--task-params: no JSON ({error}); give an object as '{{}}'") from error
    if not isinstance(value, dict):
        raise ValueError(f"--task-params: {text[:40]!r} is no JSON object; give one as '{{}}'")
    return text


def _teller(federation: str, as_json: bool) -> Any:
    def tell(event: str, told: str, facts: dict[str, Any]) -> None:
        if as_json:
            row = {"event": event, "federation": federation, **facts, "told": told}
            print(json.dumps(row), flush=True)
        else:
            stdout.print(f"{federation}: {told}", markup=False, soft_wrap=True)

    return tell


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C end what runs, at the next line of Python; what was kept stays."""
    from anabranch.client.api.taking_part import StoppedError

    stop = threading.Event()
    before: dict[int, Any] = {}

    def heed(number: int, frame: FrameType | None) -> None:
        # A second one ends the process: something does not let go.
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        stop.set()
        raise StoppedError

    # A caller in another thread has signals of its own.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, heed)
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
