"""The benchmark of backdoored merges: its arithmetic, and what it keeps and tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import dam
from benchmarks.dam_page import verdict, write_page

from anabranch.vectors import Adapter, LoraFactors


def adapters() -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Adapter({
            "m": LoraFactors(
                torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 2.0
            )
        })
        for _ in range(3)
    ]  # fmt: skip


def test_der_is_that_of_the_papers() -> None:
    before = {"asr": 90.0, "acc": 80.0}
    assert dam.der(before, {"asr": 10.0, "acc": 79.0}) == pytest.approx((80 - 1 + 100) / 2)
    assert dam.der(before, before) == 50.0
    # What rises does not count in its favour.
    assert dam.der(before, {"asr": 95.0, "acc": 85.0}) == 50.0


def test_merges_are_sums_of_whole_changes() -> None:
    cohort = adapters()
    wanted = sum(0.5 * one.lora["m"].b_mr @ one.lora["m"].a_rn for one in cohort)
    torch.testing.assert_close(dam.summed(cohort, 0.5)["m"], wanted)
    once, twice = dam.ties(cohort, 1.0)["m"], dam.ties(cohort, 2.0)["m"]
    torch.testing.assert_close(twice, 2 * once)
    # TIES keeps a fifth of each by size: at most three fifths have a survivor.
    assert 0.2 <= float((once != 0).float().mean()) <= 0.6


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    asked = []

    def measure() -> dict[str, float]:
        asked.append(1)
        return {"acc": 1.0, "asr": 2.0}

    first = dam.Cells(tmp_path / "cells.jsonl").found("WAG", measure)
    again = dam.Cells(tmp_path / "cells.jsonl").found("WAG", measure)
    assert asked == [1]
    assert again == first


def test_rules_go_as_far_in_fewer_steps_and_never_see_test_texts() -> None:
    for plan in (dam.FULL, dam.QUICK):
        for config in plan.rules().values():
            assert config.data == "own"
            assert config.split == "validation"
            assert config.mask_lr * config.mask_steps == pytest.approx(1.0)
            assert config.coefficient_lr * config.coefficient_steps == pytest.approx(1.0)
    rules = dam.FULL.rules()
    assert rules["DAM, as released"].wanted == "entropy"
    assert rules["DAM, consistency (ours)"].wanted == "consistency"
    assert rules["DAM, two masks"].rule == "dam_two_masks"


def test_the_page_says_what_was_claimed_and_what_came_out(tmp_path: Path) -> None:
    def row(what: str, asr: float, acc: float) -> dict[str, Any]:
        given = {"asr": [asr, asr + 2], "acc": [acc, acc], "acc_victim": [acc, acc]}
        return {"what": what, **given, "der": [60.0, 62.0], "scale": [], "cpu_seconds": [1.0, 3.0]}

    rows = [
        row("zero-shot", 5, 50), row("WAG", 60, 70), row("task arithmetic", 80, 75),
        row("DAM, as released", 55, 69),
    ]  # fmt: skip
    write_page({"rows": rows}, dam.FULL, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| WAG | 61.0 (60.0, 62.0) | 70.0 (70.0, 70.0) |" in page
    assert "| *zero-shot* |" in page
    assert "means over 2 seeds" in page
    (said,) = verdict({one["what"]: one for one in rows})
    assert said.startswith("**DAM, as released: -5.0 points of success and -1.0 of accuracy**")
    assert "beside WAG" in said
    assert said in page.replace("\n", " ")
