"""Block C in several rounds: every cell a federation of its own, attacked in each of them.

It costs the training of all clients for every cell, so it is for the rows somebody asks for
(``--rounds N --only RULE``): does what one round shows hold when rounds add up?
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.simulation.attacks.turn import poisoned
from anabranch.simulation.baselines import score
from anabranch.simulation.federation import run_federation
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario
from anabranch.vectors.peft_folder import read_adapter
from benchmarks.scoreboard.adapters import ATTACKS, Setting, band, wanted
from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.rules import RECIPES
from benchmarks.scoreboard.vectors import NONE, ORACLE


def scenario(setting: Setting, cell: Cell) -> Scenario:
    """The federation of a cell."""
    attackers = []
    if cell.f:
        # What the oracle's attackers send is refused, so that the honest ones are merged alone.
        told = {"kind": "lying_manifest", "count": cell.f}
        if cell.rule != ORACLE:
            told = band(cell.attack, cell.f).model_dump(exclude_none=True)
        attackers = [told]
    recipe = "mean" if cell.rule == ORACLE else cell.rule
    return Scenario.model_validate(
        {
            "name": "scoreboard",
            "seed": cell.seed,
            "rounds": setting.rounds,
            "quorum": setting.clients - cell.f if cell.rule == ORACLE else setting.clients,
            "evaluate_every": 0,
            "task": {
                **setting.task, setting.clients_key: setting.clients, "data_seed": cell.seed,
            },
            "train": {**setting.train, "steps": setting.steps},
            "codec": {"name": "dense", "feedback": 0.0},
            "recipe": dict(RECIPES[recipe](cell.declared)),
            "attackers": attackers,
        }
    )  # fmt: skip


def measure_rounds(setting: Setting, cell: Cell) -> Found:
    """Final accuracy and success of one cell, in percent; of the oracle that of every trigger.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    one = scenario(setting, cell)
    session = prepare(one)
    with tempfile.TemporaryDirectory(prefix="anabranch-scoreboard-") as name:
        folder = Path(name)
        run_federation(one, folder, session)
        merged = read_adapter(folder / ADAPTER_FOLDER)
    groups = score(session, merged)[setting.split]
    found: Found = {"acc": 100 * fmean(group["accuracy"] for group in groups.values())}

    def success(name: str) -> float:
        task: Any = poisoned(session.task, wanted(name, max(1, cell.f)))
        rates = [
            task.evaluate(session.model, partition, setting.split)["accuracy"]
            for partition in task.scored_partitions.values()
        ]
        return 100 * fmean(rates)

    if cell.rule != ORACLE:
        return {**found, "asr": success(cell.attack)}
    return found | {name: success(name) for name in (NONE, *ATTACKS)}
