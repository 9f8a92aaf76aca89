"""How a federation hides single updates from its coordinator, as configuration. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from anabranch.aggregation.recipe import Recipe
from anabranch.wire.config import CodecConfig
from anabranch.wire.plan import Trains


class SecureConfig(BaseModel):
    """Secure aggregation: the coordinator gets sums over groups of clients."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    threshold: float = Field(2 / 3, ge=0.5, lt=1)
    """More than this share of a group must stay to the end, or nothing of it is opened. With 1/2 a
    coordinator learns no single update by itself; with 2/3, as Bonawitz et al. ask for, neither
    does one that nearly a third of the clients help."""
    group: int | None = Field(None, ge=3)
    """Fewest clients of a random group; each group's mean is then one contribution to the merge, by
    any method. None: one group of all, and a method that needs only their sum."""
    clip: float = Field(4.0, gt=0, le=1e6)
    """Largest magnitude of an entry of an update. What is beyond is cut off, and owed to the next
    round where there is error feedback."""
    bits: Literal[32, 64] = 32
    """Width of the integers that entries become: bytes of an entry on its way, times 8."""
    phase_s: float = Field(60.0, gt=0)
    """Seconds that each of the four phases beside training waits for replies."""

    def contributions(self, clients: int) -> int:
        """What so many clients' updates come to in the merge: their groups."""
        return max(1, clients // self.group) if self.group else 1


def why_not_secure(
    secure: SecureConfig,
    *,
    signed: bool,
    max_norm: float | None,
    codec: CodecConfig,
    recipe: Recipe,
    trains: Trains,
    ranks: object,
    rest: str,
    privacy: object,
) -> str | None:
    """Why sums are not enough for these settings; None if they are."""
    if not signed:
        return "set signed = true: members know each other by their keys"
    if codec.name != "dense" or codec.dtype != "fp32":
        return 'set codec = { name = "dense" }: masks hide integers, one for each entry'
    if max_norm is not None:
        return "max_norm looks at single updates, which nobody sees; leave it out"
    if privacy is not None:
        return "privacy clips single updates, which nobody sees; leave one of the two out"
    if ranks:
        return "clients of several ranks have no common sum; leave ranks out"
    if rest != "drop":
        return f'"{rest}" keeps a rest of single updates, which nobody sees; leave rest out'
    if recipe.method == "fisher":
        return "importance would travel beside the masks; set recipe.method to another"
    if secure.group is not None:
        return None
    linear = "fedit" if trains == "both" else "mean"
    if recipe.method != linear:
        return (
            f'recipe.method = "{recipe.method}" needs more than the sum of what travels; set it to '
            f'"{linear}", or secure.group to the fewest clients of a group'
        )
    if recipe.pre or recipe.modules or recipe.suspicion:
        return (
            "recipe.pre, recipe.modules and recipe.suspicion look at single updates; leave them "
            "out, or set secure.group to the fewest clients of a group"
        )
    return None
