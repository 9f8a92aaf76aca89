"""The report's charts at sizes that strain them; a warning of matplotlib's is an error here."""

from __future__ import annotations

import re

import pytest

from anabranch.simulation.report.charts import accuracy_over_rounds, bytes_per_round, similarity

LEVELS = {"base": 0.1, "local": 0.4, "oracle": 0.8}


@pytest.mark.parametrize(
    ("group", "groups", "clients", "panels", "title"),
    [
        ("bbc", 1, 1, 1, "bbc0: bbc0-0"),
        ("bbc", 1, 4, 1, "bbc0: bbc0-0, bbc0-1, bbc0-2, bbc0-3"),
        ("bbc", 1, 60, 1, "bbc0: 60 clients"),
        ("bbc", 30, 2, 12, "the first 12 of 30 groups"),
        ("name" * 30, 2, 2, 2, "namenamenamenamenamenam…: 2 clients"),
        ("$a_{", 2, 2, 2, "$a_{0: $a_{0-0, $a_{0-1"),
        ("群", 1, 2, 1, "群0: 群0-0, 群0-1"),
    ],
)
def test_any_number_of_clients_and_groups_can_be_drawn(
    group: str, groups: int, clients: int, panels: int, title: str
) -> None:
    names = [f"{group}{index}" for index in range(groups)]
    curves = {
        name: {f"{name}-{client}": [(0, 0.2), (1, 0.5)] for client in range(clients)}
        for name in names
    }
    picture = accuracy_over_rounds(curves, dict.fromkeys(names, LEVELS))
    assert title in picture
    assert len(re.findall(">round<", picture)) == panels
    people = [client for part in curves.values() for client in part]
    same = [[1.0] * len(people)] * len(people)
    assert similarity(people, same).startswith("<svg")
    row = {"round": 1, "bytes_up": 9, "bytes_down": 0, "admitted": len(people)}
    assert bytes_per_round([row], 4).startswith("<svg")
