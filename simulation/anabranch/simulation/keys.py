"""Keys of a simulated federation: drawn from its seed, so that the same seed signs alike."""

from __future__ import annotations

from pathlib import Path

from anabranch.client.site import client_name
from anabranch.client.trust import MEMBERS_FILE
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.registry import COORDINATOR, KEYS_FOLDER, client_keys, enrol
from anabranch.wire.keys import seeded_key, write_key


def write_keys(folder: Path, config: FederationConfig) -> Path:
    """Write everybody's keys into a federation's folder and enrol the clients.

    Returns:
        The folder of the keys, which serves the coordinator and every client.
    """
    keys = folder / KEYS_FOLDER
    clients = [
        seeded_key(client_name(partition), config.seed) for partition in range(config.clients)
    ]
    for key in (seeded_key(COORDINATOR, config.seed), *clients):
        if not (keys / f"{key.name}.key").exists():
            write_key(key, keys)
    known = client_keys(folder).enrolled
    enrol(folder, [key.public for key in clients if key.public.id not in known])
    if config.secure is not None:
        lines = "".join(f"{key.public.line}\n" for key in clients)
        (keys / MEMBERS_FILE).write_text(lines)
    return keys
