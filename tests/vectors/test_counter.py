from __future__ import annotations

import torch

from anabranch.vectors.counter import uniform

STREAM = (7, "encoder.query", 3)


def splitmix64(state: int) -> int:
    """The published generator, on Python's integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_mix_is_splitmix64() -> None:
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"7\0encoder.query\x003").digest()[:8], "little")
    words = [splitmix64(key + (i + 1) * 0x9E3779B97F4A7C15) for i in range(50)]
    assert uniform(50, STREAM).tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_reference_vector_of_splitmix64() -> None:
    """First outputs for seed 1234567, from the reference C code."""
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(1234567 + golden) == 6457827717110365317
    assert splitmix64(1234567 + 2 * golden) == 3203168211198807973


def test_chunks_of_a_stream_are_the_stream() -> None:
    whole = uniform(1000, STREAM)
    parts = [
        uniform(stop - start, STREAM, start) for start, stop in ((0, 1), (1, 333), (333, 1000))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(uniform(100, STREAM, 450) < 0.3, (whole < 0.3)[450:550])


def test_numbers_are_uniform_and_streams_unrelated() -> None:
    count = 200_000
    numbers = uniform(count, STREAM)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    buckets = torch.histc(numbers.float(), 100, 0, 1)
    chi_squared = float(((buckets - count / 100).square() / (count / 100)).sum())
    assert 45 < chi_squared < 175  # 99 degrees of freedom, ±5σ
    neighbour = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
    assert abs(float(neighbour)) < 5 / count**0.5
    for other in ((8, "encoder.query", 3), (7, "encoder.key", 3), (7, "encoder.query", 4)):
        pair = torch.corrcoef(torch.stack([numbers, uniform(count, other)]))
        assert abs(float(pair[0, 1])) < 5 / count**0.5


def test_probability_one_keeps_all_and_the_rate_is_met() -> None:
    assert bool((uniform(5000, STREAM) < 1.0).all())
    rate = float((uniform(100_000, STREAM) < 0.2).float().mean())
    assert abs(rate - 0.2) < 5 * (0.16 / 100_000) ** 0.5
