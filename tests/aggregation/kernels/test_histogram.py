"""The exact k-th by counting in kernels, against a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import magnitude as magnitudes
from anabranch.aggregation.kernels import histogram
from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.magnitude import stream_kth, tensor_kth

SIZE = 5003


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _normal() -> Tensor:
    return torch.randn(3, SIZE, generator=_generator())


DISTRIBUTIONS = {
    "normal": _normal,
    "cauchy": lambda: torch.empty(3, SIZE).cauchy_(generator=_generator()),
    "of very different sizes": lambda: _normal() * torch.tensor([[1e-30], [1.0], [1e30]]),
    "ascending": lambda: (torch.arange(3 * SIZE) - SIZE).float().view(3, SIZE),
    "constant": lambda: torch.full((3, SIZE), -2.5),
    "zeros of both signs": lambda: torch.zeros(3, SIZE).copysign(_normal()),
    "ternary": lambda: _normal().sign() * (_normal().abs() > 1) * 0.37,
    "subnormal": lambda: (9 * _normal()).round() * 1e-45,
    "one spike": lambda: torch.zeros(3, SIZE).index_fill_(1, torch.tensor([SIZE // 3]), -3e38),
    "one bucket": lambda: 1 + _normal().abs() * 1e-4,
}


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_kth_is_the_one_a_sort_finds(
    name: str, magnitude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1)
    monkeypatch.setattr(magnitudes, "_COUNTED", 1)
    values_KD = DISTRIBUTIONS[name]()
    compared_KD = values_KD.abs() if magnitude else values_KD
    ordered_KD = compared_KD.sort(dim=1, descending=True).values
    chunks = [tuple(part) for part in values_KD.split([1, 2000, 3002], dim=1)]
    chunks = [tuple(row.contiguous() for row in chunk) for chunk in chunks]
    for segment in (1 << 22, 999):
        monkeypatch.setattr(histogram, "_SEGMENT", segment)
        for count in (1, 2, SIZE // 5, SIZE // 2, SIZE - 1, SIZE):
            expected_K = ordered_KD[:, count - 1]
            assert torch.equal(tensor_kth(values_KD, count, magnitude), expected_K)
            assert torch.equal(stream_kth(chunks, count, magnitude), expected_K)


def test_counts_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.aggregation.magnitude import _histogram

    values_KD = _normal()
    bucket_K = torch.tensor([0x3F80, 0x3FC0, 0x4000])
    for magnitude in (True, False):
        for bucket in (None, bucket_K if magnitude else bucket_K + (1 << 15)):
            monkeypatch.setattr(magnitudes, "_by_kernel", lambda values_KD: False)
            expected_KH = _histogram([values_KD], bucket, magnitude)
            monkeypatch.setattr(magnitudes, "_by_kernel", lambda values_KD: True)
            assert torch.equal(_histogram([values_KD], bucket, magnitude), expected_KH)
            assert bool(expected_KH.any())


def test_small_work_is_counted_once_kernels_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    values_KD = torch.randn(1, 1 << 17, generator=_generator())
    expected_K = values_KD.abs().kthvalue(101).values
    monkeypatch.setattr(Tensor, "kthvalue", None, raising=False)
    assert torch.equal(tensor_kth(values_KD, (1 << 17) - 100), expected_K)


@pytest.mark.parametrize("counted", [1, 1 << 17])
def test_a_count_beyond_the_entries_is_refused(
    counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1)
    monkeypatch.setattr(magnitudes, "_COUNTED", counted)
    with pytest.raises(ValueError, match="5-th largest of 4 entries"):
        tensor_kth(torch.ones(2, 4), 5)
