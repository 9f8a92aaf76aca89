"""zstd as the wire uses it: Huffman coding alone, and decompression that a bomb cannot blow up."""

from __future__ import annotations

import threading

import zstandard

from anabranch.wire.errors import WireError

_KEPT_WINDOW = 1 << 20
"""Largest window of a decompressor that is kept for the next frame."""

_threads = threading.local()


def compress_text(raw: bytes) -> bytes:
    """One zstd frame, as small as zstd makes it, with a checksum: for manifests."""
    return zstandard.ZstdCompressor(level=19, write_checksum=True).compress(raw)


def compress_symbols(raw: bytes | memoryview) -> bytes:
    """One zstd frame of Huffman-coded literals, for bytes that are independent draws.

    Matches among such bytes are chance, and cost more than they save: the fast strategy with the
    longest minimum match and the smallest table finds hardly any, and fast.
    """
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=6,
        chain_log=6,
        search_log=1,
        window_log=19,
        target_length=0,
        write_content_size=1,
        write_checksum=0,
        write_dict_id=0,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(raw)


def decompress(frame: bytes | memoryview, least_bytes: int, most_bytes: int, code: str) -> bytes:
    """Decompress exactly one zstd frame whose declared size is within bounds.

    The one-shot call trusts the size in the frame's header over ``max_output_size``: a frame of
    30 KB makes it allocate 1 GB. So the header is read first; past it, output cannot exceed the
    declared size, and a window larger than the bound is refused.

    Args:
        frame: The frame and nothing after it.
        least_bytes: Fewest bytes it may declare.
        most_bytes: Most bytes it may declare.
        code: The ``WireError.code`` of a refusal.

    Raises:
        WireError: Not one well-formed frame of an admissible size.
    """
    try:
        declared = zstandard.frame_content_size(frame)
        if declared < 0:
            raise WireError(code, "a compressed frame does not declare its size")
        if not least_bytes <= declared <= most_bytes:
            raise WireError(
                "too-large" if declared > most_bytes else code,
                f"a compressed frame declares {declared} bytes, "
                f"not between {least_bytes} and {most_bytes}",
            )
        raw = _reader(most_bytes).decompress(
            frame, max_output_size=declared, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise WireError(code, f"a compressed frame is damaged: {error}") from None
    return raw


def _reader(most_bytes: int) -> zstandard.ZstdDecompressor:
    """A decompressor that takes no window larger than this, or than the next power of two.

    Making one costs half of what a frame of run bytes takes, so each thread keeps small ones.
    """
    window = 1 << max(10, (most_bytes - 1).bit_length())
    if window > _KEPT_WINDOW:
        return zstandard.ZstdDecompressor(max_window_size=window)
    name = f"window_{window}"
    if not hasattr(_threads, name):
        setattr(_threads, name, zstandard.ZstdDecompressor(max_window_size=window))
    reader: zstandard.ZstdDecompressor = getattr(_threads, name)
    return reader
