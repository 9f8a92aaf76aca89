"""Which layer a module's name says it is in, and where in the model that is."""

from __future__ import annotations

import pytest

from anabranch.aggregation.layers import depths, interpolated, layer_of


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3)),
        (
            "base_model.model.model.layers.31.self_attn.q_proj",
            ("base_model.model.model.layers", 31),
        ),
        ("encoder.layer.3.attention.self.query", ("encoder.layer", 3)),
        ("transformer.h.0.attn.c_attn.weight", ("transformer.h", 0)),
        ("h.11.mlp.c_fc.bias", ("h", 11)),
        ("encoder.block.2.layer.0.SelfAttention.q", ("encoder.block", 2)),
        ("model.layers.5.block_sparse_moe.experts.7.w1.weight", ("model.layers", 5)),
        ("visual.blocks.4.attn.qkv.weight", ("visual.blocks", 4)),
        ("model.embed_tokens.weight", None),
        ("classifier.0.weight", None),
        ("head.bias", None),
        ("layers", None),
        ("model.layers.norm.weight", None),
        ("layers.³.w", None),
    ],
)
def test_names_of_transformers_and_of_adapters(module: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(module) == layer


def test_each_list_of_layers_goes_from_0_to_1() -> None:
    modules = ["shared.weight", *(f"encoder.block.{i}.q" for i in range(5)), "lm_head.weight"]
    found = depths([*modules, "decoder.block.0.q", "decoder.block.2.q", "vision.layer.0.q"])
    assert [found[module] for module in modules] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.0]
    assert (found["decoder.block.0.q"], found["decoder.block.2.q"]) == (0.0, 1.0)
    assert found["vision.layer.0.q"] == 1.0


def test_a_gradient_is_linear_between_its_points() -> None:
    points = [0.0, 1.0, 0.5]
    assert [interpolated(points, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0.5, 1, 0.75, 0.5]
    assert interpolated([0.3], 0.7) == 0.3
