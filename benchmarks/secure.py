"""Secure aggregation: parts beside Flower's SecAgg+, and what a whole session costs. One thread.

CPU time, the least of some runs. Flower's masks come from numpy's generator, seeded with 32 bits;
ours are a ChaCha20 keystream. Its shares are dealt and combined by pycryptodome.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.secure.fixed import FixedPoint
from anabranch.wire.secure.masks import add_mask
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.recovery import Recovery
from anabranch.wire.secure.session import SecureSession, threshold_of
from anabranch.wire.secure.shamir import combine, deal
from anabranch.wire.signing import KeyRing
from benchmarks.harness import Row, main

ENTRIES, QUICK_ENTRIES = 663_000, 20_000
"""Of a LoRA adapter of rank 16 on all linear layers of a small model."""
FLOWER = "flwr 1.41 SecAgg+"
T = TypeVar("T")


def least_ms(call: Callable[[], object], runs: int) -> float:
    """CPU milliseconds of the fastest run."""
    found = []
    for _ in range(runs):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found) * 1e3


def parts(entries: int, runs: int) -> Iterator[Row]:
    """Masks, rounding and shares, ours and Flower's."""
    vector_D = np.zeros(entries, np.uint32)
    seed = secrets.token_bytes(32)
    scenario = f"{entries} entries"
    yield Row(
        "mask ms",
        least_ms(lambda: add_mask(vector_D, seed), runs),
        least_ms(lambda: vector_D + pseudo_rand_gen(seed, 1 << 32, [(entries,)])[0], runs),
        FLOWER, scenario, most={"ratio": 1.0},
    )  # fmt: skip
    values_D = np.random.default_rng(1).normal(size=entries)
    fixed = FixedPoint(4.0, 32, 100)
    yield Row(
        "fixed point ms",
        least_ms(lambda: fixed.encode(values_D), runs),
        least_ms(lambda: quantize([values_D], 4.0, 1 << 22), runs),
        FLOWER, scenario, "Flower rounds by chance",
    )  # fmt: skip
    theirs, ours = create_shares(seed, 67, 100), deal(seed, 67, 100)
    points = {number + 1: ours[number] for number in range(67)}
    assert combine(points, 67) == combine_shares(theirs[:67]) == seed
    yield Row(
        "deal ms",
        least_ms(lambda: deal(seed, 67, 100), runs),
        least_ms(lambda: create_shares(seed, 67, 100), runs),
        FLOWER, "67 of 100", most={"ratio": 1.0},
    )  # fmt: skip
    yield Row(
        "combine ms",
        least_ms(lambda: combine(points, 67), runs),
        least_ms(lambda: combine_shares(theirs[:67]), runs),
        FLOWER, "67 of 100", most={"ratio": 1.0},
    )  # fmt: skip


def session(members: int, dropped: int, entries: int) -> Iterator[Row]:
    """All phases of a session in which some members vanish while they train."""
    names = [f"client-{number:04d}" for number in range(members)]
    keys = {name: seeded_key(name, 1) for name in names}
    ring = KeyRing(by_id(key.public for key in keys.values()))
    about = SecureSession(
        "f", "r", 1, 0, "ab" * 32, members, threshold_of(members, 2 / 3), entries, 4.0, 32
    )
    group = {name: SecureMember(about, keys[name], ring) for name in names}
    recovery = Recovery(about, ring)
    took: dict[str, float] = defaultdict(float)
    carried: dict[str, int] = defaultdict(int)

    def timed(whose: str, call: Callable[[], T]) -> T:
        began = time.process_time()
        result = call()
        took[whose] += (time.process_time() - began) * 1e3
        return result

    def speak(
        who: list[str], handed: Callable[[str], bytes], say: Callable[[str, bytes], bytes],
        take: Callable[[str, bytes], None],
    ) -> None:  # fmt: skip
        for name in who:
            said = timed("coordinator", partial(handed, name))
            answer = timed("members", partial(say, name, said))
            timed("coordinator", partial(take, name, answer))
            carried["bytes"] += len(said) + len(answer)

    vector_D = about.fixed.encode(np.random.default_rng(1).normal(size=entries))
    stay = names[dropped:]
    speak(names, lambda _: b"", lambda name, _: group[name].advertise(),
          recovery.take_advertisement)  # fmt: skip
    speak(names, lambda _: recovery.roster().blob, lambda name, said: group[name].deal(said),
          recovery.take_dealing)  # fmt: skip
    speak(stay, recovery.delivery, lambda name, said: group[name].mask(said, vector_D.copy()),
          recovery.take_masked)  # fmt: skip
    speak(stay, lambda _: recovery.survivors(), lambda name, said: group[name].confirm(said),
          recovery.take_confirmation)  # fmt: skip
    speak(stay, lambda _: recovery.confirmations(), lambda name, said: group[name].open(said),
          recovery.take_opening)  # fmt: skip
    total_D, _ = timed("coordinator", recovery.total)
    plain_D = about.fixed.decode(vector_D, 1) * len(stay)
    assert np.array_equal(total_D, plain_D)
    scenario = f"{members} members, {dropped} vanish"
    yield Row("a member ms", took["members"] / members, None, "", scenario)
    yield Row("coordinator ms", took["coordinator"], None, "", scenario)
    beside = carried["bytes"] / members - about.vector_bytes * len(stay) / members
    yield Row("kB beside vector", beside / 1e3, None, "", scenario, "a member, up and down")


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows."""
    entries = QUICK_ENTRIES if quick else ENTRIES
    yield from parts(entries, 3 if quick else 20)
    for members, dropped in ((10, 0), (10, 3)) if quick else ((10, 0), (10, 3), (100, 10)):
        yield from session(members, dropped, entries)


if __name__ == "__main__":
    main("secure", measure)
