"""Adapters merged by what unlabelled inputs say of them, back to one adapter.

Shape legend: C contributions, M modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anabranch.aggregation.backdoor.calibration import Calibration
from anabranch.aggregation.backdoor.config import MaskingConfig, check_contract
from anabranch.aggregation.backdoor.dam import Around, Progress, learn
from anabranch.aggregation.backdoor.masking import blend
from anabranch.aggregation.engine.align import balanced_factors
from anabranch.aggregation.engine.cohort import common_base, gather
from anabranch.aggregation.engine.refactor import matrix_rows, streamed_spectrum
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors.adapter import Adapter, LoraFactors, task_vector


@dataclass(frozen=True)
class DataMerge:
    """What came of it.

    Attributes:
        adapter: The merged adapter.
        names: The contributions, in order.
        coefficients: Of each contribution, the mean over modules.
        kept: By module, the share of the mask's entries that are above its mean; empty without one.
        truncation: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F by module: a masked change is of full rank.
        losses: Of each step.
    """

    adapter: Adapter
    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    kept: dict[str, float]
    truncation: dict[str, float]
    losses: tuple[float, ...]


def merge_on_data(
    adapters: Sequence[Adapter],
    config: MaskingConfig,
    calibration: Calibration,
    *,
    start: Adapter | None = None,
    names: Sequence[str] | None = None,
    refactor: Refactor | None = None,
    progress: Progress | None = None,
) -> DataMerge:
    """Merge adapters by a rule that learns on unlabelled inputs; see ``dam``.

    Args:
        adapters: The contributions' adapters, trained from ``start``.
        config: The rule.
        calibration: Model and inputs.
        start: The adapter all of them started from; None stands for the bare base.
        names: What to call the contributions in messages and in the report.
        refactor: The way back to rank r; None takes the largest rank among them.
        progress: Told of every step.

    Raises:
        ValueError: No data may be used, other data than configured, or adapters that cannot be
            merged; in one line.
        RuntimeError: A loss is not finite.
    """
    check_contract(config)
    refactor = refactor or Refactor()
    if refactor.kind == "stack":
        raise ValueError(
            "refactor.kind: stack keeps exact factors, and a masked change has none; set it to svd"
        )
    vectors = [task_vector(adapter, start) for adapter in adapters]
    cohort = gather(vectors, names)
    parts = blend(vectors)
    origin = {} if start is None else {m: one.delta().dense() for m, one in start.lora.items()}
    values = {} if start is None else {name: one.float() for name, one in start.dense.items()}
    learned = learn(parts, config, Around(calibration, origin, values), progress)
    like = adapters[0] if start is None else start
    lora: dict[str, LoraFactors] = {}
    truncation: dict[str, float] = {}
    for module in sorted(like.lora):
        total = learned.changes[module]
        if module in origin:
            total = total + origin[module]
        inputs = [*adapters, *([] if start is None else [start])]
        rank = refactor.rank or max(adapter.lora[module].rank for adapter in inputs)
        m, n = total.shape
        found = streamed_spectrum(matrix_rows(total), (m, n), rank, module, total.device)
        lora[module] = balanced_factors(
            found,
            rank,
            like.lora[module],
            name=module,
            start=None if start is None else start.lora[module],
            align=refactor.align,
        )
        truncation[module] = found.residual / found.norm if found.norm else 0.0
    dense: dict[str, Tensor] = {}
    if start is not None:
        for name, before in start.dense.items():
            dense[name] = (before.float() + learned.changes[name]).to(before.dtype)
    base_hash = cohort.base_hash
    if start is not None:
        base_hash = common_base([base_hash, start.base_hash], [cohort.names[0], "the start"])
    return DataMerge(
        adapter=Adapter(lora, dense, base_hash, like.peft),
        names=cohort.names,
        coefficients=tuple(learned.coefficients_MC.mean(0).tolist()),
        kept={m: float((mask > 1).float().mean()) for m, mask in learned.masks.items()},
        truncation=truncation,
        losses=tuple(learned.losses),
    )
