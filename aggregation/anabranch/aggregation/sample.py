"""Which entries stand for all of them, for methods that look at a sample.

Shape legend: S entries of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.vectors.counter import uniform

_NOBODY = -1
"""In place of a contribution in the name of the stream: a sample is of the same entries of all."""


def positions(sizes: Mapping[str, int], count: int, config: Any) -> dict[str, Tensor]:
    """Some entries of each module, as many as its share of the model's, rounded up.

    They follow from the seed, the name and the sizes alone: whoever merges the module draws them.

    Args:
        sizes: Entries of every module of the scope.
        count: How many entries to draw of all; where there are no more, all are taken.
        config: What draws them; its field ``seed``, 0 where there is none.

    Returns:
        Places in each module [S], ascending, none twice (so a few may be missing).
    """
    total = sum(sizes.values())
    seed = getattr(config, "seed", 0)
    drawn = {}
    for module, size in sizes.items():
        share = -(-count * size // total) if total else 0
        if count >= total:
            drawn[module] = torch.arange(size)
        else:
            places_S = uniform(share, (seed, module, _NOBODY)).mul_(size).long()
            drawn[module] = torch.from_numpy(np.unique(places_S.numpy()))
    return drawn
