import pytest
import torch

from anabranch.vectors.quantised import BLOCK, INT4, INT8, Blocks, quantise


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("largest", [INT8, INT4])
@pytest.mark.parametrize("shape", [(1,), (), (63,), (64,), (65,), (3, 50), (2, 3, 64)])
def test_levels_equal_a_loop_over_blocks(shape: tuple[int, ...], largest: int) -> None:
    x = _normal(*shape)
    form = quantise(x, largest)
    entries = x.flatten()
    for block, start in enumerate(range(0, x.numel(), BLOCK)):
        part = entries[start : start + BLOCK]
        scale = part.abs().max() / largest
        assert form.scales_g[block] == scale
        assert form.levels_n[start : start + BLOCK].tolist() == (part / scale).round().tolist()
    assert form.dense().shape == x.shape
    assert (form.dense() - x).abs().max() <= x.abs().max() / (2 * largest) * 1.0001
    assert form.norm() == pytest.approx(float(form.dense().double().norm()), rel=1e-7)


def test_an_outlier_spoils_its_own_block_only() -> None:
    x = _normal(4 * BLOCK)
    x[BLOCK] = 1e6
    error = (quantise(x).dense() - x).abs().reshape(4, BLOCK).amax(dim=1)
    assert error[1] > 0.5
    assert error[[0, 2, 3]].max() < 0.02


def test_blocks_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2 * BLOCK)
    x[3] = 1.0
    assert torch.equal(quantise(x).dense(), x)


@pytest.mark.parametrize("size", [torch.finfo(torch.float32).max, 1e-39, 1e-45])
def test_extreme_magnitudes_stay_finite_and_close(size: float) -> None:
    x = torch.tensor([size, -size, size / 2, 0.0])
    dense = quantise(x).dense()
    assert torch.isfinite(dense).all()
    assert (dense - x).abs().max() <= max(size / 253, 127e-45)


def test_no_entries_are_no_blocks() -> None:
    form = quantise(torch.zeros(0, 3))
    assert form.scales_g.numel() == 0
    assert form.dense().shape == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(torch.tensor([1.0, bad]))


def test_counts_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 65 levels and 2 scales"):
        Blocks(torch.zeros(65, dtype=torch.int8), torch.ones(1), (65,))
