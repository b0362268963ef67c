"""Keys: everything a client hides or signs with comes from its one 32-byte secret by HKDF."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Item: TypeAlias = str | int | bytes
SIGNATURE = 64
NONCE = 12
TAG = 16


def derive(key: bytes, *items: Item, size: int = 32) -> bytes:
    """Returns the `size` bytes named by `items` under `key` (HKDF with SHA-256): other items, unrelated bytes.

    >>> derive(bytes(32), "a") == derive(bytes(32), "a"), derive(bytes(32), "a") == derive(bytes(32), b"a")
    (True, False)
    """
    return HKDF(SHA256(), size, None, _statement(items)).derive(key)


def digest(*items: Item) -> bytes:
    """Returns the 32-byte digest of `items`; no two different lists of items give the same one."""
    return digest_all(items)


def digest_all(parts: Iterable[Item | np.ndarray]) -> bytes:
    """Returns the digest of a list that may hold large contiguous arrays, without copying them."""
    made = blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, np.ndarray):
            made.update(f"{part.dtype.str} {part.shape};".encode())
            made.update(part.data)
        else:
            data = part if isinstance(part, bytes) else repr(part).encode()
            made.update(f"{type(part).__name__} {len(data)};".encode() + data)
    return made.digest()


def identity(secret: bytes) -> bytes:
    """Returns the public Ed25519 key [32] by which the others know the holder of `secret`; make it known beforehand."""
    return _signer(secret).public_key().public_bytes_raw()


def sign(secret: bytes, *items: Item) -> bytes:
    """Returns the signature [64] of `items` by the holder of `secret`."""
    return _signer(secret).sign(_statement(items))


def verify(public: bytes, signature: bytes, *items: Item) -> bool:
    """Returns whether `signature` on `items` is by the holder of the identity `public`, whatever bytes were given."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _statement(items))
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyPair:
    """The X25519 key of one client for one run."""

    def __init__(self, secret: bytes, run: str) -> None:
        self._private = X25519PrivateKey.from_private_bytes(derive(secret, "agreement", run))
        self.public = self._private.public_key().public_bytes_raw()

    def pair(self, public: bytes) -> bytes | None:
        """Returns the secret [32] shared with the holder of `public`, or None if that is a point of low order."""
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return None
        return derive(shared, "pair", *sorted((self.public, public)))


def agrees(public: bytes) -> bool:
    """Returns whether a secret can be agreed on with the holder of `public`.

    A point of low order gives zero with every key, since X25519 keys are multiples of 8 (RFC 7748, section 6.1). So
    any key can try it, and nobody has to make the secrets that it does not need.

    >>> agrees(bytes(32)), agrees(KeyPair(bytes(32), "run").public)
    (False, True)
    """
    try:
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        return False
    return True


def seal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes:
    """Encrypts `data` so that only `key` opens it, and only for the same `about`: 16 bytes longer."""
    return ChaCha20Poly1305(key).encrypt(nonce, data, about)


def unseal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes | None:
    """Returns what was sealed, or None if it was changed, meant for another or is about something else."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, data, about)
    except InvalidTag:
        return None


def _signer(secret: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(derive(secret, "identity"))


def _statement(items: tuple[Item, ...]) -> bytes:
    return repr(("fedpress secure 1", *items)).encode()
