"""``anabranch coordinator``: run a federation as a service."""

from __future__ import annotations

import typer

coordinator_app = typer.Typer(
    name="coordinator", help="Run a federation as a service.", no_args_is_help=True
)
