"""What suspicion looks for and what it does. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Signal = Literal["spectrum", "energy", "factors", "cosine"]
"""``spectrum``: one singular direction holds most of a module's change. ``energy``: the change is
larger than the others'. ``factors``: it sits in few rows or columns, or in B more (or less) than in
A. ``cosine``: it is another's copy, or points against the others."""

SIGNALS: tuple[Signal, ...] = ("spectrum", "energy", "factors", "cosine")

Action = Literal["note", "weigh_down", "mask_module", "exclude", "ask"]
"""``note``: only the report says so. ``weigh_down``: the change is scaled by threshold / score.
``mask_module``: the module is merged without it. ``exclude``: all modules are. ``ask``: the merge
stops and names it, until somebody decides (``allow``, or leaving it out)."""

FEWEST = 4
"""Contributions of which one can be told from the others."""


class SuspicionConfig(BaseModel):
    """Which contributions stand out from the cohort, before the method sees them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    action: Action = "mask_module"
    """What becomes of who is found; of a whole task vector, ``mask_module`` is ``exclude``."""
    actions: dict[Signal, Action] = Field(default_factory=dict)
    """What else becomes of it at some signals."""
    signals: tuple[Signal, ...] = Field(SIGNALS, min_length=1)
    """What is looked for."""
    threshold: float = Field(6.0, gt=0)
    """Robust z-score (distance from the median in median absolute deviations, as standard
    deviations) from which a contribution is found."""
    alike: float = Field(0.95, gt=0, le=1)
    """Cosine from which two task vectors are copies, where most pairs are far from it."""
    allow: tuple[str, ...] = ()
    """Contributions that somebody has looked at and let through: they are only noted."""
