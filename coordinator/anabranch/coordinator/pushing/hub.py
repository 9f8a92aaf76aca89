"""An adapter in a folder as the Hugging Face Hub keeps one: a new one, or a repository's clone.

The Hub reads the card's front matter from ``README.md``, and PEFT loads the folder by
``from_pretrained``. In a clone, ``.git`` and files of others stay; its owner commits and pushes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from anabranch.coordinator.pushing.oci import LAYER_TYPES
from anabranch.coordinator.store.artifacts import flush_folder

ATTRIBUTES_FILE = ".gitattributes"
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
CONFIG_FILE = "adapter_config.json"


def push(files: Path, repository: Path) -> None:
    """Put a PEFT folder's files into a repository's folder, in place of an earlier adapter's.

    Each file appears whole; the card, which names the rest by hash, comes last.

    Args:
        files: The folder.
        repository: The repository's, made when missing.

    Raises:
        ValueError: It holds files and neither an adapter nor a repository.
    """
    known = (CONFIG_FILE, ".git", ATTRIBUTES_FILE)
    if repository.exists() and (
        not repository.is_dir()
        or (any(repository.iterdir()) and not any((repository / name).exists() for name in known))
    ):
        raise ValueError(
            f"{repository}: holds files and no adapter; name a new folder, or a Hub repository's "
            "clone"
        )
    repository.mkdir(parents=True, exist_ok=True)
    attributes = repository / ATTRIBUTES_FILE
    if not attributes.exists():
        attributes.write_text(ATTRIBUTES)
    names = sorted(LAYER_TYPES, key=lambda name: name == "README.md")
    for name in names:
        if (files / name).is_file():
            _replace(files / name, repository / name)
        else:
            # An earlier adapter's signature says nothing of this one.
            (repository / name).unlink(missing_ok=True)
    flush_folder(repository)


def _replace(source: Path, target: Path) -> None:
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
