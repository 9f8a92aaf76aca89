"""A round's receipt, from what its end knows (``wire.receipt``)."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from anabranch.aggregation import MergeReport
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService
from anabranch.coordinator.inputs import name_of, size_of
from anabranch.coordinator.privacy.ledger import RELEASE_KEY
from anabranch.coordinator.scores import mean_metrics
from anabranch.coordinator.store import Contribution, Publication, Store
from anabranch.wire.canonical import LARGEST_INT, number
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan
from anabranch.wire.receipt import (
    Exclusion,
    Input,
    Kind,
    Output,
    Receipt,
    Restored,
    encode_receipt,
    receipt_hash,
)

ELSEWHERE = ("name", "run", "recipe", "codec", "store")
"""Parts of a configuration that are not in ``settings``: the receipt says them by their own names,
or, as where the store is, they are nobody else's business."""


def merge_receipt(
    store: Store,
    config: FederationConfig,
    plan: RoundPlan,
    cohort: Sequence[Contribution],
    publication: Publication,
    candidate: InService,
    key: PrivateKey | None,
    factors: Sequence[float] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> bytes:
    """The receipt of a merge that is about to be published.

    Args:
        store: Holds what was refused in the round, and the receipt before.
        config: The federation.
        plan: The round's.
        cohort: What was merged, in its order.
        publication: What came of it.
        candidate: The same, decoded.
        key: Who signs; None leaves it unsigned.
        factors: How much each of the cohort counted; None: all alike.
        gate: What a gate found, before and after; None where there is none.
    """
    report = publication.report
    weights = report.get("coefficients")
    assert candidate.blob is not None
    receipt = _of_round(store, config, plan, "merge", cohort, weights, factors)
    receipt = receipt.model_copy(
        update={
            "exclusions": (*receipt.exclusions, *_suspected(report)),
            "scores": _scores(store, config, plan.round, cohort)
            | _gated(gate)
            | {"truncation-error": number(report.get("overall_truncation", 0.0))},
            "release": _plain(report.get(RELEASE_KEY, {})),
            "output": Output(
                adapter_hash=publication.adapter_hash,
                artifact=publication.digest,
                size_bytes=len(candidate.blob),
            ),
        }
    )
    return encode_receipt(receipt, key)


def abandoned_receipt(
    store: Store,
    config: FederationConfig,
    plan: RoundPlan,
    cohort: Sequence[Contribution],
    reason: str,
    key: PrivateKey | None,
    gate: Mapping[str, Any] | None = None,
) -> bytes:
    """The receipt of a round that changed nothing; arguments as in ``merge_receipt``."""
    receipt = _of_round(store, config, plan, "abandoned", cohort)
    changes = {"reason": reason, "scores": _gated(gate)}
    return encode_receipt(receipt.model_copy(update=changes), key)


def rollback_receipt(
    store: Store,
    config: FederationConfig,
    plan: RoundPlan,
    restored: Restored,
    output: Output,
    reason: str,
    key: PrivateKey | None,
) -> bytes:
    """The receipt of an earlier adapter's return; ``plan`` is of the round it stands for."""
    receipt = _base(store, config, plan, "rollback")
    changes = {"restored": restored, "output": output, "reason": reason}
    return encode_receipt(receipt.model_copy(update=changes), key)


def withdrawal_receipt(
    store: Store,
    config: FederationConfig,
    plan: RoundPlan,
    of: Receipt,
    start_hash: str,
    inputs: tuple[Input, ...],
    report: MergeReport | None,
    service: InService,
    digest: str,
    without: Sequence[str],
    reason: str,
    previous: bytes | None,
    key: PrivateKey | None,
) -> bytes:
    """The receipt of a merge that was done again without some clients.

    Args:
        store: Holds the receipt before, unless ``previous`` is given.
        config: The federation.
        plan: Of the round under whose number it is published.
        of: The receipt of the merge that was done again.
        start_hash: What that merge starts from now.
        inputs: What is left of its cohort.
        report: On the merge; None where too few were left, and the start stays.
        service: What is in service after it.
        digest: The artifact of that.
        without: Who is left out.
        reason: What is not undone.
        previous: The receipt before it; None takes the store's last.
        key: Who signs; None leaves it unsigned.
    """
    assert service.blob is not None
    weights = None if report is None else report.coefficients
    counted: Sequence[float | None] = weights or [None] * len(inputs)
    base = _base(store, config, plan, "withdrawal")
    if previous is not None:
        base = base.model_copy(update={"previous": receipt_hash(previous)})
    changes = {
        "start_hash": start_hash,
        "inputs": tuple(
            one.model_copy(update={"weight": number(weight)})
            for one, weight in zip(inputs, counted, strict=True)
        ),
        "exclusions": of.exclusions,
        "without": tuple(without),
        "redone": of.round,
        "recipe": of.recipe,
        "settings": of.settings,
        "codec": of.codec,
        "scores": {} if report is None else {"truncation-error": number(report.overall_truncation)},
        "output": Output(adapter_hash=service.hash, artifact=digest, size_bytes=len(service.blob)),
        "reason": reason,
    }
    return encode_receipt(base.model_copy(update=changes), key)


def configuration(receipt: Receipt, here: FederationConfig) -> FederationConfig:
    """The federation's configuration as it was in a receipt's round.

    Args:
        receipt: Of a merge or of an abandoned round.
        here: The configuration now: says where the store is, and the seed of a noise that has one.

    Raises:
        ValueError: A release with other settings wrote it.
    """
    settings: dict[str, Any] = dict(receipt.settings)
    if here.privacy is not None and isinstance(settings.get("privacy"), dict):
        settings["privacy"] = settings["privacy"] | {"noise_seed": here.privacy.noise_seed}
    given = {
        **settings,
        "name": receipt.federation,
        "run": receipt.run,
        "recipe": receipt.recipe,
        "codec": receipt.codec,
        "store": here.store,
    }
    return FederationConfig.model_validate(given)


def software() -> str:
    """What merges here, as a receipt names it."""
    try:
        own = version("anabranch")
    except PackageNotFoundError:
        own = "from source"
    return f"anabranch {own}, torch {torch.__version__}, {platform.machine()}"


def _of_round(
    store: Store,
    config: FederationConfig,
    plan: RoundPlan,
    kind: Kind,
    cohort: Sequence[Contribution],
    weights: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
) -> Receipt:
    there = {row.client for row in cohort if row.round == plan.round}
    counted: Sequence[float | None] = weights or [None] * len(cohort)
    inputs = tuple(
        Input(
            client=row.client,
            round=row.round,
            artifact=name_of(store, config, row),
            size_bytes=size_of(config, row),
            nonce=row.nonce,
            factor=factor,
            weight=number(weight),
        )
        for row, factor, weight in zip(cohort, factors or [1.0] * len(cohort), counted, strict=True)
    )
    # A client that was refused, and asked again after a restart, may be in the merge after all.
    last = {row.client: row for row in store.refusals(plan.round) if row.client not in there}
    exclusions = tuple(
        Exclusion(
            client=row.client,
            code=row.code,
            # A reason may tell what was in an update.
            reason=row.reason[:300] if config.privacy is None else "",
        )
        for row in sorted(last.values(), key=lambda row: row.client)
    )
    settings = config.model_dump(mode="json", exclude=set(ELSEWHERE))
    if config.privacy is not None:
        # Whoever has the seed can take the noise off again.
        settings["privacy"].pop("noise_seed", None)
    return _base(store, config, plan, kind).model_copy(
        update={
            "inputs": inputs,
            "exclusions": exclusions,
            "recipe": _plain(config.recipe.model_dump(mode="json")),
            "settings": _plain(settings),
            "codec": _plain(config.codec.model_dump(mode="json")),
        }
    )


def _suspected(report: Mapping[str, Any]) -> tuple[Exclusion, ...]:
    """Clients whose whole change was left out, each by the finding that stood out most.

    They are among the inputs all the same: whoever merges again has to suspect them again.
    """
    findings = (report.get("suspicion") or {}).get("findings", ())
    why: dict[str, str] = {}
    for one in findings:
        masked = one["action"] == "mask_module" and one["module"] is None
        if one["action"] == "exclude" or masked:
            why.setdefault(one["client"], one["why"])
    return tuple(
        Exclusion(client=client, code="suspicion", reason=why[client][:300])
        for client in sorted(why)
    )


def _base(store: Store, config: FederationConfig, plan: RoundPlan, kind: Kind) -> Receipt:
    last = store.last_receipt()
    return Receipt(
        kind=kind,
        federation=config.name,
        run=config.run,
        round=plan.round,
        time_s=round(time.time(), 3),
        software=software(),
        previous=None if last is None else receipt_hash(last),
        base_hash=plan.base_hash,
        start_hash=plan.start_hash,
    )


def _scores(
    store: Store, config: FederationConfig, server_round: int, cohort: Sequence[Contribution]
) -> dict[str, float | None]:
    """Means of what the cohort claims of its training, and clients of the round's start."""
    if config.privacy is not None:
        # No noise is on them.
        return {}
    before = [
        {name: value for name, value in row.items() if name not in ("round", "client")}
        for row in store.notes("evaluate")
        if row["round"] == server_round - 1
    ]
    found: dict[str, float | None] = {}
    for of, rows in (("cohort", [row.metrics for row in cohort]), ("start", before)):
        for name, value in (mean_metrics(rows) or {}).items():
            if not name.endswith("-seconds"):
                assert isinstance(value, float)
                found[f"{of}.{name}"] = number(value)
    return found


def _gated(gate: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of a gate's verdict."""
    return {
        f"gate.{name.replace('_', '-')}": number(float(value))
        for name, value in (gate or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _plain(value: Any) -> Any:
    """A configuration as JSON that every reader reads alike: large integers as text."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return str(value)
    return number(value) if isinstance(value, float) else value
