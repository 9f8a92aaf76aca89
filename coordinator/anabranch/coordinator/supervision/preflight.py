"""What a SuperLink would stumble over, looked at first: its port, TLS files, node keys."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from anabranch.coordinator.doctor import Finding, examine_federation, look
from anabranch.coordinator.federation import load_federation
from anabranch.coordinator.supervision.config import CoordinatorConfig, TlsConfig
from anabranch.coordinator.surroundings import port_free


def examine_coordinator(config: CoordinatorConfig) -> list[Finding]:
    """Look at a federation's folder, and at the service it is run as."""
    return [*examine_federation(config.federation), *examine_service(config)]


def examine_service(config: CoordinatorConfig) -> list[Finding]:
    """Look at what ``coordinator.toml`` names."""
    return list(_findings(config))


def _findings(config: CoordinatorConfig) -> Iterator[Finding]:
    yield look("port", lambda: port_free(config.host, config.port))
    yield look("tls", lambda: _tls(config.tls, config.host))
    yield look("node keys", lambda: _node_keys(config))


def _tls(tls: TlsConfig | None, host: str) -> str:
    if tls is None:
        return f"none: whoever is on this machine may join at {host}"
    certificate, authority = (_certificate(path) for path in (tls.certificate, tls.authority))
    key = _private_key(tls.key)
    if _public_bytes(key.public_key()) != _public_bytes(certificate.public_key()):
        raise ValueError(f"{tls.key} is not the key of {tls.certificate}; give the pair")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ValueError(
            f"{tls.certificate} was not signed by {tls.authority}; give the authority that did"
        ) from error
    now = datetime.datetime.now(datetime.UTC)
    for path, one in ((tls.certificate, certificate), (tls.authority, authority)):
        if not one.not_valid_before_utc <= now < one.not_valid_after_utc:
            raise ValueError(
                f"{path} is valid from {one.not_valid_before_utc:%Y-%m-%d} to "
                f"{one.not_valid_after_utc:%Y-%m-%d}; renew it, or set the clock"
            )
    names = _names(certificate)
    if host not in ("0.0.0.0", "::") and host not in names:
        raise ValueError(
            f"{tls.certificate} is for {', '.join(names) or 'no host'}, not for {host}; issue one "
            "with that name"
        )
    days = (certificate.not_valid_after_utc - now).days
    return f"for {', '.join(names)}, valid for {days} more days"


def _node_keys(config: CoordinatorConfig) -> str:
    if config.node_keys is None:
        return "none: every node that reaches the port may join"
    if not config.node_keys.is_dir():
        raise ValueError(f"{config.node_keys} is no folder; make it, with a KEY.pub of each node")
    paths = sorted(config.node_keys.glob("*.pub"))
    for path in paths:
        try:
            serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"{path} is no public key in OpenSSH's form ({error})") from error
    quorum = load_federation(config.federation).quorum
    if len(paths) < quorum:
        raise ValueError(
            f"{config.node_keys} holds {len(paths)} keys, and the quorum is {quorum}; add more"
        )
    return f"{len(paths)} nodes may join"


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no certificate in PEM ({error})") from error


def _private_key(path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no private key in PEM without a password") from error


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _names(certificate: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    names = [str(name) for name in found.get_values_for_type(x509.DNSName)]
    return names + [str(address) for address in found.get_values_for_type(x509.IPAddress)]
