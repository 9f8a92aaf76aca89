"""The coordinator's word for the adapter it publishes: ``signature.json`` in the PEFT folder.

It signs a statement of what the adapter is, by the hash of its values and of its base, so that
whoever is handed the folder later can tell where it comes from.
"""

from __future__ import annotations

import json
from pathlib import Path

from anabranch.coordinator.federation import FederationConfig
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.errors import WireError
from anabranch.wire.keys import PrivateKey
from anabranch.wire.signing import PUBLISHED, KeyRing

SIGNATURE_FILE = "signature.json"


def sign_folder(folder: Path, adapter: Adapter, config: FederationConfig, key: PrivateKey) -> None:
    """Write ``signature.json`` beside an adapter's files."""
    statement = json.dumps(
        {
            "adapter_hash": adapter.hash(),
            "base_hash": adapter.base_hash,
            "federation": config.name,
            "run": config.run,
        }
    )
    signature = key.sign(PUBLISHED + statement.encode())
    signed = {
        "statement": statement,
        "key_id": key.public.id.hex(),
        "signature": signature.hex(),
    }
    (folder / SIGNATURE_FILE).write_text(json.dumps(signed, indent=2) + "\n")


def check_folder(folder: Path, ring: KeyRing) -> dict[str, str]:
    """Check that a key of the ring signed exactly the adapter in a PEFT folder.

    Returns:
        The statement: ``adapter_hash``, ``base_hash``, ``federation`` and ``run``.

    Raises:
        ValueError: There is no signature, it is not one of the ring, or the adapter is another.
    """
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is none; only a signed federation writes it")
    try:
        signed = json.loads(path.read_bytes())
        text, key_id, signature = signed["statement"], signed["key_id"], signed["signature"]
        ring.check(bytes.fromhex(key_id), bytes.fromhex(signature), PUBLISHED + text.encode(), None)
        statement: dict[str, str] = json.loads(text)
    except WireError as error:
        raise ValueError(f"{path}: {error} ({error.code})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: not a signed statement") from error
    adapter = read_adapter(folder)
    if adapter.hash() != statement["adapter_hash"] or adapter.base_hash != statement["base_hash"]:
        raise ValueError(f"{folder}: the adapter is not the one that was signed")
    return statement
