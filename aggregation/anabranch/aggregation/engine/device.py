"""On which device a merge goes through its entries."""

from __future__ import annotations

from dataclasses import replace

import torch

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.rows import merged_on
from anabranch.aggregation.method import MergeMethod


def placed(cohort: Cohort, method: MergeMethod, device: str | torch.device | None) -> Cohort:
    """The cohort, to be merged on a device: its chunks are moved there, and what is merged back.

    Args:
        cohort: The contributions.
        method: Its method, which must decide entry by entry for the device to be another than that
            where they lie. A sum is one read, which moving what is summed costs several times over.
        device: cpu, cuda or cuda:N; None merges where they lie.

    Raises:
        ValueError: No such device, or a method that does not go through entries.
    """
    if device is None:
        return cohort
    chosen = existing_device(device)
    by_entries = method.merge is not None and not method.factors
    if not by_entries and any(merged_on(cohort, module) != chosen for module in cohort.deltas):
        raise ValueError(
            f"device: {method.name} does not go entry by entry and is merged where its inputs lie; "
            f"leave {chosen} out"
        )
    return replace(cohort, device=chosen) if by_entries else cohort


def existing_device(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        ValueError: There is none of that name here.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device} is none that can merge; give cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(
            f"device: {device}: torch finds no CUDA device here; leave it out, or install a build "
            "of torch for CUDA"
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= count:
        raise ValueError(f"device: {device}: there are {count} here, numbered from 0")
    return torch.device("cuda", index)
