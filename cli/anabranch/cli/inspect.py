"""``anabranch inspect``: what is in an update or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.output import human_bytes, print_json, stdout


def inspect_command(
    file: Annotated[
        Path, typer.Argument(help="An update or adapter file, or a PEFT adapter folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an update, an encoded adapter or a PEFT folder holds."""
    if not file.exists():
        raise ValueError(f"{file}: there is no such file or folder")
    facts = _folder(file) if file.is_dir() else _blob(file)
    if as_json:
        print_json(facts)
        return
    from rich.markup import escape
    from rich.table import Table

    tensors = facts.pop("tensors")
    for key, value in facts.items():
        stdout.print(f"[dim]{key.replace('_', ' '):>16}[/]  {escape(str(value))}")
    table = Table(box=None, pad_edge=False)
    for key in tensors[0] if tensors else ():
        table.add_column(key, justify="left" if key == "name" else "right", overflow="fold")
    for row in tensors:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        table.add_row(*map(escape, cells))
    stdout.print(table)


def _folder(folder: Path) -> dict[str, Any]:
    from anabranch.vectors.peft_folder import read_adapter

    adapter = read_adapter(folder)
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": f"{factors.b_mr.shape[0]}x{factors.a_rn.shape[1]}",
            "rank": factors.rank,
            "scaling": factors.scaling,
            "norm": factors.delta().norm(),
        }
        for name, factors in sorted(adapter.lora.items())
    ]
    tensors += [
        {
            "name": name,
            "shape": "x".join(map(str, tensor.shape)),
            "rank": "full",
            "scaling": 1.0,
            "norm": float(tensor.float().norm()),
        }
        for name, tensor in sorted(adapter.dense.items())
    ]
    entries = sum(tensor.numel() for tensor in adapter.tensors().values())
    return {
        "kind": "PEFT adapter",
        "base_hash": adapter.base_hash or "not recorded",
        "adapter_hash": adapter.hash(),
        "entries": entries,
        "tensors": tensors,
    }


def _blob(file: Path) -> dict[str, Any]:
    from anabranch.wire import WireError, read_manifest
    from anabranch.wire.codecs.registry import packing_numbered

    try:
        blob = file.read_bytes()
        manifest = read_manifest(blob)
    except WireError as error:
        raise ValueError(f"{file}: is no Anabranch update or adapter: {error}") from error
    meta = manifest.meta
    entries = sum(frame.entries for frame in manifest.frames)
    return {
        "kind": meta.kind,
        "federation": meta.federation,
        "run": meta.run,
        "round": meta.round,
        "client": meta.client,
        "base_hash": meta.base_hash,
        "start_hash": meta.start_hash,
        "examples": meta.examples,
        "codec": manifest.codec,
        "signed": bool(manifest.signature),
        "entries": entries,
        "size": human_bytes(len(blob)),
        "size_bytes": len(blob),
        "payload_bytes": manifest.payload_bytes,
        "importance_bytes": sum(frame.payload_bytes for frame in manifest.importance),
        "ratio_to_fp16": round(2 * entries / len(blob), 2),
        "frames": len(manifest.frames),
        "tensors": [
            {
                "name": tensor.name,
                "shape": "x".join(map(str, tensor.shape)),
                "codec": packing_numbered(frame.codec)[0].name,
                "non-zeros": tensor.nonzeros,
                "scale": tensor.scale,
            }
            for frame in manifest.frames
            for tensor in frame.tensors
        ],
    }
