"""The authority of a coordinator: the key that peers' and the server's certificates come from."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anabranch.coordinator.api.identity import Identity

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.pem"
CA_DAYS = 3650
EARLY = datetime.timedelta(minutes=5)
"""How far a peer's clock may be behind."""
CSR_BYTES = 16 << 10

Key = ec.EllipticCurvePrivateKey


class Authority:
    """Issues certificates.

    Args:
        folder: Holds ``ca.key`` and ``ca.pem``; both are made where there are none.

    Raises:
        ValueError: One is there without the other, or others may read the key.
    """

    def __init__(self, folder: Path) -> None:
        key, certificate = folder / CA_KEY, folder / CA_CERTIFICATE
        if key.exists() != certificate.exists():
            raise ValueError(
                f"{folder}: {CA_KEY} and {CA_CERTIFICATE} belong together; restore both"
            )
        if not key.exists():
            _make(key, certificate)
        if key.stat().st_mode & 0o077:
            raise ValueError(f"{key}: others may read this private key; chmod 600 it")
        secret = serialization.load_pem_private_key(key.read_bytes(), password=None)
        assert isinstance(secret, ec.EllipticCurvePrivateKey)
        self._key = secret
        self._certificate = x509.load_pem_x509_certificate(certificate.read_bytes())

    @property
    def pem(self) -> bytes:
        """Its certificate, which peers check the server's with."""
        return certificate_pem(self._certificate)

    def issue(
        self, csr_pem: bytes, identity: Identity, seconds: float
    ) -> tuple[x509.Certificate, bytes]:
        """A peer's certificate.

        Args:
            csr_pem: Its signing request; of that only the key is taken.
            identity: Whom it binds.
            seconds: How long it holds.

        Returns:
            It, and the same in PEM.

        Raises:
            ValueError: That is no signing request, its signature is not its key's, or the key is
                not one of the curve P-256.
        """
        if len(csr_pem) > CSR_BYTES:
            raise ValueError(f"a signing request of {len(csr_pem)} bytes is over {CSR_BYTES}")
        try:
            request = x509.load_pem_x509_csr(csr_pem)
            sound = request.is_signature_valid
        # cryptography has a class of its own for keys and signatures that it does not know.
        except Exception as error:
            raise ValueError("the signing request cannot be read; give PKCS#10 in PEM") from error
        if not sound:
            raise ValueError("the signing request is not signed by its own key")
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("the signing request's key is not one of the curve P-256; make such")
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.organisation[:64]),
                x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64]),
            ]
        )
        names = [x509.UniformResourceIdentifier(identity.uri)]
        made = self._sign(subject, key, names, seconds, ExtendedKeyUsageOID.CLIENT_AUTH)
        return made, certificate_pem(made)

    def server_pair(self, names: Sequence[str], days: float = 365) -> tuple[bytes, bytes]:
        """A fresh key of the server's and its certificate, both in PEM."""
        key = new_tls_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anabranch coordinator")])
        made = self._sign(
            subject, key.public_key(), [_address(name) for name in names], days * 86_400,
            ExtendedKeyUsageOID.SERVER_AUTH,
        )  # fmt: skip
        return key_pem(key), certificate_pem(made)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        names: Sequence[x509.GeneralName],
        seconds: float,
        usage: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLY)
            .not_valid_after(now + datetime.timedelta(seconds=seconds))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def new_tls_key() -> Key:
    """A key for TLS, of the curve P-256: gRPC's library takes no Ed25519 there."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """A private key in unencrypted PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, never over another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(data)


def _make(key_path: Path, certificate_path: Path) -> None:
    key = new_tls_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anabranch authority")])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(key_path, key_pem(key))
    certificate_path.write_bytes(certificate_pem(certificate))


def _address(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
