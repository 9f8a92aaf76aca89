"""Noise: a key stream with a published test vector, its draws' distribution and speed."""

import math
import time

import numpy as np
import pytest

from anabranch.coordinator.privacy.noise import (
    DRAWS_AT_ONCE,
    GaussianStream,
    box_muller,
    noise_source,
)

RFC_8439 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
"""Appendix A.1, test vector 1: the key stream of an all-zero key and nonce, block 0."""


def naive(stream: bytes) -> list[float]:
    """Box and Muller (1958), pair by pair."""
    draws = []
    for at in range(0, len(stream), 16):
        first = int.from_bytes(stream[at : at + 8], "little")
        second = int.from_bytes(stream[at + 8 : at + 16], "little")
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**64))
        angle = 2 * math.pi * ((second + 0.5) / 2**64)
        draws += [radius * math.cos(angle), radius * math.sin(angle)]
    return draws


def test_draws_are_made_of_the_published_key_stream() -> None:
    draws = GaussianStream(bytes(32)).normal(8)
    assert draws == pytest.approx(naive(RFC_8439), rel=1e-12)


def test_draws_do_not_depend_on_how_many_are_asked_at_once() -> None:
    many = 2 * DRAWS_AT_ONCE + 6
    whole = GaussianStream(bytes(32)).normal(many)
    parts = GaussianStream(bytes(32))
    assert np.array_equal(whole, np.concatenate([parts.normal(10), parts.normal(many - 10)]))
    odd = GaussianStream(bytes(32))
    assert np.array_equal(odd.normal(3), whole[:3])
    assert np.array_equal(odd.normal(2), whole[4:6])


def test_draws_are_standard_normal() -> None:
    """Kolmogorov and Smirnov's distance at a level of 0.1 %, moments within five errors."""
    count = 200_000
    draws = np.sort(noise_source(5, 1).normal(count))
    cumulative = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in draws])
    grid = np.arange(count + 1) / count
    distance = max((grid[1:] - cumulative).max(), (cumulative - grid[:-1]).max())
    assert distance < 1.95 / math.sqrt(count)
    # The variance of a sample's k-th moment is (m_2k - m_k²)/count.
    for power, moment, double in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        error = math.sqrt((double - moment**2) / count)
        assert abs((draws**power).mean() - moment) < 5 * error, power


def test_neighbours_in_a_pair_and_across_pairs_are_independent() -> None:
    draws = noise_source(6, 1).normal(200_000)
    for lag in (1, 2, 3):
        for left, right in ((draws[:-lag], draws[lag:]), (draws[:-lag] ** 2, draws[lag:] ** 2)):
            assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(len(left))


def test_the_least_and_the_largest_word_give_finite_draws() -> None:
    most = 2**64 - 1
    draws = box_muller(np.array([0, 0, most, most, most, 0], dtype=np.uint64))
    assert 9.4 < draws[0] < 9.5
    assert np.all(draws[2:] == 0.0)  # a radius of zero, and no root of a negative number


def test_the_key_is_the_systems_or_follows_from_seed_and_round() -> None:
    free = [noise_source(None, 1).normal(8) for _ in range(2)]
    assert not np.array_equal(*free)
    seeded = noise_source(7, 2).normal(8)
    assert np.array_equal(seeded, noise_source(7, 2).normal(8))
    # A round's draws are no other seed's in another round.
    for other in (noise_source(8, 1), noise_source(7, 1), noise_source(72, 1)):
        assert not np.array_equal(seeded, other.normal(8))


def test_a_million_draws_take_a_fraction_of_a_second() -> None:
    stream = noise_source(None, 1)
    began = time.process_time()
    stream.normal(1_000_000)
    assert time.process_time() - began < 1.0  # .16 s on the machine this was written on
