"""What the gate of a simulated federation of texts can look at: triggers, searched for.

Attackers put words before a text; so that is where a trigger is searched for: added to the
embeddings of a text's first tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch

from anabranch.aggregation.backdoor.triggers import TriggerConfig
from anabranch.client.text import TextClassification
from anabranch.coordinator.scorer import ModelScorer
from anabranch.simulation.calibration import text_calibration, text_tasks
from anabranch.simulation.task import SimulatedTask
from anabranch.simulation.validation import folder_session

TEXT_TRIGGERS = TriggerConfig(steps=12, batch_size=16, learning_rate=0.5)
"""No longer than 0.3 of what it is added to: one as long as the tokens opens any class."""

TRIGGER_TOKENS = 2
"""Tokens after the first, to which a trigger may be added."""


def trigger_scorer(folder: Path) -> ModelScorer:
    """A scorer of a simulated federation's text task: accuracy, right answers and triggers.

    It takes some passes over the model for each label and candidate: seconds to minutes.

    Args:
        folder: A simulated federation's.

    Raises:
        ValueError: The folder names no task that can be loaded, or it is no text task.
    """
    session = folder_session(folder)
    assert isinstance(session.task, SimulatedTask)
    places = text_tasks(session.task.groups, session.task.scored_partitions)
    calibration = text_calibration(session, places)
    assert isinstance(session.task, TextClassification)
    labels_N, where = {}, {}
    for task, place in places.items():
        labels_N[task] = session.task.own_labels(place, "validation")
        where[task] = torch.zeros_like(calibration.examples[task].inputs_NX[0])
        where[task][1 : 1 + TRIGGER_TOKENS] = 1
    return ModelScorer(calibration, calibration.examples, labels_N, TEXT_TRIGGERS, where)
