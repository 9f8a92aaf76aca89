"""What an attack on a merge is: from what colluders see to what they send.

Shape legend: H honest contributions, f colluders, D entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""``rule(everyone_ND) -> merged_D``: what the coordinator does with all contributions."""


class AttackConfig(BaseModel):
    """An attack's parameters. Subclasses add fields, each with a docstring."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True, eq=False)
class View:
    """What colluders see of a round before they send.

    Attributes:
        see_honest: Gives the honest contributions [H, D]; called when an attack first looks, as in
            a federation that costs their training.
        colluders: f, how many send what is crafted.
        entries: D.
        generator: Draws whatever is drawn.
        train_own: Gives what each colluder's own training made [f, D], called likewise; None where
            they do not train.
        previous: How the last round moved the model [D]; None in the first.
        rule: How the coordinator merges, where that is known.
        see_aim: Gives where the rule should come to; None where that is the honest mean.
    """

    see_honest: Callable[[], Tensor]
    colluders: int
    entries: int
    generator: torch.Generator
    train_own: Callable[[], Tensor] | None = None
    previous: Tensor | None = None
    rule: Rule | None = None
    see_aim: Callable[[], Tensor] | None = None

    @cached_property
    def honest(self) -> Tensor:
        """The honest contributions [H, D], fp64."""
        return self.see_honest().double()

    @cached_property
    def own(self) -> Tensor | None:
        """What each colluder's own training made [f, D], fp64."""
        return None if self.train_own is None else self.train_own().double()

    @cached_property
    def mean(self) -> Tensor:
        """Their mean [D], fp64."""
        return self.honest.mean(dim=0)

    @cached_property
    def aim(self) -> Tensor:
        """Where the rule should come to, of as many entries as it gives, fp64."""
        return self.mean if self.see_aim is None else self.see_aim().double()

    @cached_property
    def std(self) -> Tensor:
        """Their standard deviation [D], fp64; of the population, as ALIE's authors take it."""
        return self.honest.std(dim=0, correction=0)

    def noise(self) -> Tensor:
        """One more draw from N(0, 1) [D], fp64."""
        return torch.randn(self.entries, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class Attack:
    """One way to craft what colluders send.

    Attributes:
        name: Name in scenarios.
        config: Its parameters.
        craft: ``craft(view, config) -> sent``: [D] where all send the same, or [f, D]; fp64. What
            colluders see is not to be written to.
        needs_rule: Whether it must know how the coordinator merges.
    """

    name: str
    config: type[AttackConfig]
    craft: Callable[[View, Any], Tensor]
    needs_rule: bool = False

    def __call__(
        self,
        honest_HD: Tensor,
        colluders: int,
        config: AttackConfig | None = None,
        *,
        own_fD: Tensor | None = None,
        previous_D: Tensor | None = None,
        rule: Rule | None = None,
        seed: int = 0,
    ) -> Tensor:
        """What the colluders send beside honest contributions held in memory.

        Args:
            honest_HD: Honest contributions [H, D], finite, H of at least one.
            colluders: f.
            config: The attack's parameters; None takes its defaults.
            own_fD: What the colluders' own training made [f, D], if they train.
            previous_D: How the last round moved the model [D], if there was one.
            rule: How the coordinator merges [H + f, D] to [D], the colluders last.
            seed: Of whatever is drawn.

        Returns:
            What each colluder sends [f, D], in fp32.

        Raises:
            ValueError: Shapes do not fit, an honest entry is not finite, or there is no rule for an
                attack that must know it.
        """
        if honest_HD.ndim != 2 or not honest_HD.shape[0]:
            raise ValueError(
                f"{self.name}: honest contributions have shape {tuple(honest_HD.shape)}; "
                "give [H, D] with H of at least one"
            )
        if not bool(honest_HD.isfinite().all()):
            raise ValueError(f"{self.name}: an honest contribution is not finite; leave it out")
        if colluders < 0:
            raise ValueError(f"{self.name}: {colluders} colluders; give none or more")
        entries = honest_HD.shape[1]
        shapes = {"own_fD": (own_fD, (colluders, entries)), "previous_D": (previous_D, (entries,))}
        for what, (tensor, wanted) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{self.name}: {what} has shape {tuple(tensor.shape)}; give {wanted}"
                )
        view = View(
            see_honest=lambda: honest_HD,
            colluders=colluders,
            entries=entries,
            generator=torch.Generator().manual_seed(seed),
            train_own=None if own_fD is None else lambda: own_fD,
            previous=previous_D,
            rule=rule,
        )
        return self.sent(view, self.config() if config is None else config)

    def sent(self, view: View, config: AttackConfig) -> Tensor:
        """What each colluder sends [f, D] for what they see, in fp32.

        Raises:
            ValueError: The rule is unknown to an attack that must know it.
        """
        if self.needs_rule and view.rule is None:
            raise ValueError(f"{self.name}: it must know how the coordinator merges; give a rule")
        if not view.colluders:
            return torch.empty(0, view.entries)
        sent = self.craft(view, config)
        return sent.expand(view.colluders, view.entries).float().contiguous()
