"""Where a federation is remembered, as its configuration says it. Loads no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

JOURNAL_URL = "journal"
SQLITE, POSTGRES, S3 = "sqlite:///", "postgresql://", "s3://"


def _a_database(url: str) -> str:
    if url == JOURNAL_URL or (url.startswith(SQLITE) and url != SQLITE):
        return url
    if url.startswith(POSTGRES):
        return url
    raise PydanticCustomError(
        "store",
        f'give "{SQLITE}FILE", "{POSTGRES}HOST/DATABASE" or "{JOURNAL_URL}"',
    )


def _a_place(place: str) -> str:
    if "://" not in place or (place.startswith(S3) and place != S3):
        return place
    raise PydanticCustomError("artifacts", f'give a folder or "{S3}BUCKET/PREFIX"')


class StoreConfig(BaseModel):
    """Where a coordinator keeps rows and bytes. Relative paths are of the federation's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, AfterValidator(_a_database)] = f"{SQLITE}store.db"
    """Database of the rounds: ``sqlite:///FILE`` or ``postgresql://[USER@]HOST[:PORT]/DATABASE``,
    whose password belongs into ``PGPASSWORD`` or ``~/.pgpass``. ``journal`` keeps them in a text
    file, ``metrics.jsonl``, as simulations do: fastest, for one process, without quota, retention
    or backup."""
    artifacts: Annotated[str, Field(min_length=1), AfterValidator(_a_place)] = "artifacts"
    """Where updates and adapters are kept: a folder, or ``s3://BUCKET/PREFIX`` with the usual
    ``AWS_*`` environment. Of this database only: what it does not know is garbage there."""
    quota_mb: int | None = Field(None, ge=1)
    """MiB of artifacts this federation may keep; what is beyond is refused. None sets no limit."""
    keep_rounds: int | None = Field(None, ge=1)
    """Rounds whose updates and adapters are kept, the last ones; rows are kept always, and the
    adapter in service. None keeps all."""
    patience_s: float = Field(120.0, ge=0, allow_inf_nan=False)
    """Seconds for which a running coordinator waits for a database that is gone or locked, before
    it ends: the log says so every ten seconds."""
