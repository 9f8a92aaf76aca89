"""The exact k-th by brackets, against a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.magnitude import stream_kth, tensor_kth

SIZE = 1511


def _normal() -> Tensor:
    return torch.randn(2, SIZE, generator=torch.Generator().manual_seed(7))


DISTRIBUTIONS = {
    "normal": _normal,
    "of very different sizes": lambda: _normal() * torch.tensor([[1e-30], [1e30]]),
    "ascending": lambda: (torch.arange(2 * SIZE) - SIZE).float().view(2, SIZE),
    "constant": lambda: torch.full((2, SIZE), -2.5),
    "zeros of both signs": lambda: torch.zeros(2, SIZE).copysign(_normal()),
    "ternary": lambda: _normal().sign() * (_normal().abs() > 1) * 0.37,
    "subnormal": lambda: (9 * _normal()).round() * 1e-45,
    "one spike": lambda: torch.zeros(2, SIZE).index_fill_(1, torch.tensor([SIZE // 3]), -3e38),
    "one bucket": lambda: 1 + _normal().abs() * 1e-4,
    "one sampled, another not": lambda: torch.tensor([1.0, -3.0]).repeat(2, SIZE),
}


@pytest.mark.parametrize("sample", [1 << 17, 50])
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_kth_is_the_one_a_sort_finds(
    name: str,
    magnitude: bool,
    sample: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from anabranch.aggregation.kernels.gpu import histogram

    monkeypatch.setattr(histogram, "_SAMPLE", sample)
    values_KD = DISTRIBUTIONS[name]()
    entries = values_KD.shape[1]
    compared_KD = values_KD.abs() if magnitude else values_KD
    ordered_KD = compared_KD.sort(dim=1, descending=True).values
    there_KD = values_KD.to(device)
    for count in (1, entries // 5):
        found_K = tensor_kth(there_KD, count, magnitude)
        assert found_K.device.type == "cpu"
        assert torch.equal(found_K, ordered_KD[:, count - 1])


def test_a_sample_that_misleads_costs_a_pass_and_no_more(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.aggregation.kernels.gpu import histogram

    passes: list[object] = []
    count = histogram._count
    monkeypatch.setattr(
        histogram, "_count", lambda *arguments: passes.append(1) or count(*arguments)
    )
    monkeypatch.setattr(histogram, "_SAMPLE", 500)
    values_D = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    even_D = values_D.clone()
    # The sample is of every tenth entry: here it is far below, and far above, the rest.
    for factor in (1e-9, 1e9):
        even_D[::10] = values_D[::10] * factor
        passes.clear()
        found_K = tensor_kth(even_D[None].to(device), 2500)
        assert torch.equal(found_K, even_D.abs().sort(descending=True).values[2499:2500])
        assert 2 < len(passes) <= 5


def test_a_stream_on_the_device_is_counted_too(device: torch.device) -> None:
    values_KD = _normal()
    chunks = [part.contiguous().to(device) for part in values_KD.split([1, 700, 810], dim=1)]
    expected_K = values_KD.abs().sort(dim=1, descending=True).values[:, 499]
    assert torch.equal(stream_kth(chunks, 500), expected_K)


def test_a_count_beyond_the_entries_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="5-th largest of 4 entries"):
        tensor_kth(torch.ones(2, 4, device=device), 5)
