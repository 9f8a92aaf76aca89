"""What Triton makes of the kernels for an H100, which it compiles for without one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anabranch.aggregation.kernels.gpu import band, dare, histogram, linear, order, ternary
from anabranch.aggregation.kernels.gpu.blocks import BLOCK, EXACT
from anabranch.aggregation.kernels.order import network

BASICS = {"addresses": "*i64", "out": "*fp32", "entries": "i32", "count": "i32", "words": "i32"}
WHOLE = {"ALIGNED": True, "BLOCK": BLOCK}
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "linear": (linear._weighted_sum, {"coefficients": "*fp32"}, WHOLE),
    "band": (
        band._band,
        {"weights": "*fp32", "low": "*fp32", "high": "*fp32"},
        {"ELECTS": True, **WHOLE},
    ),
    "dare": (
        dare._dare,
        {
            "weights": "*fp32",
            "keys": "*i64",
            "position": "i64",
            "limit": "i64",
            "density": "fp32",
        },
        {"ELECTS": True, **WHOLE},
    ),
    "kth magnitude": (
        histogram._count_steps,
        {"brackets": "*i64", "shifts": "*i64", "counts": "*i64"},
        {"MAGNITUDE": True, "STEPS": 512, "ALIGNED": True, "BLOCK": 2048},
    ),
    "kth": (
        histogram._count_steps,
        {"brackets": "*i64", "shifts": "*i64", "counts": "*i64"},
        {"MAGNITUDE": False, "STEPS": 512, "ALIGNED": True, "BLOCK": 2048},
    ),
    "ternary": (
        ternary._merge,
        {"codes": "*i32", "values": "*fp32", "weights": "*fp32"},
        {"ELECTS": True, "BLOCK": BLOCK},
    ),
    "setting bits": (
        ternary._set,
        {"positions": "*i64", "negative": "*u8", "codes": "*i32"},
        {"BLOCK": BLOCK},
    ),
    "median": (
        order._middle,
        {"share": "fp32"},
        {
            "COUNT": 16,
            "PAIRS": tuple(network(16).flatten().tolist()),
            "LOW": 7,
            "HIGH": 9,
            "HALVES": True,
            "ALIGNED": True,
            "BLOCK": 128,
        },
    ),
}


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    names = kernel.arg_names
    types = {**BASICS, **types}
    types = {name: kind for name, kind in types.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name][0] == "*" or (name == "entries" and signature[name] != "constexpr")
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", 90, 32)
    return str(triton.compile(source, target=target, options=EXACT).asm["ptx"])


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_to_exact_instructions(name: str) -> None:
    """Nothing flushes subnormals, and quotients are rounded to nearest."""
    code = ptx(*KERNELS[name])
    assert ".ftz" not in code
    assert set(re.findall(r"div\.\w+\.f32", code)) <= {"div.rn.f32"}
    assert "approx" not in code


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_one_of_everything(name: str) -> None:
    """Triton makes a constant of an integer that is 1."""
    kernel, types, constants = KERNELS[name]
    ones = {"entries", "count", "words", "position"} & set(kernel.arg_names)
    assert "ret" in ptx(kernel, types, {**constants, **dict.fromkeys(ones, 1)})


@pytest.mark.parametrize("name", ["linear", "band", "dare", "kth magnitude", "kth"])
def test_entries_are_read_four_at_a_time(name: str) -> None:
    code = ptx(*KERNELS[name])
    assert re.search(r"ld\.global\S*\.v4\.", code)


def test_only_what_is_written_so_is_fused() -> None:
    assert "fma.rn.f32" in ptx(*KERNELS["linear"])
    assert "fma" not in ptx(*KERNELS["median"])
