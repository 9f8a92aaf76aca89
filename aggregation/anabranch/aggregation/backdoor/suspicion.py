"""Which contributions stand out from their cohort, by their weights alone.

A backdoor is learned from few examples of one kind: it tends to sit in one direction of a module
(Tran et al., 1811.00636, saw it in activations), to be large enough to survive the merge, and to
differ from what the others learned. Each of that is a number per contribution and module; who is
many robust standard deviations above the cohort's median is found. Nothing is proven by it: an
honest client with data of its own can stand out, and an attacker who imitates the cohort does not.

Shape legend: C contributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TypedDict

from torch import Tensor

from anabranch.aggregation.backdoor.config import FEWEST, Signal, SuspicionConfig
from anabranch.aggregation.backdoor.features import Features
from anabranch.aggregation.backdoor.outliers import centre, scores
from anabranch.aggregation.method import cosines


class Finding(TypedDict):
    """One reason to suspect one contribution; plain values, so that a journal can keep it."""

    client: str
    """The contribution's name."""
    module: str | None
    """Where; None: in the whole task vector."""
    signal: Signal
    """What stood out."""
    score: float
    """Robust z-score."""
    why: str
    """The same in words."""
    action: str
    """What was done about it."""


class Strongest(TypedDict):
    """What of one signal stands out most in one contribution, found or not."""

    score: float
    """Robust z-score."""
    module: str | None
    """Where; None: in the whole task vector."""
    why: str
    """The same in words."""


class SuspicionReport(TypedDict):
    """What a merge says of its cohort; plain values, so that a journal can keep it."""

    scores: dict[str, float]
    """Each contribution's largest score."""
    strongest: dict[str, dict[Signal, Strongest]]
    """The same by signal, with where and why; a signal that nothing speaks for is left out."""
    findings: tuple[Finding, ...]
    """Who stood out, the largest score first."""


@dataclass(frozen=True)
class Suspicion:
    """What was found in a cohort.

    Attributes:
        scores: Each contribution's largest score, found or not.
        strongest: The same by signal, with where and why.
        findings: Those at or above the threshold, the largest first.
        rows: Of which contribution each finding is, by place: two may be of one client.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    rows: tuple[int, ...] = ()
    strongest: Mapping[str, dict[Signal, Strongest]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measure:
    """How one feature is judged.

    Attributes:
        signal: What it is a sign of.
        least: The least spread: what honest clients differ by anyway, in natural logarithms.
        both: Whether it can be too small, too.
        words: Of a module where a value stands out, with ``mine`` and ``usual``.
    """

    signal: Signal
    least: float
    both: bool
    words: str


_MEASURES: Mapping[str, _Measure] = {
    "spectrum": _Measure(
        "spectrum",
        0.25,
        False,
        "its first singular direction holds {mine:.0%} of the change, "
        "the cohort's median {usual:.0%}",
    ),
    "energy": _Measure(
        "energy", 0.15, False, "its change is {ratio:.3g} times the cohort's median"
    ),
    "rows": _Measure(
        "factors",
        0.25,
        False,
        "its largest row stands out {ratio:.3g} times as much as the cohort's median",
    ),
    "columns": _Measure(
        "factors",
        0.25,
        False,
        "its largest column stands out {ratio:.3g} times as much as the cohort's median",
    ),
    "balance": _Measure(
        "factors", 0.25, True, "B changed {ratio:.3g} times as much beside A as the cohort's median"
    ),
}

_COSINE_LEAST = 0.15
"""Least spread of a cosine's inverse hyperbolic tangent."""


def suspect(
    names: Sequence[str],
    by_module: Mapping[str, Sequence[Features]],
    gram_CC: Tensor,
    config: SuspicionConfig,
) -> Suspicion:
    """Judge a cohort.

    Args:
        names: The contributions.
        by_module: Features by module, one table per contribution.
        gram_CC: Inner products of the whole task vectors, fp64.
        config: What to look for.

    Returns:
        Scores and findings; their action is the policy's, before ``consequences`` limits it.

    Raises:
        ValueError: Fewer contributions than one can be told apart from.
    """
    if len(names) < FEWEST:
        raise ValueError(
            f"suspicion: {len(names)} contributions are too few to tell one from the others; "
            f"it needs {FEWEST}: wait for more, or leave it out"
        )
    judged = _features(by_module, config) + _sizes(gram_CC, config)
    if "cosine" in config.signals:
        cosines_CC = cosines(gram_CC).tolist()
        judged += _copies(cosines_CC, names, config) + _against(cosines_CC)
    largest = dict.fromkeys(names, 0.0)
    strongest: dict[str, dict[Signal, Strongest]] = {name: {} for name in names}
    findings: list[tuple[int, Finding]] = []
    for row, module, signal, exact, why in judged:
        name, score = names[row], round(exact, 2)
        largest[name] = max(largest[name], score)
        mine = strongest[name]
        if signal not in mine or score > mine[signal]["score"]:
            mine[signal] = Strongest(score=score, module=module, why=why)
        if exact >= config.threshold:
            action = "note" if name in config.allow else config.actions.get(signal, config.action)
            finding = Finding(
                client=name,
                module=module,
                signal=signal,
                score=score,
                why=why,
                action=action,
            )
            findings.append((row, finding))
    findings.sort(key=lambda one: (-one[1]["score"], one[0], one[1]["module"] or ""))
    return Suspicion(
        largest,
        tuple(finding for _, finding in findings),
        tuple(row for row, _ in findings),
        strongest,
    )


_Judged = tuple[int, str | None, Signal, float, str]
"""Whose, where, by what, the score and the reason."""


def _features(
    by_module: Mapping[str, Sequence[Features]], config: SuspicionConfig
) -> list[_Judged]:
    """Features module by module, and those that a contribution has in all of them."""
    found: list[_Judged] = []
    for feature, measure in _MEASURES.items():
        if measure.signal not in config.signals:
            continue
        values = {m: [one[feature] for one in table] for m, table in by_module.items()}
        centres = {module: centre(values_C) for module, values_C in values.items()}
        spreads = [of.spread for of in centres.values() if of.known >= 3]
        # By chance a few numbers of one module lie close together; those of all do not.
        least = max(measure.least, median(spreads) if spreads else 0.0)
        everywhere: list[list[float]] = [[] for _ in next(iter(values.values()), [])]
        for module, values_C in values.items():
            middle = centres[module].median
            for row, score in enumerate(scores(values_C, centres[module], least)):
                value = values_C[row]
                if not math.isnan(value - middle):
                    everywhere[row].append(value - middle)
                if (size := abs(score) if measure.both else score) > 0:
                    why = f"{module}: {_said(measure, feature, value, middle)}"
                    found.append((row, module, measure.signal, size, why))
        if len(values) > 1 and feature != "energy":
            means = [fmean(one) if one else math.nan for one in everywhere]
            for row, score in enumerate(scores(means, centre(means), measure.least)):
                if (size := abs(score) if measure.both else score) > 0:
                    said = _said(measure, feature, means[row], centre(means).median, over=True)
                    found.append((row, None, measure.signal, size, f"over all modules, {said}"))
    return found


def _said(measure: _Measure, feature: str, mine: float, usual: float, over: bool = False) -> str:
    """The reason in words."""
    if feature == "spectrum":
        if over:
            return (
                "the odds of its first singular directions are "
                f"{math.exp(mine - usual):.3g} times the cohort's median"
            )
        share, middle = (1 / (1 + math.exp(-value)) for value in (mine, usual))
        return measure.words.format(mine=share, usual=middle)
    return measure.words.format(ratio=math.exp(mine - usual))


def _sizes(gram_CC: Tensor, config: SuspicionConfig) -> list[_Judged]:
    """Norms of whole task vectors."""
    if "energy" not in config.signals:
        return []
    squares = gram_CC.diagonal().tolist()
    logs = [math.log(square) / 2 if square > 0 else math.nan for square in squares]
    of = centre(logs)
    return [
        (
            row,
            None,
            "energy",
            score,
            f"its norm is {math.exp(logs[row] - of.median):.3g} times the cohort's median",
        )
        for row, score in enumerate(scores(logs, of, _MEASURES["energy"].least))
        if score > 0
    ]


def _copies(
    cosines_CC: Sequence[Sequence[float]], names: Sequence[str], config: SuspicionConfig
) -> list[_Judged]:
    """All but the first of task vectors that are one another's copies, where most pairs are not.

    Who is copied did nothing, and of equal ones it does not matter which is kept: one counts.
    """
    count = len(names)
    angles = [[math.atanh(min(value, 1 - 1e-9)) if value > -1 else -10.0 for value in row]
              for row in cosines_CC]  # fmt: skip
    pairs = [angles[i][j] for i in range(count) for j in range(i)]
    of = centre(pairs)
    found: list[_Judged] = []
    for row in range(count):
        close = [other for other in range(row) if cosines_CC[row][other] >= config.alike]
        if not close:
            continue
        other = max(close, key=lambda index: cosines_CC[row][index])
        score = (angles[row][other] - of.median) / max(of.spread, _COSINE_LEAST)
        why = (
            f"it is a copy of {names[other]} (cosine {cosines_CC[row][other]:.3f}; "
            f"the median pair has {math.tanh(of.median):.2f})"
        )
        together = 1 + sum(cosines_CC[row][i] >= config.alike for i in range(count) if i != row)
        if together > 2:
            why += f", one of {together} that lie together"
        found.append((row, None, "cosine", score, why))
    return found


def _against(cosines_CC: Sequence[Sequence[float]]) -> list[_Judged]:
    """Who points against most others, in a cohort whose task vectors have something in common."""
    count = len(cosines_CC)
    middles = [
        median(cosines_CC[row][other] for other in range(count) if other != row)
        for row in range(count)
    ]
    of = centre(middles)
    found: list[_Judged] = []
    for row, score in enumerate(scores(middles, of, _COSINE_LEAST / 3)):
        if score < 0 and middles[row] < -0.05:
            why = (
                f"it points against the others: its median cosine to them is {middles[row]:.2f}, "
                f"the cohort's {of.median:.2f}"
            )
            found.append((row, None, "cosine", -score, why))
    return found
