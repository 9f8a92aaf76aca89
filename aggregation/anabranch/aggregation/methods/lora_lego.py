"""LoRA-LEGO: cluster the ranks of all adapters, keep one per cluster (Zhao et al., 2409.16167).

Shape legend: C contributions, m rows, n columns, N units of all contributions, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.k_means import k_means
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.task_vector import Held, LowRank


class LoraLegoConfig(MethodConfig):
    """Parameters of LoRA-LEGO."""

    rank: int | None = Field(None, ge=1)
    """Clusters, which is the rank of the result; None takes the largest rank that comes in."""
    strength: Literal["adapter", "sum"] = "adapter"
    """What the result is as strong as: one adapter, √(mean rank / clusters), as in the paper, or
    all of them stacked, √(units / clusters)."""
    seed: int = 0
    """Seed of the clustering."""
    restarts: int = Field(10, ge=1)
    """Starts of the clustering, of which the tightest is kept."""


def lora_lego(deltas: Sequence[Held], weights_C: Tensor, config: LoraLegoConfig) -> Held:
    """One unit [a; b] per cluster of units: their mean, as long as they are on average.

    A unit is a row of A with its column of B, the LoRA scaling folded into B. The centroid of a
    cluster is stretched by (mean norm of its members) / (its own), B by ``strength``.

    About factors, not about ΔW: other factors of the same adapters give other clusters, and
    [−a; −b] stands opposite to [a; b], which adds the same. The engine hands it the adapters' own
    factors and not the task vectors against a start, whose units would be every adapter's and C
    copies of the start's.

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive: what its units count for in a centroid.
        config: Clusters, strength and seed.

    Returns:
        Factors of rank k; where a contribution is dense and has no units, the weighted mean.
    """
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        shares = (weights_C / weights_C.sum()).tolist()
        dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]
        total_mn = torch.zeros_like(dense[0], dtype=torch.float32)
        for delta_mn, share in zip(dense, shares, strict=True):
            total_mn.add_(delta_mn, alpha=share)
        return total_mn
    ranks = torch.tensor([part.rank for part in factors])
    weights_N = weights_C.double().repeat_interleave(ranks).to(factors[0].b_mk.device)
    units = torch.cat([torch.cat([part.a_kn.T, part.b_mk]) for part in factors], dim=1)
    units_Nd = units.T.double()
    # Distances are the same in the space the units span, which is small.
    coordinates_NN = torch.linalg.qr(units_Nd.T).R.T
    labels_N = k_means(
        coordinates_NN,
        weights_N,
        config.rank or int(ranks.max()),
        seed=config.seed,
        restarts=config.restarts,
    )
    merged_kd = torch.stack(
        [
            _brick(units_Nd[labels_N == label], weights_N[labels_N == label])
            for label in sorted(set(labels_N.tolist()))
        ]
    )
    reference = float(ranks.double().mean()) if config.strength == "adapter" else len(units_Nd)
    n = factors[0].a_kn.shape[1]
    b_mk = merged_kd[:, n:].T * (reference / len(merged_kd)) ** 0.5
    return LowRank(b_mk.float(), merged_kd[:, :n].float())


def _brick(members_Nd: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted mean of a cluster [d], stretched to its members' mean norm; 0 if it is 0."""
    shares_N = weights_N / weights_N.sum()
    centroid_d = shares_N @ members_Nd
    norm = float(centroid_d.norm())
    return centroid_d * (float(shares_N @ members_Nd.norm(dim=1)) / norm if norm else 0.0)


LORA_LEGO = MergeMethod(
    name="lora_lego", config=LoraLegoConfig, scope="tensor", matrices=lora_lego, factors=True
)
