"""When what died is started again: at once, then later and later, then not at all."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.coordinator.supervision.config import RestartConfig


@dataclass(frozen=True)
class Backoff:
    """Starts in a row that gained nothing.

    Attributes:
        config: How fast and how often.
        failures: How many there were.
        gained: What had been gained at the last: rounds that are over, updates admitted.
    """

    config: RestartConfig
    failures: int = 0
    gained: tuple[int, int] = (0, 0)

    def after(self, gained: tuple[int, int]) -> Backoff:
        """The same after one more death, with so much gained in all."""
        failures = 1 if gained > self.gained else self.failures + 1
        return Backoff(self.config, failures, gained)

    @property
    def gives_up(self) -> bool:
        """Whether there were too many."""
        return self.failures > self.config.most

    @property
    def wait_s(self) -> float:
        """Seconds before the next start."""
        if self.failures < 2:
            return 0.0
        return min(self.config.first_s * 2.0 ** (self.failures - 2), self.config.cap_s)
