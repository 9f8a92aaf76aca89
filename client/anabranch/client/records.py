"""Flower records as this package fills and reads them: typed access, and tensors as raw bytes.

Loads torch when the first tensor is packed or unpacked: an answer that holds none needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from anabranch.wire.plan import RoundPlan
from anabranch.wire.sealing import SEALED_STYPE, seal

if TYPE_CHECKING:
    from torch import Tensor

TENSOR_STYPE = "anabranch.tensor/1"
"""``Array.stype`` of entries in row order, little-endian fp32, with nothing around them."""

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def record_of(content: RecordDict, key: str, kind: type[Record]) -> Record | None:
    """A record of the expected kind; Flower's own typed views copy everything on each access."""
    record = content.get(key)
    return record if isinstance(record, kind) else None


def as_array(blob: bytes, stype: str, plan: RoundPlan) -> Array:
    """Bytes for the coordinator, sealed where the plan asks for it."""
    if plan.seal_to is not None:
        stype, blob = SEALED_STYPE, seal(blob, bytes.fromhex(plan.seal_to))
    return Array("uint8", (len(blob),), stype, blob)


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record, in fp32.

    Flower's own form is a numpy file per tensor; writing and parsing its header takes longer than
    all else that happens to a small update.

    Args:
        tensors: Values by name, of any shape, floating dtype and device.
    """
    import torch

    record = ArrayRecord()
    for name, tensor in tensors.items():
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        data = values.astype("<f4", copy=False).tobytes()
        record[name] = Array("float32", tuple(tensor.shape), TENSOR_STYPE, data)
    return record


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record that ``pack`` made, in memory of their own.

    Raises:
        ValueError: An array is of another kind, as when another mod has put its own there.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    if array.stype != TENSOR_STYPE:
        raise ValueError(
            f"array {name} is of kind {array.stype!r}, expected {TENSOR_STYPE!r}; "
            "use anabranch.client.records.pack"
        )
    import torch

    if not array.data:
        return torch.empty(array.shape)
    return torch.frombuffer(bytearray(array.data), dtype=torch.float32).view(array.shape)
