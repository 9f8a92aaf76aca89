"""What a peer shows the coordinator: a folder with its key and its certificate. Loads no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

CA_FILE, CERTIFICATE_FILE, KEY_FILE, ABOUT_FILE = "ca.pem", "peer.pem", "peer.key", "peer.json"


@dataclass(frozen=True)
class Invitation:
    """What an admin hands to somebody who is to enrol; whoever has it can, once.

    Attributes:
        token: The one-time token.
        ca_pem: The coordinator's authority, which its server is checked with.
        address: ``HOST:PORT`` for callers with certificates.
        enrol_address: ``HOST:PORT`` for those without.
    """

    token: str
    ca_pem: bytes
    address: str
    enrol_address: str

    def write(self, path: Path) -> None:
        """Write a file that only its owner may read, never over another one."""
        value = {
            "token": self.token, "ca_pem": self.ca_pem.decode(), "address": self.address,
            "enrol_address": self.enrol_address,
        }  # fmt: skip
        _write_private(path, json.dumps(value, indent=2).encode() + b"\n")


def read_invitation(path: Path) -> Invitation:
    """Read an invitation.

    Raises:
        ValueError: That is none.
    """
    try:
        value = json.loads(path.read_bytes())
        return Invitation(
            str(value["token"]), str(value["ca_pem"]).encode(), str(value["address"]),
            str(value["enrol_address"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no invitation; the coordinator's admin makes one with "
            "`anabranch coordinator invite`"
        ) from error


@dataclass(frozen=True)
class Credentials:
    """A peer's key and certificate.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def channel(self) -> grpc.ChannelCredentials:
        """For a connection that shows the certificate.

        Raises:
            ValueError: A file is missing, or others may read the key.
        """
        key = self.folder / KEY_FILE
        for path in (self.folder / CA_FILE, self.folder / CERTIFICATE_FILE, key):
            if not path.is_file():
                raise ValueError(f"{path}: missing; `anabranch client enrol` writes it")
        if key.stat().st_mode & 0o077:
            raise ValueError(f"{key}: others may read this private key; chmod 600 it")
        return grpc.ssl_channel_credentials(
            (self.folder / CA_FILE).read_bytes(), key.read_bytes(),
            (self.folder / CERTIFICATE_FILE).read_bytes(),
        )  # fmt: skip

    @property
    def about(self) -> dict[str, Any]:
        """Whom they bind, and where the coordinator is."""
        path = self.folder / ABOUT_FILE
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged; `anabranch client enrol` writes it"
            ) from error
        return value

    def write(
        self, key_pem: bytes, certificate_pem: bytes, ca_pem: bytes, about: dict[str, Any]
    ) -> None:
        """Write all, in place of earlier ones where these are a renewal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = {
            CA_FILE: ca_pem, CERTIFICATE_FILE: certificate_pem,
            ABOUT_FILE: json.dumps(about, indent=2).encode() + b"\n", KEY_FILE: key_pem,
        }  # fmt: skip
        for name, data in new.items():
            fresh = self.folder / f"{name}.new"
            fresh.unlink(missing_ok=True)
            _write_private(fresh, data)
        for name in new:
            (self.folder / f"{name}.new").replace(self.folder / name)


def new_request(name: str) -> tuple[bytes, bytes]:
    """A fresh key and a signing request for it, both in PEM.

    Args:
        name: Common name of the request; the certificate's comes from the token.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    signed = request.sign(key, hashes.SHA256())
    return pem, signed.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
