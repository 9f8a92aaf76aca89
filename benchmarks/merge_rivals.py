"""The same task vectors merged by mergekit, PEFT and FusionBench, and how good merges are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
    compute_and_sum_svd_mem_reduction as tsv_m,
)
from mergekit.merge_methods.api import merge_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import ties
from torch import Tensor

from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.vectors import Adapter

LAYER = "0"
_MERGED = "merged"


def mergekit(tensors: list[Tensor], method: str, **parameters: Any) -> Tensor:
    """Mergekit takes models, not task vectors: the base is zero and comes first."""
    merged: Tensor
    if method == "mean":
        merged = merge_tensors(tensors, "linear", parameters={"weight": 1.0})
    else:
        if method != "sce":
            parameters["weight"] = 1.0
        base = torch.zeros_like(tensors[0])
        merged = merge_tensors([base, *tensors], method, parameters=parameters, base_index=0)
    return merged


def peft_ties(tensors: list[Tensor], density: float = 0.2) -> Tensor:
    """PEFT's function on tensors."""
    merged: Tensor = ties(tensors, torch.ones(len(tensors)), density)
    return merged


def peft_model(adapters: Sequence[Adapter], size: int, rank: int) -> PeftModel:
    """A model of one linear layer that carries the adapters, named by their number."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[LAYER])
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(size, size, bias=False)), config, adapter_name="0"
    )
    for client in range(1, len(adapters)):
        model.add_adapter(str(client), config)
    layer = _layer(model)
    for client, adapter in enumerate(adapters):
        factors = adapter.lora[LAYER]
        layer.lora_A[str(client)].weight.data.copy_(factors.a_rn)
        layer.lora_B[str(client)].weight.data.copy_(factors.b_mr)
    return model


def _layer(model: PeftModel) -> Any:
    """The one layer that carries adapters."""
    layered: Any = model.base_model.model
    return layered.get_submodule(LAYER)


def peft_merge(model: PeftModel, kind: str, rank: int, density: float) -> None:
    """PEFT's merge of adapters into one."""
    names = list(model.peft_config)
    if _MERGED in names:
        model.delete_adapter(_MERGED)
        names.remove(_MERGED)
    model.add_weighted_adapter(
        names, [1.0] * len(names), _MERGED, combination_type=kind, svd_rank=rank, density=density
    )


def peft_delta(model: PeftModel) -> Tensor:
    """ΔW of what it merged."""
    delta: Tensor = _layer(model).get_delta_weight(_MERGED).detach()
    return delta


def dense_merge(adapters: Sequence[Adapter], method: str, density: float) -> Tensor:
    """The merged ΔW [m, n] before it goes back to a rank, fp64."""
    deltas = [adapter.lora[LAYER].delta() for adapter in adapters]
    if method == "ties":
        deltas_Cmn = torch.stack([delta.dense() for delta in deltas])
        return TIES(deltas_Cmn, None, TiesConfig(density=density)).double()
    total_mn = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta in deltas:
        total_mn.addmm_(delta.b_mk.double(), delta.a_kn.double())
    return total_mn


def gap(exact_mn: Tensor, found_mn: Tensor, rank: int) -> float:
    """How much further off than the best approximation of its rank, relative.

    The best one's error is that of the eigenvalues of ΔWᵀΔW beyond the rank.
    """
    values_n = torch.linalg.eigvalsh(exact_mn.T @ exact_mn).flip(0)
    best = float(values_n[rank:].clamp(min=0).sum().sqrt())
    return float((exact_mn - found_mn.double()).norm()) / best - 1


def fusion_bench(matrices: Sequence[Tensor], method: str) -> Tensor:
    """FusionBench's ``tsv_m`` or ``iso_c`` of dense task vectors, without what it prints."""
    rules: dict[str, Callable[..., dict[str, Tensor]]] = {"tsv_m": tsv_m, "iso_c": iso_c}
    with contextlib.redirect_stdout(io.StringIO()):
        return rules[method]([{"w": matrix} for matrix in matrices], accelerator="cpu")["w"]


def fusion_bench_in_the_core(adapters: Sequence[Adapter], method: str) -> Tensor:
    """FusionBench's rule where it is defined for adapters: in the space they span, fp64.

    Dense, a ΔW of rank 16 has thousands of singular vectors whose value is zero and whose direction
    is chance, and both methods give them a say. In orthonormal bases of all columns and all rows
    there are none of these: with C·r below m and n, every direction of the cores is live.
    """
    factors = [adapter.lora[LAYER].delta() for adapter in adapters]
    left_mK = torch.linalg.qr(torch.cat([one.b_mk for one in factors], dim=1).double()).Q
    right_nK = torch.linalg.qr(torch.cat([one.a_kn for one in factors]).double().T).Q
    cores = [(left_mK.T @ one.b_mk.double()) @ (one.a_kn.double() @ right_nK) for one in factors]
    merged_mn: Tensor = left_mK @ fusion_bench(cores, method) @ right_nK.T
    return merged_mn


def distance(found_mn: Tensor, expected_mn: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, fp64."""
    return float((found_mn.double() - expected_mn).norm() / expected_mn.norm())
