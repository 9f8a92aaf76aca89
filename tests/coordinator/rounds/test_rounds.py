"""Rounds on a Flower grid: what operators ask, when they close, and updates that come late."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from anabranch.aggregation import merge
from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator import candidate
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.control import Control, Want, ask
from anabranch.coordinator.rounds.one_round import OneRound
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.rounds.stragglers import carried
from anabranch.coordinator.store import Contribution, FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors import Adapter

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'

pytestmark = pytest.mark.usefixtures("flower_identity")


def config(**changes: Any) -> FederationConfig:
    given: dict[str, Any] = {
        "name": "f", "run": "r", "rounds": 3, "clients": 4, "quorum": 2, "poll_s": 0,
        "durable": False, "evaluate_every": 0, "deadline_s": 20, "train": {"steps": 2},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


class SlowGrid(InProcessGrid):
    """Four clients; what ``holds(round, node)`` says is answered when asked to, in later pulls."""

    def __init__(self, holds: Callable[[int, int], bool] = lambda number, node: False) -> None:
        app: ClientApp = client_app
        contexts = {
            node: Context(
                1, node, {"partition-id": node - 10}, RecordDict(),
                {"task": TASK, "task-params": PARAMS},
            )
            for node in range(10, 14)
        }  # fmt: skip
        super().__init__(app, contexts)
        self.holds = holds
        self.asked: list[tuple[int, int]] = []
        self.trains: dict[str, tuple[int, int]] = {}
        self.begun = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        orders = list(messages)
        names = list(super().push_messages(orders))
        for name, order in zip(names, orders, strict=True):
            if order.metadata.message_type == MessageType.TRAIN:
                key = int(order.metadata.group_id), order.metadata.dst_node_id
                self.asked.append(key)
                self.begun = key[0]
                self.trains[name] = key
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            [n for n in message_ids if n not in self.trains or not self.holds(*self.trains[n])]
        )


def template() -> Adapter:
    return open_session(TASK, PARAMS).template


def run(
    folder: Path, cfg: FederationConfig, grid: SlowGrid | None = None
) -> tuple[MergeStrategy, FolderStore, SlowGrid]:
    store, grid = FolderStore(folder), grid or SlowGrid()
    strategy = MergeStrategy(cfg, template(), store)
    strategy.start(grid)
    return strategy, store, grid


def clients(store: FolderStore, number: int) -> str:
    return "".join(row.client[-1] for row in store.contributions(number))


def test_a_round_closes_at_so_many_updates(tmp_path: Path) -> None:
    _, store, grid = run(tmp_path, config(collect={"close_at": 3}))
    assert [clients(store, number) for number in (1, 2, 3)] == ["012"] * 3
    late = [row for row in store.refusals() if row.code == "closed"]
    assert [(row.round, row.client[-1]) for row in late] == [(1, "3"), (2, "3"), (3, "3")]
    assert late[0].reason == "the round closed at 3 updates"
    assert len(grid.asked) == 12


def test_a_quorum_may_be_a_share_of_those_asked(tmp_path: Path) -> None:
    silent = SlowGrid(lambda number, node: node > 11)
    cfg = config(rounds=1, deadline_s=2.0, collect={"quorum_fraction": 0.75})
    _, store, _ = run(tmp_path, cfg, silent)
    (row,) = store.notes("round")
    assert (row["status"], row["reason"]) == ("abandoned", "2 admitted, the quorum is 3")
    assert [row.code for row in store.refusals()] == ["deadline"] * 2


def test_an_update_that_comes_late_counts_in_the_round_under_way(tmp_path: Path) -> None:
    """Node 13 answers round 1 while round 2 collects, and is not asked again before."""
    grid = SlowGrid()
    grid.holds = lambda number, node: node == 13 and number == 1 and (2, 10) not in grid.asked
    policy = {"close_at": 3, "stragglers": "carry"}
    strategy, store, _ = run(tmp_path, config(rounds=2, collect=policy), grid)
    first, second = store.notes("round")
    assert "carried" not in first
    assert second["carried"] == {"client-0003": 1}
    assert (2, 13) not in grid.asked
    assert clients(store, 1) == "0123"
    # Whichever came first: three updates in all, one of them late.
    assert len(clients(store, 2)) == 2
    report = store.publications()[1].report
    assert report["names"][-1] == "client-0003 (round 1)"
    weight = 2**-0.5
    shares = torch.tensor([1, 1, weight]) / (2 + weight)
    torch.testing.assert_close(torch.tensor(report["coefficients"]), shares)
    assert store.refusals() == [] or {row.code for row in store.refusals()} == {"closed"}
    # What it adds is what it trained, against the adapter it trained from.
    seeded = strategy.service.seeded
    ends, starts = [], []
    again = OneRound(strategy._here, 2, strategy.service, 1.0)
    one = [row for row in store.contributions(1) if row.client == "client-0003"]
    for row in [*store.contributions(2), *one]:
        start, end = again._material.end_of(row)
        starts.append(start.adapter)
        ends.append(end)
    assert starts[-1].hash() == seeded.hash()
    served = starts[0]
    weights = [1, 1, weight]
    wanted = merge(ends, config().recipe, start=served, starts=starts, weights=weights).adapter
    torch.testing.assert_close(
        strategy.adapter.lora["hidden"].delta().dense(), wanted.lora["hidden"].delta().dense()
    )


def test_updates_of_an_abandoned_round_are_not_lost(tmp_path: Path) -> None:
    """Two answer, three are needed; in round 2 one of the two answers again, and a third."""
    grid = SlowGrid(lambda number, node: node > 11 if number == 1 else node in (11, 13))
    cfg = config(rounds=1, quorum=3, deadline_s=2.0, collect={"stragglers": "carry"})
    run(tmp_path, cfg, grid)
    _, store, _ = run(tmp_path, cfg.model_copy(update={"rounds": 2}), grid)
    first, second = store.notes("round")
    assert first["status"] == "abandoned"
    assert (second["status"], second["carried"]) == ("published", {"client-0001": 1})
    report = store.publications()[0].report
    assert list(report["names"]) == ["client-0000", "client-0002", "client-0001 (round 1)"]
    # No publication lies between: it weighs as much as the others.
    assert report["coefficients"] == pytest.approx([1 / 3] * 3)


def test_a_round_waits_for_those_that_are_still_at_work(tmp_path: Path) -> None:
    """Nobody answers round 1 in time, so that round 2 has nobody to ask."""
    store = FolderStore(tmp_path)
    grid = SlowGrid(lambda number, node: len(store.notes("planned")) < 2)
    cfg = config(rounds=2, deadline_s=2.0, collect={"stragglers": "carry"})
    MergeStrategy(cfg, template(), store).start(grid)
    first, second = store.notes("round")
    assert (first["status"], second["status"]) == ("abandoned", "published")
    # Two make the quorum, and with nobody else asked none is waited for beyond.
    assert second["carried"] == {"client-0000": 1, "client-0001": 1}
    assert [number for number, _ in grid.asked] == [1] * 4


def test_an_update_that_replaces_a_carried_one_does_not_close_the_round(tmp_path: Path) -> None:
    cfg = config(rounds=1, deadline_s=0.3, collect={"stragglers": "carry", "close_at": 2})
    run(tmp_path, cfg, SlowGrid(lambda number, node: node > 10))
    later = cfg.model_copy(update={"rounds": 2, "deadline_s": 20.0})
    _, store, _ = run(tmp_path, later)
    assert [row["status"] for row in store.notes("round")] == ["abandoned", "published"]
    assert list(store.publications()[0].report["names"]) == ["client-0000", "client-0001"]


def test_a_client_is_asked_again_once_its_update_is_too_old(tmp_path: Path) -> None:
    grid = SlowGrid(lambda number, node: (number, node) == (1, 13))
    policy = {"close_at": 3, "stragglers": "carry", "max_staleness": 1}
    _, store, _ = run(tmp_path, config(collect=policy), grid)
    assert [number for number, node in grid.asked if node == 13] == [1, 3]
    (row,) = (row for row in store.refusals() if row.round == 1)
    assert (row.client, row.code) == ("client-0003", "closed")


def test_what_cannot_be_taken_up_again_is_left_out(tmp_path: Path) -> None:
    cfg = config(rounds=1, deadline_s=0.3, collect={"stragglers": "carry", "close_at": 3})
    _, store, _ = run(tmp_path, cfg, SlowGrid(lambda number, node: node > 10))
    (row,) = store.contributions(1)
    next(path for path in tmp_path.rglob("*") if row.digest in path.name).unlink()
    later = cfg.model_copy(update={"rounds": 2, "deadline_s": 20.0})
    _, store, _ = run(tmp_path, later, SlowGrid(lambda number, node: node == 10))
    assert store.notes("round")[1]["status"] == "published"
    assert "carried" not in store.notes("round")[1]
    (note,) = store.notes("not-carried")
    assert (note["client"], note["from"], note["round"]) == ("client-0000", 1, 2)


def spoilt(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Every merge fails that counts one of these."""
    whole = candidate.merge_cohort

    def merge_cohort(*given: Any) -> Any:
        if set(names) & set(given[4]):
            raise ValueError("a decomposition failed")
        return whole(*given)

    monkeypatch.setattr(candidate, "merge_cohort", merge_cohort)


def test_a_late_update_that_no_merge_can_do_with_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes 12 and 13 answer round 1 in round 2, where the merge fails with the one of 13."""
    grid = SlowGrid()
    grid.holds = lambda number, node: node > 11 and number == 1 and grid.begun < 2
    spoilt(monkeypatch, "client-0003 (round 1)")
    cfg = config(deadline_s=1.5, collect={"stragglers": "carry"})
    _, store, _ = run(tmp_path, cfg, grid)
    rounds = store.notes("round")
    assert [row["status"] for row in rounds] == ["published"] * 3
    assert (rounds[1]["admitted"], rounds[1]["carried"]) == (3, {"client-0002": 1})
    assert "carried" not in rounds[2]
    assert store.notes("not-carried") == [
        {"client": "client-0003", "from": 1, "round": 2, "final": True,
         "reason": "the merge failed with it: a decomposition failed"},
    ]  # fmt: skip
    assert carried(store, 4, 10) == []


def test_where_the_fault_is_not_known_late_updates_are_not_carried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No merge works any more: the late ones age, and are given up by and by."""
    cfg = config(rounds=1, quorum=3, deadline_s=1.5, collect={"stragglers": "carry"})
    run(tmp_path, cfg, SlowGrid(lambda number, node: node > 11))
    spoilt(monkeypatch, "client-0002", "client-0003")
    policy = {"stragglers": "carry", "max_staleness": 2}
    later = config(rounds=5, deadline_s=1.5, collect=policy)
    _, store, _ = run(tmp_path, later, SlowGrid(lambda number, node: node < 12))
    rounds = store.notes("round")[1:]
    both = {"client-0000": 1, "client-0001": 1}
    assert [row.get("carried") for row in rounds] == [both, both, both, None]
    assert [row.get("failed") for row in rounds] == [True] * 4
    assert [row["reason"] for row in rounds] == ["the merge failed: a decomposition failed"] * 4


def test_a_client_at_work_is_not_asked_for_scores(tmp_path: Path) -> None:
    grid = SlowGrid(lambda number, node: (number, node) == (1, 13))
    policy = {"close_at": 3, "stragglers": "carry"}
    _, store, _ = run(tmp_path, config(rounds=1, evaluate_every=1, collect=policy), grid)
    scored = sorted(row["client"][-1] for row in store.notes("evaluate"))
    assert scored == ["0", "1", "2"]


def test_what_a_client_sent_before_it_was_withdrawn_is_not_carried(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for number, client in ((1, "a"), (1, "b"), (2, "b"), (4, "c")):
        digest = store.put(f"{client}{number}".encode())
        store.admit(Contribution(round=number, client=client, digest=digest, size_bytes=2))
    assert [one.name for one in carried(store, 5, 4)] == [
        "a (round 1)", "b (round 2)", "c (round 4)",
    ]  # fmt: skip
    store.note("round", {"round": 3, "status": "withdrawn", "without": ["b", "c"]})
    assert [one.name for one in carried(store, 5, 4)] == ["a (round 1)", "c (round 4)"]


def test_every_update_counts_once(tmp_path: Path) -> None:
    """Whoever is slow by turns: no update is in two merges, and none of a client twice in one."""
    grid = SlowGrid()
    grid.holds = lambda number, node: (number + node) % 3 == 0 and grid.begun <= number
    policy = {"close_at": 2, "stragglers": "carry", "max_staleness": 2}
    _, store, _ = run(tmp_path, config(rounds=6, collect=policy), grid)
    counted = []
    for row, publication in zip(store.notes("round"), store.publications(), strict=True):
        names = publication.report["names"]
        own = [(name, publication.round) for name in names if " " not in name]
        merged = own + list(row.get("carried", {}).items())
        assert len({name for name, _ in merged}) == len(merged) == len(names)
        counted += merged
    assert len(counted) == len(set(counted))
    left = {(one.row.client, one.row.round) for one in carried(store, 7, 10)}
    held = {(row.client, row.round) for row in store.contributions()}
    newest = {client: max(n for c, n in held - set(counted) if c == client) for client, _ in left}
    assert left == set(newest.items())


def test_a_closed_round_is_merged_after_a_restart_without_asking(tmp_path: Path) -> None:
    class Dying(FolderStore):
        def note(self, event: str, facts: dict[str, Any]) -> None:
            super().note(event, facts)
            if event == "state" and facts["state"] == "merging":
                raise KeyboardInterrupt

    cfg = config(rounds=1, collect={"close_at": 3})
    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(cfg, template(), Dying(tmp_path / "a")).start(SlowGrid())
    again, store, grid = run(tmp_path / "a", cfg)
    assert grid.asked == []
    assert clients(store, 1) == "012"
    whole, _, _ = run(tmp_path / "b", cfg)
    assert again.adapter.hash() == whole.adapter.hash()


@pytest.mark.parametrize(
    ("want", "status", "reason"),
    [(Want.DRAIN, "published", ""), (Want.ABORT, "abandoned", "aborted by the operator")],
)
def test_an_operator_ends_a_run(tmp_path: Path, want: Want, status: str, reason: str) -> None:
    store = FolderStore(tmp_path)

    def holds(number: int, node: int) -> bool:
        if node == 13 and not store.notes("control"):
            ask(store, want)
        return node == 13

    strategy = MergeStrategy(config(), template(), store)
    strategy._here.control._clock = iter(range(10**6)).__next__  # a second goes by with each look
    strategy.start(SlowGrid(holds))
    (row,) = store.notes("round")
    assert (row["status"], row.get("reason", "")) == (status, reason)
    assert store.notes("stopped")[0] == {
        "round": 2, "reason": f"the operator asked to {want.value}", "want": want.value,
    }  # fmt: skip
    assert standing(config(), store).over
    # The next run goes on.
    ask(store, Want.RUN)
    assert not standing(config(), store).over
    _, store, _ = run(tmp_path, config())
    assert [row["round"] for row in store.notes("round")] == [1, 2, 3]
    assert standing(config(), store).over


@pytest.mark.parametrize("want", [Want.DRAIN, Want.ABORT])
def test_who_asks_for_the_end_while_nobody_comes_is_heeded(tmp_path: Path, want: Want) -> None:
    store = FolderStore(tmp_path)

    class Empty(SlowGrid):
        def get_node_ids(self) -> list[int]:
            if not store.notes("control"):
                ask(store, want)
            return []

    strategy, grid = MergeStrategy(config(join_timeout_s=60), template(), store), Empty()
    strategy._here.control._clock = iter(range(10**6)).__next__
    strategy.start(grid)
    assert (grid.asked, store.notes("planned"), store.notes("round")) == ([], [], [])
    assert store.notes("stopped") == [
        {"round": 1, "reason": f"the operator asked to {want.value}", "want": want.value}
    ]
    # That is done with; what is asked where nothing runs is not.
    _, store, _ = run(tmp_path, config(rounds=1))
    assert [row["status"] for row in store.notes("round")] == ["published"]
    ask(store, want)
    _, store, grid = run(tmp_path, config())
    assert (grid.asked, len(store.notes("stopped"))) == ([], 2)


def test_a_drain_that_a_killed_run_did_not_heed_closes_its_round(tmp_path: Path) -> None:
    class Dying(SlowGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if len(store.contributions(1)) == 3:
                raise KeyboardInterrupt
            return super().pull_messages(message_ids)

    store = FolderStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(config(), template(), store).start(Dying(lambda number, node: node == 13))
    ask(store, Want.DRAIN)
    _, store, _ = run(tmp_path, config(), SlowGrid(lambda number, node: True))
    (row,) = store.notes("round")
    assert (row["status"], row["admitted"], clients(store, 1)) == ("published", 3, "012")
    assert [row["round"] for row in store.notes("stopped")] == [2]


@pytest.mark.parametrize(
    ("silent", "asked_again", "merged"), [(11, [(1, 12), (1, 13)], "0123"), (12, [], "012")]
)
def test_a_stop_keeps_a_round_below_its_quorum_and_closes_another(
    tmp_path: Path, silent: int, asked_again: list[tuple[int, int]], merged: str
) -> None:
    """Nodes above ``silent`` are at work when the coordinator is told to stop."""
    cfg, store = config(rounds=1, quorum=3, deadline_s=60), FolderStore(tmp_path)

    def holds(number: int, node: int) -> bool:
        if node > silent and not store.notes("control"):
            ask(store, Want.STOP)
        return node > silent

    strategy = MergeStrategy(cfg, template(), store)
    strategy._here.control._clock = iter(range(10**6)).__next__  # a second goes by with each look
    strategy.start(SlowGrid(holds))
    suspended = bool(asked_again)
    assert bool(store.notes("suspended")) == suspended
    assert bool(store.notes("round")) != suspended
    assert [row.code for row in store.refusals()] == ([] if suspended else ["closed"])
    assert clients(store, 1) == ("01" if suspended else "012")
    # The next run asks those whose update is missing; a node's name was met before.
    _, store, grid = run(tmp_path, cfg)
    assert grid.asked == asked_again
    assert clients(store, 1) == merged
    (row,) = store.notes("round")
    assert (row["status"], row["admitted"]) == ("published", len(merged))
    assert len(store.notes("met")) == 4


def test_a_pause_outlasts_a_restart_and_ends(tmp_path: Path, monkeypatch: Any) -> None:
    store = FolderStore(tmp_path)
    ask(store, Want.PAUSE)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            ask(store, Want.RUN)

    monkeypatch.setattr("anabranch.coordinator.strategy.time.sleep", sleep)
    strategy = MergeStrategy(config(rounds=1), template(), store)
    strategy._here.control._clock = iter(range(10**6)).__next__
    strategy.start(SlowGrid())
    assert len(slept) >= 3
    assert [row["status"] for row in store.notes("round")] == ["published"]


def test_control_reads_the_store_at_most_once_a_second(tmp_path: Path) -> None:
    store, now = FolderStore(tmp_path), [0.0]
    control = Control(store, lambda: now[0])
    assert control.want() is Want.RUN
    ask(store, Want.PAUSE)
    now[0] = 0.9
    assert control.want() is Want.RUN
    now[0] = 1.0
    assert control.want() is Want.PAUSE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trains": "b"}, 'trains = "b" merges factors'),
        ({"ranks": {"client-0000": 1}}, "ranks and rest need one start of all"),
        ({"gate": {"scorer": "a.b:c"}}, "kept back would be carried"),
    ],
)
def test_what_cannot_be_carried_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(collect={"stragglers": "carry"}, **changes)


@pytest.mark.parametrize(
    ("policy", "ttl_s"),
    [({}, 260), ({"deadline_cap_s": 150}, 210), ({"stragglers": "carry", "max_staleness": 2}, 660)],
)
def test_an_order_lives_as_long_as_its_answer_may_count(
    policy: dict[str, Any], ttl_s: float, tmp_path: Path
) -> None:
    grid, lived = SlowGrid(), []
    push = grid.push_messages

    def look(messages: Iterable[Message]) -> Iterable[str]:
        orders = list(messages)
        lived.extend(o.metadata.ttl for o in orders if o.metadata.message_type == MessageType.TRAIN)
        return push(orders)

    grid.push_messages = look  # type: ignore[method-assign]
    run(tmp_path, config(rounds=1, deadline_s=100, collect=policy), grid)
    assert lived == [ttl_s] * 4
