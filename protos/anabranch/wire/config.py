"""How updates are encoded: configuration, free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DenseDtype = Literal["fp32", "bf16", "int8"]
"""How a dense entry is stored."""


class CodecConfig(BaseModel):
    """Which codec a sender uses, and how much it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["ternary", "dense"] = "ternary"
    """``ternary`` keeps the largest entries as signs times a scale; ``dense`` keeps them all."""

    density: float = Field(0.1, gt=0, le=1)
    """Share of each tensor's entries that ``ternary`` keeps, by magnitude."""

    dtype: DenseDtype = "fp32"
    """How ``dense`` stores an entry: exactly, with 8 bits of precision, or as one of 255 levels of
    its block."""

    feedback: float = Field(1.0, ge=0, le=1)
    """Error feedback: share of what an update left out that the client adds to its next one."""

    feedback_gap: int = Field(4, ge=1)
    """A client absent for more rounds than this starts with no residual."""
