"""Keys and certificates of a network: certificate authority, server certificate, client keys."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpress.errors import NetworkError

# Long: each client has a copy of this certificate, which a new one would have to replace.
YEARS = 10
"""Years, of 365 days, for which the authority's certificate is valid."""
DAYS = 397
"""Days for which a server's certificate is valid: 13 months, the limit of browsers until 2026."""
# Flower accepts client keys on NIST curves only; its own tools create keys on P-384.
CURVE = ec.SECP384R1()


@dataclass(frozen=True, eq=False)
class Authority:
    """The network's own certificate authority. Clients trust only certificates that it has signed.

    Attributes:
        key: private key. It stays with whoever set the network up, best on a machine that is
            offline.
        certificate: public certificate, of which every client has a copy.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls) -> Authority:
        """Creates an authority with a new key."""
        key = ec.generate_private_key(CURVE)
        name = _name("fedpress network")
        now = _now()
        # This key may sign certificates and nothing else.
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # A day earlier, for machines whose clock is behind.
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
            # Path length 0: a certificate signed by this one cannot sign a further one.
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA384())
        )
        return cls(key, certificate)

    @classmethod
    def read(cls, key: Path, certificate: Path) -> Authority:
        """Reads the two PEM files that `write` writes.

        Raises:
            NetworkError: if a file is missing or contains something else.
        """
        try:
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
            signed = x509.load_pem_x509_certificate(certificate.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise NetworkError(
                f"the authority cannot be read ({error})",
                place=str(key),
                cure="bring the folder back that fedpress network init wrote",
            ) from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise NetworkError(
                "not a key on an elliptic curve", place=str(key), cure="bring the right file back"
            )
        return cls(loaded, signed)

    def write(self, key: Path, certificate: Path) -> None:
        """Writes key and certificate as PEM files; the key file can be read only by its owner."""
        write_private(key, _pem(self.key))
        certificate.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def sign_server(self, host: str, key: Path, certificate: Path, *, days: int = DAYS) -> None:
        """Writes a new key and certificate for a server.

        The certificate is also valid for localhost, where the server itself connects to its
        SuperLink (the process of Flower that holds the connections).

        Args:
            host: name or address by which clients reach the server.
            key: path of the key file.
            certificate: path of the certificate file.
            days: how long the certificate is valid.
        """
        own = ec.generate_private_key(CURVE)
        now = _now()
        names: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
        made = (
            x509.CertificateBuilder()
            # X.509 allows 64 characters here. TLS compares the names below, not this one.
            .subject_name(_name(host[:64]))
            .issuer_name(self.certificate.subject)
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName(dict.fromkeys(names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA384())
        )
        write_private(key, _pem(own))
        certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))


def write_node_key(folder: Path) -> str:
    """Creates a client's key pair, by which the server recognises the client.

    Writes `node.key` and `node.pub` (P-384, in OpenSSH's format) into `folder`, and returns the
    public key as text.
    """
    key = ec.generate_private_key(CURVE)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_private(folder / "node.key", private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "node.pub").write_bytes(public + b"\n")
    return public.decode()


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads the private key `node.key` of a client.

    Raises:
        NetworkError: if the file is missing, readable for other users, or contains something else.
    """
    try:
        # As ssh does: a private key that others can read is no longer a secret.
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise NetworkError(
                "other users of this machine may read it",
                place=str(path),
                cure=f"chmod 600 {path}",
            )
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise NetworkError(
            f"the key of this client cannot be read ({error})",
            place=str(path),
            cure="copy the client's folder anew from whoever set the network up",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NetworkError(
            "not a key on an elliptic curve", place=str(path), cure="take the key of this client"
        )
    return key


def identity_of(folder: Path) -> bytes:
    """Returns the 32 secret bytes from which a client's keys in secure sums (aggregation) follow.

    The first call draws them and stores them in `identity.key`. They never leave the machine; only
    the public key computed from them is sent.

    Args:
        folder: the client's folder.

    Raises:
        NetworkError: if the file does not contain 32 bytes.
    """
    path = folder / "identity.key"
    if not path.exists():
        write_private(path, os.urandom(32))
    secret = path.read_bytes()
    if len(secret) != 32:
        raise NetworkError(
            f"got {len(secret)} bytes, expected 32",
            place=str(path),
            cure="bring the file back; without it other clients do not know this one any more",
        )
    return secret


def days_left(certificate: Path) -> float:
    """Returns for how many days a certificate is still valid; negative if it has expired.

    Raises:
        NetworkError: if the file contains no certificate.
    """
    found = _certificate(certificate)
    return (found.not_valid_after_utc - _now()).total_seconds() / 86_400


def check_public(text: str, place: str) -> str:
    """Checks a client's public key, and returns it without its comment.

    Args:
        text: the key in OpenSSH's format: type, key, and possibly a comment.
        place: where the key is written, for errors.

    Raises:
        NetworkError: if `text` is not an elliptic-curve key in OpenSSH's format.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, TypeError) as error:
        raise NetworkError(
            f"not a public key in OpenSSH's format ({error})",
            place=place,
            cure="take the content of the client's node.pub",
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NetworkError(
            "not a key on an elliptic curve",
            place=place,
            cure="take the content of the client's node.pub",
        )
    # Without the comment equal keys are equal texts, so a key that is listed twice is found.
    return " ".join(text.split()[:2])


def check_server(ca: Path, certificate: Path, key: Path) -> None:
    """Checks that the server's key fits its certificate, and that the authority has signed it.

    Args:
        ca: certificate of the authority.
        certificate: certificate of the server.
        key: private key of the server.

    Raises:
        NetworkError: if a file cannot be read, or the files do not fit. The reason may be that only
            some of them were copied after `fedpress network renew`.
    """
    authority, own = _certificate(ca), _certificate(certificate)
    try:
        secret = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise NetworkError(
            f"the server's key cannot be read ({error})",
            place=str(key),
            cure="copy server.key anew, or make one with fedpress network renew",
        ) from error
    if secret.public_key() != own.public_key():
        raise NetworkError(
            "it is not the key of server.crt",
            place=str(key),
            cure="copy both server.crt and server.key from the same fedpress network renew",
        )
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise NetworkError(
            "it is not signed by the authority in ca.crt",
            place=str(certificate),
            cure="copy server.crt and ca.crt from the same network folder",
        ) from error


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"not a certificate ({error})",
            place=str(path),
            cure="copy it anew from whoever set the network up",
        ) from error


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that only its owner can read, from the first byte on."""
    # The mode is given when the file is created: a later chmod would leave a moment in which
    # others can open it. O_EXCL refuses a file or link that somebody puts there meanwhile.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
