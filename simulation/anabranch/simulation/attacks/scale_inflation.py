"""Scale inflation: an honest support and honest signs, under a scale that is not."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.resign import resigned
from anabranch.simulation.attacks.turn import Turn
from anabranch.wire.manifest import Manifest


class ScaleInflationConfig(AttackConfig):
    """Parameters of the inflation."""

    factor: float = Field(1e6, gt=0)
    """Factor on each tensor's scale, in the manifest."""


def inflated(manifest: Manifest, factor: float) -> Manifest:
    """A manifest whose tensors weigh so many times more.

    Raises:
        ValueError: Its codec has no scales.
    """
    frames = []
    for frame in manifest.frames:
        if any(row.scale is None for row in frame.tensors):
            raise ValueError(
                f"scale_inflation: codec {manifest.codec} has no scale to inflate; "
                'set codec.name to "ternary", or attack by sign_flip'
            )
        rows = tuple(
            replace(row, scale=factor * row.scale) for row in frame.tensors if row.scale is not None
        )
        frames.append(replace(frame, tensors=rows))
    return replace(manifest, frames=tuple(frames))


def scale_inflation(blob: bytes, turn: Turn, config: ScaleInflationConfig) -> bytes:
    """The message with larger scales, signed again: its payload and digests still hold."""
    return resigned(blob, lambda manifest: inflated(manifest, config.factor), turn.keys)


SCALE_INFLATION = Kind("scale_inflation", ScaleInflationConfig, tamper=scale_inflation)
