"""All that crosses a network: codecs, messages, their limits.

Names are imported on first use, so that configuration and manifests need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.wire.adapter_message import decode_adapter as decode_adapter
    from anabranch.wire.adapter_message import decode_change as decode_change
    from anabranch.wire.adapter_message import encode_adapter as encode_adapter
    from anabranch.wire.adapter_message import encode_change as encode_change
    from anabranch.wire.config import CodecConfig as CodecConfig
    from anabranch.wire.decode import decode_forms as decode_forms
    from anabranch.wire.decode import decode_into as decode_into
    from anabranch.wire.decode import decode_update as decode_update
    from anabranch.wire.encode import Encoded as Encoded
    from anabranch.wire.encode import encode_update as encode_update
    from anabranch.wire.errors import WireError as WireError
    from anabranch.wire.feedback import compensate as compensate
    from anabranch.wire.feedback import remainder as remainder
    from anabranch.wire.header import read_manifest as read_manifest
    from anabranch.wire.limits import Limits as Limits
    from anabranch.wire.manifest import Manifest as Manifest
    from anabranch.wire.manifest import UpdateMeta as UpdateMeta

_HOMES = {
    "CodecConfig": "config",
    "Encoded": "encode",
    "Limits": "limits",
    "Manifest": "manifest",
    "UpdateMeta": "manifest",
    "WireError": "errors",
    "compensate": "feedback",
    "decode_adapter": "adapter_message",
    "decode_change": "adapter_message",
    "decode_forms": "decode",
    "decode_into": "decode",
    "decode_update": "decode",
    "encode_adapter": "adapter_message",
    "encode_change": "adapter_message",
    "encode_update": "encode",
    "read_manifest": "header",
    "remainder": "feedback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
