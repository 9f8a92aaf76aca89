"""Every kernel against the torch function it stands in for."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.engine.cohort import gather
from anabranch.aggregation.engine.rows import ModuleRows
from anabranch.aggregation.engine.stream import merge_task_vectors
from anabranch.aggregation.kernels import linear
from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.kernels.order import network
from anabranch.aggregation.method import combine
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.pcb import PCB
from anabranch.aggregation.methods.ties import TIES
from anabranch.aggregation.recipe import Recipe
from anabranch.vectors import TaskVector

BY_NAME = {method.name: method for method in BUILT_IN}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method.name: (method.name, {}) for method in BUILT_IN if method.kernel},
    "mean": ("mean", {}),
    "breadcrumbs without outliers": ("breadcrumbs", {"density": 0.5, "gamma": 0.3}),
    "consensus of one": ("consensus", {"votes": 1}),
    "dare that keeps all": ("dare_linear", {"density": 1.0}),
    "sce that selects": ("sce", {"select": 0.3}),
    "sce that keeps the rest": ("sce", {"select": 0.3, "unselected": "keep"}),
    "ties that keeps all": ("ties", {"density": 1.0}),
    "trimmed mean of all": ("trimmed_mean", {"trim": 0}),
}
COUNTS = [1, 2, 3, 16, 17, 100]


def both(variant: str, deltas: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """By the kernel, and by torch."""
    name, params = VARIANTS[variant]
    method, count = BY_NAME[name], len(deltas)
    if not params and name == "consensus":
        params = {"votes": min(2, count)}
    if not params and name == "trimmed_mean":
        params = {"trim": (count - 1) // 4}
    if not params and name in ("meamed", "bulyan"):
        params = {"f": max(0, (count - 3) // 4)}
    config = method.config(**params)
    weights_C = torch.linspace(0, 2, count + 1)[1:]
    if count > 2:
        weights_C[1] = 0
    before = deltas.clone()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_rows, "SMALLEST", 1)
        found = method(deltas, weights_C, config, module="layer")
        patch.setattr(kernel_rows, "SMALLEST", 1 << 60)
        expected = method(deltas, weights_C, config, module="layer")
    assert torch.equal(deltas, before)
    return found, expected


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", COUNTS)
def test_kernels_are_the_methods(variant: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant == "bulyan" and count < 3:
        pytest.skip("takes three")
    # One entry, less and more than a block (256 entries of 100, 4,096 of one), a prime.
    for shape in [(1,), (63, 1), (255,), (4, 64), (257, 1), (5, 821), (2, 4099)]:
        found, expected = both(variant, draw(count, *shape), monkeypatch)
        assert bool(expected.any()) or shape == (1,) or count == 1
        assert_near(found, expected)


ADVERSARIAL = {
    "zeros": lambda x: x * 0,
    "minus zeros": lambda x: torch.where(x > 0, -0.0, x),
    "half of them zero": lambda x: x.clamp(min=0),
    "ternary": lambda x: x.sign() * (x.abs() > 1) * 0.37,
    "few magnitudes": lambda x: (2 * x).round() / 3,
    "equal contributions": lambda x: x[:1].expand_as(x),
    "opposite contributions": lambda x: x[:1] * torch.tensor([1.0, -1] * 8).view(-1, 1, 1),
    "one far larger": lambda x: x * torch.tensor([1e6] + [1.0] * 15).view(-1, 1, 1),
    "subnormal": lambda x: (9 * x).round() * 1e-45,
    "huge": lambda x: x * 1e17,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernels_on_adversarial_tensors(
    variant: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = both(variant, ADVERSARIAL[case](draw(16, 37, 61)), monkeypatch)
    assert bool(expected.isfinite().all())
    assert_near(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_change_no_bit(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = draw(6, 170, 61)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(both(variant, deltas, monkeypatch)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def refuse(*arguments: Any, **keywords: Any) -> Tensor:
    raise AssertionError("torch was used")


@pytest.mark.parametrize("name", [method.name for method in BUILT_IN if method.kernel])
def test_the_kernel_is_what_runs_from_its_size_on(name: str) -> None:
    method = replace(BY_NAME[name], merge=refuse)
    config = method.config(f=0) if name == "bulyan" else method.config()
    rows = kernel_rows.SMALLEST // 256 // 4
    assert bool(method(draw(4, rows, 256), None, config).any())
    with pytest.raises(AssertionError, match="torch was used"):
        method(draw(4, rows - 1, 256), None, config)
    cohort = gather([TaskVector({"w": one}) for one in draw(4, rows, 256)])
    (chunk,) = ModuleRows(cohort, "w", 1, fused=method.kernel is not None)
    assert chunk.fused


def test_sums_and_thresholds_run_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    load = kernel_rows.load
    for place in ("method", "magnitude", "statistics", "engine.stream"):
        monkeypatch.setattr(
            f"anabranch.aggregation.{place}.load",
            lambda name, device: used.append(name) or load(name, device),
        )
    deltas = draw(4, kernel_rows.SMALLEST // 1024, 256)
    MEAN(deltas)
    merge_task_vectors([TaskVector({"w": one}) for one in deltas], Recipe(method="mean"))
    assert used == [kernel_rows.WEIGHTED_SUM] * 2
    used.clear()
    TIES(deltas)
    assert used == [kernel_rows.HISTOGRAM] * 2 + [TIES.kernel]
    used.clear()
    PCB(deltas)
    assert used == [kernel_rows.HISTOGRAM] * 6


def test_dense_entries_are_read_where_they_lie() -> None:
    tensors = list(draw(4, kernel_rows.SMALLEST // 1024, 256))
    cohort = gather([TaskVector({"w": one}) for one in tensors])
    (chunk,) = ModuleRows(cohort, "w", 1, fused=True)
    for row_D, one in zip(chunk.rows, tensors, strict=True):
        assert row_D.data_ptr() == one.data_ptr()
    assert torch.equal(chunk.deltas_CD, torch.stack(tensors).flatten(1))
    # Without a kernel a method gets one tensor, which costs its budget.
    with pytest.raises(ValueError, match="budget_bytes: 1 cannot hold"):
        ModuleRows(cohort, "w", 1)


def test_other_layouts_merge_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel cannot read in place is copied, not read wrongly."""
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1)
    plain = list(draw(3, 90, 70).bfloat16().float())
    odd = [plain[0].T.contiguous().T, plain[1].double(), plain[2].bfloat16()]
    for name in ("ties", "mean", "median"):
        one, other = (
            merge_task_vectors([TaskVector({"w": x}) for x in given], Recipe(method=name))
            for given in (plain, odd)
        )
        assert torch.equal(one.deltas["w"], other.deltas["w"])


def test_weighted_sums_leave_out_zero_weights() -> None:
    deltas = draw(3, 500)
    deltas[1] = float("nan")
    coefficients_C = torch.tensor([0.3, 0.0, -1.7], dtype=torch.float64)
    assert_near(linear.weighted_sum(deltas, coefficients_C), combine(deltas, coefficients_C))


def test_merges_at_once_are_merges_one_by_one() -> None:
    cohorts = [draw(3, 300, 500 + index) for index in range(6)]
    expected = [TIES(deltas) for deltas in cohorts]
    with ThreadPoolExecutor(6) as pool:
        for found, one in zip(pool.map(TIES, cohorts), expected, strict=True):
            assert torch.equal(found, one)


def test_small_merges_load_no_numba() -> None:
    code = (
        "import sys, torch, anabranch.aggregation as a\n"
        "from anabranch.aggregation.methods import BUILT_IN\n"
        "for method in BUILT_IN:\n"
        "    if method.name not in ('slerp', 'multi_krum', 'bulyan', 'fltrust'):\n"
        "        method(torch.randn(3, 50))\n"
        "sys.exit('numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("count", range(1, 13))
def test_a_network_sorts_every_row_of_zeros_and_ones(count: int) -> None:
    """Then it sorts everything (Knuth, volume 3, theorem 5.3.4Z)."""
    rows = torch.tensor(list(product([0, 1], repeat=count)))
    for one, other in network(count).tolist():
        assert one < other
        low, high = rows[:, one].clone(), rows[:, other].clone()
        rows[:, one], rows[:, other] = torch.minimum(low, high), torch.maximum(low, high)
    assert bool((rows[:, 1:] >= rows[:, :-1]).all())


def test_a_chunk_of_one_tensor_is_that_tensor() -> None:
    deltas_CD = draw(2, 8)
    assert Chunk("w", 0, 4, deltas_CD).deltas_CD is deltas_CD
