"""``anabranch coordinator``: run a federation as a service."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.output import complain

coordinator_app = typer.Typer(
    name="coordinator", help="Run a federation as a service.", no_args_is_help=True
)


class Form(StrEnum):
    """How a log reads."""

    TEXT = "text"
    JSON = "json"


LogFormat = Annotated[
    Form, typer.Option("--log-format", help="Log on stderr for people, or as JSON lines.")
]


@coordinator_app.command("up")
def up_command(
    config: Annotated[
        Path, typer.Argument(help="coordinator.toml or the folder that holds it; or api.toml.")
    ],
    log_format: LogFormat = Form.TEXT,
    json: Annotated[
        bool, typer.Option("--json", help="Changes of state as JSON lines on stdout.")
    ] = False,
) -> None:
    """Run a federation's SuperLink and its rounds; start again what dies.

    Looks at ports, certificates, keys and store first. A new run goes on with the round that was
    under way. SIGTERM closes the round if it holds its quorum, keeps it for the next time if not,
    and ends with 4; 0: every round is over; 1: what died was started too often; 2: refused.

    With api.toml: every federation that is started by way of the API, each on a port of its own,
    until SIGTERM.
    """
    from anabranch.aggregation.recipe import read_config
    from anabranch.coordinator import logs
    from anabranch.coordinator.federation import load_federation
    from anabranch.coordinator.supervision.config import load_coordinator
    from anabranch.coordinator.supervision.supervisor import Supervisor

    if config.is_file() and "federations" in read_config(config):
        _fleet(config, log_format.value, json)
        return
    loaded = load_coordinator(config)
    federation = load_federation(loaded.federation)
    about = {"federation": federation.name, "run": federation.run}
    logs.configure(log_format.value, about=about)
    if json:
        logs.tell_changes(sys.stdout, about)

    def preflight() -> None:
        # It loads torch, for seconds; the standby does so beside it.
        from anabranch.coordinator.supervision.preflight import examine_coordinator

        failed = [one for one in examine_coordinator(loaded) if not one.ok]
        for one in failed:
            complain(f"{one.check}: {one.told}")
        if failed:
            raise typer.Exit(2)

    raise typer.Exit(int(Supervisor(loaded, log_format.value).run(preflight)))


def _fleet(path: Path, log_format: Literal["text", "json"], json: bool) -> None:
    """Keep every federation at work that is started by way of the API."""
    from anabranch.coordinator import logs
    from anabranch.coordinator.api.config import load_api
    from anabranch.coordinator.supervision.fleet import Fleet

    config = load_api(path)
    if config.flower is None:
        raise ValueError(f"{path}: has no [flower]; give ports, tasks and [flower.tls]")
    logs.configure(log_format)
    if json:
        logs.tell_changes(sys.stdout)
    command = [sys.executable, "-m", "anabranch.cli", "coordinator", "up"]
    raise typer.Exit(int(Fleet(config.federations, config.flower, command).run()))
