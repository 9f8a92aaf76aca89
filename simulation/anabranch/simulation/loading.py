"""Start quickly: Python's collector stands still while much is loaded. Loads no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold Python's cycle collector while a block imports and reads.

    Importing torch and transformers makes a million objects that stay; looking through them again
    and again for garbage is a fifth of the time it takes. They are exempt for good afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()
