from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from anabranch.client.records import pack, record_of, unpack


def test_tensors_come_back_bit_for_bit_in_memory_of_their_own() -> None:
    tensors = {
        "b": torch.randn(3, 5).T,
        "a": torch.tensor([0.1, -0.0, 1e-45]),
        "none": torch.empty(0, 4),
        "half": torch.ones(2, dtype=torch.bfloat16) / 3,
    }
    record = pack(tensors)
    found = unpack(record)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.int32), tensor.float().view(torch.int32)), name
    found["a"].zero_()
    assert unpack(record)["a"].tolist() == tensors["a"].tolist()


def test_an_array_of_another_kind_is_named() -> None:
    foreign = ArrayRecord({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"array w is of kind 'numpy.ndarray', expected"):
        unpack(foreign)


def test_a_record_is_found_by_key_and_kind() -> None:
    content = RecordDict({"x": MetricRecord({"a": 1})})
    assert record_of(content, "x", MetricRecord) == MetricRecord({"a": 1})
    assert record_of(content, "x", ConfigRecord) is None
    assert record_of(content, "y", MetricRecord) is None
