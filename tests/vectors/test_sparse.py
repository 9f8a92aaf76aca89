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


BAD = {
    "one sign too few": ([1, 2], [True], 1.0, "give one sign per position"),
    "before the first": ([-1, 2], [True, True], 1.0, "from -1 to 2 do not ascend within 4"),
    "beyond the last": ([1, 4], [True, True], 1.0, "from 1 to 4 do not ascend within 4"),
    "repeated": ([1, 1], [True, False], 1.0, "leave out repeated ones"),
    "not sorted": ([3, 0, 2], [True] * 3, 1.0, "sort them"),
    "negative scale": ([1], [True], -1.0, "is -1.0; give an fp32 number above 0"),
    "no number": ([1], [True], float("nan"), "is nan"),
    "infinite": ([1], [True], float("inf"), "is inf"),
    "not fp32": ([1], [True], 0.1, "is 0.1; give an fp32 number"),
    "zero in fp32": ([1], [True], 1e-60, "is 1e-60"),
    "zeros that weigh": ([], [], 1.0, "scale of 0 non-zeros is 1.0"),
    "weightless": ([1], [True], 0.0, "scale of 1 non-zeros is 0.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_sound_is_refused(case: str) -> None:
    positions, negative, scale, said = BAD[case]
    positions_k = torch.tensor(positions, dtype=torch.int64)
    negative_k = torch.tensor(negative, dtype=torch.bool)
    with pytest.raises(ValueError, match=said):
        SparseTernary(positions_k, negative_k, scale, torch.Size([4]))


def test_positions_and_signs_are_what_kernels_read() -> None:
    with pytest.raises(ValueError, match="give int64 and bool on cpu"):
        SparseTernary(torch.tensor([1.0]), torch.tensor([True]), 1.0, torch.Size([4]))


@pytest.mark.parametrize(("first", "count"), [(0, 60), (0, 7), (13, 20), (59, 1), (60, 0)])
def test_a_stretch_is_written_over_what_was_there(first: int, count: int) -> None:
    form = ternarise(_normal(5, 12), 0.4)
    out = torch.full((count,), 9.0)
    form.read(first, out)
    assert torch.equal(out, form.dense().flatten()[first : first + count])


def test_norm_and_size_follow_from_the_non_zeros() -> None:
    form = ternarise(_normal(30, 70), 0.1)
    assert form.norm() == pytest.approx(float(form.dense().double().norm()))
    assert form.nbytes == 9 * form.nonzeros
