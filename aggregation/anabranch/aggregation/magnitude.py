"""Exact k-th largest entries or magnitudes, of a tensor or of a stream that is never gathered.

The bits of a non-negative fp32 number order like the number; those of a negative one do so once all
but the sign are flipped. For a stream, a histogram of the upper 16 bits finds the bucket the k-th
falls in, a second pass over the lower 16 bits finds the number itself: two passes, 64 Ki counters,
no sort. A small tensor is quicker by selection.

Shape legend: K rows (often one per contribution), D entries of a chunk, H buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.rows import (
    HISTOGRAM,
    KTH,
    all_worthwhile,
    has_kernel,
    in_use,
    load,
    on_gpu,
    readable,
)
from anabranch.aggregation.ranks import ALONE, Ranks

_BUCKETS = 1 << 16

_COUNTED = 1 << 17
"""Entries of a row from which counting them is quicker than torch's selection."""


def kept(density: float, entries: int) -> int:
    """How many of ``entries`` a density keeps: ⌊density·entries⌋, at least one."""
    return max(1, int(density * entries))


def tensor_kth(values_KD: Rows, count: int, magnitude: bool = True) -> Tensor:
    """The same as ``stream_kth`` for entries that are all there [K, D]."""
    device = values_KD[0].device
    if on_gpu(device) and all(map(readable, values_KD)):
        found_K: Tensor = load(KTH, device)(values_KD, count, magnitude)
        return found_K
    counted = len(values_KD[0]) >= _COUNTED and _by_kernel(values_KD)
    if device.type != "cpu" or counted:
        return stream_kth([values_KD], count, magnitude)
    _check_count(count, len(values_KD[0]))
    place = len(values_KD[0]) + 1 - count
    compared = [values_D.abs() if magnitude else values_D for values_D in values_KD]
    return torch.stack([values_D.kthvalue(place).values for values_D in compared]).float()


def stream_kth(
    chunks: Iterable[Rows], count: int, magnitude: bool = True, ranks: Ranks = ALONE
) -> Tensor:
    """The ``count``-th largest magnitude, or entry, of every row, exact, ties counted singly.

    Keeping what is ≥ it keeps at least ``count`` entries; more where some tie with it. A k-th
    magnitude of zero means fewer than ``count`` entries are not zero.

    Args:
        chunks: The stream: values_KD [K, D] in fp32, finite. Iterated twice, so an iterator that
            is spent after one pass will not do.
        count: Which one, from 1 to the number of entries.
        magnitude: Whether to compare magnitudes, or entries with their sign.
        ranks: Whose entries are counted; the chunks are this rank's, which may be none.

    Returns:
        The k-th of each row [K] in fp32, on the CPU.

    Raises:
        ValueError: Fewer than ``count`` entries in the stream.
    """
    upper_KH = ranks.reduce(_histogram(chunks, None, magnitude), "sum")
    entries = int(upper_KH[0].sum())
    _check_count(count, entries)
    bucket_K, above_K = _descend(upper_KH, torch.full((len(upper_KH),), count))
    lower_KH = ranks.reduce(_histogram(chunks, bucket_K, magnitude), "sum")
    low_K, _ = _descend(lower_KH, count - above_K)
    order_K = ((bucket_K - (0 if magnitude else _BUCKETS // 2)) << 16) | low_K
    return _flipped(order_K.to(torch.int32)).view(torch.float32)


def _by_kernel(values_KD: Rows) -> bool:
    """Whether a kernel counts these: exact either way, so a chunk's size may decide."""
    device = values_KD[0].device
    at_hand = all_worthwhile(values_KD) or (in_use(device) and all(map(readable, values_KD)))
    return at_hand and has_kernel(HISTOGRAM, device)


def _flipped(bits_D: Tensor) -> Tensor:
    """fp32 bits as int32 that order like the numbers; its own inverse."""
    return bits_D ^ ((bits_D >> 31) & 0x7FFF_FFFF)


def _check_count(count: int, entries: int) -> None:
    if not 1 <= count <= entries:
        raise ValueError(f"the {count}-th largest of {entries} entries does not exist")


def _histogram(chunks: Iterable[Rows], bucket_K: Tensor | None, magnitude: bool) -> Tensor | None:
    """Counts [K, H] of the upper halves, or of the lower in ``bucket_K``; None of no chunks."""
    total_KH: Tensor | None = None
    for values_KD in chunks:
        if _by_kernel(values_KD):
            device = values_KD[0].device
            total_KH = load(HISTOGRAM, device)(values_KD, bucket_K, magnitude, total_KH)
            continue
        if total_KH is None:
            total_KH = torch.zeros(len(values_KD), _BUCKETS, dtype=torch.int64)
        for row, values_D in enumerate(values_KD):
            if magnitude:
                order_D = values_D.abs().view(torch.int32)
                upper_D = order_D >> 16
            else:
                # Adding zero makes −0 the same number as 0.
                order_D = _flipped((values_D + 0.0).view(torch.int32))
                upper_D = (order_D >> 16).add_(_BUCKETS // 2)
            if bucket_K is not None:
                upper_D = order_D[upper_D == int(bucket_K[row])] & (_BUCKETS - 1)
            total_KH[row] += torch.bincount(upper_D, minlength=_BUCKETS).cpu()
    return total_KH


def _descend(counts_KH: Tensor, wanted_K: Tensor) -> tuple[Tensor, Tensor]:
    """The bucket the wanted-th from the top falls in [K], and how many lie above it [K]."""
    bucket_K, above_K = torch.empty_like(wanted_K), torch.empty_like(wanted_K)
    # A row at a time: several copies of all counters would be more memory than many a chunk.
    for row, counts_H in enumerate(counts_KH):
        from_top_H = counts_H.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top_H, wanted_K[row]))
        bucket_K[row] = len(counts_H) - 1 - place
        above_K[row] = from_top_H[place] - counts_H[bucket_K[row]]
    return bucket_K, above_K
