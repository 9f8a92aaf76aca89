"""What becomes of suspicious contributions: who is merged in which module, and how large.

Shape legend: C contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.aggregation.backdoor.config import SuspicionConfig
from anabranch.aggregation.backdoor.suspicion import Finding, Suspicion


class SuspicionError(ValueError):
    """Somebody must decide about a contribution before the merge goes on."""


@dataclass(frozen=True)
class Consequences:
    """Factors on the contributions' changes.

    Attributes:
        names: The contributions.
        factors: Of each in a module that has a table of its own here, by position; 0: left out.
        elsewhere: The same in all other modules.
        findings: What was found, with what was done.
    """

    names: tuple[str, ...]
    factors: dict[str, tuple[float, ...]]
    elsewhere: tuple[float, ...]
    findings: tuple[Finding, ...]

    def of(self, module: str) -> tuple[float, ...]:
        """Factors on the changes of one module [C]."""
        return self.factors.get(module, self.elsewhere)


def consequences(
    suspicion: Suspicion, names: Sequence[str], config: SuspicionConfig
) -> Consequences:
    """What the policy says, for fewer than half of the contributions: the most suspicious.

    If half of a cohort stood out, its median would not be what is usual; the others are noted.

    Args:
        suspicion: What was found.
        names: The contributions.
        config: The policy.

    Raises:
        SuspicionError: The policy is to ask.
    """
    asking = [one for one in suspicion.findings if one["action"] == "ask"]
    if asking:
        first = asking[0]
        more = f" (and {len(asking) - 1} more findings)" if len(asking) > 1 else ""
        raise SuspicionError(
            f"suspicion: {first['client']}: {first['why']}{more}; "
            "look at it, then name it in suspicion.allow or leave it out"
        )
    pairs = list(zip(suspicion.rows, suspicion.findings, strict=True))
    acted = list(dict.fromkeys(row for row, one in pairs if one["action"] != "note"))
    those = acted[: (len(names) - 1) // 2]
    pairs = [
        (row, one if row in those else Finding(**{**one, "action": "note"})) for row, one in pairs
    ]
    elsewhere = [1.0] * len(names)
    for row, one in pairs:
        if one["module"] is None or one["action"] == "exclude":
            elsewhere[row] = min(elsewhere[row], _factor(one, config))
    factors: dict[str, list[float]] = {}
    for row, one in pairs:
        if one["module"] is not None and one["action"] not in ("note", "exclude"):
            mine = factors.setdefault(one["module"], list(elsewhere))
            mine[row] = min(mine[row], _factor(one, config))
    findings = tuple(one for _, one in pairs)
    tables = {module: tuple(mine) for module, mine in factors.items()}
    return Consequences(tuple(names), tables, tuple(elsewhere), findings)


def _factor(finding: Finding, config: SuspicionConfig) -> float:
    if finding["action"] == "note":
        return 1.0
    if finding["action"] == "weigh_down":
        return config.threshold / finding["score"]
    return 0.0
