"""Uploads and downloads in parts; what was cut off goes on where it ended. Loads no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from anabranch.client.api.caller import Caller, CallError
from anabranch.wire.v1 import coordinator_pb2 as pb

PART_BYTES = 256 << 10


def upload(
    caller: Caller,
    federation: str,
    number: int,
    data: bytes,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Upload an update, from where an earlier try ended.

    Args:
        caller: The coordinator, with a client's certificate.
        federation: Its name.
        number: The round.
        data: The encoded update.
        metrics: What is claimed of its training.

    Returns:
        Its artifact at the coordinator; the same when it had been admitted before.

    Raises:
        CallError: It was refused, or cut off: call again, and it goes on.
    """
    header = pb.UploadHeader(
        federation=federation, round=number, size_bytes=len(data),
        digest=hashlib.sha256(data).hexdigest(), metrics=dict(metrics or {}),
    )  # fmt: skip
    found = caller.call("Uploads.Offset", header)
    if found.admitted:
        return header.digest
    header.offset = found.offset
    reply = caller.call("Uploads.Upload", _parts(header, data), wait=True)
    return str(reply.digest)


def download(caller: Caller, federation: str, which: str, path: Path) -> tuple[int, str]:
    """Download an adapter into a file, from where an earlier try ended.

    Args:
        caller: The coordinator.
        federation: Its name.
        which: A round, a tag, ``latest``, the beginning of an adapter's hash, or ``start``.
        path: The file; ``PATH.partial`` holds what has come so far.

    Returns:
        Its bytes and their sha256.

    Raises:
        CallError: It was refused or cut off; ``bad-digest``: what came is not what was sent.
        FileExistsError: There is such a file.
    """
    if path.exists():
        raise FileExistsError(17, "there is such a file; give another name", str(path))
    partial = path.with_name(f"{path.name}.partial")
    offset = partial.stat().st_size if partial.exists() else 0
    request = pb.DownloadRequest(federation=federation, which=which, offset=offset)
    end: pb.DownloadEnd | None = None
    with partial.open("ab") as file:
        for part in caller.stream("Adapters.Download", request):
            if part.WhichOneof("part") == "end":
                end = part.end
            else:
                file.write(part.data)
    if end is None:
        raise CallError("cut-off", "the download ended early; call again to go on", refused=False)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != end.digest or partial.stat().st_size != end.size_bytes:
        partial.unlink()
        raise CallError(
            "bad-digest", f"{which}: what came is not what was sent; download it again",
            refused=False,
        )  # fmt: skip
    partial.replace(path)
    return end.size_bytes, digest


def _parts(header: pb.UploadHeader, data: bytes) -> Iterator[pb.UploadPart]:
    yield pb.UploadPart(header=header)
    for begin in range(header.offset, len(data), PART_BYTES):
        yield pb.UploadPart(data=data[begin : begin + PART_BYTES])
