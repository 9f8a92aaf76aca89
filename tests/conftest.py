from __future__ import annotations

from collections.abc import Iterator

import pytest

from anabranch.simulation.engine.identity import server_identity


@pytest.fixture
def flower_identity() -> Iterator[None]:
    """Flower messages can be made in this process."""
    with server_identity():
        yield
