"""What a round asks of its clients, and under which keys it travels in a Flower message.

Loads no torch: the coordinator's and the client's configuration import it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from anabranch.wire.config import CodecConfig

UPDATE_STYPE = "anabranch.update/1"
"""``Array.stype`` of an encoded update (client to coordinator)."""
ADAPTER_STYPE = "anabranch.adapter/1"
"""``Array.stype`` of an encoded adapter (coordinator to client)."""
CHANGE_STYPE = "anabranch.change/1"
"""``Array.stype`` of an encoded change of the adapter that the client holds."""

SECURE_STYPE = "anabranch.secure/1"
"""``Array.stype`` of what members and coordinator say in a secure aggregation, both ways."""

PLAN_KEY = "plan"
ADAPTER_KEY = "adapter"
UPDATE_KEY = "update"
IMPORTANCE_KEY = "importance"
METRICS_KEY = "metrics"
CLIENT_KEY = "client"
SECURE_KEY = "secure"

Scalar = bool | int | float | str

Trains = Literal["both", "b", "alternate"]
"""Which LoRA factors a federation trains: both; B alone, beside the A of the seed (FFA-LoRA,
2403.12313); or B in odd rounds and A in even ones (RoLoRA, 2409.02346). Where all clients share the
other factor, the mean of what they trained is the mean of their ΔW."""


def sent_down(trains: Trains) -> Literal["both", "b"]:
    """The factors that an adapter holds on its way to the clients; what it lacks is the seed's."""
    return "b" if trains == "b" else "both"


class SecurePlan(BaseModel):
    """What a secure aggregation asks of a group's members; ``wire.secure.session`` has the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    group: int = Field(ge=0)
    """Number of the group in its round."""
    members: int = Field(ge=1)
    """Clients asked."""
    threshold: int = Field(ge=1)
    """Members without whom nothing is opened."""
    entries: int = Field(ge=1)
    """Length of an update, over all that travels."""
    clip: float = Field(gt=0)
    """Largest magnitude of an entry; what is beyond is cut off, and owed to the next round."""
    bits: Literal[32, 64]
    """Width of the integers that entries become."""


class RoundPlan(BaseModel):
    """One round's order to a client."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str
    """Name of the federation."""
    run: str
    """Identifier of the run; an update made for another run is refused."""
    round: int = Field(ge=1)
    """Number of the round, from 1."""
    base_hash: str
    """``weights_hash`` of the base everybody starts from."""
    start_hash: str
    """Hash of the adapter this round starts from."""
    seed: int = Field(ge=0, lt=2**64)
    """Seed of the federation: a round whose message holds no adapter starts from its draw of A₀,
    and clients mix it with the round and their name."""
    codec: CodecConfig = CodecConfig()
    """How the update is to be encoded."""
    trains: Trains = "both"
    """Which LoRA factors the federation trains."""
    rank: int | None = Field(None, ge=1)
    """Largest rank of a module that this client is to train, and of the adapter it starts from;
    None is the task's own."""
    importance: bool = False
    """Whether the merge needs to know how much each entry matters to the client: its Fisher."""
    hold: bool = False
    """Whether the client is to keep this round's start: later ones may come as changes of it, or
    not at all where nothing has changed."""
    secure: SecurePlan | None = None
    """How updates are hidden in a sum; None: the coordinator sees each of them."""
    seal_to: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """X25519 key of this round, in hexadecimal, that updates are sealed to; None: not sealed."""
    train: dict[str, Scalar] = Field(default_factory=dict)
    """Fields of the client's ``TrainPlan``, forwarded as they are."""
    split: Literal["validation", "test"] = "validation"
    """Which part of its data a client evaluates on."""

    @property
    def trained(self) -> Literal["both", "a", "b"]:
        """The factors that this round trains, and that its updates hold."""
        if self.trains == "alternate":
            return "b" if self.round % 2 else "a"
        return self.trains
