"""A signed federation: who is admitted, and every reason why somebody is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.registry import client_keys, enrol, revoke
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.simulation.keys import write_keys
from anabranch.wire import CodecConfig, UpdateMeta, WireError, encode_update, read_manifest
from anabranch.wire.keys import PrivateKey, new_key, seeded_key, write_key
from anabranch.wire.plan import PLAN_KEY, UPDATE_KEY, UPDATE_STYPE, RoundPlan
from anabranch.wire.sealing import SEALED_STYPE, new_seal_key, seal
from anabranch.wire.signing import PLAN_SIGNATURE_KEY, check_message

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 3}'
CLIENTS = 3
pytestmark = pytest.mark.usefixtures("flower_identity")

Tamper = Callable[[Message, Message], Message]


def config(**changes: Any) -> FederationConfig:
    given = {
        "name": "f", "run": "r", "rounds": 2, "clients": CLIENTS, "poll_s": 0.0, "signed": True,
        "evaluate_every": 2,
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


def grid(
    keys: Path | None, tamper: Tamper | None = None, before: Callable[[Message], None] | None = None
) -> InProcessGrid:
    """Three clients; node 10 may be tampered with, and every order may be before it arrives."""
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10, **({"keys": str(keys)} if keys else {})},
            RecordDict(), {"task": TASK, "task-params": PARAMS},
        )
        for node in range(10, 10 + CLIENTS)
    }  # fmt: skip

    class Tampering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            training = message.metadata.message_type == MessageType.TRAIN
            if before is not None and training:
                before(message)
            reply = client_app(message, context)
            if tamper is not None and training and message.metadata.dst_node_id == 10:
                return tamper(message, reply)
            return reply

    return InProcessGrid(Tampering(), contexts)


def run(
    folder: Path,
    tamper: Tamper | None = None,
    before: Callable[[Message], None] | None = None,
    cfg: FederationConfig | None = None,
) -> tuple[MergeStrategy, FolderStore]:
    cfg = cfg or config()
    keys = write_keys(folder, cfg) if cfg.signed else None
    store = FolderStore(folder)
    trust = trust_of(folder, cfg, store) if cfg.signed else None
    template = open_session(TASK, PARAMS).template
    strategy = MergeStrategy(cfg, template, store, trust)
    strategy.start(grid(keys, tamper, before))
    return strategy, store


def test_a_signed_federation_makes_the_adapter_of_an_unsigned_one(tmp_path: Path) -> None:
    signed, store = run(tmp_path / "a")
    assert [len(store.contributions(number)) for number in (1, 2)] == [CLIENTS, CLIENTS]
    assert store.refusals() == []
    assert [row["accuracy"] for row in store.notes("evaluate")]
    unsigned, _ = run(tmp_path / "b", cfg=config(signed=False))
    assert signed.adapter.hash() == unsigned.adapter.hash()
    ring = client_keys(tmp_path / "a")
    for row in store.contributions(2):
        check_message(read_manifest(store.get(row.digest)), ring, row.client)


def update(
    order: Message, key: PrivateKey | None, nonce: bytes | None = None, **changes: Any
) -> bytes:
    """An update of client 0 for this order, with fields of an attacker's choice."""
    plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
    meta = UpdateMeta(
        "update", plan.base_hash, plan.start_hash, plan.federation, plan.run, plan.round,
        "client-0000", nonce or new_key("x").public.raw[:16], plan.seed, 1, int(time.time()),
    )  # fmt: skip
    shapes = open_session(TASK, PARAMS).template.tensors()
    tensors = {name: torch.full_like(tensor, 1e-3) for name, tensor in shapes.items()}
    return encode_update(tensors, replace(meta, **changes), CodecConfig(name="dense"), key).blob


def sends(make: Callable[[Message], bytes]) -> Tamper:
    def tamper(order: Message, reply: Message) -> Message:
        data = make(order)
        array = Array("uint8", (len(data),), UPDATE_STYPE, data)
        reply.content[UPDATE_KEY] = ArrayRecord({UPDATE_KEY: array})
        return reply

    return tamper


MINE, THEIRS = seeded_key("client-0000", 0), seeded_key("client-0001", 0)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda order: update(order, None), "unsigned"),
        (lambda order: update(order, new_key("client-0000")), "unknown-key"),
        (lambda order: update(order, THEIRS), "wrong-key"),
        (lambda order: update(order, MINE)[:-1] + b"\x01", "digest"),
        (lambda order: update(order, MINE, client="client-0001"), "wrong-client"),
        (lambda order: update(order, MINE, federation="g"), "wrong-federation"),
        (lambda order: update(order, MINE, run="s"), "wrong-run"),
        (lambda order: update(order, MINE, round=0), "stale-round"),
        (lambda order: update(order, MINE, round=9), "wrong-round"),
        (lambda order: update(order, MINE, base_hash="00" * 32), "wrong-base-hash"),
        (lambda order: update(order, MINE, start_hash="00" * 32), "wrong-start-hash"),
        (lambda order: update(order, MINE, nonce=b"short"), "nonce"),
        (lambda order: update(order, MINE, issued_s=int(time.time()) - 400), "expired"),
        (lambda order: update(order, MINE, issued_s=int(time.time()) + 400), "future"),
    ],
)
def test_every_refusal_has_a_reason_of_its_own(
    tmp_path: Path, make: Callable[[Message], bytes], code: str
) -> None:
    _, store = run(tmp_path, sends(make), cfg=config(rounds=1))
    assert [(row.client, row.code) for row in store.refusals()] == [("client-0000", code)]
    assert [row.client for row in store.contributions(1)] == ["client-0001", "client-0002"]


def test_a_clock_within_the_skew_is_admitted(tmp_path: Path) -> None:
    late = sends(lambda order: update(order, MINE, issued_s=int(time.time()) + 200))
    _, store = run(tmp_path, late, cfg=config(rounds=1))
    assert store.refusals() == []


def test_replays_are_refused_even_after_a_restart(tmp_path: Path) -> None:
    nonce, sent = b"n" * 16, []

    def old(order: Message) -> bytes:
        sent.append(update(order, MINE) if not sent else b"")
        return sent[0]

    # The very bytes of round 1 in round 2, then a new update under a nonce used before.
    _, store = run(tmp_path / "a", sends(old))
    assert [row.code for row in store.refusals()] == ["stale-round"]
    again = sends(lambda order: update(order, MINE, nonce))
    _, store = run(tmp_path / "b", again)
    assert [row.code for row in store.refusals()] == ["replay"]
    _, store = run(tmp_path / "b", again, cfg=config(rounds=3))
    assert [row.code for row in store.refusals()] == ["replay", "replay"]


def test_a_revoked_key_is_refused_at_once_and_a_new_one_may_overlap(tmp_path: Path) -> None:
    fresh = new_key("client-0000")

    def rotate(order: Message) -> bytes:
        plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
        if plan.round == 2:
            enrol(tmp_path, [fresh.public])
        if plan.round == 4:
            revoke(tmp_path, MINE.public.id.hex())
        return update(order, fresh if plan.round in (3, 5) else MINE)

    _, store = run(tmp_path, sends(rotate), cfg=config(rounds=5))
    assert [(row.round, row.code) for row in store.refusals()] == [(4, "revoked-key")]


def test_clients_take_no_order_that_the_coordinator_did_not_sign(tmp_path: Path) -> None:
    def strip(order: Message) -> None:
        record = order.content.config_records[PLAN_KEY]  # one for all clients
        if PLAN_SIGNATURE_KEY in record:
            del record[PLAN_SIGNATURE_KEY]

    def alter(order: Message) -> None:
        record = order.content.config_records[PLAN_KEY]
        record[PLAN_KEY] = str(record[PLAN_KEY]).replace('"steps":2', '"steps":3')

    for name, before, reason in (("a", strip, "unsigned"), ("b", alter, "bad-signature")):
        _, store = run(tmp_path / name, before=before, cfg=config(rounds=1))
        reasons = [row.reason for row in store.refusals()]
        assert len(reasons) == CLIENTS
        assert all(f"the plan is refused ({reason})" in text for text in reasons)


def test_clients_decode_no_adapter_that_the_coordinator_did_not_sign(tmp_path: Path) -> None:
    def forged(order: Message) -> None:
        record = order.content.array_records.get("adapter")
        if record is not None:
            template = open_session(TASK, PARAMS).template
            meta = UpdateMeta("adapter", "ab" * 32, "", "f", "r", 1, "", b"", 0, 0)
            codec = CodecConfig(name="dense")
            data = encode_update(template.tensors(), meta, codec, new_key("x")).blob
            array = Array("uint8", (len(data),), record["adapter"].stype, data)
            order.content["adapter"] = ArrayRecord({"adapter": array})

    _, store = run(tmp_path, before=forged)
    assert {row.round for row in store.refusals()} == {2}
    assert all("is not enrolled" in row.reason for row in store.refusals())


def test_a_coordinator_may_change_its_key_while_clients_know_both(tmp_path: Path) -> None:
    cfg = config(rounds=1)
    keys = write_keys(tmp_path, cfg)
    fresh = new_key("coordinator")
    (keys / "coordinator.key").unlink()
    old = (keys / "coordinator.pub").read_text()
    (keys / "coordinator.pub").unlink()
    write_key(fresh, keys)
    (keys / "coordinator.pub").write_text(f"{old}{fresh.public.line}\n")
    _, store = run(tmp_path, cfg=cfg)
    assert len(store.contributions(1)) == CLIENTS


def test_a_signed_federation_without_keys_does_not_start(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with pytest.raises(ValueError, match="anabranch keys new coordinator`"):
        trust_of(tmp_path, config(), store)
    template = open_session(TASK, PARAMS).template
    with pytest.raises(ValueError, match="signed is True in the federation"):
        MergeStrategy(config(), template, store)


def test_a_journal_from_before_nonces_were_kept_is_read(tmp_path: Path) -> None:
    write_keys(tmp_path, config())
    store = FolderStore(tmp_path)
    store.note("admitted", {"round": 1, "client": "a", "digest": "00", "size_bytes": 1})
    assert trust_of(tmp_path, config(), store).nonces == {""}


def test_a_node_with_keys_needs_all_of_them(tmp_path: Path) -> None:
    from anabranch.client.trust import keys_of

    with pytest.raises(ValueError, match=r"coordinator\.pub: there is no such list"):
        keys_of({"keys": str(tmp_path), "client": "site-a"})
    assert keys_of({"client": "site-a"}) is None


def test_the_environment_names_a_node_s_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.client.trust import KEYS_VARIABLE, keys_of

    keys = write_keys(tmp_path, config())
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    found = keys_of({"partition-id": 1})
    assert found is not None
    assert found.own.public == THEIRS.public


def test_sealed_updates_make_the_same_adapter_and_are_read_by_the_coordinator_alone(
    tmp_path: Path,
) -> None:
    carried: list[bytes] = []
    plans: list[RoundPlan] = []

    def listen(order: Message, reply: Message) -> Message:
        array = reply.content.array_records[UPDATE_KEY][UPDATE_KEY]
        assert array.stype == SEALED_STYPE
        carried.append(array.data)
        text = str(order.content.config_records[PLAN_KEY][PLAN_KEY])
        plans.append(RoundPlan.model_validate_json(text))
        return reply

    sealed, store = run(tmp_path / "a", listen, cfg=config(sealed=True))
    assert store.refusals() == []
    clear, plain = run(tmp_path / "b")
    assert sealed.adapter.hash() == clear.adapter.hash()
    for data, number in zip(carried, (1, 2), strict=True):
        opened = store.contributions(number)[0]
        assert len(data) == opened.size_bytes == plain.contributions(number)[0].size_bytes + 48
        assert b"ANBR" not in data
        with pytest.raises(WireError):
            read_manifest(data)
        check_message(read_manifest(store.get(opened.digest)), client_keys(tmp_path / "a"))
    # Every round has a key of its own.
    assert len({plan.seal_to for plan in plans}) == 2


def test_what_a_sealed_federation_refuses(tmp_path: Path) -> None:
    def sealed_to(key: bytes) -> Tamper:
        def tamper(order: Message, reply: Message) -> Message:
            data = seal(update(order, MINE), key)
            array = Array("uint8", (len(data),), SEALED_STYPE, data)
            reply.content[UPDATE_KEY] = ArrayRecord({UPDATE_KEY: array})
            return reply

        return tamper

    cfg = config(sealed=True, rounds=1)
    for name, tamper, code in (
        ("open", sends(lambda order: update(order, MINE)), "wrong-format"),
        ("other", sealed_to(new_seal_key().public), "seal"),
    ):
        _, store = run(tmp_path / name, tamper, cfg=cfg)
        assert [row.code for row in store.refusals()] == [code]
    with pytest.raises(ValueError, match="set signed = true"):
        config(sealed=True, signed=False)
