"""``recipe = "robust"``: what it stands for, by how many contributions may be malicious.

Loads no torch.
"""

from __future__ import annotations

from math import ceil

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from anabranch.aggregation.recipe import ROBUST, PreStep, Recipe, validation_line

MERGES_BY = "geometric_median"
"""The method a robust recipe ends in."""


class RobustConfig(BaseModel):
    """What a robust recipe is told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    f: int | float = 0.2
    """Contributions that may be malicious: a count, or a share of them (rounded up)."""

    @field_validator("f")
    @classmethod
    def _count_or_share(cls, f: int | float) -> int | float:
        if f >= 0 if isinstance(f, int) else 0 < f < 0.5:
            return f
        raise PydanticCustomError("f", "give a count of 0 or more, or a share between 0 and 0.5")

    def malicious(self, count: int) -> int:
        """How many of ``count`` contributions may be.

        Raises:
            ValueError: No rule could withstand so many: the honest ones are no majority.
        """
        # A hair less: 0.2 · 15 is 3.0000000000000004.
        f = self.f if isinstance(self.f, int) else ceil(self.f * count - 1e-9)
        if 2 * f >= count:
            said = f"{f}" if isinstance(self.f, int) else f"{f} ({self.f:g} of them, rounded up)"
            raise ValueError(
                f"{ROBUST}: params.f: {said} malicious of {count} contributions are no minority; "
                f"wait for {2 * f + 1}, or lower f"
            )
        return f


def spelled_out(recipe: Recipe, count: int) -> Recipe:
    """A recipe with ``method = "robust"`` as what it stands for; any other as it is.

    What is far longer than the cohort, and a group that is more alike than the others, are left
    out; the rest is clipped to the median norm, and its geometric median bounds what a minority
    does that looks like everybody: the reasons, and the figures, stand in
    docs/decisions/0031-one-shot-backdoors.md. It is a weighted sum of the contributions, so no ΔW
    is formed. Where none are malicious it is their mean.

    Args:
        recipe: Any.
        count: How many contributions there are.

    Raises:
        ValueError: Parameters it has not, steps beside its own, or malicious ones that are no
            minority.
    """
    if recipe.method != ROBUST:
        return recipe
    if recipe.pre:
        raise ValueError(
            f"pre: {ROBUST} brings its own steps; leave pre out, or name a method in its place"
        )
    try:
        config = RobustConfig.model_validate(recipe.params)
    except ValidationError as error:
        raise ValueError(validation_line(error, ROBUST, "params")) from error
    f = config.malicious(count)
    told = {"f": f}
    # Told of none, mixtures of everybody: all of them are the mean.
    pre: tuple[PreStep, ...] = (PreStep(name="nnm", params=told),)
    if f:
        pre = (
            PreStep(name="oversized"),
            PreStep(name="clip"),
            PreStep(name="alike", params=told),
        )
    return recipe.model_copy(update={"method": MERGES_BY, "params": {}, "pre": pre})
