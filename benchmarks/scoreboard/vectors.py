"""Block A: rules and attacks on vectors, nothing trained.

A cell is κ̂ = ‖R − μ_H‖² / mean ‖x_i − μ_H‖² for the rule's result R, the honest contributions x_i
and their mean μ_H: how far the result is from what the honest ones alone would give, in their own
spread. 0 is the oracle; a rule with κ̂ of at most κ whatever the rest sends is (f, κ)-robust
(Allouah et al., 2302.01772), and no rule has a κ below f / (n − 2f).

Shape legend: C contributions, H honest ones, f attackers, K directions, D entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from anabranch.simulation.attacks import BUILT_IN
from anabranch.simulation.attacks.attack import Attack, AttackConfig
from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.rivals import byzfl_rules, flower_rules
from benchmarks.scoreboard.rules import OURS, RECIPES, Rule, our_rules

ORACLE, NONE = "honest-only oracle", "none"
MEASURED = "kappa"

ATTACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sign flip": ("sign_flip", {}),
    "ALIE 1.5": ("alie", {"z": 1.5}),
    "IPM 0.1": ("ipm", {"epsilon": 0.1}),
    "IPM 2": ("ipm", {"epsilon": 2.0}),
    "Min-Max": ("min_max", {}),
    "Min-Sum": ("min_sum", {}),
    "Mimic": ("mimic", {}),
    # Against the rule itself, with the f it was told: some thirty calls of it.
    "adaptive": ("adaptive", {"points": 6, "refinements": 2}),
}
"""Kind and parameters by name."""


@dataclass(frozen=True)
class Setting:
    """What is drawn, and which cells there are.

    Attributes:
        contributions: n, attackers among them.
        entries: d.
        mean: ‖μ‖ in honest spreads: at 1 two honest contributions have a cosine of a half.
        directions: In how many directions the honest disagree in common; Mimic needs some.
        shared: Share of their squared spread that lies in those; the rest is in all directions.
        attackers: How many attack, and the rule is told so.
        misjudged: (attack, declared): rules of ours that are told f are told otherwise.
        seeds: Repetitions.
    """

    contributions: int = 20
    entries: int = 10_000
    mean: float = 1.0
    directions: int = 4
    shared: float = 0.5
    attackers: tuple[int, ...] = (0, 2, 4, 6, 9)
    misjudged: tuple[tuple[int, int], ...] = ((0, 4), (2, 4), (6, 4))
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def drawn(self) -> dict[str, Any]:
        """What a cell depends on besides its name."""
        names = ("contributions", "entries", "mean", "directions", "shared")
        return {**{name: asdict(self)[name] for name in names}, "attacks": dict(ATTACKS)}

    def pairs(self, rule: str) -> list[tuple[int, int]]:
        """(attack, declared) for a rule; one that is not told f has no other cell to misjudge."""
        told = rule in RECIPES and any(
            RECIPES[rule](declared) != RECIPES[rule](f) for f, declared in self.misjudged
        )
        return [*((f, f) for f in self.attackers), *(self.misjudged if told else ())]


FULL = Setting()


def cells(setting: Setting, rules: Sequence[str]) -> list[Cell]:
    """All cells of these rules, seed after seed."""
    return [
        Cell(rule, attack, f, declared, seed)
        for seed in setting.seeds
        for rule in rules
        for f, declared in setting.pairs(rule)
        for attack in (ATTACKS if f else (NONE,))
    ]


def honest(setting: Setting, count: int, seed: int) -> Tensor:
    """Honest contributions [H, D]: one mean, few directions they disagree in, noise in all.

    The mean squared distance from the mean they are drawn around is 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean_D = normal(setting.entries)
    mean_D *= setting.mean / mean_D.norm()
    axes_KD = torch.linalg.qr(normal(setting.entries, setting.directions)).Q.T
    along_HK = normal(count, setting.directions) * (setting.shared / setting.directions) ** 0.5
    noise_HD = normal(count, setting.entries) * ((1 - setting.shared) / setting.entries) ** 0.5
    drawn_HD: Tensor = (mean_D + along_HK @ axes_KD + noise_HD).float()
    return drawn_HD


@lru_cache(maxsize=16)
def _honest(setting: Setting, count: int, seed: int) -> Tensor:
    return honest(setting, count, seed)


def _attack(name: str) -> tuple[Attack, AttackConfig]:
    kind, params = ATTACKS[name]
    attack = next(one for one in BUILT_IN if one.name == kind)
    return attack, attack.config(**params)


def sent(
    setting: Setting,
    name: str,
    f: int,
    seed: int,
    *,
    rule: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What the attackers send [f, D]; ``rule`` for those that must know it."""
    attack, config = _attack(name)
    honest_HD = _honest(setting, setting.contributions - f, seed)
    return attack(honest_HD.clone(), f, config, rule=rule, seed=seed)


_sent = lru_cache(maxsize=64)(sent)
"""What does not depend on the rule is the same for all of them."""


@cache
def rules() -> dict[str, Rule]:
    """Every row but the oracle's, by what it is called in cells: whose code, and which rule."""
    every = [*our_rules(), *flower_rules(), *byzfl_rules()]
    return {row_name(rule): rule for rule in every}


def row_name(rule: Rule) -> str:
    """Ours by name; a rival's with whose it is."""
    return rule.name if rule.whose == OURS else f"{rule.whose.split()[0]}: {rule.name}"


def kappa(merged_D: Tensor, honest_HD: Tensor) -> float:
    """κ̂, in fp64."""
    wide_HD = honest_HD.double()
    mean_D = wide_HD.mean(dim=0)
    spread = (wide_HD - mean_D).square().sum(dim=1).mean()
    return float((merged_D.double() - mean_D).square().sum() / spread)


def measure(setting: Setting, cell: Cell) -> Found:
    """κ̂ of one cell.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    honest_HD = _honest(setting, setting.contributions - cell.f, cell.seed)
    if cell.rule == ORACLE:
        return {MEASURED: kappa(honest_HD.double().mean(dim=0), honest_HD)}
    merge = rules()[cell.rule].merge

    def rule(everyone_CD: Tensor) -> Tensor:
        return merge(everyone_CD, cell.declared)

    sent_fD = torch.empty(0, setting.entries)
    if cell.attack != NONE:
        blind = not _attack(cell.attack)[0].needs_rule
        make = _sent if blind else partial(sent, rule=rule)
        sent_fD = make(setting, cell.attack, cell.f, cell.seed)
    # A copy: some rules change what they are given.
    merged_D = rule(torch.cat([honest_HD, sent_fD]))
    if not bool(merged_D.isfinite().all()):
        raise ValueError(f"{cell.rule}: the result is not finite")
    return {MEASURED: kappa(merged_D, honest_HD)}
