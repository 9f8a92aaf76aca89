"""How importance crosses the network: as square roots, at 8 bits by blocks.

A Fisher spans many orders of magnitude. Its roots, the sizes of gradients, span half as many: a
level of a block is then 6e-5 of the block's largest importance, at a byte per number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from anabranch.wire.codecs.codec import Form
from anabranch.wire.codecs.dense import EIGHT_BITS
from anabranch.wire.errors import WireError

IMPORTANCE = EIGHT_BITS
"""The codec of its frames, whatever the codec of the update."""

_LARGEST_ROOT = math.sqrt(torch.finfo(torch.float32).max)


def square_roots(importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is encoded.

    Raises:
        ValueError: A number below zero; names the tensor.
    """
    for name, tensor in importance.items():
        if bool((tensor < 0).any()):
            raise ValueError(f"{name}: importance is below zero; give squared gradients")
    return {name: tensor.float().sqrt() for name, tensor in importance.items()}


def squares(roots: Mapping[str, Form]) -> dict[str, Tensor]:
    """The importance that a message holds, in fp32.

    Raises:
        WireError: A root below zero, which no sender writes, or one whose square leaves fp32.
    """
    importance = {}
    for name, form in roots.items():
        root = form.dense()
        low, high = (float(end) for end in torch.aminmax(root)) if root.numel() else (0.0, 0.0)
        if low < 0:
            raise WireError("importance", f"the importance of {name} has a root of {low:.3g}")
        # A comparison that NaN fails.
        if not high < _LARGEST_ROOT:
            raise WireError(
                "importance",
                f"the importance of {name}, {high:.3g} squared, is beyond fp32's range",
            )
        importance[name] = root.square()
    return importance
