from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from anabranch.client.lora import own_parameters, read_adapter, training, write_adapter
from anabranch.client.session import open_session
from anabranch.vectors import LowRank, seeded_start
from anabranch.vectors.frozen import join

TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'


def test_a_thread_opens_once_and_shares_the_base_but_not_the_adapter() -> None:
    mine = open_session(TASK, PARAMS)
    assert open_session(TASK, PARAMS) is mine
    with ThreadPoolExecutor(1) as other, training(mine.model, "b"):  # as a round may be
        theirs = other.submit(open_session, TASK, PARAMS).result()
        assert other.submit(open_session, TASK, PARAMS).result() is theirs
    assert theirs.model is not mine.model
    assert theirs.task is mine.task
    assert all(parameter.requires_grad for parameter in own_parameters(theirs.model))
    theirs_by_name = dict(theirs.model.named_parameters())
    for name, tensor in mine.model.named_parameters():
        shared = theirs_by_name[name].data_ptr() == tensor.data_ptr()
        assert shared is not tensor.requires_grad, name
    one, other_start = (seeded_start(mine.template, seed) for seed in (1, 2))
    write_adapter(mine.model, one)
    write_adapter(theirs.model, other_start)
    assert read_adapter(mine.model).hash() == one.hash()
    assert read_adapter(theirs.model).hash() == other_start.hash()
    inputs = torch.ones(2, 32)
    assert torch.equal(mine.model(inputs), theirs.model(inputs))  # B is zero in both


def test_a_session_of_lower_rank_shares_the_base_and_computes_what_its_adapter_says() -> None:
    whole = open_session(TASK, PARAMS)
    low = whole.at_rank(2)
    assert whole.at_rank(2) is low
    assert whole.at_rank(None) is whole.at_rank(4) is whole
    assert low.base_hash == whole.base_hash
    named = dict(low.model.named_parameters())
    for name, tensor in whole.model.named_parameters():
        assert (named[name].data_ptr() == tensor.data_ptr()) is not ("lora" in name), name
    start = seeded_start(low.template, 1)
    generator = torch.Generator().manual_seed(2)
    start = start.with_tensors(
        {name: torch.randn(t.shape, generator=generator) for name, t in start.tensors().items()}
    )
    write_adapter(low.model, start)
    assert read_adapter(low.model, low.base_hash).hash() == start.hash()
    # The same change at full rank: zeros beside it.
    padded = whole.template.with_tensors(
        {name: torch.zeros_like(tensor) for name, tensor in whole.template.tensors().items()}
    )
    for name, factors in start.lora.items():
        padded.lora[name].a_rn[:2] = factors.a_rn
        padded.lora[name].b_mr[:, :2] = factors.b_mr
    write_adapter(whole.model, padded)
    inputs = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(low.model(inputs), whole.model(inputs))
    parameters = own_parameters(low.model)
    assert sum(parameter.numel() for parameter in parameters) == 2 * (32 + 64)
    low.model(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)


def test_a_rank_above_the_task_s_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"asks for rank 64, this task's adapter has 4"):
        open_session(TASK, PARAMS).at_rank(64)


def test_ranks_beyond_the_task_s_own_are_loaded_frozen() -> None:
    session = open_session(TASK, PARAMS)
    generator = torch.Generator().manual_seed(2)
    start = seeded_start(session.template, 1)
    frozen = LowRank(
        torch.randn(64, 7, generator=generator), torch.randn(7, 32, generator=generator)
    )
    whole = join(start, {"hidden": frozen})
    assert session.load(whole).hash() == start.hash()
    assert read_adapter(session.model, session.base_hash).hash() == start.hash()
    base = session.task.load_base()
    with torch.no_grad():
        base.get_parameter("hidden.weight").add_(whole.lora["hidden"].delta().dense())
    inputs = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(session.model(inputs), base(inputs), atol=1e-4, rtol=1e-4)
    session.load(start)
    assert torch.equal(session.model(inputs), session.task.load_base()(inputs))


def test_an_adapter_of_other_modules_scaling_or_ranks_is_not_loaded() -> None:
    session = open_session(TASK, PARAMS)
    start = seeded_start(session.template, 1)
    one = start.lora["hidden"]
    for lora, reason in (
        ({"other": one}, "other LoRA modules than expected"),
        ({"hidden": replace(one, alpha=1.0)}, r"hidden scales by 0\.25, expected 2"),
        ({"hidden": one.leading(2)}, r"hidden\.lora_A has shape \(2, 32\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            session.load(replace(start, lora=lora))
