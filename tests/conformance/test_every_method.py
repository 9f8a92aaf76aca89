"""Which method is compared with what: a method that comes new, here or there, fails a test here.

For every name of mergekit 0.1.5, PEFT 0.21 and FusionBench 0.2.33, our method that it is compared
with in this folder, or why there is none. What none of them has is compared with a naive loop.
"""

from __future__ import annotations

import pkgutil
import typing
from pathlib import Path

import fusion_bench.method
import pytest
from mergekit.merge_methods.registry import registered_methods
from peft.tuners.lora.model import LoraModel

from anabranch.aggregation.methods import BUILT_IN

TESTS = Path(__file__).parents[1]

MERGEKIT: dict[str, str | list[str]] = {
    "linear": ["mean"],
    "task_arithmetic": ["task_arithmetic"],
    "ties": ["ties"],
    "dare_linear": ["dare_linear"],
    "dare_ties": ["dare_ties"],
    "breadcrumbs": ["breadcrumbs"],
    "breadcrumbs_ties": ["breadcrumbs_ties"],
    "della": ["della"],
    "della_linear": ["della_linear"],
    "sce": ["sce"],
    "model_stock": ["model_stock"],
    "slerp": ["slerp"],
    "nuslerp": ["slerp"],
    "multislerp": ["multi_slerp"],
    "karcher": ["karcher"],
    "passthrough": "copies layers of one model: nothing is merged",
    "nearswap": "moves one model towards another where they are near already: not task vectors",
    "arcee_fusion": "weighs a model by the softmax of its own weights: not task vectors",
    "ram": "not offered",
    "ramplus_tl": "not offered",
}

PEFT: dict[str, str | list[str]] = {
    "cat": ["task_arithmetic"],
    "svd": ["task_arithmetic"],
    "ties_svd": ["ties"],
    "dare_linear_svd": ["dare_linear"],
    "dare_ties_svd": ["dare_ties"],
    "magnitude_prune_svd": ["breadcrumbs"],
    "linear": ["fedit"],
    "ties": "A and B merged apart: the answer depends on the factors, not on ΔW",
    "dare_linear": "A and B merged apart",
    "dare_ties": "A and B merged apart",
    "magnitude_prune": "A and B merged apart",
}

ONE_MODEL = "one model: compressed, pruned, widened or trained, not merged"
MANY_MODELS = "what comes out is a model per task, or one that routes between them"
WITH_DATA = "coefficients, masks or weights fitted on inputs; a merge here sees task vectors only"
FITTED = "the merged weights are an optimiser's, by gradient descent from a merge"
NO_METHOD = "no merge method"

FUSION_BENCH: dict[str, str | list[str]] = {
    "simple_average": ["mean"],
    "weighted_average": ["mean"],
    "linear": "the same averages, sums, TIES and ExPO's extrapolation, for language models on disk",
    "task_arithmetic": ["task_arithmetic"],
    "ties_merging": ["ties"],
    "dare": ["dare_linear", "dare_ties"],
    "tall_mask": ["consensus"],
    "magmax": ["magmax"],
    "slerp": ["slerp"],
    "model_stock": ["model_stock"],
    "fisher_merging": ["fisher"],
    "task_singular_vector": ["tsv_m"],
    "isotropic_merging": ["iso_c", "iso_cts"],
    "knots": ["knots_ties"],
    "opcm": ["opcm"],
    "adamerging": WITH_DATA,
    "concrete_subspace": WITH_DATA,
    "fw_merging": WITH_DATA,
    "gossip": WITH_DATA,
    "regmean": WITH_DATA,
    "regmean_plusplus": WITH_DATA,
    "trust_region": WITH_DATA,
    "ada_svd": WITH_DATA,
    "dawe": MANY_MODELS,
    "surgery": WITH_DATA,
    "doge_ta": FITTED,
    "dop": FITTED,
    "wudi": FITTED,
    "singular_value_calibration": "rescales another method's result; not offered",
    "emr_merging": MANY_MODELS,
    "randes": MANY_MODELS,
    "ensemble": MANY_MODELS,
    "model_recombination": MANY_MODELS,
    "mixture_of_experts": MANY_MODELS,
    "we_moe": MANY_MODELS,
    "sparse_we_moe": MANY_MODELS,
    "pwe_moe": MANY_MODELS,
    "rankone_moe": MANY_MODELS,
    "smile_upscaling": MANY_MODELS,
    "bitdelta": ONE_MODEL,
    "classification": ONE_MODEL,
    "depth_upscaling": ONE_MODEL,
    "expert_sparsity": ONE_MODEL,
    "lm_finetune": ONE_MODEL,
    "moe_pruner": ONE_MODEL,
    "pruning": ONE_MODEL,
    "sparselo": ONE_MODEL,
    "analysis": NO_METHOD,
    "base_algorithm": NO_METHOD,
    "dummy": NO_METHOD,
}

LOOPS = {
    "pcb": "test_pcb.py",
    "median": "test_methods.py",
    "trimmed_mean": "test_methods.py",
    "multi_krum": "test_methods.py",
    "meamed": "robust/test_rules.py",
    "centred_clipping": "robust/test_rules.py",
    "mda": "robust/test_rules.py",
    "smea": "robust/test_rules.py",
    "caf": "robust/test_rules.py",
    "bulyan": "robust/test_trust.py",
    "dnc": "robust/test_trust.py",
    "flame": "robust/test_trust.py",
    "foolsgold": "robust/test_trust.py",
    "fltrust": "robust/test_trust.py",
    "crfl": "robust/test_trust.py",
    "geometric_median": "test_methods.py",
    "hetlora": "test_mixed_ranks.py",
    "sign_vote": "test_sign_vote.py",
    "lora_lego": "test_lora_lego.py",
    "rank_vote": "test_rank_vote.py",
    "robust_ties": "test_robust_ties.py",
    "supermask": "test_supermask.py",
}
"""In tests/aggregation, by method that no package has."""

PACKAGES = [
    (MERGEKIT, [method.spec.name for method in registered_methods()]),
    (
        PEFT,
        typing.get_args(typing.get_type_hints(LoraModel.add_weighted_adapter)["combination_type"]),
    ),
    (FUSION_BENCH, [found.name for found in pkgutil.iter_modules(fusion_bench.method.__path__)]),
]


@pytest.mark.parametrize(("table", "names"), PACKAGES, ids=["mergekit", "peft", "fusion_bench"])
def test_every_method_of_theirs_is_accounted_for(
    table: dict[str, str | list[str]], names: list[str]
) -> None:
    assert sorted(table) == sorted(names)


def test_every_method_of_ours_has_a_reference() -> None:
    compared = {
        name
        for table, _ in PACKAGES
        for ours in table.values()
        if not isinstance(ours, str)
        for name in ours
    }
    assert not compared & LOOPS.keys()
    assert sorted(compared | LOOPS.keys()) == sorted(method.name for method in BUILT_IN)
    for name, file in LOOPS.items():
        assert name in (TESTS / "aggregation" / file).read_text().lower()
