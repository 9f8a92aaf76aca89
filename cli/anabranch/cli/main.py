"""The command's entry point: what there is to call, and how a failure reads.

``anabranch --help`` loads no torch: every command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys

import click
import typer

from anabranch.cli.adapters import adapters_app
from anabranch.cli.api import api_command, invite_command
from anabranch.cli.backup import backup_command, restore_command
from anabranch.cli.client import client_app
from anabranch.cli.coordinator import coordinator_app
from anabranch.cli.doctor import doctor_command
from anabranch.cli.federation import federation_app
from anabranch.cli.inspect import inspect_command
from anabranch.cli.keys import keys_app
from anabranch.cli.merge import merge_command
from anabranch.cli.methods import methods_command
from anabranch.cli.output import complain
from anabranch.cli.peers import peers_app
from anabranch.cli.remote_federation import add_remote
from anabranch.cli.simulate import simulate_command
from anabranch.cli.verify import receipts_app, verify_command

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="anabranch",
    help="Merge models that were fine-tuned apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 undecided (verify), 4 stopped, and goes "
    "on (coordinator up, client run), 5 refused by the coordinator, 6 coordinator not reached, 130 "
    "interrupted. "
    "ANABRANCH_DEBUG=1 shows tracebacks.",
)
app.command("simulate")(simulate_command)
app.command("merge")(merge_command)
app.command("inspect")(inspect_command)
app.command("methods")(methods_command)
app.command("doctor")(doctor_command)
app.command("backup")(backup_command)
app.command("restore")(restore_command)
app.command("verify")(verify_command)
app.add_typer(coordinator_app)
coordinator_app.command("api")(api_command)
coordinator_app.command("invite")(invite_command)
app.add_typer(federation_app)
add_remote(federation_app)
app.add_typer(client_app)
app.add_typer(peers_app)
app.add_typer(keys_app)
app.add_typer(receipts_app)
app.add_typer(adapters_app)


@app.callback()
def _root() -> None:
    """Merge models that were fine-tuned apart."""


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2, never in a traceback."""
    if os.environ.get("ANABRANCH_DEBUG"):
        app()
        return
    code = BAD_INPUT
    try:
        # Typer makes an interruption the exit code 130; what a command returns is no code.
        code = app(prog_name=app.info.name, standalone_mode=False) or 0
        if code == INTERRUPTED:
            go_on = "; --resume goes on with what is done" if "simulate" in sys.argv[1:2] else ""
            complain(f"interrupted{go_on}")
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "anabranch"
        complain(f"{error.format_message().rstrip('.')}; see {path} --help")
    except click.ClickException as error:
        complain(error.format_message())
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        complain(_reason(error))
    except ValueError as error:
        complain(str(error))
    except OSError as error:
        complain(_reason(error))
        code = FAILED
    except RuntimeError as error:
        complain(str(error))
        # Calls of the coordinator's API say more.
        code = getattr(error, "exit_code", FAILED)
    sys.exit(code)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
