"""OPCM: merge task vectors as they arrive, each cleaned of what is there (Tang et al., 2501.09522).

The paper keeps Δ_t = (λ_{t−1} Δ_{t−1} + clean(τ_t)) / λ_t and chooses λ_t so that ‖Δ_t‖ is the mean
norm of the task vectors so far. Cleaning reads directions only, so λ can wait: with R_t = λ_t Δ_t
this is R_t = R_{t−1} + clean(τ_t; R_{t−1}), module by module, and one factor over the whole model
when the result is wanted.

Shape legend: C contributions, m rows, n columns, r directions of the merged sum, k inner rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.core_space import Directions, directions, product_of
from anabranch.aggregation.finite import check_finite, check_floating
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.task_vector import Held, LowRank, TaskVector, held, norm, scaled


class OpcmConfig(MethodConfig):
    """Parameters of OPCM."""

    alpha: float = Field(0.5, ge=0, lt=1)
    """Share of the merged sum's singular values whose directions a newcomer may not touch."""
    rank: int | None = Field(None, ge=1)
    """Directions of each module kept between contributions, which bounds the memory of a stream of
    adapters; None keeps all, min(m, n) at most."""


def opcm(deltas: Sequence[Held], weights_C: Tensor, config: OpcmConfig) -> Held:
    """R_C for one module, in the order of the contributions; the engine rescales the model.

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive.
        config: What newcomers may touch, and how much is kept.

    Returns:
        The sum [m, n] before its rescaling: factors where all inputs are factors.
    """
    total = _nothing(deltas[0])
    assert isinstance(total, Directions)
    for delta, weight in zip(deltas, weights_C.tolist(), strict=True):
        total = add_cleaned(total, delta, weight, config)
    if all(isinstance(delta, LowRank) for delta in deltas):
        return product_of(total)
    return ((total.u_pr * total.s_r) @ total.v_rq).float()


def add_cleaned(total: Directions, delta: Held, weight: float, config: OpcmConfig) -> Directions:
    """R + w·clean(τ; R): τ without what would move the directions R already has.

    With P = Uᵀ·τ·Vᵀ for R = U·diag(s)·V, cleaning removes P's diagonal and its leading block, up to
    the first direction at which the sum of singular values exceeds ``alpha``. The paper takes all
    of U and V, in which those beyond the rank of R are chance; here they are left out, so what lies
    outside of R is kept whole.

    Args:
        total: R.
        delta: τ [m, n].
        weight: w, positive.
        config: The share, and how many directions to keep.
    """
    u_mr, s_r, v_rn = total
    reached_r = s_r.cumsum(0) / s_r.sum()
    split = int((reached_r <= config.alpha).sum())
    if isinstance(delta, LowRank):
        b_mk, a_kn = delta.b_mk.double(), delta.a_kn.double()
        inside_rr = (u_mr.T @ b_mk) @ (a_kn @ v_rn.T)
    else:
        inside_rr = u_mr.T @ delta.double() @ v_rn.T
    removed_rr = inside_rr.diagonal().diag_embed()
    removed_rr[:split, :split] = inside_rr[:split, :split]
    core_rr = s_r.diag() - weight * removed_rr
    if not isinstance(delta, LowRank):
        return directions((u_mr @ core_rr @ v_rn).add_(delta, alpha=weight), config.rank)
    stacked = LowRank(torch.cat([u_mr @ core_rr, weight * b_mk], 1), torch.cat([v_rn, a_kn]))
    return directions(stacked, config.rank)


@dataclass(frozen=True)
class OpcmState:
    """All that is kept of the task vectors merged so far: no more for a thousand than for few.

    Attributes:
        config: The parameters.
        sums: By module, R: its directions for a matrix, the weighted sum for other parameters.
        norm_sum: Σ w_t·‖τ_t‖.
        weight_sum: Σ w_t.
        base_hash: Hash of the base, None while nobody has stated one.
    """

    config: OpcmConfig = field(default_factory=OpcmConfig)
    sums: Mapping[str, Directions | Tensor] = field(default_factory=dict)
    norm_sum: float = 0.0
    weight_sum: float = 0.0
    base_hash: str | None = None

    def merged(self) -> TaskVector:
        """Δ: the sums at the mean norm of the task vectors, as factors where those are smaller.

        Raises:
            ValueError: Nothing has been merged yet.
        """
        if not self.weight_sum:
            raise ValueError("nothing to merge: give merge_next at least one task vector")
        deltas: dict[str, Held] = {}
        for module, total in self.sums.items():
            if isinstance(total, Tensor):
                deltas[module] = total.float()
                continue
            m, n = len(total.u_pr), total.v_rq.shape[1]
            small = len(total.s_r) * (m + n) < m * n
            product = product_of(total)
            deltas[module] = product if small else product.dense()
        reached = math.hypot(*(norm(delta) for delta in deltas.values()))
        factor = self.norm_sum / self.weight_sum / reached if reached else 0.0
        return TaskVector({m: scaled(d, factor) for m, d in deltas.items()}, self.base_hash)


def merge_next(state: OpcmState, update: TaskVector, weight: float = 1.0) -> OpcmState:
    """The state after one more task vector, for updates that arrive when they arrive.

    Args:
        state: What was merged before; ``OpcmState(config)`` to begin with.
        update: The task vector.
        weight: What it counts for, such as less the staler it is.

    Raises:
        ValueError: A weight that is not positive, an update for other modules, shapes or another
            base, or with numbers that are not finite.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight: {weight} of an update; give one above zero, or leave it out")
    if state.sums and update.names() != sorted(state.sums):
        odd = ", ".join(sorted(set(update.names()) ^ set(state.sums))[:3])
        raise ValueError(f"the update changes other modules than those merged, such as {odd}")
    if None not in (state.base_hash, update.base_hash) and state.base_hash != update.base_hash:
        raise ValueError(
            f"the update was trained on base {str(update.base_hash)[:12]}, "
            f"those merged on {str(state.base_hash)[:12]}; merge updates to one base"
        )
    sums: dict[str, Directions | Tensor] = {}
    for module, change in update.items():
        delta = held(change)
        of = f"the update: module {module}"
        check_floating(delta, of)
        check_finite(delta, of)
        before = state.sums[module] if state.sums else _nothing(delta)
        shape = _shape(before)
        if shape != delta.shape:
            raise ValueError(
                f"module {module} has shape {tuple(delta.shape)} in the update, "
                f"{tuple(shape)} in those merged; they belong to different bases"
            )
        if isinstance(before, Directions):
            sums[module] = add_cleaned(before, delta, weight, state.config)
        else:
            assert isinstance(delta, Tensor)
            sums[module] = before.double().add(delta, alpha=weight)
    size = math.hypot(*(norm(delta) for _, delta in update.items()))
    return OpcmState(
        state.config,
        sums,
        state.norm_sum + weight * size,
        state.weight_sum + weight,
        state.base_hash or update.base_hash,
    )


def _shape(total: Directions | Tensor) -> torch.Size:
    if isinstance(total, Tensor):
        return total.shape
    return torch.Size((len(total.u_pr), total.v_rq.shape[1]))


def _nothing(delta: Held) -> Directions | Tensor:
    """A sum of nothing: a matrix without directions, or zeros."""
    like = delta.b_mk if isinstance(delta, LowRank) else delta
    if len(delta.shape) != 2:
        return torch.zeros_like(like, dtype=torch.float64)
    m, n = delta.shape
    none = torch.zeros(0, dtype=torch.float64, device=like.device)
    return Directions(none.new_zeros(m, 0), none, none.new_zeros(0, n))


OPCM = MergeMethod(name="opcm", config=OpcmConfig, scope="model", matrices=opcm, mean_norm=True)
