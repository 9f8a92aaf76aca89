"""Logs as lines for people, or as JSON for machines: federation, round and client in fields.

Whoever logs says what it is about by ``extra={"round": 3, "client": "site-1"}``; what a whole
process is about (its federation) is said once, to ``configure``. Loads no torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
"""How a line is written."""

VARIABLE = "ANABRANCH_LOG_FORMAT"
"""Environment variable by which a process hands its format to those it starts."""

ROOT = "anabranch"
"""The logger above all of ours."""

FIELDS = ("event", "federation", "run", "round", "client", "code", "seconds")
"""What a line may say of what it is about, beside its text."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what the line is about.

    Args:
        about: Fields of every line that does not say them itself.
    """

    def __init__(self, about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._about = about or {}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._about,
            **about(record),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False, default=str)


def about(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says that it is about."""
    said = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in said.items() if value is not None}


def configure(
    form: LogFormat | None = None,
    *,
    about: dict[str, Any] | None = None,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    also: Sequence[str] = (),
) -> None:
    """Let our loggers write to a stream; called again, it replaces what it set up before.

    Args:
        form: How; None takes the environment's ``ANABRANCH_LOG_FORMAT``, else text.
        about: Fields of every line.
        stream: Where to; None is the standard error stream.
        level: Least level.
        also: Loggers of others that write alike, such as ``uvicorn``.

    Raises:
        ValueError: The environment names no format.
    """
    chosen = form or os.environ.get(VARIABLE) or "text"
    if chosen not in ("text", "json"):
        raise ValueError(f'{VARIABLE} is {chosen!r}; set it to "text" or "json"')
    handler = logging.StreamHandler(stream or sys.stderr)
    if chosen == "json":
        handler.setFormatter(JsonLines(about))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.set_up_here = True  # type: ignore[attr-defined]
    for logger in map(logging.getLogger, (ROOT, *also)):
        for old in list(logger.handlers):
            if getattr(old, "set_up_here", False):
                logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def tell_changes(stream: TextIO, about: dict[str, Any] | None = None) -> None:
    """Write every change of state, a line that says which ``event`` it is, as JSON to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(about))
    handler.addFilter(lambda record: hasattr(record, "event"))
    handler.set_up_here = True  # type: ignore[attr-defined]
    logging.getLogger(ROOT).addHandler(handler)
