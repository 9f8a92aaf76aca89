"""Who a peer is: organisation, name and role, as its certificate binds them.

They stand in one URI of the certificate's alternative names, ``anabranch://ROLE/ORGANISATION/NAME``,
which nothing but the coordinator's authority could have put there: TLS has checked that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from urllib.parse import quote, unquote

from cryptography import x509

from anabranch.wire.keys import NAME

SCHEME = "anabranch"
FEDERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)
"""Names of federations here: they are names of folders, and a dot never stands in one."""
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Role(StrEnum):
    """What a peer may do; ``roles.py`` has the table."""

    ADMIN = "admin"
    OPERATOR = "operator"
    AUDITOR = "auditor"
    CLIENT = "client"


@dataclass(frozen=True)
class Identity:
    """A peer.

    Attributes:
        organisation: Whose it is.
        name: What it is called; a client's updates count under it.
        role: What it may do.
    """

    organisation: str
    name: str
    role: Role

    def __post_init__(self) -> None:
        for field in ("organisation", "name"):
            value = getattr(self, field)
            if not NAME.fullmatch(value) or value.startswith("."):
                raise ValueError(
                    f"{field} {value[:100]!r} is no name: give 1 to 100 of A-Z a-z 0-9 _ . @ : -, "
                    "and no dot first"
                )

    @property
    def uri(self) -> str:
        """As a certificate holds it."""
        return f"{SCHEME}://{self.role}/{quote(self.organisation, '')}/{quote(self.name, '')}"


@dataclass(frozen=True)
class Shown:
    """A certificate that a peer showed.

    Attributes:
        identity: Whom it binds.
        serial: Its number, in hexadecimal.
        not_after_s: Unix seconds of its last moment.
    """

    identity: Identity
    serial: str
    not_after_s: float


@lru_cache(maxsize=20_000)
def shown(pem: bytes) -> Shown:
    """Read a certificate that TLS has verified.

    Raises:
        ValueError: It binds no peer: it is a server's, or not one of this coordinator's.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return Shown(
        identity=parse(uris[0] if len(uris) == 1 else ""),
        serial=f"{certificate.serial_number:x}",
        not_after_s=certificate.not_valid_after_utc.timestamp(),
    )


def parse(uri: str) -> Identity:
    """The peer that a URI names.

    Raises:
        ValueError: It names none.
    """
    scheme, _, rest = uri.partition("://")
    parts = rest.split("/")
    if scheme != SCHEME or len(parts) != 3:
        raise ValueError(f"{uri[:100]!r} names no peer")
    role, organisation, name = parts
    return Identity(unquote(organisation), unquote(name), Role(role))
