"""Clients that keep no SuperNode: they say that they take part, and upload what they trained."""

from __future__ import annotations

from anabranch.coordinator.store import Store

EVENT = "joined"
"""The kind of note that says who takes part, or no longer."""


def note_joined(store: Store, client: str, here: bool) -> None:
    """Let a client be asked from the next round on, or no longer."""
    store.note(EVENT, {"client": client, "here": here})


def joined(store: Store) -> list[str]:
    """Who takes part by uploading, in the order of names."""
    last = {row["client"]: row["here"] for row in store.notes(EVENT)}
    return sorted(client for client, here in last.items() if here)
