"""Exact k-th largest magnitudes, of a tensor or of a stream that is never gathered.

The bits of a non-negative fp32 number order like the number. For a stream, a histogram of the upper
16 bits finds the bucket the k-th falls in, a second pass over the lower 16 bits finds the number
itself: two passes, 64 Ki counters, no sort. A tensor on the CPU is quicker by selection.

Shape legend: C contributions, D entries of a chunk, H buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from anabranch.vectors.select import kth_magnitude

_UPPER, _LOWER = 1 << 15, 1 << 16  # the sign bit of a magnitude is zero


def kept(density: float, entries: int) -> int:
    """How many of ``entries`` a density keeps: ⌊density·entries⌋, at least one."""
    return max(1, int(density * entries))


def tensor_thresholds(deltas_CD: Tensor, count: int) -> Tensor:
    """The same as ``stream_thresholds`` for entries that are all there [C, D]."""
    if deltas_CD.device.type != "cpu":
        return stream_thresholds([deltas_CD], count)
    return torch.tensor([kth_magnitude(delta_D, count) for delta_D in deltas_CD])


def stream_thresholds(chunks: Iterable[Tensor], count: int) -> Tensor:
    """The ``count``-th largest magnitude of every contribution, exact, ties counted singly.

    Keeping entries ≥ the threshold keeps at least ``count``; more where magnitudes tie with it.
    A threshold of zero means fewer than ``count`` entries are not zero.

    Args:
        chunks: The stream: deltas_CD [C, D] in fp32, finite. Iterated twice, so an iterator that
            is spent after one pass will not do.
        count: Which one, from 1 to the number of entries.

    Returns:
        thresholds_C [C] in fp32.

    Raises:
        ValueError: Fewer than ``count`` entries in the stream.
    """
    upper_CH = _histogram(chunks, None)
    entries = int(upper_CH[0].sum())
    if not 1 <= count <= entries:
        raise ValueError(f"the {count}-th largest of {entries} entries does not exist")
    bucket_C, above_C = _descend(upper_CH, torch.full((len(upper_CH),), count))
    lower_CH = _histogram(chunks, bucket_C)
    low_C, _ = _descend(lower_CH, count - above_C)
    return ((bucket_C << 16) | low_C).to(torch.int32).view(torch.float32)


def _histogram(chunks: Iterable[Tensor], bucket_C: Tensor | None) -> Tensor:
    """Counts [C, H] of the upper halves, or of the lower halves inside ``bucket_C``."""
    total_CH: Tensor | None = None
    for deltas_CD in chunks:
        counts = []
        for client, delta_D in enumerate(deltas_CD):
            bits_D = delta_D.abs().view(torch.int32)
            if bucket_C is None:
                counts.append(torch.bincount(bits_D >> 16, minlength=_UPPER))
            else:
                inside_D = bits_D[(bits_D >> 16) == int(bucket_C[client])]
                counts.append(torch.bincount(inside_D & (_LOWER - 1), minlength=_LOWER))
        counts_CH = torch.stack(counts).cpu()
        total_CH = counts_CH if total_CH is None else total_CH + counts_CH
    if total_CH is None:
        raise ValueError("no entries to take a magnitude of")
    return total_CH


def _descend(counts_CH: Tensor, wanted_C: Tensor) -> tuple[Tensor, Tensor]:
    """The bucket the wanted-th from the top falls in [C], and how many lie above it [C]."""
    from_top_CH = counts_CH.flip(1).cumsum(1)
    place_C = (from_top_CH < wanted_C[:, None]).sum(1)
    here_C = counts_CH.flip(1).gather(1, place_C[:, None]).squeeze(1)
    above_C = from_top_CH.gather(1, place_C[:, None]).squeeze(1) - here_C
    return counts_CH.shape[1] - 1 - place_C, above_C
