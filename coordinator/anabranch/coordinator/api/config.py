"""How the API is served, as configuration. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anabranch.aggregation.recipe import read_config, validation_line
from anabranch.coordinator.supervision.config import FleetConfig

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LimitsConfig(BaseModel):
    """What one peer, and all of them, may take up."""

    model_config = STRICT

    message_kb: int = Field(1088, ge=64)
    """KiB of a message; parts of uploads and downloads are of at most 1 MiB."""
    streams: int = Field(16, ge=1)
    """Calls at a time over one connection."""
    calls: int = Field(4000, ge=1)
    """Calls at a time over all; one more is refused."""
    calls_per_s: float = Field(20, gt=0)
    """Calls a second that a peer may make for long."""
    burst: int = Field(100, ge=1)
    """Calls that a peer may make at once."""
    uploads: int = Field(64, ge=1)
    """Uploads read at a time; further ones wait for their turn."""
    admissions: int = Field(2, ge=1)
    """Updates decoded and checked at a time: each is in memory whole."""
    downloads: int = Field(8, ge=1)
    """Downloads at a time, each with its adapter in memory; further ones wait for their turn."""
    stall_s: float = Field(20, gt=0)
    """Seconds in which an upload must bring ``stall_kb``, or its end, and who downloads must take
    what was sent; else the call is ended."""
    stall_kb: int = Field(64, ge=1)
    """KiB of progress that ``stall_s`` asks for."""
    handshake_s: float = Field(10, gt=0)
    """Seconds a TLS handshake may take, and a connection be without a call before it is audited."""
    start_mb: int = Field(512, ge=1)
    """MiB of the start adapter of a federation that is created by way of the API."""
    partial_s: float = Field(86_400, gt=0)
    """Seconds after which an unfinished upload that nobody went on with is deleted."""


class ApiConfig(BaseModel):
    """What ``anabranch coordinator api`` serves."""

    model_config = STRICT

    federations: Path
    """Folder of the federations: each subfolder that holds a ``federation.toml`` is one, and is
    named as it. Relative to the configuration's folder."""
    state: Path = Path("api")
    """Folder of the API's own: its authority's key, who is enrolled, the audit log, unfinished
    uploads. Relative to the configuration's folder; nobody else may read it."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8443, ge=0, le=65535)
    """Port for callers with certificates; 0 takes a free one."""
    enrol_port: int = Field(8444, ge=0, le=65535)
    """Port for those without: it takes enrolments and answers health checks; 0 takes a free one."""
    names: tuple[str, ...] = ("localhost", "127.0.0.1")
    """Names and addresses that callers reach this machine by, for the server's certificate."""
    certificate_days: float = Field(90, gt=0)
    """Days a peer's certificate holds."""
    invitation_hours: float = Field(168, gt=0)
    """Hours a token may be used in, where who invites says nothing else."""
    overlap_s: float = Field(3600, ge=0)
    """Seconds an old certificate still counts once its peer has a new one."""
    limits: LimitsConfig = LimitsConfig()
    """What peers may take up."""
    flower: FleetConfig | None = None
    """How federations are run that are started by way of the API, by ``anabranch coordinator up``
    with this file; None: they are started on this machine alone."""


def load_api(path: Path) -> ApiConfig:
    """Read the API's configuration; relative folders become those of the file's.

    Raises:
        ValueError: Missing or broken file, in one line that names file and key.
    """
    try:
        config = ApiConfig.model_validate(read_config(path))
    except ValidationError as error:
        raise ValueError(validation_line(error, str(path))) from error
    folder = path.absolute().parent
    flower = config.flower and config.flower.within(folder)
    folders = {"federations": folder / config.federations, "state": folder / config.state}
    return config.model_copy(update={**folders, "flower": flower})
