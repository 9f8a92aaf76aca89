"""Their side: Flower's own strategies and ByzFL's own rules, called as they are.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, MultiKrum
from torch import Tensor

from anabranch.simulation.engine.identity import server_identity
from benchmarks.robust_speed import BYZFL, byzfl
from benchmarks.scoreboard.rules import Rule

FLOWER = "Flower 1.41.0"

SPREAD = 1.0
"""Root of the honest vectors' mean squared distance from their mean: what ByzFL's centred clipping
gets as τ. At its own default of 100 it would clip nothing here."""


LIMIT_S, LIMIT_ENTRIES = 5.0, 200_000
"""Processor seconds after which a rule counts as one that does not end, as CAF has inputs for; in
proportion for more entries than that."""


@contextmanager
def at_most(limit_s: float, name: str) -> Iterator[None]:
    """Stop what runs longer, in a process's main thread.

    Args:
        limit_s: Processor seconds.
        name: Who, for the message.

    Raises:
        ValueError: It ran longer.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise ValueError(f"{name} does not end (stopped after {limit_s:g} s of the processor)")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def replies(deltas_CD: Tensor) -> list[Message]:
    """Contributions as the messages a strategy gets, each of one example."""
    found = []
    with server_identity():
        for number, delta_D in enumerate(deltas_CD):
            asked = Message(RecordDict(), dst_node_id=number + 1, message_type="train")
            arrays = ArrayRecord({"m": Array(delta_D.numpy())})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            found.append(Message(content, reply_to=asked))
    return found


def by_flower(strategy: FedAvg, deltas_CD: Tensor, otherwise: str) -> Tensor:
    """What a strategy makes of the contributions [D].

    Args:
        strategy: Whose ``aggregate_train`` is called.
        deltas_CD: Contributions [C, D].
        otherwise: Why it would return nothing.

    Raises:
        ValueError: It returned nothing.
    """
    arrays, _ = strategy.aggregate_train(1, replies(deltas_CD))
    if arrays is None:
        raise ValueError(otherwise)
    return torch.from_numpy(arrays["m"].numpy().copy()).float()


def flower_rules() -> tuple[Rule, ...]:
    """Flower's four."""
    # It collects garbage once per contribution: what is there already need not be looked at.
    gc.freeze()
    logging.getLogger("flwr").setLevel(logging.ERROR)

    def multi_krum(deltas_CD: Tensor, f: int) -> Tensor:
        count = len(deltas_CD)
        if count <= 2 * f + 2:
            # It would take one neighbour, where the paper has none.
            raise ValueError(f"Multi-Krum: {f} malicious need {2 * f + 3} contributions")
        strategy = MultiKrum(num_malicious_nodes=f, num_nodes_to_select=count - f)
        return by_flower(strategy, deltas_CD, "nothing returned")

    def bulyan(deltas_CD: Tensor, f: int) -> Tensor:
        needs = f"Bulyan: {f} malicious need {4 * f + 3} contributions"
        return by_flower(Bulyan(num_malicious_nodes=f), deltas_CD, needs)

    def median(deltas_CD: Tensor, f: int) -> Tensor:
        return by_flower(FedMedian(), deltas_CD, "nothing returned")

    def trimmed(deltas_CD: Tensor, f: int) -> Tensor:
        # It rounds beta · C down: in the middle of the step it cannot fall short by a bit.
        share = (f + 0.5) / len(deltas_CD) if f else 0.0
        return by_flower(FedTrimmedAvg(beta=share), deltas_CD, "nothing returned")

    return (
        Rule("FedMedian", FLOWER, median),
        Rule("FedTrimmedAvg", FLOWER, trimmed),
        Rule("MultiKrum", FLOWER, multi_krum, "weighs by examples that clients claim; here 1 each"),
        Rule("Bulyan", FLOWER, bulyan),
    )


@cache
def byzfl_rules() -> tuple[Rule, ...]:
    """ByzFL's, each with a copy to change."""
    theirs = byzfl()

    def rule(name: str, make: Callable[[int], Callable[[Tensor], Any]], note: str = "") -> Rule:
        def merge(deltas_CD: Tensor, f: int) -> Tensor:
            limit_s = LIMIT_S * max(1.0, deltas_CD.numel() / LIMIT_ENTRIES)
            with torch.random.fork_rng(devices=[]), at_most(limit_s, f"ByzFL's {name}"):
                # CAF draws where it begins to look.
                torch.manual_seed(0)
                made = make(f)(deltas_CD.clone())
            if made is None:
                raise ValueError(f"ByzFL's {name} returns nothing for f = {f}")
            merged_D: Tensor = torch.as_tensor(made).float().flatten()
            return merged_D

        return Rule(name, BYZFL, merge, note)

    def nnm_trimmed(f: int) -> Callable[[Tensor], Any]:
        return lambda deltas_CD: theirs.TrMean(f)(theirs.NNM(f)(deltas_CD))

    return (
        rule("Median", lambda f: theirs.Median()),
        rule("TrMean", theirs.TrMean),
        rule("Meamed", theirs.Meamed),
        rule("GeometricMedian", lambda f: theirs.GeometricMedian()),
        rule("MultiKrum", theirs.MultiKrum, "takes one neighbour more than the paper"),
        rule("CenteredClipping", lambda f: theirs.CenteredClipping(L=3, tau=SPREAD),
             "told the honest spread as its τ"),
        rule("CAF", theirs.CAF, "does not end on some inputs, where a vector without weight left "
             "lies furthest; returns nothing for f = 0"),
        rule("NNM, TrMean", nnm_trimmed),
    )  # fmt: skip
