"""How long each phase of a run took, and the scores it gave, kept so that a run can go on."""

from __future__ import annotations

import json
import time
from pathlib import Path

from anabranch.simulation.baselines import Scores


class Phases:
    """Seconds per phase and scores per adapter, kept in a file so that a run can go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.phases: dict[str, float] = held.get("phases", {})
        self.scores: dict[str, Scores] = held.get("scores", {})

    def phase(self, name: str) -> _Timer:
        """Add the time of a ``with`` block to a phase's, and save."""
        return _Timer(self, name)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"phases": self.phases, "scores": self.scores}, indent=2))
        partial.replace(self._path)


class _Timer:
    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        spent = self._phases.phases.get(self._name, 0.0) + time.perf_counter() - self._began
        self._phases.phases[self._name] = spent
        self._phases.save()
