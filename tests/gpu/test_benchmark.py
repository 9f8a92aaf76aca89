"""The benchmark runs on what is there; its figures mean something on a GPU only."""

from __future__ import annotations

import torch
from benchmarks.gpu import COPY, FUSED, rows


def test_every_fused_rule_is_set_beside_a_copy(device: torch.device) -> None:
    found = list(rows(device, 40, 3, 2, 1))
    beside_a_copy = [row for row in found if row.rival_name == COPY]
    assert {row.what for row in beside_a_copy if row.most} == {"mean", *FUSED}
    for row in beside_a_copy:
        assert row.detail is not None
        assert row.ratio is not None
        assert abs(row.detail["copy_fraction"] * row.ratio - 1) < 1e-9
