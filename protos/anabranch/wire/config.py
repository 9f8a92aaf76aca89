"""How updates are encoded: configuration, free of torch."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DenseDtype = Literal["fp32", "fp16", "bf16", "int8"]
"""How a dense entry is stored."""


BUDGETED = ("ternary", "two-bit")
"""Codecs whose densities can be chosen for a budget."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class CodecConfig(BaseModel):
    """Which codec a sender uses, and how much it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["ternary", "two-bit", "dense", "sign", "rotated", "axes", "dare", "ranks"] = (
        "ternary"
    )
    """``ternary`` keeps the largest entries as signs times a scale; ``two-bit`` as signs times one
    of two scales; ``dense`` keeps them all; ``sign`` keeps the sign of each, ``rotated`` a few bits
    of each after a random rotation; ``axes`` all of them, in even steps along the axes of each
    matrix, at the bits that a given loss takes; ``dare`` keeps a random share of them, enlarged;
    ``ranks`` keeps signs and the ranks of magnitudes, for a recipe that votes on them."""

    density: float = Field(0.1, gt=0, le=1)
    """Share of each tensor's entries that ``ternary`` and ``two-bit`` keep, by magnitude, and
    ``dare`` by chance."""

    budget: str | None = None
    """Bytes that an update of ``ternary`` or ``two-bit`` may have, such as "400 kB" or "1.5 MiB":
    the densities of all tensors are then chosen for the least squared error, and ``density`` says
    nothing."""

    dtype: Literal[DenseDtype, "int4"] = "fp32"
    """How ``dense`` stores an entry: exactly, with 11 or 8 bits of precision, or as one of 255 or
    15 levels of its block."""

    bits: int = Field(2, ge=1, le=8)
    """Of an entry, where it is ``rotated``; coded, a little less."""

    loss: float = Field(1e-3, ge=1e-10, le=0.1)
    """What ``axes`` may lose: the squared error over the squared norm of the update. It is about
    that; less where much of the update is below the step that this allows."""

    feedback: float = Field(1.0, ge=0, le=1)
    """Error feedback: share of what an update left out that the client adds to its next one."""

    feedback_gap: int = Field(4, ge=1)
    """A client absent for more rounds than this starts with no residual."""

    @property
    def budget_bytes(self) -> int | None:
        """The budget as a number of bytes; None where there is none."""
        return None if self.budget is None else _bytes(self.budget)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.budget is not None:
            if self.name not in BUDGETED:
                raise ValueError(
                    f"budget: {self.name} has no density to choose; "
                    f"set name to one of {', '.join(BUDGETED)}, or leave budget out"
                )
            _bytes(self.budget)
        if self.name == "dare" and self.feedback:
            raise ValueError(
                "feedback: what dare leaves out by chance and enlarges would be counted twice; "
                "set feedback to 0, or name to ternary"
            )
        return self


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)\s*", text)
    if match is None:
        raise ValueError(f"budget is {text!r}; give a size such as 400 kB or 1.5 MiB")
    number, unit = match.groups()
    return int(float(number) * _UNITS[unit])
