"""Every GPU kernel against the torch function it stands in for, and against its CPU namesake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.kernels.rows import has_kernel
from anabranch.aggregation.methods import BUILT_IN

BY_NAME = {method.name: method for method in BUILT_IN}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("ties", "breadcrumbs_ties", "dare_linear", "dare_ties")},
    **{name: (name, {}) for name in ("mean", "task_arithmetic", "median", "trimmed_mean")},
    "breadcrumbs without outliers": ("breadcrumbs", {"density": 0.5, "gamma": 0.3}),
    "dare that keeps all": ("dare_linear", {"density": 1.0}),
    "dare that keeps next to nothing": ("dare_ties", {"density": 1e-3, "seed": 5}),
    "ties that keeps all": ("ties", {"density": 1.0}),
    "ties that keeps one": ("ties", {"density": 1e-9}),
    "trimmed mean of all": ("trimmed_mean", {"trim": 0}),
}


def refuse(*arguments: Any, **keywords: Any) -> Tensor:
    raise AssertionError("torch was used")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(
    variant: str, deltas: Tensor, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Triton's entries are, bit for bit, those of numba's kernel and of torch, which it returns."""
    name, params = VARIANTS[variant]
    method, count = BY_NAME[name], len(deltas)
    if variant == "trimmed_mean":
        params = {"trim": (count - 1) // 4}
    config = method.config(**params)
    weights_C = torch.linspace(0, 2, count + 1)[1:]
    if count > 2:
        weights_C[1] = 0
    fused = method if method.merge is None else replace(method, merge=refuse)
    found = fused(deltas.to(device), weights_C, config, module="layer")
    assert found.device.type == device.type
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(kernel_rows, "SMALLEST", 1 << 60)
        expected = method(deltas, weights_C, config, module="layer")
        patch.setattr(kernel_rows, "SMALLEST", 1)
        compiled = method(deltas, weights_C, config, module="layer")
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(compiled, expected)
    return expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 4])
def test_kernels_are_the_methods(
    variant: str, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than a block, and more.
    for shape in [(1,), (5, 211)]:
        expected = check(variant, draw(count, *shape), device, monkeypatch)
        keeps_little = shape == (1,) or "nothing" in variant or count == 1
        assert bool(expected.any()) or keeps_little


ADVERSARIAL = {
    "zeros": lambda x: x * 0,
    "minus zeros": lambda x: torch.where(x > 0, -0.0, x),
    "ternary": lambda x: x.sign() * (x.abs() > 1) * 0.37,
    "few magnitudes": lambda x: (2 * x).round() / 3,
    "equal contributions": lambda x: x[:1].expand_as(x).contiguous(),
    "opposite contributions": lambda x: x[:1] * torch.tensor([1.0, -1] * 2)[:, None],
    "one far larger": lambda x: x * torch.tensor([1e6] + [1.0] * 3)[:, None],
    "subnormal": lambda x: (9 * x).round() * 1e-45,
    "huge": lambda x: x * 1e17,
}


@pytest.mark.parametrize(
    "variant", ["mean", "ties", "ties that keeps all", "dare_linear", "dare_ties", "trimmed_mean"]
)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernels_on_adversarial_tensors(
    variant: str, case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = check(variant, ADVERSARIAL[case](draw(4, 300)), device, monkeypatch)
    assert bool(expected.isfinite().all())


@pytest.mark.parametrize("variant", ["median", "trimmed_mean", "trimmed mean of all"])
@pytest.mark.parametrize("count", [17, 64])
def test_many_contributions_are_sorted_in_registers(
    variant: str, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(variant, draw(count, 130), device, monkeypatch)


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_more_than_64_are_sorted_by_torch(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, draw(65, 70), device, monkeypatch)


def test_a_method_without_a_gpu_kernel_goes_by_torch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, deltas = BY_NAME["magmax"], draw(5, 400)
    assert method.kernel is not None
    assert not has_kernel(method.kernel, device)
    found = method(deltas.to(device)).cpu()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(found, method(deltas))


def test_entries_are_read_where_they_lie_at_any_alignment(device: torch.device) -> None:
    from anabranch.aggregation.kernels.gpu.linear import weighted_sum

    memory = draw(3, 2051).to(device)
    for first in range(4):
        rows = [row[first:] for row in memory]
        found = weighted_sum(rows, [0.5, -1.0, 2.0])
        exact = memory[0].double() * 0.5 - memory[1].double() + memory[2].double() * 2
        torch.testing.assert_close(found, exact[first:].float(), rtol=0, atol=1e-6)


def test_a_weight_of_zero_leaves_a_contribution_out(device: torch.device) -> None:
    from anabranch.aggregation.kernels.gpu.linear import weighted_sum

    deltas_CD = draw(2, 100).to(device)
    deltas_CD[1] = float("nan")
    assert torch.equal(weighted_sum(deltas_CD, [2.0, 0.0]), 2 * deltas_CD[0])
