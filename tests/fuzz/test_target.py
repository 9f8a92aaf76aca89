"""The fuzzer's target on inputs by Hypothesis, the same in every run, and on the kept corpus."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fuzz.target import DOORS, consume, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = 20_000
CORPUS = Path(__file__).parent / "corpus"
SEEDS = seeds()

EDIT = 5
"""Bytes of a program per edit."""

seen: Counter[str] = Counter()


def edited(program: bytes) -> bytes:
    """A seed, edited as the program's bytes say: replaced, cut, inserted, repeated or flipped.

    One draw of bytes is cheap for Hypothesis, a dozen draws of numbers are not.
    """
    choice = program[0] % (len(SEEDS) + 3)
    if choice >= len(SEEDS):
        return program[1:]  # nothing but noise
    seed = SEEDS[choice]
    data = bytearray(seed)
    for start in range(1, len(program) - EDIT + 1, EDIT):
        kind, *place, first, second = program[start : start + EDIT]
        # The first byte is the door, and stays.
        at = 1 + int.from_bytes(bytes(place)) % max(1, len(data) - 1)
        new = bytes([first, second])
        match kind % 6:
            case 0:
                data[at : at + 1] = new[:1]
            case 1:
                del data[at : at + 1 + first % 8]
            case 2:
                data[at:at] = new
            case 3:
                data[at:at] = data[max(1, at - first) : at]
            case 4:
                data[at : at + 1] = bytes([seed[at % len(seed)] ^ (1 << first % 8)])
            case _:
                data[at : at + 2] = new
    return bytes(data)


@settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.binary(min_size=1 + EDIT, max_size=1 + 4 * EDIT).map(edited))
def test_any_input_is_refused_or_sound(data: bytes) -> None:
    seen[consume(data)] += 1


def test_so_many_inputs_reached_the_decoders() -> None:
    """Runs after the inputs: what they met on their way."""
    print(seen)
    if not seen:
        pytest.skip("the inputs did not run")
    assert seen.total() >= INPUTS
    assert seen["decoded"] > INPUTS / 50
    assert {"manifest", "layout", "counts", "payload", "values", "digest", "magic"} <= set(seen)
    assert {"importance", "bad-signature", "seal", "trailing", "truncated", "meta"} <= set(seen)
    assert {"receipt", "json", "canonical"} <= set(seen)


def test_every_door_has_a_sound_seed() -> None:
    assert {seed[0] for seed in SEEDS if consume(seed) == "decoded"} == set(range(len(DOORS)))


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus_is_refused_or_sound(path: Path) -> None:
    consume(path.read_bytes())
