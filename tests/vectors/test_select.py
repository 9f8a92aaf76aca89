import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.vectors import select
from anabranch.vectors.select import largest

LARGE = 200_003
"""More than the size below which nothing is sampled."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _positions(x: torch.Tensor, k: int) -> torch.Tensor:
    positions, values = largest(x, k)
    assert values.tolist() == x.float().flatten()[torch.from_numpy(positions)].tolist()
    return torch.from_numpy(positions)


def _naive(x: torch.Tensor, k: int) -> list[int]:
    entries = x.float().flatten().abs().tolist()
    return sorted(sorted(range(len(entries)), key=lambda i: (-entries[i], i))[:k])


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n, generator=_generator()),
    "cauchy": lambda n: torch.empty(n).cauchy_(generator=_generator()),
    "ascending": lambda n: torch.arange(n, dtype=torch.float32) - n // 2,
    "constant": lambda n: torch.full((n,), -2.5),
    "zeros": lambda n: torch.zeros(n),
    "ties": lambda n: torch.randint(-3, 4, (n,), generator=_generator()).float(),
    "subnormal": lambda n: torch.randint(-90, 90, (n,), generator=_generator()).float() * 1e-45,
    "one spike": lambda n: torch.zeros(n).index_fill_(0, torch.tensor([n // 3]), -1e30),
    "sparse": lambda n: torch.randn(n, generator=_generator()).where(
        torch.rand(n, generator=_generator()) < 0.01, 0.0
    ),
    "blocks": lambda n: torch.randn(n, generator=_generator()) * (torch.arange(n) < n // 20),
}


@pytest.mark.parametrize("n", [1, 257, LARGE])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_selection_equals_a_full_sort(name: str, n: int) -> None:
    x = DISTRIBUTIONS[name](n)
    ranked = x.abs().sort(descending=True, stable=True)
    for k in sorted({1, max(1, n // 100), max(1, n // 10), max(1, n // 2), n}):
        assert torch.equal(_positions(x, k), ranked.indices[:k].sort().values)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.data())
def test_selection_equals_the_definition(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    assert _positions(x, k).tolist() == _naive(x, k)


def test_a_sample_that_misses_the_threshold_costs_time_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(LARGE, generator=_generator())
    # Large exactly where the sample looks: it takes the tensor for one of large entries.
    drawn = np.random.default_rng(0).integers(LARGE, size=1 << 14)
    x[torch.from_numpy(drawn)] += 100
    scans = []
    scan = select._at_least

    def noted(bits: np.ndarray, floor: int, room: int) -> object:
        scans.append(floor)
        return scan(bits, floor, room)

    monkeypatch.setattr(select, "_at_least", noted)
    k = LARGE // 5
    assert torch.equal(_positions(x, k), x.abs().topk(k).indices.sort().values)
    assert len(scans) == 2
    assert scans[1] == 0


def test_a_good_sample_needs_one_scan_of_few_candidates() -> None:
    bits = torch.randn(1_000_000, generator=_generator()).numpy().view(np.int32)
    positions, _ = select._candidates(bits, 100_000)
    assert 100_000 <= positions.size < 120_000


def test_more_equal_entries_than_there_is_room_for_cost_a_second_scan() -> None:
    x = torch.ones(LARGE)
    x[::2] = -1
    assert _positions(x, 1000).tolist() == list(range(1000))
    x[LARGE // 2] = 2
    assert _positions(x, 1000).tolist() == [*range(999), LARGE // 2]


def test_what_is_kept_of_few_holds_no_more_memory_than_it_is() -> None:
    x = torch.randn(LARGE, generator=_generator())
    for k in (100, LARGE // 10, LARGE // 2):
        for found in select.largest(x, k):
            whole = found if found.base is None else found.base
            assert whole.nbytes <= 1.5 * found.nbytes


def test_other_dtypes_and_strides_are_read_in_fp32() -> None:
    x = torch.randn(64, 48, generator=_generator()).T
    for tensor in (x, x.bfloat16(), x.double()):
        assert _positions(tensor, 100).tolist() == _naive(tensor.contiguous(), 100)
    assert _positions(torch.tensor(3.0), 1).tolist() == [0]


@pytest.mark.parametrize("n", [5, LARGE])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused(bad: float, n: int) -> None:
    x = torch.ones(n)
    x[n // 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        _positions(x, 1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; give one between 1 and the 3"):
        _positions(torch.ones(3), k)
