"""k-means: Lloyd's iteration from k-means++ starts (Arthur and Vassilvitskii, 2007).

Shape legend: N points, d coordinates, k clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.vectors.counter import uniform

ITERATIONS = 100


def k_means(
    points_Nd: Tensor, weights_N: Tensor, clusters: int, *, seed: int, restarts: int
) -> Tensor:
    """Cluster of each point, from the best of several seeded starts.

    Args:
        points_Nd: The points [N, d], fp64.
        weights_N: What each counts for [N], positive, fp64.
        clusters: Most clusters wanted; fewer come where fewer points differ.
        seed: Names the draws: the same seed gives the same clusters anywhere.
        restarts: How many starts; of equal results the first counts.

    Returns:
        A number below ``clusters`` for each point [N].
    """
    best_N = torch.arange(len(points_Nd), device=points_Nd.device)
    if clusters >= len(points_Nd):
        return best_N
    least = torch.inf
    for restart in range(restarts):
        draws_k = uniform(clusters, (seed, "k-means", restart), device=points_Nd.device)
        centres_kd = _spread(points_Nd, weights_N, draws_k)
        labels_N = _nearest(points_Nd, centres_kd)
        for _ in range(ITERATIONS):
            centres_kd = _centres(points_Nd, weights_N, labels_N, centres_kd)
            next_N = _nearest(points_Nd, centres_kd)
            if torch.equal(next_N, labels_N):
                break
            labels_N = next_N
        inertia = float(((points_Nd - centres_kd[labels_N]).square().sum(1) * weights_N).sum())
        if inertia < least:
            least, best_N = inertia, labels_N
    return best_N


def _spread(points_Nd: Tensor, weights_N: Tensor, draws_k: Tensor) -> Tensor:
    """Points drawn one by one with probability ∝ weight · squared distance to those drawn."""
    chosen: list[int] = []
    mass_N = weights_N
    near_N = torch.full_like(weights_N, torch.inf)
    first_total = 0.0
    for draw in draws_k:
        total = float(mass_N.sum())
        # What is left of equal points once one is chosen is rounding.
        if chosen and total <= 1e-24 * first_total:
            break
        index = int(torch.searchsorted(mass_N.cumsum(0), draw * total, right=True))
        chosen.append(min(index, len(points_Nd) - 1))
        near_N = near_N.minimum((points_Nd - points_Nd[chosen[-1]]).square().sum(1))
        mass_N = weights_N * near_N
        if len(chosen) == 1:
            first_total = float(mass_N.sum())
    return points_Nd[chosen]


def _nearest(points_Nd: Tensor, centres_kd: Tensor) -> Tensor:
    # By differences: from inner products, small distances between long vectors lose their digits.
    distances_Nk = torch.cdist(points_Nd, centres_kd, compute_mode="donot_use_mm_for_euclid_dist")
    return distances_Nk.argmin(dim=1)


def _centres(points_Nd: Tensor, weights_N: Tensor, labels_N: Tensor, centres_kd: Tensor) -> Tensor:
    """Weighted means of the clusters; one that lost its points stays where it was."""
    sums_kd = torch.zeros_like(centres_kd).index_add_(0, labels_N, points_Nd * weights_N[:, None])
    mass_k = weights_N.new_zeros(len(centres_kd)).index_add_(0, labels_N, weights_N)
    means_kd = sums_kd / mass_k.clamp(min=torch.finfo(mass_k.dtype).tiny)[:, None]
    return torch.where(mass_k[:, None] > 0, means_kd, centres_kd)
