"""What the quality benchmark merges: one adapter per task and seed, trained once and kept.

Everything lies in a folder named by all that decides it, so that a stopped run goes on and a
changed setting never meets old adapters.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from anabranch.client.app import client_seed
from anabranch.client.lora import read_adapter, write_adapter
from anabranch.client.session import Session, open_session
from anabranch.client.task import TrainPlan
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter, seeded_start


@dataclass(frozen=True)
class Setting:
    """All that decides what comes out.

    Attributes:
        name: For people; begins the folder's name.
        task: A ``SimulatedTask`` with one client per group, as ``module:Class``.
        params: Its parameters, less the seed.
        steps: Training steps per adapter.
        batch_size: Texts per step.
        learning_rate: Of the factors.
        seeds: One repetition each: of the start, the order of the texts, and which are drawn.
    """

    name: str
    task: str
    params: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    seeds: tuple[int, ...]

    def folder(self, runs: Path, seed: int) -> Path:
        """Where a seed's adapters and scores are kept."""
        decides = {**asdict(self), "name": None, "seeds": None}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return runs / f"{self.name}-{digest[:8]}" / f"seed-{seed}"


def log(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def open_seed(setting: Setting, seed: int) -> Session:
    """The tasks of one repetition: its own draw of training, validation and test texts."""
    return open_session(setting.task, json.dumps({**setting.params, "data_seed": seed}))


def trained(
    setting: Setting,
    session: Session,
    seed: int,
    runs: Path,
    groups: Collection[str] | None = None,
) -> dict[str, Adapter]:
    """One adapter per group, all from the same start A₀; those that are kept are read.

    Args:
        setting: How they are trained.
        session: The tasks.
        seed: Of the start and of the order of the texts.
        runs: Folder of all settings.
        groups: Which groups'; None: all.
    """
    task = session.task
    assert isinstance(task, SimulatedTask)
    start = seeded_start(session.template, seed)
    adapters = {}
    for group, partition in task.scored_partitions.items():
        if groups is not None and group not in groups:
            continue
        path = setting.folder(runs, seed) / f"{group.replace('/', '-')}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            plan = TrainPlan(
                steps=setting.steps,
                batch_size=setting.batch_size,
                learning_rate=setting.learning_rate,
                seed=client_seed(seed, 0, group),
            )
            write_adapter(session.model, start)
            loss = task.train(session.model, partition, plan)["train-loss"]
            tensors = read_adapter(session.model, session.base_hash).tensors()
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".part")
            save_file(tensors, scratch)
            scratch.replace(path)
            took = time.perf_counter() - began
            log(f"seed {seed}: trained {group} in {took:.0f} s, mean loss {loss:.3f}")
        adapters[group] = start.with_tensors(load_file(path))
    return adapters
