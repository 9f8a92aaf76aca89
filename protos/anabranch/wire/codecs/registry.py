"""The codecs there are, in one explicit tuple."""

from __future__ import annotations

from typing import Any

from anabranch.wire.codecs.axes_frame import AXES
from anabranch.wire.codecs.codec import Codec, Packing
from anabranch.wire.codecs.dare import DARE
from anabranch.wire.codecs.dense import BF16, EIGHT_BITS, FOUR_BITS, FP16, FP32
from anabranch.wire.codecs.ranks import RANKS
from anabranch.wire.codecs.rotated import ROTATED
from anabranch.wire.codecs.sign import SIGN
from anabranch.wire.codecs.ternary import TERNARY
from anabranch.wire.codecs.two_bit import TWO_BIT
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError

CODECS: tuple[Codec[Any], ...] = (
    TERNARY,
    TWO_BIT,
    FP32,
    FP16,
    BF16,
    EIGHT_BITS,
    FOUR_BITS,
    SIGN,
    *ROTATED,
    AXES,
    DARE,
    RANKS,
)


def codec_for(config: CodecConfig) -> Codec[Any]:
    """The codec a configuration asks for."""
    within = {"dense": config.dtype, "rotated": str(config.bits)}
    name = "-".join([config.name, within[config.name]] if config.name in within else [config.name])
    return next(codec for codec in CODECS if codec.name == name)


def packing_numbered(number: int) -> tuple[Codec[Any], Packing[Any]]:
    """The codec a frame names, and which of its packings.

    Raises:
        WireError: This release has no such codec.
    """
    for codec in CODECS:
        for packing in codec.packings:
            if packing.number == number:
                return codec, packing
    raise WireError("codec", f"a frame has codec {number}, which this release does not know")
