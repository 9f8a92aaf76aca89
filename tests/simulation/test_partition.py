import numpy as np
import pytest

from anabranch.simulation.partition import Indices, by_domain, dirichlet, iid

LABELS = np.arange(600) % 5


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def whole(parts: list[Indices], count: int) -> bool:
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


def test_iid_parts_are_equal_and_whole() -> None:
    parts = iid(101, 4, generator())
    assert [len(part) for part in parts] == [26, 25, 25, 25]
    assert whole(parts, 101)
    with pytest.raises(ValueError, match="3 examples do not reach for 4 clients"):
        iid(3, 4, generator())


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_parts_are_whole_and_none_is_empty(alpha: float) -> None:
    parts = dirichlet(LABELS, 4, alpha, 16, generator())
    assert whole(parts, 600)
    assert min(len(part) for part in parts) >= 16


def test_small_alpha_separates_labels() -> None:
    def skew(alpha: float) -> float:
        parts = dirichlet(LABELS, 4, alpha, 1, generator())
        shares = [np.bincount(LABELS[part], minlength=5) / len(part) for part in parts]
        return float(np.mean([share.max() for share in shares]))

    assert skew(0.1) > 0.5
    assert skew(1000.0) < 0.25


def test_dirichlet_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"fewer than 200 of 600 .* raise alpha, or lower min"):
        dirichlet(LABELS, 4, 0.5, 200, generator())


def test_domains_are_not_mixed() -> None:
    domains = ["a", "b", "a", "a", "b", "a", "b", "b"]
    parts = by_domain(domains, ("b", "a"), 4, generator())
    assert whole(parts, 8)
    assert [{domains[i] for i in part} for part in parts] == [{"b"}, {"b"}, {"a"}, {"a"}]
    with pytest.raises(ValueError, match="3 clients do not divide over 2 domains"):
        by_domain(domains, ("b", "a"), 3, generator())


def test_equal_seeds_cut_equally() -> None:
    first, second, other = (dirichlet(LABELS, 3, 1.0, 1, generator(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
