"""The command's entry point: what there is to call, and how a failure reads.

``anabranch --help`` loads no torch: every command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys

import click
import typer

from anabranch.cli.inspect import inspect_command
from anabranch.cli.merge import merge_command
from anabranch.cli.methods import methods_command
from anabranch.cli.output import complain
from anabranch.cli.simulate import simulate_command

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="anabranch",
    help="Merge models that were fine-tuned apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. "
    "ANABRANCH_DEBUG=1 shows tracebacks.",
)
app.command("simulate")(simulate_command)
app.command("merge")(merge_command)
app.command("inspect")(inspect_command)
app.command("methods")(methods_command)


@app.callback()
def _root() -> None:
    """Merge models that were fine-tuned apart."""


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2, never in a traceback."""
    if os.environ.get("ANABRANCH_DEBUG"):
        app()
        return
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(BAD_INPUT)
    except click.ClickException as error:
        complain(f"{error.format_message()} (see anabranch --help)")
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted; anabranch simulate --resume goes on with a run that was cut short")
        sys.exit(INTERRUPTED)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        complain(str(error))
        sys.exit(BAD_INPUT)
    except (RuntimeError, OSError, KeyError) as error:
        complain(str(error))
        sys.exit(FAILED)
    sys.exit(code or 0)
