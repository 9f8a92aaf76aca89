"""A federation's configuration and its folder. Loads no torch.

A federation folder holds everything a coordinator needs to begin: ``federation.toml`` and
``start/``, a PEFT adapter that gives module names, shapes, ranks, dense start values and the base
hash, so that the coordinator never loads the base itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from anabranch.aggregation.recipe import Recipe, read_config, validation_line
from anabranch.coordinator.gate import GateConfig
from anabranch.coordinator.privacy.config import PrivacyConfig, why_not_counted, why_not_private
from anabranch.coordinator.rounds.policy import RoundPolicy
from anabranch.coordinator.secure.config import SecureConfig, why_not_secure
from anabranch.coordinator.store.config import StoreConfig
from anabranch.wire.config import CodecConfig, DenseDtype
from anabranch.wire.plan import Scalar, Trains

FEDERATION_FILE = "federation.toml"
START_FOLDER = "start"


def _keeps_the_rank(recipe: Recipe) -> Recipe:
    """What a recipe may say offline and not here: each round's adapter is the next one's start."""
    kept = "a federation's adapter keeps its rank from round to round; leave it out"
    if recipe.refactor.kind == "stack":
        raise keyed_error(("refactor", "kind"), kept)
    if recipe.refactor.rank is not None:
        raise keyed_error(("refactor", "rank"), kept)
    by_position = "clients come and go, and these weigh them by position; leave it out"
    if recipe.weights is not None:
        raise keyed_error(("weights",), by_position)
    for number, rule in enumerate(recipe.modules):
        if rule.weights is not None:
            raise keyed_error(("modules", number, "weights"), by_position)
    return recipe


FederationRecipe = Annotated[Recipe, AfterValidator(_keeps_the_rank)]
"""A recipe that can be merged by round after round."""


def _train_both_factors(ranks: dict[str, int], info: ValidationInfo) -> dict[str, int]:
    """Entries of one factor compare at one rank only."""
    if ranks and info.data.get("trains", "both") != "both":
        raise PydanticCustomError("ranks", 'set trains = "both", which ranks of their own need')
    return ranks


Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_train_both_factors)]
"""Rank by client name. The model it stands in has a field ``trains`` before it."""


def _can_be_kept(rest: str, info: ValidationInfo) -> str:
    """What a rest cannot stand beside."""
    trains, codec = info.data.get("trains", "both"), info.data.get("codec")
    problem = ""
    if rest != "drop" and trains != "both":
        problem = f'leave it out: with trains = "{trains}" a mean is exact, and has no rest'
    elif rest == "fedex" and info.data.get("ranks"):
        problem = 'the means of A and B need one rank of all; set it to "flora"'
    elif rest == "flora" and isinstance(codec, CodecConfig) and codec.feedback:
        problem = (
            "set codec.feedback = 0: clients begin afresh in each round, and what the codec left "
            "out belongs to factors that are gone"
        )
    if problem:
        raise PydanticCustomError("rest", "{problem}", {"problem": problem})
    return rest


Rest = Annotated[Literal["drop", "fedex", "flora"], AfterValidator(_can_be_kept)]
"""What becomes of the part of a merge that the clients' rank cannot hold: dropped, by an SVD that
keeps the best part; or kept beside, frozen, while the clients train on from the means of A and B
(``fedex``: FedEx-LoRA, 2410.09432) or afresh (``flora``: FLoRA, 2409.05976). What is frozen grows
up to the rank of the matrices, and travels down whole in every round. The model it stands in has
fields ``codec``, ``trains`` and ``ranks`` before it."""


def _can_be_private(privacy: PrivacyConfig | None, info: ValidationInfo) -> PrivacyConfig | None:
    """What no noise could be accounted for with."""
    names = ("recipe", "trains", "ranks", "rest")
    if privacy is not None and info.data.keys() >= set(names):
        recipe, trains, ranks, rest = (info.data[name] for name in names)
        problem = why_not_private(recipe, trains, ranks, rest)
        if problem is None and info.data.get("max_norm") is not None:
            problem = (
                "max_norm refuses an update for what is in it, which may cost a round its quorum, "
                "and noise does not cover that; leave it out: clip bounds every update"
            )
        # A scenario has as many clients as its task.
        counts = ("clients", "fraction", "quorum")
        if problem is None and info.data.keys() >= set(counts):
            clients, fraction, quorum = (info.data[name] for name in counts)
            problem = why_not_counted(clients, clients_asked(clients, fraction), quorum)
        if problem is not None:
            raise PydanticCustomError("privacy", "{problem}", {"problem": problem})
    return privacy


Privacy = Annotated[PrivacyConfig | None, AfterValidator(_can_be_private)]
"""The model it stands in has fields ``recipe``, ``trains``, ``ranks`` and ``rest`` before it, and
``max_norm``, ``fraction``, ``quorum`` and ``clients`` where it has those."""


_BESIDE_SECURE = ("signed", "max_norm", "codec", "recipe", "trains", "ranks", "rest", "privacy")


def _can_be_secure(secure: SecureConfig | None, info: ValidationInfo) -> SecureConfig | None:
    """What sums alone cannot give."""
    if secure is not None and info.data.keys() >= set(_BESIDE_SECURE):
        problem = why_not_secure(secure, **{name: info.data[name] for name in _BESIDE_SECURE})
        if problem is not None:
            raise PydanticCustomError("secure", "{problem}", {"problem": problem})
    return secure


Secure = Annotated[SecureConfig | None, AfterValidator(_can_be_secure)]
"""The model it stands in has fields ``signed``, ``max_norm``, ``codec``, ``recipe``, ``trains``,
``ranks``, ``rest`` and ``privacy`` before it."""


def _can_be_a_change(codec: CodecConfig | None, info: ValidationInfo) -> CodecConfig | None:
    """What a change of the adapter cannot stand beside."""
    problem = ""
    if codec is None:
        return None
    if info.data.get("down") != "fp32":
        problem = 'set down = "fp32": all clients must hold the same bits'
    elif info.data.get("ranks"):
        problem = "a change has one rank; leave ranks out"
    elif info.data.get("rest", "drop") != "drop":
        problem = "frozen ranks travel whole; leave rest out"
    if problem:
        raise PydanticCustomError("down_codec", "{problem}", {"problem": problem})
    return codec


DownCodec = Annotated[CodecConfig | None, AfterValidator(_can_be_a_change)]
"""The model it stands in has fields ``down``, ``ranks`` and ``rest`` before it."""


TAKES_RANKS = ("rank_vote",)
"""Methods that read signs and ranks off task vectors, and no more of their sizes than a median."""


def check_ranks(
    codec: CodecConfig, recipe: Recipe, trains: Trains, down_codec: CodecConfig | None
) -> None:
    """Refuse updates of ranks where nobody votes on them, or where they mean nothing.

    Raises:
        ValidationError: At the key that is wrong.
    """
    if down_codec is not None and down_codec.name == "ranks":
        raise keyed_error(
            ("down_codec", "name"), "ranks are clients' votes, and no change; choose another codec"
        )
    if codec.name != "ranks":
        return
    problem = ""
    if recipe.method not in TAKES_RANKS:
        problem = f"{recipe.method} reads sizes, which ranks have not; set recipe.method to " + (
            " or ".join(f'"{name}"' for name in TAKES_RANKS)
        )
    elif trains != "b":
        problem = (
            'ranks are of entries that mean the same at every client; set trains = "b", which '
            "freezes one A for all"
        )
    elif recipe.pre:
        problem = "recipe.pre mixes sizes, which ranks have not; leave pre out"
    if problem:
        raise keyed_error(("codec", "name"), problem)


def _can_carry(policy: RoundPolicy, info: ValidationInfo) -> RoundPolicy:
    """What updates of earlier rounds cannot be merged beside."""
    trains, rest, ranks = (info.data.get(name) for name in ("trains", "rest", "ranks"))
    problem = ""
    if policy.stragglers == "drop":
        return policy
    if trains != "both":
        problem = f'trains = "{trains}" merges factors, which compare from one start only'
    elif rest != "drop" or ranks:
        problem = "ranks and rest need one start of all; leave them out"
    elif info.data.get("privacy") is not None:
        problem = "no account holds for a client that counts in another round than it was asked in"
    elif info.data.get("secure") is not None:
        problem = "secure aggregation sums the updates of one round"
    elif info.data.get("gate") is not None:
        problem = "what the gate kept back would be carried into every round after"
    if problem:
        raise keyed_error(("stragglers",), f'{problem}; or set stragglers = "drop"')
    return policy


Collect = Annotated[RoundPolicy, AfterValidator(_can_carry)]
"""The model it stands in has fields ``trains``, ``ranks``, ``rest``, ``privacy``, ``secure`` and
``gate`` before it."""


def can_be_gated(gate: GateConfig | None, info: ValidationInfo) -> GateConfig | None:
    """What a gate cannot stand beside."""
    if gate is not None and info.data.get("privacy") is not None:
        raise PydanticCustomError(
            "gate",
            "what is kept back was still made from clients, and only what is published is in the "
            "account of privacy; leave gate out",
        )
    return gate


Gated = Annotated[GateConfig | None, AfterValidator(can_be_gated)]
"""The model it stands in has a field ``privacy`` before it."""


def keyed_error(key: tuple[str | int, ...], reason: str) -> ValidationError:
    """An error at a key inside a field, for a field's validator to raise."""
    problem = PydanticCustomError("key", "{reason}", {"reason": reason})
    return ValidationError.from_exception_data(
        "field", [InitErrorDetails(type=problem, loc=key, input=None)]
    )


def clients_asked(known: int, fraction: float) -> int:
    """How many of the known clients a round asks: their share, at least one."""
    return max(1, round(fraction * known))


def to_a_signed_key(sealed: bool, info: ValidationInfo) -> bool:
    """Validates a field ``sealed`` after a field ``signed``."""
    if sealed and not info.data.get("signed"):
        raise PydanticCustomError(
            "sealed", "set signed = true: without, a relay could have them sealed to itself"
        )
    return sealed


class FederationConfig(BaseModel):
    """What a coordinator runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    """Name of the federation."""
    run: str = Field(min_length=1, max_length=200)
    """Identifier of this run; updates made for another are refused."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of A₀, client sampling and training order."""
    rounds: int = Field(8, ge=1)
    """Number of rounds."""
    clients: int = Field(1, ge=1)
    """Nodes to wait for before the first round; with ``privacy``, how many the federation has."""
    join_timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for those nodes before giving up."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the known clients asked in each round; with ``privacy``, of ``clients``: each round
    asks as many, however many there are."""
    quorum: int = Field(1, ge=1)
    """Admitted updates a round needs; with fewer at the deadline it is abandoned."""
    deadline_s: float = Field(3600.0, gt=0)
    """Seconds a round waits for updates."""
    evaluate_deadline_s: float = Field(600.0, gt=0)
    """Seconds an evaluation waits for scores."""
    poll_s: float = Field(0.5, ge=0)
    """Seconds between two looks for replies."""
    durable: bool = True
    """Flush every admitted update to the disk itself before it counts."""
    store: StoreConfig = StoreConfig()
    """Where rounds and their updates are kept."""
    max_norm: float | None = Field(None, gt=0)
    """Largest ‖update‖₂ admitted; None sets no cap."""
    signed: bool = False
    """Plans and adapters are signed by the key in ``keys/``, an update must be, by an enrolled
    key of its client (``coordinator.registry``)."""
    sealed: bool = False
    """Updates are sealed to a key that the coordinator makes for each round and signs, so that what
    carries them (SuperLink, relays) sees ciphertext. Needs ``signed``."""
    clock_skew_s: float = Field(300.0, ge=0)
    """Seconds by which the clock of a client that signs may differ from the coordinator's."""
    evaluate_every: int = Field(1, ge=0)
    """Ask the clients to score the adapter every so many rounds; 0 never."""
    codec: CodecConfig = CodecConfig()
    """How updates are encoded."""
    down: DenseDtype = "fp32"
    """How adapters are stored on their way to the clients."""
    recipe: FederationRecipe = Recipe(method="ties")
    """How a cohort is merged."""
    trains: Trains = "both"
    """Which LoRA factors are trained: ``both``, ``b`` (FFA-LoRA) or ``alternate`` (RoLoRA)."""
    ranks: Ranks = Field(default_factory=dict)
    """Rank by client name, for clients that train fewer ranks than the start adapter has: each
    starts from the adapter in service at its rank. Clients not named train all."""
    rest: Rest = "drop"
    """What becomes of the merge beyond the clients' rank; see ``Rest``."""
    train: dict[str, Scalar] = Field(default_factory=dict)
    """Fields of the clients' ``TrainPlan``."""
    down_codec: DownCodec = None
    """How a new adapter travels to clients that hold the one before: as a change of it, encoded
    like an update; what a lossy codec leaves out is added to the next change. None: whole, as
    ``down`` says."""
    privacy: Privacy = None
    """Differential privacy of the clients; None promises none."""
    gate: Gated = None
    """What a merge may be worse at than the adapter in service; one that is worse is kept back.
    None publishes every merge."""
    secure: Secure = None
    """Secure aggregation: the coordinator gets sums over groups of clients, and no single update.
    None: it sees each. Needs ``signed``."""
    collect: Collect = RoundPolicy()
    """When a round closes, and what becomes of updates that come after."""

    def asked(self, known: int) -> int:
        """How many clients a round should ask where so many are known."""
        return clients_asked(known if self.privacy is None else self.clients, self.fraction)

    @model_validator(mode="after")
    def _ranks_are_voted_on(self) -> Self:
        check_ranks(self.codec, self.recipe, self.trains, self.down_codec)
        return self

    _sealed_is_signed = field_validator("sealed")(to_a_signed_key)


def write_federation(config: FederationConfig, folder: Path) -> Path:
    """Write ``federation.toml`` into the folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FEDERATION_FILE
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    return path


def load_federation(folder: Path) -> FederationConfig:
    """Read a federation folder's configuration.

    Raises:
        ValueError: Missing or broken file, in one line that names file and key.
    """
    path = folder / FEDERATION_FILE
    try:
        return FederationConfig.model_validate(read_config(path))
    except ValidationError as error:
        raise ValueError(validation_line(error, str(path))) from error
