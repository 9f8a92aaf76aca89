"""When a round may close and what becomes of late updates, as configuration. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RoundPolicy(BaseModel):
    """How a round collects, beside the federation's ``quorum`` and ``deadline_s``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quorum_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the clients asked whose updates a round needs, where that is above ``quorum``."""
    close_at: int | None = Field(None, ge=1)
    """Admitted updates at which a round closes without waiting for the other clients it asked:
    over-selection, or with ``stragglers = "carry"`` a merge of every so many (FedBuff, 2106.06639).
    None waits for all."""
    progress_s: float = Field(0.0, ge=0)
    """Seconds that an admitted update leaves the others at least: the deadline moves while updates
    still arrive. 0 keeps it where it is."""
    deadline_cap_s: float | None = Field(None, gt=0)
    """Seconds beyond which no progress moves the deadline; None takes twice ``deadline_s``."""
    stragglers: Literal["drop", "carry"] = "drop"
    """What becomes of an update that comes after its round has closed: refused, or merged in the
    round that is open then, at less weight. Until it has come its client is not asked again."""
    max_staleness: int = Field(4, ge=1)
    """Published rounds after which a carried update is too old, and its client is asked again."""
    staleness_exponent: float = Field(0.5, ge=0)
    """a in the weight (1 + published rounds between)^-a of a carried update; 0 weighs all alike."""

    def latest_s(self, deadline_s: float) -> float:
        """Seconds after which no progress moves a round's deadline any more."""
        return self.deadline_cap_s or 2 * deadline_s

    def answers_until_s(self, deadline_s: float) -> float:
        """Seconds in which an order may still be answered; a carried update has more rounds."""
        rounds = 1 + (self.max_staleness if self.stragglers == "carry" else 0)
        return rounds * self.latest_s(deadline_s)
