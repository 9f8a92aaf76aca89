"""What ``anabranch coordinator up`` runs, as configuration. Loads no torch.

A file ``coordinator.toml``; relative paths are of the folder it stands in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from anabranch.aggregation.recipe import read_config, validation_line
from anabranch.coordinator.flower import CLIENT_APP
from anabranch.wire.plan import Scalar

CONFIG_FILE = "coordinator.toml"
"""Its usual name."""

NODES_FOLDER = "nodes"
"""Folder of the public keys of a federation's SuperNodes, where the API made it."""

Port = Annotated[int, Field(ge=1, le=65535)]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that nobody reaches from outside."""


class TlsConfig(BaseModel):
    """The SuperLink's certificate, PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: Path
    """Its certificate, with the host that nodes call among its names."""
    key: Path
    """Its private key."""
    authority: Path
    """The certificate of the authority that signed it; nodes get a copy."""


class RestartConfig(BaseModel):
    """How often and how fast what died is started again."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first_s: float = Field(1.0, ge=0)
    """Seconds before the second start in a row that came to nothing; the first is at once, and
    each further one waits twice as long."""
    cap_s: float = Field(60.0, ge=0)
    """Longest wait between two starts, in seconds."""
    most: int = Field(20, ge=0)
    """Starts in a row without a round or an update gained, after which it gives up."""


class LinkConfig(BaseModel):
    """How SuperLinks are run, whichever federation's they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    client_app: str = CLIENT_APP
    """``module:attribute`` of the ClientApp that nodes run; one of your own may add mods."""
    host: str = "127.0.0.1"
    """Address that a SuperLink listens on."""
    tls: TlsConfig | None = None
    """Its certificate. None needs ``insecure``."""
    insecure: bool = False
    """Whether there is no TLS; on loopback only."""
    restart: RestartConfig = RestartConfig()
    """What happens after a process died."""
    start_s: float = Field(180.0, gt=0)
    """Seconds that the SuperLink, and a run on it, have to begin."""
    stop_s: float = Field(300.0, gt=0)
    """Seconds that a round which is being merged has to end, after SIGTERM."""
    standby: bool = True
    """Whether a process that has loaded everything waits to be the next ServerApp: some 250 MB of
    memory for each federation, and seconds less until it collects again."""

    @model_validator(mode="after")
    def _is_protected(self) -> Self:
        if self.tls is None and not self.insecure:
            raise PydanticCustomError(
                "tls", "give [tls] certificate, key and authority, or set insecure = true"
            )
        if self.insecure and (self.tls is not None or self.host not in LOOPBACK):
            raise PydanticCustomError(
                "insecure", "without TLS only on loopback: set host, or give [tls] and no insecure"
            )
        return self

    def within(self, folder: Path) -> Self:
        """The same with every path made absolute, from a folder."""
        tls = self.tls and TlsConfig(
            certificate=_absolute(folder, self.tls.certificate),
            key=_absolute(folder, self.tls.key),
            authority=_absolute(folder, self.tls.authority),
        )
        return self.model_copy(update={"tls": tls})


class TaskConfig(BaseModel):
    """What nodes train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Annotated[str, Field(min_length=3)]
    """``package.module:Class`` that nodes train, where they do not name another."""
    task_params: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    """Its keyword arguments."""


class CoordinatorConfig(LinkConfig, TaskConfig):
    """One federation, and the SuperLink it is run on."""

    federation: Path = Path()
    """The federation's folder."""
    port: int = Field(9092, ge=1, le=65535)
    """Its one port, for nodes and for ``flwr``; the same after every restart."""
    node_keys: Path | None = None
    """Folder of SuperNodes' public keys (``*.pub``, OpenSSH): nobody else may join. None lets
    everybody join who reaches the port."""
    home: Path = Path("flower")
    """Flower's private home, with its database and the logs of its processes."""

    @model_validator(mode="after")
    def _keys_need_tls(self) -> Self:
        if self.tls is None and self.node_keys is not None:
            raise PydanticCustomError("node_keys", "nodes prove their keys over TLS; give [tls]")
        return self

    def within(self, folder: Path) -> Self:
        """The same with every path made absolute, from a folder."""
        paths = {
            "federation": _absolute(folder, self.federation),
            "home": _absolute(folder, self.home),
            "node_keys": self.node_keys and _absolute(folder, self.node_keys),
        }
        return super().within(folder).model_copy(update=paths)


class FleetConfig(LinkConfig):
    """Every federation that is started by way of the API, each on a SuperLink of its own."""

    ports: tuple[Port, Port]
    """First and last port of the SuperLinks: as many federations are at work at a time."""
    tasks: Annotated[dict[str, TaskConfig], Field(min_length=1)]
    """What nodes may be asked to train, by the name that whoever starts a federation gives."""

    @model_validator(mode="after")
    def _has_ports(self) -> Self:
        if self.ports[0] > self.ports[1]:
            raise PydanticCustomError("ports", "ports are the first and the last: set them so")
        return self

    @property
    def every_port(self) -> range:
        """The ports of the SuperLinks."""
        return range(self.ports[0], self.ports[1] + 1)

    def of(self, folder: Path, port: int, task: str) -> CoordinatorConfig:
        """How one federation is run: nodes join whose keys lie in its ``nodes/``.

        Args:
            folder: The federation's.
            port: Its SuperLink's.
            task: Name of its task.

        Raises:
            ValueError: There is no such task.
        """
        if task not in self.tasks:
            raise ValueError(
                f"there is no task {task[:100]!r}; give one of {', '.join(sorted(self.tasks))}"
            )
        shared = {name: getattr(self, name) for name in LinkConfig.model_fields}
        return CoordinatorConfig(
            **shared,
            **self.tasks[task].model_dump(),
            federation=folder,
            port=port,
            node_keys=None if self.insecure else folder / NODES_FOLDER,
            home=folder / "flower",
        )


def _absolute(folder: Path, path: Path) -> Path:
    return (folder / path).absolute()


def load_coordinator(path: Path) -> CoordinatorConfig:
    """Read a coordinator's configuration: the file, or the folder that holds ``coordinator.toml``.

    Raises:
        ValueError: Missing or broken file, in one line that names file and key.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        return CoordinatorConfig.model_validate(read_config(file)).within(file.parent)
    except ValidationError as error:
        raise ValueError(validation_line(error, str(file))) from error
