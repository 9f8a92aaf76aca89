"""FLTrust: trust grows from one update of the coordinator's own (Cao et al., 2012.13995).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import (
    MergeMethod,
    MethodConfig,
    combine,
    cosines,
    inner_products,
)
from anabranch.aggregation.robust.pre import norms
from anabranch.aggregation.withdrawal import place


class FlTrustConfig(MethodConfig):
    """Parameters of FLTrust."""

    root: str = Field("root", min_length=1)
    """Which contribution is the root: the coordinator trains it itself, on clean data of its own.
    By name, or the last part of a name that is a path. Whoever gives the names sees to it that no
    client takes this one; a federation asks for signatures."""


def fltrust_coefficients(
    weights_C: Tensor,
    gram_CC: Tensor | None,
    config: FlTrustConfig,
    *,
    names: Sequence[str],
) -> Tensor:
    """Coefficients of the mean of all others at the root's norm, by ReLU of the cosine with it.

    The root itself is not merged. Where nobody points its way all coefficients are zero: nothing
    changes in this round.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: The root's name.
        names: Of the contributions.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: No contribution has the root's name, or there is no other.
    """
    assert gram_CC is not None
    root = place(config.root, names, "fltrust: root")
    if len(names) == 1:
        raise ValueError("fltrust: root: is the only contribution; give others to weigh by it")
    norms_C = norms(gram_CC)
    trust_C = cosines(gram_CC)[root].clamp(min=0)
    trust_C[root] = 0
    if not bool(trust_C.any()):
        return torch.zeros_like(norms_C)
    # Those of no length have a cosine of zero.
    scale_C = torch.where(norms_C > 0, norms_C[root] / norms_C, 0.0)
    return trust_C * scale_C / trust_C.sum()


def fltrust(
    deltas_CD: Tensor,
    weights_C: Tensor | None = None,
    config: FlTrustConfig | None = None,
    *,
    names: Sequence[str],
) -> Tensor:
    """Mean of the contributions that point where the root does, at its norm.

    Args:
        deltas_CD: Task vectors [C, D], the root's among them.
        weights_C: Not read.
        config: The root's name; None takes the default.
        names: Of the contributions.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: No contribution has the root's name, or there is no other.
    """
    gram_CC = inner_products(deltas_CD)
    config = config or FlTrustConfig()
    coefficients_C = fltrust_coefficients(gram_CC[0], gram_CC, config, names=names)
    return combine(deltas_CD, coefficients_C)


FLTRUST = MergeMethod(
    name="fltrust",
    config=FlTrustConfig,
    scope="model",
    coefficients=fltrust_coefficients,
    needs_gram=True,
    needs_names=True,
)
