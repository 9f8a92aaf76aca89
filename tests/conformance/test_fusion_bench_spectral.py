"""TSV-M, Iso-C, Iso-CTS, KnOTS and OPCM against FusionBench 0.2.33, and where they part.

Both sides get fp64; ours answers in fp32. Where all directions that FusionBench stacks are live and
independent, the two agree. Elsewhere (task vectors of low rank, equal or opposite ones) it
orthogonalises or averages over singular vectors whose value is zero and whose direction is chance:
its answer then depends on the basis it is computed in. Ours turns with the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import transformers.models.clip.modeling_clip as clip
from fusion_bench import BaseModelPool
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
    compute_and_sum_svd_mem_reduction,
)
from torch import Tensor, nn

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.iso_c import ISO_C
from anabranch.aggregation.methods.iso_cts import ISO_CTS, IsoCtsConfig
from anabranch.aggregation.methods.knots_ties import KNOTS_TIES, KnotsTiesConfig
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.methods.tsv_m import TSV_M
from anabranch.vectors import LowRank, TaskVector

Oracle = Callable[[Sequence[Tensor]], Tensor]


def theirs_tsv_m(taus: Sequence[Tensor]) -> Tensor:
    return compute_and_sum_svd_mem_reduction([{"w": t} for t in taus], accelerator="cpu")["w"]


def theirs_iso_c(taus: Sequence[Tensor]) -> Tensor:
    return iso_c([{"w": t} for t in taus], accelerator="cpu")["w"]


def theirs_iso_cts(common: float) -> Oracle:
    return lambda taus: iso_cts([{"w": t} for t in taus], common, accelerator="cpu")["w"]


METHODS: dict[str, tuple[Oracle, MergeMethod, MethodConfig | None]] = {
    "tsv_m": (theirs_tsv_m, TSV_M, None),
    "iso_c": (theirs_iso_c, ISO_C, None),
    "iso_cts .8": (theirs_iso_cts(0.8), ISO_CTS, IsoCtsConfig(common=0.8)),
    "iso_cts .5": (theirs_iso_cts(0.5), ISO_CTS, IsoCtsConfig(common=0.5)),
    "iso_cts 1": (theirs_iso_cts(1.0), ISO_CTS, IsoCtsConfig(common=1.0)),
}

DEPENDENT = ["one zero", "equal contributions", "opposite contributions", "of rank two"]
CHANCE = {
    "tsv_m": [*DEPENDENT, "half of them zero"],
    "iso_c": ["of rank two"],
    "iso_cts .8": DEPENDENT,
    "iso_cts .5": [*DEPENDENT, "half of them zero"],
    "iso_cts 1": ["of rank two"],
}
"""Where what FusionBench stacks is not independent, by method."""


def merged(name: str, taus: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """FusionBench's and ours of the same task vectors, in fp64."""
    wide = [tau.double() for tau in taus]
    oracle, method, config = METHODS[name]
    return oracle(wide), method(torch.stack(wide), None, config).double()


TURN_mm = torch.linalg.qr(
    torch.randn(23, 23, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
).Q


def turned(taus: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The same task vectors in another orthonormal basis of their columns, to 7 digits.

    Entries are rounded alike in all, so that equal and opposite task vectors stay so.
    """
    noise = torch.randn(taus[0].shape, generator=torch.Generator().manual_seed(seed)).double()
    return [TURN_mm @ (tau.double() * (1 + 1e-7 * noise)) for tau in taus]


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest entry."""
    largest = max(1e-5, float(expected.abs().max()))
    torch.testing.assert_close(found / largest, expected / largest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_on_full_rank_they_agree(name: str, tensors: list[Tensor]) -> None:
    theirs, found = merged(name, tensors)
    assert_near(found, theirs)
    theirs, found = merged(name, [tensor.T for tensor in tensors])
    assert_near(found, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_on_adversarial_tensors_they_agree_or_fusion_bench_is_chance(
    name: str, adversarial: list[Tensor], request: pytest.FixtureRequest
) -> None:
    theirs, found = merged(name, adversarial)
    assert bool(found.isfinite().all())
    if request.node.callspec.params["adversarial"] not in CHANCE[name]:
        assert_near(found, theirs)
        return
    size = float(theirs.norm())
    apart = []
    for seed in range(4):
        theirs_turned, found_turned = merged(name, turned(adversarial, seed))
        apart.append(float((theirs_turned - TURN_mm @ theirs).norm()) / size)
        assert float((found_turned - TURN_mm @ found).norm()) < 1e-5 * size
    assert max(apart) > 0.05


@pytest.mark.parametrize("name", METHODS)
def test_adapters_merge_as_fusion_bench_merges_their_cores(
    name: str, tensors: list[Tensor]
) -> None:
    """Where it is defined for adapters: in orthonormal bases of all their columns and rows.

    In the 8 x 8 cores of four adapters of rank 2, every direction is live.
    """
    factors = [LowRank(tensor[:, :2], tensor[:2]) for tensor in tensors]
    left_mp = torch.linalg.qr(torch.cat([f.b_mk for f in factors], dim=1).double()).Q
    right_nq = torch.linalg.qr(torch.cat([f.a_kn for f in factors]).T.double()).Q
    cores = [left_mp.T @ f.b_mk.double() @ f.a_kn.double() @ right_nq for f in factors]
    oracle, method, config = METHODS[name]
    weights_C = torch.ones(4, dtype=torch.float64)
    found = method.merge_modules({"m": factors}, weights_C, config or method.config())["m"]
    assert isinstance(found, LowRank)
    assert_near(found.dense().double(), left_mp @ oracle(cores) @ right_nq.T)


def test_iso_c_on_adapters_differs_by_the_directions_counted(tensors: list[Tensor]) -> None:
    """A known disagreement: FusionBench's mean runs over min(m, n) values, most of them zero.

    On the directions there are, its answer is ours times (8 of 23); the rest of it is chance.
    """
    taus = [tensor[:, :2].double() @ tensor[:2].double() for tensor in tensors]
    theirs, found = merged("iso_c", taus)
    u_mr, _, v_rn = torch.linalg.svd(sum(taus), full_matrices=False)  # type: ignore[call-overload]
    u_mr, v_rn = u_mr[:, :8], v_rn[:8]
    inside = u_mr @ (u_mr.T @ theirs @ v_rn.T) @ v_rn
    assert_near(found * 8 / 23, inside)
    assert float((theirs - inside).norm() / theirs.norm()) > 0.5


def test_with_more_task_vectors_than_directions_tsv_m_keeps_one_of_each() -> None:
    """A known disagreement: ⌊3 / 4⌋ = 0 directions of each leave nothing there."""
    taus = [torch.eye(3, 5) * (index + 1) for index in range(4)]
    theirs, found = merged("tsv_m", taus)
    assert not bool(theirs.any())
    assert bool(found.any())


def test_iso_cts_with_nothing_in_common_keeps_within_the_directions_there_are(
    tensors: list[Tensor],
) -> None:
    """A known disagreement: round(23 / 4)·4 = 24 of 23 directions make FusionBench fail."""
    with pytest.raises(RuntimeError, match="must match the existing size"):
        theirs_iso_cts(0.0)(tensors)
    found = ISO_CTS(torch.stack(tensors), None, IsoCtsConfig(common=0.0))
    assert torch.linalg.matrix_rank(found) == 23


@pytest.mark.parametrize("name", METHODS)
def test_vectors_get_their_mean(name: str, tensors: list[Tensor]) -> None:
    theirs, found = merged(name, [tensor[0] for tensor in tensors])
    assert_near(found, theirs)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize(
    "adversarial",
    ["one contribution", "equal contributions", "one far larger", "of rank two"],
    indirect=True,
)
def test_knots_shares_its_basis(adversarial: list[Tensor], density: float) -> None:
    """FusionBench has the basis only, so TIES in it is ours. Directions have no sign of their own:
    with no entry trimmed to an equal one, none changes the result."""
    basis_mr, s_r, parts = subspace_alignment([tau.double() for tau in adversarial])
    z_Crn = torch.stack([s_r[:, None] * part for part in parts])
    expected = basis_mr @ TIES(z_Crn, None, TiesConfig(density=density)).double()
    found = KNOTS_TIES(torch.stack(adversarial), None, KnotsTiesConfig(density=density))
    assert_near(found.double(), expected)


def test_fusion_bench_turns_zeros_into_rounding_in_its_basis(tensors: list[Tensor]) -> None:
    """A known disagreement: its diag(s)·V of nothing is 1e-15, which TIES then counts as a vote."""
    _, s_r, parts = subspace_alignment([torch.zeros(23, 31).double(), tensors[0].double()])
    assert 0 < float((s_r[:, None] * parts[0]).abs().max()) < 1e-12
    config = KnotsTiesConfig(density=1.0)
    with_zeros = KNOTS_TIES(torch.stack([torch.zeros(23, 31), *tensors]), None, config)
    assert_near(with_zeros, KNOTS_TIES(torch.stack(tensors), None, config))


def test_fusion_bench_loses_small_task_vectors_in_its_basis(tensors: list[Tensor]) -> None:
    """A known disagreement: singular values up to 1e-4 count as zero there, whatever the unit."""
    small = [1e-6 * tensor for tensor in tensors]
    assert len(subspace_alignment(small)[1]) == 0
    torch.testing.assert_close(
        1e6 * KNOTS_TIES(torch.stack(small)), KNOTS_TIES(torch.stack(tensors)), rtol=1e-4, atol=1e-4
    )


def model(weight_mn: Tensor, bias_m: Tensor) -> nn.Module:
    """One linear layer, of the module names ``0.weight`` and ``0.bias``, fp64."""
    layer = nn.Linear(weight_mn.shape[1], weight_mn.shape[0]).double()
    layer.weight.data, layer.bias.data = weight_mn.double(), bias_m.double()
    return nn.Sequential(layer)


def opcm_of_both(tensors: list[Tensor], alpha: float) -> list[tuple[Tensor, Tensor]]:
    """FusionBench's and ours per parameter, of weights and, as biases, their first columns."""
    with pytest.MonkeyPatch.context() as patch:
        # transformers 5.23 has one class where its imports want two; nothing here uses either.
        patch.setattr(clip, "CLIPVisionTransformer", clip.CLIPVisionModel, raising=False)
        from fusion_bench.method.opcm.opcm import OPCMForCLIP
    algorithm = OPCMForCLIP(alpha=alpha, shuffle_order=False, save_on_every_step=False)
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    models = {str(index): model(tensor, tensor[:, 0]) for index, tensor in enumerate(tensors)}
    base = model(torch.zeros_like(tensors[0]), torch.zeros(len(tensors[0])))
    theirs = algorithm.run(BaseModelPool({"_pretrained_": base, **models})).state_dict()
    vectors = [TaskVector({"0.weight": t, "0.bias": t[:, 0]}) for t in tensors]
    found = merge_task_vectors(vectors, Recipe(method="opcm", params={"alpha": alpha}))
    return [(theirs[name], delta.double()) for name, delta in found.items()]  # type: ignore[union-attr]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    "adversarial",
    ["one contribution", "equal contributions", "one far larger", "equal magnitudes"],
    indirect=True,
)
def test_opcm(adversarial: list[Tensor], alpha: float) -> None:
    for theirs, found in opcm_of_both(adversarial, alpha):
        assert_near(found, theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_opcm_on_full_rank(tensors: list[Tensor], alpha: float) -> None:
    for given in (tensors, [tensor.T for tensor in tensors]):
        for theirs, found in opcm_of_both(given, alpha):
            assert_near(found, theirs)


def test_opcm_cleans_no_directions_that_are_chance(tensors: list[Tensor]) -> None:
    """A known disagreement: FusionBench also removes a newcomer's diagonal in directions that the
    merged sum does not have, so that part of it is lost to chance."""
    taus = [tensor[:, :2] @ tensor[:2] for tensor in tensors]
    _, (theirs, found) = opcm_of_both(taus, 0.5)
    _, (theirs_turned, found_turned) = opcm_of_both(turned(taus, 0), 0.5)
    assert float((theirs_turned - TURN_mm @ theirs).norm() / theirs.norm()) > 0.01
    assert float((found_turned - TURN_mm @ found).norm() / found.norm()) < 1e-5


def test_opcm_of_nothing_is_nothing(tensors: list[Tensor]) -> None:
    """A known disagreement: FusionBench divides by the merged norm, and fails at its next step."""
    zeros = [torch.zeros(23, 31)] * 3
    with pytest.raises(RuntimeError, match="non-finite"):
        opcm_of_both(zeros, 0.5)
    vectors = [TaskVector({"w": zero}) for zero in zeros]
    merged_w = dict(merge_task_vectors(vectors, Recipe(method="opcm")).items())["w"]
    assert not bool(merged_w.any())  # type: ignore[union-attr]
