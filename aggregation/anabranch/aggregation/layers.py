"""Which layer of a model a module belongs to, by its name. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

STACKS = ("layers", "layer", "h", "blocks", "block")
"""What transformers calls a list of layers (PEFT's ``COMMON_LAYERS_PATTERN``)."""


def layer_of(module: str) -> tuple[str, int] | None:
    """The list of layers a module stands in, and its number there; None outside of any.

    The first number after a name in ``STACKS`` counts: ``encoder.layer.3.attention.self.query`` of
    an adapter and ``model.layers.3.mlp.up_proj.weight`` of a checkpoint are in layer 3, whatever is
    numbered inside a layer (experts, T5's sublayers) or elsewhere (a head of several steps).
    """
    parts = module.split(".")
    for place, (before, part) in enumerate(pairwise(parts), start=1):
        if before in STACKS and part.isascii() and part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def depths(modules: Iterable[str]) -> dict[str, float]:
    """How deep each module lies, from 0 in its first layer to 1 in its last, as mergekit counts.

    A list of layers ends with the largest number that a module has; encoder and decoder are counted
    apart. The one layer of a list is at 1, and what is in no layer (embeddings, last norm, heads)
    at 0.
    """
    found = {module: layer_of(module) for module in modules}
    last: dict[str, int] = {}
    for layer in found.values():
        if layer is not None:
            last[layer[0]] = max(layer[1], last.get(layer[0], 0))
    depth = {}
    for module, layer in found.items():
        if layer is None:
            depth[module] = 0.0
        else:
            depth[module] = layer[1] / last[layer[0]] if last[layer[0]] else 1.0
    return depth


def interpolated(values: Sequence[float], depth: float) -> float:
    """A gradient's value at a depth: linear between points at equal distances, as mergekit has it.

    Args:
        values: Its points, from the first layer to the last.
        depth: From 0 to 1.
    """
    place = depth * (len(values) - 1)
    before = int(place)
    after = min(len(values) - 1, before + 1)
    part = place - before
    return (1 - part) * values[before] + part * values[after]
