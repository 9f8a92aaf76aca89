"""Lying manifests: a message that says of itself what is not so, correctly signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.resign import resigned
from anabranch.simulation.attacks.turn import Turn
from anabranch.wire.manifest import Manifest

Lie = Literal[
    "round", "base", "start", "run", "client", "codec", "shape", "nonzeros", "digest", "raw_bytes",
    "scale", "examples",
]  # fmt: skip
"""What is lied about. All are refused but ``examples``, which no merge reads."""


class LyingManifestConfig(AttackConfig):
    """Parameters of the lie."""

    about: Lie = "round"
    """What is lied about."""


def _meta(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, meta=replace(manifest.meta, **changes))


def _frame(**changes: Any) -> Callable[[Manifest], Manifest]:
    def lie(manifest: Manifest) -> Manifest:
        return replace(
            manifest, frames=(replace(manifest.frames[0], **changes), *manifest.frames[1:])
        )

    return lie


def _row(**changes: Any) -> Callable[[Manifest], Manifest]:
    def lie(manifest: Manifest) -> Manifest:
        rows = manifest.frames[0].tensors
        return _frame(tensors=(replace(rows[0], **changes), *rows[1:]))(manifest)

    return lie


def _replayed(manifest: Manifest) -> Manifest:
    return _meta(round=manifest.meta.round - 1)(manifest)


LIES: dict[Lie, Callable[[Manifest], Manifest]] = {
    "round": _replayed,
    "base": _meta(base_hash="0" * 64),
    "start": _meta(start_hash="0" * 64),
    "run": _meta(run="another"),
    "client": _meta(client="client-0000"),
    "codec": lambda manifest: replace(manifest, codec="dense-of-another-kind"),
    "shape": _row(shape=(1 << 30,)),
    "nonzeros": _row(nonzeros=1),
    "digest": _frame(digest=bytes(16)),
    "raw_bytes": _frame(raw_bytes=1 << 40),
    "scale": _row(scale=float("inf")),
    "examples": _meta(examples=(1 << 64) - 1),
}


def lying_manifest(blob: bytes, turn: Turn, config: LyingManifestConfig) -> bytes:
    """The message under a manifest that lies, signed again."""
    return resigned(blob, LIES[config.about], turn.keys)


LYING_MANIFEST = Kind("lying_manifest", LyingManifestConfig, tamper=lying_manifest)
