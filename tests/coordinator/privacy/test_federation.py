"""Private rounds on the real ClientApp: what is divided by, who is asked, what neighbours see."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.card import model_card
from anabranch.coordinator.federation import (
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.lineage import chosen, published, roll_back
from anabranch.coordinator.privacy.accountant import epsilon_spent
from anabranch.coordinator.store import Contribution, FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors import Adapter
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.config import CodecConfig
from anabranch.wire.plan import PLAN_KEY, UPDATE_KEY, UPDATE_STYPE, RoundPlan

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'
pytestmark = pytest.mark.usefixtures("flower_identity")


def template() -> Adapter:
    return open_session(TASK, PARAMS).template


def config(**changes: Any) -> FederationConfig:
    privacy = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-5, **changes.pop("privacy", {})}
    given = {
        "name": "f", "run": "r", "rounds": 2, "clients": 4, "quorum": 2, "poll_s": 0.0,
        "evaluate_every": 0, "join_timeout_s": 5.0,
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "fedit"}, "codec": {"name": "dense", "feedback": 0.0},
        "privacy": privacy, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


def grid(ship: Callable[[str, int], float] | None = None) -> InProcessGrid:
    """Four clients; each ships a constant, where one is given, and not what it trained."""
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for node in range(10, 14)
    }  # fmt: skip

    class Shipping(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if message.metadata.message_type == MessageType.TRAIN and ship is not None:
                plan = RoundPlan.model_validate_json(
                    str(message.content.config_records[PLAN_KEY][PLAN_KEY])
                )
                client = str(reply.content.config_records["client"]["client"])
                reply.content[UPDATE_KEY] = constant(plan, client, ship(client, plan.round))
            return reply

    return InProcessGrid(Shipping(), contexts)


def constant(plan: RoundPlan, client: str, value: float) -> ArrayRecord:
    tensors = {n: torch.full_like(tensor, value) for n, tensor in template().tensors().items()}
    meta = UpdateMeta(
        "update", plan.base_hash, plan.start_hash, plan.federation, plan.run, plan.round,
        client, b"", plan.seed, 1,
    )  # fmt: skip
    blob = encode_update(tensors, meta, CodecConfig(name="dense")).blob
    return ArrayRecord({UPDATE_KEY: Array("uint8", (len(blob),), UPDATE_STYPE, blob)})


def run(folder: Path, cfg: FederationConfig, nodes: InProcessGrid) -> MergeStrategy:
    strategy = MergeStrategy(cfg, template(), FolderStore(folder))
    strategy.start(nodes)
    return strategy


def asked(folder: Path) -> list[list[str]]:
    return [row["asked"] for row in FolderStore(folder).notes("planned")]


def moved(strategy: MergeStrategy) -> torch.Tensor:
    """All that the rounds changed, as one vector."""
    start, end = strategy.service.seeded.tensors(), strategy.adapter.tensors()
    return torch.cat([(end[name] - start[name]).double().ravel() for name in sorted(start)])


def entries() -> int:
    return sum(tensor.numel() for tensor in template().tensors().values())


LOUD = {"epsilon": 1e3, "delta": 0.5, "noise_seed": 1}
"""A budget that asks for next to no noise."""


@pytest.mark.parametrize("present", [2, 4])
def test_the_sum_is_divided_by_what_a_round_asks_however_many_come(
    present: int, tmp_path: Path
) -> None:
    """A federation of two clients asks two, whether two nodes join or four."""
    nodes = grid(lambda client, number: 0.01)
    for node in range(10 + present, 14):
        del nodes._contexts[node]
    cfg = config(clients=2, rounds=1, privacy={**LOUD, "clip": 0.011 * entries() ** 0.5})
    strategy = run(tmp_path, cfg, nodes)
    assert [len(names) for names in asked(tmp_path)] == [2]
    assert float(moved(strategy).mean()) == pytest.approx(0.01, rel=0.05)


def test_with_fewer_replies_the_divisor_stays(tmp_path: Path) -> None:
    """Who is silent counts as zeros: dividing by who replied would depend on the clients."""

    def silent(client: str, number: int) -> float:
        if client in ("client-0001", "client-0002"):
            raise RuntimeError("gone")
        return 0.01

    cfg = config(rounds=1, privacy={**LOUD, "clip": 0.011 * entries() ** 0.5})
    strategy = run(tmp_path, cfg, grid(silent))
    assert float(moved(strategy).mean()) == pytest.approx(0.005, rel=0.05)


@pytest.mark.parametrize("value", [0.003, 1e4])
def test_neighbours_differ_by_one_clients_clip_and_in_nothing_else(
    value: float, tmp_path: Path
) -> None:
    """Zeros in place of a client's updates: the same cohorts, and adapters a clip apart at most.

    Were the client not there at all, the seed would draw other cohorts.
    """
    half: dict[str, Any] = {"fraction": 0.5, "rounds": 3, "quorum": 1}
    cfg = config(**half, privacy={"noise_seed": 1})
    adapters = []
    for number, theirs in enumerate((value, 0.0)):
        ship = lambda client, _, theirs=theirs: theirs if client == "client-0002" else 0.002  # noqa: E731
        adapters.append(moved(run(tmp_path / str(number), cfg, grid(ship))))
    assert asked(tmp_path / "0") == asked(tmp_path / "1")
    rounds = sum("client-0002" in names for names in asked(tmp_path / "0"))
    assert 0 < rounds < 3
    norm = float((adapters[0] - adapters[1]).norm())
    assert 0 < norm <= rounds * 0.5 / 2 * (1 + 1e-4)
    nodes = grid(lambda client, number: 0.002)
    del nodes._contexts[12]
    run(tmp_path / "without", config(clients=3, **half), nodes)
    others = [[name for name in names if name != "client-0002"] for names in asked(tmp_path / "0")]
    assert asked(tmp_path / "without") != others


def test_a_round_that_goes_on_among_others_asks_no_more_than_it_divides_by(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(b"an update")
    store.admit(Contribution(round=1, client="client-0900", digest=digest, size_bytes=9))
    strategy = MergeStrategy(config(clients=3), template(), store)
    nodes = grid()
    strategy.roster.wait_for(nodes, 4, 1.0)
    orders = strategy.configure_train(1, strategy.arrays, ConfigRecord(), nodes)
    assert len(list(orders)) == 2


def test_a_run_that_goes_on_otherwise_reports_what_all_its_rounds_spent(tmp_path: Path) -> None:
    ship = lambda client, number: 0.01  # noqa: E731
    run(tmp_path, config(rounds=1, privacy={"noise_multiplier": 1.0}), grid(ship))
    other = {"noise_multiplier": 6.0, "clip": 0.1}
    run(tmp_path, config(rounds=2, privacy=other), grid(ship))
    store = FolderStore(tmp_path)
    rows = [row["privacy"] for row in store.notes("round")]
    squared_mu = 1 + 1 / 36
    assert rows[1]["epsilon"] == pytest.approx(epsilon_spent(squared_mu, 1e-5))
    assert rows[1]["epsilon"] > 3 * epsilon_spent(2 / 36, 1e-5)
    kept = [publication.report["privacy"] for publication in store.publications()]
    for row, multiplier, clip in zip(kept, (1.0, 6.0), (0.5, 0.1), strict=True):
        assert row == {
            "clip": clip, "noise_multiplier": multiplier, "divisor": 4, "sampling": "none",
            "adjacency": "zero-out", "seeded": False,
        }  # fmt: skip
    # No ε holds for a run that has published without noise.
    with pytest.raises(ValueError, match="privacy: round 1 of this run was published with noise"):
        MergeStrategy(config(privacy={}).model_copy(update={"privacy": None}), template(), store)


def test_an_adapter_put_back_spends_nothing_and_its_run_goes_on(tmp_path: Path) -> None:
    cfg = config(privacy={"noise_multiplier": 2.0, "epsilon": 20.0})
    run(tmp_path, cfg, grid(lambda client, number: 0.01))
    store = FolderStore(tmp_path)
    roll_back(store, cfg, template(), chosen(published(store), "1"))
    run(tmp_path, cfg.model_copy(update={"rounds": 4}), grid(lambda client, number: 0.01))
    store = FolderStore(tmp_path)
    rows = [row.get("privacy") for row in store.notes("round")]
    assert rows[2] is None
    assert rows[3]["epsilon"] == pytest.approx(epsilon_spent(3 / 4, 1e-5))


@pytest.mark.parametrize(
    ("privacy", "line"),
    [
        ({}, "within ε 8 at δ 1e-05 over this run's adapters up to this one"),
        ({"noise_seed": 3}, "none: the noise came from a seed"),
    ],
)
def test_a_model_card_promises_what_holds(
    privacy: dict[str, Any], line: str, tmp_path: Path
) -> None:
    cfg = config(rounds=1, privacy=privacy)
    strategy = run(tmp_path, cfg, grid(lambda client, number: 0.01))
    store = FolderStore(tmp_path)
    latest = store.latest()
    assert latest is not None
    card = model_card(strategy.adapter, cfg, latest, store.last_receipt())
    (row,) = (text for text in card.splitlines() if text.startswith("| differential privacy |"))
    assert line in row


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clients": 1, "quorum": 1}, "set clients, which is 1, to how many the federation has"),
        ({"fraction": 0.25}, "asks 1 of 4 clients .* cannot make a quorum of 2; lower quorum"),
        ({"max_norm": 2.0}, "leave it out: clip bounds every update"),
    ],
)
def test_what_is_not_determined_is_refused_in_one_line(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**changes)
    write_federation(config(), tmp_path)
    path = tmp_path / "federation.toml"
    given = tomllib.loads(path.read_text()) | changes
    path.write_text(tomli_w.dumps(given))
    with pytest.raises(ValueError, match=reason) as caught:
        load_federation(tmp_path)
    assert "\n" not in str(caught.value)
