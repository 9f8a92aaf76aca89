"""``anabranch federation``: where a running federation stands, and what its operator asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.coordinator import Form, LogFormat
from anabranch.cli.output import print_json, stdout
from anabranch.cli.remote import Api, MayCert, remote_ask, remote_standing

if TYPE_CHECKING:
    from anabranch.coordinator.federation import FederationConfig
    from anabranch.coordinator.rounds.standing import Standing
    from anabranch.coordinator.store import Store

federation_app = typer.Typer(
    name="federation",
    help="Where federations stand; pause, resume, drain or abort it.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path, typer.Argument(help="The federation's folder; with --cert its name at the coordinator.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For other programs.")]


@federation_app.command("status")
def status_command(
    folder: Folder, json: AsJson = False, cert: MayCert = None, api: Api = None
) -> None:
    """Say where a federation stands: its round, who has answered, what is in service."""
    from anabranch.coordinator.rounds.standing import standing
    from anabranch.coordinator.supervision.lease import supervised

    if cert is not None:
        found = remote_standing(str(folder), cert, api)
    else:
        with _opened(folder) as (config, store):
            found = replace(standing(config, store), running=supervised(folder))
    if json:
        print_json(asdict(found))
        return
    _show(found)


@federation_app.command("list")
def list_command(folder: Folder, json: AsJson = False) -> None:
    """Say where every federation stands that shares this one's database."""
    from anabranch.coordinator.federation import load_federation
    from anabranch.coordinator.rounds.overview import overview
    from anabranch.coordinator.store.config import JOURNAL_URL
    from anabranch.coordinator.store.database import connect
    from anabranch.coordinator.store.opening import database_of

    store = load_federation(folder).store
    if store.url == JOURNAL_URL:
        raise ValueError(f"{folder}: a journal holds one federation; `federation status` shows it")
    engine = connect(database_of(store, folder))
    try:
        found = overview(engine)
    finally:
        engine.dispose()
    if json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        now = "between rounds"
        if one.round is not None:
            now = f"round {one.round} is {one.state}: {one.admitted} of {one.asked} admitted"
        over = f"{one.done} rounds over, {one.published} published, {one.abandoned} abandoned"
        line = f"{one.federation}, run {one.run}: {over}; {now}; asked to {one.want}"
        stdout.print(line, markup=False, soft_wrap=True)


@federation_app.command("pause")
def pause_command(folder: Folder, cert: MayCert = None, api: Api = None) -> None:
    """Begin no further round, and stop the clock of the one under way.

    Updates on their way are still admitted. A pause outlasts a restart of the coordinator.
    """
    _ask(folder, "pause", cert, api)


@federation_app.command("resume")
def resume_command(folder: Folder, cert: MayCert = None, api: Api = None) -> None:
    """End a pause: the deadline moves by as long as the clock stood."""
    _ask(folder, "run", cert, api)


@federation_app.command("drain")
def drain_command(folder: Folder, cert: MayCert = None, api: Api = None) -> None:
    """Close the round under way with what it holds, and end the run after it.

    The next run goes on with the next round.
    """
    _ask(folder, "drain", cert, api)


@federation_app.command("abort")
def abort_command(folder: Folder, cert: MayCert = None, api: Api = None) -> None:
    """Abandon the round under way, and end the run; the adapter in service stays."""
    _ask(folder, "abort", cert, api)


@federation_app.command("watch")
def watch_command(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9464,
    log_format: LogFormat = Form.TEXT,
) -> None:
    """Serve /metrics for Prometheus, /healthz, /readyz and /status until interrupted; read only."""
    from anabranch.coordinator import logs
    from anabranch.coordinator.federation import load_federation
    from anabranch.coordinator.web.watch import server

    config = load_federation(folder)
    about = {"federation": config.name, "run": config.run}
    logs.configure(log_format.value, about=about, also=("uvicorn",))
    serving = server(folder, host, port)
    stdout.print(f"http://{host}:{port}/metrics  /healthz  /readyz  /status", markup=False)
    serving.run()


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[FederationConfig, Store]]:
    from anabranch.coordinator.federation import load_federation
    from anabranch.coordinator.store import open_store

    config = load_federation(folder)
    with closing(open_store(config.store, folder, federation=config.name, run=config.run)) as store:
        yield config, store


def _ask(folder: Path, want: str, cert: Path | None, api: str | None) -> None:
    from anabranch.coordinator.rounds.control import Want, ask
    from anabranch.coordinator.rounds.standing import standing

    when = "within a second, if its coordinator runs; else when it starts"
    if cert is not None:
        remote_ask(str(folder), want, cert, api)
        stdout.print(f"{folder}: asked to {want}; it heeds that {when}", markup=False)
        return
    with _opened(folder) as (config, store):
        if standing(config, store).done >= config.rounds:
            raise ValueError(
                f"{config.name}: all {config.rounds} rounds are over; raise rounds in "
                f"{folder / 'federation.toml'} to go on"
            )
        ask(store, Want(want))
    stdout.print(f"{config.name}: asked to {want}; it heeds that {when}", markup=False)


def _show(found: Standing) -> None:
    over = f"{found.done} of {found.rounds} rounds over"
    fate = f"{found.published} published, {found.abandoned} abandoned"
    lines = [
        f"{found.federation}, run {found.run}: {over}, {fate}",
        f"asked to {found.want}",
    ]
    if found.running is not None:
        now, at_work = found.service, "at work" if found.running else "not at work"
        if now is not None and now.started:
            at_work += f"; started on port {now.port}, task {now.task}, by {now.by}"
        elif now is not None:
            at_work += f"; it was started, and ended: {now.why}"
        lines.append(at_work)
    if found.round is not None:
        lines.append(
            f"round {found.round} is {found.state}: {len(found.admitted)} of {len(found.asked)} "
            "admitted"
        )
        waiting = [name for name in found.asked if name not in found.admitted]
        if waiting:
            lines.append(f"without an update: {', '.join(waiting[:20])}")
        if found.refused:
            codes = ", ".join(f"{count} {code}" for code, count in sorted(found.refused.items()))
            lines.append(f"refused: {codes}")
    if found.adapter_hash:
        lines.append(f"in service: {found.adapter_hash}")
    if found.last:
        lines.append(found.last)
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)
