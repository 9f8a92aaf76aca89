"""The codecs there are, in one explicit tuple."""

from __future__ import annotations

from typing import Any

from anabranch.wire.codecs.codec import Codec
from anabranch.wire.codecs.dense import BF16, FP32, INT8
from anabranch.wire.codecs.ternary import TERNARY
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError

CODECS: tuple[Codec[Any], ...] = (TERNARY, FP32, BF16, INT8)


def codec_for(config: CodecConfig) -> Codec[Any]:
    """The codec a configuration asks for."""
    name = config.name if config.name == "ternary" else f"{config.name}-{config.dtype}"
    return next(codec for codec in CODECS if codec.name == name)


def codec_numbered(number: int) -> Codec[Any]:
    """The codec a frame names.

    Raises:
        WireError: This release has no such codec.
    """
    for codec in CODECS:
        if codec.number == number:
            return codec
    raise WireError("codec", f"a frame has codec {number}, which this release does not know")
