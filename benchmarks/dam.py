"""Backdoored merges of real adapters: DAM beside what it is compared with in its paper.

Adapters of several text tasks, from one pretrained base, one of them backdoored with rare tokens,
are merged by each rule. What learns, learns on unlabelled validation texts; λ is chosen on their
labels, which rules that learn never see; accuracy and the trigger's success are those of test
texts. Every rule that learns takes as many steps: a fraction of the released ones, at a rate as
much higher.

Adapters and cells are kept under ``runs/dam``: a stopped run goes on where it was. The full result
also writes ``docs/backdoor.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.backdoor.config import MaskingConfig
from anabranch.aggregation.backdoor.dam import Around, learn
from anabranch.aggregation.backdoor.masking import blend
from anabranch.simulation.attacks.poison import Poison
from anabranch.vectors import Adapter, task_vector
from anabranch.vectors.task_vector import held
from benchmarks.dam_cohort import Attacked, Cohort, Found
from benchmarks.harness import Row, main
from benchmarks.quality_adapters import Setting, log

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "dam"

UNATTACKED, AVERAGE, ARITHMETIC = "nobody malicious, WAG", "WAG", "task arithmetic"
SCALES = (0.3, 0.5, 0.8, 1.2)
"""λ of the sum, tried on validation accuracy; 0.3 is the paper's."""
TIES_SCALES = (1.0, 1.5, 2.5)
"""λ of TIES's mean of survivors, tried likewise."""
RELEASED_STEPS = 1000
EMBEDDED = 0.06
"""Root mean square entry of the model's token embeddings: the released step of perturbations is for
pixels, whose entries are about 1."""


@dataclass(frozen=True)
class Plan:
    """All that decides the result.

    Attributes:
        attacked: The adapters.
        seeds: Repetitions.
        mask_steps: Steps of the masks, of the 1,000 that were released.
        coefficient_steps: Steps of the coefficients after that, of as many.
        batch_size: Texts of each task in a step.
        threads: Of torch; bits depend on it.
    """

    attacked: Attacked
    seeds: tuple[int, ...]
    mask_steps: int
    coefficient_steps: int
    batch_size: int
    threads: int = 1

    def rules(self) -> dict[str, MaskingConfig]:
        """What learns, by name."""
        mask, coefficient = (
            RELEASED_STEPS / steps for steps in (self.mask_steps, self.coefficient_steps)
        )
        released = {
            "data": "own",
            "split": "validation",
            "mask_steps": self.mask_steps,
            "coefficient_steps": self.coefficient_steps,
            "batch_size": self.batch_size,
            # As far in fewer steps.
            "mask_lr": 1e-3 * mask,
            "perturbation_lr": 1e-4 * mask * EMBEDDED,
            "coefficient_lr": 1e-3 * coefficient,
        }
        ours = {
            **released,
            "wanted": "consistency",
            "inner_lr": 0.0,
            "perturbation_weight": 1.0,
            # 0.3 of a text's norm, as far as the gate's search for triggers goes.
            "perturbation_norm": 0.3 * EMBEDDED * (24 * 384) ** 0.5,
            "perturbation_lr": 0.05 * EMBEDDED,
        }
        given = {
            "AdaMerging": {**released, "rule": "adamerging"},
            "Concrete": {**released, "rule": "concrete"},
            "DAM, consistency (ours)": {**ours, "rule": "dam"},
            "DAM, as released": {**released, "rule": "dam"},
            "DAM, two masks": {**released, "rule": "dam_two_masks"},
        }
        return {name: MaskingConfig.model_validate(one) for name, one in given.items()}


PARAMS = {
    "datasets": ("bbc", "sentiment", "text-kind", "health"),
    "clients_per_dataset": 1,
    "max_length": 24,
    "validation_examples": 64,
    "test_examples": 200,
}
FULL = Plan(
    Attacked(
        Setting(
            "four-tasks", "anabranch.simulation.partitioned_text:PartitionedText",
            PARAMS, steps=40, batch_size=16, learning_rate=2e-3, seeds=(1, 2),
        ),
        victim="bbc", poison=Poison(trigger=("cf", "mn"), target=0), enlarged=1.0,
    ),
    seeds=(1, 2), mask_steps=40, coefficient_steps=20, batch_size=4,
)  # fmt: skip
QUICK = Plan(
    Attacked(
        Setting(
            "quick", FULL.attacked.setting.task,
            {**PARAMS, "datasets": ("bbc", "text-kind"), "validation_examples": 8,
             "test_examples": 20},
            steps=2, batch_size=8, learning_rate=2e-3, seeds=(1,),
        ),
        victim="bbc", poison=Poison(trigger=("cf", "mn"), target=0), enlarged=1.0,
    ),
    seeds=(1,), mask_steps=1, coefficient_steps=1, batch_size=2,
)  # fmt: skip


class Cells:
    """What was measured, kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known: dict[str, Found] = {row.pop("of"): row for row in map(json.loads, lines)}

    def found(self, of: str, measure: Callable[[], Found]) -> Found:
        """A cell; one that is kept is not measured again."""
        if of not in self._known:
            began = time.process_time()
            found = measure()
            found["cpu_seconds"] = time.process_time() - began
            self._known[of] = found
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps({"of": of, **found}) + "\n")
            log(f"{of}: accuracy {found['acc']:.1f}, success {found.get('asr', float('nan')):.1f}")
        return self._known[of]


def summed(adapters: Sequence[Adapter], scale: float) -> dict[str, Tensor]:
    """λ·Σ ΔW by module."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for module, factors in adapter.lora.items():
            change = factors.delta().dense() * scale
            found[module] = found[module] + change if module in found else change
    return found


def ties(adapters: Sequence[Adapter], scale: float) -> dict[str, Tensor]:
    """TIES of ΔW at its default density, times λ."""
    merged = merge_task_vectors([task_vector(one) for one in adapters], Recipe(method="ties"))
    dense = {}
    for module, delta in merged.deltas.items():
        part = held(delta)
        dense[module] = scale * (part if isinstance(part, Tensor) else part.dense())
    return dense


def learned(cohort: Cohort, config: MaskingConfig) -> dict[str, Tensor]:
    """What a rule that learns makes of the cohort, whole: not brought back to its rank."""
    parts = blend([task_vector(one) for one in cohort.adapters])
    return dict(learn(parts, config, Around(cohort.calibration)).changes)


def chosen(
    cells: Cells, cohort: Cohort, name: str, scales: Sequence[float],
    merged: Callable[[Sequence[Adapter], float], dict[str, Tensor]],
) -> Found:  # fmt: skip
    """A merge at the λ that is best on validation texts; the first of equals."""

    def on_validation(scale: float) -> float:
        def look() -> Found:
            return cohort.score(merged(cohort.adapters, scale), "validation")

        return cells.found(f"{name}, λ {scale:g}, validation", look)["acc"]

    best = max(scales, key=on_validation)

    def test() -> Found:
        return {**cohort.score(merged(cohort.adapters, best)), "scale": best}

    return cells.found(name, test)


def repetition(
    plan: Plan, seed: int, runs: Path, wanted: str | None
) -> Iterator[tuple[str, Found]]:
    """Every rule on one seed's cohort."""
    cohort = Cohort(plan.attacked, seed, runs)
    kept = plan.attacked.setting.folder(runs, seed) / f"cells-x{plan.attacked.enlarged:g}.jsonl"
    cells, count = Cells(kept), len(cohort.tasks)
    clean = list(cohort.clean.values())
    plain: dict[str, Callable[[], Found]] = {
        "zero-shot": lambda: cohort.score({}),
        "malicious adapter alone": lambda: cohort.score(summed([cohort.malicious], 1.0)),
        UNATTACKED: lambda: cohort.score(summed(clean, 1 / count)),
        AVERAGE: lambda: cohort.score(summed(cohort.adapters, 1 / count)),
    }
    for name, look in plain.items():
        yield name, cells.found(name, look)
    yield ARITHMETIC, chosen(cells, cohort, ARITHMETIC, SCALES, summed)
    yield "TIES", chosen(cells, cohort, "TIES", TIES_SCALES, ties)
    for name, config in plan.rules().items():
        if wanted is None or wanted in name:
            made = json.dumps(config.model_dump(mode="json"), sort_keys=True)

            def look_at(config: MaskingConfig = config) -> Found:
                return cohort.score(learned(cohort, config))

            yield name, cells.found(f"{name} {made}", look_at)


def der(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Defence effectiveness rate, in percent: half of what success falls less what accuracy falls.

    Args:
        before: ``acc`` and ``asr`` without the defence, in percent.
        after: With it.
    """
    success = max(0.0, before["asr"] - after["asr"])
    accuracy = max(0.0, before["acc"] - after["acc"])
    return (success - accuracy + 100.0) / 2


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """A row per rule: the trigger's success, means over seeds."""
    plan = QUICK if quick else FULL
    torch.set_num_threads(plan.threads)
    found: dict[str, list[Found]] = {}
    for seed in plan.seeds:
        for name, cell in repetition(plan, seed, RUNS, only):
            found.setdefault(name, []).append(cell)
    scenario = f"{len(PARAMS['datasets'])} tasks, {len(plan.seeds)} seeds"  # type: ignore[arg-type]
    for name, several in found.items():
        detail = {
            "asr": [one["asr"] for one in several],
            "acc": [one["acc"] for one in several],
            "acc_victim": [one[f"acc {plan.attacked.victim}"] for one in several],
            "der": [der(one, two) for one, two in zip(found[ARITHMETIC], several, strict=False)],
            "cpu_seconds": [one["cpu_seconds"] for one in several],
            "scale": [one["scale"] for one in several if "scale" in one],
            "plan": asdict(plan)["attacked"]["setting"]["params"],
        }
        success = fmean(detail["asr"])
        yield Row(name, success, None, "", scenario, "success of the trigger, %", detail=detail)


if __name__ == "__main__":
    kept = main("dam", measure)
    if kept is not None:
        from benchmarks.dam_page import write_page

        write_page(kept, FULL, ROOT / "docs" / "backdoor.md")
