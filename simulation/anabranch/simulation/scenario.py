"""Scenarios: a whole federation on one machine, as one TOML file. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from anabranch.aggregation.recipe import Recipe, read_config, validation_line
from anabranch.client.task import TrainPlan
from anabranch.coordinator.federation import (
    DownCodec,
    FederationConfig,
    FederationRecipe,
    Privacy,
    Ranks,
    Rest,
    Secure,
    can_be_gated,
    check_ranks,
    clients_asked,
    keyed_error,
    to_a_signed_key,
)
from anabranch.coordinator.gate import SCORER_PATTERN, GateConfig
from anabranch.coordinator.privacy.config import why_not_counted
from anabranch.coordinator.store.config import JOURNAL_URL, StoreConfig
from anabranch.simulation.attackers import Attackers, Plot, as_json, plot
from anabranch.wire.config import CodecConfig, DenseDtype
from anabranch.wire.plan import Scalar, Trains

VALIDATION_SCORER = "anabranch.simulation.validation:validation_scorer"
DEFAULT_TASK = "anabranch.simulation.partitioned_text:PartitionedText"


class TaskConfig(BaseModel):
    """Which task the clients train: its class and, as further keys, that class's parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(as_json)]] = Field(init=False)

    kind: str = DEFAULT_TASK
    """``package.module:Class`` of a simulated task."""

    def params(self) -> dict[str, Any]:
        """The class's keyword arguments."""
        return dict(self.model_extra or {})


class Baselines(BaseModel):
    """What the merged adapter is compared with; each costs about as much as the federation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_only: bool = True
    """Every client trains alone for as many steps."""
    fedavg: bool = True
    """The same clients averaging dense factors (FedIT: A and B apart, fp32, no codec), plainly:
    no cap, no signatures, no secure aggregation, no privacy, no gate."""
    oracle: bool = True
    """One adapter trained on everybody's data together, as many samples and steps."""
    unattacked: bool = True
    """The same federation with everybody honest; only where somebody attacks."""
    undefended: bool = True
    """The same attack on a plain mean of ΔW, without steps, suspicion, gate, cap or privacy; only
    where somebody attacks and the scenario has more than that."""


class SimulatedGate(GateConfig):
    """A gate whose scorer knows the scenario's task."""

    scorer: str = Field(VALIDATION_SCORER, pattern=SCORER_PATTERN)
    """As in a federation; this one asks the task about the clients' validation data."""


SimulatedGated = Annotated[SimulatedGate | None, AfterValidator(can_be_gated)]
"""The model it stands in has a field ``privacy`` before it."""


class Scenario(BaseModel):
    """A federation to simulate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the scenario and of its results folder."""
    seed: int = Field(0, ge=0, lt=2**64)
    """One seed for everything: A₀, partitions, sampling, the order of examples."""
    engine: Literal["inprocess", "flower"] = "inprocess"
    """``inprocess``: this process. ``flower``: Flower's Ray simulation through ``flwr run``."""
    rounds: int = Field(8, ge=1)
    """Number of rounds."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients asked in each round."""
    quorum: int | None = Field(None, ge=1)
    """Admitted updates a round needs; None: more than half of those asked."""
    deadline_s: float = Field(3600.0, gt=0)
    """Seconds a round waits for updates."""
    max_norm: float | None = Field(None, gt=0)
    """Largest ‖update‖₂ admitted; None sets no cap."""
    signed: bool = False
    """Everybody signs, with keys drawn from the seed; what is not signed is refused."""
    sealed: bool = False
    """Updates are sealed to a key that the coordinator makes for each round; needs ``signed``."""
    evaluate_every: int = Field(1, ge=0)
    """Score the adapter on the clients' validation data every so many rounds; 0 never."""
    task: TaskConfig = TaskConfig()
    """What is trained, on which data, by which clients."""
    train: dict[str, Scalar] = Field({"steps": 5})
    """The clients' ``TrainPlan``: steps, batch_size, learning_rate."""
    codec: CodecConfig = CodecConfig()
    """How updates are encoded."""
    trains: Trains = "both"
    """Which LoRA factors are trained: ``both``, ``b`` (FFA-LoRA: A stays the seed's, half the
    bytes) or ``alternate`` (RoLoRA: B in odd rounds, A in even ones)."""
    ranks: Ranks = Field(default_factory=dict)
    """Rank by client (``client-0000`` and so on), for clients that train fewer ranks than the
    task's: FlexLoRA, or HetLoRA with the method ``hetlora``. Clients not named train all."""
    rest: Rest = "drop"
    """What becomes of the merge beyond the clients' rank: ``drop``, or kept frozen while they train
    on from the means of A and B (``fedex``) or afresh (``flora``)."""
    down: DenseDtype = "fp32"
    """How adapters are stored on their way to the clients."""
    recipe: FederationRecipe = Recipe(method="ties")
    """How a cohort is merged."""
    down_codec: DownCodec = None
    """How a new adapter travels to clients that hold the one before; None: whole."""
    privacy: Privacy = None
    """Differential privacy of the clients: clip, epsilon, delta."""
    gate: SimulatedGated = None
    """What a merge may be worse at than the adapter in service, on the clients' validation data."""
    attackers: tuple[Attackers, ...] = ()
    """Clients that attack: ``[[attackers]]`` with kind, fraction or count, from_round, params."""
    secure: Secure = None
    """Secure aggregation: threshold, group, clip, bits; needs ``signed``. A round that is
    interrupted is lost."""
    baselines: Baselines = Baselines()
    """What to compare with."""

    _sealed_is_signed = field_validator("sealed")(to_a_signed_key)

    # The validators raise what pydantic nests: its keys come to stand under the field's own.
    @field_validator("train", mode="before")
    @classmethod
    def _is_a_train_plan(cls, train: Any) -> Any:
        TrainPlan.model_validate(train, strict=True)
        if "seed" in train:
            raise keyed_error(
                ("seed",), "drawn for each client and round; set the scenario's own seed"
            )
        return train

    @model_validator(mode="after")
    def _ranks_are_voted_on(self) -> Self:
        check_ranks(self.codec, self.recipe, self.trains, self.down_codec)
        return self

    def asked(self, clients: int) -> int:
        """Clients asked in each round."""
        return clients_asked(clients, self.fraction)

    def plot(self, clients: int) -> Plot:
        """Who attacks how.

        Raises:
            ValueError: There are too few clients for it.
        """
        return plot(self.attackers, clients, self.seed, self.recipe)

    def federation(self, clients: int) -> FederationConfig:
        """The coordinator's configuration of this scenario.

        Raises:
            ValueError: There are too few clients for the quorum.
        """
        asked = self.asked(clients)
        quorum = self.quorum or asked // 2 + 1
        if quorum > asked:
            raise ValueError(
                f"quorum: {quorum} updates cannot come from the {asked} clients that are asked "
                f"(of {clients}); lower it, or raise fraction"
            )
        if self.privacy is not None and (why := why_not_counted(clients, asked, quorum)):
            raise ValueError(f"privacy: {why}")
        return FederationConfig(
            name=self.name,
            run=f"{self.name}-{self.seed}",
            seed=self.seed,
            rounds=self.rounds,
            clients=clients,
            fraction=self.fraction,
            quorum=quorum,
            # In process, clients take turns: a deadline would measure the machine.
            deadline_s=1e9 if self.engine == "inprocess" else self.deadline_s,
            poll_s=0.0 if self.engine == "inprocess" else 0.1,
            durable=False,  # a simulation that lost power is run again
            store=StoreConfig(url=JOURNAL_URL),
            max_norm=self.max_norm,
            signed=self.signed,
            sealed=self.sealed,
            evaluate_every=self.evaluate_every,
            codec=self.codec,
            down=self.down,
            recipe=self.recipe,
            trains=self.trains,
            ranks=self.ranks,
            rest=self.rest,
            train=self.train,
            down_codec=self.down_codec,
            privacy=self.privacy,
            secure=self.secure,
            gate=self.gate,
        )


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Raises:
        ValueError: One line that names the file, the key and the reason.
    """
    try:
        return Scenario.model_validate(read_config(path))
    except ValidationError as error:
        raise ValueError(validation_line(error, str(path))) from error


def write_scenario(scenario: Scenario, path: Path) -> None:
    """Write a scenario as resolved: every default spelled out."""
    path.write_text(tomli_w.dumps(scenario.model_dump(mode="json", exclude_none=True)))
