"""Whether a merged adapter may go into service: scored beside the one that is. Loads no torch.

A merge can be worse than what it replaces, by an attack or by bad luck. The gate compares the two
on inputs of the coordinator's own: a metric, how many inputs that were right turn wrong (Yan et
al., 2011.09161), and how often a trigger that was searched for turns the answer. Every model gives
way to some trigger, so what counts is how much more than the adapter in service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from anabranch.wire.canonical import number

if TYPE_CHECKING:
    from anabranch.vectors import Adapter


SCORER_PATTERN = r"^[\w.]+:\w+$"


class GateConfig(BaseModel):
    """What a candidate may do worse than the adapter in service."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scorer: str = Field(pattern=SCORER_PATTERN)
    """``package.module:function``, called with the federation's folder, that returns a scorer: an
    object with ``score(adapter) -> Scorecard``."""
    metric_drop: float = Field(0.02, ge=0)
    """Most the validation metric may fall, in its own units."""
    negative_flips: float = Field(0.05, ge=0, le=1)
    """Largest share of validation inputs that may turn from right to wrong."""
    asr_rise: float = Field(0.1, ge=0, le=1)
    """Most by which the searched trigger of any class may work more often."""
    asr: float = Field(1.0, ge=0, le=1)
    """Most often that searched triggers may work at all; 1 sets no bound."""


@dataclass(frozen=True)
class Scorecard:
    """What is known of one adapter; None where nobody looked.

    Attributes:
        metric: Validation metric, more is better.
        right: Whether each validation input is answered right, always in one order.
        asr: How often the trigger that was found for a class works, as a share, by task and class.
    """

    metric: float | None = None
    right: Sequence[bool] | None = None
    asr: Mapping[str, float] | None = None


class Scorer(Protocol):
    """Looks at adapters; the same inputs each time."""

    def score(self, adapter: Adapter) -> Scorecard:
        """What is to be known of an adapter."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: Why the candidate may not go into service, one line each; empty: it may.
        facts: The numbers, plain, for the journal.
    """

    reasons: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether the candidate may go into service."""
        return not self.reasons


def decide(config: GateConfig, before: Scorecard, candidate: Scorecard) -> Verdict:
    """Compare a candidate with the adapter in service.

    What nobody looked at in either is not compared; what was looked at before and is missing, or no
    number, now fails.

    Args:
        config: What may be worse, and by how much.
        before: The adapter in service.
        candidate: The merge.

    Raises:
        ValueError: Nothing was looked at, or the two were judged on different inputs.
    """
    reasons: list[str] = []
    facts: dict[str, Any] = {}
    if before.metric is not None:
        metric = number(candidate.metric)
        facts |= {"metric_before": before.metric, "metric": metric}
        if metric is None:
            reasons.append("the validation metric is no number")
        elif before.metric - metric > config.metric_drop + 1e-12:
            reasons.append(
                f"the validation metric falls from {before.metric:.4g} to {metric:.4g}, "
                f"by more than {config.metric_drop:g}"
            )
    if before.right is not None:
        now = candidate.right or ()
        if len(now) != len(before.right) or not now:
            raise ValueError(
                f"gate: {len(before.right)} inputs were judged before and {len(now)} now; "
                "score both on the same ones"
            )
        turned = [was and not is_ for was, is_ in zip(before.right, now, strict=True)]
        gained = [is_ and not was for was, is_ in zip(before.right, now, strict=True)]
        share = sum(turned) / len(turned)
        facts |= {"negative_flips": share, "positive_flips": sum(gained) / len(gained)}
        if share > config.negative_flips + 1e-12:
            reasons.append(
                f"{sum(turned)} of {len(turned)} inputs turn from right to wrong "
                f"({share:.1%}, at most {config.negative_flips:.1%} may)"
            )
    if before.asr is not None:
        held, rates = before.asr, dict(candidate.asr or {})
        if sorted(rates) != sorted(held) or not rates:
            raise ValueError(
                f"gate: triggers were searched for {len(held)} classes before and for "
                f"{len(rates)} now; search for the same ones"
            )
        # By class: that another class gives way as easily says nothing of this one.
        key = max(sorted(rates), key=lambda one: rates[one] - held[one])
        was, is_ = held[key], rates[key]
        facts |= {"asr_class": key, "asr_before": was, "asr": is_, "asr_most": max(rates.values())}
        if not is_ - was <= config.asr_rise + 1e-12:
            reasons.append(
                f"a searched trigger for {key} works on {is_:.1%} of inputs, on {was:.1%} with the "
                f"adapter in service (at most {config.asr_rise:.1%} more may)"
            )
        elif max(rates.values()) > config.asr:
            reasons.append(
                f"a searched trigger works on {max(rates.values()):.1%} of inputs, more than "
                f"{config.asr:.1%}"
            )
    if not facts:
        raise ValueError(
            "gate: the scorer looks at nothing; let it give a metric, right answers or a trigger's "
            "success"
        )
    return Verdict(tuple(reasons), {"passed": not reasons, "reasons": list(reasons), **facts})


class Gate:
    """Scores candidates beside what is in service, each adapter once.

    Args:
        config: What may be worse.
        scorer: Looks at adapters.
    """

    def __init__(self, config: GateConfig, scorer: Scorer) -> None:
        self._config, self._scorer = config, scorer
        self._known: tuple[str, Scorecard] | None = None

    def judge(self, before: Adapter, candidate: Adapter) -> Verdict:
        """Whether a candidate may take the place of the adapter in service.

        Raises:
            ValueError: The scorer's cards cannot be compared.
        """
        old = self._score(before)
        new = self._scorer.score(candidate)
        verdict = decide(self._config, old, new)
        if verdict.passed:
            self._known = (candidate.hash(), new)
        return verdict

    def _score(self, adapter: Adapter) -> Scorecard:
        """A card that is at hand, where it is this adapter's."""
        digest = adapter.hash()
        if self._known is None or self._known[0] != digest:
            self._known = (digest, self._scorer.score(adapter))
        return self._known[1]


def judged(gate: Gate, before: Adapter, candidate: Adapter) -> tuple[str, dict[str, Any]]:
    """What a round's record says of its candidate.

    A scorer that fails lets nothing pass, and costs the round, not the federation.

    Args:
        gate: Judges.
        before: The adapter in service.
        candidate: The merge.

    Returns:
        Why the adapter in service stays, empty where the candidate takes its place; and the facts.
    """
    try:
        verdict = gate.judge(before, candidate)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"the gate could not judge it: {reason}", {"passed": False, "reasons": [reason]}
    if verdict.passed:
        return "", verdict.facts
    return f"the gate kept the adapter in service: {'; '.join(verdict.reasons)}", verdict.facts


def gate_of(config: GateConfig | None, folder: Path) -> Gate | None:
    """The gate of a federation's folder; None where none is configured.

    Raises:
        ValueError: There is no such scorer, or it is none.
    """
    if config is None:
        return None
    module, _, name = config.scorer.partition(":")
    try:
        make: Callable[[Path], Scorer] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"gate.scorer: {config.scorer} cannot be loaded ({error}); name a function of an "
            "installed module"
        ) from error
    scorer = make(folder)
    if not callable(getattr(scorer, "score", None)):
        raise ValueError(
            f"gate.scorer: {config.scorer} returned {type(scorer).__name__}, which has no score; "
            "return an object with score(adapter)"
        )
    return Gate(config, scorer)
