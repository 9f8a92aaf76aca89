import pytest
import torch

from anabranch.vectors.sparse import SparseTernary, ternarise


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_kept_entries_are_the_largest_as_signs_of_their_mean() -> None:
    x = torch.tensor([[0.1, -3.0, 0.2], [2.0, 0.0, -1.0]])
    form = ternarise(x, 0.5)
    assert form.positions_k.tolist() == [1, 3, 5]
    assert form.negative_k.tolist() == [True, False, True]
    assert form.scale == 2.0
    assert form.dense().tolist() == [[0.0, -2.0, 0.0], [2.0, 0.0, -2.0]]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 1.0])
def test_the_scale_is_the_least_squares_one(density: float) -> None:
    x = _normal(30, 70)
    form = ternarise(x, density)
    assert form.nonzeros == round(density * x.numel())
    pattern = (form.dense() / form.scale).flatten()
    best = torch.linalg.lstsq(pattern[:, None].double(), x.flatten()[:, None].double()).solution
    assert form.scale == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("density", "nmse"), [(0.05, 0.727), (0.1, 0.575), (0.2, 0.384), (0.5, 0.192)]
)
def test_the_error_on_gaussian_entries_is_the_known_one(density: float, nmse: float) -> None:
    x = _normal(1_000_000)
    error = (x - ternarise(x, density).dense()).square().mean() / x.square().mean()
    assert error.item() == pytest.approx(nmse, abs=0.004)


def test_zeros_are_never_kept() -> None:
    x = torch.zeros(4, 25)
    x[1, 3], x[2, 0] = -4.0, 2.0
    form = ternarise(x, 0.5)
    assert form.positions_k.tolist() == [28, 50]
    assert form.scale == 3.0


@pytest.mark.parametrize("shape", [(7,), (), (2, 0)])
def test_a_tensor_without_non_zeros_keeps_nothing(shape: tuple[int, ...]) -> None:
    form = ternarise(torch.zeros(shape), 0.3)
    assert (form.nonzeros, form.scale, form.shape) == (0, 0.0, shape)
    assert torch.equal(form.dense(), torch.zeros(shape))


def test_at_least_one_entry_is_kept_however_small() -> None:
    x = torch.tensor([0.0, 1e-45, 0.0])
    assert torch.equal(ternarise(x, 0.001).dense(), x)
    assert torch.equal(ternarise(torch.tensor(-7.0), 0.1).dense(), torch.tensor(-7.0))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"give the share of entries to keep, in \(0, 1\]"):
        ternarise(torch.ones(3), density)


def test_signs_that_do_not_pair_with_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="give one sign per position"):
        SparseTernary(torch.tensor([1, 2]), torch.tensor([True]), 1.0, (4,))
