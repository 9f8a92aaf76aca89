"""An adapter in a local OCI image layout (image-spec 1.1), as tools for registries read it.

``oras cp --from-oci-layout FOLDER:TAG REGISTRY/NAME:TAG`` takes it on to a registry, and
``oras pull --oci-layout FOLDER:TAG`` gives back the PEFT folder: each layer is one of its files,
under its name. The same adapter is the same manifest, to the byte. Loads no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.coordinator.store.artifacts import flush_folder

LAYOUT_FILE, INDEX_FILE = "oci-layout", "index.json"
LAYOUT = {"imageLayoutVersion": "1.0.0"}
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ADAPTER_TYPE = "application/vnd.anabranch.peft-adapter.v1"
"""The artifact's type."""
EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
"""The configuration of what is no image."""
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
LAYER_TYPES = {
    "adapter_model.safetensors": "application/vnd.anabranch.weights.safetensors",
    "adapter_config.json": "application/vnd.anabranch.peft-config+json",
    "README.md": "text/markdown",
    "receipt.json": "application/vnd.anabranch.receipt+json",
    "signature.json": "application/vnd.anabranch.signature+json",
}
"""The media type of each file, in the order of the layers."""
TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
"""What a registry takes for a tag."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
FILE_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
LARGEST_JSON = 4 << 20
"""Bytes of an index or a manifest: registries take no larger one."""
CHUNK_BYTES = 1 << 20


def push(files: Path, layout: Path, tag: str, annotations: Mapping[str, str]) -> str:
    """Put a PEFT folder's files into a layout, and let a tag name them.

    Blobs come first and the index last, so that a layout is whole whenever it is read.

    Args:
        files: The folder; those of its files that ``LAYER_TYPES`` names are taken.
        layout: The layout's folder, made when missing.
        tag: What stands for it from now on, and no longer for what it stood for.
        annotations: Of the manifest.

    Returns:
        The manifest's digest, ``sha256:…``.

    Raises:
        ValueError: The tag is none, or the folder holds something else than a layout.
    """
    if not TAG.fullmatch(tag):
        raise ValueError(f"{tag[:80]!r} is no tag of a registry: give A-Z a-z 0-9 _ . -")
    with _locked(layout):
        index = _index(layout)
        layers = [
            {**_put_file(layout, files / name), "mediaType": kind, "annotations": {TITLE: name}}
            for name, kind in LAYER_TYPES.items()
            if (files / name).is_file()
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ADAPTER_TYPE,
            "config": {**_put(layout, EMPTY), "mediaType": EMPTY_TYPE},
            "layers": layers,
            "annotations": dict(annotations),
        }
        put = _put(layout, _json(manifest))
        described = {
            **put,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ADAPTER_TYPE,
            "annotations": {REF_NAME: tag},
        }
        kept = [one for one in index["manifests"] if _ref(one) != tag]
        _replace(layout / INDEX_FILE, _json({**index, "manifests": [*kept, described]}))
    return str(put["digest"])


def pull(layout: Path, tag: str, into: Path) -> dict[str, Any]:
    """Write a tag's files into a folder; every byte is checked against its digest.

    Args:
        layout: The layout's folder; nothing in it is trusted.
        tag: The tag.
        into: An empty folder.

    Returns:
        The manifest.

    Raises:
        ValueError: There is no such tag, it is no adapter, or a blob is missing or not what its
            digest says.
    """
    index = _index(layout)
    found = [one for one in index["manifests"] if _ref(one) == tag]
    if len(found) != 1:
        names = ", ".join(sorted(filter(None, map(_ref, index["manifests"])))) or "none"
        raise ValueError(f"{layout}: {tag[:80]!r} is none of its tags ({names})")
    data = b"".join(_blob(layout, found[0], LARGEST_JSON))
    manifest = _object(data, f"{layout}: the manifest of {tag}")
    if manifest.get("artifactType") != ADAPTER_TYPE:
        kind = str(manifest.get("artifactType"))[:80]
        raise ValueError(f"{layout}: {tag} is of type {kind!r}, no adapter that was pushed here")
    for layer in manifest.get("layers", ()):
        name = str((layer.get("annotations") or {}).get(TITLE))
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{layout}: {tag} has a layer named {name[:80]!r}, no file's name")
        with (into / name).open("xb") as file:
            for part in _blob(layout, layer, None):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    return manifest


def _index(layout: Path) -> dict[str, Any]:
    path = layout / INDEX_FILE
    marker = layout / LAYOUT_FILE
    if not marker.is_file():
        raise ValueError(f"{layout}: is no OCI image layout, for it has no {LAYOUT_FILE}")
    version = _object(marker.read_bytes(), str(marker)).get("imageLayoutVersion")
    if version != LAYOUT["imageLayoutVersion"]:
        raise ValueError(f"{marker}: version {str(version)[:20]!r}, not 1.0.0")
    if not path.exists():
        return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
    index = _object(path.read_bytes(), str(path))
    manifests = index.get("manifests")
    if not isinstance(manifests, list) or not all(isinstance(one, dict) for one in manifests):
        raise ValueError(f"{path}: damaged: it lists no manifests")
    return index


def _ref(descriptor: Mapping[str, Any]) -> str | None:
    annotations = descriptor.get("annotations")
    return annotations.get(REF_NAME) if isinstance(annotations, dict) else None


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: damaged: no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: damaged: no JSON object")
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _put(layout: Path, data: bytes) -> dict[str, Any]:
    """Keep a small blob; its digest and size."""
    digest = hashlib.sha256(data).hexdigest()
    path = layout / "blobs" / "sha256" / digest
    if not path.exists():
        _replace(path, data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _put_file(layout: Path, source: Path) -> dict[str, Any]:
    """Keep a file's bytes, read once and never held whole."""
    folder = layout / "blobs" / "sha256"
    partial, total, size = folder / f".{os.getpid()}.partial", hashlib.sha256(), 0
    try:
        with source.open("rb") as read, partial.open("wb") as write:
            while part := read.read(CHUNK_BYTES):
                total.update(part)
                write.write(part)
                size += len(part)
            write.flush()
            os.fsync(write.fileno())
        partial.replace(folder / total.hexdigest())
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(folder)
    return {"digest": f"sha256:{total.hexdigest()}", "size": size}


def _replace(path: Path, data: bytes) -> None:
    """Write a file under its name at once."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)


def _blob(layout: Path, descriptor: Mapping[str, Any], most: int | None) -> Iterator[bytes]:
    """A blob's bytes in parts, the last of them once all are what the descriptor says."""
    digest, size = str(descriptor.get("digest")), descriptor.get("size")
    if not DIGEST.fullmatch(digest) or not isinstance(size, int):
        raise ValueError(f"{layout}: damaged: a descriptor has no sha256 digest and size")
    path = layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
    if not path.is_file():
        raise ValueError(f"{layout}: blob {digest} is missing; push again")
    if path.stat().st_size != size or (most is not None and size > most):
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, not {size}; push again")
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK_BYTES):
            total.update(part)
            yield part
    if f"sha256:{total.hexdigest()}" != digest:
        raise ValueError(f"{path}: its bytes are not those of its name; push again")


@contextmanager
def _locked(layout: Path) -> Iterator[None]:
    """The layout, made when missing, to one writer at a time."""
    if layout.exists() and not (layout / LAYOUT_FILE).is_file() and any(layout.iterdir()):
        raise ValueError(
            f"{layout}: holds files and is no OCI image layout; name a new folder, or a layout"
        )
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    number = os.open(layout, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        if not (layout / LAYOUT_FILE).exists():
            _replace(layout / LAYOUT_FILE, json.dumps(LAYOUT).encode())
        yield
    finally:
        os.close(number)
