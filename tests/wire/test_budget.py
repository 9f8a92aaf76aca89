"""Densities chosen for a number of bytes."""

from collections.abc import Mapping

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.wire import CodecConfig, UpdateMeta, encode_update, read_manifest
from anabranch.wire.budget import within
from anabranch.wire.encode import Encoded


def _loss(tensors: dict[str, Tensor], sent: dict[str, Tensor]) -> float:
    return sum(float((sent[name] - tensors[name]).square().sum()) for name in tensors)


@pytest.fixture
def uneven() -> dict[str, Tensor]:
    """Tensors of different sizes, spreads and tails."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index in range(12):
        x = torch.randn(64 * (1 + index), 50, generator=generator)
        tensors[f"m{index}"] = x * 3.0 ** (index % 4 - 2) * (x.abs() if index % 3 else 1)
    return tensors


@pytest.mark.parametrize("name", ["ternary", "two-bit"])
@pytest.mark.parametrize("budget", ["3 kB", "12 kB", "24 kB"])
def test_a_budget_is_kept_and_used(
    name: str, budget: str, uneven: dict[str, Tensor], meta: UpdateMeta
) -> None:
    codec = CodecConfig.model_validate({"name": name, "budget": budget})
    assert codec.budget_bytes is not None
    encoded = encode_update(uneven, meta, codec)
    assert 0.97 * codec.budget_bytes <= len(encoded.blob) <= codec.budget_bytes
    # One density for all, of about the same bytes, loses more.
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        plain = encode_update(uneven, meta, CodecConfig(name=codec.name, density=middle))
        low, high = (middle, high) if len(plain.blob) <= codec.budget_bytes else (low, middle)
    plain = encode_update(uneven, meta, CodecConfig(name=codec.name, density=low))
    assert _loss(uneven, encoded.sent) < 0.98 * _loss(uneven, plain.sent)


def test_a_large_budget_keeps_what_helps_and_a_small_one_is_refused(meta: UpdateMeta) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, generator=generator)
    tensors = {"a": x, "c": torch.zeros(5)}
    encoded = encode_update(tensors, meta, CodecConfig(budget="1 MB"))
    (frame,) = read_manifest(encoded.blob).frames
    kept = [row.nonzeros or 0 for row in frame.tensors]
    # With one magnitude a normal tensor is nearest at about half of its entries.
    assert 0.45 * 5000 < kept[0] < 0.65 * 5000
    assert kept[1] == 0
    two = encode_update(tensors, meta, CodecConfig(name="two-bit", budget="1 MB"))
    assert _loss(tensors, two.sent) < 0.6 * _loss(tensors, encoded.sent)
    with pytest.raises(ValueError, match="budget is 100 B, but one entry of each of the 2"):
        encode_update(tensors, meta, CodecConfig(budget="100 B"))


def test_small_budgets_are_used_as_far_as_the_grid_of_densities_goes(meta: UpdateMeta) -> None:
    """Also where a first guess is over the budget, and the next one of the same densities."""
    tensors = {"a": torch.randn(24, 384, generator=torch.Generator().manual_seed(1))}
    sizes = []
    for budget in range(400, 1960, 40):
        codec = CodecConfig(budget=f"{budget} B")
        sizes.append(len(encode_update(tensors, meta, codec).blob) / budget)
    assert max(sizes) <= 1
    # Densities are 8% apart; with 1,930 bytes all is kept that helps.
    assert min(sizes) > 0.9, min(sizes)


def test_a_message_is_not_made_again_where_more_bytes_help_no_more(meta: UpdateMeta) -> None:
    tensors = {"a": torch.randn(5000, generator=torch.Generator().manual_seed(1))}
    made: list[Encoded] = []

    def encode(densities: Mapping[str, float]) -> Encoded:
        made.append(encode_update(tensors, meta, CodecConfig(density=densities["a"])))
        return made[-1]

    within(10**6, tensors, CodecConfig(budget="1 MB"), encode)
    assert len(made) == 1
    with pytest.raises(ValueError, match="raise the budget"):
        within(100, tensors, CodecConfig(budget="100 B"), encode)
    assert len(made) <= 4


def test_the_same_tensors_get_the_same_bytes(uneven: dict[str, Tensor], meta: UpdateMeta) -> None:
    codec = CodecConfig(budget="9 kB")
    assert encode_update(uneven, meta, codec).blob == encode_update(uneven, meta, codec).blob


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"budget": "lots"}, "give a size such as 400 kB"),
        ({"budget": "4 kB", "name": "dense"}, "dense has no density to choose"),
        ({"name": "dare"}, "set feedback to 0"),
        ({"name": "rotated", "bits": 9}, "less than or equal to 8"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        CodecConfig.model_validate(fields)
    assert CodecConfig(budget="1.5 MiB").budget_bytes == 3 << 19
