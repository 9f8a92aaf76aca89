from __future__ import annotations

import hashlib

from anabranch.vectors.seeding import word_digest, word_seed


def test_words_make_the_seed_that_published_runs_were_drawn_from() -> None:
    digest = hashlib.sha256(b"3\0model.layer.0\0007").digest()
    assert word_digest(3, "model.layer.0", 7) == digest
    assert word_seed(3, "model.layer.0", 7) == int.from_bytes(digest[:8], "little") // 2
    assert word_seed(1, "1") < 2**63


def test_words_do_not_run_together() -> None:
    assert len({word_seed("ab", "c"), word_seed("a", "bc"), word_seed("abc")}) == 3
