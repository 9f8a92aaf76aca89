from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anabranch.vectors import Adapter, LoraFactors, LowRank, seeded_start, task_vector, weights_hash


def adapter(seed: int = 0, *, head: bool = False, rank: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lora = {
        name: LoraFactors(draw(rank, 10), draw(8, rank), alpha=6.0, rslora=name == "two")
        for name in ("one", "two")
    }
    return Adapter(lora, {"head": draw(2, 2)} if head else {}, "ba5e")


def test_scaling_is_by_rank_or_by_its_root() -> None:
    lora = adapter().lora
    assert lora["one"].scaling == 2.0
    assert lora["two"].scaling == pytest.approx(6 / 3**0.5)
    torch.testing.assert_close(
        lora["one"].delta().dense(), 2.0 * lora["one"].b_mr @ lora["one"].a_rn
    )


@pytest.mark.parametrize("start_rank", [3, 5])
def test_a_task_vector_is_what_training_added(start_rank: int) -> None:
    now, before = adapter(1, head=True), adapter(2, head=True, rank=start_rank)
    vector = task_vector(now, before)
    for name in ("one", "two"):
        delta = vector.deltas[name]
        assert isinstance(delta, LowRank)
        expected = now.lora[name].delta().dense() - before.lora[name].delta().dense()
        torch.testing.assert_close(delta.dense(), expected)
        assert delta.rank == 3 + start_rank
    torch.testing.assert_close(vector.deltas["head"], now.dense["head"] - before.dense["head"])
    assert vector.base_hash == "ba5e"


def test_a_start_with_b_zero_adds_no_rank() -> None:
    now = adapter(1)
    vector = task_vector(now, seeded_start(now, 5))
    assert all(isinstance(d, LowRank) and d.rank == 3 for d in vector.deltas.values())
    bare = task_vector(now)
    for name, delta in bare.items():
        assert isinstance(delta, LowRank)
        torch.testing.assert_close(delta.dense(), now.lora[name].delta().dense())


def test_task_vectors_of_what_does_not_match_are_refused() -> None:
    now = adapter(1)
    with pytest.raises(ValueError, match=r"trained in full \(head\); give the values"):
        task_vector(adapter(1, head=True))
    with pytest.raises(ValueError, match="same modules, such as head"):
        task_vector(adapter(1, head=True), now)
    bent = replace(
        now, lora={**now.lora, "one": LoraFactors(torch.ones(3, 9), torch.ones(8, 3), 6)}
    )
    with pytest.raises(ValueError, match=r"one has shape \(8, 9\), in the start it has \(8, 10\)"):
        task_vector(bent, now)
    head = adapter(1, head=True)
    with pytest.raises(ValueError, match=r"head has shape \(1,\), in the start it has \(2, 2\)"):
        task_vector(replace(head, dense={"head": torch.ones(1)}), head)


def test_the_flat_layout_goes_both_ways() -> None:
    one = adapter(1, head=True)
    flat = one.tensors()
    assert list(flat) == ["head", "one.lora_A", "one.lora_B", "two.lora_A", "two.lora_B"]
    doubled = one.with_tensors({name: 2 * tensor for name, tensor in flat.items()})
    assert torch.equal(doubled.lora["two"].a_rn, 2 * one.lora["two"].a_rn)
    assert doubled.lora["two"].rslora
    assert one.with_tensors(flat).hash() == one.hash()
    assert doubled.hash() != one.hash()


def test_the_hash_covers_the_scaling_too() -> None:
    one = adapter(1)
    halved = {
        name: LoraFactors(factors.a_rn, factors.b_mr, factors.alpha / 2, factors.rslora)
        for name, factors in one.lora.items()
    }
    assert Adapter(halved).hash() != one.hash()


def test_the_flat_layout_refuses_other_names_and_shapes() -> None:
    one = adapter(1)
    flat = one.tensors()
    with pytest.raises(ValueError, match=r"differ in \['three'\]"):
        one.with_tensors({**flat, "three": torch.ones(1)})
    with pytest.raises(ValueError, match=r"one.lora_A has shape \(3, 11\), the adapter's is"):
        one.with_tensors({**flat, "one.lora_A": torch.ones(3, 11)})


def test_a_seeded_start_is_known_at_both_ends() -> None:
    start = seeded_start(adapter(1), 5)
    assert start.hash() == seeded_start(adapter(2), 5).hash()
    assert start.hash() != seeded_start(adapter(1), 6).hash()
    for factors in start.lora.values():
        assert not factors.b_mr.any()
        assert float(factors.a_rn.abs().max()) <= 10**-0.5
    assert not torch.equal(start.lora["one"].a_rn, start.lora["two"].a_rn)
    alone = Adapter({"two": adapter(1).lora["two"]})
    assert torch.equal(seeded_start(alone, 5).lora["two"].a_rn, start.lora["two"].a_rn)


def test_the_hash_sees_names_shapes_types_and_bytes() -> None:
    one = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    reference = weights_hash(one)
    assert weights_hash(dict(reversed(one.items()))) == reference
    others = [
        {**one, "a": one["a"].reshape(2, 3)},
        {**one, "a": one["a"].double()},
        {**one, "a": one["a"] + 1e-3},
        {"a": one["a"], "c": one["b"]},
    ]
    assert len({reference, *map(weights_hash, others)}) == 5
