"""What is tried of every merge method, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]

SIZES = (1.0, 1.4, 2.0, 2.8, 4.0)
"""How large the merged task vector is made: its norm over the mean norm of those merged. They are
tried from the smallest on, until validation accuracy falls.

λ means another thing in a sum, in a mean and in a mean of survivors; this means the same in all of
them, so that one grid is fair to all.
"""

UNSCALED = "mean (λ = 1)"
"""Plain weight averaging, the one row that is not scaled: scaled, the mean is task arithmetic."""

SKIPPED = {
    "mean": f"scaled it is task arithmetic; it stands as '{UNSCALED}'",
    "slerp": "merges two contributions, not more",
    "supermask": "merges scores of frozen weights, not task vectors",
    "bulyan": "is Meamed without anybody malicious, and with one it takes seven",
    "fltrust": "needs a contribution that the coordinator trained",
    "fisher": "needs every contribution's Fisher information, which takes data",
}
"""Methods that are not scored, and why."""


def params_tried(rank: int) -> dict[str, tuple[Params, ...]]:
    """Parameters by method; the size is chosen with the first, then the others are tried at it.

    Args:
        rank: Of the adapters.
    """
    once: tuple[Params, ...] = ({},)
    densities = tuple({"density": density} for density in (0.2, 0.5))
    return {
        "breadcrumbs": densities,
        "breadcrumbs_ties": densities,
        "consensus": tuple({"mask_scale": scale} for scale in (0.4, 0.2, 0.6)),
        "dare_linear": densities,
        "dare_ties": densities,
        "della": tuple(reversed(densities)),
        "della_linear": tuple(reversed(densities)),
        "caf": once,
        "centred_clipping": once,
        "crfl": tuple({"sigma": sigma} for sigma in (0.0, 1e-5)),
        "dnc": once,
        "flame": once,
        "foolsgold": once,
        "fedit": once,
        "geometric_median": once,
        "hetlora": once,
        "iso_c": once,
        "iso_cts": tuple({"common": share} for share in (0.8, 0.5)),
        "karcher": once,
        "knots_ties": tuple({"density": density} for density in (0.2, 0.5, 1.0)),
        "lora_lego": ({"rank": rank}, {"rank": 4 * rank}),
        "magmax": once,
        "mda": once,
        "meamed": once,
        "median": once,
        "model_stock": once,
        "multi_krum": once,
        "multi_slerp": once,
        "opcm": tuple({"alpha": share} for share in (0.5, 0.2)),
        "pcb": tuple({"ratio": ratio} for ratio in (0.1, 0.2)),
        "sce": tuple({"select": fraction} for fraction in (1.0, 0.5)),
        "sign_vote": once,
        "smea": once,
        "task_arithmetic": once,
        "ties": tuple({"density": density} for density in (0.2, 0.1, 0.5)),
        "trimmed_mean": tuple({"trim": trim} for trim in (1, 2)),
        "tsv_m": once,
        "robust_ties": tuple({"density": density} for density in (0.2, 0.5)),
        "rank_vote": tuple({"density": density} for density in (0.5, 0.2)),
    }
