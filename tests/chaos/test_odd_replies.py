"""Replies cut off, doubled, or of another round or run: refused, and nothing counts twice."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Message
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, opened, refusals, run

from anabranch.coordinator.federation import FederationConfig
from anabranch.wire.plan import PLAN_KEY, UPDATE_KEY, UPDATE_STYPE, RoundPlan

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
Sent = dict[tuple[str, int, str], bytes]
"""Honest updates by run, round and client."""
Odd = Callable[[RoundPlan, str, bytes, Sent], bytes | None]
"""A plan, a client, its honest update and every one before, to what is sent; None: as it is."""


def cut_off(plan: RoundPlan, client: str, blob: bytes, sent: object) -> bytes:
    """A truncated upload."""
    return blob[: random.Random(f"{plan.round}{client}").randrange(len(blob))]


def of_the_round_before(plan: RoundPlan, client: str, blob: bytes, sent: Sent) -> bytes | None:
    """What it sent a round ago, over again."""
    return sent.get((plan.run, plan.round - 1, client))


def of_an_earlier_run(plan: RoundPlan, client: str, blob: bytes, sent: Sent) -> bytes | None:
    """What it sent in the same round of another run."""
    return sent.get(("old", plan.round, client))


def of_another_client(plan: RoundPlan, client: str, blob: bytes, sent: Sent) -> bytes | None:
    """What another one sent in this round: a duplicate under a second name."""
    mine = [data for (r, n, c), data in sent.items() if (r, n) == (plan.run, plan.round)]
    return mine[0] if mine else None


ODD: dict[str, tuple[Odd, str]] = {
    "an upload cut off": (cut_off, "not whole"),
    "a reply of the round before, over again": (of_the_round_before, "stale-round"),
    "a reply of an earlier run": (of_an_earlier_run, "wrong-run"),
    "another client's reply, doubled": (of_another_client, "wrong-client"),
}


def odd_run(
    cfg: FederationConfig,
    folder: Path,
    odd: Odd,
    seed: int,
    sent: Sent,
) -> set[tuple[int, str]]:
    """Run it; in each round one client, never the first one, is odd. Returns who was, and when."""
    draw, oddities = random.Random(seed), set()
    who = {number: draw.randrange(1, CLIENTS) for number in range(1, cfg.rounds + 1)}

    def tamper(order: Message, reply: Message) -> Message:
        plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
        client = str(reply.content.config_records["client"]["client"])
        blob = bytes(reply.content.array_records[UPDATE_KEY][UPDATE_KEY].data)
        told = odd(plan, client, blob, sent) if client == f"client-000{who[plan.round]}" else None
        sent[(plan.run, plan.round, client)] = blob
        if told is not None:
            oddities.add((plan.round, client))
            array = Array("uint8", (len(told),), UPDATE_STYPE, told)
            reply.content[UPDATE_KEY] = ArrayRecord({UPDATE_KEY: array})
        return reply

    run(cfg, folder, tamper=tamper)
    return oddities


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("signed", [False, True] if RUNS > 1 else [True])
@pytest.mark.parametrize("what", ODD)
def test_an_odd_reply_costs_its_sender_alone(
    what: str, signed: bool, seed: int, tmp_path: Path, told: Told
) -> None:
    odd, code = ODD[what]
    sent: Sent = {}
    cfg = config(quorum=CLIENTS - 1, signed=signed)
    if "run" in what:
        odd_run(
            cfg.model_copy(update={"run": "old"}), tmp_path / "old", lambda *_: None, seed, sent
        )
    told.broke()
    refused = odd_run(cfg, tmp_path, odd, seed, sent)
    assert len(refused) >= cfg.rounds - 1
    check(cfg, tmp_path, refused=refused)
    for row in refusals(cfg, tmp_path):
        assert (row.round, row.client) in refused
        assert code == "not whole" or row.code in {code, "wrong-key"}
    told.outcome(what, "refused with a code and a reason; it costs its sender's update alone")


def test_an_abandoned_rounds_reply_over_again(tmp_path: Path, told: Told) -> None:
    """Round 1 falls short of its quorum; what was sent for it is sent again in round 2."""
    sent: Sent = {}

    def odd(plan: RoundPlan, client: str, blob: bytes, before: object) -> bytes | None:
        return b"" if plan.round == 1 else sent.get((plan.run, plan.round - 1, client))

    cfg = config(quorum=CLIENTS)
    refused = odd_run(cfg.model_copy(update={"rounds": 1}), tmp_path, odd, 1, sent)
    short = cfg.model_copy(update={"quorum": CLIENTS - 1})
    refused |= odd_run(short, tmp_path, odd, 1, sent)
    check(short, tmp_path, abandoned={1: "3 admitted, the quorum is 4"}, refused=refused)
    told.outcome("a reply of an abandoned round, over again", "refused: it is of another round")


def test_replies_that_come_late(tmp_path: Path, told: Told) -> None:
    """Rounds close at three updates; the fourth comes in the next one, and counts there."""
    cfg = config(quorum=3, collect={"close_at": 3, "stragglers": "carry"})
    told.broke()
    run(cfg, tmp_path)
    check(cfg, tmp_path, refused=None)
    with closing(opened(cfg, tmp_path)) as store:
        late = [row["carried"] for row in store.notes("round") if "carried" in row]
    assert late[0] == {"client-0003": 1}
    told.outcome(
        "replies that come after their round has closed",
        "merged once, in the round under way, at less weight",
    )
