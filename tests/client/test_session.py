from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from anabranch.client.lora import own_parameters, read_adapter, training, write_adapter
from anabranch.client.session import open_session
from anabranch.vectors import seeded_start

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
