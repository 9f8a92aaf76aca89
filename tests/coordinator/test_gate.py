from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from anabranch.aggregation.backdoor.calibration import Batch, ModelCalibration
from anabranch.aggregation.backdoor.triggers import TriggerConfig
from anabranch.coordinator.gate import Gate, GateConfig, Scorecard, decide, gate_of
from anabranch.coordinator.scorer import ModelScorer
from anabranch.vectors import Adapter, LoraFactors


def config(**changes: Any) -> GateConfig:
    return GateConfig.model_validate({"scorer": "tests.somewhere:make", **changes})


def test_the_gate_loads_no_torch() -> None:
    code = "import sys, anabranch.coordinator.gate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_as_good_or_a_little_worse_passes() -> None:
    before = Scorecard(0.90, [True] * 9 + [False], {"t/0": 0.2, "t/1": 0.1})
    after = Scorecard(0.88, [True] * 10, {"t/0": 0.1, "t/1": 0.2})
    verdict = decide(config(), before, after)
    assert verdict.passed
    assert verdict.facts["negative_flips"] == 0.0
    assert verdict.facts["positive_flips"] == 0.1
    assert (verdict.facts["asr_class"], verdict.facts["asr"]) == ("t/1", 0.2)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (Scorecard(0.87, [True] * 100, {"t/0": 0.2}), r"falls from 0.9 to 0.87, by more than 0.02"),
        (Scorecard(float("nan"), [True] * 100, {"t/0": 0.2}), "metric is no number"),
        (Scorecard(None, [True] * 100, {"t/0": 0.2}), "metric is no number"),
        (
            Scorecard(0.95, [False] * 6 + [True] * 94, {"t/0": 0.2}),
            r"6 of 100 inputs turn from right to wrong \(6.0%, at most 5.0% may\)",
        ),
        (Scorecard(0.9, [True] * 100, {"t/0": 0.31}), r"trigger for t/0 works on 31.0% .* 20.0%"),
        (Scorecard(0.9, [True] * 100, {"t/0": float("nan")}), "trigger for t/0"),
    ],
)
def test_one_that_is_worse_fails_and_says_how(after: Scorecard, reason: str) -> None:
    verdict = decide(config(), Scorecard(0.9, [True] * 100, {"t/0": 0.2}), after)
    assert not verdict.passed
    (line,) = verdict.reasons
    assert re.search(reason, line), line
    assert verdict.facts["reasons"] == [line]


def test_a_bound_on_triggers_holds_whatever_was_before() -> None:
    cards = Scorecard(asr={"t/0": 0.8}), Scorecard(asr={"t/0": 0.8})
    assert decide(config(), *cards).passed
    assert not decide(config(asr=0.5), *cards).passed


def test_cards_of_other_inputs_are_not_compared() -> None:
    with pytest.raises(ValueError, match="3 inputs were judged before and 2 now"):
        decide(config(), Scorecard(right=[True] * 3), Scorecard(right=[True] * 2))
    with pytest.raises(ValueError, match="search for the same ones"):
        decide(config(), Scorecard(asr={"a": 0.0}), Scorecard(asr={"b": 0.0}))
    with pytest.raises(ValueError, match="looks at nothing"):
        decide(config(), Scorecard(), Scorecard())


class Counting:
    """Scores by the size of B; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, adapter: Adapter) -> Scorecard:
        self.asked += 1
        return Scorecard(metric=float(adapter.lora["m"].b_mr.sum()))


def adapter(value: float) -> Adapter:
    return Adapter({"m": LoraFactors(torch.ones(1, 2), torch.full((1, 1), value), 1.0)})


def test_each_adapter_is_scored_once() -> None:
    scorer = Counting()
    gate = Gate(config(), scorer)
    assert gate.judge(adapter(1.0), adapter(2.0)).passed
    assert scorer.asked == 2
    assert not gate.judge(adapter(2.0), adapter(1.0)).passed
    assert scorer.asked == 3  # 2.0 was the candidate before
    assert gate.judge(adapter(2.0), adapter(3.0)).passed
    assert scorer.asked == 4


def test_a_scorer_is_named_and_has_to_be_one(tmp_path: Path) -> None:
    assert gate_of(None, tmp_path) is None
    with pytest.raises(ValueError, match=r"gate.scorer: nowhere:make cannot be loaded"):
        gate_of(config(scorer="nowhere:make"), tmp_path)
    with pytest.raises(ValueError, match="returned PosixPath, which has no score"):
        gate_of(config(scorer="pathlib:Path"), tmp_path)
    with pytest.raises(ValidationError):
        config(scorer="no function")


def scorer(weight: torch.Tensor, **changes: Any) -> ModelScorer:
    base = nn.Sequential()
    base.add_module("m", nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        base.get_parameter("m.weight").copy_(weight)
    base.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, weight.shape[1], generator=generator)
    labels = (inputs @ weight.T).argmax(1)
    return ModelScorer(
        ModelCalibration(base, {"t": Batch(inputs)}, "own"),
        {"t": Batch(inputs)},
        {"t": labels},
        **changes,
    )


def test_a_model_is_scored_and_a_backdoor_kept_out() -> None:
    """A change that leaves the answers alone and opens the last input, which is always small."""
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    weight[:, -1] = 0.0
    where = {"t": torch.tensor([0.0] * 7 + [1.0])}
    mine = scorer(weight, triggers=TriggerConfig(size=3.0), where=where)
    mine.calibration.examples["t"].inputs_NX[:, -1] *= 0.01  # type: ignore[attr-defined]
    nothing = Adapter({"m": LoraFactors(torch.ones(1, 8), torch.zeros(3, 1), 1.0)})
    last = torch.zeros(1, 8)
    last[0, -1] = 1.0
    backdoor = Adapter({"m": LoraFactors(last, torch.tensor([[500.0], [0.0], [0.0]]), 1.0)})
    clean, evil = mine.score(nothing), mine.score(backdoor)
    assert clean.metric == 1.0
    assert clean.right is not None
    assert all(clean.right)
    assert clean.asr == {"t/0": 0.0, "t/1": 0.0, "t/2": 0.0}
    assert evil.asr is not None
    assert evil.asr["t/0"] > 0.9
    verdict = Gate(config(metric_drop=1.0, negative_flips=1.0), mine).judge(nothing, backdoor)
    assert not verdict.passed
    assert "a searched trigger for t/0" in verdict.reasons[0]


def test_a_scorer_without_labels_is_refused() -> None:
    mine = scorer(torch.eye(3), triggers=None)
    assert mine.score(Adapter({})).asr is None
    with pytest.raises(ValueError, match="of different tasks"):
        ModelScorer(mine.calibration, mine.inputs, {})
    with pytest.raises(ValueError, match="300 inputs and 2 labels"):
        ModelScorer(mine.calibration, mine.inputs, {"t": torch.zeros(2)})
