"""Statistics are those of the whole scope, whatever it was cut into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import chunk
from anabranch.aggregation.chunk import Chunk, matrix_shape, recut
from anabranch.aggregation.statistics import Found, Statistic, entries_as_they_are
from anabranch.aggregation.statistics import gather_statistics as gather

ENTRIES = 1200
CUTS = [[ENTRIES], [400, 800], [1, 99, 100, 101, 899], [100] * 12]


def deltas(count: int = 3) -> Tensor:
    return torch.randn(count, ENTRIES, generator=torch.Generator().manual_seed(0))


def cut(deltas_CD: Tensor, sizes: list[int]) -> list[Chunk]:
    parts = deltas_CD.split(sizes, dim=1)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Chunk("m", start, 1, part) for start, part in zip(starts, parts, strict=True)]


def above(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return deltas_CD * (deltas_CD >= found["third_C"][:, None])


STATISTICS = (
    Statistic("total_C", entries_as_they_are, "sum"),
    Statistic("low_C", entries_as_they_are, "min"),
    Statistic("high_C", entries_as_they_are, "max"),
    Statistic("third_C", entries_as_they_are, "kth", lambda config, entries, found: entries // 3),
    Statistic("large_C", entries_as_they_are, "kth_magnitude", lambda config, e, found: config),
    Statistic("above_C", above, "sum"),
)


@pytest.mark.parametrize("sizes", CUTS)
def test_statistics_are_those_of_the_whole(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "PIECE", 100)
    deltas_CD = deltas()
    found = gather(STATISTICS, cut(deltas_CD, sizes), ENTRIES, torch.ones(3), 7)
    ordered_CD = deltas_CD.sort(dim=1, descending=True).values
    assert torch.equal(found["low_C"], ordered_CD[:, -1])
    assert torch.equal(found["high_C"], ordered_CD[:, 0])
    assert torch.equal(found["third_C"], ordered_CD[:, ENTRIES // 3 - 1])
    magnitudes_CD = deltas_CD.abs().sort(dim=1, descending=True).values
    assert torch.equal(found["large_C"], magnitudes_CD[:, 6])
    torch.testing.assert_close(found["total_C"], deltas_CD.double().sum(1))
    best_C = ordered_CD[:, : ENTRIES // 3].double().sum(1)
    torch.testing.assert_close(found["above_C"], best_C)


def test_sums_have_the_same_bits_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "PIECE", 77)
    # Numbers of very different sizes, whose sum depends on what is added first.
    deltas_CD = deltas() * torch.logspace(-12, 12, ENTRIES).roll(500)
    totals = [
        gather(STATISTICS[:1], cut(deltas_CD, sizes), ENTRIES, torch.ones(3), None)["total_C"]
        for sizes in CUTS
    ]
    assert all(torch.equal(total_C, totals[0]) for total_C in totals)


@pytest.mark.parametrize("sizes", CUTS)
def test_recut_pieces_are_the_entries_in_order(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "PIECE", 250)
    pieces = [piece_KL.clone() for piece_KL in recut(deltas().split(sizes, dim=1))]
    assert [piece.shape[1] for piece in pieces] == [250, 250, 250, 250, 200]
    assert torch.equal(torch.cat(pieces, dim=1), deltas())


def test_draws_belong_to_the_place_in_the_module() -> None:
    whole = Chunk("m", 0, 4, deltas())
    later = Chunk("m", 30, 4, deltas()[:, 120:])
    drawn_D = whole.uniform(3, 1, 0, ENTRIES)
    assert torch.equal(later.uniform(3, 1, 10, 50), drawn_D[130:180])
    assert not torch.equal(Chunk("n", 0, 4, deltas()).uniform(3, 1, 0, ENTRIES), drawn_D)
    assert not torch.equal(whole.uniform(3, 2, 0, ENTRIES), drawn_D)


def test_a_vector_is_cut_anywhere_or_nowhere() -> None:
    assert matrix_shape(torch.Size([7])) == (7, 1)
    assert matrix_shape(torch.Size([7]), whole_vectors=True) == (1, 7)
    assert matrix_shape(torch.Size([]), whole_vectors=True) == (1, 1)
    assert matrix_shape(torch.Size([7, 2, 3]), whole_vectors=True) == (7, 6)
